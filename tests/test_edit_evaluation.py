"""Scores of edits while training: what a Trainer user expects of metrics, and no trace in training."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from embedding_sets import write_recipe
from PIL import Image
from ranks import in_ranks
from safetensors.torch import load_file
from small_recipes import extract_edits
from training_runs import run, trainer_of

from hf_qie.config.recipe import load_recipe
from hf_qie.errors import InputError
from hf_qie.measures.edits import SCORES, score_edit
from hf_qie.models.base import read_family
from hf_qie.training.evaluation import HeldOut, higher_is_better, split_sets
from hf_qie.training.held_out_edits import FILES, LATENTS, HeldOutEdits
from hf_qie.training.objective import Objective
from hf_qie.training.sets import open_sets

LORA = {"lora": {"rank": 4, "alpha": 8, "dropout": 0.2, "target_modules": "all-linear"}}
TASKS = {"edit": {"data": "edit.jsonl", "eval_rows": 2}, "text_to_image": {"data": "none.jsonl", "eval_rows": 1}}
EVERY_OTHER = {"every": 2, "rows": 3, "num_inference_steps": 2}


@pytest.fixture(autouse=True)
def one_process():
    PartialState(cpu=True)


@pytest.fixture
def recipe(tiny, tmp_path) -> Path:
    return write_recipe(tmp_path, tiny(), tasks=TASKS, trainable=LORA, evaluation=EVERY_OTHER)


@pytest.fixture
def extracted(built_once, tiny, edits) -> Path:
    """A recipe whose sets are finished."""
    return built_once("few_edits", lambda folder: extract_edits(folder, tiny("edit_plus"), edits)) / "recipe.yaml"


def metrics_by_step(trainer) -> dict[int, dict[str, float]]:
    return {entry["step"]: entry for entry in trainer.state.log_history if "eval_loss" in entry}


# --- what they are ---------------------------------------------------------------------------------------------------


def test_they_are_metrics_of_evaluation_at_the_steps_that_are_due(recipe):
    trainer = run(recipe, "training.eval_strategy=steps", "training.eval_steps=1")
    logged = metrics_by_step(trainer)
    assert [*logged] == [1, 2, 3, 4]
    assert ["eval_psnr" in logged[step] for step in (1, 2, 3, 4)] == [False, True, False, True]
    assert {f"eval_psnr/{task}" for task in TASKS} <= logged[2].keys()
    assert logged[2]["eval_psnr"] != logged[4]["eval_psnr"], "the model has learned"
    mean = (2 * logged[4]["eval_psnr/edit"] + logged[4]["eval_psnr/text_to_image"]) / 3
    assert logged[4]["eval_psnr"] == pytest.approx(mean)


def test_a_figure_is_the_mean_score_of_what_the_model_makes_of_each_row(extracted, tmp_path):
    """Recomputed row by row; the images of the rows are their files."""
    held_out = ["tasks.edit.eval_rows=2", "tasks.combine.eval_rows=1", "evaluation={every: 1, num_inference_steps: 2}"]
    trainer = trainer_of(extracted, *held_out, "training.use_cpu=true", f"training.output_dir={tmp_path / 'run'}")
    edits, scores = trainer.compute_metrics.edits, []
    for number in range(3):
        assert edits.origin(number) == FILES
        made = edits.vae.decode(*edits.latents(trainer.model.eval(), number, trainer.recipe.evaluation))
        task, index = edits.held_out.places[number]
        row = edits.held_out.tasks[task].rows.data[index]
        height, width = np.array(row["target_grid"]) * 16
        target, *sources = (
            np.asarray(Image.open(path).convert("RGB").resize((width, height), Image.Resampling.LANCZOS))
            for path in (row["target_image"], *row["source_image"])
        )
        scores.append(score_edit(np.asarray(made), target, sources))
    found = trainer.compute_metrics.scores()
    for name in ("psnr", "edited", "kept_error", "edit_score"):
        assert found[name] == pytest.approx(np.mean([one[name] for one in scores]))
        assert found[f"{name}/combine"] == pytest.approx(scores[0][name])


def test_rows_whose_files_are_gone_are_compared_with_their_latents(recipe, caplog):
    caplog.set_level("INFO", "hf_qie")
    edits = trainer_of(recipe).compute_metrics.edits
    assert {edits.origin(number) for number in range(3)} == {LATENTS}
    target, source = edits.images(0)
    assert (target.size, source.size) == ((64, 64), (64, 32))
    assert "tasks.edit: edits are compared with what the VAE makes of its stored latents" in caplog.text


def test_the_other_instructions_of_a_source_are_those_with_another_target(recipe):
    loaded = load_recipe(recipe, ["tasks.edit.eval_rows=5", "tasks.text_to_image.eval_rows=2"])
    sets = split_sets(open_sets(loaded), loaded.tasks)[1]
    pairs = [("a", "b"), ("a", "c"), ("a", "b"), ("d", "e"), ("d", "e")]  # an edit may be described twice
    data = sets["edit"].remove_columns(["source_image", "target_image"])
    data = data.add_column("source_image", [[source] for source, _ in pairs])
    sets["edit"] = data.add_column("target_image", [target for _, target in pairs])
    edits = HeldOutEdits(
        HeldOut(sets, loaded),
        loaded,
        objective=Objective(loaded, global_batch_size=1),
        vae=None,
        on_device=dict,
    )
    (first, *_), *rest = [edits.others(number) for number in range(7)]
    assert pairs[first] == ("a", "c")
    assert [[pairs[n] for n in others] for others in rest] == [[("a", "b")], [("a", "c")], [], [], [], []]


# --- what they leave -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["edit_plus", "qwen_image_21"])
def test_training_with_scores_is_training_without_bit_for_bit(tiny, tmp_path, monkeypatch, family):
    """Though something in the making of images draws from every generator."""
    recipe = write_recipe(tmp_path, tiny(family), tasks=TASKS, trainable=LORA, evaluation=EVERY_OTHER)
    module, calls = sys.modules[read_family(str(tiny(family))).denoise.__module__], []
    predict = module.predict
    monkeypatch.setattr(module, "predict", lambda *args: calls.append(torch.rand(3)) or predict(*args))
    without = run(recipe, "evaluation.every=0", f"training.output_dir={tmp_path / 'without'}")
    trainer = run(recipe)
    assert [*metrics_by_step(trainer)] == [2, 4], "without training.eval_strategy"
    assert len(calls) >= 3 * 2 * 2  # images x evaluations x steps
    losses = [
        [(entry["loss"], entry["grad_norm"]) for entry in log.state.log_history if "loss" in entry]
        for log in (trainer, without)
    ]
    assert losses[0] == losses[1]
    one, other = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("run", "without"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    states = [
        torch.load(tmp_path / name / "checkpoint-4" / "rng_state.pth", weights_only=False)
        for name in ("run", "without")
    ]
    assert torch.equal(states[0]["cpu"], states[1]["cpu"])


SHARDED = "training.fsdp=true", "training.fsdp_config={state_dict_type: SHARDED_STATE_DICT}"


@pytest.mark.two_rank
def test_two_ranks_sharded_or_not_have_the_scores_of_one(tiny, tmp_path):
    training = {"use_cpu": None, "per_device_train_batch_size": 2, "max_steps": 2, "adam_epsilon": 1e-3}
    path = write_recipe(
        tmp_path,
        tiny(),
        tasks=TASKS,
        trainable={"lora": LORA["lora"] | {"dropout": 0.0}},
        training=training,
        evaluation=EVERY_OTHER,
        extract={"dtype": "float32"},
    )
    ways = {"ddp": ["training.use_cpu=true"], "sharded": SHARDED}
    runs = [
        {"recipe": str(path), "overrides": [f"training.output_dir={tmp_path / name}", *way]}
        for name, way in ways.items()
    ]
    assert in_ranks(runs, ranks=2, log=tmp_path / "log") == [0, 0], (tmp_path / "log").read_text()
    one = ["training.use_cpu=true", "training.per_device_train_batch_size=4"]
    expected = metrics_by_step(run(path, *one, f"training.output_dir={tmp_path / 'one'}"))[2]
    for name in ways:
        for rank in range(2):
            (found,) = json.loads((tmp_path / name / f"rank{rank}.json").read_text())["evaluations"]
            assert {key for key in found if key.startswith("eval_psnr")} >= {"eval_psnr", "eval_psnr/edit"}
            for key in (key for key in found if key.startswith("eval_psnr")):
                assert found[key] == pytest.approx(expected[key], abs=0.05), (name, rank)  # sums in another order


# --- the best checkpoint ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["edit_score", "eval_psnr/edit"])
def test_the_best_checkpoint_may_be_that_with_the_best_score(recipe, tmp_path, metric):
    best = ["training.load_best_model_at_end=true", f"training.metric_for_best_model={metric}"]
    trainer = run(recipe, *best, "evaluation.every=1", "training.save_steps=1", "training.learning_rate=0.1")
    by_step = {step: found["eval_" + metric.removeprefix("eval_")] for step, found in metrics_by_step(trainer).items()}
    step = max(by_step, key=by_step.get)
    assert trainer.state.best_metric == by_step[step]
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{step}")
    weights = [
        load_file(folder / "pytorch_lora_weights.safetensors")
        for folder in (tmp_path / "run", tmp_path / "run" / f"checkpoint-{step}")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_trainer_knows_of_each_score_whether_higher_is_better(recipe):
    for metric in ("loss", "loss/edit", "eval_loss", *SCORES, *(f"eval_{score}/edit" for score in SCORES)):
        named = metric.removeprefix("eval_").partition("/")[0]
        expected = named != "loss" and SCORES[named].higher_is_better
        assert higher_is_better(load_recipe(recipe, [f"training.metric_for_best_model={metric}"])) is expected
    trainer = trainer_of(recipe, "training.metric_for_best_model=edit_score")
    assert trainer.args.greater_is_better is True
    assert trainer_of(recipe, "training.metric_for_best_model=loss/edit").args.greater_is_better is False


# --- what people get wrong, and are told -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["metric_for_best_model=edit_skore"], "'edit_skore'; there are loss, loss/edit, loss/text_to_image, and"),
        (["metric_for_best_model=psnr/edits"], "'psnr/edits'; there are loss, loss/edit, loss/text_to_image, and"),
        (
            ["metric_for_best_model=edit_score", "eval_steps=1"],
            "'edit_score' is a score of edits, which every evaluation needs, and evaluation.every is 2; set it to "
            "training.eval_steps",
        ),
        (
            ["metric_for_best_model=own_instruction"],
            "'own_instruction' is not defined for any of the 3 rows that are evaluated, which have edit_score, ",
        ),
        (
            ["metric_for_best_model=judge_followed"],
            "'judge_followed' needs a judge, which score.py alone loads; give it",
        ),
        (["metric_for_best_model=psnr", "greater_is_better=false"], "a higher psnr is better; leave it out"),
    ],
)
def test_a_metric_that_no_evaluation_would_have_is_told_before_the_first_step(recipe, overrides, told):
    with pytest.raises(InputError) as error:
        trainer_of(recipe, *(f"training.{one}" for one in overrides))
    assert told in str(error.value)


def test_a_score_without_scores_is_refused(recipe):
    with pytest.raises(InputError, match=r"and evaluation\.every is 0; set it to training\.eval_steps"):
        trainer_of(
            recipe,
            "evaluation.every=0",
            "training.eval_strategy=steps",
            "training.metric_for_best_model=edit_score",
        )


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["training.eval_strategy=no"], r"evaluation\.every: got 2, but training\.eval_strategy is no; leave it out"),
        (["training.eval_steps=3"], r"evaluation\.every: got 2, expected a multiple of training\.eval_steps, 3$"),
        (
            ["tasks.edit.eval_rows=0", "tasks.text_to_image.eval_rows=0"],
            r"evaluation\.every: no task holds out rows to evaluate on; set tasks",
        ),
    ],
)
def test_steps_that_contradict_each_other_are_refused_with_the_recipe(recipe, overrides, told):
    with pytest.raises(InputError, match=told):
        load_recipe(recipe, overrides)
