"""What several noises for one prefix do to learning: held-out loss by operations spent, K = 1 against K = 4.

    python tests/bench/prefix_learning.py [folder]

A tiny Qwen-Image-2.1 learns the demo's edits from scratch, three seeds a way: 16 draws a step of 16 rows (K = 1), of
four rows (K = 4), which costs half, and 8 draws of 8 rows, which costs as much as that. Each takes as many steps as
bring it to the same operations. An hour on one core; figures go to `learning.json` in the folder, a table to the
output.
"""

import json
import sys
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import torch

from hf_qie import extract, train
from hf_qie.config.recipe import load_recipe
from hf_qie.data.collate import collate
from hf_qie.demo.shapes import synthetic_edits
from hf_qie.demo.tiny import tiny_checkpoint
from hf_qie.training.cost import BatchFlops
from hf_qie.training.model import build_model
from hf_qie.training.sets import open_sets
from hf_qie.training.setup import build_trainer

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "demo.yaml"
WAYS = {"K = 1": (1, 16), "K = 4": (4, 16), "K = 1, half the rows": (1, 8)}  # noises of a row, draws a step
SEEDS, STEPS, EVALUATIONS = (0, 1, 2), 1600, 8


def settings(folder: Path, *overrides: str) -> list[str]:
    """The demo's recipe with the other family, rows that are held out, and evaluation."""
    tasks = [f"tasks.{name}.{key}" for name in ("repaint", "negative") for key in ("data", "eval_rows")]
    values = [folder / "data" / "repaint.jsonl", 64, folder / "data" / "negative.jsonl", 64]
    given = {
        "model": folder / "model",
        **dict(zip(tasks, values, strict=True)),
        "extract.output_dir": folder / "sets",
        "training.output_dir": folder / "run",
        "training.save_strategy": "no",
        "training.use_cpu": True,
        "training.eval_strategy": "steps",
        "training.per_device_eval_batch_size": 64,
    }
    return [*(f"{key}={value}" for key, value in given.items()), *overrides]


def way_of(name: str) -> list[str]:
    """The overrides of one of `WAYS`."""
    times, draws = WAYS[name]
    return [f"mix.draws_per_row={times}", f"training.per_device_train_batch_size={draws}"]


def flops_of_step(folder: Path, name: str) -> float:
    """Mean over the first steps."""
    recipe = load_recipe(RECIPE, settings(folder, *way_of(name)))
    trainer, _ = build_trainer(recipe, open_sets(recipe))
    count = BatchFlops(build_model(trainer.recipe, empty=True), trainer.objective.family)
    draws = WAYS[name][1]
    steps = [range(start, start + draws) for start in range(0, 32 * draws, draws)]
    return mean(count(collate(trainer.train_dataset.__getitems__(step))) for step in steps)


def run(folder: Path, name: str, seed: int, steps: int) -> list[float]:
    """Held-out losses at equal parts of a run."""
    output = folder / f"run-{list(WAYS).index(name)}-{seed}"
    recipe = load_recipe(
        RECIPE,
        settings(
            folder,
            f"training.output_dir={output}",
            f"seed={seed}",
            *way_of(name),
            f"training.max_steps={steps}",
            f"training.eval_steps={steps // EVALUATIONS}",
            f"training.logging_steps={steps // EVALUATIONS}",
        ),
    )
    trainer = train.run(recipe)
    return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry][:EVALUATIONS]


def main(argv: list[str]) -> None:
    """Make checkpoint and sets, train all, and write what was found."""
    folder = Path(argv[0] if argv else "outputs/prefix_learning")
    torch.set_num_threads(1)
    if not (folder / "sets").exists():
        tiny_checkpoint(folder / "model", kind="qwen_image_21_learner")
        synthetic_edits(folder / "data", rows=600)
        extract.main([str(RECIPE), *settings(folder)])
    cost = {name: flops_of_step(folder, name) for name in WAYS}
    spent = STEPS * cost["K = 1"]
    steps = {name: round(spent / cost[name] / EVALUATIONS) * EVALUATIONS for name in WAYS}
    found: dict[str, list[list[float]]] = {name: [] for name in WAYS}
    for name, seed in product(WAYS, SEEDS):
        found[name].append(run(folder, name, seed, steps[name]))
        figures = {"flops_of_step": cost, "steps": steps, "losses": found}
        (folder / "learning.json").write_text(json.dumps(figures, indent=2))
    print(f"| TFLOP | {' | '.join(f'{name}, {steps[name]:,} steps' for name in WAYS)} |\n|---{'|---' * len(WAYS)}|")
    for part in range(EVALUATIONS):
        cells = ([losses[part] for losses in found[name]] for name in WAYS)
        words = " | ".join(f"{mean(of):.4f} ({stdev(of):.4f})" for of in cells)
        print(f"| {spent * (part + 1) / EVALUATIONS / 1e12:.1f} | {words} |")


if __name__ == "__main__":
    main(sys.argv[1:])
