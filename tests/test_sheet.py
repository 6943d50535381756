"""The contact sheet: sources left, target right, and no text that cannot be read."""

from pathlib import Path

import pytest
from PIL import Image
from small_recipes import BLUE, GREEN, RED, columns_of, plans_of, weightless, write_recipe

from hf_qie import plots as lettering
from hf_qie.extraction import contact_sheet as sheet


@pytest.fixture(scope="session")
def checkpoint(built_once, tiny) -> Path:
    """A checkpoint without weights."""
    return built_once("edit_plus_weightless", lambda folder: weightless(tiny("edit_plus"), folder))


@pytest.fixture
def sheet_of(tmp_path, checkpoint):
    """`sheet_of(rows)` -> the contact sheet of rows that show red, green and blue pictures."""
    for name, colour in {"red": RED, "green": GREEN, "blue": BLUE}.items():
        Image.new("RGB", (128, 128), colour).save(tmp_path / f"{name}.png")

    def make(rows, seed=0):
        plans, _ = plans_of(write_recipe(tmp_path, checkpoint, {"colours": rows}), tmp_path / "mapped")
        return sheet.contact_sheet(plans["colours"], seed=seed)

    return make


def test_sources_stand_left_of_the_arrow_in_their_order_and_the_target_right_of_it(sheet_of):
    row = {"source_image": ["red.png", "green.png"], "target_image": "blue.png", "instruction": "Make it blue."}
    image = sheet_of([row])
    arrow = columns_of(image, tuple(bytes.fromhex(sheet.MADE[1:])))
    (red,), (green,), (blue,) = (columns_of(image, colour) for colour in (RED, GREEN, BLUE))
    assert red[1] < green[0] <= green[1] < blue[0]
    assert any(green[1] < start and end < blue[0] for start, end in arrow)
    assert all(end - start + 1 == sheet.BOX_PX for start, end in (red, green, blue))


def test_rows_of_one_source_stand_in_two_columns(sheet_of):
    row = {"source_image": "red.png", "target_image": "blue.png", "instruction": "Make it blue."}
    image = sheet_of([row] * 20)
    card_px = 2 * sheet.BOX_PX + 3 * sheet.GAP_PX + sheet.ARROW_PX
    assert image.width == 2 * card_px + 3 * sheet.GAP_PX <= sheet.WIDTH_PX
    reds, blues = columns_of(image, RED), columns_of(image, BLUE)
    assert reds[0] < blues[0] < reds[1] < blues[1]


def test_text_to_image_has_nothing_left_of_the_arrow(sheet_of):
    image = sheet_of([{"source_image": None, "target_image": "blue.png", "instruction": "Draw it."}])
    assert not columns_of(image, RED)
    assert len(columns_of(image, BLUE)) == 1


def test_a_picture_that_cannot_be_read_leaves_its_box_and_the_reason(sheet_of, tmp_path):
    image = sheet_of([{"source_image": "red.png", "target_image": "blue.png", "instruction": "a"}])
    (tmp_path / "blue.png").write_bytes(b"no picture")
    broken = sheet_of([{"source_image": "red.png", "target_image": "blue.png", "instruction": "a"}])
    assert broken.size == image.size
    assert columns_of(broken, RED) == columns_of(image, RED)
    assert not columns_of(broken, BLUE)


def test_rows_are_spread_over_the_data_and_fixed_by_the_seed():
    rows = sheet.spread(6000, seed=3, task="edit")
    assert [row // 1000 for row in rows] == [0, 1, 2, 3, 4, 5]
    assert rows == sheet.spread(6000, seed=3, task="edit") != sheet.spread(6000, seed=4, task="edit")
    assert sheet.spread(3, seed=0, task="edit") == [0, 1, 2]


def test_letters_without_a_font_are_left_out_and_never_drawn_as_boxes(monkeypatch, sheet_of):
    monkeypatch.setattr(lettering, "CHINESE_FONTS", ())
    lettering.installed_fonts.cache_clear()
    try:
        assert lettering.legible("Make it blue.") == "Make it blue."
        assert lettering.legible("把天空变成蓝色。") is None
        assert lettering.legible("Make it 蓝.") == "Make it ?."
        shown = {"source_image": "red.png", "target_image": "blue.png", "instruction": "Make it blue."}
        without = sheet_of([shown | {"instruction_cn": "把天空变成蓝色。"}])
        other = sheet_of([shown | {"instruction_cn": "保留小船。"}])
        assert without.tobytes() == other.tobytes()  # the same line in place of either
    finally:
        lettering.installed_fonts.cache_clear()


def test_lines_are_no_wider_than_their_card():
    font = lettering.load_font(None, sheet.TEXT_PX)
    text = "Replace the background, and 把背景换成蓝色，" * 10 + "x" * 200
    lines = lettering.wrap(text, 400, font)
    assert all(font.getlength(line.rstrip()) <= 400 for line in lines if "x" not in line)
    assert "".join("".join(lines).split()) == "".join(text.split())
