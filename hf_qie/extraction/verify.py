"""A finished set against the official pipeline: some of its rows encoded again, one caption at a time.

Nothing here shares a pass, a batch or a formula with extraction; only reading an image is the same.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_qie.data.embedding_sets import open_set
from hf_qie.data.provenance import PROVENANCE, check_compat, checkpoint_compat, files_of, read_provenance, unverified
from hf_qie.data.samples import BadRow, refuse_bad
from hf_qie.data.schema import DROP_EMBEDS, SOURCES, TARGET, TEXT_EMBEDS, column_of, columns_of, prompt_columns_in
from hf_qie.data.seeding import draw_rng
from hf_qie.errors import InputError
from hf_qie.extraction.memory import forecast
from hf_qie.extraction.plan import Plan, open_processor
from hf_qie.extraction.preprocess import ImageCache
from hf_qie.extraction.stats import aligned
from hf_qie.runtime.device import computes_bfloat16, free_bytes, own_device
from hf_qie.runtime.files import check_digests

EXACT = ("grid", "slots")  # kinds of columns that are not rounded
LANGUAGE_HEAD_BYTES = 2 * 10**9  # which the pipeline's encoder has beyond ours, with its logits and kept states


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


def verify_sets(plans: Mapping[str, Plan], *, num_rows: int) -> Iterator[tuple[str, list[str]]]:
    """Read every byte of the finished sets and encode random rows again: a report of each set, and what is wrong.

    Raises InputError where there is no finished set.
    """
    first = next(iter(plans.values()))
    model, revision, family, device = first.recipe.model, first.recipe.revision, first.family, own_device()
    finished = [name for name, plan in plans.items() if (plan.folder / PROVENANCE).is_file()]
    if not finished:
        raise InputError(f"{first.extract.output_dir}: no finished embedding set; run hf_qie/extract.py first")
    free = free_bytes(device)

    @functools.cache
    def load(dtype: torch.dtype) -> Any:
        processor = open_processor(first.recipe, family)
        offload = free is not None and not forecast(plans, processor, dtype=dtype).fits(free - LANGUAGE_HEAD_BYTES)
        return family.load_official(model, revision=revision, dtype=dtype, device=device, offload=offload)

    checkpoint = checkpoint_compat(model, revision=revision, family=family)
    for name in finished:
        provenance = read_provenance(plans[name].folder)
        check_digests(plans[name].folder, files_of(provenance))
        # hf_qie/convert.py stores no latents, whatever the recipe says
        plan = plans[name].changed(latents=provenance["record"]["request"]["latents"])
        sizes = {"vae_area_px": plan.source_area_px, "drop_caption": plan.extract.drop_caption}
        check_compat({name: provenance}, checkpoint | sizes, model=model)
        dtype = getattr(torch, made_in := provenance["record"]["dtype"])
        limit = bound(dtype)
        if dtype == torch.bfloat16 and not computes_bfloat16(device):
            dtype = torch.float32  # nearer to the truth than bfloat16, so the limit of the set's own dtype holds
        checked, differences = verify_set(plan, load(dtype), num_rows=num_rows)
        title = f"{name}: {checked:,} rows, made in {made_in}, against {family.pipeline} in {str(dtype)[6:]}"
        lines = [*unverified({name: provenance}), title, *_table(differences, limit), ""]
        off = ", ".join(beyond(differences, limit=limit))
        wrong = f"{plan.folder}: differs by more than rounding in {off}; extract it again"
        yield "\n".join(lines), [wrong] if off else []


def verify_set(plan: Plan, official: Any, *, num_rows: int) -> tuple[int, list[Difference]]:
    """Encode random rows of a set again; how many, and how far each column of each is off.

    Raises InputError where the set was made from other images, or one cannot be read any more.
    """
    data, differences = open_set(plan.folder), []
    rng = draw_rng(plan.recipe.seed, f"verify {plan.task.name}")
    chosen = rng.choice(len(data), min(num_rows, len(data)), replace=False)
    vectors = [name for name in data.features if column_of(name)[0].kind in (*EXACT, "embeddings", "latents")]
    given = data.remove_columns(vectors)
    stored = data.select_columns(vectors).with_format("torch", dtype=torch.float32)
    for place in sorted(map(int, chosen)):
        row, of_row = plan.rows.table[given[place]["row"]], stored[place]
        if not row["bad"] and any(row[one.row_key] != given[place][one.name] for one in columns_of("image")):
            raise InputError(f"{plan.folder}: row {row['row']} has other images than the data now; extract it again")
        for column, values in official_columns(row, of_row, plan, official):
            differences.append(compare(column, of_row.get(column), values))
    return len(chosen), differences


def official_columns(
    row: Mapping[str, Any], stored: Mapping[str, Any], plan: Plan, official: Any
) -> Iterator[tuple[str, Tensor]]:
    """Every column of vectors, places or grids of a row, by the pipeline; `stored` says where a caption starts."""
    try:
        refuse_bad(row)
        images = ImageCache([row], plan).read(row)
    except BadRow as error:
        raise InputError(f"tasks.{plan.task.name}: row {row['row']}: {error.named}") from error
    shared, *slots = prompt_columns_in(stored)
    for prefix, files, texts in plan.ways(row):
        if stored.get(prefix + DROP_EMBEDS) is None:
            continue
        shown = {name: [images[file] for file in some] for name, some in files.items()}
        cut = len(stored[prefix + shared])
        for name, text in texts.items():
            embeds = official.embeddings(text, shown[SOURCES])
            yield f"{prefix}{TEXT_EMBEDS}{name}", embeds[cut:]
        yield prefix + shared, embeds[:cut]
        for name in slots:
            yield prefix + name, torch.tensor(official.slots(shown[SOURCES]))
        target = official.sides(shown[TARGET][0], plan.target_area_px)
        sized = {name: [(image, target) for image in some] for name, some in shown.items()}
        sized[SOURCES] = [(image, official.sides(image, plan.source_area_px)) for image in shown[SOURCES]]
        for column in plan.stored("grid", prefix):
            grids = [official.grid(sides) for _, sides in sized[column.of]]
            yield prefix + column.name, torch.cat([torch.empty(0), *grids])
        for column in plan.stored("latents", prefix):
            latents = [official.latents(*one).float().cpu() for one in sized[column.of]]
            yield prefix + column.name, torch.cat(latents) if latents else torch.empty(0)


def compare(column: str, stored: Any, official: Tensor) -> Difference:
    """How far a column of one row is off; infinitely where it has another length, or another place or grid."""
    stored, official = torch.as_tensor([] if stored is None else stored).flatten(), official.float().cpu().flatten()
    if len(stored) != len(official) or (column_of(column)[0].kind in EXACT and (stored != official).any()):
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
    off, rows = beyond(differences, limit=limit), [("", "rows", "largest", "mean", "relative", "at most", "")]
    for column in dict.fromkeys(difference.column for difference in differences):
        _, largest, mean, relative = zip(*(one for one in differences if one.column == column), strict=True)
        figures = [f"{figure:.1e}" for figure in (max(largest), sum(mean) / len(mean), max(relative), limit)]
        rows.append((column, len(mean), *figures, "beyond rounding" if column in off else ""))
    return [f"  {line}".rstrip() for line in aligned(rows)]
