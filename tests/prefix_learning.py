"""What several noises for one prefix do to learning: held-out loss by operations spent, K = 1 against K = 4.

    python tests/prefix_learning.py [folder]

A tiny Qwen-Image-2.1 learns the demo's edits from scratch, with one noise a prefix and with four, three seeds each.
Both have batches of 16 draws; the second has four rows in one, costs less, and takes as many more steps as bring it to
the same operations. Half an hour on one core; figures go to `learning.json` in the folder, a table to the output.
"""

import json
import sys
from pathlib import Path
from statistics import mean, stdev

import numpy as np
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

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "demo.yaml"
TIMES, SEEDS, STEPS, BATCH, EVALUATIONS = (1, 4), (0, 1, 2), 1600, 16, 8


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


def flops_of_step(folder: Path, times: int) -> float:
    """Mean over the first steps."""
    recipe = load_recipe(RECIPE, settings(folder, f"mix.draws_per_row={times}"))
    trainer, _ = build_trainer(recipe, open_sets(recipe))
    count = BatchFlops(build_model(trainer.recipe, empty=True), trainer.objective.family)
    steps = [range(start, start + BATCH) for start in range(0, 32 * BATCH, BATCH)]
    return mean(count(collate(trainer.train_dataset.__getitems__(step))) for step in steps)


def run(folder: Path, times: int, seed: int, steps: int) -> list[float]:
    """Held-out losses at equal parts of a run."""
    output = folder / f"run-{times}-{seed}"
    recipe = load_recipe(
        RECIPE,
        settings(
            folder,
            f"training.output_dir={output}",
            f"seed={seed}",
            f"mix.draws_per_row={times}",
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
    cost = {times: flops_of_step(folder, times) for times in TIMES}
    steps = {times: round(STEPS * cost[1] / cost[times] / EVALUATIONS) * EVALUATIONS for times in TIMES}
    found: dict[int, list[list[float]]] = {times: [] for times in TIMES}
    for seed in SEEDS:
        for times in TIMES:
            found[times].append(run(folder, times, seed, steps[times]))
            figures = {"flops_of_step": cost, "steps": steps, "losses": found}
            (folder / "learning.json").write_text(json.dumps(figures, indent=2))
    print(f"operations of a step, K = 4 to K = 1: {cost[4] / cost[1]:.2f}")
    for part in range(EVALUATIONS):
        cells = [[losses[part] for losses in found[times]] for times in TIMES]
        words = " | ".join(f"{mean(of):.4f} ({stdev(of):.4f})" for of in cells)
        spent = STEPS * cost[1] * (part + 1) / EVALUATIONS / 1e12
        print(f"| {spent:.1f} | {words} | {np.divide(*map(mean, cells)):.3f} |")


if __name__ == "__main__":
    main(sys.argv[1:])
