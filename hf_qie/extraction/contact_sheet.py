"""The contact sheet of a task: some rows as images, sources on the left of an arrow, the target on its right.

Swapped sources and targets are the most frequent mistake in edit pairs, and no number shows it.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image

from hf_qie.data.fetch import BadUrl
from hf_qie.data.images import BadImage
from hf_qie.data.schema import TARGET, columns_of
from hf_qie.data.seeding import draw_rng
from hf_qie.extraction.plan import Plan
from hf_qie.plots import Card, fit, labelled_sheet

NUM_ROWS = 6  # on a sheet
BOX_PX = 320  # side of the square that an image is fitted into
WIDTH_PX = 1600  # of a sheet: more cards stand side by side than fit below each other on a screen


def contact_sheet(plan: Plan, *, seed: int) -> Image.Image:
    """Some rows of `plan`, evenly spread over those whose values are good."""
    table = plan.rows.table
    table = table.select(np.flatnonzero(table.data["bad"].combine_chunks().is_null()))
    rows = [table[number] for number in spread(len(table), seed=seed, task=plan.task.name)]
    most = max(1, *(len(given(row)) for row in rows))
    return labelled_sheet(
        [_card(row, plan, num_given=most) for row in rows],
        title=f"{plan.task.name}: {len(rows)} of {len(table):,} rows",
        note="Left of the arrow: what the model is given. Right of it: what it learns to make.",
        box_px=BOX_PX,
        width_px=WIDTH_PX,
    )


def spread(num_rows: int, *, seed: int, task: str) -> list[int]:
    """One row, drawn by the seed, of each of `NUM_ROWS` parts of the data, none in two of them."""
    parts = min(NUM_ROWS, num_rows)
    shifts = draw_rng(seed, f"sheet of {task}").random(parts)
    ends = pairwise(part * num_rows // parts for part in range(parts + 1))
    return [int(start + shift * (end - start)) for (start, end), shift in zip(ends, shifts, strict=True)]


def given(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Label and path of the images of a row that stand left of the arrow: all but the target."""
    found = []
    for image in columns_of("image"):
        label, paths = image.name.removesuffix("_image"), image.paths(row) if image.name != TARGET else []
        found += [(f"{label} {number}" if len(paths) > 1 else label, path) for number, path in enumerate(paths, 1)]
    return found


def _card(row: Mapping[str, Any], plan: Plan, *, num_given: int) -> Card:
    """The target stands behind room for `num_given` images, so that targets are in line."""
    boxes = [_box(label, path, row, plan) for label, path in given(row)] or [("no source", "text-to-image")]
    boxes += [("", None)] * (num_given - len(boxes))
    texts = {name: text for name, text in row["texts"].items() if text}
    target = _box("target", row["target"], row, plan)
    return Card(heading=f"row {row['row']:,}", boxes=[*boxes, target], target=num_given, texts=texts)


def _box(label: str, path: str, row: Mapping[str, Any], plan: Plan) -> tuple[str, Image.Image | str]:
    try:
        image = plan.read((row["root"], path))
    except (BadImage, BadUrl) as error:
        return label, f"{path}: {error}"
    return f"{label}: {image.width} x {image.height}", fit(image, BOX_PX)
