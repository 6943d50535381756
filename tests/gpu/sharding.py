"""FSDP2 over two GPUs: full steps of a model of 6 blocks, save and resume, and a rank that is killed.

The runs are those of train.py, with NCCL; on the CPU, for a test, tests/ranks.py puts gloo in its place.
"""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffusers import QwenImageTransformer2DModel
from embedding_sets import write_recipe
from gpu.cases import Context
from gpu.results import Result
from ranks import in_ranks

from hf_qie.demo.tiny import tiny_checkpoint

RANKS, STEPS, SAVED, KILLED = 2, 4, 2, 3
BLOCKS, HEADS = 6, 8  # of 128: 230 million parameters, of which a checkpoint takes 3 GB
PATIENCE_S = 20  # for the rank that is left
CONFIG = "{fsdp_version: 2, state_dict_type: SHARDED_STATE_DICT, cpu_ram_efficient_loading: true}"


def measure(context: Context, *, step: str) -> Iterator[Result]:
    """A run without a break; the same one killed after its save, and resumed."""
    recipe = recipe_of(context.folder, small=context.small)
    settings = {"ranks": RANKS, "log": context.folder / "log", "on_gpus": not context.small}
    started = time.monotonic()
    assert in_ranks([run(recipe, "straight")], **settings) == [0] * RANKS, settings["log"].read_text()[-2000:]
    seconds = time.monotonic() - started
    whole = report(recipe, "straight")
    yield Result(step=step, what="full steps, save: ranks that ended well", value=RANKS, least=RANKS)
    yield Result(step=step, what="the whole run", value=seconds, unit="s")
    share = {"beside": "all parameters", "other": whole["numel"], "least": 0.4, "most": 0.6}
    yield Result(step=step, what="parameters of a rank", value=whole["numel_here"], **share)
    killed = run(recipe, "broken") | {"kill": {"rank": 1, "point": "loss", "call": KILLED}}
    started = time.monotonic()
    codes = in_ranks([killed], alone_s=PATIENCE_S, **settings)
    yield Result(step=step, what="a rank killed: ranks that ended by themselves", value=codes.count(1), unit="of 1")
    yield Result(step=step, what="a rank killed: until all have ended", value=time.monotonic() - started, unit="s")
    assert all(codes), codes
    assert in_ranks([run(recipe, "broken")], **settings) == [0] * RANKS, settings["log"].read_text()[-2000:]
    ours, theirs = ([entry["loss"] for entry in one["steps"]] for one in (report(recipe, "broken"), whole))
    apart = max(abs(one - other) / other for one, other in zip(ours[SAVED:], theirs[SAVED:], strict=True))
    yield Result(step=step, what="losses of the resumed run apart from one without a break", value=apart, most=1e-5)


def recipe_of(folder: Path, *, small: bool) -> Path:
    """Full fine-tuning, a checkpoint after two steps of four."""
    model = tiny_checkpoint(folder / "model")
    shape = {"num_layers": BLOCKS, "num_attention_heads": HEADS, "attention_head_dim": 128, "joint_attention_dim": 96}
    if small:
        shape |= {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}
    QwenImageTransformer2DModel(**shape).save_pretrained(model / "transformer")
    training = {"use_cpu": None, "per_device_train_batch_size": 2, "max_steps": STEPS, "save_steps": SAVED}
    return write_recipe(folder, model, training=training | {"learning_rate": 1e-4})


def run(recipe: Path, name: str) -> dict[str, Any]:
    """A run as `in_ranks` takes it, with its own output folder."""
    overrides = [f"training.output_dir={recipe.parent / name}", "training.fsdp=true", f"training.fsdp_config={CONFIG}"]
    return {"recipe": str(recipe), "overrides": overrides}


def report(recipe: Path, name: str) -> Mapping[str, Any]:
    """What rank 0 has left of a run."""
    return json.loads((recipe.parent / name / "rank0.json").read_text(encoding="utf-8"))
