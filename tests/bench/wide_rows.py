"""Rows of real width: states of 3584 that were bfloat16, as an encoder in bfloat16 leaves them, and their latents.

A row has one source of 1024 x 1024 pixels, a target of 512 x 512, three captions of 50 tokens and the drop caption.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from datasets.arrow_writer import ArrowWriter
from figures import AFTER_TOKENS, CAPTION_TOKENS, DROP_TOKENS, IMAGE_TOKENS
from released import WIDTH

from hf_qie.data.schema import set_features, to_table

CAPTIONS = ("instruction", "instruction_cn", "instruction_short")
TARGET, SOURCE = (32, 32), (64, 64)
FEATURES = set_features(width=WIDTH, latent_width=64, captions=CAPTIONS, inverse_captions=(), inverse_latents=False)
LATENTS = ("target_latents", "source_latents")


def wide_rows(num_rows: int, *, seed: int = 0) -> Iterator[dict]:
    """Rows as extraction makes them; no two share their numbers' order."""
    rng = np.random.default_rng(seed)
    normal = torch.from_numpy(rng.standard_normal(8_000_000, np.float32))
    pool = normal.bfloat16().to(torch.float16).numpy()  # drawing each number anew would take most of the time

    def matrix(length: int, width: int = WIDTH) -> np.ndarray:
        start = rng.integers(len(pool) - length * width)
        return pool[start : start + length * width].reshape(length, width)

    for row in range(num_rows):
        yield {
            "row": row,
            "source_image": [f"{row}_source.png"],
            "target_image": f"{row}_target.png",
            **dict.fromkeys(CAPTIONS, "edit"),
            "num_sources": 1,
            "image_embeds": matrix(IMAGE_TOKENS),
            **{f"text_embeds_{caption}": matrix(CAPTION_TOKENS + AFTER_TOKENS) for caption in CAPTIONS},
            "text_embeds_drop": matrix(DROP_TOKENS + AFTER_TOKENS),
            "target_latents": matrix(TARGET[0] * TARGET[1], 64),
            "target_grid": list(TARGET),
            "source_latents": matrix(SOURCE[0] * SOURCE[1], 64),
            "source_grids": [list(SOURCE)],
        }


def prompts(row: dict) -> dict[str, torch.Tensor]:
    """What the pipeline's `encode_prompt` gives for each caption of a row, in bfloat16: what other trainers store."""
    states = {caption: row[f"text_embeds_{caption}"] for caption in (*CAPTIONS, "drop")}
    return {
        caption: torch.from_numpy(np.concatenate([row["image_embeds"], text])).bfloat16()
        for caption, text in states.items()
    }


def write_chunk(rows: list[dict], path: Path) -> None:
    """An Arrow file of a set, as extraction writes it."""
    with ArrowWriter(path=str(path), features=FEATURES) as writer:
        for start in range(0, len(rows), 16):
            writer.write_table(to_table(rows[start : start + 16], FEATURES))
        writer.finalize()


def open_chunks(folder: Path) -> Dataset:
    """The set of all Arrow files of a folder."""
    return concatenate_datasets([Dataset.from_file(str(path)) for path in sorted(folder.glob("*.arrow"))])
