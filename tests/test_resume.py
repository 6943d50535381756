"""A resumed run trains with the settings of its recipe, and what cannot be is refused."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from embedding_sets import write_recipe
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from transformers import TrainingArguments

import hf_qie.training.setup
from hf_qie.config.recipe import load_recipe
from hf_qie.errors import InputError
from hf_qie.train import train
from hf_qie.training.checkpoints import apply_settings, settings_of
from hf_qie.training.model import parameters
from hf_qie.training.sets import open_sets
from hf_qie.training.trainer import EditTrainer

LORA = {"lora": {"rank": 4, "alpha": 8}}


@pytest.fixture(autouse=True)
def one_process():
    PartialState(cpu=True)


def run(recipe: Path, *overrides: str) -> EditTrainer:
    loaded = load_recipe(recipe, [f"training.{override}" for override in overrides])
    return train(loaded, open_sets(loaded))


def interrupted(tmp_path: Path) -> str:
    """The override for a copy of the run as it lay there after step 2."""
    shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    return f"output_dir={tmp_path / 'resumed'}"


def rates(trainer: EditTrainer) -> list[float]:
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


ADAMW = (
    ["learning_rate=1e-2"],
    ["learning_rate=1e-6", "weight_decay=0.5", "adam_beta1=0.8", "adam_epsilon=1e-5"],
    "training.learning_rate 0.01 -> 1e-06, training.weight_decay 0.0 -> 0.5, training.adam_beta1 0.9 -> 0.8",
    {"weight_decay": 0.5, "betas": (0.8, 0.999), "eps": 1e-5, "initial_lr": 1e-6},
)


@pytest.mark.parametrize(
    ("family", "before", "after", "said", "holds"),
    [
        ("edit_plus", *ADAMW),
        ("qwen_image_21", *ADAMW),
        (
            "edit_plus",
            ["optim=adafactor", "learning_rate=1e-2"],
            ["optim=adafactor", "learning_rate=1e-6", "weight_decay=0.5"],
            "training.learning_rate 0.01 -> 1e-06, training.weight_decay 0.0 -> 0.5",
            {"weight_decay": 0.5, "initial_lr": 1e-6},
        ),
        (
            "edit_plus",
            ["optim=rmsprop", "optim_args='momentum=0.5'"],
            ["optim=rmsprop", "optim_args='momentum=0.9'", "learning_rate=1e-6"],
            "training.optim_args momentum=0.5 -> momentum=0.9, training.learning_rate 0.001 -> 1e-06",
            {"momentum": 0.9, "initial_lr": 1e-6},
        ),
    ],
    ids=["adamw", "adamw 2.1", "adafactor", "rmsprop"],
)
def test_the_optimizer_of_a_resumed_run_has_the_settings_of_its_recipe(
    tiny, tmp_path, caplog, family, before, after, said, holds
):
    path = write_recipe(tmp_path, tiny(family), trainable=LORA)
    run(path, *before)
    with caplog.at_level(logging.INFO, logger="hf_qie"):
        resumed = run(path, *after, interrupted(tmp_path))
    assert f"checkpoint-2 on: {said}" in caplog.text
    assert rates(resumed)[2:] == pytest.approx([5e-7, 2.5e-7])
    saved = torch.load(tmp_path / "resumed" / "checkpoint-4" / "optimizer.pt", weights_only=True)["param_groups"][0]
    assert {key: saved[key] for key in holds} == holds
    (changed,) = json.loads((tmp_path / "resumed" / "run.json").read_text())["changes"]
    assert changed["step"] == 2
    assert changed["changed"]["learning_rate"][1] == 1e-6


SCHEDULES = [
    ["lr_scheduler_type=cosine", "learning_rate=1e-5"],
    ["warmup_steps=3"],
    ["max_steps=8"],
    ["lr_scheduler_type=cosine_with_min_lr", "lr_scheduler_kwargs={min_lr: 1.0e-4}"],
    ["lr_scheduler_type=constant", "learning_rate=1e-5"],
]


@pytest.mark.parametrize(
    ("family", "after"),
    [("edit_plus", after) for after in SCHEDULES] + [("qwen_image_21", SCHEDULES[0])],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_the_rates_of_a_resumed_run_are_those_of_a_run_with_its_settings_from_the_start(tiny, tmp_path, family, after):
    path = write_recipe(tmp_path, tiny(family), trainable={"lora": LORA["lora"], "low_lr_modules": ["attn.to_q"]})
    run(path, "max_steps=2")
    resumed = run(path, *after, interrupted(tmp_path))
    straight = run(path, *after, f"output_dir={tmp_path / 'straight'}")
    assert rates(resumed)[2:] == rates(straight)[2:]
    low = {id(p) for name, p in parameters(resumed.model).items() if "attn.to_q" in name}
    for group in (group for group in resumed.optimizer.param_groups if group["params"]):
        half = 0.5 if {id(p) for p in group["params"]} & low else 1
        assert group["initial_lr"] == resumed.args.learning_rate * half


def test_a_change_is_on_record_for_good(tiny, tmp_path):
    path = write_recipe(tmp_path, tiny(), trainable=LORA)
    run(path)
    run(path, "learning_rate=1e-5", interrupted(tmp_path))
    again = run(path, "learning_rate=1e-5", "max_steps=6", f"output_dir={tmp_path / 'resumed'}")
    assert [(one["step"], sorted(one["changed"])) for one in again.record["changes"]] == [
        (2, ["learning_rate"]),
        (4, ["max_steps"]),
    ]


@pytest.mark.parametrize(
    ("after", "message"),
    [
        ("optim=adafactor", r"training.optim, .*\(training.optim was adamw_torch, is adafactor\)"),
        (
            "lr_scheduler_type=reduce_lr_on_plateau",
            r"training.lr_scheduler_type was one that goes by the step, is reduce_lr_on_plateau\)",
        ),
    ],
)
def test_states_of_no_use_are_refused_by_name_before_the_model_is_loaded(tiny, tmp_path, monkeypatch, after, message):
    tasks = {"edit": {"data": "edit.jsonl", "eval_rows": 2}}
    path = write_recipe(tmp_path, tiny(), tasks=tasks, trainable=LORA, training={"eval_strategy": "steps"})
    run(path)
    monkeypatch.setattr(hf_qie.training.setup, "make_model", lambda *_: pytest.fail("the model is loaded"))
    with pytest.raises(InputError, match=message):
        run(path, after, "metric_for_best_model=loss")


def optimizer_of(rate, **more) -> torch.optim.Optimizer:
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=rate, **more)


def resumed_as(make, tmp_path, before: dict, after: dict, train_on) -> tuple:
    """Optimizer and schedule of a run with the settings `after`, out of the states of one with `before`."""
    arguments = [TrainingArguments(str(tmp_path), use_cpu=True, **settings) for settings in (before, after)]
    optimizer, schedule = make(arguments[0])
    was = settings_of(arguments[0], optimizer, schedule)
    train_on(optimizer, schedule)
    states = optimizer.state_dict(), schedule.state_dict()
    optimizer, schedule = make(arguments[1])
    now = settings_of(arguments[1], optimizer, schedule)
    optimizer.load_state_dict(states[0])
    schedule.load_state_dict(states[1])
    apply_settings(was, now, optimizer, schedule)
    return optimizer, schedule


def test_a_schedule_that_follows_a_metric_keeps_what_it_took_off(tmp_path):
    def make(arguments):
        optimizer = optimizer_of(arguments.learning_rate)
        return optimizer, ReduceLROnPlateau(optimizer, **arguments.lr_scheduler_kwargs)

    def stand_still(optimizer, schedule):
        for _ in range(4):
            schedule.step(1.0)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)

    before = {"learning_rate": 1e-2, "lr_scheduler_kwargs": {"factor": 0.1, "patience": 2}}
    after = {"learning_rate": 1e-4, "lr_scheduler_kwargs": {"factor": 0.5, "patience": 1}}
    optimizer, schedule = resumed_as(make, tmp_path, before, after, stand_still)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-5)
    assert (schedule.factor, schedule.patience, schedule.best) == (0.5, 1, 1.0)
    schedule.step(2.0)
    schedule.step(2.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-6)


def test_settings_that_did_not_change_touch_no_rate():
    """Reductions that were made would come out different in the last bit."""
    optimizer = optimizer_of(2e-5)
    schedule = ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
    now = settings_of(TrainingArguments(output_dir="run", use_cpu=True), optimizer, schedule)
    for _ in range(3):
        schedule.step(1.0)
    rate = optimizer.param_groups[0]["lr"]
    assert rate * 2e-5 / 2e-5 != rate
    apply_settings(now | {"changes": []}, now, optimizer, schedule)
    assert optimizer.param_groups[0]["lr"] == rate


def test_a_rate_that_is_a_tensor_stays_that_tensor_and_what_an_optimizer_counts_in_its_groups_stays(tmp_path):
    """As torchao's 8-bit optimizers have it, which are compiled, and as schedule-free ones count."""
    made = []

    def make(arguments):
        optimizer = optimizer_of(torch.tensor(arguments.learning_rate), foreach=False)
        optimizer.param_groups[0]["k"] = 0
        made.append(optimizer)
        return optimizer, LambdaLR(optimizer, lambda step: 1 - step / 10)

    def steps(optimizer, schedule):
        for _ in range(2):
            optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
            optimizer.step()
            optimizer.param_groups[0]["k"] += 1
            schedule.step()

    optimizer, _ = resumed_as(make, tmp_path, {"learning_rate": 1e-2}, {"learning_rate": 1e-4}, steps)
    rate = optimizer.param_groups[0]["lr"]
    assert torch.is_tensor(rate)
    assert float(rate) == pytest.approx(8e-5)
    assert optimizer.param_groups[0]["k"] == 2
