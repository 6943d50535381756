"""The embedding sets that a run trains and evaluates on, opened and checked. Imports torch only once they fit."""

import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from hf_qie.config.recipe import Recipe
from hf_qie.data.embedding_sets import open_embeddings
from hf_qie.data.mixture import check_shared_prefix
from hf_qie.data.provenance import UNKNOWN, check_compat, check_transformer, checkpoint_compat, unverified
from hf_qie.data.schema import matrix_width, prompt_columns_in, shared_embeds
from hf_qie.errors import InputError
from hf_qie.models.base import Family, read_family
from hf_qie.runtime.ranks import rank

logger = logging.getLogger(__name__)


def open_sets(recipe: Recipe) -> dict[str, Dataset]:
    """The embedding sets of the tasks to train or to evaluate on, once they fit each other and the checkpoint.

    Raises InputError where one is not found or does not fit.
    """
    check_shared_prefix(recipe)
    sets, provenances = {}, {}
    for name, task in recipe.tasks.items():
        if task.weight > 0 or task.eval_rows:
            found = open_embeddings(task.embeddings or Path(recipe.extract.output_dir, name), task=name)
            sets[name], provenances[name] = found
    family = read_family(recipe.model, revision=recipe.revision)
    checkpoint = checkpoint_compat(recipe.model, revision=recipe.revision, family=family, weights=False)
    check_compat(provenances, checkpoint, model=recipe.model)
    latent_width, width = check_transformer(recipe.model, revision=recipe.revision, family=family)
    for name, data in sets.items():
        if (found := prompt_columns_in(data.features)) != family.prompt_columns:
            raise InputError(
                f"tasks.{name}: its prompts are in {', '.join(found)}, those of {family.card_name} in "
                f"{', '.join(family.prompt_columns)}; extract the set for this checkpoint"
            )
        for column, expected in ((shared_embeds(data.features), width), ("target_latents", latent_width)):
            if (found := matrix_width(data.features[column])) != expected:
                raise InputError(
                    f"tasks.{name}: its {column} have width {found}, but {recipe.model} expects {expected}; extract "
                    "the set for this checkpoint"
                )
    if rank() == 0:
        for warning in [*unverified(provenances), *_other_settings(recipe, family, provenances)]:
            logger.warning(warning)
    from hf_qie.data.loader import check_caption_weights
    from hf_qie.data.online_latents import has_latents, made_from, with_files

    check_caption_weights(recipe, sets)
    for name, data in sets.items():
        root = recipe.tasks[name].image_root
        roots = [root] if root else made_from(provenances[name]) or ["."]  # a set of the Hub does not say where
        sets[name] = data if has_latents(data) else with_files(data, task=name, roots=roots)
    return sets


def _other_settings(recipe: Recipe, family: Family, provenances: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A warning for each set with images of another size or another empty caption than those of the recipe.

    Images are sampled by the recipe's.
    """
    side, source_side = recipe.extract.image_sample_size, recipe.extract.source_sample_size
    area_px = source_side**2 if source_side else family.vae_area_px
    for name, provenance in provenances.items():
        made = provenance["record"].get("request", {}).get("image_sample_size", side)
        found = [("image_sample_size", made, side)] if made != side else []
        made_px = provenance["compat"].get("vae_area_px")  # may be unknown
        if isinstance(made_px, int) and 0 < made_px != area_px:
            found.append(("source_sample_size", math.isqrt(made_px), math.isqrt(area_px)))
        drop, made_drop = recipe.extract.drop_caption, provenance["compat"].get("drop_caption", UNKNOWN)
        if made_drop not in (drop, UNKNOWN):
            found.append(("drop_caption", repr(made_drop), repr(drop)))
        for key, was, now in found:
            yield (
                f"tasks.{name}: its set was made with extract.{key}: {was}, the recipe has {now}; "
                "training keeps the set's, sampling.py and the model card go by the recipe's"
            )
