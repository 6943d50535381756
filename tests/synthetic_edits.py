"""Synthetic edits for the tests: one source, several sources, and none, of several aspects and in both languages."""

import math
import random
from dataclasses import replace
from functools import partial

from hf_qie.demo import shapes
from hf_qie.demo.shapes import CAPTIONS, COLOURS, CORNERS, GROUNDS, SHAPES, Edit, Scene, Thing

CORNERS_CN = dict(zip(CORNERS, ("左上角", "右上角", "左下角", "右下角"), strict=True))
ASPECTS = (1.0, 1.0, 1.5, 2 / 3)  # width / height; half of the images are square

Words = tuple[str, str]  # English, Chinese


def named(thing: Thing) -> Words:
    """As in "red circle"; no two things of an image share shape, colour or corner, so that any of these names it."""
    return f"{thing.colour} {thing.shape}", COLOURS[thing.colour][0] + SHAPES[thing.shape][0]


def placed(thing: Thing) -> Words:
    """As in "a red circle in the top left corner"."""
    name, name_cn = named(thing)
    article = "an" if thing.colour == "orange" else "a"
    return f"{article} {name} in the {thing.corner} corner", f"{CORNERS_CN[thing.corner]}的一个{name_cn}"


def ground_of(scene: Scene) -> Words:
    """As in "a white background"."""
    above_cn, below_cn = GROUNDS[scene.above][0], GROUNDS[scene.below][0]
    if scene.above == scene.below:
        return f"a {scene.above} background", f"{above_cn}背景"
    return f"a background that is {scene.above} above and {scene.below} below", f"上{above_cn}下{below_cn}的背景"


def random_scene(rng: random.Random, num_things: int, size_px: int) -> Scene:
    """A scene whose area is about that of a square of side `size_px`; at most four things, for want of corners."""
    kinds, colours, corners = (rng.sample(list(table), num_things) for table in (SHAPES, COLOURS, CORNERS))
    above = rng.choice(list(GROUNDS))
    side = math.sqrt(rng.choice(ASPECTS))
    return Scene(
        above=above,
        below=rng.choice([above, *GROUNDS]),
        things=tuple(
            Thing(shape=shape, colour=colour, corner=corner)
            for shape, colour, corner in zip(kinds, colours, corners, strict=True)
        ),
        size_px=(round(size_px * side), round(size_px / side)),
    )


def describe(before: Scene, after: Scene) -> Words:
    """The instruction that leads from one scene to the other; they differ in one thing, or nothing is left."""
    gone = [thing for thing in before.things if thing not in after.things]
    new = [thing for thing in after.things if thing not in before.things]
    if len(gone) > 1:
        return "Remove every shape.", "去掉所有图形。"
    thing, thing_cn = named((gone or new)[0])
    if not new:
        return f"Remove the {thing}.", f"去掉{thing_cn}。"
    corner, colour = new[0].corner, new[0].colour
    if not gone:
        return f"Add {placed(new[0])[0]}.", f"在{CORNERS_CN[corner]}加一个{thing_cn}。"
    if gone[0].colour != colour:
        return f"Change the {thing} to {colour}.", f"把{thing_cn}改成{COLOURS[colour][0]}。"
    return f"Move the {thing} to the {corner} corner.", f"把{thing_cn}移到{CORNERS_CN[corner]}。"


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
    # a cleared image does not tell what stood there
    back = (None, None) if kind == "clear" else describe(after, before)
    captions = dict(zip(CAPTIONS, (*describe(before, after), *back), strict=True))
    return Edit(sources=(before,), target=after, captions=captions)


def combination(rng: random.Random, number: int, size_px: int) -> Edit:
    """Two or three sources, in turn: the thing of each but the last is put on the ground of the last."""
    num_things = 1 + number % 2
    target = random_scene(rng, num_things, size_px)
    sources = [replace(random_scene(rng, 0, size_px), things=(thing,)) for thing in target.things]
    names, names_cn = zip(*map(named, target.things), strict=True)
    put = " and ".join(f"the {name} of picture {i}" for i, name in enumerate(names, 1))
    put_cn = "和".join(f"图{i}的{name}" for i, name in enumerate(names_cn, 1))
    last = num_things + 1
    captions = {
        "instruction": f"Put {put} in the same place on the background of picture {last}.",
        "instruction_cn": f"把{put_cn}放到图{last}背景的相同位置。",
    }
    return Edit(sources=(*sources, replace(target, things=())), target=target, captions=captions)


def description(rng: random.Random, number: int, size_px: int) -> Edit:
    """No source, text-to-image: one or two things on a ground."""
    scene = random_scene(rng, 1 + number % 2, size_px)
    ground, ground_cn = ground_of(scene)
    things, things_cn = zip(*map(placed, scene.things), strict=True)
    captions = {
        "instruction": f"Draw on {ground}: {' and '.join(things)}.",
        "instruction_cn": f"在{ground_cn}上画{'和'.join(things_cn)}。",
    }
    return Edit(sources=(), target=scene, captions=captions)


TASKS = {"edit": single_edit, "combine": combination, "text_to_image": description}
synthetic_edits = partial(shapes.synthetic_edits, tasks=TASKS, size_px=128)
