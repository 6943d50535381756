"""Recipes over made-up rows for the tests of RUN 0, and what it needs to look at them."""

import json
import shutil
from pathlib import Path

import torch
from PIL import ExifTags, Image

from hf_qie import extract
from hf_qie.config.recipe import load_recipe
from hf_qie.extraction.plan import family_of_recipe, make_plan

WIDTH = 96  # of the tiny encoder
SMALL = {"image_sample_size": 64, "source_sample_size": 96, "dtype": "float32", "num_workers": 2}
RED, GREEN, BLUE = (200, 30, 30), (30, 160, 30), (30, 30, 200)


def weightless(model: Path, folder: Path) -> Path:
    """A copy of a checkpoint without its weights: whoever loads a model from it fails."""
    return shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))


def write_recipe(folder: Path, model: Path, tasks: dict[str, list[dict] | Path], **sections) -> Path:
    """A recipe over rows, or a file of rows, by task; sets go to `folder`/sets. JSON is YAML."""
    data = {}
    for name, rows in tasks.items():
        data[name] = {"data": str(rows if isinstance(rows, Path) else folder / f"{name}.jsonl")}
        if not isinstance(rows, Path):
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    section = {"output_dir": str(folder / "sets"), **SMALL, **sections.pop("extract", {})}
    recipe = {"model": str(model), "tasks": data, "extract": section} | sections
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    return folder / "recipe.yaml"


def plans_of(path: Path, folder: Path, *overrides: str) -> tuple[dict, object]:
    """Every task's plan, and the processor."""
    recipe = load_recipe(path, overrides)
    family = family_of_recipe(recipe)
    folder.mkdir(exist_ok=True)
    plans = {name: make_plan(recipe, task, family, folder) for name, task in recipe.tasks.items()}
    return plans, family.load_processor(recipe.model, revision=None)


def few_edits(edits: Path, **numbers: int) -> dict[str, list[dict]]:
    """By task the first rows of the synthetic edits, so many of each, with their files in full."""
    tasks = {}
    for name, number in numbers.items():
        rows = [json.loads(line) for line in (edits / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for row in rows[:number]:
            sources = row["source_image"] or []
            row["source_image"] = [str(edits / path) for path in ([sources] if isinstance(sources, str) else sources)]
            row["target_image"] = str(edits / row["target_image"])
        tasks[name] = rows[:number]
    return tasks


def cut_outs(folder: Path, edits: Path) -> list[dict]:
    """Three rows over one photo: its target has a transparent half, and so has the source of the last row."""
    (row,) = few_edits(edits, edit=1)["edit"]
    for name in ("source_image", "target_image"):
        image = Image.open(row[name][0] if name == "source_image" else row[name]).convert("RGB")
        image.putalpha(255)
        image.paste((200, 0, 0, 0), (0, 0, image.width // 2, image.height))
        image.save(folder / f"{name}.png")
    row |= {"target_image": "target_image.png", "inverse_instruction": None, "inverse_instruction_cn": None}
    rows = [row | {"instruction": f"Cut it out, {word}.", "instruction_cn": word} for word in ("once", "twice")]
    return [*rows, rows[0] | {"source_image": ["source_image.png"]}]


def extract_edits(folder: Path, model: Path, edits: Path) -> None:
    """`folder`/recipe.yaml over a few synthetic edits, and its finished sets."""
    folder.mkdir()
    tasks = few_edits(edits, edit=6, combine=3, text_to_image=3)
    assert extract.main([str(write_recipe(folder, model, tasks))]) == 0


def image_file(path: Path, size=(80, 60), mode="RGB", orientation=None, **more) -> Path:
    image = Image.new(mode, size)
    if orientation:
        image.getexif()[ExifTags.Base.Orientation] = orientation
        more["exif"] = image.getexif()
    image.save(path, **more)
    return path


def columns_of(image: Image.Image, colour: tuple[int, int, int]) -> list[tuple[int, int]]:
    """Ranges of columns, from the left, in which `colour` occurs."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
    there = (pixels == torch.tensor(colour, dtype=torch.uint8)).all(dim=2).any(dim=0).nonzero().flatten().tolist()
    starts = [x for x in there if x - 1 not in there]
    return [(start, next(x for x in there if x >= start and x + 1 not in there)) for start in starts]
