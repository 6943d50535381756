"""score.py: the scores of training at that step, what sampling.py makes of those rows, and no row done twice."""

import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from embedding_sets import WIDTH
from PIL import Image
from small_recipes import extract_edits
from training_runs import run

from hf_qie.config.recipe import load_recipe
from hf_qie.data.images import read_image
from hf_qie.hub.sampler import Sampler
from hf_qie.hub.score_report import best_of, table
from hf_qie.hub.scoring import Scorer
from hf_qie.measures.edits import SCORES
from hf_qie.models.prompts import PromptEmbeddings
from hf_qie.score import main
from hf_qie.training.sets import open_sets

LORA = {"lora": {"rank": 4, "alpha": 8, "target_modules": "all-linear"}}
NAMES = ["edit-4", "combine-2", "edit-5"]  # by places of rows within their tasks
TASKS = "combine", "edit"
CHECKPOINTS = "base", "checkpoint-1", "checkpoint-2"


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    PartialState(cpu=True)


def trained(folder: Path, model: Path, edits: Path, trainable: dict) -> None:
    """`folder`/recipe.yaml of a run of two steps, evaluated at the start and at each."""
    extract_edits(folder, model, edits)
    recipe = json.loads((folder / "recipe.yaml").read_text())
    for task, rows in (("edit", 2), ("combine", 1)):
        recipe["tasks"][task]["eval_rows"] = rows
    recipe["trainable"], recipe["evaluation"] = trainable, {"every": 1, "rows": 3, "num_inference_steps": 2}
    recipe["training"] = {"output_dir": str(folder / "run"), "use_cpu": True, "per_device_train_batch_size": 2}
    recipe["training"] |= {"max_steps": 2, "logging_steps": 1, "save_steps": 1, "learning_rate": 1e-2}
    recipe["training"] |= {"disable_tqdm": True, "eval_on_start": True, "report_to": "tensorboard"}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    run(folder / "recipe.yaml")


@pytest.fixture(scope="session")
def runs(built_once, tiny, edits):
    """`runs(kind)` -> a folder with a run of that kind; read only."""
    kinds = {"lora": ("edit_plus", LORA), "full": ("edit_plus", {}), "lora_21": ("qwen_image_21", LORA)}

    def get(kind: str) -> Path:
        model, trainable = kinds[kind]
        return built_once(f"scored_{kind}", lambda folder: trained(folder, tiny(model), edits, trainable))

    return get


@pytest.fixture
def copied(runs, tmp_path):
    """`copied(kind)` -> the recipe of a run that the test may change, with the output folder in `tmp_path`."""

    def get(kind: str = "lora") -> Path:
        shutil.copytree(runs(kind) / "run", tmp_path / "run")
        recipe = json.loads((runs(kind) / "recipe.yaml").read_text())
        recipe["training"]["output_dir"] = str(tmp_path / "run")
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        return tmp_path / "recipe.yaml"

    return get


@pytest.fixture
def scored_rows(monkeypatch) -> list[tuple[str, int]]:
    """The rows that are edited while a test runs: candidate and number."""
    rows, score = [], Scorer._score

    def noted(self, candidate, number, made_with):
        rows.append((candidate.name, number))
        score(self, candidate, number, made_with)

    monkeypatch.setattr(Scorer, "_score", noted)
    return rows


def summary(folder: Path) -> dict:
    return json.loads((folder / "run" / "evaluation" / "summary.json").read_text())


def files(folder: Path) -> dict[str, bytes]:
    folder = folder / "run" / "evaluation"
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- what it gives ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "full", "lora_21"])
def test_the_scores_of_a_checkpoint_are_those_of_training_at_that_step(copied, tmp_path, kind):
    main([str(copied(kind)), "--all"])
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    logged = {entry["step"]: entry for entry in log if "eval_psnr" in entry}
    found = summary(tmp_path)["checkpoints"]
    assert [*found] == [*CHECKPOINTS]
    for step, name in enumerate(CHECKPOINTS):
        assert found[name]["step"] == step
        assert len(found[name]["scores"]) >= 6
        assert found[name]["scores"] == {
            key.removeprefix("eval_"): value
            for key, value in logged[step].items()
            if key.removeprefix("eval_").partition("/")[0] in SCORES
        }


@pytest.mark.parametrize("kind", ["lora", "full", "lora_21"])
def test_an_edit_is_what_sampling_makes_of_that_row(copied, tmp_path, kind):
    """In float32; stored source latents are rounded to float16."""
    path = copied(kind)
    main([str(path), "--base", "--checkpoint", "1"])
    recipe = load_recipe(path)
    sets = open_sets(recipe)
    for name, checkpoint in (("base", "base"), ("checkpoint-1", tmp_path / "run" / "checkpoint-1")):
        sampler = Sampler(recipe, checkpoint=checkpoint)
        for task in TASKS:
            row = sets[task][-1]
            kept = json.loads((tmp_path / f"run/evaluation/{name}/{task}-{row['row']}.json").read_text())
            caption = next(
                one for one in ("instruction", "instruction_cn") if row[one] == kept["made_with"]["instruction"]
            )
            shared, *slots = sampler.family.prompt_columns
            embeddings = PromptEmbeddings(
                shared=torch.tensor(row[shared]).reshape(-1, WIDTH),
                texts=[torch.tensor(row[f"text_embeds_{one}"]) for one in (caption, "drop")],
                slots=tuple(row[slots[0]]) if slots else (),
            )
            images = [read_image(Path(one), sampler.family.image_mode) for one in row["source_image"]]
            size = tuple(16 * side for side in reversed(row["target_grid"]))
            theirs = sampler.generate(embeddings, images, seed=recipe.seed, num_inference_steps=2, size=size)
            with Image.open(tmp_path / f"run/evaluation/{name}/{task}-{row['row']}.png") as made:
                assert np.abs(np.asarray(made, int) - np.asarray(theirs, int)).mean() < 0.5


def test_what_it_leaves(copied, tmp_path, caplog):
    caplog.set_level(logging.INFO, "hf_qie")
    main([str(copied())])
    folder, found = tmp_path / "run" / "evaluation", summary(tmp_path)
    assert [*found["checkpoints"]] == ["base", "checkpoint-2"], "what sampling.py would use, and the base"
    lines = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    assert [(one["checkpoint"], f"{one['task']}-{one['row']}") for one in lines] == [
        (name, row) for name in ("base", "checkpoint-2") for row in ("combine-2", "edit-4", "edit-5")
    ]
    mean = np.mean([one["psnr"] for one in lines if one["checkpoint"] == "base"])
    assert found["checkpoints"]["base"]["scores"]["psnr"] == pytest.approx(mean)
    assert table({name: one["scores"] for name, one in found["checkpoints"].items()}) in caplog.text
    assert found["best"] in ("base", "checkpoint-2") and f"best by edit_score: {found['best']}" in caplog.text
    with Image.open(folder / "checkpoint-2.png") as sheet:
        assert sheet.width > 5 * 256, "two sources, output, target, difference"
    assert not (folder / ".lock").exists()


def test_the_tracker_has_the_figures_at_their_steps(copied, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = copied()
    shutil.rmtree(tmp_path / "run" / "runs")
    main([str(path), "--all"])
    (events,) = (tmp_path / "run" / "runs").rglob("events.out.tfevents.*")
    logged = EventAccumulator(str(events)).Reload().Scalars("eval/psnr")
    expected = [one["scores"]["psnr"] for one in summary(tmp_path)["checkpoints"].values()]
    assert [event.step for event in logged] == [0, 1, 2]
    assert [event.value for event in logged] == pytest.approx(expected)
    main([str(path), "--all"])
    assert len([*(tmp_path / "run" / "runs").rglob("events.out.tfevents.*")]) == 1, "nothing new, nothing logged"


def test_the_table_has_a_line_for_each_candidate_and_task():
    psnr, ssim = (
        {name: value, f"{name}/a": value + 1, f"{name}/b": value - 1} for name, value in (("psnr", 20), ("ssim", 1))
    )
    first, *lines = table({"base": psnr, "checkpoint-1": psnr | ssim}).splitlines()
    assert first.split() == ["checkpoint", "task", "psnr", "(dB)", "ssim"]
    assert [line.split() for line in lines] == [
        ["base", "all", "20.000"],
        ["base", "a", "21.000"],
        ["base", "b", "19.000"],
        ["checkpoint-1", "all", "20.000", "1.000"],
        ["checkpoint-1", "a", "21.000", "2.000"],
        ["checkpoint-1", "b", "19.000", "0.000"],
    ]


# --- resumed and shared ----------------------------------------------------------------------------------------------


def test_a_killed_launch_costs_a_row_and_changes_nothing(copied, tmp_path, monkeypatch, scored_rows):
    path = copied()
    main([str(path), "--all"])
    whole = files(tmp_path)
    assert len(scored_rows) == 9
    shutil.rmtree(tmp_path / "run" / "evaluation")
    score, image_saved = Scorer._score, []

    def killed(self, candidate, number, made_with):
        if len(image_saved) == 4:
            self.path(candidate, number).parent.mkdir(exist_ok=True)
            self.path(candidate, number).with_suffix(".png").write_bytes(b"half")
            raise KeyboardInterrupt
        image_saved.append(number)
        score(self, candidate, number, made_with)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Scorer, "_score", killed)
        main([str(path), "--all"])
    scored_rows.clear()
    main([str(path), "--all"])
    assert len(scored_rows) == 5
    assert files(tmp_path) == whole


def test_rows_are_scored_again_where_something_that_they_depend_on_has_changed(copied, tmp_path, scored_rows, caplog):
    caplog.set_level(logging.INFO, "hf_qie")
    path = copied()
    main([str(path)])
    scored_rows.clear()
    main([str(path)])
    assert scored_rows == []
    main([str(path), "evaluation.num_inference_steps=3"])
    assert len(scored_rows) == 6
    assert "base: scored again, with another num_inference_steps" in caplog.text
    scored_rows.clear()
    shutil.copy(tmp_path / "run/checkpoint-1/pytorch_lora_weights.safetensors", tmp_path / "other")
    shutil.copytree(tmp_path / "run" / "checkpoint-1", tmp_path / "run" / "checkpoint-3")
    main([str(path), "evaluation.num_inference_steps=3", "evaluation.rows=2", "--all"])
    assert {name for name, _ in scored_rows} == {"checkpoint-1"}, "the state of checkpoint-3 says that it is step 1"
    (tmp_path / "run/evaluation/base/edit-4.json").write_text("{half")
    scored_rows.clear()
    main([str(path), "evaluation.num_inference_steps=3", "--base"])
    assert scored_rows == [("base", 1)]


@pytest.mark.two_rank
def test_two_ranks_leave_the_same_bytes(copied, tmp_path):
    path = copied()
    main([str(path)])
    one = files(tmp_path)
    shutil.rmtree(tmp_path / "run" / "evaluation")
    log = tmp_path / "log"
    assert in_ranks(main, [str(path)], ranks=2, log=log) == [0, 0], log.read_text()
    assert files(tmp_path) == one


# --- the best --------------------------------------------------------------------------------------------------------


def test_the_best_goes_by_what_is_better_and_the_first_of_equals():
    figures = {"base": {"psnr": 20.0, "kept_error": 3.0}, "a": {"psnr": 21.0, "kept_error": 4.0}, "b": {"psnr": 21.0}}
    assert best_of(figures, "psnr") == "a"
    assert best_of(figures, "kept_error") == "base"
    assert best_of(figures, "ssim") is None


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_best_is_kept_for_export_and_sampling_and_nothing_is_deleted(copied, tmp_path, kind):
    path, before = copied(kind), {*os.listdir(tmp_path / "run")}
    main([str(path), "--keep_best", "training.metric_for_best_model=psnr"])
    found = summary(tmp_path)
    scores = {name: one["scores"]["psnr"] for name, one in found["checkpoints"].items()}
    assert found["metric"] == "psnr" and found["best"] == max(scores, key=scores.get)
    assert {*os.listdir(tmp_path / "run")} - before == {"evaluation"} | {"best"} * (found["best"] != "base")
