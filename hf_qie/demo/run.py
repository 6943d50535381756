"""The demo: a tiny model learns edits from scratch, through the very scripts that users run, and a picture shows it.

    python hf_qie/demo/run.py recipes/demo.yaml [key.of.the.recipe=value ...]

Makes a tiny checkpoint and synthetic edits, extracts, trains by the recipe, and edits pictures that training never
saw, with the official pipeline. Leaves in outputs/demo: edits.png (source, instruction, before and after training,
target), loss.png, demo.json (how near the edits come to their targets, and the seconds of each stage).
"""

import json
import logging
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hf_qie.config.recipe import load_recipe
from hf_qie.runtime.cli import run_script

if TYPE_CHECKING:
    from PIL import Image

    from hf_qie.config.recipe import Recipe
    from hf_qie.demo.shapes import Edit

logger = logging.getLogger("hf_qie.demo.run")

FOLDER = Path("outputs/demo")
ROWS = 600  # a task
PICTURES = 12  # held out; each is edited with three instructions
SHOWN = 2  # pictures in the grid
SAMPLING = {"num_inference_steps": 12, "true_cfg_scale": 1.0}  # a third of the time; so small a model needs no more
STAGES = {
    "data": f"hf_qie/demo/tiny.py --kind learner --rows {ROWS} --model {FOLDER}/model --data {FOLDER}/data",
    "extract": "-m accelerate.commands.launch -q hf_qie/extract.py",
    "train": "-m accelerate.commands.launch -q hf_qie/train.py",
}
HEADS = ("source", "instruction", "before training", "after training", "target")
# px
CELL, GAP, TEXT = 128, 12, 15


def main(argv: list[str]) -> None:
    """Run all stages by the recipe `argv[0]` with the overrides `argv[1:]`; what an earlier demo left is removed."""
    recipe = load_recipe(argv[0], argv[1:])
    shutil.rmtree(FOLDER, ignore_errors=True)
    seconds: dict[str, float] = {}
    for stage, command in STAGES.items():
        with timed(stage, seconds):
            words = [] if stage == "data" else argv
            done = subprocess.run([sys.executable, *command.split(), *words], check=False)
        if done.returncode:
            sys.exit(done.returncode)
    with timed("sample", seconds):
        edits = held_out(recipe.extract.image_sample_size)
        before, after = (sampled(recipe, edits, trained=trained) for trained in (False, True))
        scores = score(recipe, edits, before, after)
    grid(edits[: SHOWN * 3], before, after).save(FOLDER / "edits.png")
    shutil.copy(Path(recipe.training["output_dir"], "loss.png"), FOLDER / "loss.png")
    told = {**scores, "held_out_pairs": len(edits), "seconds": {stage: round(s, 1) for stage, s in seconds.items()}}
    (FOLDER / "demo.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    logger.info("%s\n%s", FOLDER / "edits.png", json.dumps(told, indent=2))


@contextmanager
def timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    """Note how long a stage took."""
    logger.info("demo: %s", stage)
    start = time.monotonic()
    yield
    seconds[stage] = time.monotonic() - start


def held_out(size_px: int) -> list["Edit"]:
    """`PICTURES` pictures that training never draws, each with three edits: ground, shape, negative."""
    from hf_qie.demo.shapes import negative, repaint

    edits = []
    for i in range(PICTURES):
        # the seed decides the picture, the number what becomes of it
        lessons = ((repaint, 0), (repaint, 1), (negative, 0))
        edits += [lesson(random.Random(f"held out {i}"), number, size_px) for lesson, number in lessons]
    return edits


def sampled(recipe: "Recipe", edits: Sequence["Edit"], *, trained: bool) -> list["Image.Image"]:
    """The edits as the model makes them, before or after training."""
    from tqdm import tqdm

    from hf_qie.demo.shapes import draw
    from hf_qie.sampling import BASE, Sampler

    sampler = Sampler(recipe, checkpoint=None if trained else BASE)
    sampler.pipeline.set_progress_bar_config(disable=True)  # one bar for all
    name = "after training" if trained else "before training"
    return [
        sampler(edit.words["instruction"], images=[draw(edit.sources[0])], seed=i, **SAMPLING)
        for i, edit in enumerate(tqdm(edits, desc=name, unit="edit", disable=None))
    ]


def psnr_db(image: "Image.Image", target: "Image.Image") -> float:
    """Peak signal-to-noise ratio of one 8-bit picture against another of the same size, in dB."""
    import numpy as np

    difference = np.asarray(image, dtype=np.float64) - np.asarray(target, dtype=np.float64)
    return float(20 * np.log10(255) - 10 * np.log10((difference**2).mean().clip(1e-3)))


def score(
    recipe: "Recipe", edits: Sequence["Edit"], before: Sequence["Image.Image"], after: Sequence["Image.Image"]
) -> dict[str, float]:
    """Mean PSNR to the target, in dB, of each way to make it; and how many edits obey their own instruction.

    `share_own_instruction`: of the edits after training, those nearer to their own target than to the targets of the
    other two instructions on the same picture.
    """
    from hf_qie.demo.shapes import draw

    targets = [draw(edit.target) for edit in edits]
    made = {
        "copy_source": [draw(edit.sources[0]) for edit in edits],
        "before": before,
        "after": after,
        "vae": reconstructed(recipe, targets),
    }
    scores = {
        f"psnr_{name}": round(sum(map(psnr_db, images, targets)) / len(targets), 2) for name, images in made.items()
    }
    own = 0
    for i, image in enumerate(after):
        first = i - i % 3
        nearness = [psnr_db(image, target) for target in targets[first : first + 3]]
        own += max(nearness) == nearness[i - first]
    return scores | {"share_own_instruction": round(own / len(after), 3)}


def reconstructed(recipe: "Recipe", images: Sequence["Image.Image"]) -> list["Image.Image"]:
    """Pictures through the VAE and back: as near as any edit can come."""
    import torch
    from diffusers import AutoencoderKLQwenImage
    from diffusers.image_processor import VaeImageProcessor

    vae = AutoencoderKLQwenImage.from_pretrained(recipe.model, subfolder="vae", use_safetensors=True)
    processor = VaeImageProcessor()
    with torch.inference_mode():
        pixels = processor.preprocess(list(images))
        decoded = vae.decode(vae.encode(pixels[:, :, None]).latent_dist.mode()).sample[:, :, 0]
    return processor.postprocess(decoded)


def grid(edits: Sequence["Edit"], before: Sequence["Image.Image"], after: Sequence["Image.Image"]) -> "Image.Image":
    """A line an edit, under `HEADS`."""
    from PIL import Image, ImageDraw

    from hf_qie.demo.shapes import draw
    from hf_qie.plots import write

    step, head = CELL + GAP, GAP + 2 * TEXT
    sheet = Image.new("RGB", (GAP + len(HEADS) * step, head + len(edits) * step), "white")
    pen = ImageDraw.Draw(sheet)
    for column, name in enumerate(HEADS):
        write(pen, (GAP + column * step, GAP), name, TEXT, "#1c1c1e")
    for line, edit in enumerate(edits):
        top = head + line * step
        pictures = {0: draw(edit.sources[0]), 2: before[line], 3: after[line], 4: draw(edit.target)}
        for column, picture in pictures.items():
            sheet.paste(picture.resize((CELL, CELL), Image.Resampling.LANCZOS), (GAP + column * step, top))
        words = edit.words["instruction"].split()
        for number, start in enumerate(range(0, len(words), 2)):  # two words a line fit the cell
            corner = (GAP + step, top + CELL // 3 + number * (TEXT + 4))
            write(pen, corner, " ".join(words[start : start + 2]), TEXT, "#1c1c1e")
    return sheet


if __name__ == "__main__":
    run_script(main)
