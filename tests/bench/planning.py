"""Point 6: which row is drawn when, for 1 and 10 million draws over as many rows of four tasks and a hundred shapes.

The usual way is torch's WeightedRandomSampler over all rows, and a sampler that fills a list for each shape and gives
a batch when one is full.
"""

import resource
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from figures import Figure, at_most
from torch.utils.data import WeightedRandomSampler

from hf_qie.config.recipe import Mix
from hf_qie.data.mixture import group_shares, mixture_plan, read_groups

WEIGHTS, SHAPES, SAME_SHAPE = {"0": 1.0, "1": 2.0, "2": 3.0, "3": 0.5}, 100, 4
MILLION = 1_000_000


def shapes_of(task: int, num_rows: int) -> np.ndarray:
    """The shape of each row of a task, by number."""
    return np.random.default_rng(task).integers(0, SHAPES, num_rows)


def light_set(task: int, num_rows: int) -> Dataset:
    """The columns of a set that the mix reads."""
    grids = np.stack(np.divmod(shapes_of(task, num_rows), 10), axis=1).astype(np.int32) + 20
    grid = pa.FixedSizeListArray.from_arrays(pa.array(grids.ravel()), 2)
    columns = {
        "row": pa.array(np.arange(num_rows)),
        "num_sources": pa.array(np.ones(num_rows, np.int8)),
        "target_grid": grid,
        "source_grids": pa.ListArray.from_arrays(pa.array(np.arange(num_rows + 1, dtype=np.int32)), grid),
    }
    return Dataset(pa.table(columns))


def ours(num_rows: int) -> float:
    """The plan of a run; returns seconds."""
    sets = {task: light_set(int(task), num_rows // 4) for task in WEIGHTS}
    started = time.perf_counter()
    groups = read_groups(sets, WEIGHTS, Mix())
    shares = group_shares(groups, Mix())
    run = mixture_plan(groups, shares, seed=0, same_shape=SAME_SHAPE, num_batches=num_rows // SAME_SHAPE)
    assert len(run) * SAME_SHAPE == num_rows
    return time.perf_counter() - started


def usual(num_rows: int) -> float:
    """The batches of an epoch; returns seconds."""
    shapes = np.concatenate([shapes_of(int(task), num_rows // 4) for task in WEIGHTS]).tolist()
    weights = torch.tensor(list(WEIGHTS.values()), dtype=torch.double).repeat_interleave(num_rows // 4)
    started = time.perf_counter()
    waiting, batches = defaultdict(list), []
    for row in WeightedRandomSampler(weights, num_rows):
        waiting[shapes[row]].append(row)
        if len(waiting[shapes[row]]) == SAME_SHAPE:
            batches.append(waiting.pop(shapes[row]))
    assert len(batches) * SAME_SHAPE > num_rows - SAME_SHAPE * SHAPES
    return time.perf_counter() - started


def measured(way: str, num_rows: int) -> tuple[float, float]:
    """Seconds, and the peak in GB of a process that does nothing else, above what it had at first."""
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = {"ours": ours, "usual": usual}[way](num_rows)
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6


def measure(folder: Path) -> list[Figure]:
    """Each in a process of its own."""
    results = {}
    for way in ("ours", "usual"):
        for millions in (1, 10):
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                results[way, millions] = process.submit(measured, way, millions * MILLION).result()
    figures = []
    for millions in (1, 10):
        for what, unit, place in (("seconds", "s", 0), ("memory, rows included", "GB", 1)):
            mine, theirs = (results[way, millions][place] for way in ("ours", "usual"))
            name = f"mix and buckets of {millions} million draws: {what}"
            figures.append(Figure(point="6", what=name, ours=mine, usual=theirs, unit=unit))
    growth = {way: results[way, 10][0] / results[way, 1][0] for way in ("ours", "usual")}
    what = "growth of the seconds from 1 to 10 million"
    figures.append(
        at_most(12, ratio=False, point="6", what=what, ours=growth["ours"], usual=growth["usual"], unit="x")
    )
    return figures
