"""The demo: a tiny model learns two kinds of edit from scratch, through the scripts that users run.

    python hf_qie/demo/run.py recipes/demo.yaml [key.of.the.recipe=value ...]

Makes a tiny checkpoint and synthetic edits, extracts, trains by the recipe, and edits images that training never saw
with the official pipeline. Leaves in outputs/demo: edits.png (source, before and after training, target, instruction),
loss.png, demo.json (how near the edits come to their targets, and the seconds of each stage).
"""

import json
import logging
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from hf_qie.config.recipe import Recipe, load_recipe
from hf_qie.demo.shapes import Edit, draw, negative, repaint
from hf_qie.plots import Card, labelled_sheet
from hf_qie.runtime.cli import run_script

logger = logging.getLogger("hf_qie.demo.run")

FOLDER = Path("outputs/demo")
IMAGES = 12  # held out; each is edited with three instructions
SHOWN = 2  # images in edits.png
SAMPLING = {"num_inference_steps": 12, "true_cfg_scale": 1.0}  # a third of the time; so small a model needs no more
STAGES = {
    "data": f"hf_qie/demo/tiny.py --kind learner --rows 600 --model {FOLDER}/model --data {FOLDER}/data",
    "extract": "-m accelerate.commands.launch -q hf_qie/extract.py",
    "train": "-m accelerate.commands.launch -q hf_qie/train.py",
}


def main(argv: list[str]) -> None:
    """Run all stages by the recipe and overrides of `argv`; the output of an earlier demo is removed."""
    recipe = load_recipe(argv[0], argv[1:])
    shutil.rmtree(FOLDER, ignore_errors=True)
    seconds: dict[str, float] = {}
    for stage, command in STAGES.items():
        logger.info("demo: %s", stage)
        start = time.monotonic()
        done = subprocess.run([sys.executable, *command.split(), *(argv if stage != "data" else [])], check=False)
        if done.returncode:
            sys.exit(done.returncode)
        seconds[stage] = round(time.monotonic() - start, 1)
    edits = held_out(recipe.extract.image_sample_size)
    before, after = (sampled(recipe, edits, trained=trained) for trained in (False, True))
    sheet(edits[: SHOWN * 3], before, after).save(FOLDER / "edits.png")
    shutil.copy(Path(recipe.training["output_dir"], "loss.png"), FOLDER / "loss.png")
    scores = score(recipe, edits, before, after)
    report = json.dumps({**scores, "held_out_pairs": len(edits), "seconds": seconds}, indent=2)
    (FOLDER / "demo.json").write_text(report + "\n", encoding="utf-8")
    logger.info("%s\n%s", FOLDER / "edits.png", report)


def held_out(size_px: int) -> list[Edit]:
    """`IMAGES` images that training never draws, each with three edits: ground, shape, negative."""
    # the seed decides the image, the number what becomes of it
    lessons = ((repaint, 0), (repaint, 1), (negative, 0))
    return [
        lesson(random.Random(f"held out {i}"), number, size_px) for i in range(IMAGES) for lesson, number in lessons
    ]


def sampled(recipe: Recipe, edits: Sequence[Edit], *, trained: bool) -> list[Image.Image]:
    """The edits as the model makes them, before or after training."""
    from tqdm import tqdm

    from hf_qie.hub.sampler import BASE, Sampler

    sampler = Sampler(recipe, checkpoint=None if trained else BASE)
    sampler.pipeline.set_progress_bar_config(disable=True)  # one bar for all
    bar = tqdm(edits, desc="after training" if trained else "before training", unit="edit", disable=None)
    return [
        sampler(edit.captions["instruction"], images=[draw(edit.sources[0])], seed=i, **SAMPLING)
        for i, edit in enumerate(bar)
    ]


def psnr_db(image: Image.Image, target: Image.Image) -> float:
    """Peak signal-to-noise ratio of one 8-bit image against another of the same size, in dB."""
    difference = np.asarray(image, dtype=np.float64) - np.asarray(target, dtype=np.float64)
    return float(20 * np.log10(255) - 10 * np.log10((difference**2).mean().clip(1e-3)))


def score(
    recipe: Recipe, edits: Sequence[Edit], before: Sequence[Image.Image], after: Sequence[Image.Image]
) -> dict[str, float]:
    """Mean PSNR to the target, in dB, of each way to make it; and how many edits obey their own instruction.

    `share_own_instruction`: of the edits after training, those nearer to their own target than to the targets of the
    other two instructions on the same image.
    """
    sources, targets = [draw(edit.sources[0]) for edit in edits], [draw(edit.target) for edit in edits]
    made = {"copy_source": sources, "before": before, "after": after, "vae": reconstructed(recipe, targets)}
    scores = {
        f"psnr_{name}": round(sum(map(psnr_db, images, targets)) / len(targets), 2) for name, images in made.items()
    }
    own = 0
    for i, image in enumerate(after):
        nearness = [psnr_db(image, target) for target in targets[i - i % 3 : i - i % 3 + 3]]
        own += max(nearness) == nearness[i % 3]
    return scores | {"share_own_instruction": round(own / len(after), 3)}


def reconstructed(recipe: Recipe, images: Sequence[Image.Image]) -> list[Image.Image]:
    """Images through the VAE and back: as near as any edit can come."""
    import torch

    from hf_qie.data.images import to_pixels
    from hf_qie.models.base import read_family

    family = read_family(recipe.model)
    vae = family.load_vae(recipe.model, revision=None, dtype=torch.float32, device=torch.device("cpu"))
    latents = vae([to_pixels(image) for image in images])
    return [vae.decode(one, family.grid_of(image.size)) for one, image in zip(latents, images, strict=True)]


def sheet(edits: Sequence[Edit], before: Sequence[Image.Image], after: Sequence[Image.Image]) -> Image.Image:
    """A card an edit: its instruction, and its images below it."""
    labels, cards = ("source", "before training", "after training", "target"), []
    for edit, *made in zip(edits, before, after, strict=False):
        boxes = list(zip(labels, (draw(edit.sources[0]), *made, draw(edit.target)), strict=True))
        cards.append(Card(heading=edit.captions["instruction"], boxes=boxes))
    return labelled_sheet(cards, title="Edits of images that training never saw", box_px=128, width_px=1300)


if __name__ == "__main__":
    run_script(main)
