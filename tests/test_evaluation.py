"""Evaluation on held-out rows: the same at every call, without a trace in training, and it picks what is exported."""

import json
import logging
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from embedding_sets import write_recipe, write_set
from ranks import in_ranks
from safetensors.torch import load_file
from training_runs import run, trainer_of
from transformers import TrainerCallback

from hf_qie.config.recipe import load_recipe
from hf_qie.data.collate import collate
from hf_qie.errors import InputError
from hf_qie.training.evaluation import HeldOut, split_sets
from hf_qie.training.sets import open_sets
from hf_qie.training.trainer import EditTrainer

LORA = {"lora": {"rank": 4, "alpha": 8, "dropout": 0.2, "target_modules": "all-linear"}}
TASKS = {"edit": {"data": "edit.jsonl", "eval_rows": 3}, "text_to_image": {"data": "none.jsonl", "eval_rows": 5}}
EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "per_device_eval_batch_size": 2}

both_families = pytest.mark.parametrize("family", ["edit_plus", "qwen_image_21"])


@pytest.fixture(autouse=True)
def one_process():
    PartialState(cpu=True)


@pytest.fixture
def family() -> str:
    """The kind of the checkpoint; `both_families` gives others."""
    return "edit_plus"


@pytest.fixture
def recipe(tiny, tmp_path, family) -> Path:
    return write_recipe(tmp_path, tiny(family), tasks=TASKS, trainable=LORA, training=EVERY_STEP)


def losses(metrics: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if key.startswith("eval_loss")}


def evaluations(trainer: EditTrainer) -> dict[int, float]:
    """eval_loss by step."""
    return {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}


def adapters(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "pytorch_lora_weights.safetensors")


def hold(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- what it gives ---------------------------------------------------------------------------------------------------


@both_families
def test_it_is_the_mean_over_held_out_rows_each_once_by_task_and_by_noise(recipe):
    """Recomputed row by row; batches of two of three and five rows leave one over."""
    trainer = trainer_of(recipe)
    held_out, rows = trainer.eval_dataset, []
    for number in range(8):
        batch = trainer.objective.collate_held_out([held_out[number]], fractions=held_out.fractions)
        with torch.no_grad():
            loss = trainer.objective.losses(trainer.model.eval(), batch)
        rows.append((batch["task"][0], int(batch["sigma"] * 4), float(loss)))
    assert [task for task, _, _ in rows] == ["edit"] * 3 + ["text_to_image"] * 5
    metrics = losses(trainer.evaluate())
    expected = {"eval_loss": [loss for _, _, loss in rows]}
    for task, quarter, loss in rows:
        name = ("0.00-0.25", "0.25-0.50", "0.50-0.75", "0.75-1.00")[quarter]
        expected.setdefault(f"eval_loss/{task}", []).append(loss)
        expected.setdefault(f"eval_loss/sigma {name}", []).append(loss)
    assert len(expected) >= 6
    # float32 attention over a padded length adds up in another order
    assert metrics == pytest.approx({name: np.mean(values) for name, values in expected.items()}, rel=1e-5)


@both_families
def test_two_evaluations_of_one_checkpoint_are_equal(recipe):
    first = trainer_of(recipe).evaluate()
    trainer = trainer_of(recipe)
    trainer.get_train_dataloader()
    torch.rand(3)
    assert losses(trainer.evaluate()) == losses(trainer.evaluate()) == losses(first)


def test_every_rank_has_equally_many_batches_and_together_they_are_those_of_one(recipe):
    held_out = trainer_of(recipe).eval_dataset
    whole = held_out.batches(2, rank=0, world_size=1)
    assert sorted(number for batch in whole for number in batch) == list(range(8))
    for world_size in (2, 3, 7):
        ranks = [held_out.batches(2, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert len({len(batches) for batches in ranks}) == 1
        together = [batch for turn in zip(*ranks, strict=True) for batch in turn]
        assert together[: len(whole)] == whole
        assert all(batch in whole for batch in together)


def test_a_batch_is_of_one_shape(tiny, tmp_path):
    write_set(tmp_path / "sets" / "edit", tiny(), grids=((4, 4), (2, 4)))
    write_set(tmp_path / "sets" / "text_to_image", tiny(), grids=((4, 4), (4, 2)))
    loaded = load_recipe(write_recipe(tmp_path, tiny(), tasks=TASKS))
    held_out = HeldOut(split_sets(open_sets(loaded), loaded.tasks)[1], loaded)
    for batch in held_out.batches(8, rank=0, world_size=1):
        collate([held_out[number] for number in batch])  # asserts it


def test_held_out_rows_are_the_last_and_no_step_trains_on_them(recipe):
    trainer = trainer_of(recipe, "training.max_steps=30")
    draws, held_out = trainer.train_dataset, trainer.eval_dataset
    drawn = {(row["task"], row["row"]) for row in map(draws.__getitem__, range(len(draws)))}
    assert drawn == {("edit", row) for row in range(5)} | {("text_to_image", row) for row in range(3)}
    kept = [(row["task"], row["row"]) for row in map(held_out.__getitem__, range(len(held_out)))]
    assert kept == [("edit", row) for row in range(5, 8)] + [("text_to_image", row) for row in range(3, 8)]


def test_a_task_of_weight_0_is_evaluated_and_not_trained(recipe):
    trainer = run(recipe, "tasks.text_to_image.weight=0")
    assert "loss/text_to_image" not in {key for entry in trainer.state.log_history for key in entry}
    assert "eval_loss/text_to_image" in trainer.evaluate()


# --- what it leaves --------------------------------------------------------------------------------------------------


class Greedy(TrainerCallback):
    """Draws from every generator while evaluating, as images or a tracker may."""

    def on_prediction_step(self, args, state, control, **kwargs):
        torch.rand(3), np.random.random(3), random.random()


@both_families
def test_training_with_evaluation_is_training_without_bit_for_bit(recipe, tmp_path):
    without = run(recipe, "training.eval_strategy=no", f"training.output_dir={tmp_path / 'without'}")
    trainer = trainer_of(recipe, "training.eval_on_start=true")
    trainer.add_callback(Greedy())
    trainer.train()
    assert len(evaluations(trainer)) == 5
    steps = [
        [{key: value for key, value in entry.items() if key.startswith(("loss", "grad"))} for entry in log]
        for log in (trainer.state.log_history, without.state.log_history)
    ]
    assert [entry for entry in steps[0] if entry] == [entry for entry in steps[1] if entry]
    assert hold(adapters(tmp_path / "run" / "checkpoint-4"), adapters(tmp_path / "without"))
    states = [
        torch.load(tmp_path / run / "checkpoint-4" / "rng_state.pth", weights_only=False) for run in ("run", "without")
    ]
    assert torch.equal(states[0]["cpu"], states[1]["cpu"])
    assert states[0]["python"] == states[1]["python"]
    assert (states[0]["numpy"][1] == states[1]["numpy"][1]).all()


# --- the best checkpoint ---------------------------------------------------------------------------------------------

BEST = ("training.load_best_model_at_end=true", "training.lr_scheduler_type=constant")
WORSE_AND_WORSE = (*BEST, "training.learning_rate=0.3")


@both_families
@pytest.mark.parametrize("trainable", [LORA, {}], ids=["lora", "full"])
def test_the_best_checkpoint_is_what_is_exported(tiny, tmp_path, family, trainable):
    recipe = write_recipe(tmp_path, tiny(family), tasks=TASKS, trainable=trainable, training=EVERY_STEP)
    trainer = run(recipe, *WORSE_AND_WORSE)
    by_step = evaluations(trainer)
    best = min(by_step, key=by_step.get)
    assert best != 4, "the last step should not be the best"
    weights = {}
    for folder in (tmp_path / "run", tmp_path / "run" / f"checkpoint-{best}", tmp_path / "run" / "checkpoint-4"):
        (path,) = [*folder.glob("*.safetensors"), *folder.glob("transformer/*.safetensors")]
        weights[folder] = load_file(path)
    exported, chosen, last = weights.values()
    assert hold(exported, chosen)
    assert not hold(exported, last)
    assert trainer.evaluate()["eval_loss"] == by_step[best]


def test_the_best_of_the_steps_that_are_saved_is_exported(recipe, tmp_path):
    trainer = run(recipe, *WORSE_AND_WORSE, "training.save_steps=2")
    by_step = evaluations(trainer)
    assert min(by_step, key=by_step.get) == 1, "a step that is not saved should be the best"
    best = min((2, 4), key=by_step.get)
    assert hold(adapters(tmp_path / "run"), adapters(tmp_path / "run" / f"checkpoint-{best}"))


def test_the_best_checkpoint_by_one_task_outlives_the_limit(recipe, tmp_path):
    run(recipe, *WORSE_AND_WORSE, "training.metric_for_best_model=loss/edit", "training.save_total_limit=1")
    assert hold(adapters(tmp_path / "run"), adapters(tmp_path / "run" / "checkpoint-1"))


def test_a_best_checkpoint_that_is_not_what_was_written_is_refused(recipe, tmp_path):
    trainer = trainer_of(recipe, *WORSE_AND_WORSE)

    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                path = Path(state.best_model_checkpoint, "pytorch_lora_weights.safetensors")
                path.write_bytes(path.read_bytes()[:-1] + b"x")

    trainer.add_callback(Spoil())
    with pytest.raises(InputError, match=r"the best checkpoint is incomplete: \S+\.safetensors has changed"):
        trainer.train()


@both_families
def test_a_resumed_run_knows_the_best_checkpoint(recipe, tmp_path):
    straight = run(recipe, *WORSE_AND_WORSE)
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    resumed = run(recipe, *WORSE_AND_WORSE)
    assert evaluations(resumed) == evaluations(straight)
    assert hold(adapters(tmp_path / "run"), adapters(tmp_path / "run" / "checkpoint-1"))


# --- on two ranks ----------------------------------------------------------------------------------------------------

WEIGHTS = {"full": "transformer/diffusion_pytorch_model.safetensors", "lora": "pytorch_lora_weights.safetensors"}
SHARDED = "training.fsdp=true", "training.fsdp_config={state_dict_type: SHARDED_STATE_DICT}"
WHOLE = "training.fsdp=true", "training.fsdp_config={state_dict_type: FULL_STATE_DICT}"
WAYS = {"ddp": ["training.use_cpu=true"], "sharded": SHARDED, "whole": WHOLE}
EVERY = {"full": tuple(WAYS), "lora": tuple(WAYS)}


@pytest.mark.two_rank
@pytest.mark.parametrize(
    ("family", "ways"),
    [
        ("edit_plus", EVERY),
        ("qwen_image_21", {"lora": ("ddp", "sharded")}),
        pytest.param("qwen_image_21", EVERY, marks=pytest.mark.soak),
    ],
)
def test_two_ranks_sharded_or_not_evaluate_alike_and_export_the_best(tiny, tmp_path, family, ways):
    runs, names = [], {}
    for kind in ways:
        (tmp_path / kind).mkdir()
        training = EVERY_STEP | {"use_cpu": None, "per_device_train_batch_size": 2}
        trainable = {"full": {}, "lora": LORA}[kind]
        recipe = write_recipe(tmp_path / kind, tiny(family), tasks=TASKS, trainable=trainable, training=training)
        for name in ways[kind]:
            names[kind, name] = tmp_path / kind / name
            overrides = [*WORSE_AND_WORSE, f"training.output_dir={names[kind, name]}", *WAYS[name]]
            runs.append({"recipe": str(recipe), "overrides": overrides})
    assert in_ranks(runs, ranks=2, log=tmp_path / "log") == [0, 0], (tmp_path / "log").read_text()
    for (kind, name), folder in names.items():
        ours, theirs = (json.loads((folder / f"rank{rank}.json").read_text())["evaluations"] for rank in (0, 1))
        assert [losses(entry) for entry in ours] == [losses(entry) for entry in theirs]
        plain = json.loads((names[kind, "ddp"] / "rank0.json").read_text())["evaluations"]
        assert len(ours) == 4
        # float32 sums in another order, which so large a rate blows up from step to step
        assert losses(ours[0]) == pytest.approx(losses(plain[0]), rel=1e-3)
        best = min(ours, key=lambda entry: entry["eval_loss"])["step"]
        assert best != 4
        exported = load_file(folder / WEIGHTS[kind])
        if (kind, name) == ("full", "sharded"):  # its checkpoints have no whole transformer
            assert "is the best checkpoint (loss" in (tmp_path / "log").read_text()
            checkpoint = names[kind, "whole"] / f"checkpoint-{best}"
            weights = load_file(checkpoint / WEIGHTS[kind])
            assert all(torch.allclose(exported[key], weights[key], atol=1e-2) for key in weights)
        else:
            assert hold(exported, load_file(folder / f"checkpoint-{best}" / WEIGHTS[kind]))


# --- what people get wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tasks.edit.eval_rows=9"], "tasks.edit.eval_rows: 9, but its set has 8 rows; hold out fewer"),
        (["tasks.edit.eval_rows=8"], "tasks.edit: weight 1, but no row is left; lower eval_rows"),
        (
            ["tasks.edit.eval_rows=0", "tasks.text_to_image.eval_rows=0"],
            "training.eval_strategy: no task holds out rows to evaluate on; set tasks.<name>.eval_rows",
        ),
        (
            ["training.metric_for_best_model=loss/edits"],
            "training.metric_for_best_model: 'loss/edits'; there are loss, loss/edit, loss/text_to_image",
        ),
        (
            ["training.load_best_model_at_end=true", "training.eval_steps=2", "training.save_steps=3"],
            "requires the saving steps to be a round multiple of the evaluation steps, but found 3",
        ),
        (["training.load_best_model_at_end=true", "training.eval_strategy=no"], "requires the save and eval strategy"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(recipe, overrides, message):
    with pytest.raises(InputError) as error:
        trainer_of(recipe, *overrides)
    assert message in str(error.value)


def test_rows_that_are_held_out_and_never_evaluated_are_told(recipe, caplog):
    caplog.set_level(logging.INFO, "hf_qie")
    run(recipe, "training.eval_strategy=no", "training.max_steps=1")
    assert "rows are held out, but never evaluated on while training; score.py does" in caplog.text
