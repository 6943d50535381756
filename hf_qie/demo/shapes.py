"""Synthetic edits for the demo and the tests: coloured shapes on plain or two-tone grounds, in English and Chinese.

A picture is drawn from a `Scene`; an edit is two scenes, and its instruction is told from how they differ.
"""

import json
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
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
    "top left": ("左上角", (0.27, 0.27)),
    "top right": ("右上角", (0.73, 0.27)),
    "bottom left": ("左下角", (0.27, 0.73)),
    "bottom right": ("右下角", (0.73, 0.73)),
}
ASPECTS = (1.0, 1.0, 1.5, 2 / 3)  # width / height; half of the pictures are square

Words = tuple[str, str]  # English, Chinese


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One shape of a picture. No two in a picture share shape, colour or corner, so that any of these names it."""

    shape: str
    colour: str
    corner: str
    radius: float = 0.18  # of the shorter side

    def named(self) -> Words:
        """As in "red circle"."""
        return f"{self.colour} {self.shape}", COLOURS[self.colour][0] + SHAPES[self.shape][0]

    def placed(self) -> Words:
        """As in "a red circle in the top left corner"."""
        (name, name_cn), (corner_cn, _) = self.named(), CORNERS[self.corner]
        article = "an" if self.colour == "orange" else "a"
        return f"{article} {name} in the {self.corner} corner", f"{corner_cn}的一个{name_cn}"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a picture shows: things on a ground, which is plain where `above` equals `below`."""

    above: str
    below: str
    things: tuple[Thing, ...]
    size_px: tuple[int, int]  # width, height
    negative: bool = False  # every colour turned into its opposite

    def ground(self) -> Words:
        """As in "a white background"."""
        above_cn, below_cn = GROUNDS[self.above][0], GROUNDS[self.below][0]
        if self.above == self.below:
            return f"a {self.above} background", f"{above_cn}背景"
        return f"a background that is {self.above} above and {self.below} below", f"上{above_cn}下{below_cn}的背景"


def random_scene(rng: random.Random, num_things: int, size_px: int) -> Scene:
    """A scene whose area is about that of a square of side `size_px`; at most four things, for want of corners."""
    shapes, colours, corners = (rng.sample(list(table), num_things) for table in (SHAPES, COLOURS, CORNERS))
    above = rng.choice(list(GROUNDS))
    side = math.sqrt(rng.choice(ASPECTS))
    return Scene(
        above=above,
        below=rng.choice([above, *GROUNDS]),
        things=tuple(
            Thing(shape=shape, colour=colour, corner=corner)
            for shape, colour, corner in zip(shapes, colours, corners, strict=True)
        ),
        size_px=(round(size_px * side), round(size_px / side)),
    )


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene, RGB."""
    width, height = scene.size_px
    image = Image.new("RGB", scene.size_px, PALETTE[scene.above][1])
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, height // 2, width, height), fill=PALETTE[scene.below][1])
    for thing in scene.things:
        radius = thing.radius * min(width, height)
        right, down = CORNERS[thing.corner][1]
        x, y = right * width, down * height
        fill, corners = PALETTE[thing.colour][1], SHAPES[thing.shape][1]
        if corners:
            pen.polygon([(x + dx * radius, y + dy * radius) for dx, dy in corners], fill=fill)
        else:
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    return ImageOps.invert(image) if scene.negative else image


def describe(before: Scene, after: Scene) -> Words:
    """The instruction that leads from one scene to the other; they differ in one thing, or nothing is left."""
    gone = [thing for thing in before.things if thing not in after.things]
    new = [thing for thing in after.things if thing not in before.things]
    if len(gone) > 1:
        return "Remove every shape.", "去掉所有图形。"
    thing, thing_cn = (gone or new)[0].named()
    if not new:
        return f"Remove the {thing}.", f"去掉{thing_cn}。"
    corner, colour = new[0].corner, new[0].colour
    if not gone:
        return f"Add {new[0].placed()[0]}.", f"在{CORNERS[corner][0]}加一个{thing_cn}。"
    if gone[0].colour != colour:
        return f"Change the {thing} to {colour}.", f"把{thing_cn}改成{COLOURS[colour][0]}。"
    return f"Move the {thing} to the {corner} corner.", f"把{thing_cn}移到{CORNERS[corner][0]}。"


@dataclass(frozen=True, kw_only=True)
class Edit:
    """A row: sources in order, target, instruction, and its inverse (null where it has no meaning)."""

    sources: tuple[Scene, ...]
    target: Scene
    words: dict[str, str | None]


def single_edit(rng: random.Random, number: int, size_px: int) -> Edit:
    """One source: a colour change, a move, a removal, an addition or a clearing, in turn."""
    before = random_scene(rng, 2, size_px)
    thing, other = before.things
    kind = ("colour", "corner", "remove", "add", "clear")[number % 5]
    if kind in ("colour", "corner"):
        table, taken = {"colour": COLOURS, "corner": CORNERS}[kind], [getattr(t, kind) for t in before.things]
        changed = replace(thing, **{kind: rng.choice([name for name in table if name not in taken])})
        after = replace(before, things=(changed, other))
    else:
        after = replace(before, things=() if kind == "clear" else (other,))
    if kind == "add":
        before, after = after, before
    # a cleared picture does not tell what stood there
    back = (None, None) if kind == "clear" else describe(after, before)
    names = ("instruction", "instruction_cn", "inverse_instruction", "inverse_instruction_cn")
    return Edit(
        sources=(before,), target=after, words=dict(zip(names, (*describe(before, after), *back), strict=True))
    )


def combination(rng: random.Random, number: int, size_px: int) -> Edit:
    """Two or three sources, in turn: the thing of each but the last is put on the ground of the last."""
    num_things = 1 + number % 2
    target = random_scene(rng, num_things, size_px)
    sources = [replace(random_scene(rng, 0, size_px), things=(thing,)) for thing in target.things]
    names, names_cn = zip(*(thing.named() for thing in target.things), strict=True)
    put = " and ".join(f"the {name} of picture {i}" for i, name in enumerate(names, 1))
    put_cn = "和".join(f"图{i}的{name}" for i, name in enumerate(names_cn, 1))
    last = num_things + 1
    words = {
        "instruction": f"Put {put} in the same place on the background of picture {last}.",
        "instruction_cn": f"把{put_cn}放到图{last}背景的相同位置。",
    }
    return Edit(sources=(*sources, replace(target, things=())), target=target, words=words)


def description(rng: random.Random, number: int, size_px: int) -> Edit:
    """No source, text-to-image: one or two things on a ground."""
    scene = random_scene(rng, 1 + number % 2, size_px)
    ground, ground_cn = scene.ground()
    things, things_cn = zip(*(thing.placed() for thing in scene.things), strict=True)
    words = {
        "instruction": f"Draw on {ground}: {' and '.join(things)}.",
        "instruction_cn": f"在{ground_cn}上画{'和'.join(things_cn)}。",
    }
    return Edit(sources=(), target=scene, words=words)


def large_shape(rng: random.Random, size_px: int) -> Scene:
    """A square picture of one large shape on a plain ground, for edits that leave little as it was."""
    colour = rng.choice(list(COLOURS))
    ground = rng.choice([name for name in PALETTE if name != colour])
    thing = Thing(
        shape=rng.choice(list(SHAPES)), colour=colour, corner=rng.choice(list(CORNERS)), radius=rng.uniform(0.2, 0.27)
    )
    return Scene(above=ground, below=ground, things=(thing,), size_px=(size_px, size_px))


def repaint(rng: random.Random, number: int, size_px: int) -> Edit:
    """One source: its ground and its shape get another colour, in turn."""
    before = large_shape(rng, size_px)
    (thing,) = before.things
    ground = number % 2 == 0
    old = before.above if ground else thing.colour
    new = rng.choice([name for name in PALETTE if name not in (before.above, thing.colour)])
    changed = {"above": new, "below": new} if ground else {"things": (replace(thing, colour=new),)}
    what, what_cn = ("background", "背景") if ground else (thing.shape, SHAPES[thing.shape][0])
    words = {
        "instruction": f"Make the {what} {new}.",
        "instruction_cn": f"把{what_cn}变成{PALETTE[new][0]}。",
        "inverse_instruction": f"Make the {what} {old}.",
        "inverse_instruction_cn": f"把{what_cn}变成{PALETTE[old][0]}。",
    }
    return Edit(sources=(before,), target=replace(before, **changed), words=words)


def negative(rng: random.Random, number: int, size_px: int) -> Edit:
    """One source: every colour is turned into its opposite, which undoes itself."""
    before = large_shape(rng, size_px)
    english, chinese = "Turn the picture into its negative.", "把图片变成负片。"
    names = ("instruction", "instruction_cn", "inverse_instruction", "inverse_instruction_cn")
    words = dict(zip(names, (english, chinese) * 2, strict=True))
    return Edit(sources=(before,), target=replace(before, negative=True), words=words)


TASKS = {"edit": single_edit, "combine": combination, "text_to_image": description}
LESSONS = {"repaint": repaint, "negative": negative}  # what a tiny model learns in minutes
LESSON_PX = 64  # side


def synthetic_edits(
    folder: Path,
    *,
    rows: int,
    seed: int = 0,
    size_px: int = 128,
    tasks: Mapping[str, Callable[[random.Random, int, int], Edit]] = TASKS,
) -> dict[str, Path]:
    """Write `<task>.jsonl` of `rows` rows for each of `tasks`, with PNG pictures; return the path of each file.

    Paths in the files are relative to `folder`. Pictures have about the area of a square of side `size_px`. Row i
    depends on seed, task, i and `size_px` alone, so that a longer file begins with the shorter one.
    """
    files = {task: folder / f"{task}.jsonl" for task in tasks}
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for task, make in tasks.items():
        lines = []
        for number in range(rows):
            edit = make(random.Random(f"{seed} {task} {number}"), number, size_px)
            stem = f"images/{task}_{number:04d}"
            target = f"{stem}_target.png"
            sources = [f"{stem}_source_{i}.png" for i in range(1, len(edit.sources) + 1)]
            for path, scene in zip([*sources, target], [*edit.sources, edit.target], strict=True):
                draw(scene).save(folder / path)
            source_image = sources[0] if len(sources) == 1 else sources or None
            row = {"source_image": source_image, "target_image": target} | edit.words
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        files[task].write_text("".join(lines), encoding="utf-8")
    return files
