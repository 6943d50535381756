"""Points 3 and 5: a row at random from a set of more than 2 GB, and what the loader gives.

Ours is what training does: a draw of the plan, collated. The usual way is `torch.load` of a file with the states of
one prompt and one with the latents, written for the rows that are read. Cold: the kernel was told to forget the files,
and what was then read from the disk is counted to see that it did.
"""

import gc
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import torch
from datasets import Dataset
from figures import Figure, at_most
from storage import save_latents, save_prompts
from torch.utils.data import DataLoader
from wide_rows import open_chunks, wide_rows, write_chunk

from hf_qie.config.recipe import Mix
from hf_qie.data.collate import collate
from hf_qie.data.loader import Draws, RankBatches, open_loader
from hf_qie.data.mixture import group_shares, mixture_plan, read_groups

CHUNKS, CHUNK_ROWS = 10, 64  # 2.1 GB
SAMPLE = 64  # rows read
BATCH, STEPS, STEP_S = 4, 28, 0.2
MIX = Mix(caption_dropout=0.0, caption_weights={"instruction": 1, "instruction_cn": 0, "instruction_short": 0})


def write_set(folder: Path) -> None:
    """As extraction leaves it, in chunks."""
    rows = wide_rows(CHUNKS * CHUNK_ROWS)
    for chunk in range(CHUNKS):
        write_chunk([next(rows) for _ in range(CHUNK_ROWS)], folder / f"{chunk:02d}.arrow")


def write_files(folder: Path, wanted: set[int]) -> None:
    """Files of the same rows, as others keep them; only of those that will be read."""
    for row in wide_rows(CHUNKS * CHUNK_ROWS):
        if row["row"] in wanted:
            save_prompts(row, folder, captions=("instruction",))
            save_latents(row, folder)


def forget(folder: Path) -> None:
    """Have the files read from the disk again."""
    gc.collect()  # what is mapped is kept
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())  # so is what is not on the disk yet
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def draws_of(data: Dataset, num_draws: int) -> Draws:
    """The plan over all rows."""
    groups = read_groups({"a": data}, {"a": 1.0}, MIX)
    plan = mixture_plan(groups, group_shares(groups, MIX), seed=0, same_shape=BATCH, num_batches=num_draws // BATCH)
    return Draws({"a": data}, plan, seed=0, mix=MIX)


def load_files(folder: Path, row: int) -> dict[str, torch.Tensor]:
    """The usual way."""
    prompt = torch.load(folder / f"{row}_instruction.pt", weights_only=True)
    latents = torch.load(folder / f"{row}_latents.pt", weights_only=True)
    return prompt | {name: value[None] for name, value in latents.items()}


def disk_bytes() -> int:
    """What this process has had read from the disk; 0 where the kernel does not say."""
    try:
        counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    except OSError:
        return 0
    return int(counts["read_bytes"])


def milliseconds(read: Callable[[int], object], places: list[int]) -> list[float]:
    """Of each."""
    taken = []
    for place in places:
        started = time.perf_counter()
        read(place)
        taken.append(1e3 * (time.perf_counter() - started))
    return taken


def random_rows(folder: Path) -> Iterator[Figure]:
    """One row at random, cold and warm."""
    draws = draws_of(open_chunks(folder), SAMPLE)
    numbers = [int(draws.plan.data[number // BATCH]["rows"][number % BATCH]) for number in range(SAMPLE)]
    write_files(folder, set(numbers))
    assert torch.equal(
        collate([draws[0]])["prompt_embeds"].bfloat16(), load_files(folder, numbers[0])["prompt_embeds"]
    )
    del draws
    forget(folder)
    before = disk_bytes()
    draws = draws_of(open_chunks(folder), SAMPLE)
    cold = milliseconds(lambda draw: collate([draws[draw]]), list(range(SAMPLE)))
    read = disk_bytes() - before
    forget(folder)
    cold_files = milliseconds(lambda row: load_files(folder, row), numbers)
    was_cold = f", {read / SAMPLE / 1e6:.1f} MB from the disk" if read else ""
    yield Figure(
        point="3",
        what=f"a row at random from {CHUNKS * CHUNK_ROWS * 3.34e-3:.1f} GB, to a batch, cold{was_cold}",
        ours=median(cold),
        usual=median(cold_files),
        unit="ms",
    )

    def copied(row: int) -> list[np.ndarray]:
        views = draws.tasks["a"].read(row, inverse=False, caption=0.5)
        return [np.array(part) for part in (*views["prompt_parts"], views["target_latents"], views["source_latents"])]

    warm, views, copies, files = [], [], [], []
    for _ in range(5):
        warm += milliseconds(lambda draw: collate([draws[draw]]), list(range(SAMPLE)))
        views += milliseconds(lambda row: draws.tasks["a"].read(row, inverse=False, caption=0.5), numbers)
        copies += milliseconds(copied, numbers)
        files += milliseconds(lambda row: load_files(folder, row), numbers)
    for what, ours in (("read, warm: views of the file", views), ("drawn and copied to a batch, warm", warm)):
        yield at_most(0.2, point="3", what=f"the same, {what}", ours=median(ours), usual=median(files), unit="ms")
    what = "the same, read and its bytes copied, and nothing else, warm"
    yield Figure(point="3", what=what, ours=median(copies), usual=median(files), unit="ms")


def loaders(folder: Path) -> Iterator[Figure]:
    """Rows a second and the share of a step spent waiting, with 0, 1 and 2 workers."""
    data = open_chunks(folder)
    for workers in (0, 1, 2):
        batches, started = iter(loader_of(data, 150, workers, batch_size=4)), 0.0
        next(batches)  # workers take a second to start, once a run
        started = time.perf_counter()
        rows = sum(len(batch["row"]) for batch in batches)
        rate = rows / (time.perf_counter() - started)
        yield Figure(point="5", what=f"loader, {workers} worker(s)", ours=rate, unit="rows/s")
    for workers, batch_size in ((0, 1), (1, 1), (2, 1), (0, 4)):
        share = waiting(iter(loader_of(data, STEPS, workers, batch_size=batch_size)))
        what = f"of steps of {STEP_S} s and {batch_size} row(s) waiting for data, {workers} worker(s)"
        yield at_most(2, ratio=False, point="5", what=what, ours=100 * share, unit="%")


def loader_of(data: Dataset, num_steps: int, workers: int, *, batch_size: int) -> DataLoader:
    """The trainer's, over a plan of that many steps."""
    batches = RankBatches(num_draws=num_steps * batch_size, batch_size=batch_size, rank=0, world_size=1)
    return open_loader(
        draws_of(data, max(BATCH, num_steps * batch_size)), batches, collate=collate, num_workers=workers
    )


def waiting(batches: Iterator[dict]) -> float:
    """The share of the time of steps; a step sleeps, as a device computes while the CPU is free."""
    for _ in range(4):  # until all workers are at work
        next(batches)
        time.sleep(STEP_S)
    started, waited = time.perf_counter(), 0.0
    for _ in range(STEPS - 4):
        before = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - before
        time.sleep(STEP_S)
    return waited / (time.perf_counter() - started)


def measure(folder: Path) -> list[Figure]:
    """All of it on one set."""
    write_set(folder)
    return [*random_rows(folder), *loaders(folder)]
