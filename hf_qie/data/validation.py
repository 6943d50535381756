"""Whether a set holds what its format promises, before training reads a row of it: columns, types and lengths.

Types and offsets are read, no embedding or latent: a second for a million rows once they are in memory.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features

from hf_qie.data.schema import (
    INVERSE,
    LATENT_CHANNELS,
    TARGET,
    column_of,
    columns_of,
    feature_of,
    matrix_width,
)
from hf_qie.errors import InputError
from hf_qie.models.qwen_image.vae import MAX_POSITIONS

DAMAGED = "the set is damaged, or not what extract.py makes: extract it again, or fetch it from where you trust it"


def check_columns(data: Dataset, *, where: str) -> None:
    """Raise InputError, at `where`, unless `data` has the columns of a set, with embeddings of one width."""
    if problem := _wrong_type(data.features) or next(_wrong_values(data), None):
        raise InputError(f"{where}: {problem}; {DAMAGED}")


def _wrong_type(features: Features) -> str | None:
    """The first column that is missing, or of another type."""
    prefixes = ["", INVERSE] if f"{INVERSE}image_embeds" in features else [""]
    other_area = f"{INVERSE}target_grid" in features
    for name in (
        prefix + column.name
        for prefix in prefixes
        for column in columns_of()
        if "{caption}" not in column.name and column.is_stored(prefix, other_area=other_area)
    ):
        if name not in features:
            return f"has no column {name}"
    width = matrix_width(features["image_embeds"]) or 0
    for name, feature in features.items():
        column, _ = column_of(name)
        if column.kind != "caption" and feature != (wanted := feature_of(column, width, LATENT_CHANNELS)):
            return f"column {name}: got {feature}, wanted {wanted}"
    return None


def _wrong_values(data: Dataset) -> Iterator[str]:
    """What is wrong, by the first row of each kind; the types are right."""
    table = data.data.table
    for name in table.column_names:
        for chunk in table.column(name).chunks:
            try:
                chunk.validate(full=True)  # offsets may lead anywhere in a file that was made by hand
            except pa.ArrowInvalid as error:
                yield f"column {name}: {error}"
                return
        if matrix_width(data.features[name]):
            yield from _found(name, _nulls_inside(table.column(name)), "has null vectors or numbers")
    rows = table.column("row").fill_null(-1).to_numpy()
    yield from _found("row", rows < 0, "is null or negative")
    counts = table.column("num_sources").fill_null(-1).to_numpy()
    yield from _found("num_sources", counts != _lengths(table, "source_grids"), "is not the number of source_grids")
    yield from _wrong_direction(table, "", np.ones(len(table), bool))
    if f"{INVERSE}image_embeds" in table.column_names:
        yield from _wrong_direction(table, INVERSE, _lengths(table, f"{INVERSE}image_embeds") >= 0)


def _wrong_direction(table: pa.Table, prefix: str, there: np.ndarray) -> Iterator[str]:
    """What is wrong with one direction, in the rows `there`."""
    for name, least in (("image_embeds", 0), ("text_embeds_drop", 1)):
        yield from _found(prefix + name, there & (_lengths(table, prefix + name) < least), "has no embeddings")
    if f"{prefix}target_grid" not in table.column_names:
        return  # the inverse has the forward row's
    there = there & (_lengths(table, f"{prefix}target_grid") >= 0) if prefix else there
    areas = {}
    for column in columns_of("grid"):
        name, grids = prefix + column.name, table.column(prefix + column.name)
        yield from _found(name, there & (_lengths(table, name) < (0 if column.many else 2)), "is null")
        sides = _flat(grids)
        if len(sides) and (sides.min() < 1 or sides.max() >= MAX_POSITIONS):
            yield f"column {name}: sides from {sides.min():,} to {sides.max():,}, wanted 1 to {MAX_POSITIONS - 1:,}"
        areas[column.of] = _areas_by_row(grids, many=column.many)
    latents = {column: _lengths(table, prefix + column.name) for column in columns_of("latents")}
    if any((one >= 0).any() for one in latents.values()):  # else a set without latents
        for column, one in latents.items():
            area = areas.get(column.of, areas[TARGET])
            yield from _found(prefix + column.name, there & (one != area), "has not the vectors that its grids say")


def _found(column: str, wrong: np.ndarray, words: str) -> Iterator[str]:
    """The first row that is wrong, if there is one."""
    if wrong.any():
        yield f"place {int(wrong.argmax()):,}, column {column}: {words} ({int(wrong.sum()):,} such rows)"


def _lengths(table: pa.Table, name: str) -> np.ndarray:
    """Items of each row's list in a column; -1 where it is null."""
    return pc.list_value_length(table.column(name)).fill_null(-1).to_numpy()


def _flat(column: pa.ChunkedArray) -> np.ndarray:
    """All numbers of nested lists, in order."""
    while pa.types.is_nested(column.type):
        column = pc.list_flatten(column)
    return column.fill_null(0).to_numpy().astype(np.int64)


def _areas_by_row(column: pa.ChunkedArray, *, many: bool) -> np.ndarray:
    """The summed area of each row's grids, of one grid or of a list of them; 0 where it is null."""
    sums = np.concatenate([[0], np.cumsum(_flat(column).reshape(-1, 2).prod(axis=1))])
    counts = np.maximum(pc.list_value_length(column).fill_null(0).to_numpy(), 0) // (1 if many else 2)
    ends = np.cumsum(counts)
    return sums[ends] - sums[ends - counts]


def _nulls_inside(column: pa.ChunkedArray) -> np.ndarray:
    """Whether anything inside a column's lists is null; one answer for all rows of a chunk."""
    answers = [np.full(len(chunk), _has_null_inside(chunk)) for chunk in column.chunks]
    return np.concatenate(answers) if answers else np.empty(0, bool)


def _has_null_inside(chunk: pa.Array) -> bool:
    values = chunk.values
    return values.null_count > 0 or (pa.types.is_nested(values.type) and _has_null_inside(values))
