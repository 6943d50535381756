"""score.py: the scores of training at that step, what sampling.py makes of those rows, and no row done twice."""

import json
import logging
import os
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from embedding_sets import WIDTH
from PIL import Image
from ranks import in_ranks
from small_recipes import extract_edits
from training_runs import run

from hf_qie.config.recipe import load_recipe
from hf_qie.data.images import read_image
from hf_qie.errors import InputError
from hf_qie.hub.sampler import Sampler
from hf_qie.hub.score_report import best_of, keep_best, table, track
from hf_qie.hub.scoring import Scorer, candidates, scoring_arguments, weight_files
from hf_qie.hub.trained_run import find_trained, find_weights
from hf_qie.measures.edits import JUDGED, SCORES
from hf_qie.models.judge import EditJudge
from hf_qie.models.prompts import PromptEmbeddings
from hf_qie.score import main
from hf_qie.training.checkpoints import WEIGHTS_ALONE, misfit
from hf_qie.training.sets import open_sets

LORA = {"lora": {"rank": 4, "alpha": 8, "target_modules": "all-linear"}}
ROWS = "combine-2", "edit-4", "edit-5"
CHECKPOINTS = "base", "checkpoint-1", "checkpoint-2"


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    PartialState(cpu=True)


def trained(folder: Path, extracted: Path, trainable: dict, *, bf16: bool) -> None:
    """`folder`/recipe.yaml of a run of two steps on extracted edits, evaluated at the start and at each."""
    folder.mkdir()
    recipe = json.loads((extracted / "recipe.yaml").read_text())
    for task, rows in (("edit", 2), ("combine", 1)):
        recipe["tasks"][task]["eval_rows"] = rows
    recipe["trainable"], recipe["evaluation"] = trainable, {"every": 1, "rows": 3, "num_inference_steps": 2}
    recipe["training"] = {"output_dir": str(folder / "run"), "use_cpu": True, "per_device_train_batch_size": 2}
    recipe["training"] |= {"max_steps": 2, "logging_steps": 1, "save_steps": 1, "learning_rate": 1e-2}
    recipe["training"] |= {"disable_tqdm": True, "eval_on_start": True, "report_to": "tensorboard", "bf16": bf16}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    run(folder / "recipe.yaml")


@pytest.fixture(scope="session")
def runs(built_once, tiny, edits):
    """`runs(kind)` -> a folder with a run of that kind; read only."""
    kinds = {"lora": ("edit_plus", LORA), "full": ("edit_plus", {}), "lora_21": ("qwen_image_21", LORA)}
    kinds |= {"bfloat16": ("edit_plus", {}), "lora_bfloat16": ("edit_plus", LORA)}

    def get(kind: str) -> Path:
        model, trainable = kinds[kind]
        name = "few_edits" if model == "edit_plus" else f"few_edits_{model}"  # which other files of tests share
        extracted = built_once(name, lambda folder: extract_edits(folder, tiny(model), edits))
        return built_once(
            f"scored_{kind}", lambda folder: trained(folder, extracted, trainable, bf16=kind.endswith("bfloat16"))
        )

    return get


@pytest.fixture(scope="session")
def scored(built_once, runs):
    """`scored(kind)` -> the folder `evaluation` of such a run, all of whose checkpoints were scored; read only."""

    def get(kind: str) -> Path:
        def build(folder: Path) -> None:
            shutil.copytree(runs(kind) / "run", folder / "run")
            main([str(runs(kind) / "recipe.yaml"), "--all", f"training.output_dir={folder / 'run'}"])

        return built_once(f"scores_of_{kind}", build) / "run" / "evaluation"

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


@pytest.mark.parametrize("kind", ["lora", "full", "lora_21", "bfloat16", "lora_bfloat16"])
def test_the_scores_of_a_checkpoint_are_those_of_training_at_that_step(runs, scored, kind):
    log = json.loads((runs(kind) / "run" / "trainer_state.json").read_text())["log_history"]
    logged = {entry["step"]: entry for entry in log if "eval_psnr" in entry}
    found = json.loads((scored(kind) / "summary.json").read_text())["checkpoints"]
    assert [*found] == [*CHECKPOINTS]
    for step, name in enumerate(CHECKPOINTS):
        assert found[name]["step"] == step
        assert found[name]["scores"].keys() >= {"edit_score", "edited", "psnr/edit", "ssim/combine"}
        assert found[name]["scores"] == {
            key.removeprefix("eval_"): value
            for key, value in logged[step].items()
            if key.removeprefix("eval_").partition("/")[0] in SCORES
        }


@pytest.mark.parametrize("kind", ["lora", "full", "lora_21"])
def test_an_edit_is_what_sampling_makes_of_that_row(runs, scored, kind):
    """In float32; stored source latents are rounded to float16."""
    recipe = load_recipe(runs(kind) / "recipe.yaml")
    sets = open_sets(recipe)
    for name, checkpoint in (("base", "base"), ("checkpoint-1", runs(kind) / "run" / "checkpoint-1")):
        sampler = Sampler(recipe, checkpoint=checkpoint)
        for task, number in (("combine", -1), ("edit", -2)):
            row = sets[task][number]
            file = scored(kind) / name / f"{task}-{row['row']}.png"
            kept = json.loads(file.with_suffix(".json").read_text())["made_with"]["instruction"]
            (caption,) = (one for one in ("instruction", "instruction_cn") if row[one] == kept)
            shared, *slots = sampler.family.prompt_columns
            embeddings = PromptEmbeddings(
                shared=torch.tensor(row[shared]).reshape(-1, WIDTH),
                texts=[torch.tensor(row[f"text_embeds_{one}"]) for one in (caption, "drop")],
                slots=tuple(row[slots[0]]) if slots else (),
            )
            images = [read_image(Path(one), sampler.family.image_mode) for one in row["source_image"]]
            size = tuple(16 * side for side in reversed(row["target_grid"]))
            theirs = sampler.generate(embeddings, images, seed=recipe.seed, num_inference_steps=2, size=size)
            with Image.open(file) as made:
                assert np.abs(np.asarray(made, int) - np.asarray(theirs, int)).mean() < 0.5


def test_what_it_leaves(copied, tmp_path, caplog):
    caplog.set_level(logging.INFO, "hf_qie")
    main([str(copied())])
    folder, found = tmp_path / "run" / "evaluation", summary(tmp_path)
    assert [*found["checkpoints"]] == ["base", "checkpoint-2"], "what sampling.py would use, and the base"
    lines = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    named = [(one["checkpoint"], f"{one['task']}-{one['row']}") for one in lines]
    assert named == [(name, ROWS[place]) for name in ("base", "checkpoint-2") for place in (0, 1, 2)]
    mean = np.mean([one["psnr"] for one in lines if one["checkpoint"] == "base"])
    assert found["checkpoints"]["base"]["scores"]["psnr"] == pytest.approx(mean)
    assert table({name: one["scores"] for name, one in found["checkpoints"].items()}) in caplog.text
    assert found["best"] in ("base", "checkpoint-2")
    assert f"best by edit_score: {found['best']}" in caplog.text
    with Image.open(folder / "checkpoint-2.png") as sheet:
        assert sheet.width > 5 * 256, "two sources, output, target, difference"
    assert not (folder / ".lock").exists()


def test_the_tracker_has_the_figures_at_their_steps(runs, scored, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = json.loads((scored("lora") / "summary.json").read_text())["checkpoints"]
    arguments = scoring_arguments(
        load_recipe(runs("lora") / "recipe.yaml", [f"training.output_dir={tmp_path / 'run'}"])
    )
    track(arguments, {one["step"]: one["scores"] for one in found.values()})
    track(arguments, {})
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    logged = EventAccumulator(str(events)).Reload().Scalars("eval/psnr/edit")
    assert [event.step for event in logged] == [0, 1, 2]
    assert [event.value for event in logged] == pytest.approx([one["scores"]["psnr/edit"] for one in found.values()])


def test_the_table_has_a_line_for_each_candidate_and_task():
    psnr = {"psnr": 20.0, "psnr/a": 21.0, "psnr/b": 19.0}
    first, *lines = table({"base": psnr, "checkpoint-1": psnr | {"ssim": 0.5, "ssim/b": 0.5}}).splitlines()
    assert first.split() == ["checkpoint", "task", "psnr", "(dB)", "ssim"]
    assert [line.split() for line in lines] == [
        ["base", "all", "20.000"],
        ["base", "a", "21.000"],
        ["base", "b", "19.000"],
        ["checkpoint-1", "all", "20.000", "0.500"],
        ["checkpoint-1", "a", "21.000"],
        ["checkpoint-1", "b", "19.000", "0.500"],
    ]
    only = table({"base": {"psnr": 20.0, "psnr/a": 20.0}}).splitlines()
    assert [line.split()[:2] for line in only] == [["checkpoint", "task"], ["base", "all"]]


# --- resumed and shared ----------------------------------------------------------------------------------------------


def test_a_killed_launch_costs_a_row_and_changes_nothing(copied, tmp_path, monkeypatch, scored_rows):
    path = copied()
    main([str(path)])
    whole = files(tmp_path)
    assert len(scored_rows) == 6
    shutil.rmtree(tmp_path / "run" / "evaluation")
    score = Scorer._score

    def killed(self, candidate, number, made_with):
        if len(scored_rows) == 6 + 4:
            self.path(candidate, number).parent.mkdir(exist_ok=True)
            self.path(candidate, number).with_suffix(".png").write_bytes(b"half")
            raise KeyboardInterrupt
        score(self, candidate, number, made_with)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Scorer, "_score", killed)
        main([str(path)])
    main([str(path)])
    assert len(scored_rows) == 6 + 4 + 2
    assert files(tmp_path) == whole


def test_rows_are_scored_again_where_something_that_they_depend_on_has_changed(copied, tmp_path, scored_rows, caplog):
    caplog.set_level(logging.INFO, "hf_qie")
    path = [str(copied()), "--base"]
    for _ in range(2):
        main(path)
        assert len(scored_rows) == 3
    fewer = [*path, "evaluation.num_inference_steps=3", "evaluation.rows=2"]
    main(fewer)
    assert len(scored_rows) == 3 + 2
    assert "base: scored again, with another num_inference_steps" in caplog.text
    (tmp_path / "run" / "evaluation" / "base" / f"{ROWS[0]}.json").write_text("{half")
    main(fewer)
    assert scored_rows[5:] == scored_rows[3:4]
    main(path)
    assert len(scored_rows) == 6 + 2, "the third row has the number of steps that is asked for"


@pytest.mark.two_rank
def test_two_ranks_leave_the_same_bytes(copied, tmp_path):
    path = copied()
    main([str(path), "evaluation.judge={}"])
    one = files(tmp_path)
    assert sum(name.endswith(".judge.json") for name in one) == 6
    shutil.rmtree(tmp_path / "run" / "evaluation")
    both = {"main": main, "argv": [str(path), "evaluation.judge={}"]}
    assert in_ranks([both], ranks=2, log=tmp_path / "log") == [0, 0], (tmp_path / "log").read_text()
    assert files(tmp_path) == one


def test_a_transformer_that_trained_in_bfloat16_is_scored_in_half_of_the_memory(runs):
    recipe = load_recipe(runs("bfloat16") / "recipe.yaml")
    model = Scorer(recipe, scoring_arguments(recipe))._model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


# --- judged ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def judged_rows(monkeypatch) -> list[str]:
    """The instructions of the edits that are judged while a test runs."""
    instructions, judge = [], EditJudge.__call__

    def noted(self, instruction, sources, output):
        instructions.append(instruction)
        return judge(self, instruction, sources, output)

    monkeypatch.setattr(EditJudge, "__call__", noted)
    return instructions


def test_edits_are_judged_once_they_are_made_and_again_where_the_edit_or_the_judge_is_another(
    copied, tmp_path, scored_rows, judged_rows, caplog
):
    caplog.set_level(logging.INFO, "hf_qie")
    path = [str(copied()), "--base", "evaluation.rows=2"]
    own, folder = [*path, "evaluation.judge={}"], tmp_path / "run" / "evaluation"
    main(own)
    assert summary(tmp_path)["checkpoints"]["base"]["scores"].keys() >= {*JUDGED, "judge_followed/edit", "edit_score"}
    lines = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(0 < line["judge"] < 10 for line in lines)
    assert "puts 0.0" in caplog.text and "of its probability on the digits that it is asked for" in caplog.text
    (folder / "base" / f"{ROWS[0]}.png").unlink()
    main(own)
    assert (len(scored_rows), len(judged_rows)) == (2 + 1, 2), "the same edit again"
    main([*own, "evaluation.num_inference_steps=3", "evaluation.rows=1"])
    assert (len(scored_rows), len(judged_rows)) == (3 + 1, 2 + 1)
    assert "base: judged again, with another edit" in caplog.text
    other = tmp_path / "judge"
    for part in ("text_encoder", "processor"):
        shutil.copytree(Path(load_recipe(path[0]).model) / part, other, dirs_exist_ok=True)
    (other / "generation_config.json").write_text("{}")
    main([*path, f"evaluation.judge.model={other}", "evaluation.num_inference_steps=3", "evaluation.rows=1"])
    assert (len(scored_rows), len(judged_rows)) == (4, 3 + 1)
    assert "base: judged again, with another judge" in caplog.text
    main([*path, "evaluation.num_inference_steps=3", "evaluation.rows=1"])
    assert not summary(tmp_path)["checkpoints"]["base"]["scores"].keys() & {*JUDGED}


def test_the_judge_sees_the_edit_last_and_what_it_is_compared_with_before(copied, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(EditJudge, "__call__", lambda _, *row: seen.append(row) or dict.fromkeys(JUDGED, 1.0))
    recipe = load_recipe(path := copied(), overrides := ["evaluation.judge={}"])
    main([str(path), *overrides, "--base"])
    scorer = Scorer(recipe, scoring_arguments(recipe))
    for number, (instruction, sources, output) in zip(scorer.numbers, seen, strict=True):
        _, *expected = scorer.edits.images(number)
        with Image.open(tmp_path / "run" / "evaluation" / "base" / f"{scorer.edits.name(number)}.png") as made:
            assert np.array_equal(made.convert("RGB"), output)
        assert instruction == scorer.edits.instruction(number)
        assert len(sources) == len(expected) == (2 if scorer.edits.name(number) == "combine-2" else 1)
        assert all(np.array_equal(one, other) for one, other in zip(sources, expected, strict=True))


def test_the_transformer_is_gone_before_the_judge_comes(copied):
    recipe = load_recipe(copied())
    scorer = Scorer(recipe, scoring_arguments(recipe))
    scorer.run(candidates(scorer.folder.parent, base=True, steps=[1], every=False))
    model = weakref.ref(scorer._model)
    scorer.release()
    assert model() is None


def test_what_cannot_judge_is_told_before_a_row_is_edited(copied, scored_rows):
    with pytest.raises(InputError, match="'org/judge' is not a folder here"):
        main([str(copied()), "evaluation.judge.model=org/judge"])
    assert not scored_rows


# --- the best --------------------------------------------------------------------------------------------------------


def test_the_best_goes_by_what_is_better_and_is_the_first_of_equals():
    figures = {"base": {"psnr": 20.0, "kept_error": 3.0}, "a": {"psnr": 21.0, "kept_error": 4.0}, "b": {"psnr": 21.0}}
    assert best_of(figures, "psnr") == "a"
    assert best_of(figures, "kept_error") == "base"
    assert best_of(figures, "ssim") is None
    assert best_of({"base": {"judge/edit": 5.0}, "a": {"judge/edit": 6.0}}, "judge/edit") == "a"


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_best_is_kept_for_export_and_sampling_and_nothing_is_deleted(runs, copied, tmp_path, kind):
    recipe, folder = load_recipe(copied(kind)), tmp_path / "run"
    before, kept, was = {*os.listdir(folder)}, folder / "best", runs(kind) / "run" / "checkpoint-1"
    figures = {name: {"edit_score": score} for name, score in zip(CHECKPOINTS, (0.1, 0.3, 0.2), strict=True)}
    chosen = candidates(folder, base=False, steps=[], every=True)
    for _ in range(2):
        keep_best(recipe, chosen, figures)
        assert {*os.listdir(folder)} == before | {"best"}
    shutil.rmtree(folder / "checkpoint-1")  # as save_total_limit does
    assert (find_trained(kept).step, misfit(kept)) == (1, WEIGHTS_ALONE)
    assert find_weights(kept).relative_to(kept) == find_weights(was).relative_to(was)
    assert [path.read_bytes() for path in weight_files(kept)] == [path.read_bytes() for path in weight_files(was)]
    assert json.loads((kept / "summary.json").read_text()) == figures["checkpoint-1"]


def test_where_the_base_is_best_nothing_is_kept(copied, tmp_path, caplog):
    recipe, folder = load_recipe(copied()), tmp_path / "run"
    chosen = candidates(folder, base=False, steps=[], every=True)
    keep_best(recipe, chosen, {name: {"edit_score": 0.1} for name in CHECKPOINTS})
    assert not (folder / "best").exists()
    assert "--keep_best: no checkpoint has a better edit_score than the base; nothing is kept" in caplog.text


# --- what people get wrong, and are told -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--checkpoint", "7"], "run/checkpoint-7: not found; expected training.output_dir of a run, or a checkpoint"),
        (["--checkpoint", "1", "--all"], "--checkpoint: --all has every checkpoint; leave one of them out"),
        (
            ["tasks.edit.eval_rows=0", "tasks.combine.eval_rows=0", "evaluation.every=0"],
            "no task holds out rows to score; set tasks.<name>.eval_rows",
        ),
        (
            ["trainable.lora.rank=2", "--checkpoint", "1"],
            "is not a LoRA of rank 2 on the layers that the recipe names",
        ),
    ],
)
def test_what_cannot_be_scored_is_one_line(copied, options, told):
    with pytest.raises(InputError) as error:
        main([str(copied()), *options])
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_an_incomplete_checkpoint_is_left_out_of_all_with_a_warning(copied, tmp_path, caplog):
    path = copied()
    (tmp_path / "run" / "checkpoint-1" / "complete.json").unlink()
    found = candidates(tmp_path / "run", base=False, steps=[], every=True)
    assert [one.name for one in found] == ["base", "checkpoint-2"]
    assert "checkpoint-1 is skipped: it has no complete.json" in caplog.text
    with pytest.raises(InputError, match="checkpoint-1: the checkpoint is incomplete"):
        main([str(path), "--checkpoint", "1"])
    assert not (tmp_path / "run" / "evaluation").exists()


def test_rows_that_a_run_trained_on_are_named(copied, caplog):
    main([str(copied()), "tasks.edit.eval_rows=3", "evaluation.rows=1", "--base"])
    assert "tasks.edit.eval_rows: 3, but the run held out 2: rows that it trained on are among those" in caplog.text


def test_one_candidate_alone_is_called_no_best(copied, caplog):
    caplog.set_level(logging.INFO, "hf_qie")
    path = copied()
    main([str(path), "evaluation.rows=1", "--base"])
    assert "1 held-out rows" in caplog.text
    assert json.loads((path.parent / "run" / "evaluation" / "summary.json").read_text())["best"] is None
    assert "best by" not in caplog.text
