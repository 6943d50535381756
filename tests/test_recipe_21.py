"""The recipe for Qwen-Image-2.1, from data to an edit, through the scripts, on a tiny checkpoint and real photos."""

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from accelerate import PartialState
from datasets import load_from_disk
from PIL import Image

from hf_qie import check, export, extract, sampling, train
from hf_qie.config.recipe import load_recipe
from hf_qie.models.lora_files import LORA_FILE

KINDS = {"portrait_edit": 1, "portrait_multi": 2, "portrait_t2i": 0}  # tasks, with the fewest sources of a row
ROWS = 4


@pytest.fixture
def arguments(tiny, photos, root, tmp_path) -> list[str]:
    """The recipe and overrides: a tiny checkpoint, few rows of each kind, small images, few steps."""
    data = tmp_path / "data"
    data.mkdir()
    for name in KINDS:
        lines = (photos / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:ROWS]
        (data / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    columns = {"captions": ["instruction", "instruction_cn"]}
    tasks = {
        name: {"data": str(data / f"{name}.jsonl"), "image_root": str(photos), "columns": columns, "eval_rows": 1}
        for name in KINDS
    }
    training = {"use_cpu": True, "max_steps": 2, "gradient_accumulation_steps": 1, "logging_steps": 1, "save_steps": 2}
    training |= {"output_dir": str(tmp_path / "run"), "eval_strategy": "steps", "eval_steps": 2, "report_to": "none"}
    overrides = {
        "model": str(tiny("qwen_image_21")),
        "tasks": tasks,
        "extract.output_dir": str(tmp_path / "sets"),
        "extract.image_sample_size": 128,
        "extract.source_sample_size": 128,
        **{f"training.{key}": value for key, value in training.items()},
    }
    given = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
    return [str(root / "recipes" / "lora_qwen_image_21.yaml"), *given]


def test_the_recipe_goes_from_data_to_an_edit(arguments, photos, tmp_path):
    PartialState(cpu=True)
    recipe = load_recipe(arguments[0], arguments[1:])
    assert recipe.mix.draws_per_row == recipe.training["per_device_train_batch_size"] == 4
    check.main(arguments)
    assert extract.main(arguments) == 0
    for name, fewest in KINDS.items():
        data = load_from_disk(tmp_path / "sets" / name)
        assert len(data) == ROWS and min(data["num_sources"]) == fewest
        assert [len(slots) for slots in data["image_slots"]] == data["num_sources"]
    train.main(arguments)
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2]
    assert all(entry["eval_loss"] > 0 for entry in log if "eval_loss" in entry)

    output = tmp_path / "edit.png"
    image = photos / "images" / "source_01.jpg"
    options = ["--num_inference_steps", "2", "--output", str(output), "--image", str(image)]
    sampling.main([*arguments, *options, "--instruction", "Make it red."])
    with Image.open(output) as made:
        assert made.mode == "RGBA" and made.size[0] < made.size[1]

    export.main([str(tmp_path / "run"), "--to", "lora"])
    export.main([str(tmp_path / "run"), "--to", "pipeline"])
    folder = tmp_path / "run" / "export"
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder / "pipeline", dtype=torch.float32)
    assert type(pipeline) is diffusers.QwenImage21Pipeline
    pipeline.load_lora_weights(shutil.copytree(folder / "lora", tmp_path / "lora"), weight_name=LORA_FILE)
    assert all(Path(folder, kind, "NOTICE").is_file() for kind in ("lora", "pipeline"))
