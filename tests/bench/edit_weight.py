"""What `loss.edit_weight` and `ema` do to edits that training never saw: PSNR inside and outside of what changes.

    python tests/bench/edit_weight.py [folder]

The demo's tiny model learns from scratch to repaint the ground or a large shape (`repaint`) and a small shape on a
ground that stays (`touch_up`), half of the draws each, with three seeds for each of `WAYS`. Each run is written to
`edit_weight.json` in the folder, and what stands there is not run again; a run that was interrupted resumes. About
four minutes a run on an idle core.
"""

import json
import random
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch

from hf_qie import extract, train
from hf_qie.config.recipe import Recipe, load_recipe
from hf_qie.demo.shapes import Edit, draw, repaint, synthetic_edits
from hf_qie.demo.tiny import tiny_checkpoint
from hf_qie.hub.sampler import Sampler

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "demo.yaml"
SIZE_PX, STEPS, DRAWS = 96, 1600, 8  # of a step
ROWS, HELD_OUT = 600, 24  # of each task
SMALL = 0.09  # radius of what a touch-up paints, of the side of the image
WAYS = {
    "neither": {},
    "`edit_weight: 0.25`": {"loss.edit_weight": 0.25},
    "`edit_weight: 1`": {"loss.edit_weight": 1},
    "`ema: {decay: 0.99}`": {"ema.decay": 0.99},
}
SEEDS = 0, 1, 2
SAMPLING = {"num_inference_steps": 12, "true_cfg_scale": 1.0}


def touch_up(rng: random.Random, number: int, size_px: int) -> Edit:
    """A small shape gets another colour; all else stays."""
    edit = repaint(rng, 1, size_px)  # odd numbers: the shape, not the ground
    before, after = (
        replace(scene, things=tuple(replace(thing, radius=SMALL) for thing in scene.things))
        for scene in (*edit.sources, edit.target)
    )
    return replace(edit, sources=(before,), target=after)


TASKS = {"repaint": repaint, "touch_up": touch_up}


def settings(folder: Path, way: str = "neither", *, seed: int = 0) -> list[str]:
    """Overrides of the demo's recipe: these two tasks, in images that have room for a small part."""
    given = {
        "tasks": {
            task: {
                "data": str(folder / "data" / f"{task}.jsonl"),
                "columns": {"captions": ["instruction"], "inverse_captions": ["inverse_instruction"]},
            }
            for task in TASKS
        },
        "model": folder / "model",
        "seed": seed,
        "extract.output_dir": folder / "sets",
        "extract.image_sample_size": SIZE_PX,
        "extract.source_sample_size": SIZE_PX,
        "training.output_dir": folder / f"run-{list(WAYS).index(way)}-{seed}",
        "training.max_steps": STEPS,
        "training.per_device_train_batch_size": DRAWS,
        "training.logging_steps": STEPS // 8,
        "training.save_steps": STEPS // 8,
        "training.use_cpu": True,
        "training.disable_tqdm": True,
        **WAYS[way],
    }
    return [f"{key}={value}" for key, value in given.items()]


def held_out() -> Iterator[tuple[str, Edit]]:
    """Task and edit, of images that are in no file."""
    for task, number in product(TASKS, range(HELD_OUT)):
        yield task, TASKS[task](random.Random(f"held out {task} {number}"), number, SIZE_PX)


def psnr_db(squares: np.ndarray) -> float:
    """Peak signal-to-noise ratio of 8-bit values by their squared errors."""
    return float(20 * np.log10(255) - 10 * np.log10(squares.mean().clip(1e-3)))


def scores(recipe: Recipe) -> dict[str, float]:
    """Mean PSNR over the held-out edits, by task and inside or outside of what differs between source and target."""
    sampler, found = Sampler(recipe), defaultdict(list)
    sampler.pipeline.set_progress_bar_config(disable=True)
    for number, (task, edit) in enumerate(held_out()):
        source, target = draw(edit.sources[0]), draw(edit.target)
        made = sampler(edit.captions["instruction"], images=[source], seed=number, **SAMPLING)
        values, wanted, before = (np.asarray(image, dtype=np.float64) for image in (made, target, source))
        squares, changed = (values - wanted) ** 2, (wanted != before).any(axis=2)
        for place, part in {"inside": changed, "outside": ~changed}.items():
            found[f"{task} {place}"].append(psnr_db(squares[part]))
    return {name: mean(values) for name, values in found.items()}


def run(folder: Path, way: str, seed: int) -> dict[str, float]:
    """Train, and score what comes out."""
    recipe = load_recipe(RECIPE, settings(folder, way, seed=seed))
    train.run(recipe)
    found = scores(recipe)
    shutil.rmtree(recipe.training["output_dir"])
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """Mean and standard deviation over seeds, in dB."""
    columns = list(next(iter(found.values())))
    lines = [f"| with | {' | '.join(columns)} |", f"|---{'|---' * len(columns)}|"]
    for way in WAYS:
        of = [scored for name, scored in found.items() if name.startswith(f"{way}, ")]
        if len(of) > 1:
            cells = ([scored[column] for scored in of] for column in columns)
            lines.append(f"| {way} | {' | '.join(f'{mean(one):.2f} ({stdev(one):.2f})' for one in cells)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Make checkpoint and sets where they are missing, train all, and write what was found."""
    folder = Path(argv[0] if argv else "outputs/edit_weight")
    torch.set_num_threads(1)
    if not (folder / "data" / f"{list(TASKS)[-1]}.jsonl").exists():
        tiny_checkpoint(folder / "model", kind="learner")
        synthetic_edits(folder / "data", rows=ROWS, size_px=SIZE_PX, tasks=TASKS)
    extract.main([str(RECIPE), *settings(folder)])  # what is there stays
    file = folder / "edit_weight.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    for seed, way in product(SEEDS, WAYS):
        name = f"{way}, seed {seed}"
        if name not in found:
            found[name] = run(folder, way, seed)
            file.write_text(json.dumps(found, indent=2))
            print(name, found[name], flush=True)
    print(table(found))


if __name__ == "__main__":
    main(sys.argv[1:])
