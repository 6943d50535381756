"""The demo: a tiny model learns two kinds of edit from scratch, through the scripts that users run.

    python hf_qie/demo/run.py recipes/demo.yaml [key.of.the.recipe=value ...]

Makes a tiny checkpoint and synthetic edits, extracts, trains by the recipe, and scores the model before training,
half-way and at the end on edits of images that training never saw. Leaves in outputs/demo: edits.png (source, before
and after training, target, instruction), loss.png, demo.json (scores by checkpoint, seconds by stage), and in
run/evaluation what score.py writes.
"""

import json
import logging
import shutil
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image

from hf_qie.config.recipe import Recipe, load_recipe
from hf_qie.demo.shapes import EDITS
from hf_qie.plots import Card, labelled_sheet
from hf_qie.runtime.cli import run_script

logger = logging.getLogger("hf_qie.demo.run")

FOLDER = Path("outputs/demo")
IMAGES = 12  # held out; each is edited in every way
SHOWN = 2  # images in edits.png
LABELS = ("source", "before training", "after training", "target")  # of what edits.png has of an edit
STAGES = {
    "data": f"hf_qie/demo/tiny.py --kind learner --rows 600 --held_out {IMAGES} "
    f"--model {FOLDER}/model --data {FOLDER}/data",
    "extract": "-m accelerate.commands.launch -q hf_qie/extract.py",
    "train": "-m accelerate.commands.launch -q hf_qie/train.py",
    "score": "-m accelerate.commands.launch -q hf_qie/score.py --all",
}


def main(argv: list[str]) -> None:
    """Run all stages by the recipe and overrides of `argv`; the output of an earlier demo is removed."""
    recipe = load_recipe(argv[0], argv[1:])
    shutil.rmtree(FOLDER, ignore_errors=True)
    seconds: dict[str, float] = {}
    for stage, command in STAGES.items():
        logger.info("demo: %s", stage)
        start = time.monotonic()
        done = subprocess.run([sys.executable, *command.split(), *(argv if stage != "data" else [])], check=False)
        if done.returncode:
            sys.exit(done.returncode)
        seconds[stage] = round(time.monotonic() - start, 1)
    output_dir = Path(recipe.training["output_dir"])
    shutil.copy(output_dir / "loss.png", FOLDER / "loss.png")
    summary = json.loads((output_dir / "evaluation" / "summary.json").read_text(encoding="utf-8"))
    before, *_, after = summary["checkpoints"]
    sheet(recipe, before=before, after=after).save(FOLDER / "edits.png")
    report = json.dumps({"checkpoints": summary["checkpoints"], "seconds": seconds}, indent=2)
    (FOLDER / "demo.json").write_text(report + "\n", encoding="utf-8")
    logger.info("%s, %s", FOLDER / "edits.png", FOLDER / "demo.json")


def sheet(recipe: Recipe, *, before: str, after: str) -> Image.Image:
    """A card an edit: its instruction, and its images below it, also those of two checkpoints, by name."""
    evaluation, cards = Path(recipe.training["output_dir"], "evaluation"), []
    for name, row, folder in held_out(recipe)[: SHOWN * EDITS]:
        made = (evaluation / checkpoint / f"{name}.png" for checkpoint in (before, after))
        paths = (folder / row["source_image"], *made, folder / row["target_image"])
        boxes = [(label, Image.open(path)) for label, path in zip(LABELS, paths, strict=True)]
        cards.append(Card(heading=row["instruction"], boxes=boxes))
    return labelled_sheet(cards, title="Edits of images that training never saw", box_px=128, width_px=1300)


def held_out(recipe: Recipe) -> list[tuple[str, dict[str, str], Path]]:
    """(name, row, folder of its images) of each held-out row, image by image."""
    rows = []
    for task, settings in recipe.tasks.items():
        (path,) = map(Path, settings.data)
        lines = path.read_text(encoding="utf-8").splitlines()
        numbers = range(len(lines) - settings.eval_rows, len(lines))
        rows += [(f"{task}-{number}", json.loads(lines[number]), path.parent) for number in numbers]
    return sorted(rows, key=lambda row: row[1]["source_image"])


if __name__ == "__main__":
    run_script(main)
