"""Replicas that are sharded within train as one process does, and resume from each other's checkpoints.

Two replicas of two ranks, on gloo; see tests/ranks.py. tests/test_fsdp.py holds what they share with plain shards.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from embedding_sets import write_recipe
from PIL import Image
from ranks import in_ranks
from safetensors.torch import load_file
from test_fsdp import LORA, WEIGHTS, environment_of, fsdp, hold
from torch import nn
from torch.distributed.fsdp import fully_shard

from hf_qie import export
from hf_qie.training.dcp_reader import sharded_tensors
from hf_qie.training.fsdp import check_sharded
from hf_qie.training.model import LORA_FILE

KINDS = {"full": {"trainable": {}}, "lora": {"trainable": LORA}}
SIZES = "--parallelism_config_dp_replicate_size 2 --parallelism_config_dp_shard_size 2"
FLAGS = f"--use_fsdp --fsdp_version 2 --use_parallelism_config {SIZES} --fsdp_state_dict_type "
TASKS = {"tasks": {name: {"data": f"{name}.jsonl", "eval_rows": 2} for name in ("edit", "text_to_image")}}
SEEN = {"sampling": {"every": 4, "rows": 2, "num_inference_steps": 2}, "extract": {"dtype": "float32"}}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2}
STEPS, GROUPS = 4, 3  # of parameters that are gathered at once: two blocks, and the rest
FULL_21 = "full of Qwen-Image-2.1"
pytestmark = pytest.mark.two_rank
every_kind = pytest.mark.parametrize("kind", [*KINDS, FULL_21])


class Runs:
    """Runs in `folder`, of eight draws a step."""

    def __init__(self, folder: Path, model: Path, *, kinds: Mapping[str, Mapping] = KINDS, **training):
        self.folder, self.runs = folder, []
        for kind, sections in kinds.items():
            (folder / kind).mkdir(parents=True)
            # a large epsilon keeps AdamW from blowing up the rounding of gradients that are nearly 0
            settings = {"use_cpu": None, "gradient_accumulation_steps": 2, "adam_epsilon": 1e-3} | training
            write_recipe(folder / kind, model, training=settings, **sections)

    def add(self, kind: str, name: str, ranks: int, *overrides: str, of: str | None = None, **more) -> None:
        """A run, that resumes in the middle of the run `of`, if one is named."""
        overrides = f"training.per_device_train_batch_size={4 // ranks}", *overrides
        if of:
            more["checkpoint"] = str(self.folder / kind / of / "checkpoint-2")
        output_dir = f"training.output_dir={self.folder / kind / name}"
        recipe = str(self.folder / kind / "recipe.yaml")
        self.runs.append({"recipe": recipe, "overrides": [output_dir, *overrides], **more})

    def replicas(self, kind: str, name: str, state: str, **more) -> None:
        """A run of two replicas of two ranks."""
        self.add(kind, name, 4, environment=environment_of(FLAGS + f"{state}_STATE_DICT"), **more)

    def do(self, ranks: int) -> None:
        """All of them, one after the other."""
        log = self.folder / "log"
        assert in_ranks(self.runs, ranks=ranks, log=log) == [0] * ranks, log.read_text()
        self.runs.clear()


@pytest.fixture
def done(built_once, tiny) -> Path:
    """The folder of the runs."""

    def build(folder: Path) -> None:
        kinds = {"full": KINDS["full"] | TASKS, "lora": KINDS["lora"] | TASKS | SEEN}
        Runs(folder, tiny("qwen_image_21"), kinds={FULL_21: kinds["full"]}, **EVALUATED)
        runs = Runs(folder, tiny(), kinds=kinds, **EVALUATED)
        for kind in (*KINDS, FULL_21):
            runs.add(kind, "one", 1, "training.use_cpu=true")
        runs.do(1)
        runs.replicas("full", "replicas", "SHARDED")
        runs.replicas("full", "resumed", "SHARDED", of="replicas")
        runs.add("full", "plain", 4, *fsdp("SHARDED"), of="replicas")
        runs.replicas(FULL_21, "replicas", "SHARDED")
        runs.replicas("lora", "replicas", "FULL", sums=str(folder / "sums"))
        runs.do(4)

    return built_once("hsdp", build)


def reports(run: Path) -> list[dict]:
    """What the ranks said of a run."""
    return [json.loads(path.read_text()) for path in sorted(run.glob("rank?.json"))]


@every_kind
def test_replicas_give_the_weights_losses_and_norms_of_one_process(done, kind):
    hold(done / kind / "replicas", done / kind / "one", kind.split()[0], atol=1e-5)  # float32 sums in another order
    (one,), ranks = reports(done / kind / "one"), reports(done / kind / "replicas")
    assert len(ranks) == 4
    for report in ranks:
        assert len(report["steps"]) == STEPS and len(report["evaluations"]) == 2
        for name in ("steps", "evaluations"):
            for entry, expected in zip(report[name], one[name], strict=True):
                assert losses(entry) == pytest.approx(losses(expected), rel=1e-4)


def losses(entry: dict) -> dict:
    return {key: value for key, value in entry.items() if "runtime" not in key}


@every_kind
def test_each_replica_holds_the_model_once(done, kind):
    ranks = reports(done / kind / "replicas")
    halves = [report["numel_here"] for report in ranks]
    assert halves[0] + halves[1] == halves[2] + halves[3] == ranks[0]["numel"]
    assert max(halves) < ranks[0]["numel"]
    assert "FSDP: 2 replicas of the model, each sharded over 2 ranks" in (done / "log").read_text()


def test_replicas_add_up_their_gradients_once_a_step_and_not_for_each_micro_batch(done):
    sums = (done / "sums").read_text().split()
    assert sums == ["2"] * (STEPS * GROUPS)


def test_resumed_replicas_are_as_never_interrupted(done):
    hold(done / "full" / "resumed", done / "full" / "replicas", "full")
    straight, resumed = reports(done / "full" / "replicas")[0], reports(done / "full" / "resumed")[0]
    assert resumed["steps"] == straight["steps"]


def test_plain_shards_resume_what_replicas_began(done):
    hold(done / "full" / "plain", done / "full" / "replicas", "full", atol=1e-6)  # float32 sums in another order
    assert {report["numel_here"] for report in reports(done / "full" / "plain")} == {342_432 // 4}


def test_replicas_make_the_images_of_one_process(done):
    folder = done / "lora" / "one"
    names = [path.relative_to(folder) for path in folder.rglob("*.png") if path.name != "loss.png"]
    assert len(names) == 5  # two at the start, two at the end, and the grid
    for name in names:
        one, other = (np.asarray(Image.open(done / "lora" / run / name), int) for run in ("one", "replicas"))
        assert abs(one - other).mean() < 0.5, name  # float32 sums in another order


@pytest.mark.parametrize("kind", ["full", FULL_21])
def test_the_shards_of_replicas_are_those_of_what_was_trained(done, kind):
    trained = load_file(done / kind / "replicas" / WEIGHTS["full"])
    shards = sharded_tensors(done / kind / "replicas" / "checkpoint-4")
    assert trained.keys() <= shards.keys()
    assert all(torch.equal(shards[name](), tensor) for name, tensor in trained.items())


def test_adapters_of_replicas_are_exported_as_they_were_trained(done, tmp_path):
    export.main([str(done / "lora" / "replicas" / "checkpoint-4"), "--output", str(tmp_path / "lora")])
    exported, adapters = load_file(tmp_path / "lora" / LORA_FILE), load_file(done / "lora" / "replicas" / LORA_FILE)
    assert exported.keys() == adapters.keys()
    assert all(torch.allclose(exported[name].float(), adapters[name], rtol=2**-8) for name in adapters)


def test_replicas_that_were_asked_for_and_are_not_there_are_an_error(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = fully_shard(nn.Linear(2, 2), mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        with pytest.raises(RuntimeError, match=r"2 replicas were asked for, but parameters have \[1\]"):
            check_sharded(model, torch.optim.SGD(model.parameters()), num_replicas=2)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.soak  # two minutes
@pytest.mark.parametrize("family", ["edit_plus", "qwen_image_21"])
def test_checkpoints_of_replicas_of_plain_shards_and_of_fewer_ranks_resume_each_other(tiny, tmp_path, family):
    runs = Runs(tmp_path, tiny(family))
    states = "SHARDED", "FULL"
    for kind in KINDS:
        runs.add(kind, "one", 1, "training.use_cpu=true")
    runs.do(1)
    for kind in KINDS:
        for state in states:
            runs.replicas(kind, f"{state} replicas", state)
            runs.replicas(kind, f"{state} replicas, replicas", state, of=f"{state} replicas")
            runs.add(kind, f"{state} plain", 4, *fsdp(state))
            runs.add(kind, f"{state} replicas, plain", 4, *fsdp(state), of=f"{state} replicas")
            runs.replicas(kind, f"{state} plain, replicas", state, of=f"{state} plain")
    runs.do(4)
    for kind in KINDS:
        for state in states:
            runs.add(kind, f"{state} replicas, two ranks", 2, *fsdp(state), of=f"{state} replicas")
            runs.add(kind, f"{state} two ranks", 2, *fsdp(state))
    runs.do(2)
    for kind in KINDS:
        for state in states:
            runs.replicas(kind, f"{state} two ranks, replicas", state, of=f"{state} two ranks")
    runs.do(4)
    made = [(kind, path) for kind in KINDS for path in (tmp_path / kind).glob("* *") if path.is_dir()]
    assert len(made) == 2 * 2 * 8
    for kind, path in made:
        hold(path, tmp_path / kind / "one", kind, atol=1e-5)
        assert len(reports(path)[0]["steps"]) == STEPS
    for kind in KINDS:
        for state in states:
            replicas = tmp_path / kind / f"{state} replicas"
            hold(replicas.with_name(f"{replicas.name}, replicas"), replicas, kind)
