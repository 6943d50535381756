"""Every recipe and launch file, as far as a machine without a GPU can try them."""

import ast
import importlib
import math
import os
import re
import shlex
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import node_traffic
import pytest
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from memory_table import CARDS_GB, recipe_of, shape_of, table
from released import write_released

from hf_qie.config.launch import fsdp_settings, num_replicas
from hf_qie.config.recipe import Recipe, load_recipe
from hf_qie.data.mixture import resolve_same_shape
from hf_qie.data.samples import read_rows
from hf_qie.models.quantization import kind_of
from hf_qie.models.qwen_image.family import EDIT_PLUS
from hf_qie.training.fit import usable_bytes
from hf_qie.training.forecast import Run, forecast
from hf_qie.training.fsdp import fsdp_arguments
from hf_qie.training.model import build_model
from hf_qie.training.setup import training_arguments

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"
# recipe, launch file, overrides: what recipes/README.md offers
OFFERED = [
    ("lora_one_gpu.yaml", "one_gpu.yaml", ()),
    ("lora_48gb.yaml", "one_gpu.yaml", ()),
    ("lora_24gb.yaml", "one_gpu.yaml", ()),
    ("lora_16gb.yaml", "one_gpu.yaml", ()),
    ("lora_qwen_image_21.yaml", "one_gpu.yaml", ()),
    ("full.yaml", "one_gpu.yaml", ()),
    ("several_tasks.yaml", "8_gpus.yaml", ()),
    ("full_fsdp.yaml", "fsdp_8_gpus.yaml", ()),
    ("full_fsdp.yaml", "fsdp_2_nodes.yaml", ("training.gradient_accumulation_steps=2",)),
    ("full_fsdp.yaml", "hsdp_2_nodes.yaml", ("training.gradient_accumulation_steps=2",)),
]
NAMED = [f"{recipe}, {launch}" for recipe, launch, _ in OFFERED]
offered = pytest.mark.parametrize(("name", "launch", "overrides"), OFFERED, ids=NAMED)


@pytest.fixture(autouse=True)
def one_process():
    PartialState(cpu=True)


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """A checkpoint of the released shape, of which there is nothing but the transformer's config."""
    return write_released(tmp_path_factory.mktemp("released") / "model")


@pytest.fixture(scope="module")
def released_21(tmp_path_factory) -> Path:
    """The same of Qwen-Image-2.1."""
    return write_released(tmp_path_factory.mktemp("released_21") / "model", "QwenImage21Pipeline")


def launched(words: list[str]) -> tuple[int, dict[str, str]]:
    """How many ranks `accelerate launch` with these words starts, and what it sets for them."""
    arguments = launch_command_parser().parse_args(words)
    arguments, _, _ = _validate_launch_command(arguments)
    if arguments.num_processes == 1:
        return 1, prepare_simple_launcher_cmd_env(arguments)[1]
    return arguments.num_processes, prepare_multi_gpu_env(arguments) | {"WORLD_SIZE": str(arguments.num_processes)}


def words_of(launch: str) -> list[str]:
    words = ["--config_file", str(RECIPES / "accelerate" / launch)]
    if "nodes" in launch:
        words += ["--machine_rank", "0", "--main_process_ip", "127.0.0.1"]
    return [*words, "hf_qie/train.py"]


def test_every_recipe_and_launch_file_is_offered_and_explained():
    recipes = {path.name for path in RECIPES.glob("*.yaml")}
    assert recipes == {recipe for recipe, _, _ in OFFERED} | {"demo.yaml"}
    assert {path.name for path in (RECIPES / "accelerate").iterdir()} == {launch for _, launch, _ in OFFERED}
    readme = (RECIPES / "README.md").read_text(encoding="utf-8")
    for path in [*RECIPES.glob("*.yaml"), *RECIPES.glob("*/*")]:
        assert f"]({path.relative_to(RECIPES)})" in readme


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_training_arguments_take_every_recipe(path):
    recipe = load_recipe(path)  # without FSDP, which wants its ranks
    training = {key: value for key, value in recipe.training.items() if not key.startswith("fsdp")}
    arguments = training_arguments(recipe.model_copy(update={"training": training | {"use_cpu": True}}), num_rows=100)
    assert arguments.max_steps > 0


@offered
def test_launch_file_and_recipe_go_together(name, launch, overrides):
    recipe = load_recipe(RECIPES / name, overrides)
    ranks, environment = launched(words_of(launch))
    assert ranks == {"one_gpu.yaml": 1, "8_gpus.yaml": 8, "fsdp_8_gpus.yaml": 8}.get(launch, 16)
    assert num_replicas(environment) == 1 + (launch == "hsdp_2_nodes.yaml")
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    settings = fsdp_settings(recipe, environment)
    assert bool(settings) == ("sdp" in launch) == ("fsdp" in name)
    if settings:
        assert fsdp_arguments(recipe, settings)["fsdp_config"]["state_dict_type"] == "SHARDED_STATE_DICT"
    rows = recipe.training["per_device_train_batch_size"]
    batch = ranks * rows * recipe.training["gradient_accumulation_steps"]
    resolve_same_shape(
        recipe.mix.same_shape,
        global_batch_size=batch,
        per_device_train_batch_size=rows,
        draws_per_row=recipe.mix.draws_per_row,
    )
    written = re.search(r"global batch on (\w+) GPUs?: ([\dx ]+)", (RECIPES / name).read_text(encoding="utf-8"))
    if written and not overrides:
        assert math.prod(map(int, written[2].split("x"))) == batch


SHARDED = "fsdp_8_gpus.yaml", "fsdp_2_nodes.yaml", "hsdp_2_nodes.yaml"  # half a minute each
FORECASTS = [pytest.param(*one, marks=pytest.mark.soak if one[1] in SHARDED else ()) for one in OFFERED]


@pytest.mark.parametrize(("name", "launch", "overrides"), FORECASTS, ids=NAMED)
def test_the_readme_says_what_they_train_and_take(name, launch, overrides, released, released_21):
    readme = (RECIPES / "README.md").read_text(encoding="utf-8")
    (row,) = [line for line in readme.splitlines() if line.startswith("|") and f"]({name})" in line and launch in line]
    is_21 = name == "lora_qwen_image_21.yaml"
    recipe = load_recipe(RECIPES / name, [f"model={released_21 if is_21 else released}", *overrides])
    # of Qwen-Image-2.1 the text around an image alone is in the prompt
    of_recipe = {"draws_per_row": recipe.mix.draws_per_row} | ({"image_tokens": 6} if is_21 else {})
    model = build_model(recipe, mixed_precision="bf16", empty=True)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    ranks, environment = launched(words_of(launch))
    ranks //= num_replicas(environment)  # each shards the model for itself
    run = Run(
        recipe=recipe, shape=shape_of(512, 1, **of_recipe), num_ranks=ranks, fsdp=fsdp_settings(recipe, environment)
    )
    small, large = (
        forecast(replace(run, shape=shape), model) for shape in (run.shape, shape_of(1024, 3, **of_recipe))
    )
    cells = [cell.strip() for cell in row.split("|")][4:7]
    peaks = [f"{one.peak / 1e9:.1f}" + f" + {one.host / 1e9:.0f}" * bool(one.host) for one in (small, large)]
    assert cells == [f"{trained / 1e9:.2f} B", *peaks]
    if card := re.fullmatch(r"lora_(\d+)gb.yaml", name):
        assert large.needed < usable_bytes(int(card[1]))


def test_the_readme_says_what_a_quantised_base_takes(released):
    base = build_model(recipe_of(released), mixed_precision="bf16", empty=True).get_base_model()
    bytes_each = {None: 2, "int8": 1.001, "fp8": 1.001, "nf4": 0.516}  # tests/test_quantization.py holds them
    readme = (RECIPES / "README.md").read_text(encoding="utf-8")
    for kind in (None, "int8", "fp8", "nf4"):
        total = 0.0
        for name, parameter in base.named_parameters():
            layer, _, part = name.replace(".base_layer", "").rpartition(".")
            stored = kind_of(layer, kind, EDIT_PLUS) if kind and part == "weight" and parameter.ndim == 2 else None
            total += bytes_each[stored] * parameter.numel() * (".lora_" not in name)
        assert f"| {kind or 'null'} | {total / 1e9:.1f} GB |" in readme


def test_a_cell_of_the_table_of_cards_is_what_the_forecast_says(released):
    readme = (RECIPES / "README.md").read_text(encoding="utf-8")
    (row,) = [line.split(" | ") for line in readme.splitlines() if line.startswith("| null | 768 px | 1 |")]
    written = re.fullmatch(r"`stream_blocks=(\d+)`: ([\d.]+) \+ (\d+)", row[3 + CARDS_GB.index(24)])
    run = Run(recipe=recipe_of(released, f"memory.stream_blocks={written[1]}"), shape=shape_of(768, 1))
    found = forecast(run)
    assert [f"{found.peak / 1e9:.1f}", f"{found.host / 1e9:.0f}"] == [written[2], written[3]]
    assert found.needed <= usable_bytes(24) < found.needed + found.block, "one block less would not fit"


@pytest.mark.soak
def test_all_of_the_table_of_cards_is_what_the_forecast_says():
    assert table() in (RECIPES / "README.md").read_text(encoding="utf-8")


def test_the_readme_says_what_sharding_sends_between_machines(released):
    readme = (RECIPES / "README.md").read_text(encoding="utf-8")
    for trains in node_traffic.RECIPES:
        for replicas in node_traffic.WAYS:
            assert node_traffic.line(released, trains, replicas) in readme


@pytest.mark.soak  # three minutes
def test_a_step_sends_and_takes_what_the_readme_says(released):
    """What FSDP2 itself calls in a step that is run on tensors without data; shards are padded, by less than 1%."""
    assert node_traffic.table() in (RECIPES / "README.md").read_text(encoding="utf-8")
    for trains in node_traffic.RECIPES:
        for replicas in node_traffic.WAYS:
            run = node_traffic.run_of(released, trains, replicas)
            model = build_model(run.recipe, mixed_precision="bf16", empty=True)
            for micro_batches in (1, 2):
                sent, peak = node_traffic.by_blocks(run, model, replicas, micro_batches)
                assert sent == pytest.approx(node_traffic.sent_bytes(model, replicas, micro_batches), rel=0.01)
            assert peak == pytest.approx(forecast(run, model).peak, rel=0.01)


@pytest.mark.parametrize("name", sorted({recipe for recipe, _, _ in OFFERED}))
def test_recipes_read_data_of_the_kind_they_describe(name, photos, tmp_path, monkeypatch):
    (tmp_path / "data").symlink_to(photos)
    monkeypatch.chdir(tmp_path)
    recipe: Recipe = load_recipe(RECIPES / name)
    counts = {}
    for task, settings in recipe.tasks.items():
        rows = read_rows(settings, folder=tmp_path).table
        assert len(rows) > settings.eval_rows
        counts[task] = Counter(map(len, rows["sources"]))
    assert counts["portraits"].keys() == {1}
    if name == "several_tasks.yaml":
        assert counts["combine"].keys() == {2, 3}
        assert counts["faces"].keys() == {0}


@pytest.mark.parametrize("launch", ["fsdp_2_nodes.yaml", "hsdp_2_nodes.yaml"])
def test_the_slurm_script_starts_one_launcher_a_node_that_knows_its_rank_and_the_first_nodes_address(tmp_path, launch):
    """With stand-ins for Slurm's commands: `srun` is each node in turn, and `accelerate` says how it was called."""
    (tmp_path / "bin").mkdir()
    stands_in = {
        "scontrol": 'printf "node17\\nnode18\\n"',
        "srun": 'for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
        "accelerate": "printf '%q ' \"$@\"; echo",
    }
    for name, script in stands_in.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    arguments = ["recipes/full_fsdp.yaml", "tasks.faces.data=data/with space.jsonl"]
    done = subprocess.run(
        ["bash", RECIPES / "slurm" / "two_nodes.sbatch", *arguments],
        cwd=ROOT,
        env=os.environ
        | {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "SLURM_NNODES": "2",
            "SLURM_JOB_NODELIST": "node[17-18]",
        }
        | ({} if launch == "fsdp_2_nodes.yaml" else {"LAUNCH_FILE": f"recipes/accelerate/{launch}"}),
        capture_output=True,
        text=True,
        check=True,
    )
    nodes = [shlex.split(line) for line in done.stdout.splitlines()]
    assert len(nodes) == 2
    for rank, (command, *words) in enumerate(nodes):
        assert command == "launch"
        parsed, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
        assert (parsed.machine_rank, parsed.num_machines, parsed.num_processes) == (rank, 2, 16)
        assert (parsed.main_process_ip, parsed.main_process_port) == ("node17", 29500)
        assert [parsed.training_script, *parsed.training_script_args] == ["hf_qie/train.py", *arguments]
        assert (parsed.use_fsdp, parsed.mixed_precision) == (True, "bf16")
        assert parsed.parallelism_config_dp_replicate_size == 1 + (launch == "hsdp_2_nodes.yaml")


def blocks(language: str) -> list[str]:
    readme = (RECIPES / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", readme, flags=re.M | re.S)


def test_every_command_of_the_readme_names_a_launch_file_a_script_and_a_recipe_that_go_together():
    """They want GPUs, so none is run; Slurm's own is tried above."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(lines) >= 3
    runs = {load_recipe(path).training["output_dir"] for path in RECIPES.glob("*.yaml")}
    for line in lines:
        program, *words = shlex.split(line)
        if program == "python":  # of what a recipe left, or before it
            assert (ROOT / words[0]).is_file()
            assert words[1] in runs or (ROOT / words[1]).is_file()
            continue
        if program == "pip":  # with constraints, and extras that there are
            assert words == ["install", "-c", "constraints.txt", "-e", ".[quantization]"]
            continue
        if program == "sbatch":
            script, recipe, *overrides = words
            assert (ROOT / script).is_file()
        else:
            assert (program, words[0]) == ("accelerate", "launch")
            parsed, _, _ = _validate_launch_command(launch_command_parser().parse_args(words[1:]))
            assert parsed.training_script == "hf_qie/train.py"
            recipe, *overrides = parsed.training_script_args
            launch = Path(parsed.config_file).name
            assert (Path(recipe).name, launch) in {(name, launch) for name, launch, _ in OFFERED}
        assert load_recipe(ROOT / recipe, overrides).training


def test_the_python_of_the_readme_imports_what_is_there():
    for code in blocks("python"):
        for node in ast.parse(code).body:
            if isinstance(node, ast.ImportFrom) and node.module != "torchao.quantization":  # which is optional
                module = importlib.import_module(node.module)
                assert all(hasattr(module, name.name) for name in node.names)
