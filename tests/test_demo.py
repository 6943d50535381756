"""The demo: what it edits, how it scores, what it draws. That the tiny model learns is what `make soak` waits for."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from small_recipes import columns_of

from hf_qie.config.recipe import load_recipe
from hf_qie.demo.run import IMAGES, held_out, psnr_db, score, sheet
from hf_qie.demo.shapes import SIZE_PX, TASKS, draw, synthetic_edits

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def recipe(tiny):
    return load_recipe(ROOT / "recipes" / "demo.yaml").model_copy(update={"model": str(tiny("learner"))})


@pytest.fixture(scope="module")
def edits():
    return held_out(SIZE_PX)


def test_the_recipe_trains_at_the_size_of_its_pictures(recipe):
    assert recipe.extract.image_sample_size == recipe.extract.source_sample_size == SIZE_PX
    assert set(recipe.tasks) == set(TASKS)


def test_each_picture_is_held_out_with_three_instructions(edits):
    assert len(edits) == 3 * IMAGES >= 32
    for first in range(0, len(edits), 3):
        of_one = edits[first : first + 3]
        assert len({edit.sources for edit in of_one}) == 1
        assert len({edit.captions["instruction"] for edit in of_one}) == 3


def test_no_picture_to_learn_from_is_held_out(edits, tmp_path):
    synthetic_edits(tmp_path, rows=60)
    learned = {path.read_bytes() for path in (tmp_path / "images").glob("*_source_1.png")}
    for edit in edits:
        draw(edit.sources[0]).save(tmp_path / "held_out.png")
        assert (tmp_path / "held_out.png").read_bytes() not in learned


def test_copying_the_source_is_far_from_the_target(edits):
    nearness = [psnr_db(draw(edit.sources[0]), draw(edit.target)) for edit in edits]
    assert sum(nearness) / len(nearness) <= 16


def test_the_score_is_best_for_the_targets_and_says_whose_instruction_was_followed(recipe, edits):
    targets, sources = [draw(edit.target) for edit in edits], [draw(edit.sources[0]) for edit in edits]
    scores = score(recipe, edits, before=sources, after=targets)
    assert scores["psnr_after"] > 70 > scores["psnr_vae"] > scores["psnr_before"] == scores["psnr_copy_source"]
    assert scores["share_own_instruction"] == 1
    others = [targets[i - i % 3 + (i + 1) % 3] for i in range(len(targets))]  # what the next instruction asks for
    assert score(recipe, edits, before=sources, after=others)["share_own_instruction"] == 0


def test_the_sheet_has_a_card_an_edit_and_shows_what_was_made(edits):
    lime, teal = (Image.new("RGB", (SIZE_PX, SIZE_PX), colour) for colour in ((0, 255, 0), (0, 128, 128)))
    image = sheet(edits[:3], before=[lime] * 3, after=[teal] * 3)
    before, after = (columns_of(image, one.getpixel((0, 0))) for one in (lime, teal))
    assert len(before) == len(after) == 2, "two cards side by side, one below them"
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
    assert told["psnr_copy_source"] <= 16
    assert told["psnr_after"] >= told["psnr_copy_source"] + 5
    assert told["psnr_after"] - told["psnr_before"] > told["psnr_after"] - told["psnr_copy_source"]
    assert told["share_own_instruction"] > 0.9
    assert (tmp_path / "outputs" / "demo" / "edits.png").is_file()
