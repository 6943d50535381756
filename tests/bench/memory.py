"""Point 7: the most memory that extraction and training take, over 100, 1,000 and 10,000 rows.

Each size in a process of its own, the real scripts on the tiny checkpoint: rows of a small image each, in chunks of
one size, and then a number of training steps over the set that was made. Counted is anonymous memory, looked at twenty
times a second: mapped files are the system's to drop. The usual way here is
ours at 100 rows.
"""

import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path

import small_recipes
from figures import Figure, at_most
from synthetic_edits import synthetic_edits

from hf_qie.demo.tiny import tiny_checkpoint

SIZES = (100, 1_000, 10_000)
STEPS, CHUNK_ROWS = 60, 64
EXTRACT = {"chunk_rows": CHUNK_ROWS, "batch_size": 16, "vae_batch_size": 16, "image_sample_size": 64}


def peak_mb(work: Callable[[], object]) -> float:
    """The most anonymous memory while `work` runs."""
    most, over = [0.0], threading.Event()

    def look() -> None:
        while not over.wait(0.05):
            status = Path("/proc/self/status").read_text()
            most.append(int(status.partition("RssAnon:")[2].split()[0]) / 1024)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        work()
    finally:
        over.set()
        watcher.join()
    return max(most)


def extracting(recipe: Path) -> float:
    """Peak of RUN 1."""
    from hf_qie.extract import main

    quiet()
    return peak_mb(lambda: main([str(recipe)]))


def training(recipe: Path) -> float:
    """Peak of RUN 2."""
    from hf_qie.train import main

    quiet()
    return peak_mb(lambda: main([str(recipe)]))


def quiet() -> None:
    """A child has no word in the table."""
    os.dup2(2, 1)


def recipe_of(folder: Path, model: Path, edits: Path, num_rows: int) -> Path:
    """That many text-to-image rows, over a hundred images."""
    folder.mkdir()
    rows = [json.loads(line) for line in (edits / "text_to_image.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row | {"target_image": str(edits / row["target_image"])} for row in islice(cycle(rows), num_rows)]
    training = {"output_dir": str(folder / "run"), "use_cpu": True, "max_steps": STEPS, "save_strategy": "no"}
    training |= {"report_to": "none", "disable_tqdm": True, "per_device_train_batch_size": 1}
    return small_recipes.write_recipe(folder, model, {"task": rows}, extract=EXTRACT, training=training)


def measure(folder: Path) -> list[Figure]:
    """Both runs, by size."""
    model, edits = folder / "model", folder / "edits"
    tiny_checkpoint(model)
    synthetic_edits(edits, rows=100)
    recipes = [recipe_of(folder / str(num_rows), model, edits, num_rows) for num_rows in SIZES]
    peaks = {}
    with ProcessPoolExecutor(2, get_context("spawn"), max_tasks_per_child=1) as processes:
        for run in (extracting, training):  # the largest begins, and the others go by beside it
            begun = [processes.submit(run, recipe) for recipe in reversed(recipes)]
            peaks[run] = [one.result() for one in reversed(begun)]
    return [
        at_most(1.1, point="7", what=f"{run.__name__} {num_rows:,} rows", ours=mb, usual=found[0], unit="MB")
        for run, found in peaks.items()
        for num_rows, mb in zip(SIZES, found, strict=True)
    ]
