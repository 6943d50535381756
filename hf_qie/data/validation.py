"""Whether a set holds what its format promises, before training reads a row of it: columns, types and lengths.

Looked at are types and offsets alone, a second for a million rows once they are in memory: no state or latent is read.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features

from hf_qie.data.schema import LATENT_CHANNELS, matrix, matrix_width, set_features
from hf_qie.errors import InputError
from hf_qie.models.qwen_image.vae import MAX_POSITIONS

DAMAGED = "the set is damaged, or not what extract.py makes: extract it again, or fetch it from where you trust it"
NO_LATENTS = ("target_latents", "source_latents")


def check_columns(data: Dataset, *, where: str) -> None:
    """Raise InputError, at `where`, unless `data` has the columns of a set, with states of one width."""
    if problem := wrong_type(data.features) or next(wrong_values(data), None):
        raise InputError(f"{where}: {problem}; {DAMAGED}")


def wrong_type(features: Features) -> str | None:
    """The first column that is missing, or of another type; None where all are there. Others do no harm."""
    width = matrix_width(features.get("image_embeds")) or 0
    wanted = dict(set_features(width=width, captions=(), inverse_captions=(), inverse_latents=False))
    inverse = set_features(width=width, captions=(), inverse_captions=("x",), inverse_latents=True)
    known = wanted | {name: feature for name, feature in inverse.items() if name.startswith("inverse_")}
    for name in features:
        if "text_embeds_" in name:
            known[name] = matrix(width)
    if "inverse_image_embeds" in features:
        wanted["inverse_text_embeds_drop"] = matrix(width)
    for name in (*wanted, *(name for name in known if name in features)):
        if name not in features:
            return f"has no column {name}"
        if features[name] != known[name]:
            return f"column {name}: got {features[name]}, wanted {known[name]}"
    return None


def wrong_values(data: Dataset) -> Iterator[str]:
    """What is wrong, the first row of each kind, in words; the types are right."""
    table = data.with_format("arrow").data.table
    for name in table.column_names:
        for chunk in table.column(name).chunks:
            try:
                chunk.validate(full=True)  # offsets may lead anywhere in a file that was made by hand
            except pa.ArrowInvalid as error:
                yield f"column {name}: {error}"
                return
    rows = table.column("row")
    yield from found("row", rows.is_null().to_numpy(), "is null")
    yield from found("row", rows.fill_null(-1).to_numpy() < 0, "is negative")
    images, drop = lengths(table, "image_embeds"), lengths(table, "text_embeds_drop")
    yield from found("image_embeds", images < 0, "is null")
    yield from found("text_embeds_drop", drop < 1, "has no states")
    yield from wrong_pictures(table, "", np.ones(len(table), bool))
    if "inverse_image_embeds" in table.column_names:
        inverse = lengths(table, "inverse_image_embeds") >= 0
        yield from found(
            "inverse_text_embeds_drop", inverse & (lengths(table, "inverse_text_embeds_drop") < 1), "has no states"
        )
        if "inverse_target_grid" in table.column_names:
            yield from wrong_pictures(table, "inverse_", inverse & (lengths(table, "inverse_target_grid") >= 0))
    for name in table.column_names:
        if "text_embeds_" in name:
            yield from found(name, nulls_inside(table.column(name)), "has null states")


def wrong_pictures(table: pa.Table, prefix: str, there: np.ndarray) -> Iterator[str]:
    """What is wrong with grids and latents of one direction, in the rows `there`."""
    target, sources = table.column(f"{prefix}target_grid"), table.column(f"{prefix}source_grids")
    yield from found(f"{prefix}target_grid", there & (list_lengths(target) != 2), "is null")
    yield from found(f"{prefix}source_grids", there & (list_lengths(sources) < 0), "is null")
    if not prefix:
        counts = table.column("num_sources").fill_null(-1).to_numpy()
        yield from found("num_sources", counts != list_lengths(sources), "is not the number of source_grids")
    sides = {f"{prefix}target_grid": flat(target), f"{prefix}source_grids": flat(sources)}
    for name, values in sides.items():
        if len(values) and (values.min() < 1 or values.max() >= MAX_POSITIONS):
            yield f"column {name}: sides from {values.min():,} to {values.max():,}, wanted 1 to {MAX_POSITIONS - 1:,}"
    areas = areas_by_row(target), areas_by_row(sources)
    latents = [lengths(table, prefix + name) for name in NO_LATENTS]
    if all((one < 0).all() for one in latents):
        return  # of a set without latents
    for name, one, area in zip(NO_LATENTS, latents, areas, strict=True):
        yield from found(
            prefix + name, there & (one != area), f"has not the {LATENT_CHANNELS}-vectors that its grids say"
        )
        yield from found(prefix + name, nulls_inside(table.column(prefix + name)), "has null vectors")


def found(column: str, wrong: np.ndarray, words: str) -> Iterator[str]:
    """The first row that is wrong, if there is one."""
    if wrong.any():
        place = int(wrong.argmax())
        yield f"place {place:,}, column {column}: {words} ({int(wrong.sum()):,} such rows)"


def lengths(table: pa.Table, name: str) -> np.ndarray:
    """Items of each row's list in a column; -1 where it is null."""
    return list_lengths(table.column(name))


def list_lengths(column: pa.ChunkedArray) -> np.ndarray:
    """Items of each row's list; -1 where it is null."""
    return pc.list_value_length(column).fill_null(-1).to_numpy()


def flat(column: pa.ChunkedArray) -> np.ndarray:
    """All numbers of nested lists, in order."""
    while pa.types.is_nested(column.type):
        column = pc.list_flatten(column)
    return column.fill_null(0).to_numpy().astype(np.int64)


def areas_by_row(column: pa.ChunkedArray) -> np.ndarray:
    """The summed area of each row's grids, of one grid or of a list of them; 0 where it is null."""
    areas = flat(column).reshape(-1, 2).prod(axis=1)
    of_a_row = np.maximum(list_lengths(column), 0)
    if not pa.types.is_nested(column.type.value_type):
        of_a_row = of_a_row // 2  # the column holds grids, not lists of them
    ends = np.cumsum(of_a_row)
    sums = np.concatenate([[0], np.cumsum(areas)])
    return sums[ends] - sums[ends - of_a_row]


def nulls_inside(column: pa.ChunkedArray) -> np.ndarray:
    """Whether anything inside a column's lists is null; one answer for all rows of a chunk."""
    answers = [np.full(len(chunk), has_null_inside(chunk)) for chunk in column.chunks]
    return np.concatenate(answers) if answers else np.empty(0, bool)


def has_null_inside(chunk: pa.Array) -> bool:
    """Whether a value inside the lists of a chunk is null."""
    values = chunk.values
    return values.null_count > 0 or (pa.types.is_nested(values.type) and has_null_inside(values))
