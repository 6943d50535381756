"""The columns of an embedding set, and how they are written without a Python loop.

Letters: L tokens, D width of the encoder, C channels of a packed latent (64).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Features, List, Value

LATENT_CHANNELS = 64


def set_features(
    *, width: int, captions: Sequence[str], inverse_captions: Sequence[str], inverse_latents: bool
) -> Features:
    """Columns of a set; `inverse_captions` is empty where no row has an inverse.

    `inverse_latents`: sources and targets differ in area, so an inverse cannot borrow the forward row's latents.
    """
    states, latents = matrix(width), matrix(LATENT_CHANNELS)
    grid = List(Value("int32"), length=2)
    pictures = {"target_latents": latents, "target_grid": grid, "source_latents": latents, "source_grids": List(grid)}
    columns: dict[str, Any] = {"row": Value("int64"), "source_image": List(Value("string"))}
    columns |= dict.fromkeys(("target_image", *captions), Value("string"))
    columns |= {"num_sources": Value("int8"), "image_embeds": states}
    columns |= {f"text_embeds_{caption}": states for caption in (*captions, "drop")} | pictures
    if inverse_captions:
        columns["inverse_image_embeds"] = states
        columns |= {f"inverse_text_embeds_{caption}": states for caption in (*inverse_captions, "drop")}
        if inverse_latents:
            columns |= {f"inverse_{name}": feature for name, feature in pictures.items()}
    return Features(columns)


def matrix(width: int) -> List:
    """The feature of a `[L, width]` float16 matrix with any L."""
    return List(List(Value("float16"), length=width))


def to_table(rows: Sequence[Mapping[str, Any]], features: Features) -> pa.Table:
    """An Arrow table of `rows`; matrices are float16 arrays `[L, width]` or None, a column a row lacks is null."""
    arrays = []
    for name, feature in features.items():
        values = [row.get(name) for row in rows]
        width = matrix_width(feature)
        arrays.append(matrix_array(values, width) if width else pa.array(values, feature_type(feature)))
    return pa.table(arrays, schema=pa.schema(features.type))


def matrix_width(feature: Any) -> int | None:
    """The width of a matrix column, None for any other."""
    inner = feature.feature if isinstance(feature, List) else None
    return inner.length if isinstance(inner, List) and inner.feature == Value("float16") else None


def feature_type(feature: Any) -> pa.DataType:
    """The Arrow type of one feature."""
    return Features({"x": feature}).type.field("x").type


def matrix_array(values: Sequence[np.ndarray | None], width: int) -> pa.ListArray:
    """Matrices `[L, width]` as one Arrow array, by their buffers."""
    lengths = [0 if value is None else len(value) for value in values]
    flat = [np.ascontiguousarray(value, dtype=np.float16).ravel() for value in values if value is not None]
    data = pa.array(np.concatenate(flat) if flat else np.empty(0, np.float16))
    return pa.ListArray.from_arrays(
        pa.array(np.cumsum([0, *lengths]), pa.int32()),
        pa.FixedSizeListArray.from_arrays(data, width),
        mask=pa.array([value is None for value in values], pa.bool_()),
    )
