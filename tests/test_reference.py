"""Prompt states, latents and the images behind them equal the official pipelines', on the same weights in float32.

Tolerance 1e-5 on states of order 1: sharing a pass changes the order of float32 sums, which moves them by about 2e-6.
"""

import inspect
from contextlib import contextmanager

import diffusers
import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit_plus

from hf_qie.data.images import read_image, to_pixels
from hf_qie.models.base import read_family
from hf_qie.models.qwen_image.family import EDIT_PLUS
from hf_qie.models.qwen_image.text_encoder import Encoder
from hf_qie.models.qwen_image.vae import LatentEncoder
from hf_qie.models.templates import make_prompt

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
CAPTIONS = ["Make the sky red and keep the boat.", "把天空变成红色，保留小船。", " "]
CPU = {"revision": None, "dtype": torch.float32, "device": torch.device("cpu")}


@pytest.fixture(scope="session")
def ours(tiny):
    """Family, processor and encoder of a checkpoint kind."""

    def load(kind):
        family = read_family(str(tiny(kind)))
        return family, family.load_processor(str(tiny(kind)), revision=None), Encoder(str(tiny(kind)), **CPU)

    return load


@pytest.fixture(scope="session")
def official(tiny):
    """The official pipeline of a checkpoint kind, as `from_pretrained` gives it."""
    return lambda kind: diffusers.DiffusionPipeline.from_pretrained(tiny(kind), dtype=torch.float32)


@pytest.fixture(scope="session")
def photo_images(photos):
    """Photos of different shapes."""
    images = [read_image(photos / "images" / f"source_{i:02d}.jpg") for i in range(1, 11)]
    by_shape = {image.size: image for image in images}
    assert len(by_shape) >= 3
    return list(by_shape.values())[:3]


@contextmanager
def token_types_handed_through(pipeline):
    """What the pipelines lack: the processor's `mm_token_type_ids` reach the encoder."""
    processor, forward, types = pipeline.processor, pipeline.text_encoder.forward, {}

    def process(*args, **kwargs):
        outputs = processor(*args, **kwargs)
        types["mm_token_type_ids"] = outputs["mm_token_type_ids"]
        return outputs

    assert "mm_token_type_ids" not in inspect.getsource(type(pipeline)._get_qwen_prompt_embeds)
    pipeline.processor = process
    pipeline.text_encoder.forward = lambda **kwargs: forward(**kwargs, **types)
    try:
        yield
    finally:
        pipeline.processor, pipeline.text_encoder.forward = processor, forward


@torch.no_grad()
def official_states(pipeline, caption, images):
    """The pipeline's own states `[L, D]` of one caption."""
    if not images:
        states, _ = pipeline._get_qwen_prompt_embeds(caption)
    elif isinstance(pipeline, diffusers.QwenImageEditPlusPipeline):
        states, _ = pipeline._get_qwen_prompt_embeds(caption, images)
    else:
        states, _ = pipeline._get_qwen_prompt_embeds(caption, images[0])
    return states[0]


def our_states(encoder, prompts):
    """Our states `[L, D]`, by prompt and caption."""
    return [[torch.cat([states.shared, text]) for text in states.texts] for states in encoder(prompts)]


def encoder_views(family, images):
    """The images as the encoder sees them."""
    return [EDIT_PLUS.resize(image, EDIT_PLUS.fit(image.size, family.vlm_area_px)) for image in images]


@pytest.mark.parametrize(
    ("kind", "num_sources"), [("edit_plus", 1), ("edit_plus", 2), ("edit_plus", 3), ("edit_plus_2511", 2), ("edit", 1)]
)
def test_states_of_edits_equal_the_pipelines(ours, official, photo_images, kind, num_sources):
    (family, processor, encoder), pipeline = ours(kind), official(kind)
    images = encoder_views(family, photo_images[-num_sources:])
    (states,) = our_states(encoder, [make_prompt(processor, family.edit, images, CAPTIONS)])
    with token_types_handed_through(pipeline):
        for caption, mine in zip(CAPTIONS, states, strict=True):
            torch.testing.assert_close(mine, official_states(pipeline, caption, images), **CLOSE)


def test_without_token_types_the_states_are_others(ours, official, photo_images):
    (family, processor, encoder), pipeline = ours("edit_plus"), official("edit_plus")
    images = encoder_views(family, photo_images[:2])
    ((mine,),) = our_states(encoder, [make_prompt(processor, family.edit, images, CAPTIONS[:1])])
    theirs = official_states(pipeline, CAPTIONS[0], images)
    assert (mine - theirs).abs().max() > 0.01  # a thousand times the tolerance: the tests above would fail


@pytest.mark.parametrize("kind", ["text_to_image", "edit_plus"])
@pytest.mark.parametrize("captions", [CAPTIONS, ["\nA line break first", "  two blanks, then words", "\n\n"]])
def test_states_of_text_to_image_equal_the_pipelines(ours, official, kind, captions):
    (family, processor, encoder), pipeline = ours(kind), official(kind)
    if kind == "edit_plus":  # its text-to-image rows are those of QwenImagePipeline
        parts = ("scheduler", "vae", "text_encoder", "tokenizer", "transformer")
        pipeline = diffusers.QwenImagePipeline(**{name: getattr(pipeline, name) for name in parts})
    prompt = make_prompt(processor, family.text_to_image, [], captions)
    (states,) = our_states(encoder, [prompt])
    for caption, mine in zip(captions, states, strict=True):
        torch.testing.assert_close(mine, official_states(pipeline, caption, []), **CLOSE)
    assert encoder([prompt])[0].shared.shape[0] == 0


def test_a_batch_of_unequal_lengths_equals_single_rows(ours, photo_images):
    family, processor, encoder = ours("edit_plus")
    prompts = [
        make_prompt(processor, family.edit, encoder_views(family, photo_images), ["word " * 300, "x"]),
        make_prompt(processor, family.text_to_image, [], ["a red boat"]),
        make_prompt(processor, family.edit, encoder_views(family, photo_images[:1]), CAPTIONS),
    ]
    together = our_states(encoder, prompts)
    for prompt, states in zip(prompts, together, strict=True):
        (alone,) = our_states(encoder, [prompt])
        for a, b in zip(states, alone, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


def test_a_caption_does_not_depend_on_its_fellows(ours, photo_images):
    family, processor, encoder = ours("edit_plus")
    images = encoder_views(family, photo_images[:2])
    (together,) = our_states(encoder, [make_prompt(processor, family.edit, images, CAPTIONS)])
    for caption, states in zip(CAPTIONS, together, strict=True):
        ((alone,),) = our_states(encoder, [make_prompt(processor, family.edit, images, [caption])])
        torch.testing.assert_close(states, alone, **CLOSE)


def test_states_change_with_each_source_and_with_their_order(ours, photo_images):
    family, processor, encoder = ours("edit_plus")
    a, b, c = encoder_views(family, photo_images)

    def states(*images):
        return our_states(encoder, [make_prompt(processor, family.edit, images, CAPTIONS[:1])])[0][0]

    reference = states(a, b)
    others = [states(b, a), states(a, EDIT_PLUS.resize(c, b.size)), states(EDIT_PLUS.resize(c, a.size), b)]
    for other in others:  # the caption's last tokens see all sources
        assert (reference[-5:] - other[-5:]).abs().max() > 1e-3


class Reached(Exception):
    """Raised where a test has seen enough of a pipeline call."""


def call(pipeline, images, **kwargs):
    """Call an edit pipeline on one or several images until a patched part raises Reached."""
    image = images if isinstance(pipeline, diffusers.QwenImageEditPlusPipeline) else images[0]
    with pytest.raises(Reached):
        pipeline(image=image, prompt=CAPTIONS[0], num_inference_steps=2, **kwargs)


@pytest.mark.parametrize(("kind", "num_sources"), [("edit_plus", 3), ("edit", 1)])
def test_encoder_and_vae_see_the_pipelines_pixels(ours, official, photo_images, monkeypatch, kind, num_sources):
    (family, _, _), pipeline, images = ours(kind), official(kind), photo_images[:num_sources]
    shown = {}

    def encode_prompt(image, **kwargs):
        shown["encoder"] = image if isinstance(image, list) else [image]
        return torch.zeros(1, 4, 8), None

    def prepare_latents(pixels, *args):
        shown["vae"] = pixels if isinstance(pixels, list) else [pixels]
        raise Reached

    monkeypatch.setattr(pipeline, "encode_prompt", encode_prompt)
    monkeypatch.setattr(pipeline, "prepare_latents", prepare_latents)
    call(pipeline, images)
    views = encoder_views(family, images)
    assert [image.tobytes() for image in shown["encoder"]] == [image.tobytes() for image in views]
    for image, theirs in zip(images, shown["vae"], strict=True):
        mine = to_pixels(EDIT_PLUS.resize(image, EDIT_PLUS.fit(image.size, family.vae_area_px)))
        assert torch.equal(mine[None, :, None], theirs)


@pytest.mark.parametrize("num_sources", [1, 2, 3])
def test_latents_grids_and_their_order_equal_what_the_transformer_is_shown(
    ours, official, photo_images, monkeypatch, tiny, num_sources
):
    area_px = 256 * 256  # the pipeline's own constant, smaller: 1024 x 1024 says no more and takes a minute
    monkeypatch.setattr(edit_plus, "VAE_IMAGE_SIZE", area_px)
    pipeline, images, shown = official("edit_plus"), photo_images[:num_sources], {}

    def forward(**kwargs):
        shown.update(kwargs)
        raise Reached

    monkeypatch.setattr(pipeline.transformer, "forward", forward)
    call(pipeline, images, height=128, width=160)
    sizes = [EDIT_PLUS.fit(image.size, area_px) for image in images]
    encode = LatentEncoder(str(tiny("edit_plus")), **CPU)
    mine = torch.cat(
        [encode([to_pixels(EDIT_PLUS.resize(i, size))])[0] for i, size in zip(images, sizes, strict=True)]
    )
    num_target_tokens = 128 * 160 // 16**2
    torch.testing.assert_close(mine, shown["hidden_states"][0, num_target_tokens:], **CLOSE)
    assert shown["img_shapes"] == [[(1, 8, 10), *((1, *EDIT_PLUS.grid_of(size)) for size in sizes)]]


def test_images_of_one_size_share_a_vae_pass(photo_images, tiny):
    encode = LatentEncoder(str(tiny("edit_plus")), **CPU)
    pixels = [to_pixels(EDIT_PLUS.resize(image, (96, 64))) for image in photo_images]
    for alone, together in zip(pixels, encode(pixels), strict=True):
        torch.testing.assert_close(together, encode([alone])[0], **CLOSE)
