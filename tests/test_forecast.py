"""The forecast of memory is what the allocator hands out, and what the released model is known to take."""

import logging
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from diffusers import QwenImage21Transformer2DModel, QwenImageTransformer2DModel
from embedding_sets import write_recipe, write_set
from small_recipes import extract_edits
from test_footprint import released
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from hf_qie import check
from hf_qie.config.recipe import Mix, load_recipe
from hf_qie.data.largest import Shape, largest_in
from hf_qie.data.loader import TaskRows
from hf_qie.errors import InputError
from hf_qie.extraction.stats import largest_shape
from hf_qie.models import quantization
from hf_qie.runtime.ledger import storages
from hf_qie.training import forecast as forecasting
from hf_qie.training.callbacks import PeakMemory
from hf_qie.training.cost import blocks_of
from hf_qie.training.fit import fewest_changes, forecast_recipe, forecast_start, report, report_vae
from hf_qie.training.forecast import Forecast, Run, forecast
from hf_qie.training.model import build_model
from hf_qie.training.sets import open_sets
from hf_qie.training.setup import build_trainer, training_arguments

LORA = {"lora": {"rank": 32, "alpha": 32}}
CHECKPOINTED = {"activation_checkpointing": True}
NO_SAVING = {"max_steps": 2, "save_strategy": "no"}


@pytest.fixture(scope="module")
def middle(tiny, built_once):
    """A checkpoint whose transformer has 6 blocks of width 512."""

    def build(folder):
        shutil.copytree(tiny(), folder)
        shape = {"num_layers": 6, "num_attention_heads": 4, "attention_head_dim": 128, "joint_attention_dim": 96}
        QwenImageTransformer2DModel(**shape).save_pretrained(folder / "transformer")

    return built_once("middle", build)


@pytest.fixture(scope="module")
def middle_21(tiny, built_once):
    """The same of Qwen-Image-2.1."""

    def build(folder):
        shutil.copytree(tiny("qwen_image_21"), folder)
        shape = {"num_layers": 6, "num_attention_heads": 4, "attention_head_dim": 128, "context_in_dim": 96}
        QwenImage21Transformer2DModel(**shape).save_pretrained(folder / "transformer")

    return built_once("middle_21", build)


@pytest.fixture(scope="module")
def small(tiny, built_once):
    """A checkpoint whose transformer has 3 blocks of width 64."""

    def build(folder):
        shutil.copytree(tiny(), folder)
        shape = {"num_attention_heads": 4, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}
        model = QwenImageTransformer2DModel(num_layers=3, joint_attention_dim=96, **shape)
        model.save_pretrained(folder / "transformer")

    return built_once("small", build)


class Measure(TrainerCallback):
    """The most bytes that torch's allocator of the CPU has handed out during the last step."""

    def __init__(self, trainer):
        self.trainer, self.peak = trainer, 0

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == args.max_steps - 1:
            held = {storage.data_ptr(): storage.nbytes() for storage in self.storages()}
            self.held = sum(held.values())
            self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.profiler.start()

    def storages(self) -> Iterator[torch.UntypedStorage]:
        for parameter in self.trainer.model.parameters():
            yield from storages(parameter)
            quantised = getattr(parameter, "quant_state", None)
            for scales in (quantised and quantised.absmax, quantised and quantised.state2.absmax):
                yield from storages(scales)
        for state in self.trainer.optimizer.state.values():
            for value in state.values():
                yield from storages(value)
        for average in self.trainer.ema.average.shadow_params if self.trainer.ema else ():
            yield from storages(average)

    def on_step_end(self, args, state, control, **_):
        if state.global_step == args.max_steps:
            self.profiler.stop()
            events = [one for one in self.profiler.profiler.kineto_results.events() if one.name() == "[memory]"]
            change = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
            self.peak = self.held + int(change.cumsum(0).max())


LAST, EIGHT_BIT = {"modules": ["transformer_blocks.1"]}, {"optim": "adamw_bnb_8bit"}
ADDED_UP = {"optim": "adamw_torch", "gradient_accumulation_steps": 2}
CASES = [
    ("tiny", {}, "no", {}, {}),
    ("tiny", {}, "bf16", CHECKPOINTED, {}),
    ("tiny", LAST, "no", {"optim": "adafactor"}, {}),
    ("tiny", LORA, "no", CHECKPOINTED | ADDED_UP, {}),
    ("tiny", LORA, "bf16", CHECKPOINTED, {"quantization": "fp8"}),
    ("tiny", LORA, "no", CHECKPOINTED, {"quantization": "int8"}),
    ("small", LORA, "no", CHECKPOINTED, {"offload_activations": True}),
    ("small", LORA, "bf16", CHECKPOINTED, {"stream_blocks": 3, "quantization": "nf4"}),
    ("middle", LORA, "no", {}, {}),
    ("middle", LORA, "bf16", CHECKPOINTED, {}),
    ("middle", LORA, "no", CHECKPOINTED, {"quantization": "nf4"}),
]
CASES = [("edit_plus", size, 1, *case) for size, *case in CASES]
CASES += [
    ("qwen_image_21", "tiny", 1, {}, "no", {}, {}),
    ("qwen_image_21", "tiny", 4, {}, "bf16", CHECKPOINTED, {}),
    ("qwen_image_21", "middle", 1, LORA, "bf16", CHECKPOINTED, {}),
    ("qwen_image_21", "middle", 4, LORA, "no", {}, {}),
    ("qwen_image_21", "middle", 4, LORA, "no", CHECKPOINTED, {"offload_activations": True}),
    ("qwen_image_21", "middle", 2, LORA, "bf16", CHECKPOINTED, {"stream_blocks": 3, "quantization": "nf4"}),
    ("qwen_image_21", "middle", 1, LORA, "no", CHECKPOINTED, {"quantization": "int8"}),
]


@pytest.mark.parametrize(("kind", "size", "draws", "trainable", "precision", "training", "memory"), CASES)
def test_the_forecast_is_what_a_step_takes(
    tiny, small, middle, middle_21, tmp_path, kind, size, draws, trainable, precision, training, memory
):
    models = {"tiny": tiny(kind), "small": small, "middle": middle_21 if kind == "qwen_image_21" else middle}
    model, grids = models[size], ((8, 8), (8, 8))
    write_set(tmp_path / "sets" / "edit", model, grids=grids)
    training = NO_SAVING | training | {"per_device_train_batch_size": draws, "bf16": precision == "bf16"}
    sections = {"training": training, "trainable": trainable, "memory": memory}
    sections["mix"] = {"same_shape": 1, "draws_per_row": draws}
    recipe = load_recipe(write_recipe(tmp_path, model, **sections), ["tasks={edit: {data: edit.jsonl}}"])
    shape = Shape(grids=grids, num_tokens=9, draws_per_row=draws)
    run = Run(recipe=recipe, shape=shape, precision=precision, device="cpu")
    trainer, _ = build_trainer(recipe, open_sets(recipe))
    trainer.add_callback(measured := Measure(trainer))
    trainer.train()
    assert forecast(run).peak == pytest.approx(measured.peak, rel=0.05)  # within 3 % where this was written


def test_the_forecast_is_what_a_step_with_averages_takes(tiny, tmp_path):
    training = NO_SAVING | {"per_device_train_batch_size": 1}
    recipe = load_recipe(write_recipe(tmp_path, tiny(), training=training, mix={"same_shape": 1}, ema={"every": 1}))
    trainer, _ = build_trainer(recipe, open_sets(recipe))
    trainer.add_callback(measured := Measure(trainer))
    trainer.train()
    run = Run(recipe=recipe, shape=Shape(grids=((4, 4), (2, 4)), num_tokens=9), precision="no", device="cpu")
    assert forecast(run).peak == pytest.approx(measured.peak, rel=0.05)


SMALL, LARGE = ((32, 32), (64, 64)), ((64, 64), (64, 64))  # a target of 512 or 1024 px, and a source of 1024 px


def released_run(tmp_path, *, grids=SMALL, num_ranks=1, training=CHECKPOINTED, **sections):
    """On the released model; of several ranks each has a shard."""
    recipe = released(tmp_path, training=training | {"gradient_accumulation_steps": 4}, **sections)
    shape, fsdp = Shape(grids=grids, num_tokens=600), {} if num_ranks == 1 else {"reshard_after_forward": True}
    return Run(recipe=recipe, shape=shape, num_ranks=num_ranks, fsdp=fsdp)


@pytest.mark.parametrize(
    ("settings", "peak_gb"),
    [
        ({"trainable": LORA}, 45.2),
        ({"trainable": LORA, "grids": LARGE}, 46.8),
        ({"trainable": LORA, "training": {}}, 70.4),
        ({"trainable": LORA, "memory": {"offload_activations": True}}, 43.1),
        ({"trainable": LORA, "num_ranks": 8}, 9.6),
        ({"grids": LARGE, "num_ranks": 8}, 48.3),
    ],
    ids=str,
)
def test_the_released_model_takes_what_it_took_when_the_arithmetic_was_chosen(tmp_path, settings, peak_gb):
    assert forecast(released_run(tmp_path, **settings)).peak / 1e9 == pytest.approx(peak_gb, rel=0.01)


def test_the_vae_is_named_with_what_it_takes_where_it_is(tmp_path):
    """Of the released one in bfloat16, sharded or not: 127 million parameters, 3.6 GB to decode 1024 x 1024 pixels."""
    images = {"sampling": {"every": 1}, "tasks": {"edit": {"embeddings": "nowhere", "eval_rows": 1}}}
    alone = released_run(tmp_path, trainable=LORA, **images)
    (tmp_path / "model" / "vae").mkdir()
    (tmp_path / "model" / "vae" / "config.json").write_text("{}")  # diffusers' defaults are the released ones
    sharded = replace(alone, num_ranks=8, fsdp={"reshard_after_forward": True})
    none = replace(sharded, recipe=load_recipe(alone.recipe.path, ["sampling.every=0"]))
    encodes = replace(none, encodes=True)
    of_image = "more for images of 1024 x 1024 px"
    on_rank_0 = f"0.25 GB of weights on rank 0, and up to 3.63 GB {of_image}"
    assert [report_vae(run) for run in (alone, sharded)] == [f"loaded by rank 0, for images: {on_rank_0}"] * 2
    assert report_vae(encodes).endswith(f"0.25 GB of weights on each rank, and up to 1.22 GB {of_image}")
    found = Forecast(**dict.fromkeys(("weights", "gradients", "optimizer", "activations", "host"), 1e9))
    notes = [report(run, found).splitlines()[1].partition("1.00 GB")[2] for run in (alone, sharded, encodes, none)]
    vae = "  with 0.25 GB of the VAE"
    assert notes == [vae, f"{vae}, on rank 0 alone", vae, ""]


@pytest.mark.parametrize(("trainable", "num_ranks"), [(LORA, 1), ({}, 8)], ids=["lora", "sharded"])
def test_averages_take_one_more_float_of_what_trains(tmp_path, small, trainable, num_ranks):
    training = {"gradient_accumulation_steps": 2}
    without = load_recipe(write_recipe(tmp_path, small, trainable=trainable, training=training))
    fsdp = {"reshard_after_forward": True} if num_ranks > 1 else {}
    run = Run(recipe=without, shape=Shape(grids=SMALL, num_tokens=9), num_ranks=num_ranks, fsdp=fsdp)
    averaged = replace(run, recipe=load_recipe(without.path, ["ema={}"]))
    assert forecast(averaged).weights - forecast(run).weights == forecast(run).gradients > 0


def test_a_streamed_block_leaves_the_device_but_for_two_slots(tmp_path):
    block_bytes = 2 * 339_831_296  # bfloat16
    resident, streamed = (
        forecast(released_run(tmp_path / str(count), trainable=LORA, memory={"stream_blocks": count}))
        for count in (0, 40)
    )
    assert resident.block == block_bytes
    assert resident.peak - streamed.peak == pytest.approx(38 * block_bytes)
    assert streamed.host - resident.host == 40 * block_bytes


def test_ddp_adds_its_buckets_and_eight_bits_replace_two_floats(tmp_path, small):
    training = CHECKPOINTED | EIGHT_BIT | {"gradient_accumulation_steps": 2}
    recipe = load_recipe(write_recipe(tmp_path, small, trainable=LORA, training=training))
    run = Run(recipe=recipe, shape=Shape(grids=SMALL, num_tokens=9))
    alone, together = forecast(run), forecast(replace(run, num_ranks=2))
    assert together.gradients == 2 * alone.gradients
    assert alone.optimizer == 2 * alone.gradients / 4
    single = load_recipe(recipe.path, ["training.gradient_accumulation_steps=1"])
    assert forecast(replace(run, recipe=single, num_ranks=2)).gradients == alone.gradients, "views of the buckets"


def test_blocks_that_differ_are_run_one_by_one_and_give_the_same(tmp_path, middle):
    recipe = load_recipe(write_recipe(tmp_path, middle, trainable=LORA, training=CHECKPOINTED))
    run = Run(recipe=recipe, shape=Shape(grids=SMALL, num_tokens=99))
    model = build_model(recipe, mixed_precision="bf16", empty=True)
    drawn_out = forecast(run, model)
    next(p for p in blocks_of(model)[2][2].parameters() if p.requires_grad).requires_grad_(False)
    one_by_one = forecast(run, model)
    assert one_by_one.peak == pytest.approx(drawn_out.peak, rel=1e-3)  # but for the tensor that no longer trains


@pytest.mark.parametrize("training", [{}, CHECKPOINTED], ids=["plain", "checkpointed"])
def test_rows_of_unequal_prompts_take_no_more(tmp_path, middle, monkeypatch, training):
    recipe = load_recipe(write_recipe(tmp_path, middle, trainable=LORA, training=training))
    run = Run(recipe=recipe, shape=Shape(grids=((12, 12),), num_tokens=99, rows=3))
    equal, batch_of = forecast(run).peak, forecasting._batch
    unequal = {"prompt_lengths": [99, 40, 7]}
    monkeypatch.setattr(forecasting, "_batch", lambda *given, **other: batch_of(*given, **other) | unequal)
    assert 0.9 * equal < forecast(run).peak < equal


# --- what fits -------------------------------------------------------------------------------------------------------


def test_the_fewest_changes_come_first_and_then_those_of_least_harm(tmp_path, small):
    path = write_recipe(tmp_path, small, trainable=LORA)

    def change(overrides=()):
        recipe = load_recipe(path, overrides)
        rows = recipe.training["per_device_train_batch_size"]
        return Run(recipe=recipe, shape=Shape(grids=((12, 12),), num_tokens=9, rows=rows))

    def needed(*overrides):
        return forecast(change(overrides)).needed

    def changes(limit):
        return [overrides for overrides, _ in fewest_changes(change(), change, limit)]

    checkpointed = "training.activation_checkpointing=true"
    halved, alone = (
        (f"training.per_device_train_batch_size={rows}", f"training.gradient_accumulation_steps={4 // rows}")
        for rows in (2, 1)
    )
    both = (checkpointed, *halved)
    assert max(needed(*alone), needed(*both)) < needed(checkpointed) < needed(*halved) < needed()
    assert changes(needed(checkpointed)) == [(checkpointed,), alone]
    assert changes(needed(checkpointed) - 1) == [alone]
    assert changes(needed(*halved)) == [(checkpointed,), halved]  # of fewer rows the most that fit
    assert changes(needed(*alone) - 1)[0] == both  # no single change is enough
    eight_bit, nf4, streamed = EIGHT_BIT["optim"], "memory.quantization=nf4", "memory.stream_blocks=3"
    everything = (
        checkpointed,
        *alone,
        "memory.offload_activations=true",
        f"training.optim={eight_bit}",
        nf4,
        streamed,
    )
    assert changes(0) == [everything]  # nothing fits


def test_fewer_rows_keep_all_their_draws(tmp_path, middle_21):
    mix = {"draws_per_row": 2, "same_shape": 4}
    training = CHECKPOINTED | {"per_device_train_batch_size": 8}
    path = write_recipe(tmp_path, middle_21, trainable=LORA, training=training, mix=mix)

    def change(overrides=()):
        recipe = load_recipe(path, overrides)
        rows = recipe.training["per_device_train_batch_size"] // 2
        return Run(recipe=recipe, shape=Shape(grids=SMALL, num_tokens=9, rows=rows, draws_per_row=2))

    assert "4 rows of 2 noises each, target" in report(change(), forecast(change()))
    halved = ("training.per_device_train_batch_size=4", "training.gradient_accumulation_steps=2")
    assert (halved, forecast(change(halved))) in fewest_changes(change(), change, forecast(change(halved)).needed)


def test_targets_of_several_draws_count_towards_the_largest_row(tiny, tmp_path):
    """Of two rows that are equally large with one draw a row, the one with the larger target is with more."""
    for name, grids in (("edit", ((4, 4), (8, 8))), ("text_to_image", ((8, 9),))):
        write_set(tmp_path / "sets" / name, tiny("qwen_image_21"), grids=grids)
    recipe = load_recipe(write_recipe(tmp_path, tiny("qwen_image_21")))
    sets, weights = open_sets(recipe), {"edit": 1.0, "text_to_image": 1.0}
    found = [largest_in(sets, weights, Mix(draws_per_row=count)) for count in (1, 4)]
    assert [shape.grids[0] for shape in found] == [(4, 4), (8, 9)]
    assert [shape.draws_per_row for shape in found] == [1, 4]


def test_what_a_recipe_has_already_is_raised_where_it_does_not_fit(tmp_path, middle):
    settings = {"trainable": LORA, "training": CHECKPOINTED, "memory": {"stream_blocks": 3, "quantization": "int8"}}
    path = write_recipe(tmp_path, middle, **settings)

    def change(overrides=()):
        return Run(recipe=load_recipe(path, overrides), shape=Shape(grids=((12, 12),), num_tokens=9))

    wanted = forecast(change(["memory.stream_blocks=5"])).needed
    assert fewest_changes(change(), change, wanted)[0][0] == ("memory.stream_blocks=5",)


def test_a_package_that_is_missing_leaves_quantisation_out_and_no_more(tmp_path, middle, monkeypatch, caplog):
    path = write_recipe(tmp_path, middle, trainable=LORA, training=CHECKPOINTED)

    def change(overrides=()):
        return Run(recipe=load_recipe(path, overrides), shape=Shape(grids=((12, 12),), num_tokens=9))

    model = build_model(change().recipe, mixed_precision="bf16", empty=True)
    whole = forecast(change(), model)
    monkeypatch.setitem(quantization.FLOORS, "torchao", "99")
    with pytest.raises(InputError, match="torchao>=99"):
        forecast(change(["memory.quantization=int8"]), model)
    assert forecast(change(), model) == whole
    ways = [way for way, _ in fewest_changes(change(), change, whole.needed - 1)]
    assert ways and not any("quantization" in one for way in ways for one in way)
    assert "not tried: memory.quantization: got int8: torchao>=99 is required" in caplog.text


def test_evaluation_on_more_rows_than_training_has_counts(tmp_path, middle):
    path = write_recipe(tmp_path, middle, trainable=LORA, training=CHECKPOINTED)
    run = Run(recipe=load_recipe(path), shape=Shape(grids=SMALL, num_tokens=9))
    peaks = [forecast(replace(run, eval_rows=rows)).peak for rows in (0, 1, 8)]
    assert peaks[0] == peaks[1] < peaks[2]
    evaluated = ["training.eval_strategy=steps", "tasks.edit.eval_rows=1"]
    run, _ = forecast_recipe(load_recipe(path, evaluated), replace(run.shape, rows=1))
    assert run.eval_rows == 8  # TrainingArguments' default


def test_an_optimizer_that_is_not_known_is_counted_as_adamw_and_said_so(tmp_path, small):
    path = write_recipe(tmp_path, small, trainable=LORA, training=CHECKPOINTED | {"use_cpu": None})
    found = {}
    for name in ("adamw_torch", "schedule_free_adamw", "adamw_torch_8bit"):
        recipe = load_recipe(path, [f"training.optim={name}"])
        run, found[name] = forecast_recipe(recipe, Shape(grids=SMALL, num_tokens=9))
        assert ("not known here" in report(run, found[name])) == (name == "schedule_free_adamw")
    assert found["schedule_free_adamw"].optimizer == pytest.approx(found["adamw_torch"].optimizer, rel=0.01)
    assert found["adamw_torch_8bit"].optimizer == found["schedule_free_adamw"].optimizer / 4


def test_a_recipe_that_shards_needs_the_number_of_gpus(tmp_path, small):
    recipe = load_recipe(write_recipe(tmp_path, small, training={"fsdp": True}))
    with pytest.raises(InputError, match=r"--num_gpus: the recipe shards training"):
        forecast_recipe(recipe, Shape(grids=SMALL, num_tokens=9))


def test_sets_without_latents_have_a_largest_row_too(extracted):
    recipe = load_recipe(extracted)
    sets, bare = open_sets(recipe), {}
    for name, data in sets.items():
        table = data.data.table
        for place, column in enumerate(table.column_names):
            if column in ("target_latents", "source_latents"):
                field = table.schema.field(column)
                table = table.set_column(place, field, pa.nulls(len(table), field.type))
        bare[name] = Dataset(table, info=data.info)
    weights = dict.fromkeys(sets, 1.0)
    assert largest_in(bare, weights, recipe.mix) == largest_in(sets, weights, recipe.mix)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def extracted(built_once, tiny, edits):
    """A recipe whose sets are finished."""
    return built_once("few_edits", lambda folder: extract_edits(folder, tiny(), edits)) / "recipe.yaml"


def largest_by_hand(recipe):
    """Tokens of the largest row, with its longest caption, of all sets."""
    found = []
    for name, data in open_sets(recipe).items():
        rows = TaskRows(name, data, mix=recipe.mix)
        for index in range(len(data)):
            for caption in (None, *np.linspace(0, 0.99, 8)):
                row = rows.read(index, inverse=False, caption=caption)
                found.append(sum(map(len, row["prompt_parts"])) + sum(h * w for h, w in row["grids"]))
    return max(found)


def test_the_report_is_of_the_largest_row_of_the_sets_or_of_rows_that_have_none_yet(extracted, capsys):
    recipe = load_recipe(extracted)
    shape = largest_shape(recipe)
    assert shape.size == largest_by_hand(recipe)
    assert shape.rows == 8  # TrainingArguments' default
    assert largest_shape(load_recipe(extracted, ["extract.output_dir=nowhere"])) == shape
    check.main([str(extracted), "--memory", "--gpu-memory", "80", "--num_gpus", "2"])
    head, *lines, verdict = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"forecast for 2 GPUs; largest micro-batch: 8 rows, target .* px, sources .* tokens", head)
    names = "weights gradients optimizer activations peak needed".split()
    figures = {line.split()[0]: float(line.split()[1]) for line in lines}
    assert list(figures) == names
    assert figures["needed"] == pytest.approx(1.03 * figures["peak"] + 1, abs=0.02)
    fits = r"training fits: 1\.\d\d of the 79\.03 GB \(10\^9 bytes\) that a program can use of a card of 80 GB"
    assert re.fullmatch(fits, verdict)


def test_a_recipe_that_does_not_fit_ends_the_check_with_what_would(extracted):
    with pytest.raises(InputError, match=r"does not fit: it needs 1\.\d+ of the 0\.49 GB .* of 0\.5 GB; none"):
        check.main([str(extracted), "trainable.lora={}", "--memory", "--gpu_memory", "0.5"])


def test_the_forecast_is_logged_on_an_accelerator_and_the_measured_peak_at_the_end(extracted, caplog):
    caplog.set_level(logging.INFO, logger="hf_qie")
    recipe = load_recipe(extracted, ["training={use_cpu: true, max_steps: 1, per_device_train_batch_size: 2}"])
    sets, arguments = open_sets(recipe), training_arguments(recipe, num_rows=1)
    assert forecast_start(recipe, sets, arguments) is None  # a CPU
    arguments.__dict__["_setup_devices"] = torch.device("cuda")
    found = forecast_start(recipe, sets, arguments)
    assert report(replace(forecast_recipe(recipe, largest_shape(recipe))[0], device="cuda"), found) in caplog.text
    arguments.__dict__["_setup_devices"] = torch.device("cpu")
    PeakMemory(found.peak).on_train_end(arguments, None, None)
    assert re.search(r"peak memory: \d+\.\d\d GB measured, \d+\.\d\d GB forecast", caplog.text)
