"""What the rows of a recipe are and become, reported before extraction: figures, contact sheets, odd rows."""

from collections.abc import Callable, Mapping
from pathlib import Path

from hf_qie.config.recipe import Recipe
from hf_qie.config.training_args import training_arguments
from hf_qie.errors import InputError
from hf_qie.extraction.contact_sheet import contact_sheet
from hf_qie.extraction.estimate import check_space
from hf_qie.extraction.pairs import compare_pairs
from hf_qie.extraction.plan import Plan, open_processor
from hf_qie.extraction.stats import report, survey
from hf_qie.models.base import Family


def folder_of(recipe: Recipe) -> Path:
    """Where the first look at the rows lies; no task can have this name."""
    return Path(recipe.extract.output_dir, "first-look")


def first_look(recipe: Recipe, family: Family, plans: Mapping[str, Plan], show: Callable[[str], None]) -> list[str]:
    """`show` the report of every task and leave its sheet and findings; returns why extraction would stop."""
    processor = open_processor(recipe, family)
    per_device = training_arguments()["per_device_train_batch_size"][1]
    draws = recipe.training.get("per_device_train_batch_size", per_device)
    batch_rows = recipe.mix.same_shape or draws // recipe.mix.draws_per_row
    folder = folder_of(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    num_bytes, problems = {}, []
    for name, plan in plans.items():
        found = survey(plan, processor)
        pairs = compare_pairs(found)
        found.findings += pairs.findings
        sheet = folder / f"{name}.png"
        contact_sheet(plan, seed=recipe.seed).save(sheet)
        show(report(found, recipe.mix, batch_rows=batch_rows, pairs=str(pairs), findings=folder / f"{name}.jsonl"))
        show(f"  {sheet}: check that sources and targets are not swapped\n")
        num_bytes[name] = found.num_bytes
        problems += found.problems()
    try:
        show(check_space(num_bytes, plans))
    except InputError as error:
        problems.append(str(error))
    return problems
