"""score.py --regression: rows that were not trained on, base and checkpoints side by side, no row done twice."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from accelerate import PartialState
from datasets import Dataset
from PIL import Image
from ranks import in_ranks
from small_recipes import extract_edits
from training_runs import run

from hf_qie.config.recipe import load_recipe
from hf_qie.errors import InputError
from hf_qie.hub.foreign_rows import gather
from hf_qie.hub.regression import regression_table
from hf_qie.hub.sampler import Sampler
from hf_qie.hub.scoring import Scorer
from hf_qie.measures.edits import JUDGED, psnr
from hf_qie.models.prompt_encoder import PromptEncoder
from hf_qie.score import main

LORA = {"lora": {"rank": 4, "alpha": 8, "target_modules": "attention"}}
CAPTIONS = "evaluation.regression.columns.captions=[prompt]"
COLUMNS = "evaluation.regression.columns={sources: input, captions: [prompt]}"


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    PartialState(cpu=True)


@pytest.fixture(scope="module")
def trained(built_once, tiny, edits) -> Path:
    """A folder with recipe.yaml and a run of two steps, none of whose rows is held out; read only."""
    extracted = built_once("few_edits", lambda folder: extract_edits(folder, tiny(), edits))

    def build(folder: Path) -> None:
        folder.mkdir()
        recipe = json.loads((extracted / "recipe.yaml").read_text())
        recipe["trainable"], recipe["evaluation"] = LORA, {"rows": 3, "num_inference_steps": 2}
        recipe["training"] = {"output_dir": str(folder / "run"), "use_cpu": True, "per_device_train_batch_size": 2}
        recipe["training"] |= {"max_steps": 2, "logging_steps": 1, "save_steps": 2, "learning_rate": 1e-2}
        recipe["training"] |= {"disable_tqdm": True, "report_to": "none"}
        (folder / "recipe.yaml").write_text(json.dumps(recipe))
        run(folder / "recipe.yaml")

    return built_once("trained_for_regression", build)


@pytest.fixture
def recipe(trained, tmp_path) -> list[str]:
    """The arguments of a command on the run, which the test may change."""
    shutil.copytree(trained / "run", tmp_path / "run")
    return [str(trained / "recipe.yaml"), f"training.output_dir={tmp_path / 'run'}"]


@pytest.fixture
def rows(edits) -> list[dict]:
    """Rows of the synthetic edits: source, target, instruction."""
    lines = (edits / "edit.jsonl").read_text().splitlines()[10:14]
    return [
        {"input": str(edits / row["source_image"]), "output": str(edits / row["target_image"])}
        | {"prompt": row["instruction"]}
        for row in map(json.loads, lines)
    ]


@pytest.fixture
def text(rows, tmp_path) -> str:
    """Them as a file, with other names of columns."""
    path = tmp_path / "other edits.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def parquet(rows, tmp_path) -> str:
    """Them as Parquet with embedded images."""
    images = [{"bytes": Path(row["input"]).read_bytes(), "path": None} for row in rows]
    path = tmp_path / "bench.parquet"
    Dataset.from_dict({"input": images, "prompt": [row["prompt"] for row in rows]}).to_parquet(path)
    return str(path)


def files(folder: Path) -> dict[str, bytes]:
    """What a launch leaves, without its embedding set and what names that by its fingerprint."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "embeddings" not in path.parts and not path.match("regression-*.json")
    }


def image(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_both_columns_are_reported_with_the_difference(recipe, parquet, tmp_path, caplog):
    caplog.set_level(logging.INFO, "hf_qie")
    main([*recipe, COLUMNS, "--regression", parquet])
    folder = tmp_path / "run" / "evaluation" / "regression" / "bench.parquet"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["data"], summary["rows"]) == (parquet, 3)
    figures = {name: one["scores"] for name, one in summary["checkpoints"].items()}
    assert [*figures] == ["base", "checkpoint-2"]
    assert figures["base"].keys() | {"base_psnr"} == figures["checkpoint-2"].keys() | {"base_psnr"}
    assert figures["base"].keys() <= {"changed", "drift", "zoom"}, "no score needs a target"
    assert regression_table(figures) in caplog.text
    made = {name: [image(path) for path in sorted((folder / name).glob("*.png"))] for name in figures}
    near = [psnr(*pair) for pair in zip(made["checkpoint-2"], made["base"], strict=True)]
    assert figures["checkpoint-2"]["base_psnr"] == pytest.approx(np.mean(near))
    assert max(near) < 100, "training has moved it"
    lines = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    changed = []
    for output, line in zip(made["base"], lines, strict=True):
        source = np.asarray(Image.open(line["source_image"][0]).resize(output.shape[1::-1], Image.LANCZOS))
        changed.append(np.abs(output.astype(float) - source).mean())
    assert figures["base"]["changed"] == pytest.approx(np.mean(changed), rel=0.02)
    assert len((folder / "scores.jsonl").read_text().splitlines()) == 2 * 3
    assert (folder / "edits.png").is_file()


def test_an_edit_is_what_sampling_makes_of_that_row(recipe, text, tmp_path):
    """In float32; stored states and latents are rounded to float16."""
    main([*recipe, COLUMNS, "--regression", text])
    folder = tmp_path / "run" / "evaluation" / "regression" / "other-edits.jsonl"
    line = json.loads((folder / "rows.jsonl").read_text().splitlines()[1])
    for name in ("base", "checkpoint-2"):
        sampler = Sampler(load_recipe(*recipe[:1]), checkpoint="base" if name == "base" else tmp_path / "run" / name)
        theirs = sampler(line["instruction"], images=line["source_image"], seed=0, num_inference_steps=2)
        ours = image(folder / name / "regression-1.png").astype(int)
        assert np.abs(ours - np.asarray(theirs)).mean() < 0.5


def test_targets_count_where_the_data_has_some(recipe, text, tmp_path):
    columns = "evaluation.regression.columns={sources: [input], target: output, captions: [prompt]}"
    main([*recipe, columns, "--regression", text, "--base"])
    folder = tmp_path / "run" / "evaluation" / "regression" / "other-edits.jsonl"
    found = json.loads((folder / "summary.json").read_text())["checkpoints"]
    assert [*found] == ["base"]
    assert found["base"]["scores"].keys() >= {"edit_score", "edited", "kept_error", "psnr", "ssim"}
    assert "changed" not in found["base"]["scores"]


def test_the_judge_needs_no_target(recipe, text, tmp_path):
    main([*recipe, COLUMNS, "evaluation.judge={}", "evaluation.rows=1", "--regression", text, "--base"])
    folder = tmp_path / "run" / "evaluation" / "regression" / "other-edits.jsonl"
    found = json.loads((folder / "summary.json").read_text())["checkpoints"]["base"]["scores"]
    assert found.keys() >= {*JUDGED, "changed"}
    assert 0 <= found["judge"] <= 10


def test_a_second_launch_encodes_and_edits_nothing(recipe, parquet, tmp_path, monkeypatch):
    main([*recipe, COLUMNS, "--regression", parquet])
    folder = tmp_path / "run" / "evaluation"
    whole = files(folder)

    def refused(*args, **kwargs):
        raise AssertionError("done before")

    monkeypatch.setattr(Scorer, "_score", refused)
    monkeypatch.setattr(PromptEncoder, "__init__", refused)
    main([*recipe, COLUMNS, "--regression", parquet])
    assert files(folder) == whole


@pytest.mark.two_rank
def test_two_ranks_leave_the_same_bytes(recipe, parquet, tmp_path):
    argv = [*recipe, COLUMNS, "--regression", parquet]
    main(argv)
    one, folder = files(tmp_path / "run" / "evaluation"), tmp_path / "run" / "evaluation"
    shutil.rmtree(folder)
    assert in_ranks([{"main": main, "argv": argv}], ranks=2, log=tmp_path / "log") == [0, 0], (
        tmp_path / "log"
    ).read_text()
    assert files(folder) == one


def test_rows_are_spread_over_the_data_and_without_sources_an_image_is_made_from_text(trained, tmp_path):
    lines = [{"input": None, "prompt": f"Image {number}."} for number in range(9)] + [{"prompt": " "}]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    more = [f"evaluation.regression.data={tmp_path / 'texts.jsonl'}", COLUMNS]
    gather(load_recipe(trained / "recipe.yaml", more), tmp_path / "rows")
    found = [json.loads(line) for line in (tmp_path / "rows" / "rows.jsonl").read_text().splitlines()]
    assert [row["instruction"] for row in found] == ["Image 0.", "Image 4.", "Image 8."]
    assert all(row["source_image"] == [] and row["target_image"].endswith("blank.png") for row in found)


def test_the_table_has_the_difference_to_the_base():
    figures = {"base": {"changed": 10.0, "drift": 1.0}, "checkpoint-2": {"changed": 12.5, "base_psnr": 30.0}}
    first, *lines = (line.split() for line in regression_table(figures).splitlines())
    assert first == ["score", "base", "checkpoint-2", "difference"]
    assert lines == [
        ["drift", "(px)", "1.000"],
        ["changed", "(levels)", "10.000", "12.500", "+2.500"],
        ["base_psnr", "(dB)", "30.000"],
    ]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--regression", "nowhere.jsonl"], "evaluation.regression.data: file not found: nowhere.jsonl"),
        (["--regression", "TEXT"], "evaluation.regression.columns.captions: no row has instruction or instruction_cn"),
        (
            ["--regression", "TEXT", CAPTIONS],
            "regression.columns.sources: no row has source_image; there are input, ou",
        ),
        (
            ["--regression", "PARQUET", CAPTIONS],
            "evaluation.regression.columns.sources: no row has source_image; there are inp",
        ),
        (["--regression", "TEXT", "--keep_best"], "--keep_best: goes by the scores of held-out rows; leave --regress"),
    ],
)
def test_what_cannot_be_scored_is_one_line(recipe, text, parquet, options, told):
    options = [{"TEXT": text, "PARQUET": parquet}.get(one, one) for one in options]
    with pytest.raises(InputError) as error:
        main([*recipe, *options])
    assert told in str(error.value)
    assert "\n" not in str(error.value)
