"""RUN 0: check the rows before a run, forecast its memory, and verify the sets after it.

    python hf_qie/check.py recipe.yaml [key.of.the.recipe=value ...]
    python hf_qie/check.py recipe.yaml [key.of.the.recipe=value ...] --memory [--gpu_memory 24] [--num_gpus 8]
    python hf_qie/check.py recipe.yaml [key.of.the.recipe=value ...] --verify 16
    python hf_qie/check.py --schema

The first opens the header of every image and counts the tokens of every caption, without any model, and reports for
each task what extract.py will find and write. It leaves a contact sheet and a list of odd rows of each task under
<extract.output_dir>/first-look: check there that sources and targets are not swapped. Odd rows are bad ones,
duplicates, rows without a caption, pairs whose aspect differs by more than 1 % (of several sources the last one
counts), and images of less than half the side of extract.image_sample_size. The images of up to 256 rows of a task,
spread evenly, are decoded and compared: odd are targets with the pixels of their source and, where most rows show the
same in source and target, those that are shifted, scaled or stretched by more than 2 px of the size in training, the
worst first. Tasks whose sources show something else, as of a subject, are told by that and have none. Beside them
noise-levels.png shows how often train.py will draw which noise level, with which weight, and where the pipeline
samples.
The second forecasts what training takes of each GPU, for the largest micro-batch of the sets, or of rows that have
none yet, and what extracting these takes. --gpu_memory says whether training fits a card that is sold with so many
GB, and else lists the fewest changes by which it does.
The third reads every byte of the finished sets, encodes that many rows of each again, through the official pipeline,
and compares. The fourth prints the JSON schema of a recipe, for editors; recipes/recipe.schema.json is a copy.
Exit codes: 0, 1 (the rows cannot be used, disk or card is too small, or a set differs by more than rounding).
"""

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_qie.config.recipe import Recipe, load_recipe, recipe_schema
from hf_qie.errors import InputError
from hf_qie.runtime.cli import Options, checked, run_script
from hf_qie.runtime.rules import Count, Positive

if TYPE_CHECKING:
    from hf_qie.extraction.plan import Plan
    from hf_qie.models.base import Family


def main(argv: list[str]) -> None:
    """Check the rows of every task that has data, or verify the finished sets."""
    if argv == ["--schema"]:
        return show(json.dumps(recipe_schema(), indent=1))
    parser = Options()
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--verify", type=checked(Count))
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--gpu_memory", "--gpu-memory", type=checked(Positive))
    parser.add_argument("--num_gpus", "--num-gpus", type=checked(Count), default=1)
    arguments = parser.parse_intermixed_args(argv)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.verify and (arguments.memory or arguments.gpu_memory):
        raise InputError("--verify: cannot be combined with --memory; run them one after the other")
    from hf_qie.data.mixture import check_shared_prefix

    check_shared_prefix(recipe)
    if arguments.memory or arguments.gpu_memory:
        return check_memory(recipe, arguments)
    from hf_qie.extraction.plan import family_of_recipe, make_plan, own_tasks

    family = family_of_recipe(recipe)
    with tempfile.TemporaryDirectory(prefix="hf_qie-rows-") as folder:
        plans = {name: make_plan(recipe, task, family, Path(folder)) for name, task in own_tasks(recipe).items()}
    if arguments.verify is None:
        problems = check_rows(recipe, family, plans)
    else:
        from hf_qie.extraction.verify import verify_sets

        problems = []
        for table, off in verify_sets(plans, num_rows=arguments.verify):
            show(table)
            problems += off
    if problems:
        raise InputError("\n".join(problems))


def check_rows(recipe: Recipe, family: "Family", plans: Mapping[str, "Plan"]) -> list[str]:
    """Report what the rows of every task are and become; returns why extraction would stop."""
    from hf_qie.extraction.first_look import first_look, folder_of
    from hf_qie.plots import noise_chart
    from hf_qie.training.objective import noise_levels

    problems = first_look(recipe, family, plans, show)
    chart = folder_of(recipe) / "noise-levels.png"  # no task can have this name
    noise_chart(**noise_levels(recipe)).savefig(chart)
    show(f"{chart}: the noise levels of training, and the steps of sampling")
    return problems


def check_memory(recipe: Recipe, options: Any) -> None:
    """Report what extraction and training take of a GPU; raises InputError where training takes more than it has."""
    from hf_qie.data.largest import ready_sets
    from hf_qie.extraction.memory import forecast_gpu
    from hf_qie.extraction.plan import own_tasks
    from hf_qie.extraction.stats import largest_shape
    from hf_qie.training.fit import forecast_recipe, report, verdict

    if {name for name in own_tasks(recipe) if recipe.tasks[name].weight} - ready_sets(recipe).keys():
        show(str(forecast_gpu(recipe)))
    run, found = forecast_recipe(recipe, largest_shape(recipe), num_ranks=options.num_gpus)
    show(report(run, found))
    if options.gpu_memory:
        show(verdict(run, found, options.gpu_memory, overrides=options.overrides))


def show(text: str) -> None:
    """Write to standard output: the report is what this program makes."""
    sys.stdout.write(f"{text}\n")


if __name__ == "__main__":
    run_script(main)
