"""Held-out rows: which they are, their noise levels and batches, and the metrics of evaluation."""

import random
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import EvalPrediction

from hf_qie.config.recipe import Recipe, Task
from hf_qie.data.loader import TaskRows
from hf_qie.data.seeding import draw_rng
from hf_qie.errors import InputError
from hf_qie.measures.edits import JUDGED, KNOWN, SCORES
from hf_qie.models.base import read_family
from hf_qie.training.metrics import NotFinite, named
from hf_qie.training.objective import eval_fractions

QUARTERS = ("0.00-0.25", "0.25-0.50", "0.50-0.75", "0.75-1.00")  # of the noise level


def split_sets(
    sets: Mapping[str, datasets.Dataset], tasks: Mapping[str, Task]
) -> tuple[dict[str, datasets.Dataset], dict[str, datasets.Dataset]]:
    """The rows to train on, of weighted tasks, and the held-out ones, the last `eval_rows` of a set.

    Raises InputError where a set has fewer.
    """
    trained, held_out = {}, {}
    for task, data in sorted(sets.items()):
        count, total = tasks[task].eval_rows, len(data)
        if count > total:
            raise InputError(f"tasks.{task}.eval_rows: {count}, but its set has {total} rows; hold out fewer")
        if tasks[task].weight > 0:
            trained[task] = data.select(range(total - count))
        if count:
            held_out[task] = data.select(range(total - count, total))
    return trained, held_out


def score_of_metric(recipe: Recipe) -> str | None:
    """`training.metric_for_best_model`, as `<score>` or `<score>/<task>`; None where it is a loss."""
    metric = recipe.training.get("metric_for_best_model", "loss").removeprefix("eval_")
    return metric if metric.partition("/")[0] in KNOWN else None


def higher_is_better(recipe: Recipe) -> bool:
    """Whether it is for `training.metric_for_best_model`."""
    metric = score_of_metric(recipe)
    return metric is not None and KNOWN[metric.partition("/")[0]].higher_is_better


def check_metric(recipe: Recipe, tasks: Collection[str]) -> None:
    """Raise InputError where evaluation on held-out rows of `tasks` has no `training.metric_for_best_model`."""
    at, training = "training.metric_for_best_model", recipe.training
    metric, better = training.get("metric_for_best_model", "loss"), higher_is_better(recipe)
    name, _, task = metric.removeprefix("eval_").partition("/")
    if name in JUDGED:
        raise InputError(
            f"{at}: {metric!r} needs a judge, which score.py alone loads; give it to that, as an override"
        )
    if name not in ("loss", *SCORES) or (task and task not in tasks):
        known = ["loss", *(f"loss/{task}" for task in tasks)]
        raise InputError(f"{at}: {metric!r}; there are {', '.join(known)}, and likewise {', '.join(SCORES)}")
    if name in SCORES and (every := recipe.evaluation.every) != training.get("eval_steps"):
        raise InputError(
            f"{at}: {metric!r} is a score of edits, which every evaluation needs, and evaluation.every is {every}; "
            "set it to training.eval_steps"
        )
    if training.get("greater_is_better", better) != better:
        than = "higher" if better else "lower"
        raise InputError(f"training.greater_is_better: a {than} {metric} is better; leave it out")


class HeldOut(Dataset):
    """Number -> held-out row, tasks in order; a caption and a noise level belong to each row for the whole run.

    Raises InputError as `TaskRows` does.
    """

    def __init__(self, sets: Mapping[str, datasets.Dataset], recipe: Recipe):
        family = read_family(recipe.model, revision=recipe.revision)
        self.tasks = {task: TaskRows(task, data, mix=recipe.mix, family=family) for task, data in sets.items()}
        self.places = [(task, index) for task, data in sets.items() for index in range(len(data))]
        self.rows = [row for data in sets.values() for row in data["row"]]
        grids = [data.select_columns(["target_grid", "source_grids"])[:] for data in sets.values()]
        self.grids = [repr(one) for part in grids for one in zip(*part.values(), strict=True)]
        self.fractions = torch.cat(
            [eval_fractions(list(data["row"]), loss=recipe.loss, seed=recipe.seed) for data in sets.values()]
        )
        self.seed = recipe.seed

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """A row as `TaskRows.read` gives it, never an inverse, never with the drop caption if it has another."""
        task, index = self.places[number]
        caption = draw_rng(self.seed, "eval caption", self.rows[number]).random()
        return self.tasks[task].read(index, inverse=False, caption=caption) | {"draws": [number]}

    def batches(self, batch_size: int, *, rank: int, world_size: int) -> list[list[int]]:
        """The rank's batches, each of one shape.

        Batches do not depend on the number of ranks, and so losses do not, bit for bit. Every rank has the same number
        of batches; the last ones may repeat the first.
        """
        by_shape = defaultdict(list)
        for number, grids in enumerate(self.grids):
            by_shape[grids].append(number)
        batches = [
            numbers[start : start + batch_size]
            for numbers in by_shape.values()
            for start in range(0, len(numbers), batch_size)
        ]
        turns = -(-len(batches) // world_size)
        return [batches[(turn * world_size + rank) % len(batches)] for turn in range(turns)]

    def metrics(self, gathered: EvalPrediction) -> dict[str, float]:
        """Mean loss over all rows, by task and by quarter of the noise level, each row once, in float64.

        `predictions` [rows, 2] are loss and sigma, `label_ids` [rows] the rows' numbers; both of all ranks.
        """
        numbers, first = np.unique(gathered.label_ids, return_index=True)
        assert len(numbers) == len(self), "every held-out row is evaluated"
        losses, sigma = gathered.predictions[first].astype(np.float64).T
        tasks = np.array([task for task, _ in self.places])
        if bad := [(tasks[n], self.rows[n], losses[n]) for n in np.flatnonzero(~np.isfinite(losses))]:
            raise NotFinite(f"evaluation: the loss of {named(bad)} is not finite. Nothing is saved of this state")
        quarter = np.minimum(sigma * len(QUARTERS), len(QUARTERS) - 1).astype(int)
        parts = {"loss": np.ones(len(self), bool)}
        parts |= {f"loss/{task}": tasks == task for task in self.tasks}
        parts |= {f"loss/sigma {name}": quarter == place for place, name in enumerate(QUARTERS)}
        return {name: float(losses[part].mean()) for name, part in parts.items() if part.any()}


def spread(held_out: HeldOut, count: int) -> list[int]:
    """The numbers of `count` held-out rows, of each task in turn; all of them where there are fewer."""
    return sorted(range(len(held_out)), key=lambda number: held_out.places[number][1])[:count]


@contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """Restore python's, numpy's and torch's generators afterwards."""
    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    random.setstate(python)
    np.random.set_state(legacy)
