"""The forecast of memory is what the allocator hands out, and what the released model is known to take."""

import shutil

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from embedding_sets import write_recipe, write_set
from test_footprint import released
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from hf_qie.config.recipe import load_recipe
from hf_qie.data.largest import Shape
from hf_qie.training.forecast import Run, forecast
from hf_qie.training.sets import open_sets
from hf_qie.training.setup import build_trainer

LORA = {"lora": {"rank": 32, "alpha": 32}}
CHECKPOINTED = {"activation_checkpointing": True}


@pytest.fixture(scope="module")
def middle(tiny, built_once):
    """A checkpoint whose transformer has 6 blocks of width 512."""

    def build(folder):
        shutil.copytree(tiny(), folder)
        shape = {"num_layers": 6, "num_attention_heads": 4, "attention_head_dim": 128, "joint_attention_dim": 96}
        QwenImageTransformer2DModel(**shape).save_pretrained(folder / "transformer")

    return built_once("middle", build)


class Measure(TrainerCallback):
    """The most bytes that torch's allocator of the CPU has handed out in the last step."""

    def __init__(self, trainer):
        self.trainer, self.peak = trainer, 0

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == args.max_steps - 1:
            tensors = [*self.trainer.model.parameters()]
            tensors += [value for one in self.trainer.optimizer.state.values() for value in one.values()]
            storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
            self.held = sum(storage.nbytes() for storage in storages.values())
            self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.profiler.start()

    def on_step_end(self, args, state, control, **_):
        if state.global_step == args.max_steps:
            self.profiler.stop()
            events = [e for e in self.profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
            change = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
            self.peak = self.held + int(change.cumsum(0).max())


def measured(trainer):
    trainer.add_callback(found := Measure(trainer))
    trainer.train()
    return found.peak


CASES = [
    (size, way, precision, training)
    for size, way in (("tiny", "all"), ("middle", "LoRA"))
    for precision in ("no", "bf16")
    for training in ({}, CHECKPOINTED)
]
CASES += [("middle", "all", "no", CHECKPOINTED | {"optim": "adafactor"})]
CASES += [("tiny", "LoRA", "no", CHECKPOINTED | {"optim": "adamw_torch", "gradient_accumulation_steps": 2})]


@pytest.mark.parametrize(("size", "way", "precision", "training"), CASES)
def test_the_forecast_is_what_a_step_takes_on_the_cpu(tiny, middle, tmp_path, size, way, precision, training):
    model, grids = (tiny(), ((8, 8), (8, 8))) if size == "tiny" else (middle, ((12, 12), (12, 12)))
    write_set(tmp_path / "sets" / "edit", model, grids=grids)
    settings = {"max_steps": 2, "save_strategy": "no", "per_device_train_batch_size": 2, "bf16": precision == "bf16"}
    trainable = {"LoRA": LORA, "all": {}}[way]
    path = write_recipe(tmp_path, model, training=settings | training, trainable=trainable, mix={"same_shape": 2})
    recipe = load_recipe(path, ["tasks={edit: {data: edit.jsonl}}"])
    trainer, _ = build_trainer(recipe, open_sets(recipe))
    shape = Shape(grids=grids, num_tokens=9, rows=2)
    expected = forecast(Run(recipe=recipe, shape=shape, precision=precision, device="cpu")).peak
    found = measured(trainer)
    assert expected == pytest.approx(found, rel=0.1)


LARGEST = ((32, 32), (64, 64))  # 512 px, and a source of 1024 px


def released_run(tmp_path, grids=LARGEST, *, num_ranks=1, fsdp=None, training=CHECKPOINTED, **sections):
    recipe = released(tmp_path, training=training | {"gradient_accumulation_steps": 4}, **sections)
    return Run(recipe=recipe, shape=Shape(grids=grids, num_tokens=600), num_ranks=num_ranks, fsdp=fsdp)


@pytest.mark.parametrize(
    ("grids", "training", "peak_gb"),
    [(LARGEST, CHECKPOINTED, 45.7), (((64, 64), (64, 64)), CHECKPOINTED, 47.6), (LARGEST, {}, 88.9)],
)
def test_a_lora_of_the_released_model_takes_what_was_counted_before(tmp_path, grids, training, peak_gb):
    found = forecast(released_run(tmp_path, grids, training=training, trainable=LORA))
    assert found.peak / 1e9 == pytest.approx(peak_gb, rel=0.02)
    assert found.weights / 1e9 == pytest.approx(41.24, abs=0.01)
