"""Whether a set holds what its format promises, before training reads a row of it: columns, types and lengths.

Types and offsets are read, no embedding or latent: a second for a million rows once they are in memory.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features

from hf_qie.data.schema import INVERSE, TARGET, column_of, columns_of, feature_of, grids_in, matrix_width
from hf_qie.errors import InputError

MOST_SIDE = 4096  # tokens of a grid's side: no transformer places more
DAMAGED = "the set is damaged, or not what extract.py makes: extract it again, or fetch it from where you trust it"


def check_columns(data: Dataset, *, where: str) -> None:
    """Raise InputError, at `where`, unless `data` has the columns of a set, with embeddings of one width."""
    if problem := _wrong_type(data.features) or next(_wrong_values(data), None):
        raise InputError(f"{where}: {problem}; {DAMAGED}")


def _wrong_type(features: Features) -> str | None:
    """The first column that is missing, or of another type."""
    for prefix in ("", INVERSE) if f"{INVERSE}image_embeds" in features else ("",):
        for column in columns_of():
            is_stored = column.is_stored(prefix, other_area=f"{INVERSE}target_grid" in features)
            if is_stored and "{caption}" not in column.name and prefix + column.name not in features:
                return f"has no column {prefix}{column.name}"
    widths = [matrix_width(features[name]) or 0 for name in ("image_embeds", "target_latents")]
    for name, feature in features.items():
        column, _ = column_of(name)
        if column.kind != "caption" and feature != (wanted := feature_of(column, *widths)):
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
            if matrix_width(data.features[name]) and (chunk.values.null_count or chunk.values.values.null_count):
                yield f"column {name}: has null vectors or numbers"
    rows, counts = (table.column(name).fill_null(-1).to_numpy() for name in ("row", "num_sources"))
    yield from _found("row", rows < 0, "is null or negative")
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
    if prefix:
        there = there & (_lengths(table, f"{prefix}target_grid") >= 0)
    areas = {}
    for column in columns_of("grid"):
        name, sides = prefix + column.name, grids_in(table.column(prefix + column.name))
        yield from _found(name, there & (_lengths(table, name) < (0 if column.many else 2)), "is null")
        if sides.size and not 1 <= sides.min() <= sides.max() <= MOST_SIDE:
            yield f"column {name}: sides from {sides.min():,} to {sides.max():,}, wanted 1 to {MOST_SIDE:,}"
        sums, counts = np.append(0, sides.prod(axis=1).cumsum()), np.maximum(_lengths(table, name), 0)
        ends = np.cumsum(counts if column.many else counts // 2)
        areas[column.of] = np.diff(sums[ends], prepend=0)
    latents = {column: _lengths(table, prefix + column.name) for column in columns_of("latents")}
    if any((length >= 0).any() for length in latents.values()):  # else a set without latents
        for column, length in latents.items():
            wrong = there & (length != areas.get(column.of, areas[TARGET]))
            yield from _found(prefix + column.name, wrong, "has not the vectors that its grids say")


def _found(column: str, wrong: np.ndarray, words: str) -> Iterator[str]:
    """The first row that is wrong, if there is one."""
    if wrong.any():
        yield f"place {int(wrong.argmax()):,}, column {column}: {words} ({int(wrong.sum()):,} such rows)"


def _lengths(table: pa.Table, name: str) -> np.ndarray:
    """Items of each row's list in a column; -1 where it is null."""
    return pc.list_value_length(table.column(name)).fill_null(-1).to_numpy()
