"""Sampling gives what the official pipeline gives once its encoder gets 3-D positions, with what was trained in it.

Latents to 1e-4: prompt embeddings differ by 1e-6 in float32, as one pass serves two captions; guidance multiplies it.
"""

import asyncio
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from accelerate import PartialState
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit_v1
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit_plus
from embedding_sets import write_recipe
from PIL import Image
from safetensors.torch import load_file, save_file
from small_recipes import weightless

from hf_qie.config.recipe import load_recipe
from hf_qie.data.images import read_image
from hf_qie.errors import InputError
from hf_qie.hub.sampler import Sampler
from hf_qie.models.qwen_image.family import EDIT_PLUS
from hf_qie.models.qwen_image.pipeline import hand_token_types_through, sources_at
from hf_qie.sampling import main
from hf_qie.train import train
from hf_qie.training.model import LORA_FILE
from hf_qie.training.sets import open_sets

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
INSTRUCTION = "Make the sky red and keep the boat."
QUICK = {"seed": 3, "num_inference_steps": 2}
SIDE_PX = 96  # 1024, the pipeline's own, takes a minute and says no more
SMALL = ["extract.dtype=float32", f"extract.image_sample_size={SIDE_PX}"]
SMALL_SOURCES = f"extract.source_sample_size={SIDE_PX}"
LORA = {"lora": {"rank": 4, "alpha": 8, "target_modules": "all-linear"}}


@pytest.fixture(scope="module")
def image_paths(photos) -> list[Path]:
    """Photos of different shapes."""
    return [photos / "images" / f"source_{i:02d}.jpg" for i in (1, 2, 4)]


@pytest.fixture(scope="module")
def runs(built_once, tiny) -> Path:
    """A folder with a run of each kind, `lora` and `full`: its recipe, and what it trained in `run`."""

    def build(folder: Path) -> None:
        PartialState(cpu=True)
        for kind, trainable in (("lora", LORA), ("full", {})):
            (folder / kind).mkdir(parents=True)
            training = {"max_steps": 2, "save_steps": 1, "learning_rate": 1e-2}
            recipe = load_recipe(write_recipe(folder / kind, tiny(), trainable=trainable, training=training))
            train(recipe, open_sets(recipe))

    return built_once("runs_to_sample", build)


@pytest.fixture
def recipe_of(tmp_path):
    """`recipe_of(model, *overrides)` -> a small recipe of a checkpoint, on which nothing was trained."""

    def make(model: Path, *overrides: str):
        text = {"model": str(model), "tasks": {"edit": {"data": "edit.jsonl"}}}
        (tmp_path / "recipe.yaml").write_text(json.dumps(text))
        output_dir = f"training.output_dir={tmp_path / 'run'}"
        return load_recipe(tmp_path / "recipe.yaml", [*SMALL, output_dir, *overrides])

    return make


@contextmanager
def decoded(pipeline) -> Iterator[list[torch.Tensor]]:
    """What the VAE of a pipeline is given to decode."""
    decode, seen = pipeline.vae.decode, []
    pipeline.vae.decode = lambda latents, **kwargs: seen.append(latents) or decode(latents, **kwargs)
    try:
        yield seen
    finally:
        del pipeline.vae.decode


def official(pipeline, sampler: Sampler, images: list[Path]) -> tuple[torch.Tensor, Image.Image]:
    """The latents and the image that a pipeline makes by itself at the sampler's sizes, as QUICK says."""
    opened = [read_image(path) for path in images]
    width, height = sampler.size(opened)
    if images:
        hand_token_types_through(pipeline, torch.device("cpu"))
        single = isinstance(pipeline, diffusers.QwenImageEditPipeline)
        options = {"image": opened[0] if single else opened}
    else:
        options = {}
    options |= {"height": height, "width": width, "negative_prompt": " ", "true_cfg_scale": 4.0}
    options |= {"num_inference_steps": QUICK["num_inference_steps"]}
    with decoded(pipeline) as latents, sources_at(sampler.family.vae_area_px):
        made = pipeline(prompt=INSTRUCTION, generator=torch.Generator().manual_seed(QUICK["seed"]), **options)
    return latents[0], made.images[0]


def ours(sampler: Sampler, images: list[Path], **options) -> tuple[torch.Tensor, Image.Image]:
    with decoded(sampler.pipeline) as latents:
        image = sampler(INSTRUCTION, images=images, **QUICK | options)
    return latents[0], image


def hold(one: tuple[torch.Tensor, Image.Image], other: tuple[torch.Tensor, Image.Image]) -> None:
    torch.testing.assert_close(one[0], other[0], **CLOSE)
    levels = np.abs(np.asarray(one[1], dtype=int) - np.asarray(other[1], dtype=int))
    assert levels.max() <= 1


# --- the official pipeline -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "num_sources"), [("edit_plus", 1), ("edit_plus", 2), ("edit_plus_2511", 2)])
def test_edits_equal_the_official_pipelines(tiny, recipe_of, image_paths, kind, num_sources):
    sampler, images = Sampler(recipe_of(tiny(kind), SMALL_SOURCES), checkpoint="base"), image_paths[:num_sources]
    stock = diffusers.DiffusionPipeline.from_pretrained(tiny(kind), dtype=torch.float32)
    mine = ours(sampler, images)
    assert type(sampler.pipeline) is type(stock) is diffusers.QwenImageEditPlusPipeline
    hold(mine, official(stock, sampler, images))


def test_all_images_are_edited_where_encoder_and_vae_see_one_size(tiny, recipe_of, image_paths, monkeypatch):
    """As with `extract.source_sample_size: 384`, the encoder's own; at a smaller one."""
    monkeypatch.setattr(edit_plus, "CONDITION_IMAGE_SIZE", SIDE_PX**2)
    sampler = Sampler(recipe_of(tiny(), SMALL_SOURCES), checkpoint="base")
    sampler.family = replace(sampler.family, vlm_area_px=SIDE_PX**2)
    stock = diffusers.DiffusionPipeline.from_pretrained(tiny(), dtype=torch.float32)
    hold(ours(sampler, image_paths[:2]), official(stock, sampler, image_paths[:2]))


def test_edit_v1_equals_the_official_pipeline(tiny, recipe_of, image_paths, monkeypatch):
    """At a smaller area than it is built for: 1024 x 1024 says no more and takes a minute."""
    monkeypatch.setattr(
        edit_v1, "calculate_dimensions", lambda _, ratio: (*EDIT_PLUS.fit((ratio, 1), SIDE_PX**2), None)
    )
    sampler = Sampler(recipe_of(tiny("edit")), checkpoint="base")
    sampler.family = replace(sampler.family, vlm_area_px=SIDE_PX**2, vae_area_px=SIDE_PX**2)
    stock = diffusers.DiffusionPipeline.from_pretrained(tiny("edit"), dtype=torch.float32)
    mine = ours(sampler, image_paths[:1])
    assert type(sampler.pipeline) is type(stock) is diffusers.QwenImageEditPipeline
    hold(mine, official(stock, sampler, image_paths[:1]))


@pytest.mark.parametrize("kind", ["text_to_image", "edit_plus"])
def test_text_to_image_equals_the_official_pipeline(tiny, recipe_of, kind):
    sampler = Sampler(recipe_of(tiny(kind)), checkpoint="base")
    stock = diffusers.DiffusionPipeline.from_pretrained(tiny(kind), dtype=torch.float32)
    parts = {name: part for name, part in stock.components.items() if name != "processor"}
    hold(ours(sampler, []), official(diffusers.QwenImagePipeline(**parts), sampler, []))


def test_without_3d_positions_the_edit_is_another(tiny, recipe_of, image_paths, monkeypatch):
    sampler = Sampler(recipe_of(tiny(), SMALL_SOURCES), checkpoint="base")
    stock = diffusers.DiffusionPipeline.from_pretrained(tiny(), dtype=torch.float32)
    monkeypatch.setitem(globals(), "hand_token_types_through", lambda pipeline, device: None)
    latents, _ = official(stock, sampler, image_paths[:2])
    assert (latents - ours(sampler, image_paths[:2])[0]).abs().max() > 0.01  # a hundred times the tolerance


def test_it_takes_the_pipelines_own_steps_and_its_guidance(tiny, recipe_of):
    sampler = Sampler(recipe_of(tiny("text_to_image"), "extract.image_sample_size=64"), checkpoint="base")
    parameters = inspect.signature(sampler.pipeline.__call__).parameters
    sampler("A red boat")
    assert len(sampler.pipeline.scheduler.timesteps) == parameters["num_inference_steps"].default
    assert parameters["true_cfg_scale"].default == 4.0


def test_without_guidance_the_negative_prompt_counts_for_nothing(tiny, recipe_of):
    sampler = Sampler(recipe_of(tiny("text_to_image")), checkpoint="base")
    embeddings = sampler.embed(INSTRUCTION, [])
    other = replace(embeddings, texts=[embeddings.texts[0], embeddings.texts[0] + 1])
    plain, same, guided = (
        sampler.generate(given, [], **QUICK, true_cfg_scale=scale).tobytes()
        for given, scale in ((embeddings, 1.0), (other, 1.0), (embeddings, 4.0))
    )
    assert plain == same != guided


def test_an_image_is_a_function_of_its_seed(tiny, recipe_of, image_paths):
    sampler = Sampler(recipe_of(tiny(), SMALL_SOURCES), checkpoint="base")
    first, again, other = (
        sampler(INSTRUCTION, images=image_paths[:1], num_inference_steps=2, seed=seed).tobytes() for seed in (3, 3, 4)
    )
    assert first == again != other


# --- sizes -----------------------------------------------------------------------------------------------------------


def test_the_image_has_the_size_of_training_and_at_1024_the_pipelines_own(tiny, recipe_of, image_paths):
    images = [read_image(path) for path in image_paths]
    for side_px in (512, 1024):
        sampler = Sampler(recipe_of(tiny(), f"extract.image_sample_size={side_px}"), checkpoint="base")
        ratio = images[-1].width / images[-1].height
        assert sampler.size(images) == edit_plus.calculate_dimensions(side_px**2, ratio)
        assert sampler.size([]) == (side_px, side_px)


def test_the_pipelines_constant_is_that_of_training_for_the_call_alone(tiny, recipe_of, image_paths, monkeypatch):
    sampler, stock = Sampler(recipe_of(tiny(), SMALL_SOURCES), checkpoint="base"), edit_plus.VAE_IMAGE_SIZE
    encode, shown = sampler.pipeline.vae.encode, []

    def encode_or_break(pixels):
        shown.append((pixels.shape[-2:], edit_plus.VAE_IMAGE_SIZE))
        if len(shown) > 1:
            raise RuntimeError("the second breaks")
        return encode(pixels)

    monkeypatch.setattr(sampler.pipeline.vae, "encode", encode_or_break)
    image = read_image(image_paths[0])
    sampler(INSTRUCTION, images=[image], **QUICK)
    assert edit_plus.VAE_IMAGE_SIZE == stock == 1024**2
    with pytest.raises(RuntimeError, match="the second breaks"):
        sampler(INSTRUCTION, images=[image], **QUICK)
    assert stock == edit_plus.VAE_IMAGE_SIZE
    assert shown == [(torch.Size(EDIT_PLUS.fit(image.size, SIDE_PX**2)[::-1]), SIDE_PX**2)] * 2


def test_edit_v1_allows_no_other_size_of_sources(tiny, recipe_of):
    with pytest.raises(InputError, match=r"extract\.source_sample_size: 96: QwenImageEditPipeline hands one image"):
        Sampler(recipe_of(tiny("edit"), SMALL_SOURCES), checkpoint="base")


# --- what was trained ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_what_was_trained_moves_the_image_as_in_the_official_pipeline(runs, tiny, image_paths, kind):
    recipe = load_recipe(runs / kind / "recipe.yaml", [*SMALL, SMALL_SOURCES])
    sampler = Sampler(recipe)
    mine = ours(sampler, image_paths[:1])
    before, _ = ours(Sampler(recipe, checkpoint="base"), image_paths[:1])
    assert (mine[0] - before).abs().max() > 0.01
    stock = diffusers.DiffusionPipeline.from_pretrained(tiny(), dtype=torch.float32)
    if kind == "lora":
        stock.load_lora_weights(runs / kind / "run")
    else:
        stock.transformer = stock.transformer.from_pretrained(runs / kind / "run", subfolder="transformer")
    hold(mine, official(stock, sampler, image_paths[:1]))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_every_way_to_name_what_was_trained_finds_it(runs, tmp_path, kind):
    recipe, run = load_recipe(runs / kind / "recipe.yaml", SMALL), runs / kind / "run"
    shutil.copytree(run / "checkpoint-2", tmp_path / "interrupted" / "checkpoint-2")
    shutil.copy(run / "recipe.yaml", tmp_path / "interrupted")
    own = run / (LORA_FILE if kind == "lora" else "transformer")
    names = [run, run / "checkpoint-2", own, tmp_path / "interrupted"]
    made = {Sampler(recipe, checkpoint=name)("A red boat", **QUICK).tobytes() for name in names}
    assert made == {Sampler(recipe)("A red boat", **QUICK).tobytes()}
    assert made.isdisjoint({Sampler(recipe, checkpoint=run / "checkpoint-1")("A red boat", **QUICK).tobytes()})


def test_a_sampler_may_be_called_from_a_notebook(tiny, recipe_of):
    async def cell():
        return Sampler(recipe_of(tiny("text_to_image"), "extract.image_sample_size=64"), checkpoint="base")(
            "A", **QUICK
        )

    assert asyncio.run(cell()).size == (64, 64)


@pytest.mark.parametrize("kind", ["edit_plus", "qwen_image_21"])
def test_embeddings_that_are_there_already_give_the_same(tiny, recipe_of, image_paths, kind):
    recipe = recipe_of(tiny(kind), SMALL_SOURCES)
    sampler = Sampler(recipe, checkpoint="base")
    images = sampler.read(image_paths[:1])
    embeddings = sampler.embed(INSTRUCTION, images)
    stored = replace(embeddings, shared=embeddings.shared.clone(), texts=[text.clone() for text in embeddings.texts])
    other = Sampler(recipe, checkpoint="base")
    assert other.generate(stored, images, **QUICK).tobytes() == sampler(INSTRUCTION, images=images, **QUICK).tobytes()
    assert "encoder" not in vars(other)


# --- what people get wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "instruction", "num_images", "message"),
    [
        ("edit_plus", "  ", 1, "--instruction: is blank; describe the edit"),
        (
            "edit_plus",
            "<|image_pad|>",
            1,
            "the caption holds <|image_pad|>, which stands for an image",
        ),
        ("text_to_image", "word " * 2000, 0, "at most 1024 can be placed"),
        ("edit", INSTRUCTION, 2, "--image: 2 of them, but QwenImageEditPipeline takes 1"),
        ("text_to_image", INSTRUCTION, 1, "--image: 1 of them, but QwenImagePipeline takes none"),
    ],
)
def test_what_the_pipeline_cannot_take_is_told_before_a_model_loads(
    tiny, recipe_of, image_paths, tmp_path, kind, instruction, num_images, message
):
    recipe = recipe_of(weightless(tiny(kind), tmp_path / "weightless"))
    with pytest.raises(InputError) as error:
        Sampler(recipe, checkpoint="base")(instruction, images=image_paths[:num_images])
    assert message in str(error.value)


def test_an_image_that_cannot_be_read_is_named(tiny, recipe_of, tmp_path):
    (tmp_path / "page.png").write_text("<html>not found</html>")
    sampler = Sampler(recipe_of(weightless(tiny(), tmp_path / "weightless")), checkpoint="base")
    with pytest.raises(InputError, match=r"--image: \S+page.png: cannot read the image .* it begins with '<html>"):
        sampler(INSTRUCTION, images=[tmp_path / "page.png"])


def test_a_folder_in_which_nothing_was_trained_is_refused(tiny, recipe_of, tmp_path):
    with pytest.raises(InputError, match=r"--checkpoint: \S+/run not found; train first"):
        Sampler(recipe_of(tiny()))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"\S+/empty has no pytorch_lora_weights.safetensors and no folder"):
        Sampler(recipe_of(tiny()), checkpoint=tmp_path / "empty")


def test_a_lora_that_is_not_of_this_model_is_refused(runs, tiny, recipe_of, tmp_path):
    tensors = load_file(runs / "lora" / "run" / LORA_FILE)
    save_file(
        {name.replace("attn", "attn1"): tensor for name, tensor in tensors.items()}, tmp_path / "flux.safetensors"
    )
    with pytest.raises(InputError, match=r"--checkpoint: \S+flux.safetensors: of its \d+ tensors diffusers has"):
        Sampler(recipe_of(tiny()), checkpoint=tmp_path / "flux.safetensors")("A red boat", **QUICK)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"num_inference_steps": 1}, "num_inference_steps: got 1, expected an integer of at least 2"),
        ({"num_inference_steps": 0}, "num_inference_steps: got 0, expected an integer of at least 2"),
        ({"num_inference_steps": -1}, "num_inference_steps: got -1, expected an integer of at least 2"),
        ({"true_cfg_scale": float("nan")}, "true_cfg_scale: got NaN, expected a number of at least 0"),
        ({"true_cfg_scale": "4"}, 'true_cfg_scale: got "4", expected a number of at least 0'),
        ({"seed": 2**64}, "seed: got 18446744073709551616, expected an integer from 0 to 4294967295"),
        ({"sead": 1}, "sead: unknown key, did you mean 'seed'?"),
    ],
)
def test_numbers_that_the_pipeline_cannot_take_are_told_before_a_model_loads(
    tiny, recipe_of, tmp_path, image_paths, options, told
):
    sampler = Sampler(recipe_of(weightless(tiny(), tmp_path / "weightless")), checkpoint="base")
    with pytest.raises(InputError, match=rf"^{re.escape(told)}"):
        sampler(INSTRUCTION, images=image_paths[:1], **options)
    with pytest.raises(InputError, match=rf"^{re.escape(told)}"):
        sampler.generate(None, [], **options)


@pytest.mark.parametrize("output", ["out", "out.txt", "out.psd", "out.xbm", "missing/out.png"])
def test_an_output_that_could_not_be_saved_is_told_first(tiny, recipe_of, tmp_path, output):
    recipe = recipe_of(weightless(tiny(), tmp_path / "weightless"))
    with pytest.raises(InputError, match="--output: "):
        main([str(recipe.path), "--instruction", "x", "--output", str(tmp_path / output), "--checkpoint", "base"])


# --- the script ------------------------------------------------------------------------------------------------------


def start(root: Path, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, root / "hf_qie" / "sampling.py", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([str(p) for p in command], capture_output=True, text=True, env=environment, timeout=240)


def test_the_script_edits_two_images(root, runs, image_paths, tmp_path):
    recipe = runs / "lora" / "recipe.yaml"
    images = [part for path in image_paths[:2] for part in ("--image", path)]
    more = ["--instruction", INSTRUCTION, "--output", tmp_path / "out.png", "--seed", 3, "--num_inference_steps", 2]
    done = start(root, recipe, *SMALL, SMALL_SOURCES, *images, *more)
    assert done.returncode == 0, done.stderr
    sampler = Sampler(load_recipe(recipe, [*SMALL, SMALL_SOURCES]))
    with Image.open(tmp_path / "out.png") as made:
        assert made.tobytes() == sampler(INSTRUCTION, images=image_paths[:2], **QUICK).tobytes()
    assert f"INFO hf_qie.sampling: saved: {tmp_path / 'out.png'}\n" in done.stderr


def test_help_is_the_docstring_and_waits_for_no_library(root):
    done = start(root, "--help")
    assert done.returncode == 0
    assert "python hf_qie/sampling.py recipe.yaml" in done.stdout
    code = "import sys, hf_qie.sampling; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
