"""Throughput and memory in the log, and a run ends where its losses or gradients are not finite."""

import json
import logging
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
from accelerate import PartialState
from datasets import load_from_disk
from embedding_sets import write_recipe, write_set
from ranks import in_ranks
from training_runs import trainer_of
from transformers import TrainerCallback

from hf_qie.errors import InputError
from hf_qie.training.checkpoints import last_checkpoint
from hf_qie.training.metrics import NotFinite, Throughput
from hf_qie.training.model import parameters
from hf_qie.training.trainer import EditTrainer

LORA = {"lora": {"rank": 4, "alpha": 8}}
both_families = pytest.mark.parametrize("family", ["edit_plus", "qwen_image_21"])
PACE = ("rows_per_second", "tokens_per_second", "seconds_waiting_for_data", "peak_memory_gb")


@pytest.fixture(autouse=True)
def one_process():
    PartialState(cpu=True)


def spoil(folder: Path, row: int, value: float) -> None:
    """Put `value` into the target of one row of the set in `folder`."""

    def change(entry, index):
        latents = np.array(entry["target_latents"], np.float16)
        latents[0, 0] = value if index == row else latents[0, 0]
        return {"target_latents": latents}

    data = load_from_disk(folder)
    provenance = (folder / "provenance.json").read_text()
    spoilt = data.map(change, with_indices=True, features=data.features, new_fingerprint=data._fingerprint)
    spoilt.save_to_disk(folder.with_name("spoilt"))
    (folder.with_name("spoilt") / "provenance.json").write_text(provenance)


# --- a run that broke ------------------------------------------------------------------------------------------------


@both_families
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("logging_steps", [1, 4])
def test_a_loss_that_is_not_finite_ends_the_run_by_step_task_and_row(tiny, tmp_path, family, value, logging_steps):
    write_set(tmp_path / "sets" / "edit", tiny(family))
    spoil(tmp_path / "sets" / "edit", 5, value)
    tasks = {"edit": {"embeddings": str(tmp_path / "sets" / "spoilt")}, "text_to_image": {"data": "x", "weight": 0}}
    training = {"max_steps": 40, "logging_steps": logging_steps, "save_steps": 4}
    trainer = trainer_of(write_recipe(tmp_path, tiny(family), tasks=tasks, trainable=LORA, training=training))
    step = next(n for n in range(40) if 5 in [trainer.train_dataset[4 * n + i]["row"] for i in range(4)]) + 1
    # of which scripts show the message without a traceback
    with pytest.raises(InputError, match=rf"^step {step}: the loss of edit row 5 \((nan|inf)\) is not finite"):
        trainer.train()
    whole = (step - 1) // 4 * 4
    assert last_checkpoint(tmp_path / "run") == (tmp_path / "run" / f"checkpoint-{whole}" if whole else None)
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history)


@pytest.mark.parametrize("family", ["edit_plus", pytest.param("qwen_image_21", marks=pytest.mark.soak)])
@pytest.mark.two_rank
def test_a_loss_that_is_not_finite_on_one_rank_ends_both_by_its_row(tiny, tmp_path, family):
    write_set(tmp_path / "sets" / "edit", tiny(family))
    spoil(tmp_path / "sets" / "edit", 5, math.nan)
    tasks = {"edit": {"embeddings": str(tmp_path / "sets" / "spoilt")}, "text_to_image": {"data": "x", "weight": 0}}
    training = {"max_steps": 40, "logging_steps": 40, "save_steps": 40, "per_device_train_batch_size": 2}
    recipe = write_recipe(tmp_path, tiny(family), tasks=tasks, trainable=LORA, training=training)
    in_ranks([{"recipe": str(recipe), "overrides": []}], ranks=2, log=tmp_path / "log")
    for rank in range(2):
        error = json.loads((tmp_path / "run" / f"rank{rank}.json").read_text())["error"]
        assert "the loss of edit row 5 (nan) is not finite" in error
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def broken_backward(trainer: EditTrainer, at_step: int) -> None:
    """From `at_step` on, one gradient is NaN, of losses that are finite."""
    one = next(p for p in parameters(trainer.model).values() if p.requires_grad)
    one.register_hook(lambda gradient: gradient * (math.nan if trainer.state.global_step >= at_step - 1 else 1))


@both_families
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_gradient_that_is_not_finite_ends_the_run_before_it_is_saved(tiny, tmp_path, family, max_grad_norm):
    training = {"max_grad_norm": max_grad_norm, "save_steps": 1}
    trainer = trainer_of(write_recipe(tmp_path, tiny(family), trainable=LORA, training=training))
    broken_backward(trainer, at_step=3)
    with pytest.raises(NotFinite, match=r"^step 3: the norm of the gradient \(nan\), though not the loss of "):
        trainer.train()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_a_last_step_that_broke_does_not_pass_for_an_end(tiny, tmp_path):
    training = {"save_strategy": "no", "logging_strategy": "no"}
    trainer = trainer_of(write_recipe(tmp_path, tiny(), trainable=LORA, training=training))
    broken_backward(trainer, at_step=4)
    with pytest.raises(NotFinite, match=r"^step 4: "):
        trainer.train()


@both_families
def test_an_evaluation_that_is_not_finite_ends_the_run_before_it_is_saved(tiny, tmp_path, family):
    write_set(tmp_path / "sets" / "edit", tiny(family))
    spoil(tmp_path / "sets" / "edit", 7, math.nan)
    tasks = {"edit": {"embeddings": str(tmp_path / "sets" / "spoilt"), "eval_rows": 2}}
    training = {"eval_strategy": "steps"}
    trainer = trainer_of(
        write_recipe(tmp_path, tiny(family), tasks=tasks, trainable=LORA, training=training), "seed=1"
    )
    with pytest.raises(NotFinite, match=r"^evaluation: the loss of edit row 7 \(nan\) is not finite"):
        trainer.train()
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_what_is_kept_of_the_losses_does_not_grow_where_nothing_is_logged(tiny, tmp_path):
    training = {"save_strategy": "no", "logging_strategy": "no", "max_steps": 12}
    trainer = trainer_of(write_recipe(tmp_path, tiny(), trainable=LORA, training=training))
    sizes = []

    class Weigh(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            kept = {name: value for name, value in vars(trainer.losses).items() if name != "accelerator"}
            sizes.append(len(pickle.dumps(kept)))

    trainer.add_callback(Weigh())
    trainer.train()
    assert max(sizes[6:]) < min(sizes[2:6]) + 100
    last = next(entry for entry in reversed(trainer.state.log_history) if "loss" in entry)
    assert {"loss/edit", "loss/text_to_image"} <= last.keys()


# --- throughput ------------------------------------------------------------------------------------------------------


@both_families
def test_every_log_of_a_loss_has_the_throughput(tiny, tmp_path, family):
    training = {"max_steps": 8, "logging_steps": 2}
    trainer = trainer_of(write_recipe(tmp_path, tiny(family), trainable=LORA, training=training))
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 4
    for number, entry in enumerate(logs):
        assert set(PACE) <= entry.keys()
        batches = [
            [trainer.train_dataset[n] for n in range(first, first + 4)] for first in (8 * number, 8 * number + 4)
        ]
        rows = [row for batch in batches for row in batch]
        tokens = sum(
            len(row["target_latents"]) + len(row["source_latents"]) + sum(map(len, row["prompt_parts"]))
            for row in rows
        )
        # both are over the same seconds
        assert entry["tokens_per_second"] / entry["rows_per_second"] == pytest.approx(tokens / 8)
        assert 0 < entry["seconds_waiting_for_data"] < 8 / entry["rows_per_second"]
        assert 0.05 < entry["peak_memory_gb"] < 100


def test_seconds_are_those_of_the_steps_alone(tiny, tmp_path, monkeypatch):
    """A clock that only data, steps and what comes between them move."""
    now = [0.0]
    monkeypatch.setattr("hf_qie.training.metrics.time.perf_counter", lambda: now[0])
    trainer = trainer_of(write_recipe(tmp_path, tiny(), trainable=LORA))
    pace = Throughput(trainer.accelerator)
    batch = next(iter(trainer.get_train_dataloader()))
    for _ in range(3):
        now[0] += 1
        pace.add([batch, batch], started=now[0] - 1)
        now[0] += 4
        pace.end_step()
        now[0] += 100  # evaluation, or a checkpoint
    log = pace.read()
    assert log["rows_per_second"] == 3 * 8 / 15
    assert log["seconds_waiting_for_data"] == 3
    assert pace.seconds == 0


def test_the_log_reaches_tensorboard(tiny, tmp_path, caplog):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tasks = {"edit": {"data": "edit.jsonl", "eval_rows": 2}}
    training = {"report_to": "tensorboard", "eval_strategy": "steps", "logging_dir": None}
    with caplog.at_level(logging.WARNING):
        trainer_of(write_recipe(tmp_path, tiny(), tasks=tasks, trainable=LORA, training=training)).train()
    (events,) = (tmp_path / "run").rglob("events.out.tfevents.*")
    seen = event_accumulator.EventAccumulator(str(events)).Reload()
    wanted = {"train/loss", "train/loss/edit", "train/rows_per_second", "eval/loss", "eval/loss/edit"}
    assert wanted <= set(seen.Tags()["scalars"])
    assert len(seen.Scalars("train/loss")) == 4
