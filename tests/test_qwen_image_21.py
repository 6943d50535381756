"""Prompt embeddings, latents and images of Qwen-Image-2.1 equal the official pipeline's, on the same float32 weights.

Tolerance 1e-5: sharing a pass changes the order of float32 sums, which moves embeddings by about 3e-6 of 6.
"""

import hashlib
import json
import math
import shutil
from contextlib import contextmanager

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from real_vocabulary import save_tokenizer
from test_sampling import decoded
from transformers import Qwen2Tokenizer, Qwen3VLProcessor

from hf_qie.data.images import read_image, to_pixels
from hf_qie.errors import InputError
from hf_qie.models.base import read_family
from hf_qie.models.prompts import BadPrompt, PromptLengths
from hf_qie.models.qwen_image_21.family import QWEN_IMAGE_21
from hf_qie.models.qwen_image_21.pipeline import with_slots
from hf_qie.models.qwen_image_21.templates import TEMPLATE, num_dropped

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
CAPTIONS = ["Make the sky red and keep the boat.", "把天空变成红色，保留小船。", "", "A {brace} and {}\n\n", "\nbelow"]
CPU = {"revision": None, "dtype": torch.float32, "device": torch.device("cpu")}
FAMILY = QWEN_IMAGE_21.with_source_size(128)  # 1024, the pipeline's own, says no more and takes a minute
STEPS = 3


@pytest.fixture(scope="session")
def model(tiny) -> str:
    return str(tiny("qwen_image_21"))


@pytest.fixture(scope="session")
def processor(model):
    return FAMILY.load_processor(model, revision=None)


@pytest.fixture(scope="session")
def encoder(model):
    return FAMILY.load_encoder(model, **CPU)


@pytest.fixture(scope="session")
def vae(model):
    return FAMILY.load_vae(model, **CPU)


@pytest.fixture(scope="session")
def stock(model):
    """The official pipeline, as `from_pretrained` gives it."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    assert type(pipeline) is diffusers.QwenImage21Pipeline
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def images(photos) -> list[Image.Image]:
    """Photos of different shapes."""
    found = [read_image(photos / "images" / f"source_{i:02d}.jpg") for i in range(1, 11)]
    by_shape = {image.size: image for image in found}
    assert len(by_shape) >= 3
    return list(by_shape.values())[:3]


@pytest.fixture(scope="session")
def see_through(images) -> Image.Image:
    """A photo in RGBA whose alpha falls from left to right."""
    image = images[0].copy()
    alpha = np.linspace(255, 0, image.width).round().astype(np.uint8)
    image.putalpha(Image.fromarray(np.tile(alpha, (image.height, 1))))
    return image


class Reached(Exception):
    """Raised where a test has seen enough of a pipeline call."""


@contextmanager
def inputs_of(module):
    """What the first call of a module, which does not take place, is given."""
    shown = {}

    def forward(**kwargs):
        shown.update(kwargs)
        raise Reached

    module.forward = forward
    try:
        with pytest.raises(Reached):
            yield shown
    finally:
        del module.forward


def shown_to_the_transformer(stock, caption, images):
    """What the official pipeline shows its transformer at the first step."""
    with torch.no_grad(), inputs_of(stock.transformer) as shown:
        stock(caption, images or None, height=96, width=160, output_resolution=128, num_inference_steps=STEPS)
    return shown


def hold(encoder, stock, prompt, captions, images):
    """Compare the embeddings of a prompt with the pipeline's, one caption at a time."""
    (embeddings,) = encoder([prompt])
    assert len(embeddings.texts) == len(captions)
    for caption, text in zip(captions, embeddings.texts, strict=True):
        shown = shown_to_the_transformer(stock, caption, images)
        theirs, places = shown["encoder_hidden_states"][0], shown["img_mask"][0, : -6 * 10 // 4]
        torch.testing.assert_close(torch.cat([embeddings.shared, text]), theirs[~places], **CLOSE)
        numbers = [(grid[1] * grid[2]) // 4 for grid in shown["img_shapes"][0][:-1]]
        mine, slots = with_slots(embeddings, text, numbers)
        assert torch.equal(slots, places) and mine.shape == theirs.shape


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_sources", [0, 1, 3])
def test_embeddings_and_slots_are_those_that_the_pipeline_shows_its_transformer(
    encoder, processor, stock, images, num_sources
):
    prompt = FAMILY.make_prompt(processor, images[:num_sources], CAPTIONS)
    assert (encoder([prompt])[0].shared.shape[0] == 0) == (num_sources == 0)
    hold(encoder, stock, prompt, CAPTIONS, images[:num_sources])


def test_a_source_with_alpha_is_seen_on_white(encoder, processor, stock, see_through):
    prompt = FAMILY.make_prompt(processor, [see_through], CAPTIONS[:1])
    hold(encoder, stock, prompt, CAPTIONS[:1], [see_through])
    opaque = FAMILY.make_prompt(processor, [see_through.convert("RGB")], CAPTIONS[:1])
    assert (prompt.vision["pixel_values"] - opaque.vision["pixel_values"]).abs().max() > 0.5


def test_rows_of_unequal_lengths_equal_single_rows(encoder, processor, images):
    prompts = [
        FAMILY.make_prompt(processor, images, ["word " * 100, "x"]),
        FAMILY.make_prompt(processor, [], ["a red boat"]),
        FAMILY.make_prompt(processor, images[:1], CAPTIONS),
    ]
    for prompt, together in zip(prompts, encoder(prompts), strict=True):
        (alone,) = encoder([prompt])
        assert together.slots == alone.slots == prompt.slots
        for a, b in zip((together.shared, *together.texts), (alone.shared, *alone.texts), strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("num_sources", [0, 2])
def test_embeddings_are_those_before_the_final_norm(encoder, processor, stock, images, num_sources):
    """What transformers 5 hands out as the last hidden states is normalised."""
    prompt = FAMILY.make_prompt(processor, images[:num_sources], CAPTIONS[:1])
    (embeddings,) = encoder([prompt])
    mine = torch.cat([embeddings.shared, embeddings.texts[0]])
    ids = torch.tensor([prompt.shared + prompt.branches[0]])
    is_image = ids == prompt.image_token
    with torch.no_grad():
        normalised = stock.text_encoder.model(
            input_ids=ids, mm_token_type_ids=is_image.int(), **prompt.vision
        ).last_hidden_state[0, prompt.drop :][~is_image[0, prompt.drop :]]
        torch.testing.assert_close(stock.text_encoder.model.language_model.norm(mine), normalised, **CLOSE)
    assert (mine - normalised).abs().max(dim=1).values.min() > 1e-2  # at every position


def test_features_of_early_vision_layers_count(encoder, processor, images):
    """Else an encoder without DeepStack would pass the tests above."""
    prompt = FAMILY.make_prompt(processor, images[:1], CAPTIONS[:1])
    (before,) = encoder([prompt])
    mergers = encoder.model.visual.deepstack_merger_list
    weights = [merger.linear_fc2.weight.clone() for merger in mergers]
    try:
        for merger in mergers:
            merger.linear_fc2.weight.zero_()
        (after,) = encoder([prompt])
    finally:
        for merger, weight in zip(mergers, weights, strict=True):
            merger.linear_fc2.weight.copy_(weight)
    assert (before.texts[0] - after.texts[0]).abs().mean() > 1e-2


def test_positions_of_image_tokens_count(encoder, processor, images, monkeypatch):
    prompt = FAMILY.make_prompt(processor, images[:1], CAPTIONS[:1])
    (before,) = encoder([prompt])
    flat = torch.arange(prompt.num_tokens).expand(3, -1)
    monkeypatch.setattr(encoder, "positions", lambda prompt: flat)
    (after,) = encoder([prompt])
    assert (before.texts[0] - after.texts[0]).abs().mean() > 1e-2


def test_embeddings_change_with_each_source_and_with_their_order(encoder, processor, images):
    a, b, c = images

    def text(*sources):
        return encoder([FAMILY.make_prompt(processor, sources, CAPTIONS[:1])])[0].texts[0]

    reference = text(a, b)
    for other in (text(b, a), text(a, c.resize(b.size)), text(c.resize(a.size), b)):
        assert (reference[-5:] - other[-5:]).abs().max() > 1e-3


@pytest.mark.parametrize("num_sources", [0, 1, 3])
def test_lengths_are_known_without_an_image(processor, images, num_sources):
    sources = images[:num_sources]
    prompt = FAMILY.make_prompt(processor, sources, CAPTIONS)
    (lengths,) = FAMILY.prompt_lengths(processor, [([image.size for image in sources], CAPTIONS)])
    assert isinstance(lengths, PromptLengths)
    assert [lengths.shared + one + lengths.suffix for one in lengths.captions] == prompt.num_embeddings
    assert lengths.shared == (prompt.split - prompt.drop - prompt.shared.count(prompt.image_token) if sources else 0)
    num_image_tokens = prompt.shared.count(prompt.image_token)
    assert (lengths.encoded, lengths.num_image_tokens) == (prompt.num_tokens, num_image_tokens)


def test_an_image_token_in_a_caption_is_refused(processor, images):
    with pytest.raises(BadPrompt, match=r"<\|image_pad\|>, which stands for an image") as refused:
        FAMILY.make_prompt(processor, images[:1], ["fine", "<|image_pad|>"])
    assert refused.value.place == 1


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_an_encoder_in_cpu_memory_gives_the_same_bytes(encoder, processor, model, images, layers):
    prompts = [FAMILY.make_prompt(processor, images[:n], CAPTIONS) for n in (0, 2)]
    memory = FAMILY.encoder_memory(model, revision=None, dtype=torch.float32, prompts=prompts)
    layer = sum(one.nbytes for one in encoder.model.language_model.layers[0].parameters())
    room = memory.least_weights + layers * layer
    assert room < memory.weights
    divided = FAMILY.load_encoder(model, **CPU, room_bytes=room)
    hooked = sum(hasattr(one, "_hf_hook") for one in divided.model.language_model.layers)
    assert hooked == 3 - layers
    for a, b in zip(encoder(prompts), divided(prompts), strict=True):
        assert all(torch.equal(x, y) for x, y in zip((a.shared, *a.texts), (b.shared, *b.texts), strict=True))


# --- the real vocabulary ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def real(built_once, model):
    """The processor with Qwen's own vocabulary."""
    tokenizer = Qwen2Tokenizer.from_pretrained(built_once("real_vocabulary", save_tokenizer))
    parts = Qwen3VLProcessor.from_pretrained(model, subfolder="processor")
    return Qwen3VLProcessor(parts.image_processor, tokenizer, parts.video_processor, chat_template=parts.chat_template)


@pytest.mark.parametrize("num_sources", [0, 1, 3])
def test_tokens_are_the_pipelines(real, stock, images, num_sources):
    sources = [FAMILY.encoder_view(image) for image in images[:num_sources]]
    pipeline = diffusers.QwenImage21Pipeline(
        **{name: stock.components[name] for name in ("scheduler", "vae", "transformer", "text_encoder")},
        processor=real,
    )
    assert pipeline._drop_idx == num_dropped(real) == 14
    captions = [*CAPTIONS, "   ", "\n\n", "🙂 emoji 👩‍👩‍👧", "<|im_end|>\n<|im_start|>user\n", "  two blanks "]
    prompt = FAMILY.make_prompt(real, images[:num_sources], captions)
    for caption, branch in zip(captions, prompt.branches, strict=True):
        with torch.no_grad(), inputs_of(stock.text_encoder) as shown:
            pipeline._get_qwen_prompt_embeds(caption, sources or None)
        assert prompt.shared + branch == shown["input_ids"][0].tolist()


def test_the_template_is_the_pipelines(stock):
    assert TEMPLATE.before + "{}" + TEMPLATE.after == stock.prompt_template_t2i
    assert TEMPLATE.shared(1) + "{}" + TEMPLATE.after == stock.prompt_template_ti2i
    one, two = (TEMPLATE.picture.format(number=n) for n in (1, 2))
    assert TEMPLATE.shared(2) == f"{TEMPLATE.before}{one} {two}"


# --- images ----------------------------------------------------------------------------------------------------------


def latents_of(vae, image: Image.Image) -> torch.Tensor:
    """Latents of a source, in the steps of extraction."""
    image = image.convert(FAMILY.image_mode)
    return vae([to_pixels(FAMILY.resize(image, FAMILY.fit(image.size, FAMILY.vae_area_px)))])[0]


@pytest.mark.parametrize("kind", ["one", "three", "see_through"])
def test_latents_grids_and_their_order_are_those_that_the_transformer_is_shown(vae, stock, images, see_through, kind):
    sources = {"one": images[:1], "three": images, "see_through": [see_through, images[1]]}[kind]
    shown = shown_to_the_transformer(stock, CAPTIONS[0], sources)
    mine = [latents_of(vae, image) for image in sources]
    torch.testing.assert_close(torch.cat(mine), shown["hidden_states"][0, : -6 * 10], **CLOSE)
    grids = [FAMILY.grid_of(FAMILY.fit(image.size, FAMILY.vae_area_px)) for image in sources]
    assert shown["img_shapes"] == [[*((1, *grid) for grid in grids), (1, 6, 10)]]
    assert [len(one) for one in mine] == [math.prod(grid) for grid in grids]


def test_alpha_is_a_channel_of_the_latents(vae, see_through):
    assert (latents_of(vae, see_through) - latents_of(vae, see_through.convert("RGB"))).abs().mean() > 0.1


@torch.no_grad()
def test_latents_are_those_of_the_vaes_own_encode(vae, images):
    """Ours leaves out the copies for a next frame, which no image has."""
    pixels = [to_pixels(image.resize((96, 64)).convert("RGBA")) for image in images]
    together = torch.stack(vae(pixels))
    stock = vae.vae.encode(torch.stack(pixels)[:, :, None]).latent_dist.mode()
    assert torch.equal(together, vae.pack(((stock - vae.mean) / vae.std)[:, :, 0]))
    for one, pixel in zip(together, pixels, strict=True):
        torch.testing.assert_close(one, vae([pixel])[0], **CLOSE)


def test_a_decoded_image_is_the_pipelines_with_its_alpha(vae, stock, images):
    latents = latents_of(vae, images[0])
    width, height = FAMILY.fit(images[0].size, FAMILY.vae_area_px)
    image = vae.decode(latents, FAMILY.grid_of((width, height)))
    theirs = stock._unpack_latents(latents[None], height, width, 16) * vae.std + vae.mean
    with torch.no_grad():
        decoded = stock.vae.decode(theirs, return_dict=False)[0][:, :, 0]
    assert image.mode == "RGBA" and image.size == (width, height)
    assert np.array_equal(image, stock.image_processor.postprocess(decoded, output_type="pil")[0])


# --- sampling --------------------------------------------------------------------------------------------------------


def options(scale: float) -> dict:
    return {"true_cfg_scale": scale, "generator": torch.Generator().manual_seed(3), "num_inference_steps": STEPS}


def close(scale: float) -> dict[str, float]:
    """Guidance at `scale` adds rounding of two predictions, `scale` and `scale` - 1 times."""
    return {name: (2 * scale - 1) * value for name, value in CLOSE.items()}


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("num_sources", [0, 1, 2])
def test_images_are_the_pipelines(encoder, processor, model, stock, images, num_sources, scale):
    sources, negative = images[:num_sources], "blurry, 低画质"
    (embeddings,) = encoder([FAMILY.make_prompt(processor, sources, [CAPTIONS[0], negative])])
    pipeline = FAMILY.load_pipeline(model, revision=None, transformer=None, dtype=torch.float32)
    assert pipeline.text_encoder is None
    with decoded(pipeline) as mine:
        image = FAMILY.generate(pipeline, embeddings, sources, size=(160, 96), **options(scale))
    given = {"negative_prompt": negative} if scale > 1 else {}
    with decoded(stock) as theirs:
        own = stock(
            CAPTIONS[0], sources or None, height=96, width=160, output_resolution=128, **given, **options(scale)
        ).images[0]
    torch.testing.assert_close(mine[0], theirs[0], **close(scale))
    assert image.size == own.size == (160, 96) and image.mode == own.mode == "RGBA"
    assert np.abs(np.asarray(image, int) - np.asarray(own, int)).max() <= 1


@pytest.mark.parametrize("kind", ["qwen_image_21", "qwen_image_21_no_causal_condition"])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_denoising_over_a_set_s_numbers_ends_at_the_pipelines_latents(
    encoder, processor, vae, tiny, images, kind, scale
):
    sources, model = images[:2], str(tiny(kind))
    (embeddings,) = encoder([FAMILY.make_prompt(processor, sources, [CAPTIONS[0], " "])])
    latents = [latents_of(vae, image) for image in sources]
    batches = [
        {
            "prompt_embeds": torch.cat([embeddings.shared, text])[None],
            "prompt_lengths": [len(embeddings.shared) + len(text)],
            "image_slots": [list(embeddings.slots)],
            "source_latents": torch.cat(latents)[None],
            "grids": [(6, 10), *(FAMILY.grid_of(FAMILY.fit(one.size, FAMILY.vae_area_px)) for one in sources)],
        }
        for text in embeddings.texts
    ]
    pipeline = FAMILY.load_pipeline(model, revision=None, transformer=None, dtype=torch.float32)
    with decoded(pipeline) as theirs:
        FAMILY.generate(pipeline, embeddings, sources, size=(160, 96), **options(scale))
    with torch.no_grad():
        mine = FAMILY.denoise(
            FAMILY.load_transformer(model, revision=None, dtype=torch.float32),
            *batches,
            scheduler_config=pipeline.scheduler.config,
            sigmas=FAMILY.sampling_sigmas(STEPS, pipeline.config),
            true_cfg_scale=scale,
            seed=3,
        )
    normalised = vae.pack(((theirs[0] - vae.mean) / vae.std)[:, :, 0])
    torch.testing.assert_close(mine, normalised, **close(scale))


def test_a_checkpoint_with_its_own_noise_levels_is_sampled_at_them(encoder, processor, model, tmp_path):
    levels = [1.0, 0.7, 0.4]
    folder = shutil.copytree(model, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"sample_sigmas": levels}))
    pipeline = FAMILY.load_pipeline(str(folder), revision=None, transformer=None, dtype=torch.float32)
    assert FAMILY.sampling_sigmas(40, index | {"sample_sigmas": levels}).tolist() == levels
    np.testing.assert_allclose(FAMILY.sampling_sigmas(4, index), [1.0, 0.75, 0.5, 0.25])
    (embeddings,) = encoder([FAMILY.make_prompt(processor, [], [CAPTIONS[0], " "])])
    FAMILY.generate(pipeline, embeddings, [], size=(64, 64), **options(1.0))
    assert pipeline.num_timesteps == len(levels)


# --- verification ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offload", [False, True])
def test_what_verification_compares_with_agrees(encoder, processor, vae, model, images, see_through, offload):
    official = FAMILY.load_official(model, **CPU, offload=offload)
    sources = [see_through, *images[1:]]
    (embeddings,) = encoder([FAMILY.make_prompt(processor, sources, CAPTIONS)])
    for caption, text in zip(CAPTIONS, embeddings.texts, strict=True):
        theirs = official.embeddings(caption, sources)
        torch.testing.assert_close(torch.cat([embeddings.shared, text]), theirs, **CLOSE)
    assert official.slots(sources) == list(embeddings.slots) and official.slots([]) == []
    for image in sources:
        sides = official.sides(image, FAMILY.vae_area_px)
        torch.testing.assert_close(latents_of(vae, image), official.latents(image, sides), **CLOSE)
        assert tuple(official.grid(sides).tolist()) == FAMILY.grid_of(FAMILY.fit(image.size, FAMILY.vae_area_px))


# --- the tiny checkpoints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen_image_21", "qwen_image_21_learner"])
def test_normalised_latents_of_the_edits_are_of_order_one(tiny, edits, kind):
    vae = FAMILY.load_vae(str(tiny(kind)), **CPU)
    found = [read_image(path).resize((128, 128)) for path in sorted((edits / "images").glob("*.png"))[:24]]
    latents = torch.stack(vae([to_pixels(image.convert("RGBA")) for image in found]))
    assert latents.shape == (24, 8 * 8, 64)
    # scaled on images of any colours, so that those of a few colours lie beside 0 in some channels
    assert 0.5 < latents.square().mean().sqrt() < 2
    assert latents.std(dim=0).mean() > 0.3  # images differ


@pytest.mark.parametrize("name", ["target", "source", "prompt", "place", "noise level", "grid"])
@pytest.mark.parametrize("kind", ["qwen_image_21", "qwen_image_21_no_causal_condition"])
@torch.no_grad()
def test_each_input_shows_in_the_prediction(tiny, kind, name):
    transformer = FAMILY.load_transformer(str(tiny(kind)), revision=None, dtype=torch.float32)
    torch.manual_seed(0)
    noised, sigma = torch.randn(1, 64, 64), torch.tensor([0.5])
    batch = {"prompt_embeds": 3 * torch.randn(1, 20, 96), "source_latents": torch.randn(1, 64, 64)}
    batch |= {"prompt_lengths": [20], "image_slots": [[7]], "grids": [(8, 8), (8, 8)]}
    before = FAMILY.predict(transformer, batch, noised, sigma)
    if name == "target":
        noised = noised + 0.5
    elif name == "noise level":
        sigma = sigma + 0.1
    else:
        batch |= {
            "source": {"source_latents": torch.randn(1, 64, 64)},
            "prompt": {"prompt_embeds": 3 * torch.randn(1, 20, 96)},
            "place": {"image_slots": [[12]]},
            "grid": {"grids": [(4, 16), (8, 8)]},
        }[name]
    after = FAMILY.predict(transformer, batch, noised, sigma)
    assert before.std() == pytest.approx(1, abs=0.5)
    assert (after - before).abs().mean() > 0.05


# --- the family ------------------------------------------------------------------------------------------------------


def test_the_model_index_decides_the_family(model):
    assert read_family(model) is QWEN_IMAGE_21
    facts = (QWEN_IMAGE_21.max_sources, QWEN_IMAGE_21.vae_area_px, QWEN_IMAGE_21.true_cfg_scale)
    assert facts == (None, 1024**2, 1.0)
    small = QWEN_IMAGE_21.with_source_size(512)
    assert small.vlm_area_px == small.vae_area_px == 512**2 and QWEN_IMAGE_21.with_source_size(None) is QWEN_IMAGE_21
    assert small.compat == QWEN_IMAGE_21.compat  # a set names the VAE's area itself
    assert json.loads(json.dumps(small.compat)) == small.compat and small.compat["family"] == small.card_name


def test_what_sets_say_of_their_numbers_stays_from_release_to_release():
    """Training compares it: a set that is published would be refused from then on."""
    said = dict(QWEN_IMAGE_21.compat)
    templates = json.dumps(said.pop("templates"), sort_keys=True)
    assert said == {
        "family": "Qwen-Image-2.1",
        "resampling": "lanczos",
        "alpha": "on white for the encoder, a channel for the VAE",
        "positions": "interleaved m-rope by token type",
        "embeddings": "before the final norm, without those of images",
    }
    assert hashlib.sha256(templates.encode()).hexdigest()[:16] == "51943cf345aa41ee"


def test_a_processor_that_resizes_sources_once_more_is_refused(model, tmp_path):
    """Qwen3-VL's own makes images of fewer than 256 x 256 pixels larger."""
    folder = shutil.copytree(model, tmp_path / "model")
    path = folder / "processor" / "processor_config.json"
    config = json.loads(path.read_text())
    config["image_processor"]["size"]["shortest_edge"] = 256 * 256
    path.write_text(json.dumps(config))
    QWEN_IMAGE_21.load_processor(str(folder), revision=None)
    with pytest.raises(InputError, match=r"^extract.source_sample_size: 128: the processor of .* once more"):
        FAMILY.load_processor(str(folder), revision=None)


def test_the_most_tokens_are_those_that_the_rotary_table_places(stock):
    sources, target = [(4, 6), (8, 2)], (4, 4)
    most = FAMILY.most_tokens(sources, target)
    mask = torch.tensor([True] * 24 + [False] * (most - 1) + [True] * 16 + [False] + [True] * 16)
    placed = stock.transformer.pos_embed([(1, *grid) for grid in (*sources, target)], mask, torch.device("cpu"))
    table = stock.transformer.pos_embed.freqs[0]  # 0 to 8191, and from there on those of -1024 to -1
    assert torch.equal(placed[-1, : table.shape[1]], table[8191])


def test_the_licence_is_named_with_its_limit():
    notice = QWEN_IMAGE_21.license_notice
    assert "Qwen RESEARCH LICENSE AGREEMENT" in notice and "non-commercial" in notice
