"""The plans of a recipe's tasks, made before any model is loaded: of several ranks the first one reads the data."""

import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from hf_qie.config.recipe import Recipe, Task
from hf_qie.data.samples import Rows, open_rows, read_rows
from hf_qie.errors import InputError
from hf_qie.extraction.preprocess import Plan
from hf_qie.models.base import Family
from hf_qie.runtime.alive import at_any_length
from hf_qie.runtime.cli import Told


def own_tasks(recipe: Recipe) -> dict[str, Task]:
    """The tasks to extract: those without a ready set. Raises InputError if there are none."""
    tasks = {name: task for name, task in recipe.tasks.items() if task.embeddings is None}
    if not tasks:
        raise InputError(f"{recipe.path}: every task has embeddings already; there is nothing to extract")
    return tasks


def make_plan(recipe: Recipe, task: Task, family: Family, folder: Path, *, refuse: bool = False) -> Plan:
    """Read the data of a task; with `refuse`, too many bad rows are an error. Raises InputError."""
    limits = recipe.extract if refuse else None
    return plan_of(
        recipe, task, family, read_rows(task, folder=folder, max_sources=family.max_sources, extract=limits)
    )


def plan_of(recipe: Recipe, task: Task, family: Family, rows: Rows) -> Plan:
    """The plan of a task whose data is read."""
    area_px = family.source_area_px(recipe.extract.source_sample_size)
    task = task.model_copy(update={"columns": rows.columns})
    return Plan(task=task, family=family, extract=recipe.extract, rows=rows, source_area_px=area_px)


def rows_folder(recipe: Recipe, tasks: Iterable[str]) -> Path:
    """Where the first of several ranks, on whatever machine, leaves the rows for the others of this launch."""
    i, n = recipe.extract.shard or (0, 1)
    first = next(iter(tasks))  # no other launch holds its set
    return Path(recipe.extract.output_dir, f"rows-{first}-{i}-of-{n}")  # no task can have this name


def read_plans(recipe: Recipe, tasks: Mapping[str, Task], family: Family, state: PartialState) -> dict[str, Plan]:
    """Every task's plan. The first rank reads the data and looks at its files, the others open the rows it found.

    Raises InputError, in all ranks, for what the first one finds wrong.
    """

    def read(folder: Path) -> dict[str, Plan]:
        return {name: make_plan(recipe, task, family, folder, refuse=True) for name, task in tasks.items()}

    if state.num_processes == 1:
        with tempfile.TemporaryDirectory(prefix="hf_qie-rows-") as folder:
            return read(Path(folder))  # the rows stay mapped without a name: a killed run leaves none behind
    folder, plans, failure = rows_folder(recipe, tasks), {}, None
    with at_any_length("the reading of data by the first rank"):
        if state.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)  # of a launch that was killed
            try:
                folder.mkdir(parents=True)
                plans = read(folder)
            except (InputError, OSError) as error:
                failure = error
        rows = {name: replace(plan.rows, stored=None) for name, plan in plans.items()}
        told = [str(failure) if failure else rows]
        broadcast_object_list(told)
    if failure:
        raise failure
    if isinstance(told[0], str):
        raise Told(told[0])
    return plans or {
        name: plan_of(recipe, tasks[name], family, open_rows(tasks[name], told[0][name])) for name in tasks
    }
