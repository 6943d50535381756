"""RUN 0: sources and targets that do not show the same in the same place."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data
from small_recipes import GREEN, plans_of, weightless, write_recipe

from hf_qie import check
from hf_qie.extraction import pairs as pairs_module
from hf_qie.extraction.pairs import compare_pairs
from hf_qie.extraction.stats import survey

SIDE_PX = 256  # of images, and of targets in training
SIZES = {"image_sample_size": SIDE_PX, "source_sample_size": SIDE_PX}


@pytest.fixture(scope="session")
def checkpoint(built_once, tiny) -> Path:
    """A checkpoint without weights."""
    return built_once("edit_plus_weightless", lambda folder: weightless(tiny("edit_plus"), folder))


@pytest.fixture
def row_of(tmp_path):
    """`row_of(number, ...)` -> a row: a part of a photo, and the same with a green square, moved."""
    photo = Image.fromarray(data.astronaut())

    def make(number, *, dx=0.0, scale=1.0, target=None, **columns):
        left, top, half = 30 * (number % 7), 25 * (number % 9), SIDE_PX / 2
        source = photo.crop((left, top, left + SIDE_PX, top + SIDE_PX))
        source.save(tmp_path / f"{number}.png")
        matrix = (1 / scale, 0, left + half - (half + dx) / scale, 0, 1 / scale, top + half * (1 - 1 / scale))
        moved = photo.transform(source.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
        moved.paste(GREEN, (90, 100, 190, 200))
        (target or moved).save(tmp_path / f"{number}_target.png")
        return {"source_image": f"{number}.png", "target_image": f"{number}_target.png", "instruction": "a"} | columns

    return make


@pytest.fixture
def look(tmp_path, checkpoint):
    """`look(rows)` -> their survey and pairs."""

    def make(rows, **extract):
        recipe = write_recipe(tmp_path, checkpoint, {"edits": rows}, extract=SIZES | extract)
        plans, processor = plans_of(recipe, tmp_path / "mapped")
        found = survey(plans["edits"], processor)
        return found, compare_pairs(found)

    return make


def test_rows_that_are_off_are_listed_worst_first_in_an_aligned_task(row_of, checkpoint, tmp_path, capsys):
    moves = {2: {"dx": 3}, 5: {"scale": 1.06}, 6: {"dx": 1.2}, 7: {"dx": -6}}
    rows = [row_of(number, **moves.get(number, {})) for number in range(10)]
    recipe = write_recipe(tmp_path, checkpoint, {"edits": rows}, extract=SIZES)
    check.main([str(recipe)])
    out = capsys.readouterr().out
    told = "10 of 10 compared, 10 of 10 with enough detail show the same in source and target"
    assert re.search(rf"^  aligned pairs +yes; {told}, 30\.0% of these more than 2 px off$", out, re.MULTILINE)
    found = [json.loads(line) for line in (tmp_path / "sets/first-look/edits.jsonl").read_text().splitlines()]
    assert [(one["kind"], one["row"], one["path"]) for one in found] == [
        ("misaligned", row, f"{row}_target.png") for row in (5, 7, 2)
    ]
    pattern = r"shifted by (\S+), (\S+) px, scaled by (\S+) x (\S+) against (\S+): up to (\S+) px at 256 x 256"
    for one, (dx, scale) in zip(found, [(0, 1.06), (-6, 1), (3, 1)], strict=True):
        assert f"misaligned: row {one['row']}: target_image: {one['path']}: {one['reason']}\n" in out
        *numbers, source, farthest = re.fullmatch(pattern, one["reason"]).group(1, 2, 3, 4, 5, 6)
        assert [float(number) for number in numbers] == pytest.approx([dx, 0, scale, scale], abs=0.15)
        corner_px = 2**0.5 * (scale - 1) * SIDE_PX / 2
        assert source == f"{one['row']}.png" and float(farthest) == pytest.approx(abs(dx) + corner_px, abs=0.3)


def test_a_task_whose_pairs_show_different_things_is_not_called_misaligned(row_of, look, tmp_path):
    photos = [Image.fromarray(photo).resize((SIDE_PX, SIDE_PX)) for photo in (data.coffee(), data.rocket())]
    rows = [row_of(number, target=photos[number % 2]) for number in range(4)]
    rows.append(row_of(4, dx=8))
    _, found = look(rows)
    assert not found.are_aligned and not found.findings
    told = (
        "no, so that no shift is listed; 5 of 5 compared, 1 of 5 with enough detail show the same in source and target"
    )
    assert str(found) == told


def test_of_several_sources_the_last_is_compared(row_of, look):
    rows = [row_of(number, source_image=["0.png", f"{number}.png"]) for number in range(1, 4)]
    row_of(0)
    _, found = look(rows)
    assert found.are_aligned and not found.findings and len(found.same) == 3
    _, found = look([row | {"source_image": row["source_image"][::-1]} for row in rows])
    assert not found.are_aligned and not found.same


def test_a_stretched_target_is_told_from_one_that_was_cropped(row_of, look):
    """Both have another aspect than their sources; in training a stretch is undone."""
    whole = Image.fromarray(data.astronaut()).crop((0, 0, SIDE_PX, SIDE_PX))  # the source of row 0
    stretched, cropped = whole.resize((SIDE_PX, 240)), whole.crop((0, 0, SIDE_PX, 240))
    rows = [row_of(0, target=stretched), row_of(63, target=cropped)]  # both from the same place of the photo
    survey, found = look(rows)
    assert [one.row for one in survey.found("other aspect")] == [0, 1]
    assert [one.row for one in found.findings] == [1]


def test_equal_pixels_and_damaged_images_are_found_by_decoding(row_of, look, tmp_path):
    rows = [row_of(number) for number in range(4)]
    Image.open(tmp_path / "1.png").save(tmp_path / "1.bmp")
    rows[1]["target_image"] = "1.bmp"  # other bytes
    rows[2]["target_image"] = rows[2]["source_image"]  # the header tells it
    content = (tmp_path / "3_target.png").read_bytes()
    (tmp_path / "3_target.png").write_bytes(content[: len(content) // 2])
    survey, found = look(rows)
    assert [(one.kind, one.row) for one in survey.findings] == [("source equals target", 2)]
    assert [(one.kind, one.row, one.path) for one in found.findings] == [
        ("source equals target", 1, "1.png"),
        ("bad row", 3, "3_target.png"),
    ]
    assert "the same pixels as 1.bmp" in found.findings[0].reason
    assert "truncated" in found.findings[1].reason
    assert [one.finding.row for one in found.compared] == [0]


def test_of_a_long_task_rows_from_begin_to_end_are_compared(row_of, look, monkeypatch):
    monkeypatch.setattr(pairs_module, "MAX_ROWS", 4)
    rows = [row_of(0, source_image=None), *(row_of(number) for number in range(1, 12))]
    _, found = look(rows)
    assert found.num_pairs == 11  # a row without a source has none
    assert [one.finding.row for one in found.compared] == [1, 4, 8, 11]


def test_what_cannot_be_told_is_not_guessed(row_of, look, tmp_path):
    flat = [Image.fromarray(np.full((SIDE_PX, SIDE_PX, 3), level, np.uint8)) for level in (90, 160)]
    row = row_of(0, target=flat[0])
    flat[1].save(tmp_path / "0.png")
    _, found = look([row])
    assert str(found) == "unknown; 1 of 1 compared, none with enough detail" and not found.findings
    _, found = look([row_of(1, source_image=None)])
    assert str(found) == "" and not found.compared
