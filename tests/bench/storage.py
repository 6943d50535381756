"""Point 2: bytes of a row, beside a file for each prompt and one of latents, as common trainers write them."""

from pathlib import Path

import torch
from figures import Figure, at_most
from wide_rows import CAPTIONS, LATENTS, open_chunks, prompts, wide_rows, write_chunk

from hf_qie.hub.publish import write_shard

ROWS = 32
MAX_TOKENS = 512  # to which trainers pad that keep all prompts one length


def save_prompts(row: dict, folder: Path, *, pad_to: int | None = None, captions: tuple[str, ...]) -> int:
    """Write a file for each prompt; returns the bytes."""
    num_bytes = 0
    for caption, states in prompts(row).items():
        if caption in captions:
            mask = torch.ones(len(states), dtype=torch.bool)
            if pad_to:
                padding = (0, 0, 0, pad_to - len(states))
                states, mask = torch.nn.functional.pad(states, padding), torch.nn.functional.pad(mask, padding[2:])
            path = folder / f"{row['row']}_{caption}.pt"
            torch.save({"prompt_embeds": states[None], "prompt_embeds_mask": mask[None]}, path)
            num_bytes += path.stat().st_size
    return num_bytes


def save_latents(row: dict, folder: Path) -> int:
    """Write a file of latents; returns the bytes."""
    path = folder / f"{row['row']}_latents.pt"
    torch.save({name: torch.from_numpy(row[name]).bfloat16() for name in LATENTS}, path)
    return path.stat().st_size


def measure(folder: Path) -> list[Figure]:
    """Arrow and Parquet, whole rows and states alone; with and without padding, and without the drop caption."""
    rows, everything = list(wide_rows(ROWS)), (*CAPTIONS, "drop")
    write_chunk(rows, folder / "0.arrow")
    data = open_chunks(folder)
    write_shard(data, range(ROWS), folder / "0.parquet", roots=[])
    assert data.with_format("numpy")[ROWS - 1]["text_embeds_drop"].shape == rows[-1]["text_embeds_drop"].shape
    arrow, parquet = ((folder / name).stat().st_size / ROWS for name in ("0.arrow", "0.parquet"))
    latents = sum(save_latents(row, folder) for row in rows) / ROWS
    unpadded = sum(save_prompts(row, folder, captions=everything) for row in rows) / ROWS
    padded = sum(save_prompts(row, folder, captions=everything, pad_to=MAX_TOKENS) for row in rows) / ROWS
    no_drop = sum(save_prompts(row, folder, captions=CAPTIONS) for row in rows) / ROWS
    cases = [
        ("Arrow, against files of unpadded states", arrow, unpadded, 0.45),
        (f"Arrow, against files padded to {MAX_TOKENS} tokens", arrow, padded, 0.45),
        ("Arrow, against files without the drop caption, which ours has", arrow, no_drop, 0.45),
        ("Parquet on the Hub, against files of unpadded states", parquet, unpadded, 0.33),
    ]
    return [
        at_most(limit, point="2", what=what, ours=mine / 1e6, usual=(theirs + latents) / 1e6, unit="MB a row")
        for what, mine, theirs, limit in cases
    ]
