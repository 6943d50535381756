"""train.py as it is started: by path, under the launcher, with what people get wrong."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from datasets import load_from_disk
from embedding_sets import write_recipe, write_set
from ports import free_port
from ranks import in_ranks
from safetensors.torch import load_file

from hf_qie.config.recipe import as_dict, load_recipe
from hf_qie.data.provenance import PROVENANCE
from hf_qie.errors import InputError
from hf_qie.train import main, run, train
from hf_qie.training.sets import open_sets
from hf_qie.training.setup import global_batch_size, training_arguments

LORA = {"lora": {"rank": 4, "alpha": 8, "target_modules": "all-linear"}}


def start(root: Path, *arguments: object, module: tuple[str, ...] = (), **environment: str):
    """Run the script by its path, under a module such as the launcher if one is given."""
    command = [sys.executable, *(("-m", *module) if module else ()), root / "hf_qie" / "train.py", *arguments]
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        timeout=240,
    )


def start_two_machines(root: Path, *arguments: object) -> list[str]:
    """The launcher on two machines that meet over loopback, a rank on each; what they said."""
    port = f"--main_process_ip 127.0.0.1 --main_process_port {free_port()}"
    machines = f"--multi_gpu --num_machines 2 --num_processes 2 {port}"
    with ThreadPoolExecutor() as both:
        launch = f"accelerate.commands.launch {machines} --mixed_precision no --machine_rank"
        started = [both.submit(start, root, *arguments, module=(*launch.split(), str(rank))) for rank in (0, 1)]
    for done in (one.result() for one in started):
        assert done.returncode == 0, done.stderr
    return [one.result().stderr for one in started]


def test_help_is_the_docstring(root):
    done = start(root, "--help")
    assert done.returncode == 0
    assert "accelerate launch [-q] hf_qie/train.py recipe.yaml" in done.stdout


def test_a_run_leaves_weights_recipe_and_a_line_on_what_it_did(root, tiny, tmp_path):
    path = write_recipe(tmp_path, tiny(), trainable=LORA)
    done = start(root, path, "training.max_steps=2")
    assert done.returncode == 0, done.stderr
    assert "372,256 parameters, of which 26,752 train (LoRA on 34 linear layers)" in done.stderr
    assert "training in float32, computing in float32; 4 rows a step" in done.stderr
    assert "encoder: not loaded, VAE: not loaded" in done.stderr
    assert "8 draws\ntask" in done.stderr
    run = tmp_path / "run"
    left = {"checkpoint-2", "pytorch_lora_weights.safetensors", "recipe.yaml", "run.json", "trainer_state.json"}
    left |= {"loss.png"}
    assert {p.name for p in run.iterdir()} == left
    assert as_dict(load_recipe(run / "recipe.yaml")) == as_dict(load_recipe(path, ["training.max_steps=2"]))


def logged(checkpoint: Path) -> list[dict[str, float]]:
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [{key: value for key, value in entry.items() if key.startswith(("loss", "eval_loss"))} for entry in history]


@pytest.mark.two_rank
@pytest.mark.parametrize("trainable", [{}, LORA], ids=["full", "lora"])
def test_two_ranks_give_what_one_gives_and_two_machines_take_up_its_run(root, tiny, tmp_path, trainable):
    training = {"optim": "sgd", "learning_rate": 0.1, "eval_strategy": "steps", "eval_on_start": True}
    training |= {"eval_steps": 2, "per_device_eval_batch_size": 2}
    tasks = {"edit": {"data": "edit.jsonl", "eval_rows": 3}}
    path = write_recipe(tmp_path, tiny(), tasks=tasks, trainable=trainable, training=training)
    recipe = load_recipe(path)
    train(recipe, open_sets(recipe))
    one = tmp_path / "run" / "checkpoint-4"
    (weights,) = one.rglob("*.safetensors")
    assert {"loss", "loss/edit", "loss/text_to_image", "eval_loss/edit"} <= {key for log in logged(one) for key in log}
    shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / "taken_up" / "checkpoint-2")
    for name in ("two", "taken_up"):
        overrides = [f"training.output_dir={tmp_path / name}", "training.per_device_train_batch_size=2"]
        overrides += [f"training.eval_on_start={str(name == 'two').lower()}"]
        if trainable and name == "taken_up":
            said, other = start_two_machines(root, path, *overrides)
            assert "rows a step" not in other
        else:
            log = tmp_path / f"{name}.log"
            assert in_ranks([{"recipe": path, "overrides": overrides}], ranks=2, log=log) == [0, 0], log.read_text()
            said = log.read_text()
        assert said.count("4 rows a step: 2 ranks x 2 rows x 1 accumulated") == 1, "one rank speaks"
        assert ("resuming from" in said) == (name == "taken_up")
        assert said.count("of 16 rows" if name == "two" else "of 8 rows") == 1, "the shares on both ranks"
        two = tmp_path / name / "checkpoint-4"
        # float32 sums in another order, also below
        assert logged(two) == [pytest.approx(entry, rel=1e-5) for entry in logged(one)]
        assert logged(two)[0] == logged(one)[0], "of the same weights, evaluation gives the same to the last bit"
        ours, theirs = load_file(weights), load_file(two / weights.relative_to(one))
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], atol=1e-5, rtol=0)


# --- what people get wrong -------------------------------------------------------------------------------------------


def refused(root: Path, *arguments: object, **environment: str) -> str:
    """The message that the script ends with: one, and no traceback."""
    done = start(root, *arguments, **environment)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr


def test_a_set_that_was_not_extracted_is_named_before_torch_is_imported(root, tiny, tmp_path):
    path = write_recipe(tmp_path, tiny())
    shutil.rmtree(tmp_path / "sets" / "edit")
    message = refused(root, path, PYTHONPROFILEIMPORTTIME="1")
    assert "sets/edit: no finished embedding set; run hf_qie/extract.py with this recipe first" in message
    assert not [line for line in message.splitlines() if line.endswith(("| torch", "| transformers", "| diffusers"))]


def test_a_set_of_another_checkpoint_is_refused(root, tiny, tmp_path):
    path = write_recipe(tmp_path, tiny())
    message = refused(root, path, f"model={tiny('edit')}")
    assert "tasks.edit: its embedding set does not fit the checkpoint" in message


def test_a_set_of_another_target_size_is_taken_with_a_warning(tiny, tmp_path, caplog):
    path = write_recipe(tmp_path, tiny())
    provenance = tmp_path / "sets" / "edit" / PROVENANCE
    made = json.loads(provenance.read_text())
    made["record"]["request"] = made["record"].get("request", {}) | {"image_sample_size": 64}
    provenance.write_text(json.dumps(made))
    open_sets(load_recipe(path, ["extract.image_sample_size=256"]))
    assert "tasks.edit: its set was made with extract.image_sample_size: 64, the recipe has 256; " in caplog.text
    caplog.clear()
    open_sets(load_recipe(path, ["extract.image_sample_size=64"]))
    assert "image_sample_size" not in caplog.text


def test_a_set_of_another_source_size_is_taken_with_a_warning(tiny, tmp_path, caplog):
    path = write_recipe(tmp_path, tiny())
    open_sets(load_recipe(path, ["extract.source_sample_size=512"]))
    assert "tasks.edit: its set was made with extract.source_sample_size: 1024, the recipe has 512; " in caplog.text
    caplog.clear()
    for same in ("null", "1024"):  # null: the family's own
        open_sets(load_recipe(path, [f"extract.source_sample_size={same}"]))
    assert "source_sample_size" not in caplog.text


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("--use_fsdp", "training.fsdp: asked for, but not active in 2 process(es) on cpu"),
        ("--multi_gpu --dynamo_backend inductor", "asks for compiling the whole model, which is not available yet"),
    ],
)
def test_what_the_launcher_asks_for_and_would_not_happen_is_refused(root, tiny, tmp_path, asked, message):
    launch = f"accelerate.commands.launch {asked} --num_processes 2 --main_process_port {free_port()}"
    done = start(root, write_recipe(tmp_path, tiny()), module=(*launch.split(), "--mixed_precision", "no"))
    assert done.returncode == 1
    told = [line for line in done.stderr.splitlines() if message in line and not line.startswith("rank 1: ")]
    assert len([line for line in told if "traceback :" not in line]) == 1, done.stderr  # the launcher repeats it


def test_ranks_that_would_each_train_alone_are_refused(tiny, tmp_path, monkeypatch):
    """As under a launcher of two processes that no GPU is visible to."""
    path = write_recipe(tmp_path, tiny(), training={"use_cpu": None})
    monkeypatch.setenv("WORLD_SIZE", "2")
    alone = "started 2 processes, but each runs alone, as 1 process on cpu.* --num_processes 1"
    with pytest.raises(InputError, match=alone):
        run(load_recipe(path))
    assert not (tmp_path / "run").exists()


def test_a_notebook_trains_and_goes_on(tiny, tmp_path):
    """Under an event loop that runs, as there, twice in one process."""
    path = str(write_recipe(tmp_path, tiny(), trainable=LORA))

    async def cell(*overrides: str) -> None:
        main([path, *overrides])

    asyncio.run(cell("training.max_steps=2"))
    asyncio.run(cell())
    assert (tmp_path / "run" / "checkpoint-4" / "complete.json").exists()
    assert not list((tmp_path / "run").glob(".lock*"))


def test_values_that_only_training_arguments_know_are_input_errors(root, tiny, tmp_path):
    message = refused(root, write_recipe(tmp_path, tiny()), "training.debug=overflow")
    assert "training: overflow is not a valid DebugOption" in message


def test_a_ready_set_is_taken_from_where_it_lies(root, tiny, tmp_path):
    write_set(tmp_path / "elsewhere", tiny())
    tasks = {"edit": {"embeddings": str(tmp_path / "elsewhere")}, "text_to_image": {"data": "x.jsonl", "weight": 0}}
    path = write_recipe(tmp_path, tiny(), tasks=tasks, trainable=LORA)
    shutil.rmtree(tmp_path / "sets")
    done = start(root, path, "training.max_steps=1")
    assert done.returncode == 0, done.stderr
    message = refused(root, path, "tasks.edit.embeddings=nowhere")
    assert "tasks.edit.embeddings: nowhere: no folder here, and no Hub id" in message


def test_epochs_are_passes_over_the_rows_of_the_weighted_tasks(tiny, tmp_path):
    path = write_recipe(tmp_path, tiny(), training={"max_steps": None, "num_train_epochs": 1.5})
    arguments = training_arguments(load_recipe(path), num_rows=17)
    assert global_batch_size(arguments) == 4
    assert arguments.max_steps == 7  # 25.5 draws in steps of 4


def test_the_captions_of_a_ready_set_are_weighed_by_its_own_names(tiny, tmp_path):
    path = write_recipe(tmp_path, tiny(), tasks={"edit": {"embeddings": str(tmp_path / "own")}})
    write_set(tmp_path / "own", tiny())
    data = load_from_disk(str(tmp_path / "own")).rename_column("text_embeds_instruction", "text_embeds_prompt")
    data.save_to_disk(tmp_path / "renamed")
    shutil.copy(tmp_path / "own" / PROVENANCE, tmp_path / "renamed")
    given = [f"tasks.edit.embeddings={tmp_path / 'renamed'}", "tasks.text_to_image.weight=0"]
    assert open_sets(load_recipe(path, [*given, "mix.caption_weights={prompt: 1, instruction: 0}"]))
    with pytest.raises(InputError, match=r"^mix\.caption_weights\.promt: unknown key, did you mean 'prompt'\?"):
        open_sets(load_recipe(path, [*given, "mix.caption_weights={promt: 1}"]))
    with pytest.raises(InputError, match=r"mix\.caption_weights\.prompt: unknown key, known: instruction"):
        load_recipe(path, ["tasks.edit={data: a.jsonl}", "mix.caption_weights={prompt: 1}"])
