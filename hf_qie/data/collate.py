"""Rows of one shape -> one padded batch. Reads no file and draws no number.

Letters: B rows, K draws of each, S target latent tokens, R latent tokens of all sources, C width of a packed latent,
L prompt tokens, D width of the encoder.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor

PROMPT = ("prompt_embeds", "prompt_lengths", "image_slots")  # what a batch has of its captions


class Batch(TypedDict):
    """What the trainer is given: a plain dict at run time, so that accelerate moves its tensors."""

    target_latents: NotRequired[Tensor]  # [B, S, C] float16
    source_latents: NotRequired[Tensor]  # [B, R, C] float16, R = 0 for text-to-image
    images: NotRequired[list[Tensor]]  # in place of latents, until these are encoded: [B, H, W, channels] uint8
    prompt_embeds: Tensor  # [B, L, D] float16, zero where padded
    prompt_lengths: list[int]  # real tokens of each row, known without a question to the device
    image_slots: list[list[int]]  # of each row and source, how many of its embeddings stand in front of its latents
    grids: list[tuple[int, int]]  # of every row: the target's, then each source's; packed height, width
    task: list[str]
    row: list[int]  # position in the task's data
    draw: list[int]  # [B x K] numbers, K of each row, that decide everything random
    noise: NotRequired[Tensor]  # [B x K, S, C] float32, of each draw; the objective adds it where rows are collated
    sigma: NotRequired[Tensor]  # [B x K] float32, the noise level of each draw, the same


def collate(rows: Sequence[Mapping[str, Any]]) -> Batch:
    """Stack rows of one shape; prompts are padded on the right, where the transformer does not see it."""
    grids = rows[0]["grids"]
    # diffusers places every row of a batch by the grids of the first, with no more than a log line
    assert all(row["grids"] == grids for row in rows), f"shapes differ: {[row['grids'] for row in rows]}"
    lengths = np.array([sum(map(len, row["prompt_parts"])) for row in rows])
    prompts = np.empty((len(rows), lengths.max(), rows[0]["prompt_parts"][0].shape[1]), np.float16)
    for prompt, length, row in zip(prompts, lengths, rows, strict=True):
        np.concatenate(row["prompt_parts"], out=prompt[:length])
        prompt[length:] = 0
    names = [name for name, value in rows[0].items() if isinstance(value, np.ndarray)]
    arrays = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in names}
    if "images" in rows[0]:
        places = zip(*(row["images"] for row in rows), strict=True)
        arrays["images"] = [torch.from_numpy(np.stack(place)) for place in places]
    return Batch(
        **arrays,
        prompt_embeds=torch.from_numpy(prompts),
        prompt_lengths=lengths.tolist(),
        image_slots=[row["image_slots"] for row in rows],
        grids=grids,
        task=[row["task"] for row in rows],
        row=[row["row"] for row in rows],
        draw=[draw for row in rows for draw in row["draws"]],
    )
