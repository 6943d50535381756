"""What the models made of a row, as the columns of a set."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from hf_qie.data.schema import LATENT_CHANNELS, Column
from hf_qie.extraction.batching import Pass
from hf_qie.extraction.preprocess import Direction, Picture
from hf_qie.models.qwen_image.text_encoder import PromptStates


def state_columns(one: Pass, states: PromptStates) -> dict[int, dict[str, np.ndarray]]:
    """The columns of states of each direction of a pass, by its identity."""
    image = to_float16(states.image)
    columns = {}
    for direction, texts in one.split(states):
        names = [f"text_embeds_{caption}" for caption in (*direction.captions, "drop")]
        values = {"image_embeds": image, **dict(zip(names, map(to_float16, texts), strict=True))}
        columns[id(direction)] = {direction.prefix + name: value for name, value in values.items()}
    return columns


def latent_columns(
    direction: Direction, latents: Mapping[Picture, np.ndarray], columns: Sequence[Column]
) -> dict[str, np.ndarray]:
    """The columns of latents of one direction; those of several pictures one after the other."""
    none = np.empty((0, LATENT_CHANNELS), np.float16)
    parts = {column.name: [latents[picture] for picture in direction.images[column.of]] for column in columns}
    return {direction.prefix + name: np.concatenate(some) if some else none for name, some in parts.items()}


def to_float16(values: torch.Tensor) -> np.ndarray:
    """As stored: exact for bfloat16 from 2^-17 to 65504, at most 2^-25 off below."""
    return values.to(torch.float16).cpu().numpy()


def fits_float16(values: np.ndarray) -> bool:
    """False where rounding to float16 made an infinity, or the model gave none of a number."""
    return bool(np.isfinite(values).all())
