"""The contact sheet of a task: some rows as pictures, sources on the left, an arrow, the target on the right.

The first thing that goes wrong with edit pairs is that the two are swapped; no number shows it, one look does.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from hf_qie.data.samples import BadRow
from hf_qie.data.seeding import draw_rng
from hf_qie.extraction.preprocess import Plan, read_file, read_picture
from hf_qie.plots import font_for, legible, wrap, write

NUM_ROWS = 6  # on a sheet
BOX_PX = 288  # the square that a picture fits in
GAP_PX = 24
ARROW_PX = 96  # between sources and target
WIDTH_PX = 1600  # of a sheet: more cards stand side by side than fit below each other on a screen
TEXT_PX, NAME_PX, TITLE_PX = 19, 15, 30
LINE = 1.4  # height of a line of text in its size
MOST_LINES = 5  # of one caption
PAPER, CARD, INK, FAINT, EDGE = "#f4f4f2", "#ffffff", "#1c1c1e", "#7c7c80", "#d8d8dc"
MADE = "#c2410c"  # of arrow and target: what the model learns to make


def contact_sheet(plan: Plan, *, seed: int) -> Image.Image:
    """Some rows of `plan`, evenly spread over those whose values are good."""
    table = plan.rows.table
    table = table.select(np.flatnonzero(table.data["bad"].combine_chunks().is_null()))
    rows = [table[number] for number in spread(len(table), seed=seed, task=plan.task.name)]
    columns = max(1, *(len(row["sources"]) for row in rows))
    cards = [card(row, plan, columns=columns) for row in rows]
    across = min(len(cards), max(1, WIDTH_PX // (cards[0].width + GAP_PX)))
    lines = [cards[start : start + across] for start in range(0, len(cards), across)]
    heights = [max(one.height for one in line) + GAP_PX for line in lines]
    head = 3 * GAP_PX + TITLE_PX + NAME_PX
    sheet = Image.new("RGB", (GAP_PX + across * (cards[0].width + GAP_PX), head + sum(heights)), PAPER)
    pen = ImageDraw.Draw(sheet)
    write(pen, (GAP_PX, GAP_PX), f"{plan.task.name}: {len(rows)} of {len(table):,} rows", TITLE_PX, INK)
    words = "Left of the arrow: what the model is given. Right of it: what it learns to make."
    write(pen, (GAP_PX, 2 * GAP_PX + TITLE_PX - 8), words, NAME_PX, FAINT)
    for number, line in enumerate(lines):
        for place, one in enumerate(line):
            left, top = GAP_PX + place * (one.width + GAP_PX), head + sum(heights[:number])
            below = top + heights[number] - GAP_PX
            pen.rectangle((left - 1, top - 1, left + one.width, below), fill=CARD, outline=EDGE)
            sheet.paste(one, (left, top))
    return sheet


def spread(num_rows: int, *, seed: int, task: str) -> list[int]:
    """One row, drawn by the seed, of each of `NUM_ROWS` equal parts of the data."""
    parts = min(NUM_ROWS, num_rows)
    shifts = draw_rng(seed, f"sheet of {task}").random(parts)
    return [int((part + shift) * num_rows / parts) for part, shift in enumerate(shifts)]


def card(row: Mapping[str, Any], plan: Plan, *, columns: int) -> Image.Image:
    """One row of the data; its target stands behind room for `columns` sources, so that targets are in line."""
    right = GAP_PX + columns * (BOX_PX + GAP_PX) + ARROW_PX
    width = right + BOX_PX + GAP_PX
    captions = {name: text for name, text in row["texts"].items() if text}
    lines = [line for name, text in captions.items() for line in caption_lines(name, text, width - 2 * GAP_PX)]
    top = 2 * GAP_PX + NAME_PX
    below = top + BOX_PX + GAP_PX
    image = Image.new("RGB", (width, below + sum(height for *_, height in lines) + GAP_PX), CARD)
    pen = ImageDraw.Draw(image)
    write(pen, (GAP_PX, GAP_PX - 6), f"row {row['row']:,}", NAME_PX, INK)
    for number, path in enumerate(row["sources"]):
        name = f"source {number + 1}" if len(row["sources"]) > 1 else "source"
        put(image, name, path, row, plan, (GAP_PX + number * (BOX_PX + GAP_PX), top))
    if not row["sources"]:
        write(pen, (GAP_PX, top + BOX_PX // 2 - TEXT_PX // 2), "no source: text to image", TEXT_PX, FAINT)
    left = GAP_PX + max(1, len(row["sources"])) * (BOX_PX + GAP_PX)
    draw_arrow(pen, left, right - GAP_PX, top + BOX_PX // 2)
    put(image, "target", row["target"], row, plan, (right, top))
    for text, font, colour, height in lines:
        pen.text((GAP_PX, below), text, fill=colour, font=font)
        below += height
    return image


def put(image: Image.Image, name: str, path: str, row: Mapping[str, Any], plan: Plan, corner: tuple[int, int]) -> None:
    """Paste a picture of `row` into a box below its name, or say there why it cannot be read."""
    (left, top), pen, colour = corner, ImageDraw.Draw(image), MADE if name == "target" else FAINT
    pen.rectangle((left, top, left + BOX_PX - 1, top + BOX_PX - 1), fill=PAPER)
    try:
        picture = read_picture((row["root"], path), column=name, read=functools.partial(read_file, plan=plan))
    except BadRow as error:
        lines = wrap(f"{path}: {error.reason}", BOX_PX - 2 * GAP_PX, font_for("", NAME_PX))[: 2 * MOST_LINES]
        for number, line in enumerate(lines):
            write(pen, (left + GAP_PX, top + GAP_PX + round(number * LINE * NAME_PX)), line, NAME_PX, MADE)
    else:
        name = f"{name}: {picture.width} x {picture.height}"
        small = ImageOps.contain(picture, (BOX_PX, BOX_PX), Image.Resampling.LANCZOS)
        image.paste(small, (left + (BOX_PX - small.width) // 2, top + (BOX_PX - small.height) // 2))
    write(pen, (left, top - NAME_PX - 8), name, NAME_PX, colour)


def draw_arrow(pen: ImageDraw.ImageDraw, start: int, end: int, height: int) -> None:
    """An arrow to the right."""
    pen.line((start, height, end - 14, height), fill=MADE, width=4)
    pen.polygon([(end, height), (end - 20, height - 11), (end - 20, height + 11)], fill=MADE)


def caption_lines(name: str, text: str, width: int) -> Iterator[tuple[str, ImageFont.FreeTypeFont, str, int]]:
    """(text, font, colour, height) of the lines of a caption below its column's name."""
    shown, name_font, text_font = legible(text), font_for(name, NAME_PX), font_for(text, TEXT_PX)
    if shown is None:
        yield f"{name}: left out, no font here has its letters (Noto Sans CJK has)", name_font, FAINT, 2 * NAME_PX
        return
    yield name, name_font, FAINT, NAME_PX + 6
    lines = wrap(shown, width, text_font)
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES - 1], lines[MOST_LINES - 1][:-4].rstrip() + " ..."]
    for line in lines[:-1]:
        yield line, text_font, INK, round(LINE * TEXT_PX)
    yield lines[-1], text_font, INK, round(LINE * TEXT_PX) + 10
