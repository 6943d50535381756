"""The contact sheet: sources left, target right, and no text that cannot be read."""

from pathlib import Path

import pytest
from PIL import Image
from small_recipes import BLUE, GREEN, RED, columns_of, plans_of, weightless, write_recipe

from hf_qie.extraction import contact_sheet as sheet


@pytest.fixture(scope="session")
def checkpoint(built_once, tiny) -> Path:
    """A checkpoint without weights."""
    return built_once("edit_plus_weightless", lambda folder: weightless(tiny("edit_plus"), folder))


@pytest.fixture
def sheet_of(tmp_path, checkpoint):
    """`sheet_of(rows)` -> the contact sheet of rows that show red, green and blue images."""
    for name, colour in {"red": RED, "green": GREEN, "blue": BLUE}.items():
        Image.new("RGB", (128, 128), colour).save(tmp_path / f"{name}.png")

    def make(rows, seed=0):
        plans, _ = plans_of(write_recipe(tmp_path, checkpoint, {"colours": rows}), tmp_path / "mapped")
        return sheet.contact_sheet(plans["colours"], seed=seed)

    return make


def test_sources_stand_left_of_the_target_in_their_order(sheet_of):
    row = {"source_image": ["red.png", "green.png"], "target_image": "blue.png", "instruction": "Make it blue."}
    image = sheet_of([row])
    (red,), (green,), (blue,) = (columns_of(image, colour) for colour in (RED, GREEN, BLUE))
    assert red[1] < green[0] <= green[1] < blue[0]
    assert all(end - start + 1 == sheet.BOX_PX for start, end in (red, green, blue))


def test_rows_of_one_source_stand_in_two_columns(sheet_of):
    image = sheet_of([{"source_image": "red.png", "target_image": "blue.png", "instruction": "Make it blue."}] * 20)
    assert image.width <= sheet.WIDTH_PX
    reds, blues = columns_of(image, RED), columns_of(image, BLUE)
    assert reds[0] < blues[0] < reds[1] < blues[1]


def test_text_to_image_has_nothing_left_of_the_arrow(sheet_of):
    image = sheet_of([{"source_image": None, "target_image": "blue.png", "instruction": "Draw it."}])
    assert not columns_of(image, RED)
    assert len(columns_of(image, BLUE)) == 1


def test_an_image_that_cannot_be_read_leaves_its_box_and_the_reason(sheet_of, tmp_path):
    image = sheet_of([{"source_image": "red.png", "target_image": "blue.png", "instruction": "a"}])
    (tmp_path / "blue.png").write_bytes(b"no image")
    broken = sheet_of([{"source_image": "red.png", "target_image": "blue.png", "instruction": "a"}])
    assert broken.size == image.size
    assert columns_of(broken, RED) == columns_of(image, RED)
    assert not columns_of(broken, BLUE)


def test_rows_are_spread_over_the_data_and_fixed_by_the_seed():
    rows = sheet.spread(6000, seed=3, task="edit")
    assert [row // 1000 for row in rows] == [0, 1, 2, 3, 4, 5]
    assert rows == sheet.spread(6000, seed=3, task="edit") != sheet.spread(6000, seed=4, task="edit")
    assert sheet.spread(3, seed=0, task="edit") == [0, 1, 2]


@pytest.mark.parametrize("num_rows", range(6, 30))
def test_no_row_stands_twice_on_a_sheet(num_rows):
    for seed in range(20):
        rows = sheet.spread(num_rows, seed=seed, task="edit")
        assert len(set(rows)) == sheet.NUM_ROWS and rows == sorted(rows) and rows[-1] < num_rows
