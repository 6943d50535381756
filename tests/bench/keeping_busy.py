"""Point 4: the share of extraction in which a model is at work, when preparing and encoding cost the same.

The real chunk writer over real images and models, tiny ones. A model takes longer than it does here: it sleeps, as a
thread does that waits for a GPU. Preparing a row is made as slow as the models are with one, by as many threads as a
recipe has; it sleeps too, which stands for cores that this machine need not have. The usual way prepares a batch with
the same threads, encodes it, and goes on to the next.
"""

import json
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from threading import Lock

import small_recipes
import torch
from accelerate import PartialState
from figures import Figure, at_least
from synthetic_edits import synthetic_edits

from hf_qie.config.recipe import Recipe, load_recipe
from hf_qie.data.images import to_pixels
from hf_qie.demo.tiny import tiny_checkpoint
from hf_qie.extraction import chunk_writer as chunks
from hf_qie.extraction.chunk_writer import Models
from hf_qie.extraction.plan import family_of_recipe, make_plan
from hf_qie.extraction.preprocess import ImageCache, Prepared, prepare
from hf_qie.extraction.run import load_models, write_chunks
from hf_qie.extraction.set_writer import SetWriter

ROWS, CHUNK_ROWS, BATCH, WORKERS = 512, 256, 4, 4
ENCODE_S = 0.2  # of a batch, at least


class Clock:
    """Seconds that models took, and what preparing a row has to take to cost the same."""

    def __init__(self):
        self.busy_s, self.prepared_s, self.rows, self.rows_prepared, self.lock = 0.0, 0.0, 0, 0, Lock()
        self.first_at: float | None = None  # when a model first had work

    def __call__(self, model: Callable, pause_s: float, batch: list) -> list:
        """A model at work."""
        started = time.perf_counter()
        self.first_at = self.first_at or started
        time.sleep(pause_s)
        made = model(batch)
        self.busy_s += time.perf_counter() - started
        self.rows += len(batch) if pause_s else 0
        return made

    def prepare(self, *args, **settings) -> Prepared:
        """A row made ready; what one row took too long, the next one makes up for."""
        started, made = time.perf_counter(), prepare(*args, **settings)
        with self.lock:
            self.rows_prepared += 1
            of_a_row = self.busy_s / self.rows if self.rows >= 8 * BATCH else ENCODE_S / BATCH
            wanted_s = WORKERS * of_a_row * self.rows_prepared - self.prepared_s
        time.sleep(min(max(0.0, wanted_s - (time.perf_counter() - started)), 2 * WORKERS * of_a_row))
        with self.lock:
            self.prepared_s += time.perf_counter() - started
        return made


class Slowed:
    """A model that takes its time, by the clock; all else is its own."""

    def __init__(self, model: Callable, clock: Clock, pause_s: float):
        self.model, self.run = model, partial(clock, model, pause_s)

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def __call__(self, batch: list) -> list:
        return self.run(batch)


def slowed(models: Models, clock: Clock) -> Models:
    """The encoder takes longer; what the VAE takes counts too."""
    encoder, latents = Slowed(models.encoder, clock, ENCODE_S), Slowed(models.latents, clock, 0.0)
    return Models(processor=models.processor, encoder=encoder, latents=latents)


def one_after_the_other(rows: Iterable[dict], prepare_row: Callable, models: Models) -> None:
    """The usual way."""
    rows = iter(rows)
    with ThreadPoolExecutor(WORKERS) as threads:
        while batch := list(islice(rows, BATCH)):
            ready = list(threads.map(prepare_row, batch))
            models.encoder([direction.prompt for one in ready for direction in one.directions])
            for one in ready:
                for image in one.resized.values():
                    models.latents([to_pixels(image)])


def recipe_of(folder: Path) -> Recipe:
    """Rows with a target alone, so that every row costs the same."""
    synthetic_edits(folder / "edits", rows=100)
    lines = (folder / "edits" / "text_to_image.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    rows = [row | {"target_image": str(folder / "edits" / row["target_image"])} for row in islice(cycle(rows), ROWS)]
    settings = {"batch_size": BATCH, "chunk_rows": CHUNK_ROWS, "num_workers": WORKERS}
    tiny_checkpoint(folder / "model")
    return load_recipe(small_recipes.write_recipe(folder, folder / "model", {"task": rows}, extract=settings))


def measure(folder: Path) -> list[Figure]:
    """Both ways."""
    PartialState(cpu=True)
    recipe = recipe_of(folder)
    family = family_of_recipe(recipe)
    (folder / "rows").mkdir()
    plan = make_plan(recipe, recipe.tasks["task"], family, folder / "rows")
    models = load_models(recipe, family, dtype=torch.float32, device=torch.device("cpu"))
    clock = Clock()
    chunks.prepare = clock.prepare
    writer = SetWriter(plan, {"compat": {}, "data": ""})
    writer.open()
    started = time.perf_counter()
    write_chunks(writer, lambda: slowed(models, clock))
    ours = clock.busy_s / (time.perf_counter() - clock.first_at)
    fill_s = clock.first_at - started
    cost = clock.prepared_s / WORKERS / clock.busy_s
    assert 0.9 < cost < 1.1, f"preparing costs {cost:.2f} of encoding"
    clock, rows = Clock(), plan.rows.table.select(range(ROWS // 4))
    cache = ImageCache(rows, plan)
    ready = partial(clock.prepare, cache=cache, plan=plan, processor=models.processor)
    started = time.perf_counter()
    one_after_the_other(rows, ready, slowed(models, clock))
    usual = clock.busy_s / (time.perf_counter() - started)
    what = f"of extraction, after its first window, a model is at work; preparing costs {cost:.2f} of encoding"
    return [
        at_least(90, point="4", what=what, ours=100 * ours, usual=100 * usual, unit="%"),
        Figure(point="4", what="until the first window is read, once a run", ours=fill_s, unit="s"),
    ]
