"""Synthetic edits for the demo: a coloured shape on a ground, with instructions in English and Chinese.

An image is drawn from a `Scene`; an edit is its source scenes, its target scene and its captions.
"""

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps

# English -> Chinese, and what is drawn
COLOURS = {
    "red": ("红色", (214, 40, 40)),
    "green": ("绿色", (44, 160, 44)),
    "blue": ("蓝色", (31, 92, 196)),
    "orange": ("橙色", (247, 127, 0)),
    "purple": ("紫色", (123, 44, 191)),
    "black": ("黑色", (24, 24, 24)),
}
GROUNDS = {
    "white": ("白色", (250, 250, 250)),
    "grey": ("灰色", (150, 150, 150)),
    "yellow": ("黄色", (250, 225, 120)),
    "pink": ("粉色", (250, 200, 215)),
}
SHAPES = {  # corners as steps of one radius from the middle; the circle has none
    "circle": ("圆形", ()),
    "square": ("正方形", ((-1, -1), (1, -1), (1, 1), (-1, 1))),
    "triangle": ("三角形", ((0, -1), (1, 1), (-1, 1))),
    "diamond": ("菱形", ((0, -1), (1, 0), (0, 1), (-1, 0))),
}
PALETTE = GROUNDS | COLOURS
CORNERS = {  # the middle of a thing, as shares of width and height
    "top left": (0.27, 0.27),
    "top right": (0.73, 0.27),
    "bottom left": (0.27, 0.73),
    "bottom right": (0.73, 0.73),
}
CAPTIONS = ("instruction", "instruction_cn", "inverse_instruction", "inverse_instruction_cn")
SIZE_PX = 64  # side


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One shape of an image."""

    shape: str
    colour: str
    corner: str
    radius: float = 0.18  # of the shorter side


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What an image shows: things on a ground, which is plain where `above` equals `below`."""

    above: str
    below: str
    things: tuple[Thing, ...]
    size_px: tuple[int, int]  # width, height
    negative: bool = False  # every colour turned into its opposite


@dataclass(frozen=True, kw_only=True)
class Edit:
    """A row: sources in order, target, captions by column."""

    sources: tuple[Scene, ...]
    target: Scene
    captions: dict[str, str | None]


def draw(scene: Scene) -> Image.Image:
    """The image of a scene, RGB."""
    width, height = scene.size_px
    image = Image.new("RGB", scene.size_px, PALETTE[scene.above][1])
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, height // 2, width, height), fill=PALETTE[scene.below][1])
    for thing in scene.things:
        radius = thing.radius * min(width, height)
        right, down = CORNERS[thing.corner]
        x, y = right * width, down * height
        fill, corners = PALETTE[thing.colour][1], SHAPES[thing.shape][1]
        if corners:
            pen.polygon([(x + dx * radius, y + dy * radius) for dx, dy in corners], fill=fill)
        else:
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    return ImageOps.invert(image) if scene.negative else image


def repaint(rng: random.Random, number: int, size_px: int) -> Edit:
    """The ground or the shape, in turn, gets another colour: the model has to read the instruction."""
    before = _large_shape(rng, size_px)
    (thing,) = before.things
    ground = number % 2 == 0
    old = before.above if ground else thing.colour
    new = rng.choice([name for name in PALETTE if name not in (before.above, thing.colour)])
    changed = {"above": new, "below": new} if ground else {"things": (replace(thing, colour=new),)}
    what, what_cn = ("background", "背景") if ground else (thing.shape, SHAPES[thing.shape][0])
    captions = [f"Make the {what} {new}.", f"把{what_cn}变成{PALETTE[new][0]}。"]
    captions += [f"Make the {what} {old}.", f"把{what_cn}变成{PALETTE[old][0]}。"]
    return Edit(
        sources=(before,), target=replace(before, **changed), captions=dict(zip(CAPTIONS, captions, strict=True))
    )


def negative(rng: random.Random, number: int, size_px: int) -> Edit:
    """Every colour is turned into its opposite, which undoes itself: the model has to look at the source."""
    before = _large_shape(rng, size_px)
    captions = ("Turn the picture into its negative.", "把图片变成负片。") * 2
    return Edit(
        sources=(before,), target=replace(before, negative=True), captions=dict(zip(CAPTIONS, captions, strict=True))
    )


def _large_shape(rng: random.Random, size_px: int) -> Scene:
    """A square image of one large shape on a plain ground, for edits that leave little as it was."""
    colour = rng.choice(list(COLOURS))
    ground = rng.choice([name for name in PALETTE if name != colour])
    thing = Thing(
        shape=rng.choice(list(SHAPES)), colour=colour, corner=rng.choice(list(CORNERS)), radius=rng.uniform(0.2, 0.27)
    )
    return Scene(above=ground, below=ground, things=(thing,), size_px=(size_px, size_px))


TASKS = {"repaint": repaint, "negative": negative}
LESSONS = {"repaint": (0, 1), "negative": (0,)}  # the numbers of all kinds of edit: ground, shape; negative
EDITS = sum(map(len, LESSONS.values()))  # of a held-out image


def synthetic_edits(
    folder: Path,
    *,
    rows: int,
    seed: int = 0,
    size_px: int = SIZE_PX,
    tasks: Mapping[str, Callable[[random.Random, int, int], Edit]] = TASKS,
) -> dict[str, Path]:
    """Write `<task>.jsonl` of `rows` rows for each of `tasks`, with PNG images; return the path of each file.

    Paths in the files are relative to `folder`. Row i depends on seed, task, i and `size_px` alone, so that a longer
    file begins with the shorter one.
    """
    files = {task: folder / f"{task}.jsonl" for task in tasks}
    for task, make in tasks.items():
        lines = []
        for number in range(rows):
            edit = make(random.Random(f"{seed} {task} {number}"), number, size_px)
            lines.append(_written(folder, edit, f"{task}_{number:04d}"))
        files[task].write_text("".join(lines), encoding="utf-8")
    return files


def held_out_edits(folder: Path, *, images: int, size_px: int = SIZE_PX) -> None:
    """Add rows to the files of `TASKS` in `folder`: every kind of edit of each of `images` images.

    No row before has these images.
    """
    for task, numbers in LESSONS.items():
        with (folder / f"{task}.jsonl").open("a", encoding="utf-8") as file:
            for image, number in product(range(images), numbers):
                # the seed decides the image, the number what becomes of it
                edit = TASKS[task](random.Random(f"held out {image}"), number, size_px)
                stem = f"held_out_{image:04d}"
                file.write(_written(folder, edit, stem, target=f"{stem}_{task}_{number}"))


def _written(folder: Path, edit: Edit, stem: str, *, target: str = "") -> str:
    """Write the images of an edit, `<stem>_source_1.png` and `<target or stem>_target.png`; returns its line."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    sources = [f"images/{stem}_source_{i}.png" for i in range(1, len(edit.sources) + 1)]
    target_image = f"images/{target or stem}_target.png"
    for path, scene in zip([*sources, target_image], [*edit.sources, edit.target], strict=True):
        draw(scene).save(folder / path)
    source_image = sources[0] if len(sources) == 1 else sources or None
    row = {"source_image": source_image, "target_image": target_image} | edit.captions
    return json.dumps(row, ensure_ascii=False) + "\n"
