"""A finished set against the official pipeline: some of its rows encoded again, one caption at a time.

Nothing here shares a pass, a batch or a formula with extraction; only reading a picture is the same.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import QwenImageEditPlusPipeline, QwenImagePipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions
from PIL import Image
from torch import Tensor

from hf_qie.config.recipe import Recipe
from hf_qie.data.embedding_sets import open_set
from hf_qie.data.provenance import (
    PROVENANCE,
    check_compat,
    checkpoint_compat,
    files_of,
    read_provenance,
    unverified,
)
from hf_qie.data.samples import BadRow, refuse_bad
from hf_qie.data.schema import SOURCES, TARGET, column_of, columns_of
from hf_qie.data.seeding import draw_rng
from hf_qie.errors import InputError
from hf_qie.extraction.preprocess import Pictures, Plan, read_pictures, ways
from hf_qie.extraction.stats import aligned
from hf_qie.models.base import Family
from hf_qie.models.qwen_image.vae import PIXELS_PER_TOKEN
from hf_qie.runtime.device import computes_bfloat16, own_device
from hf_qie.runtime.files import check_digests


def bound(dtype: torch.dtype) -> float:
    """How far a column may be off by rounding alone, in parts of its length.

    Storing rounds each value by 2^-11 of itself at most. Computing in another order differs by what is rounded on the
    way: u, half a step of `dtype`, at each of some 120 sums into the residual stream of 32 + 28 layers. Independent
    ones add up to their root, 11 u, so two runs are 15 u apart; doubled, as trained weights may amplify. Random
    weights of that depth give 11 u in float32 and 4 u in bfloat16, while lost 3-D positions give 0.3 or more.
    """
    return 2.0**-11 + 32 * torch.finfo(dtype).eps / 2


class Difference(NamedTuple):
    """How far one column of one row is from the pipeline's."""

    column: str
    largest: float
    mean: float
    relative: float  # length of the difference by length of the pipeline's column


class Official:
    """The checkpoint's own pipeline, without its transformer."""

    def __init__(self, model: str, family: Family, *, revision: str | None, dtype: torch.dtype, device: torch.device):
        loaded = getattr(diffusers, family.pipeline).from_pretrained(
            model, revision=revision, transformer=None, dtype=dtype, use_safetensors=True
        )
        names = ("scheduler", "vae", "text_encoder", "tokenizer")
        parts = {name: getattr(loaded.to(device), name) for name in names} | {"transformer": None}
        self.family = family
        self.text_to_image = QwenImagePipeline(**parts)
        # a text-to-image checkpoint has no pipeline that encodes pictures, but the same VAE
        self.edit = loaded if family.edit else QwenImageEditPlusPipeline(**parts, processor=None)
        if family.edit:
            hand_token_types_through(self.edit)

    @torch.no_grad()
    def states(self, caption: str, sources: Sequence[Image.Image]) -> Tensor:
        """States `[L, D]` of one caption over pictures of any size."""
        if not sources:
            return self.text_to_image._get_qwen_prompt_embeds(caption)[0][0]
        seen = [
            self.edit.image_processor.resize(image, *self.size(image, self.family.vlm_area_px)) for image in sources
        ]
        return self.edit._get_qwen_prompt_embeds(caption, seen[0] if self.family.max_sources == 1 else seen)[0][0]

    @torch.no_grad()
    def latents(self, image: Image.Image, size: tuple[int, int]) -> Tensor:
        """Packed latents `[S, 64]` of a picture of any size, seen at `size`, (height, width) in pixels."""
        height, width = size
        pixels = self.edit.image_processor.preprocess(image, height, width)[:, :, None]
        latents = self.edit._encode_vae_image(pixels.to(self.edit.device, self.edit.vae.dtype), generator=None)[
            :, :, 0
        ]
        return self.edit._pack_latents(latents, *latents.shape)[0]

    def size(self, image: Image.Image, area_px: int) -> tuple[int, int]:
        """(height, width) in pixels to which the pipeline resizes a picture."""
        width, height = calculate_dimensions(area_px, image.width / image.height)
        return height, width


def hand_token_types_through(pipeline: Any) -> None:
    """Hand the processor's `mm_token_type_ids` to the encoder: diffusers 0.42 loses them, and with them 3-D positions.

    https://github.com/huggingface/diffusers/issues/14194
    """
    processor, forward, types = pipeline.processor, pipeline.text_encoder.forward, {}

    def process(*args: Any, **kwargs: Any) -> Any:
        outputs = processor(*args, **kwargs)
        types["mm_token_type_ids"] = outputs["mm_token_type_ids"].to(pipeline.device)
        return outputs

    pipeline.processor = process
    pipeline.text_encoder.forward = lambda **kwargs: forward(**types | kwargs)


def verify_sets(
    recipe: Recipe, family: Family, plans: Mapping[str, Plan], *, num_rows: int
) -> Iterator[tuple[str, list[str]]]:
    """Read every byte of the finished sets and encode random rows again: a report of each set, and what is wrong.

    Raises InputError where there is no finished set.
    """
    sets = {name: Path(recipe.extract.output_dir, name) for name in plans}
    finished = [name for name, folder in sets.items() if (folder / PROVENANCE).is_file()]
    if not finished:
        raise InputError(f"{recipe.extract.output_dir}: no finished embedding set; run hf_qie/extract.py first")
    device, model, revision = own_device(), recipe.model, recipe.revision
    official = functools.cache(lambda dtype: Official(model, family, revision=revision, dtype=dtype, device=device))
    checkpoint = checkpoint_compat(model, revision=revision, family=family)
    for name in finished:
        folder, provenance = sets[name], read_provenance(sets[name])
        check_digests(folder, files_of(provenance))
        latents = provenance["record"]["request"]["latents"]  # hf_qie/convert.py stores none, whatever the recipe says
        plan = replace(plans[name], extract=plans[name].extract.model_copy(update={"latents": latents}))
        sizes = {"vae_area_px": plan.source_area_px, "drop_caption": plan.extract.drop_caption}
        check_compat({name: provenance}, checkpoint | sizes, model=model)
        dtype = getattr(torch, made_in := provenance["record"]["dtype"])
        limit = bound(dtype)
        if dtype == torch.bfloat16 and not computes_bfloat16(device):
            dtype = torch.float32  # nearer to the truth than bfloat16, so the limit of the set's own dtype holds
        checked, differences = verify_set(plan, folder, official(dtype), num_rows=num_rows, seed=recipe.seed)
        title = f"{name}: {checked:,} rows, made in {made_in}, against {family.pipeline} in {str(dtype)[6:]}"
        off = beyond(differences, limit=limit)
        problem = f"{folder}: differs by more than rounding in {', '.join(off)}; extract it again"
        yield (
            "\n".join([*unverified({name: provenance}), title, *_table(differences, limit), ""]),
            [problem] * bool(off),
        )


def verify_set(
    plan: Plan, folder: Path, official: Official, *, num_rows: int, seed: int
) -> tuple[int, list[Difference]]:
    """Encode random rows of the set in `folder` again; how many, and how far each column of each is off.

    Raises InputError where the set was made from other images, or one cannot be read any more.
    """
    data, differences = open_set(folder), []
    chosen = draw_rng(seed, f"verify {plan.task.name}").choice(len(data), min(num_rows, len(data)), replace=False)
    vectors = [name for name in data.features if column_of(name)[0].kind in ("embeddings", "latents", "grid")]
    given = data.remove_columns(vectors)
    stored = data.select_columns(vectors).with_format("torch", dtype=torch.float32)
    for place in sorted(map(int, chosen)):
        row = plan.rows.table[given[place]["row"]]
        if not row["bad"] and any(row[one.row_key] != given[place][one.name] for one in columns_of("image")):
            raise InputError(f"{folder}: row {row['row']} has other images than the data now; extract it again")
        of_row = stored[place]
        for column, values in official_columns(row, of_row, plan, official):
            differences.append(compare(column, of_row.get(column), values))
    return len(chosen), differences


def official_columns(
    row: Mapping[str, Any], stored: Mapping[str, Any], plan: Plan, official: Official
) -> Iterator[tuple[str, Tensor]]:
    """Every column of vectors or grids of a row, by the pipeline; `stored` says where images end and text starts."""
    try:
        refuse_bad(row)
        images = read_pictures(row, Pictures([row], plan), plan.task.columns)
    except BadRow as error:
        raise InputError(f"tasks.{plan.task.name}: row {row['row']}: {error.named}") from error
    for prefix, files, captions in ways(row, plan):
        if stored.get(f"{prefix}image_embeds") is None:
            continue
        shown = {name: [images[file] for file in some] for name, some in files.items()}
        texts = {name: row["texts"][name] for name in captions if row["texts"][name]}
        texts |= {"drop": plan.extract.drop_caption}
        cut = len(stored[f"{prefix}image_embeds"])
        for name, text in texts.items():
            embeds = official.states(text, shown[SOURCES])
            yield f"{prefix}text_embeds_{name}", embeds[cut:]
        yield f"{prefix}image_embeds", embeds[:cut]
        target = official.size(shown[TARGET][0], plan.target_area_px)
        sized = {name: [(image, target) for image in some] for name, some in shown.items()}
        sized[SOURCES] = [(image, official.size(image, plan.source_area_px)) for image in shown[SOURCES]]
        for column in plan.stored("grid", prefix):
            sides = [torch.tensor(size) // PIXELS_PER_TOKEN for _, size in sized[column.of]]
            yield prefix + column.name, torch.cat([torch.empty(0), *sides])
        for column in plan.stored("latents", prefix) if plan.extract.latents else ():
            latents = [official.latents(*one).float().cpu() for one in sized[column.of]]
            yield prefix + column.name, torch.cat(latents) if latents else torch.empty(0)


def compare(column: str, stored: Any, official: Tensor) -> Difference:
    """How far a column of one row is off; infinitely where it has another length, or another grid."""
    stored, official = torch.as_tensor([] if stored is None else stored).flatten(), official.float().cpu().flatten()
    if len(stored) != len(official) or (column_of(column)[0].kind == "grid" and (stored != official).any()):
        return Difference(column, math.inf, math.inf, math.inf)
    if not len(official):
        return Difference(column, 0.0, 0.0, 0.0)
    off = (stored - official).abs()
    return Difference(column, float(off.max()), float(off.mean()), float(off.norm() / official.norm()))


def beyond(differences: Sequence[Difference], *, limit: float) -> list[str]:
    """The columns that are off by more than rounding."""
    return list(dict.fromkeys(difference.column for difference in differences if not difference.relative <= limit))


def _table(differences: Sequence[Difference], limit: float) -> list[str]:
    """One line a column, over all rows."""
    off, rows = beyond(differences, limit=limit), [("", "rows", "largest", "mean", "relative", "at most")]
    for column in dict.fromkeys(difference.column for difference in differences):
        _, largest, mean, relative = zip(*(one for one in differences if one.column == column), strict=True)
        figures = [f"{figure:.1e}" for figure in (max(largest), sum(mean) / len(mean), max(relative), limit)]
        rows.append((column, len(mean), *figures, "beyond rounding" if column in off else ""))
    rows[0] = (*rows[0], "")
    return [f"  {line}".rstrip() for line in aligned(rows)]
