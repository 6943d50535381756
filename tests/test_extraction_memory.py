"""What extraction takes on a device: forecast from configs, and an encoder that is divided where it does not fit."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from released import ENCODER, write_released
from small_recipes import few_edits, plans_of, weightless, write_recipe
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2_5_VLConfig, Qwen2VLImageProcessor

from hf_qie import check, extract
from hf_qie.config.recipe import load_recipe
from hf_qie.errors import InputError
from hf_qie.extraction import run, verify
from hf_qie.extraction.batching import like_length, shared_passes
from hf_qie.extraction.estimate import sample
from hf_qie.extraction.memory import Forecast, forecast, forecast_gpu
from hf_qie.extraction.preprocess import ImageCache, prepare
from hf_qie.models.base import read_family
from hf_qie.models.prompts import Prompt
from hf_qie.runtime.device import free_bytes

CPU = torch.device("cpu")
CONVOLUTIONS = ("aten::mkldnn_convolution", "aten::_slow_conv2d_forward", "aten::slow_conv3d_forward")
NUM_LAYERS = 3  # of the tiny encoder


# --- an encoder that is divided


def edits_recipe(folder: Path, model: Path, edits: Path, **settings) -> Path:
    """Rows of one source with an inverse and captions in two languages, of several sources, and of none."""
    tasks = few_edits(edits, edit=3, combine=2, text_to_image=2)
    folder.mkdir(parents=True, exist_ok=True)
    return write_recipe(folder, model, tasks, extract={"batch_size": 2, **settings})


@pytest.fixture(scope="module")
def undivided(tmp_path_factory, tiny, edits) -> Path:
    """A recipe whose sets were made with every weight on the device."""
    path = edits_recipe(tmp_path_factory.mktemp("undivided"), tiny(), edits)
    assert extract.main([str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def found(undivided, tmp_path_factory) -> Forecast:
    """The forecast for these rows."""
    return forecast(*plans_of(undivided, tmp_path_factory.mktemp("plans")), dtype=torch.float32)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("data-*.arrow")}


def layer_bytes(found: Forecast, model: Path) -> int:
    encoder = read_family(str(model)).load_encoder(str(model), revision=None, dtype=torch.float32, device=CPU)
    layers = encoder.model.language_model.layers
    assert len(layers) == NUM_LAYERS
    return sum(parameter.nbytes for parameter in layers[0].parameters())


@pytest.fixture
def log(caplog) -> pytest.LogCaptureFixture:
    """What rank 0 logs."""
    caplog.set_level(logging.INFO, "hf_qie")
    return caplog


@pytest.mark.parametrize("num_here", range(NUM_LAYERS))
def test_layers_in_cpu_memory_leave_the_sets_byte_for_byte(
    undivided, found, tmp_path, tiny, edits, num_here, monkeypatch, log
):
    room = found.encoder_least + num_here * layer_bytes(found, tiny())
    monkeypatch.setattr(run, "free_bytes", lambda device: found.needed(room))
    assert extract.main([str(edits_recipe(tmp_path, tiny(), edits))]) == 0
    assert content(tmp_path / "sets") == content(undivided.parent / "sets")
    assert (
        f"encoder: {num_here} of 3 layers on cpu, {3 - num_here} in CPU memory, copied in for each batch" in log.text
    )


def test_an_encoder_that_fits_is_not_divided(found, tmp_path, tiny, edits, monkeypatch, log):
    monkeypatch.setattr(run, "free_bytes", lambda device: found.needed(found.encoder_weights))
    assert extract.main([str(edits_recipe(tmp_path, tiny(), edits))]) == 0
    assert str(found) in log.text and " in CPU memory, copied in" not in log.text


def test_weights_that_wait_are_not_on_the_device(tiny, found):
    model = str(tiny())
    encoder = read_family(model).load_encoder(
        model, revision=None, dtype=torch.float32, device=CPU, room_bytes=found.encoder_least
    )
    for name, parameter in encoder.model.named_parameters():  # hooks bring them from meta for each pass
        assert (parameter.device.type == "meta") == (".layers." in name)
    on_device = sum(one.nbytes for name, one in encoder.model.named_parameters() if one.device.type != "meta")
    table = encoder.model.get_input_embeddings().weight.nbytes
    assert on_device - table < found.encoder_least <= on_device - table + layer_bytes(found, tiny()) + 10_000


def test_what_does_not_fit_even_so_is_refused_before_weights_are_read(tmp_path, tiny, edits, monkeypatch):
    model = weightless(tiny(), tmp_path / "model")
    monkeypatch.setattr(run, "free_bytes", lambda device: 1_020_000_000)
    expected = (
        r"extract: at least 1\.2 GB have to be free on cpu, with all layers of the encoder in CPU memory, and 1\.0 GB "
        r"are; 0\.1 GB are activations of the encoder: lower extract\.batch_size, or, if it is 1, use a device with "
        r"more memory$"
    )
    with pytest.raises(InputError, match=expected):
        extract.main([str(edits_recipe(tmp_path, model, edits, batch_size=8))])


@pytest.mark.parametrize(("key", "of"), [("batch_size", "encoder"), ("vae_batch_size", "VAE")])
def test_the_refusal_names_the_key_that_helps(key, of):
    activations = {"batch_size": 9 * 10**9, "vae_batch_size": 2 * 10**9}
    found = Forecast(
        encoder_weights=15_500_000_000,
        encoder_least=1_800_000_000,
        encoder_activations=activations[key],
        vae_weights=250_000_000,
        vae_activations=5_000_000_000,
    )
    with pytest.raises(InputError, match=f"are activations of the {of}: lower extract.{key}, or, if"):
        found.room(7 * 10**9, torch.device("cuda", 1))
    assert found.room(found.needed(found.encoder_least), torch.device("cuda", 1)) >= found.encoder_least


def test_cpu_memory_is_not_divided():
    assert free_bytes(CPU) is None


# --- the forecast


def measured(work: Callable[[], object]) -> int:
    """Bytes at the peak of the CPU's allocator, without the buffers that convolutions take and give back inside."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    inside = [(event.start_ns(), event.end_ns()) for event in events if event.name() in CONVOLUTIONS]
    live = peak = 0
    for event in events:
        if event.name() == "[memory]":
            if not any(start <= event.start_ns() < end for start, end in inside):
                peak = max(peak, live)
            live += event.nbytes()
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_sources", "batch_size"), [(0, 4), (1, 4), (3, 2)])
@pytest.mark.parametrize("kind", ["edit_plus", "qwen_image_21"])
def test_the_encoders_peak_is_the_allocators(tiny, dtype, num_sources, batch_size, kind):
    model, family = str(tiny(kind)), read_family(str(tiny(kind))).with_source_size(384)
    images = [Image.new("RGB", (300, 200))] * num_sources
    processor = family.load_processor(model, revision=None)
    prompts = [family.make_prompt(processor, images, ["make the sky blue " * 4, " "])] * batch_size
    encoder = family.load_encoder(model, revision=None, dtype=dtype, device=CPU)
    of_forecast = family.encoder_memory(model, revision=None, dtype=dtype, prompts=prompts)
    assert of_forecast.weights == sum(one.nbytes for one in (*encoder.model.parameters(), *encoder.model.buffers()))
    of_one = family.encoder_memory(model, revision=None, dtype=dtype, prompts=prompts[:1])
    assert of_forecast.activations == pytest.approx(batch_size * of_one.activations, rel=0.01)
    encoder(prompts)
    assert of_forecast.activations == pytest.approx(measured(lambda: encoder(prompts)), rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("size", "batch_size"), [((128, 64), 1), ((64, 64), 3)])
@pytest.mark.parametrize("kind", ["edit_plus", "qwen_image_21"])
def test_the_vaes_peak_is_the_allocators(tiny, dtype, size, batch_size, kind):
    model, family = str(tiny(kind)), read_family(str(tiny(kind)))
    images = [torch.zeros(len(family.image_mode), size[1], size[0])] * batch_size
    encode = family.load_vae(model, revision=None, dtype=dtype, device=CPU)
    of_forecast = family.vae_memory(model, revision=None, dtype=dtype, size=size, batch_size=batch_size)
    assert of_forecast.weights == sum(parameter.nbytes for parameter in encode.vae.parameters())
    encode(images)
    assert of_forecast.activations == pytest.approx(measured(lambda: encode(images)), rel=0.1)


def test_no_batch_of_the_data_passes_the_forecast(undivided, found, tmp_path):
    plans, processor = plans_of(undivided, tmp_path / "plans")
    peaks = []
    for plan in plans.values():
        model, family, batch_size = plan.recipe.model, plan.family, plan.extract.batch_size
        encoder = family.load_encoder(model, revision=None, dtype=torch.float32, device=CPU)
        rows = list(plan.rows.table)
        cache = ImageCache(rows, plan)
        prepared = [prepare(row, cache, plan=plan, processor=processor) for row in rows]
        for batch in like_length(shared_passes(prepared, batch_size=batch_size), batch_size=batch_size):
            peaks.append(measured(lambda encoder=encoder, batch=batch: encoder([one.prompt for one in batch])))
    # rows of a batch are not all as large as the largest
    assert 0.7 * found.encoder_activations < max(peaks) < 1.01 * found.encoder_activations


@pytest.mark.parametrize("kind", ["edit_plus", "qwen_image_21"])
def test_more_rows_never_lower_the_forecast(tiny, edits, tmp_path, kind):
    (two, *_), (text, *_) = few_edits(edits, combine=1, text_to_image=1).values()
    two |= {"source_image": two["source_image"][:2]}
    one = two | {"source_image": two["source_image"][:1], "instruction": "a sentence of some words " * 20}
    added = [[two], [text | {"instruction": "word " * 80}], [one], [text | {"instruction": "word " * 200}]]
    found, counts = [], []
    for number in range(len(added)):
        folder = tmp_path / str(number)
        folder.mkdir()
        rows = [row | {"instruction_cn": None} for rows in added[: number + 1] for row in rows]
        path = write_recipe(folder, tiny(kind), {"task": rows}, extract={"source_sample_size": 384})
        plans, processor = plans_of(path, folder / "plans")
        found.append(forecast(plans, processor, dtype=torch.float32).encoder_activations)
        (plan,) = plans.values()
        cache = ImageCache(list(plan.rows.table), plan)
        look, row = sample(plan, processor)[-1][1], list(plan.rows.table)[-1]
        prompts = [one.prompt for one in prepare(row, cache, plan=plan, processor=processor).directions]
        counts.append((look.num_encoded, max(one.num_tokens for one in prompts)))
    assert found == sorted(found) and found[-1] > found[0]
    assert all(encoded == tokens for encoded, tokens in counts)


def test_a_gpu_computes_in_bfloat16_unless_the_recipe_says_otherwise(undivided, found):
    assert forecast_gpu(load_recipe(undivided)) == found  # its extract.dtype is float32
    of_gpu = forecast_gpu(load_recipe(undivided, ["extract.dtype=auto", "extract.latents=false"]))
    assert found.encoder_weights == pytest.approx(2 * of_gpu.encoder_weights, rel=0.001)
    assert of_gpu.vae_weights == of_gpu.vae_activations == 0
    assert "VAE" in str(found) and "VAE" not in str(of_gpu)


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """The configs of the released encoder and VAE, whose defaults diffusers has."""
    folder = write_released(tmp_path_factory.mktemp("released") / "model")
    Qwen2_5_VLConfig(**ENCODER).save_pretrained(folder / "text_encoder")
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def of_released(released) -> Forecast:
    """With one source of 1024 x 1024 a row and captions of 200 tokens."""
    family, where = read_family(str(released)), {"revision": None, "dtype": torch.bfloat16}
    encoder = family.encoder_memory(str(released), prompts=[released_prompt(1)], **where)
    vae = family.vae_memory(str(released), size=(1024, 1024), batch_size=1, **where)
    return Forecast(
        encoder_weights=encoder.weights,
        encoder_least=encoder.least_weights,
        encoder_activations=4 * encoder.activations,
        vae_weights=vae.weights,
        vae_activations=vae.activations,
    )


def released_prompt(num_sources: int) -> Prompt:
    config, vision, shared = Qwen2_5_VLConfig(**ENCODER), {}, [1] * 64
    if num_sources:
        images = [Image.new("RGB", (384, 384))] * num_sources
        vision = dict(Qwen2VLImageProcessor()(images=images, return_tensors="pt"))
        for grid in vision["image_grid_thw"]:
            shared += [1, config.vision_start_token_id, *[config.image_token_id] * (int(grid.prod()) // 4), 1]
    return Prompt(shared=shared, branches=[[1] * 200, [1] * 6], drop=64, split=len(shared), vision=vision)


def test_the_figures_of_the_recipes_page_are_those_of_the_released_checkpoint(of_released, released, root):
    text = (root / "recipes" / "README.md").read_text(encoding="utf-8")
    family, where = read_family(str(released)), {"revision": None, "dtype": torch.bfloat16}
    encoder = [
        4 * family.encoder_memory(str(released), prompts=[released_prompt(n)], **where).activations for n in range(4)
    ]
    vae = [family.vae_memory(str(released), size=(n, n), batch_size=1, **where).activations for n in (512, 768, 1024)]
    for weights, activations in ((of_released.encoder_weights, encoder), (of_released.vae_weights, vae)):
        *most, last = (f"{one / 1e9:.1f}" for one in activations)
        assert f"| {weights / 1e9:.1f} GB | {', '.join(most)} or {last} GB |" in text
    assert f"their peak is {of_released.peak / 1e9:.1f} GB" in text
    assert f"{of_released.needed(of_released.encoder_weights) / 1e9:.1f} GB have to be free" in text
    assert f"not even {of_released.needed(of_released.encoder_least) / 1e9:.1f} GB are free" in text
    layer = 466_115_584
    table = of_released.encoder_weights - of_released.encoder_least - 27 * layer
    for free in (16, 11, 7):
        spare = of_released.room(free * 10**9, CPU) - of_released.encoder_least
        waiting = 28 - spare // layer
        assert f"| {free} GB | {waiting} of 28 | {(table + waiting * layer) / 1e9:.1f} GB |" in text


# --- verification


def test_an_encoder_in_cpu_memory_verifies_as_one_on_the_device(undivided, monkeypatch, capsys):
    check.main([str(undivided), "--verify", "1"])
    whole = capsys.readouterr().out
    monkeypatch.setattr(verify, "free_bytes", lambda device: 0)
    check.main([str(undivided), "--verify", "1"])
    assert capsys.readouterr().out == whole
