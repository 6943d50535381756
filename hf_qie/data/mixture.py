"""Embedding sets and weights -> one plan of the whole run, as light datasets of row numbers.

A **group** is (task, source count). A **cell** is `same_shape` rows of one shape that are drawn together. Each group
has a plan of cells of its own; the run is their interleaving by share. Nothing is read here but grids and counts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, interleave_datasets

from hf_qie.config.recipe import Mix
from hf_qie.data.seeding import draw_rng
from hf_qie.errors import InputError

MANY_TIMES_OVER = 10  # a group drawn more often than this within a run is worth a warning


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """The rows of one task with one number of sources. An entry is a row in one direction, forward or inverse."""

    task: str
    num_sources: int
    weight: float  # the task's, as in the recipe
    num_rows: int
    rows: np.ndarray  # [E] int64, position in the task's set
    inverse: np.ndarray  # [E] bool
    chance: np.ndarray  # [E] how often the entry is drawn in one pass; the entries of a row sum to 1
    bucket: np.ndarray  # [E] int64, 0 .. number of buckets - 1; one shape, one direction and one chance a bucket


def read_groups(sets: Mapping[str, Dataset], weights: Mapping[str, float], mix: Mix) -> list[Group]:
    """Group the rows of `sets` (held-out rows cut off) by task and source count; tasks of weight 0 are left out.

    Sorted, so that the order of the tasks in the recipe changes nothing. Raises InputError where a weighted task has
    no row.
    """
    trained = sorted(task for task in sets if weights[task] > 0)
    if not trained:
        raise InputError(
            f"tasks: every weight is 0 ({sorted(sets)}), so nothing is trained; give one a weight above 0"
        )
    groups = []
    for task in trained:
        if len(sets[task]) == 0:
            raise InputError(
                f"tasks.{task}: weight {weights[task]:g}, but no row is left to train on; "
                "lower its eval_rows, give it more rows, or set its weight to 0"
            )
        groups += _groups_of(sets[task], task=task, weight=weights[task], inverse_share=mix.inverse_share)
    return groups


def _groups_of(data: Dataset, *, task: str, weight: float, inverse_share: float) -> list[Group]:
    num_sources = _column(data, "num_sources").to_numpy()
    targets = _grids(_column(data, "target_grid"))
    sources = _grids(_column(data, "source_grids"))
    first_source = np.cumsum(num_sources, dtype=np.int64) - num_sources
    assert len(sources) == num_sources.sum(), f"task {task!r}: source_grids and num_sources differ"
    groups = []
    for count in np.unique(num_sources):
        rows = np.flatnonzero(num_sources == count)
        grids = sources[first_source[rows, None] + np.arange(count)]  # [rows, count, 2]
        shapes = np.concatenate([targets[rows], grids.reshape(len(rows), -1)], axis=1)
        entries = _entries(data, rows, shapes, inverse_share)
        groups.append(Group(task=task, num_sources=int(count), weight=weight, num_rows=len(rows), **entries))
    return groups


def _entries(data: Dataset, rows: np.ndarray, shapes: np.ndarray, inverse_share: float) -> dict[str, np.ndarray]:
    """Lay out the entries of a group so that each row is drawn equally often, its two directions taken together.

    A draw is each of the N rows with chance 1/N, and of the draws of a row with an inverse the part s = inverse_share
    is the inverse. So, in units of 1/N, the forward entry of a row without an inverse has the chance 1, that of a row
    with one 1 - s, and its inverse s. A cell lies in one bucket, whose entries take turns and so are drawn equally
    often: hence rows with and without an inverse are kept in separate buckets, and a bucket is chosen by the summed
    chance of its entries.
    """
    inverted, inverse_shapes = _inverses(data, rows, shapes, inverse_share)
    num_inverses = len(inverse_shapes)
    chance = np.concatenate([np.where(inverted, 1 - inverse_share, 1.0), np.full(num_inverses, inverse_share)])
    inverse = np.repeat([False, True], [len(rows), num_inverses])
    has_inverse = np.concatenate([inverted, inverted[inverted]])
    rows = np.concatenate([rows, rows[inverted]])
    keys = np.column_stack([inverse, has_inverse, np.concatenate([shapes, inverse_shapes])])
    drawn = chance > 0
    arrays = {"rows": rows[drawn], "inverse": inverse[drawn], "chance": chance[drawn]}
    return arrays | {"bucket": _codes(keys[drawn])}


def _inverses(data: Dataset, rows: np.ndarray, shapes: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Which of `rows` are drawn as inverses too, bool, and the shapes of those inverses.

    An inverse has the swapped shape, but for the grids that the set stores because the two areas differ.
    """
    if share == 0 or shapes.shape[1] != 4 or "inverse_image_embeds" not in data.column_names:
        return np.zeros(len(rows), bool), shapes[:0]
    inverted = _column(data, "inverse_image_embeds").is_valid().to_numpy()[rows]
    swapped = shapes[inverted][:, [2, 3, 0, 1]]
    for name, side in (("inverse_target_grid", slice(0, 2)), ("inverse_source_grids", slice(2, 4))):
        if name in data.column_names:
            column = _column(data, name).take(pa.array(rows[inverted]))
            swapped[column.is_valid().to_numpy(), side] = _grids(column)
    return inverted, swapped


def _column(data: Dataset, name: str) -> pa.ChunkedArray:
    return data.select_columns([name]).with_format("arrow")[:][name]


def _grids(column: pa.ChunkedArray) -> np.ndarray:
    """All grids of a column of grids or of lists of grids, null rows left out: int64 [grids, 2]."""
    while pa.types.is_nested(column.type):
        column = pc.list_flatten(column)
    return column.to_numpy().astype(np.int64).reshape(-1, 2)


def _codes(keys: np.ndarray) -> np.ndarray:
    """Number the distinct rows of `keys[N, K]`, natural numbers, in lexicographic order."""
    codes = np.zeros(len(keys), np.int64)
    for column in keys.T:
        codes = np.unique(codes * (column.max() + 1) + column, return_inverse=True)[1]
    return codes


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
            raise InputError(
                f"mix.source_count_weights: all counts that occur, {occur}, have weight 0, so nothing is trained; "
                "give one of them a weight above 0"
            )
        count = np.array([group.num_sources for group in groups])
        part = weight / np.bincount(count, weight)[count] * [mix.source_count_weights[c] for c in count]
    return part / part.sum()


def resolve_same_shape(same_shape: int | None, *, global_batch_size: int, per_device_train_batch_size: int) -> int:
    """Rows in a cell: a micro-batch must lie within one cell, and a step must be a whole number of cells."""
    size = per_device_train_batch_size if same_shape is None else same_shape
    if size % per_device_train_batch_size or global_batch_size % size:
        raise InputError(
            f"mix.same_shape: {size} must be a multiple of per_device_train_batch_size, {per_device_train_batch_size},"
            f" and the global batch (ranks x per_device_train_batch_size x gradient_accumulation_steps), "
            f"{global_batch_size}, a multiple of it; change one of the three"
        )
    return size


def cell_plan(group: Group, *, seed: int, same_shape: int, num_cells: int) -> Dataset:
    """The first `num_cells` cells of a group: {task, num_sources, inverse, rows}; a longer plan begins with a shorter.

    In each pass over the group, ceil(num_rows / same_shape) cells, the buckets are chosen by a stratified draw: each
    has its part of the cells to within one, in random order. A bucket's rows come in an order of its own and wrap,
    also within a cell.
    """
    rng = draw_rng(seed, f"cells of {group.task}", group.num_sources)
    order = rng.permutation(len(group.rows))
    order = order[np.argsort(group.bucket[order], kind="stable")]  # bucket by bucket, each shuffled
    size = np.bincount(group.bucket)
    start = np.cumsum(size) - size
    edges = np.cumsum(np.bincount(group.bucket, group.chance))

    per_pass = math.ceil(group.num_rows / same_shape)
    random = rng.random((math.ceil(num_cells / per_pass), 2, per_pass))
    u = (random[:, 0].argsort(axis=1) + random[:, 1]).reshape(-1)[:num_cells] / per_pass
    bucket = np.searchsorted(edges[:-1] / edges[-1], u, side="right")

    place = _times_seen(bucket)[:, None] * same_shape + np.arange(same_shape)
    entry = order[start[bucket, None] + place % size[bucket, None]]
    table = {
        "task": pa.repeat(group.task, num_cells),
        "num_sources": pa.repeat(pa.scalar(group.num_sources, pa.int8()), num_cells),
        "inverse": pa.array(group.inverse[entry[:, 0]]),
        "rows": pa.FixedSizeListArray.from_arrays(group.rows[entry].reshape(-1), same_shape),
    }
    return Dataset(pa.table(table))


def _times_seen(values: np.ndarray) -> np.ndarray:
    """How often the value at each place has stood at an earlier one."""
    order = np.argsort(values, kind="stable")
    count = np.bincount(values)
    times = np.empty(len(values), np.int64)
    times[order] = np.arange(len(values)) - np.repeat(np.cumsum(count) - count, count)
    return times


def mixed_plan(groups: Sequence[Group], shares: np.ndarray, *, seed: int, same_shape: int, num_cells: int) -> Dataset:
    """The run: `num_cells` cells, each the next one of a group drawn by share; a longer run begins with a shorter."""
    drawn = [(group, share) for group, share in zip(groups, shares, strict=True) if share > 0]
    # A group is drawn num_cells * share times, give or take: by Bernstein's bound ten standard deviations and 50 more
    # are passed with a chance below e^-45, and the end of a plan changes nothing before it.
    lengths = [math.ceil(num_cells * share + 10 * math.sqrt(num_cells * share)) + 50 for _, share in drawn]
    plans = [
        cell_plan(group, seed=seed, same_shape=same_shape, num_cells=min(num_cells, length))
        for (group, _), length in zip(drawn, lengths, strict=True)
    ]
    probabilities = [float(share) for _, share in drawn]
    run = interleave_datasets(plans, probabilities=probabilities, seed=seed, stopping_strategy="first_exhausted")
    assert len(run) >= num_cells, "a group's plan was too short"
    return run.select(range(num_cells))


def mix_table(groups: Sequence[Group], shares: np.ndarray, *, num_draws: int) -> str:
    """What is drawn how often in a run of `num_draws`, one line a group."""
    lines = [("task", "sources", "rows", "weight", "share", "times over")]
    for group, share in zip(groups, shares, strict=True):
        times = f"{share * num_draws / group.num_rows:.2f}"
        lines.append(
            (group.task, str(group.num_sources), f"{group.num_rows:,}", f"{group.weight:g}", f"{share:.4f}", times)
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def realised_shares(drawn: Mapping[tuple[str, int], int]) -> str:
    """The share of each group, (task, source count), in what was drawn, to be held against `mix_table`."""
    total = sum(drawn.values())
    parts = (f"{task} with {count} source(s) {n / total:.4f}" for (task, count), n in sorted(drawn.items()))
    return f"{', '.join(parts)} of {total:,} rows"


def mix_warnings(
    groups: Sequence[Group], shares: np.ndarray, mix: Mix, *, num_draws: int, same_shape: int
) -> list[str]:
    """What a user should know before such a run: one sentence each."""
    warnings = [
        f"task {group.task!r}, {group.num_sources} source(s): this run draws its {group.num_rows:,} rows "
        f"{share * num_draws / group.num_rows:.0f} times over"
        for group, share in zip(groups, shares, strict=True)
        if share * num_draws > MANY_TIMES_OVER * group.num_rows
    ]
    if absent := sorted(set(mix.source_count_weights or {}) - {group.num_sources for group in groups}):
        warnings.append(f"mix.source_count_weights: no row has {absent} sources, so these entries drop out")
    small = sum(share * small_bucket_share(group, same_shape) for group, share in zip(groups, shares, strict=True))
    if small >= 0.001:
        warnings.append(
            f"{small:.1%} of the draws are of shapes with fewer rows than same_shape, {same_shape}: "
            "their cells repeat rows, with other noise"
        )
    return warnings


def small_bucket_share(group: Group, same_shape: int) -> float:
    """The part of a group's draws that comes from buckets with fewer rows than a cell."""
    small = np.bincount(group.bucket)[group.bucket] < same_shape
    return float(group.chance[small].sum() / group.chance.sum())
