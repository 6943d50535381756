"""RUN 0: look before you run, and verify what was made.

    python hf_qie/check.py recipe.yaml [key.of.the.recipe=value ...]
    python hf_qie/check.py recipe.yaml [key.of.the.recipe=value ...] --verify 16

The first opens the header of every picture and counts the tokens of every caption, without any model, and tells of
each task what extract.py will find and write. It leaves a contact sheet and a list of odd rows of each task under
<extract.output_dir>/first-look: see there that sources and targets are not swapped. Odd rows are bad ones, copies,
rows without a caption, pairs whose aspect differs by more than 1 % (of several sources the last one counts), and
images of less than half the side of extract.image_sample_size. Beside them noise-levels.png shows how often train.py
will draw which noise level, with which weight, and where the pipeline samples.
The second encodes that many rows of each finished set again, through the official pipeline, and compares.
Exit codes: 0, 1 (the rows cannot be used, the disk is too small, or a set differs by more than rounding).
"""

import functools
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hf_qie.config.installed import training_arguments
from hf_qie.config.recipe import Count, Recipe, load_recipe
from hf_qie.errors import InputError
from hf_qie.runtime.cli import Options, run_script, wanted

if TYPE_CHECKING:
    from hf_qie.extraction.preprocess import Plan
    from hf_qie.extraction.stats import Survey
    from hf_qie.models.base import Family

FIRST_LOOK = "first-look"  # no task can have this name


def main(argv: list[str]) -> None:
    """Look at the rows of every task that has data, or verify the finished sets."""
    parser = Options()
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--verify", type=wanted(Count))
    arguments = parser.parse_intermixed_args(argv)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from hf_qie.extraction.plan import make_plan, own_tasks
    from hf_qie.models.base import read_family
    from hf_qie.models.checkpoint import check_steps

    check_steps(recipe.sampling.num_inference_steps, recipe, "sampling.num_inference_steps")
    family = read_family(recipe.model, revision=recipe.revision)
    with tempfile.TemporaryDirectory(prefix="hf_qie-rows-") as folder:
        plans = {name: make_plan(recipe, task, family, Path(folder)) for name, task in own_tasks(recipe).items()}
    if arguments.verify is None:
        look(recipe, family, plans)
    else:
        verify(recipe, family, plans, num_rows=arguments.verify)


def look(recipe: Recipe, family: "Family", plans: Mapping[str, "Plan"]) -> None:
    """Tell what the rows of every task are and become; raises InputError where extraction would stop."""
    from tqdm import tqdm

    from hf_qie.extraction.contact_sheet import contact_sheet
    from hf_qie.extraction.estimate import check_space, encoder_width
    from hf_qie.extraction.reuse import keeps_some
    from hf_qie.extraction.stats import findings_of, survey, table_of
    from hf_qie.models.checkpoint import read_config
    from hf_qie.models.qwen_image.text_encoder import load_processor
    from hf_qie.plots import noise_chart
    from hf_qie.training.noise import noise_levels

    processor = load_processor(recipe.model, family=family, revision=recipe.revision)
    width = encoder_width(recipe.model, revision=recipe.revision)
    output_dir = Path(recipe.extract.output_dir)
    folder = output_dir / FIRST_LOOK
    folder.mkdir(parents=True, exist_ok=True)
    num_bytes, problems = {}, []
    for name, plan in plans.items():
        with tqdm(desc=name, unit="row", total=len(plan.rows.table), disable=None) as bar:
            found = survey(plan, processor, width=width, progress=bar.update)
        sheet = folder / f"{name}.png"
        contact_sheet(plan, seed=recipe.seed).save(sheet)
        say(table_of(found, recipe.mix, cell_rows=cell_rows(recipe)))
        say(findings_of(found, folder / f"{name}.jsonl"))
        say(f"  {sheet}: see that sources and targets are not swapped\n")
        num_bytes[name] = found.num_bytes
        problems += unusable(found)
    scheduler = read_config(recipe.model, "scheduler/scheduler_config.json", revision=recipe.revision)
    chart = folder / "noise-levels.png"  # no task can have this name either
    noise_chart(**noise_levels(recipe, scheduler)).savefig(chart)
    say(f"{chart}: the noise that training draws, and the steps that sampling takes")
    try:
        remade = [name for name, plan in plans.items() if keeps_some(output_dir / name, plan.rows)]
        say(check_space(num_bytes, output_dir, remade=remade))
    except InputError as error:
        problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))


def say(text: str) -> None:
    """Write to standard output: what is told is what this program makes."""
    if text:
        sys.stdout.write(f"{text}\n")


def cell_rows(recipe: Recipe) -> int:
    """Rows of a cell of the mix, by the recipe alone."""
    of_a_device = training_arguments()["per_device_train_batch_size"][1]
    return recipe.mix.same_shape or recipe.training.get("per_device_train_batch_size", of_a_device)


def unusable(found: "Survey") -> list[str]:
    """Why extraction would not end well on the rows of a task; nothing if it would."""
    from hf_qie.data.samples import most_bad

    extract, name, bad = found.plan.extract, found.plan.task.name, len(found.found("bad row"))
    most = most_bad(extract, found.num_rows)
    if bad == found.num_rows:
        return [f"tasks.{name}: every row is bad"]
    if bad > most:
        rule = "on_bad_row: fail allows none" if most == 0 else f"max_bad_share allows {most:,.0f}"
        return [f"tasks.{name}: {bad:,} of {found.num_rows:,} rows are bad, extract.{rule}; mend them, or allow more"]
    return []


def verify(recipe: Recipe, family: "Family", plans: Mapping[str, "Plan"], *, num_rows: int) -> None:
    """Encode random rows of every finished set again; raises InputError where one differs by more than rounding."""
    import torch

    from hf_qie.data.provenance import PROVENANCE, check_compat, checkpoint_compat, read_provenance, unverified
    from hf_qie.extraction.verify import Official, beyond, bound, table_of, verify_set
    from hf_qie.runtime.device import computes_bfloat16, own_device

    sets = {name: Path(recipe.extract.output_dir, name) for name in plans}
    finished = [name for name, folder in sets.items() if (folder / PROVENANCE).is_file()]
    if not finished:
        raise InputError(f"{recipe.extract.output_dir}: no finished embedding set; run hf_qie/extract.py first")
    device = own_device()
    load = functools.cache(
        lambda dtype: Official(recipe.model, family, revision=recipe.revision, dtype=dtype, device=device)
    )
    checkpoint, problems = checkpoint_compat(recipe.model, revision=recipe.revision, family=family), []
    for name in finished:
        provenance = read_provenance(sets[name])
        latents = provenance["record"]["request"]["latents"]  # hf_qie/convert.py stores none, whatever the recipe says
        plan = replace(plans[name], extract=replace(plans[name].extract, latents=latents))
        sizes = {"vae_area_px": plan.source_area_px, "drop_caption": plan.extract.drop_caption}
        check_compat({name: provenance}, checkpoint | sizes, model=recipe.model)
        say("\n".join(unverified({name: provenance})))
        made_in = provenance["record"]["dtype"]
        limit, dtype = bound(getattr(torch, made_in)), getattr(torch, made_in)
        if dtype == torch.bfloat16 and not computes_bfloat16(device):
            dtype = torch.float32  # nearer to the truth than bfloat16, so the limit of the set's own dtype holds
        checked, differences = verify_set(plan, sets[name], load(dtype), num_rows=num_rows, seed=recipe.seed)
        say(f"{name}: {checked:,} rows, made in {made_in}, against {family.pipeline} in {str(dtype)[6:]}")
        say(table_of(differences, limit=limit) + "\n")
        if columns := beyond(differences, limit=limit):
            problems.append(f"{sets[name]}: differs by more than rounding in {', '.join(columns)}; extract it again")
    if problems:
        raise InputError("\n".join(problems))


if __name__ == "__main__":
    run_script(main)
