"""Extraction with a prompt encoder of 7B and the VAE, both of released shapes and random values.

A row has two captions of 50 tokens and the drop caption, one source of 1024 x 1024 pixels or three, and a target of
512 x 512. Rows go through the chunk writer from files on, as in extract.py. The usual way is what the official
pipeline's `encode_prompt` does: one pass of the whole model, logits included, for each prompt.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLQwenImage
from gpu.cases import Context
from gpu.devices import peak_bytes, reset_peak, shortened, synchronise, traced
from gpu.results import Result, find
from gpu.weights import random_encoders
from PIL import Image
from released import ENCODER
from small_recipes import write_recipe
from transformers import Qwen2_5_VLConfig

from hf_qie.config.recipe import Recipe, load_recipe
from hf_qie.data.images import to_pixels
from hf_qie.demo.tiny import tiny_checkpoint
from hf_qie.extraction.memory import forecast
from hf_qie.extraction.plan import family_of_recipe, make_plan
from hf_qie.extraction.run import CUDNN_LAST, load_models, write_chunks
from hf_qie.extraction.set_writer import SetWriter
from hf_qie.models.prompts import Prompt

PLAIN = "encode"  # the step with extraction's own order of kernels
ROWS = {1: 48, 3: 24}  # by the number of sources
SIDE_PX, SMALL_PX = 1024, 96
CAPTION = " ".join(["Make", *["red"] * 49])  # words that are one token each in the tiny checkpoint's vocabulary
CAPTIONS = [CAPTION, CAPTION.replace("red", "blue")]
KINDS = 4  # of images; files are many
REPEATS = 3


def measure(context: Context, *, step: str, cudnn: bool = False) -> Iterator[Result]:
    """Rows of one source, then of three. `cudnn`: of one, in torch's own order, with cuDNN's attention first."""
    if cudnn:
        os.environ[CUDNN_LAST] = "0"
    model = checkpoint(context.folder / "model", small=context.small)
    for num_sources in [1] if context.small or cudnn else ROWS:
        folder = context.folder / f"sources-{num_sources}"
        recipe = recipe_of(folder, model, num_sources, context)
        with random_encoders(context.device) as made:
            yield from of_recipe(step, recipe, folder, num_sources, context, made)
        made.clear()


def checkpoint(folder: Path, *, small: bool) -> Path:
    """The tiny checkpoint with the configs of the released encoder and VAE, and no weights of them."""
    tiny_checkpoint(folder)
    for path in (*folder.glob("text_encoder/*.safetensors"), *folder.glob("vae/*.safetensors")):
        path.unlink()
    if small:
        return folder
    path = folder / "text_encoder" / "config.json"
    known = json.loads(path.read_text(encoding="utf-8"))
    of_vocabulary = {name: value for name, value in known.items() if name.endswith("_token_id")}
    Qwen2_5_VLConfig(**ENCODER, **of_vocabulary).save_pretrained(path.parent)
    with init_empty_weights():
        AutoencoderKLQwenImage().save_config(folder / "vae")
    return folder


def recipe_of(folder: Path, model: Path, num_sources: int, context: Context) -> Recipe:
    """Rows whose images are files of their own."""
    side = SMALL_PX if context.small else SIDE_PX
    folder.mkdir(parents=True)
    rng = np.random.default_rng(num_sources)
    for kind in range(KINDS):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"kind_{kind}.jpg", quality=90)
    rows = []
    for row in range(2 if context.small else ROWS[num_sources]):
        names = [f"{row}_{place}.jpg" for place in range(num_sources + 1)]
        for place, name in enumerate(names):
            shutil.copyfile(folder / f"kind_{(row + place) % KINDS}.jpg", folder / name)
        *sources, target = (str(folder / name) for name in names)
        captions = dict(zip(("instruction", "instruction_cn"), CAPTIONS, strict=True))
        rows.append({"source_image": sources, "target_image": target, **captions})
    section = {"dtype": "float32", "inverse": False}
    if not context.small:
        section = {"dtype": "bfloat16", "inverse": False, "image_sample_size": 512, "source_sample_size": SIDE_PX}
    return load_recipe(write_recipe(folder, model, {"edit": rows}, extract=section))


def of_recipe(
    step: str, recipe: Recipe, folder: Path, num_sources: int, context: Context, made: dict[str, Any]
) -> Iterator[Result]:
    """Its extraction, then its prompts the usual way."""
    device, named = context.device, f"{num_sources} source{'s' * (num_sources > 1)}"
    family = family_of_recipe(recipe)
    (folder / "rows").mkdir()
    plan = make_plan(recipe, recipe.tasks["edit"], family, folder / "rows")
    dtype = getattr(torch, recipe.extract.dtype)
    models = load_models(recipe, family, dtype=dtype, device=device)
    prompts = prompts_of(family, models.processor, folder, num_sources, recipe.extract.batch_size)
    pixels = [to_pixels(Image.open(folder / "kind_0.jpg"))]
    seconds(lambda: (models.encoder(prompts), models.latents(pixels)), device)  # loads kernels
    writer = SetWriter(plan, {"compat": {}, "data": ""})
    writer.open()
    made["full"].lm_head.to("cpu")  # only the usual way has it
    reset_peak(device)
    started = time.perf_counter()
    with traced(device) as trace:
        write_chunks(writer, lambda: models)
    # from the first kernel to the last, without the first window, which nothing hides
    span = (trace.span_s if device.type == "cuda" else 0) or time.perf_counter() - started
    what = f"{named}: rows/s of extraction"
    beside = {"beside": f"step {PLAIN}", "other": find(context.earlier, PLAIN, what)} if step != PLAIN else {}
    yield Result(step=step, what=what, value=len(plan.rows.table) / span, **beside)
    if device.type == "cuda":
        yield Result(step=step, what=f"{named}: of that time a kernel runs", value=trace.busy_share, least=0.9)
    expected = forecast({"edit": plan}, models.processor, dtype=dtype)
    beside = {"beside": "the forecast", "other": expected.peak / 1e9, "least": 0.9, "most": 1.1}
    yield Result(step=step, what=f"{named}: peak memory", value=peak_bytes(device)[0] / 1e9, unit="GB", **beside)
    of_image = seconds(lambda: models.latents(pixels), device)
    yield Result(step=step, what=f"{named}: the VAE, a source", value=1e3 * of_image, unit="ms")
    made["full"].lm_head.to(device)
    yield from prompts_both_ways(step, named, models.encoder, made["full"], prompts, device)


def prompts_of(family: Any, processor: Any, folder: Path, num_sources: int, count: int) -> list[Prompt]:
    """A batch of prompts over the images of the first rows."""
    kinds = [Image.open(folder / f"kind_{kind % KINDS}.jpg") for kind in range(num_sources)]
    return [family.make_prompt(processor, kinds, [*CAPTIONS, " "]) for _ in range(count)]


def prompts_both_ways(
    step: str, named: str, encoder: Any, full: Any, prompts: Sequence[Prompt], device: torch.device
) -> Iterator[Result]:
    """Prompts of a row by our encoder, in batches, and one by one by the whole model; kernels of attention of both."""
    ways = {"ours": lambda: encoder(prompts), "usual": lambda: one_by_one(full, prompts[0], device)}
    ours, usual = seconds(ways["ours"], device) / len(prompts), seconds(ways["usual"], device)
    beside = {"beside": "one full pass a caption, as the pipeline", "other": 1e3 * usual}
    yield Result(step=step, what=f"{named}: the encoder, prompts of a row", value=1e3 * ours, unit="ms", **beside)
    for name, way in ways.items():
        with traced(device) as trace:
            way()
        kernels = shortened(trace.attention[:2]) or "none by name"
        yield Result(step=step, what=f"{named}: kernels of attention, {name}", value=kernels)


@torch.no_grad()
def one_by_one(full: Any, prompt: Prompt, device: torch.device) -> None:
    """diffusers/pipelines/qwenimage/pipeline_qwenimage_edit_plus.py, `_get_qwen_prompt_embeds`, with token types."""
    for branch in prompt.branches:
        ids = torch.tensor([[*prompt.shared, *branch]])
        types = (ids == full.config.image_token_id).int()
        vision = {name: value.to(device) for name, value in prompt.vision.items()}
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types}
        full(**{name: value.to(device) for name, value in given.items()}, **vision, output_hidden_states=True)


def seconds(work: Any, device: torch.device) -> float:
    """Of a call, after one that warms up."""
    work()
    synchronise(device)
    started = time.perf_counter()
    for _ in range(REPEATS):
        work()
    synchronise(device)
    return (time.perf_counter() - started) / REPEATS
