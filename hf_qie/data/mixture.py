"""Embedding sets and weights -> the mixture plan of a run: light datasets of row numbers.

A **group** is (task, source count). A **same-shape batch** is `same_shape` rows of one bucket that are drawn together.
Each group has a plan of its batches; the plan of the run interleaves these by share. Only grids and counts are read.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from datasets import Dataset, interleave_datasets

from hf_qie.config.recipe import Mix, Recipe
from hf_qie.data.schema import HAS_INVERSE, INVERSE, grids_in
from hf_qie.data.seeding import draw_rng
from hf_qie.errors import InputError
from hf_qie.models.base import read_family
from hf_qie.models.checkpoint import read_config

MANY_EPOCHS = 10  # a group drawn more often than this within a run is worth a warning


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """The rows of one task with one number of sources. An entry is a row in one direction, forward or inverse."""

    task: str
    num_sources: int
    weight: float  # the task's, as in the recipe
    num_rows: int
    rows: np.ndarray  # [E] int64, position in the task's set
    inverse: np.ndarray  # [E] bool
    chance: np.ndarray  # [E] how often the entry is drawn in an epoch; the entries of a row sum to 1
    bucket: np.ndarray  # [E] int64, 0 .. number of buckets - 1; one shape, one direction and one chance a bucket


def read_groups(sets: Mapping[str, Dataset], weights: Mapping[str, float], mix: Mix) -> list[Group]:
    """Group the rows of `sets` (held-out rows cut off) by task and source count; tasks of weight 0 are left out.

    Sorted, so that the order of the tasks in the recipe changes nothing. Raises InputError where a weighted task has
    no row.
    """
    groups = []
    for task in sorted(task for task in sets if weights[task] > 0):
        if len(sets[task]) == 0:
            raise InputError(f"tasks.{task}: weight {weights[task]:g}, but no row is left; lower eval_rows or weight")
        num_sources = _column(sets[task], "num_sources").to_numpy()
        targets, sources = (grids_in(_column(sets[task], name)) for name in ("target_grid", "source_grids"))
        first_source = np.cumsum(num_sources, dtype=np.int64) - num_sources
        for count in np.unique(num_sources):
            rows = np.flatnonzero(num_sources == count)
            grids = sources[first_source[rows, None] + np.arange(count)]  # [rows, count, 2]
            shapes = np.concatenate([targets[rows], grids.reshape(len(rows), -1)], axis=1)
            entries = _entries(sets[task], rows, shapes, mix.inverse_share)
            known = {"task": task, "num_sources": int(count), "weight": weights[task], "num_rows": len(rows)}
            groups.append(Group(**known, **entries))
    return groups


def _entries(data: Dataset, rows: np.ndarray, shapes: np.ndarray, inverse_share: float) -> dict[str, np.ndarray]:
    """Lay out the entries of a group so that each row is drawn equally often, its two directions taken together.

    A draw is each of the N rows with chance 1/N, and of the draws of a row with an inverse the part s = inverse_share
    is the inverse. So, in units of 1/N, the forward entry of a row without an inverse has the chance 1, that of a row
    with one 1 - s, and its inverse s. The entries of a bucket take turns and so are drawn equally often: hence rows
    with and without an inverse are kept in separate buckets, and a bucket is chosen by the summed chance of its
    entries.
    """
    inverted = np.zeros(len(rows), bool)
    if inverse_share and shapes.shape[1] == 4 and HAS_INVERSE in data.column_names:
        inverted = _column(data, HAS_INVERSE).is_valid().to_numpy()[rows]
    inverse_shapes = np.roll(shapes[inverted], 2, axis=1)  # source and target swapped, but for grids that are stored
    for name, side in ((f"{INVERSE}target_grid", slice(0, 2)), (f"{INVERSE}source_grids", slice(2, 4))):
        if inverted.any() and name in data.column_names:
            column = _column(data, name).take(pa.array(rows[inverted]))
            inverse_shapes[column.is_valid().to_numpy(), side] = grids_in(column)
    num_inverses = len(inverse_shapes)
    chance = np.concatenate([np.where(inverted, 1 - inverse_share, 1.0), np.full(num_inverses, inverse_share)])
    inverse = np.repeat([False, True], [len(rows), num_inverses])
    has_inverse = np.concatenate([inverted, inverted[inverted]])
    rows = np.concatenate([rows, rows[inverted]])
    keys = np.column_stack([inverse, has_inverse, np.concatenate([shapes, inverse_shapes])])
    drawn = chance > 0
    bucket = np.zeros(drawn.sum(), np.int64)  # the number of its key among the distinct ones, in lexicographic order
    for column in keys[drawn].T:
        bucket = np.unique(bucket * (column.max() + 1) + column, return_inverse=True)[1]
    return {"rows": rows[drawn], "inverse": inverse[drawn], "chance": chance[drawn], "bucket": bucket}


def _column(data: Dataset, name: str) -> pa.ChunkedArray:
    return data.select_columns([name]).with_format("arrow")[:][name]


def group_shares(groups: Sequence[Group], mix: Mix) -> np.ndarray:
    """The share of each group in the run, float64, sum 1.

    Without `source_count_weights` a task has weight / sum, spread over its source counts by rows. With them a count
    has weight / sum over the counts that occur, spread over the tasks that have it by their weights. Raises InputError
    where a count occurs that the mapping does not name, or all that occur weigh 0.
    """
    weight = np.array([group.weight for group in groups])
    if mix.source_count_weights is None:
        task = np.unique([group.task for group in groups], return_inverse=True)[1]
        rows = np.array([group.num_rows for group in groups])
        part = weight * rows / np.bincount(task, rows)[task]
    else:
        occur = sorted({group.num_sources for group in groups})
        if missing := [count for count in occur if count not in mix.source_count_weights]:
            tasks = sorted({group.task for group in groups if group.num_sources in missing})
            raise InputError(
                f"mix.source_count_weights: names {sorted(mix.source_count_weights)}, but {tasks} have rows with "
                f"{missing} sources; name these too, with weight 0 to leave them out"
            )
        if not any(mix.source_count_weights[count] for count in occur):
            raise InputError(f"mix.source_count_weights: all counts that occur, {occur}, have weight 0; weigh one")
        count = np.array([group.num_sources for group in groups])
        part = weight / np.bincount(count, weight)[count] * [mix.source_count_weights[c] for c in count]
    return part / part.sum()


def check_shared_prefix(recipe: Recipe) -> None:
    """Raise InputError where several draws of a row cannot share a pass of the checkpoint's transformer."""
    if recipe.mix.draws_per_row == 1:
        return
    family = read_family(recipe.model, revision=recipe.revision)
    if not family.shares_prefix(read_config(recipe.model, "transformer/config.json", revision=recipe.revision)):
        raise InputError(
            f"mix.draws_per_row: {recipe.mix.draws_per_row}, but what the transformer of {recipe.model} makes of "
            "prompt and sources depends on the noise; set it to 1"
        )


def resolve_same_shape(
    same_shape: int | None, *, global_batch_size: int, per_device_train_batch_size: int, draws_per_row: int = 1
) -> int:
    """Rows in a same-shape batch: micro-batches divide it, and it divides the global batch.

    Sizes of batches count draws, of which each row has `draws_per_row`.
    """
    rows, of_step = per_device_train_batch_size // draws_per_row, global_batch_size // draws_per_row
    size = rows if same_shape is None else same_shape
    if size % rows or of_step % size:
        by = f" / mix.draws_per_row, {draws_per_row}" if draws_per_row > 1 else ""
        raise InputError(
            f"mix.same_shape: {size} must be a multiple of the {rows} rows of a micro-batch "
            f"(per_device_train_batch_size, {per_device_train_batch_size}{by}), and the {of_step} rows of a step "
            "(ranks x micro-batch x gradient_accumulation_steps) a multiple of it; change one of these"
        )
    return size


def group_plan(group: Group, *, seed: int, same_shape: int, num_batches: int) -> Dataset:
    """The first `num_batches` same-shape batches of a group: {task, num_sources, inverse, rows}.

    A longer plan begins with a shorter. In each epoch over the group, ceil(num_rows / same_shape) batches, the buckets
    are chosen by a stratified draw: each has its part of the batches to within one, in random order. A bucket's rows
    come in an order of its own and wrap, also within a batch.
    """
    rng = draw_rng(seed, f"cells of {group.task}", group.num_sources)  # the name is part of the law of the draw
    order = rng.permutation(len(group.rows))
    order = order[np.argsort(group.bucket[order], kind="stable")]  # bucket by bucket, each shuffled
    size = np.bincount(group.bucket)
    start = np.cumsum(size) - size
    edges = np.cumsum(np.bincount(group.bucket, group.chance))

    per_epoch = math.ceil(group.num_rows / same_shape)
    random = rng.random((math.ceil(num_batches / per_epoch), 2, per_epoch))
    u = (random[:, 0].argsort(axis=1) + random[:, 1]).reshape(-1)[:num_batches] / per_epoch
    bucket = np.searchsorted(edges[:-1] / edges[-1], u, side="right")

    by_bucket, count = np.argsort(bucket, kind="stable"), np.bincount(bucket)
    times = np.empty(num_batches, np.int64)  # how many batches of the bucket came before
    times[by_bucket] = np.arange(num_batches) - np.repeat(np.cumsum(count) - count, count)
    place = times[:, None] * same_shape + np.arange(same_shape)
    entry = order[start[bucket, None] + place % size[bucket, None]]
    table = {
        "task": pa.repeat(group.task, num_batches),
        "num_sources": pa.repeat(pa.scalar(group.num_sources, pa.int8()), num_batches),
        "inverse": pa.array(group.inverse[entry[:, 0]]),
        "rows": pa.FixedSizeListArray.from_arrays(group.rows[entry].reshape(-1), same_shape),
    }
    return Dataset(pa.table(table))


def mixture_plan(
    groups: Sequence[Group], shares: np.ndarray, *, seed: int, same_shape: int, num_batches: int
) -> Dataset:
    """The run: `num_batches` same-shape batches, each the next one of a group drawn by share.

    A longer run begins with a shorter.
    """
    drawn = [(group, float(share)) for group, share in zip(groups, shares, strict=True) if share > 0]
    plans = []
    for group, share in drawn:
        # Drawn num_batches * share times, give or take: by Bernstein's bound ten standard deviations and 50 more are
        # passed with a chance below e^-45, and the end of a plan changes nothing before it.
        length = math.ceil(num_batches * share + 10 * math.sqrt(num_batches * share)) + 50
        plans.append(group_plan(group, seed=seed, same_shape=same_shape, num_batches=min(num_batches, length)))
    probabilities = [share for _, share in drawn]
    run = interleave_datasets(plans, probabilities=probabilities, seed=seed, stopping_strategy="first_exhausted")
    assert len(run) >= num_batches, "a group's plan was too short"
    return run.select(range(num_batches))


def mix_table(groups: Sequence[Group], shares: np.ndarray, *, rows_drawn: int) -> str:
    """What is drawn how often in a run that draws `rows_drawn` rows, one line a group; with any number of noises."""
    lines = [("task", "sources", "rows", "weight", "share", "epochs")]
    for group, share in zip(groups, shares, strict=True):
        epochs = f"{share * rows_drawn / group.num_rows:.2f}"
        numbers = str(group.num_sources), f"{group.num_rows:,}", f"{group.weight:g}", f"{share:.4f}", epochs
        lines.append((group.task, *numbers))
    first, *widths = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join("  ".join([line[0].ljust(first), *map(str.rjust, line[1:], widths)]) for line in lines)


def realised_shares(drawn: Mapping[tuple[str, int], int]) -> str:
    """The share of each group, (task, source count), in what was drawn, to be held against `mix_table`."""
    total = sum(drawn.values())
    parts = (f"{task} with {count} source(s) {n / total:.4f}" for (task, count), n in sorted(drawn.items()))
    return f"{', '.join(parts)} of {total:,} rows"


def mix_warnings(
    groups: Sequence[Group], shares: np.ndarray, mix: Mix, *, rows_drawn: int, same_shape: int
) -> list[str]:
    """What a user should know before such a run: one sentence each."""
    warnings = [
        f"task {group.task!r}, {group.num_sources} source(s): this run is {share * rows_drawn / group.num_rows:.0f} "
        f"epochs over its {group.num_rows:,} rows"
        for group, share in zip(groups, shares, strict=True)
        if share * rows_drawn > MANY_EPOCHS * group.num_rows
    ]
    if absent := sorted(set(mix.source_count_weights or {}) - {group.num_sources for group in groups}):
        warnings.append(f"mix.source_count_weights: no row has {absent} sources, so these entries drop out")
    small = sum(share * small_bucket_share(group, same_shape) for group, share in zip(groups, shares, strict=True))
    if small >= 0.001:
        warnings.append(
            f"{small:.1%} of the draws are from buckets with fewer rows than same_shape, {same_shape}: "
            "their batches repeat rows, with other noise"
        )
    return warnings


def small_bucket_share(group: Group, same_shape: int) -> float:
    """The part of a group's draws that comes from buckets with fewer rows than `same_shape`."""
    small = np.bincount(group.bucket)[group.bucket] < same_shape
    return float(group.chance[small].sum() / group.chance.sum())
