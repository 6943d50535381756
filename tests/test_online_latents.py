"""Sets without stored latents: training that reads and encodes the images is training on stored latents."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from datasets import load_from_disk
from safetensors.torch import load_file
from small_recipes import cut_outs

from hf_qie.config.recipe import load_recipe
from hf_qie.data.images import read_image, to_pixels
from hf_qie.data.online_latents import read_pixels
from hf_qie.errors import InputError
from hf_qie.extract import main as extract
from hf_qie.models.base import read_family
from hf_qie.models.qwen_image.family import EDIT_PLUS
from hf_qie.train import train
from hf_qie.training.sets import open_sets
from hf_qie.training.setup import build_trainer
from hf_qie.training.trainer import EditTrainer

ROWS = 6
LATENTS = ("target_latents", "source_latents", "inverse_target_latents", "inverse_source_latents")


@pytest.fixture(autouse=True)
def fresh_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def family() -> str:
    """The kind of the checkpoint."""
    return "edit_plus"


def write_recipe(folder: Path, model: Path, edits: Path, *, latents: bool, cut_out: bool) -> Path:
    """Three tasks of synthetic edits, where sources and targets differ in area, and one with alpha; JSON is YAML."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks = {}
    for name in ("edit", "combine", "text_to_image"):
        lines = (edits / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:ROWS]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
        tasks[name] = {"data": str(folder / f"{name}.jsonl"), "image_root": str(edits), "eval_rows": 1}
    if cut_out:
        lines = [json.dumps(row) for row in cut_outs(folder, edits)]
        (folder / "cut_out.jsonl").write_text("\n".join(lines), encoding="utf-8")
        tasks["cut_out"] = {"data": str(folder / "cut_out.jsonl")}
    sizes = {"image_sample_size": 64, "source_sample_size": 96}
    recipe = {
        "model": str(model),
        "tasks": tasks,
        "extract": {"output_dir": str(folder / "sets"), "dtype": "float32", "latents": latents, **sizes},
        "mix": {"inverse_share": 0.5},
        "loss": {"edit_weight": 1.0},  # by latents of sources and target, wherever these come from
        "trainable": {"lora": {"rank": 4, "alpha": 8}},
        "training": {
            "output_dir": str(folder / "run"),
            "use_cpu": True,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 3,
            "max_steps": 3,
            "logging_steps": 1,
            "save_steps": 3,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "disable_tqdm": True,
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


@pytest.fixture
def recipes(built_once, tiny, edits, family) -> dict[bool, Path]:
    """A recipe whose sets have latents, and the same without; read only."""

    def build(folder: Path) -> None:
        for latents in (True, False):
            rows = {"latents": latents, "cut_out": family == "qwen_image_21"}  # which keeps alpha
            assert extract([str(write_recipe(folder / str(latents), tiny(family), edits, **rows))]) == 0
            AcceleratorState._reset_state(reset_partial_state=True)

    folder = built_once(f"online_latents_{family}", build)
    return {latents: folder / str(latents) / "recipe.yaml" for latents in (True, False)}


def run(recipe: Path, output_dir: Path, *overrides: str) -> EditTrainer:
    PartialState(cpu=True)
    loaded = load_recipe(recipe, [f"training.output_dir={output_dir}", *overrides])
    return train(loaded, open_sets(loaded))


def test_without_latents_a_set_has_everything_else(recipes):
    for task in ("edit", "combine", "text_to_image"):
        stored, without = (load_from_disk(recipes[latents].parent / "sets" / task) for latents in (True, False))
        assert without.features == stored.features
        names = [name for name in stored.column_names if name not in LATENTS]
        assert without.select_columns(names)[:] == stored.select_columns(names)[:]
        for name in set(LATENTS) & set(without.column_names):
            assert without.data.column(name).null_count == ROWS


@pytest.mark.parametrize(("family", "workers"), [("edit_plus", 0), ("edit_plus", 2), ("qwen_image_21", 2)])
def test_images_encoded_while_training_give_what_stored_latents_give(recipes, tmp_path, family, workers):
    stored = run(recipes[True], tmp_path / "stored")
    encoded = run(recipes[False], tmp_path / "encoded", f"training.dataloader_num_workers={workers}")
    draws = encoded.train_dataset
    seen = {(len(row["grids"]), row["grids"][0] == row["grids"][-1]) for row in map(draws.__getitem__, range(18))}
    assert len(seen) >= 3, "shapes should differ"
    drawn = {(row["task"], row["row"]) for row in map(draws.__getitem__, range(18))}
    assert family == "edit_plus" or ("cut_out", 2) in drawn, "a source with alpha"
    kept = ("loss", "grad_norm", "eval_loss")
    logs = [
        [{key: value for key, value in entry.items() if key.startswith(kept)} for entry in trainer.state.log_history]
        for trainer in (stored, encoded)
    ]
    assert logs[0] == logs[1]  # also stored latents are float16, so to the last bit
    files = [load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("stored", "encoded")]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_the_vae_is_loaded_only_where_it_is_needed_and_the_start_says_so(recipes, tmp_path, caplog):
    caplog.set_level("INFO", logger="hf_qie")
    assert run(recipes[True], tmp_path / "stored", "training.max_steps=1", "training.save_steps=1").encoder is None
    assert "encoder: not loaded, VAE: not loaded" in caplog.text
    caplog.clear()
    assert run(recipes[False], tmp_path / "without", "training.max_steps=1", "training.save_steps=1").encoder
    assert "encoder: not loaded, VAE: loaded, as sets have no latents: 0.03 GB of weights on each rank" in caplog.text


def test_pixels_are_those_of_extraction(edits, tiny):
    path = next((edits / "images").glob("*.png"))
    pixels = torch.tensor(read_pixels(str(path), (6, 4), read_family(str(tiny()))))
    assert pixels.shape == (96, 64, 3)
    assert torch.equal(to_pixels(pixels[None])[0], to_pixels(EDIT_PLUS.resize(read_image(path), (64, 96))))


def refused(recipe: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as error:
        open_sets(load_recipe(recipe, overrides))
    return str(error.value)


def test_images_that_are_not_there_are_told_by_the_first_before_a_model_is_loaded(recipes, tmp_path):
    message = refused(recipes[False], f"tasks.edit.image_root={tmp_path}")
    assert message == (
        "tasks.edit: its embedding set has no latents, so training reads its images, but "
        f"images/edit_0000_source_1.png (row 0) is not in {tmp_path}; set tasks.edit.image_root to their folder, or "
        "extract with extract.latents: true"
    )


def test_a_ready_set_is_read_with_images_from_where_it_was_made_or_the_root_that_is_given(recipes, tmp_path, edits):
    """As a set of the Hub, it may no more know where it was made."""
    shutil.copytree(recipes[False].parent / "sets" / "edit", tmp_path / "edit")
    ready = "tasks={edit: {embeddings: " + str(tmp_path / "edit") + ", eval_rows: 1}}"
    known = open_sets(load_recipe(recipes[False], [ready]))["edit"]
    assert known[0]["target_image"] == str(edits / "images" / "edit_0000_target.png")
    provenance = json.loads((tmp_path / "edit" / "provenance.json").read_text())
    del provenance["record"]["request"]["image_root"]
    (tmp_path / "edit" / "provenance.json").write_text(json.dumps(provenance))
    assert "images/edit_0000_source_1.png (row 0) is not in .; set tasks.edit.image_root" in refused(
        recipes[False], ready
    )
    given = open_sets(load_recipe(recipes[False], [ready, f"tasks.edit.image_root={edits}"]))["edit"]
    assert given[:]["source_image"] == known[:]["source_image"]
    assert given._fingerprint == load_from_disk(tmp_path / "edit")._fingerprint


def test_an_image_under_two_roots_is_not_guessed(recipes, tmp_path, edits):
    shutil.copytree(recipes[False].parent / "sets" / "edit", tmp_path / "edit")
    shutil.copytree(edits / "images", tmp_path / "images")
    provenance = json.loads((tmp_path / "edit" / "provenance.json").read_text())
    provenance["record"]["request"]["image_root"] = [str(edits), str(tmp_path)]
    (tmp_path / "edit" / "provenance.json").write_text(json.dumps(provenance))
    message = refused(recipes[False], "tasks={edit: {embeddings: " + str(tmp_path / "edit") + ", eval_rows: 1}}")
    assert (
        f"images/edit_0000_source_1.png (row 0) lies in {' and in '.join(sorted([str(edits), str(tmp_path)]))}"
        in message
    )


def test_an_image_that_was_damaged_since_is_named(recipes, tmp_path, edits):
    shutil.copytree(edits / "images", tmp_path / "images")
    for path in (tmp_path / "images").glob("*target.png"):
        path.write_bytes(path.read_bytes()[:60])
    PartialState(cpu=True)
    loaded = load_recipe(
        recipes[False], [f"tasks.{task}.image_root={tmp_path}" for task in ("edit", "combine", "text_to_image")]
    )
    trainer, _ = build_trainer(loaded, open_sets(loaded))
    with pytest.raises(
        InputError, match=r"tasks\.\w+: row \d: \S+_target\.png: cannot read .*; extraction could read it"
    ):
        trainer.train_dataset[0]
