"""The demo: what it holds out and what it draws. That the tiny model learns is what `make soak` waits for."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_recipes import columns_of

from hf_qie.config.recipe import load_recipe
from hf_qie.demo.run import IMAGES, SHOWN, STAGES, held_out, sheet
from hf_qie.demo.shapes import EDITS, SIZE_PX, TASKS
from hf_qie.demo.tiny import main as tiny
from hf_qie.measures.edits import score_edit

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The recipe of the demo, whose data has 60 rows to train on."""
    folder = tmp_path_factory.mktemp("demo")
    tiny(["--data", str(folder), "--rows", "60", "--held_out", str(IMAGES)])
    data = [f"tasks.{task}.data={folder / f'{task}.jsonl'}" for task in TASKS]
    return load_recipe(ROOT / "recipes" / "demo.yaml", [*data, f"training.output_dir={folder / 'run'}"])


@pytest.fixture(scope="module")
def rows(recipe):
    return held_out(recipe)


def test_the_recipe_trains_at_the_size_of_its_images(recipe):
    assert recipe.extract.image_sample_size == recipe.extract.source_sample_size == SIZE_PX
    assert set(recipe.tasks) == set(TASKS)


def test_half_way_and_the_end_are_kept_to_be_scored(recipe):
    training = recipe.training
    assert training["max_steps"] == 2 * training["save_steps"]
    assert training.get("save_total_limit") is None
    assert recipe.evaluation.rows == IMAGES * EDITS
    assert f"--held_out {IMAGES} " in STAGES["data"]


def test_each_image_is_held_out_with_three_instructions(rows):
    assert len(rows) == EDITS * IMAGES == 36
    for first in range(0, len(rows), EDITS):
        of_one = [row for _, row, _ in rows[first : first + EDITS]]
        assert len({row["source_image"] for row in of_one}) == 1
        assert len({row["instruction"] for row in of_one}) == len({row["target_image"] for row in of_one}) == 3


def test_no_image_to_learn_from_is_held_out(rows):
    folder = rows[0][2]
    learned = {path.read_bytes() for task in TASKS for path in (folder / "images").glob(f"{task}_*_source_1.png")}
    assert len(learned) == 2 * 60
    assert learned.isdisjoint((folder / row["source_image"]).read_bytes() for _, row, _ in rows)


def test_copying_the_source_scores_as_no_edit(rows):
    for _, row, folder in rows:
        source, target = (np.asarray(Image.open(folder / row[name])) for name in ("source_image", "target_image"))
        scores = score_edit(source, target, [source])
        assert scores["psnr"] <= 20
        assert scores["edited"] == scores["nearer_target"] == 0


def test_the_sheet_has_a_card_an_edit_and_shows_what_was_made(recipe, rows):
    lime, teal = (Image.new("RGB", (SIZE_PX, SIZE_PX), colour) for colour in ((0, 255, 0), (0, 128, 128)))
    for name, image in {"base": lime, "checkpoint-2": teal}.items():
        folder = Path(recipe.training["output_dir"], "evaluation", name)
        folder.mkdir(parents=True)
        for row, *_ in rows[: SHOWN * EDITS]:
            image.save(folder / f"{row}.png")
    image = sheet(recipe, before="base", after="checkpoint-2")
    before, after = (columns_of(image, one.getpixel((0, 0))) for one in (lime, teal))
    assert len(before) == len(after) == 2, "two cards side by side"
    assert before[0] < after[0] < before[1] < after[1]


@pytest.mark.soak
def test_the_demo_learns(tmp_path):
    for name in ("hf_qie", "recipes"):
        shutil.copytree(ROOT / name, tmp_path / name)
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    subprocess.run(
        [sys.executable, "hf_qie/demo/run.py", "recipes/demo.yaml"], cwd=tmp_path, env=environment, check=True
    )
    told = json.loads((tmp_path / "outputs" / "demo" / "demo.json").read_text())
    before, half_way, after = (one["scores"] for one in told["checkpoints"].values())
    for score, (least, gain) in {"edited": (0.9, 0.4), "own_instruction": (0.9, 0.5), "psnr": (18, 8)}.items():
        assert after[score] > max(least, before[score] + gain)
    assert before["edit_score"] < half_way["edit_score"] < after["edit_score"]
    assert (tmp_path / "outputs" / "demo" / "edits.png").is_file()
