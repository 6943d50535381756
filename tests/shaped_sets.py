"""Small real embedding sets: every column of the format, values that tell the rows apart."""

import numpy as np
from datasets import Dataset

from hf_qie.data.schema import PROMPT_COLUMNS, set_features, to_table

WIDTH = 8
CAPTIONS = ("instruction", "instruction_cn")


def embedding_set(
    shapes, *, inverse=(), inverse_grids=None, captions=lambda row: CAPTIONS, prompt_columns=PROMPT_COLUMNS[0]
) -> Dataset:
    """A set of one row for each (target grid, *source grids) of `shapes`.

    `inverse`: the rows that have one. `inverse_grids`: (target, source) grids that inverses have of their own.
    `captions(row)`: the captions a row has.
    """
    features = set_features(
        width=WIDTH,
        latent_width=64,
        captions=CAPTIONS,
        inverse_captions=[f"inverse_{caption}" for caption in CAPTIONS] if len(inverse) else [],
        inverse_latents=inverse_grids is not None,
        prompt_columns=prompt_columns,
    )
    rows = [_row(row, grids, captions(row), row in set(inverse), inverse_grids) for row, grids in enumerate(shapes)]
    return Dataset(to_table(rows, features))


def _row(row, grids, captions, inverse, inverse_grids):
    rng = np.random.default_rng(row)

    def matrix(length, width=WIDTH):
        return rng.standard_normal((length, width)).astype(np.float16)

    target, *sources = grids
    texts = {caption: matrix(2 + row % 3 + place) for place, caption in enumerate((*captions, "drop"))}
    values = {
        "row": row,
        "source_image": [f"{row}-{n}.png" for n in range(len(sources))],
        "target_image": f"{row}.png",
    }
    values |= dict.fromkeys(captions, "edit") | {"num_sources": len(sources)} | _shared(matrix, len(sources))
    values |= {f"text_embeds_{caption}": text for caption, text in texts.items()}
    values |= _images(matrix, target, sources)
    if inverse:
        values |= {f"inverse_{name}": value for name, value in _shared(matrix, 1).items()}
        values |= {f"inverse_text_embeds_inverse_{caption}": matrix(4) for caption in captions}
        values["inverse_text_embeds_drop"] = matrix(2)
        if inverse_grids:
            own_target, own_source = inverse_grids
            values |= {f"inverse_{name}": value for name, value in _images(matrix, own_target, [own_source]).items()}
    return values


def _shared(matrix, num_sources):
    """What captions share, in every way in which sets have it."""
    embeds, slots = matrix(3 * num_sources), [3 * n + 2 for n in range(num_sources)]
    return {"image_embeds": embeds, "prefix_embeds": embeds, "image_slots": slots}


def _images(matrix, target, sources):
    return {
        "target_latents": matrix(target[0] * target[1], 64),
        "target_grid": list(target),
        "source_latents": matrix(sum(height * width for height, width in sources), 64),
        "source_grids": [list(grid) for grid in sources],
    }
