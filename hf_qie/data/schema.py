"""The columns of an embedding set, declared once, and how they are written without a Python loop.

Features, checks, the rows of a task, extraction, loader, dataset card and contact sheet follow `COLUMNS`; a new column
is a line there and the code that computes it.

Letters: L tokens, D width of the encoder, C width of a packed latent.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Features, List, Value

from hf_qie.config.data import Columns

SOURCES, TARGET, INVERSE, TEXT_EMBEDS = "source_image", "target_image", "inverse_", "text_embeds_"
# whether a set has a column for the inverse of a row too: NEVER, ALWAYS, or where sources and targets differ in area
NEVER, ALWAYS, AREA = "never", "always", "area"


@dataclass(frozen=True)
class Column:
    """A column of the set, or one for each caption where its name has `{caption}`.

    kind: number, caption, image (path or URL as given), embeddings (of a prompt), slots (places among these), latents
    (of an image, from the VAE), grid (packed height and width of an image), values (what `compute` makes of an image).
    """

    name: str
    kind: str
    meaning: str  # on the dataset card
    type: Any = None  # feature of datasets; embeddings and latents are matrices as wide as the checkpoint has them
    of: str = ""  # the image column that it is computed from
    inverse: str = NEVER  # without a column of its own an inverse has the forward row's
    key: str = ""  # of an image column: its key in `columns` of the recipe, and its name in the rows of a task
    compute: Callable[[list, tuple[int, int]], Any] | None = None  # of images as read and the target's grid

    @cached_property
    def many(self) -> bool:
        """Whether a row has any number of these images or grids, and not exactly one."""
        return self.type in (TEXTS, GRIDS)

    def each(self, value: Any) -> list:
        """The images or grids in a value of this column."""
        return value if self.many else [value]

    def paths(self, row: Mapping[str, Any]) -> list[str]:
        """The images of this column in a row of a task."""
        return self.each(row[self.row_key])

    @property
    def row_key(self) -> str:
        """The name of an image column in the rows of a task."""
        return self.key or self.name

    def data_columns(self, columns: Columns) -> tuple[str, ...]:
        """The columns of a task's data that hold these images."""
        found = getattr(columns, self.key, self.name)
        return (found,) if isinstance(found, str) else found

    def label(self, columns: Columns) -> str:
        """These images in a message."""
        return ", ".join(self.data_columns(columns))

    def is_stored(self, prefix: str, *, other_area: bool) -> bool:
        """Whether a set has this column with a prefix, "" or `INVERSE`."""
        return not prefix or self.inverse == ALWAYS or (self.inverse == AREA and other_area)


TEXT, GRID = Value("string"), List(Value("int32"), length=2)
TEXTS, GRIDS, SLOTS = List(TEXT), List(GRID), List(Value("int32"))
IN_PLACE = "or its place in the data"
# In the order of the set; those of the inverse follow all others. An image beside sources and target is read from the
# data's column of its own name, one in each row, and has the target's size.
COLUMNS = (
    Column("row", "number", "0-based position in the task's data; rows that were skipped are missing", Value("int64")),
    Column(SOURCES, "image", f"path or URL of each source, {IN_PLACE}; empty for text-to-image", TEXTS, key="sources"),
    Column(TARGET, "image", f"path or URL of the target, {IN_PLACE}", TEXT, key="target"),
    Column("{caption}", "caption", "a caption; null where the row has none", TEXT),
    Column("num_sources", "number", "number of sources", Value("int8")),
    Column("image_embeds", "embeddings", "the prompt's part for the images; empty for text-to-image", inverse=ALWAYS),
    Column(
        "prefix_embeds",
        "embeddings",
        "the prompt's tokens of text before the caption, those of images left out; empty for text-to-image",
        inverse=ALWAYS,
    ),
    Column(
        "image_slots",
        "slots",
        "of each source, how many of `prefix_embeds` stand in front of its latents",
        SLOTS,
        inverse=ALWAYS,
    ),
    Column("text_embeds_{caption}", "embeddings", "the prompt's part for `{caption}`, or null", inverse=ALWAYS),
    Column("text_embeds_drop", "embeddings", "the prompt's part for the drop caption", inverse=ALWAYS),
    Column("target_latents", "latents", "packed and normalised; null where none are stored", of=TARGET, inverse=AREA),
    Column("target_grid", "grid", "packed height and width of the target", GRID, of=TARGET, inverse=AREA),
    Column("source_latents", "latents", "of all sources, one after the other", of=SOURCES, inverse=AREA),
    Column("source_grids", "grid", "packed height and width of each source", GRIDS, of=SOURCES, inverse=AREA),
)
# The columns of what all captions of a row share, the embeddings first: a set has those of one line, its family's
# `prompt_columns`.
PROMPT_COLUMNS = (("image_embeds",), ("prefix_embeds", "image_slots"))
DROP_EMBEDS = f"{TEXT_EMBEDS}drop"
HAS_INVERSE = f"{INVERSE}{DROP_EMBEDS}"  # not null in the rows with an inverse


def columns_of(*kinds: str) -> list[Column]:
    """The columns of these kinds; of all, if none is given."""
    return [column for column in COLUMNS if not kinds or column.kind in kinds]


def prompt_columns_in(names: Iterable[str]) -> tuple[str, ...]:
    """The line of `PROMPT_COLUMNS` of a set with columns of these names; the first if it has none of any."""
    names = set(names)
    return next((line for line in PROMPT_COLUMNS if names.intersection(line)), PROMPT_COLUMNS[0])


def shared_embeds(names: Iterable[str]) -> str:
    """The column of the embeddings that all captions share, in a set with columns of these names."""
    return prompt_columns_in(names)[0]


def swapped(column: Column) -> Column:
    """The column of the forward row that an inverse takes in place of `column`: the target's for the sources'."""
    other = {SOURCES: TARGET, TARGET: SOURCES}.get(column.of)
    return next((one for one in COLUMNS if (one.kind, one.of) == (column.kind, other)), column)


def column_of(name: str) -> tuple[Column, str]:
    """The column in the table that column `name` of a set is, and its caption, if it has one."""
    name = name.removeprefix(INVERSE)
    for column in sorted(COLUMNS, key=lambda column: ("{caption}" in column.name, column.kind == "caption")):
        if found := re.fullmatch(column.name.replace("{caption}", "(?P<caption>.+)"), name, re.DOTALL):
            return column, found.groupdict().get("caption", "")
    raise AssertionError(name)  # a caption has any name


def texts_in(columns: Iterable[str], prefix: str = "") -> list[str]:
    """The captions, but for the drop caption, whose embeddings a set with these columns has in one direction."""
    start = f"{prefix}{TEXT_EMBEDS}"
    return [name.removeprefix(start) for name in columns if name.startswith(start) and name != prefix + DROP_EMBEDS]


def set_features(
    *,
    width: int,
    latent_width: int,
    captions: Sequence[str],
    inverse_captions: Sequence[str],
    inverse_latents: bool,
    prompt_columns: Sequence[str] = PROMPT_COLUMNS[0],
) -> Features:
    """The features of a set, in order; `inverse_captions` is empty where no row has an inverse.

    `inverse_latents`: sources and targets differ in area, so an inverse cannot borrow the forward row's latents.
    `prompt_columns`: one of `PROMPT_COLUMNS`.
    """
    found, others = {}, {name for line in PROMPT_COLUMNS for name in line} - {*prompt_columns}
    columns = [column for column in COLUMNS if column.name not in others]
    for prefix, names in (("", captions), (INVERSE, inverse_captions)):
        for column in columns if names or not prefix else ():
            if column.is_stored(prefix, other_area=inverse_latents):
                widths = {"embeddings": width, "latents": latent_width}
                feature = matrix(widths[column.kind]) if column.type is None else column.type
                each = names if "{caption}" in column.name else [""]
                found |= {prefix + column.name.replace("{caption}", name): feature for name in each}
    return Features(found)


def matrix(width: int) -> List:
    """The feature of a `[L, width]` float16 matrix with any L."""
    return List(List(Value("float16"), length=width))


def grids_in(column: pa.ChunkedArray) -> np.ndarray:
    """All grids of a column of grids or of lists of grids, null rows left out: int64 [grids, 2]."""
    while pa.types.is_nested(column.type):
        column = pc.list_flatten(column)
    return column.fill_null(0).to_numpy().astype(np.int64).reshape(-1, 2)


def to_table(rows: Sequence[Mapping[str, Any]], features: Features) -> pa.Table:
    """An Arrow table of `rows`; matrices are float16 arrays `[L, width]` or None, a column a row lacks is null."""
    schema = features.arrow_schema
    arrays = []
    for name, feature in features.items():
        values = [row.get(name) for row in rows]
        width = matrix_width(feature)
        arrays.append(_matrix_array(values, width) if width else pa.array(values, schema.field(name).type))
    return pa.table(arrays, schema=pa.schema(features.type))


def matrix_width(feature: Any) -> int | None:
    """The width of a matrix column, None for any other."""
    inner = feature.feature if isinstance(feature, List) else None
    return inner.length if isinstance(inner, List) and inner.feature == Value("float16") else None


def _matrix_array(values: Sequence[np.ndarray | None], width: int) -> pa.ListArray:
    lengths = [0 if value is None else len(value) for value in values]
    flat = [np.ascontiguousarray(value, dtype=np.float16).ravel() for value in values if value is not None]
    data = pa.array(np.concatenate(flat) if flat else np.empty(0, np.float16))
    return pa.ListArray.from_arrays(
        pa.array(np.cumsum([0, *lengths]), pa.int32()),
        pa.FixedSizeListArray.from_arrays(data, width),
        mask=pa.array([value is None for value in values], pa.bool_()),
    )
