"""Edits of held-out rows, as the official pipeline would make them, and the images that they are compared with.

Letters: S target tokens, C width of a packed latent.
"""

import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import Dataset
from PIL import Image
from torch import Tensor, nn
from transformers import Trainer

from hf_qie.config.recipe import Recipe
from hf_qie.data.collate import PROMPT, Batch, collate
from hf_qie.data.images import BadImage, on_white, read_image
from hf_qie.data.online_latents import has_latents, load_vae, made_from, with_files
from hf_qie.data.provenance import read_provenance
from hf_qie.data.schema import SOURCES, TARGET, columns_of
from hf_qie.errors import InputError
from hf_qie.measures.edits import aggregate, same_aspect, score_edit
from hf_qie.models.base import Grid
from hf_qie.training.evaluation import HeldOut
from hf_qie.training.objective import Objective

logger = get_logger(__name__)

FILES, LATENTS = "files", "latents"  # where the images of a row come from


class HeldOutEdits:
    """What a model makes of held-out rows, from their stored embeddings and latents and the recipe's seed.

    The official pipeline would make the same of them with `--seed` the recipe's seed.
    """

    def __init__(
        self,
        held_out: HeldOut,
        recipe: Recipe,
        *,
        objective: Objective,
        vae: Any,
        on_device: Callable[[Batch], Batch],
    ):
        """`vae` decodes; ranks that only make latents need none."""
        self.held_out, self.recipe, self.objective, self.vae = held_out, recipe, objective, vae
        self.on_device = on_device

    def name(self, number: int) -> str:
        """The name of a row's files."""
        return f"{self.held_out.places[number][0]}-{self.held_out.rows[number]}"

    def instruction(self, number: int) -> str:
        """The caption that the row is evaluated with."""
        (text,) = self.named_instruction(number).values()
        return text

    def named_instruction(self, number: int) -> dict[str, str]:
        """The same by the name of its column, or as the drop caption."""
        (task, index), caption = self.held_out.places[number], self.held_out[number]["caption"]
        if caption == "drop":
            return {"drop_caption": self.recipe.extract.drop_caption}
        return {caption: self.held_out.tasks[task].rows.value(index, caption).as_py()}

    # --- what the model makes ---

    @torch.no_grad()
    def latents(self, model: nn.Module, number: int, settings: Any) -> tuple[Tensor, Grid]:
        """What `model` makes of a row: latents `[S, C]` on the CPU, and their grid.

        `settings` has num_inference_steps and true_cfg_scale.
        """
        held_out, objective = self.held_out, self.objective
        batch = self.on_device(collate([held_out[number]]))
        task, index = held_out.places[number]
        scale, family = settings.true_cfg_scale, objective.family
        without = held_out.tasks[task].read(index, inverse=False, caption=None) | {"draws": [number]}
        prompt = collate([without])
        prompt = {key: prompt[key] for key in PROMPT}
        latents = family.denoise(
            model,
            batch,
            batch | self.on_device(prompt),
            scheduler_config=objective.scheduler_config,
            sigmas=objective.sampling_sigmas(settings.num_inference_steps),
            true_cfg_scale=family.true_cfg_scale if scale is None else scale,
            seed=self.recipe.seed,
        )
        return latents[0].cpu(), batch["grids"][0]

    def shared(self, model: nn.Module, numbers: Sequence[int], settings: Any) -> list[tuple[Tensor, Grid]]:
        """`latents` of each row, on every rank; each makes its part, equally many as sharded ranks need each other."""
        state = PartialState()
        turns = -(-len(numbers) // state.num_processes)
        places = [(turn * state.num_processes + state.process_index) % len(numbers) for turn in range(turns)]
        model.eval()  # Trainer sets it to train in each step
        found = dict(gather_object([(place, self.latents(model, numbers[place], settings)) for place in places]))
        return [found[place] for place in range(len(numbers))]

    # --- what it is compared with ---

    def decoded(self, number: int) -> list[Image.Image]:
        """Target and sources of a row, as the VAE decodes their latents."""
        batch = self.on_device(collate([self.held_out[number]]))
        lengths = [height * width for height, width in batch["grids"]]
        latents = torch.cat([batch["target_latents"], batch["source_latents"]], dim=1)[0].split(lengths)
        return [self.vae.decode(*one) for one in zip(latents, batch["grids"], strict=True)]

    def images(self, number: int) -> list[Image.Image]:
        """Target and sources of a row: from their files, else as the VAE decodes them.

        The target is as the VAE sees it, and a source of its aspect, by 1 %, has its size: in whole tokens, the sizes
        that the VAE sees of the two may differ by more. Raises InputError for a file that cannot be read.
        """
        (task, index), family = self.held_out.places[number], self.objective.family
        if (files := self._files[task]) is None:
            target, *sources = self.decoded(number)
            area_px = self.recipe.extract.image_sample_size**2
            alike = [family.fit(one.size, area_px) == target.size for one in sources]
        else:
            row, ((height, width), *_) = files[index], self.held_out.tasks[task].grids_of(index, inverse=False)
            try:
                target, *sources = (read_image(Path(path), family.image_mode) for path in [row[TARGET], *row[SOURCES]])
            except BadImage as error:
                raise InputError(f"tasks.{task}: row {row['row']}: {error}; extraction could read it") from error
            alike = [same_aspect(np.asarray(one), np.asarray(target)) for one in sources]
            target = family.resize(target, (family.pixels_per_token * width, family.pixels_per_token * height))
        fitted = zip(sources, alike, strict=True)
        return [target, *(family.resize(one, target.size) if same else one for one, same in fitted)]

    def origin(self, number: int) -> str:
        """Where `images` come from: FILES or LATENTS."""
        return FILES if self._files[self.held_out.places[number][0]] else LATENTS

    def score(self, number: int, output: Image.Image) -> dict[str, float]:
        """The scores of `output` as the edit of a row: those that are defined for it."""
        target, *sources = map(rgb, self.images(number))
        others = [rgb(self.images(other)[0]) for other in self.others(number)]
        return score_edit(rgb(output), target, sources, others=others)

    def of_targets(self, numbers: Sequence[int]) -> dict[str, float]:
        """The figures that edits of these rows would have if they were their targets."""
        return self.figures(numbers, [self.score(number, self.images(number)[0]) for number in numbers])

    def figures(self, numbers: Sequence[int], scores: Sequence[dict[str, float]]) -> dict[str, float]:
        """Mean of each score over the rows that have it, and as `<score>/<task>` over those of a task."""
        tasks = [self.held_out.places[number][0] for number in numbers]
        found = aggregate(scores)
        for task in dict.fromkeys(tasks):
            of_task = aggregate([one for one, name in zip(scores, tasks, strict=True) if name == task])
            found |= {f"{name}/{task}": value for name, value in of_task.items()}
        return found

    @cached_property
    def _files(self) -> dict[str, Dataset | None]:
        """By task its rows with images named by file, None where these are not all found."""
        found = {}
        for task, rows in self.held_out.tasks.items():
            found[task] = rows.rows.data.select_columns(["row", *(image.name for image in columns_of("image"))])
            if not has_latents(rows.rows.data):  # they are found already
                continue
            try:
                found[task] = with_files(found[task], task=task, roots=_roots(self.recipe, task))
            except InputError:
                found[task] = None
                logger.info(
                    "tasks.%s: edits are compared with what the VAE makes of its stored latents, as not all images "
                    "are found; tasks.%s.image_root names their folder",
                    *(task, task),
                )
        return found

    @cached_property
    def _keys(self) -> list[tuple[Any, str, list[Grid]]]:
        """Of each row its sources, its target and its grids, by which rows of one source are found."""
        keys = []
        for task, index in self.held_out.places:
            rows, files = self.held_out.tasks[task], self._files[task]
            sources, target = (
                files[index][name] if files else rows.rows.value(index, name).as_py() for name in (SOURCES, TARGET)
            )
            keys.append(((None if files else task, *sources), target, rows.grids_of(index, inverse=False)))
        return keys

    def others(self, number: int) -> list[int]:
        """The rows with the same sources and another target of the same size."""
        sources, target, grids = self._keys[number]
        if len(grids) == 1:  # text-to-image
            return []
        others = {other[1]: n for n, other in enumerate(self._keys) if other[0] == sources and other[2] == grids}
        return [n for path, n in others.items() if path != target]


def edits_of(trainer: Trainer) -> HeldOutEdits:
    """Those of an EditTrainer with held-out rows; where it has no VAE, its first rank loads one to decode."""
    vae = trainer.encoder
    if vae is None and trainer.is_world_process_zero():
        vae = load_vae(trainer.recipe, trainer.args.device)
    return HeldOutEdits(
        trainer.eval_dataset,
        trainer.recipe,
        objective=trainer.objective,
        vae=vae,
        on_device=trainer.on_device,
    )


def rgb(image: Image.Image) -> np.ndarray:
    """An image `[H, W, 3]` uint8, what is transparent on white."""
    return np.asarray(on_white(image) if image.mode == "RGBA" else image.convert("RGB"))


def _roots(recipe: Recipe, task: str) -> list[str]:
    """Where relative paths of a set start; of one that was not made here only absolute ones are files."""
    folder = Path(recipe.tasks[task].embeddings or Path(recipe.extract.output_dir, task))
    if root := recipe.tasks[task].image_root:
        return [root]
    return (made_from(read_provenance(folder)) if folder.is_dir() else []) or [os.sep]
