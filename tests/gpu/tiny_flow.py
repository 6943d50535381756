"""Extract, train 20 steps, export and sample with the tiny checkpoints: on the GPU twice, and once on the CPU.

All is float32, without TF32, so that the two devices differ by the order of sums alone. Sets are stored in float16,
whose unit in the last place is 1e-3 of a value: embeddings and latents may differ by two of them, losses by 1e-3 of
themselves after 20 steps, and a sampled image by one of 255 levels on average.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_from_disk
from gpu.cases import Context
from gpu.results import Result
from safetensors.numpy import load_file
from small_recipes import few_edits, write_recipe
from synthetic_edits import synthetic_edits

from hf_qie import export, extract
from hf_qie.config.recipe import load_recipe
from hf_qie.data.schema import matrix_width
from hf_qie.demo.tiny import tiny_checkpoint
from hf_qie.hub.sampler import Sampler
from hf_qie.train import run

KINDS = {"edit_plus": "Qwen-Image-Edit-2509", "qwen_image_21": "Qwen-Image-2.1"}
STEPS, ROWS = 20, 8
TOLERANCES = {"embeddings": 2e-3, "latents": 2e-3, "losses": 1e-3, "image": 1.0}
PARTS = {"embeddings": "of the largest", "latents": "of the largest", "losses": "of each", "image": "of 255 levels"}


def measure(context: Context, *, step: str) -> Iterator[Result]:
    """Both families, a process beside this one for the CPU."""
    on_cpu, kinds, found = process_without_gpu(context), kinds_of(context), {}
    for kind in kinds:
        for name in ("first", "second"):
            found[kind, name] = flow(context.folder / f"{kind}-{name}", kind, context, on_cpu=context.small)
        yield equal_twice(step, kind, found[kind, "first"], found[kind, "second"])
    on_cpu.join()
    assert on_cpu.exitcode == 0, f"the flow on the CPU ended with {on_cpu.exitcode}"
    for kind in kinds:
        yield from against_cpu(step, kind, found[kind, "first"], np.load(context.folder / f"{kind}-cpu" / "found.npz"))


def kinds_of(context: Context) -> list[str]:
    """The families; a test has time for one."""
    return list(KINDS)[-1:] if context.small else list(KINDS)


def process_without_gpu(context: Context) -> Any:
    """The same flows in a process that sees no GPU, begun."""
    from gpu.processes import context_of

    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what it inherits; this process has looked at its device already
    process = context_of(small=context.small).Process(target=flows_on_cpu, args=(context,))
    process.start()
    if seen is None:
        del os.environ["CUDA_VISIBLE_DEVICES"]
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = seen
    return process


def flows_on_cpu(context: Context) -> None:
    """One flow a family."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for kind in kinds_of(context):
        flow(context.folder / f"{kind}-cpu", kind, context, on_cpu=True)


def flow(folder: Path, kind: str, context: Context, *, on_cpu: bool) -> Mapping[str, np.ndarray]:
    """What the four scripts leave, as arrays, which `folder`/found.npz has too."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    steps, rows = (2, 2) if context.small else (STEPS, ROWS)
    model = tiny_checkpoint(folder / "model", kind=kind)
    synthetic_edits(folder / "data", rows=rows)
    training = {
        "output_dir": str(folder / "run"),
        "use_cpu": on_cpu,
        "bf16": False,
        "max_steps": steps,
        "logging_steps": 1,
        "save_steps": steps,
        "learning_rate": 1e-3,
        "disable_tqdm": True,
    }
    trainable = {"lora": {"rank": 4, "alpha": 4, "target_modules": "attention"}}
    tasks = few_edits(folder / "data", edit=rows)
    path = write_recipe(folder, model, tasks, extract={"inverse": False}, training=training, trainable=trainable)
    assert extract.main([str(path)]) == 0
    trainer = run(recipe := load_recipe(path))
    export.main([str(folder / "run"), "--to", "lora", "--dtype", "float32"])
    image = sampled(recipe, tasks["edit"][0])
    (weights,) = (folder / "run" / "export" / "lora").glob("*.safetensors")
    found = {
        **columns(folder / "sets" / "edit"),
        "losses": np.array([entry["loss/edit"] for entry in trainer.state.log_history if "loss/edit" in entry]),
        "weights": flat(load_file(weights)[key] for key in sorted(load_file(weights))),
        "image": image,
    }
    np.savez(folder / "found.npz", **found)
    return found


def columns(folder: Path) -> dict[str, np.ndarray]:
    """All embeddings and all latents of a set."""
    data, found = load_from_disk(str(folder)), {}
    for part, name in (("embeddings", "embeds"), ("latents", "latents")):
        names = [one for one, feature in data.features.items() if name in one and matrix_width(feature)]
        found[part] = flat(np.array(row[one], np.float32) for row in data for one in names)
    return found


def flat(arrays: Any) -> np.ndarray:
    """One after the other."""
    return np.concatenate([array.ravel() for array in arrays])


def sampled(recipe: Any, row: Mapping[str, Any]) -> np.ndarray:
    """An edit by what was trained, in two steps."""
    sampler = Sampler(recipe)
    sampler.pipeline.set_progress_bar_config(disable=True)
    image = sampler(row["instruction"], images=row["source_image"], seed=0, num_inference_steps=2)
    return np.array(image.convert("RGB"), np.float32)


def equal_twice(step: str, kind: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> Result:
    """How many of the parts differ in any bit."""
    differing = [name for name in first if not np.array_equal(first[name], second[name])]
    what = f"{KINDS[kind]}: parts that differ when run twice{': ' + ', '.join(differing) if differing else ''}"
    return Result(step=step, what=what, value=len(differing), most=0)


def against_cpu(step: str, kind: str, here: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[Result]:
    """How far each part is from the CPU's."""
    for part, most in TOLERANCES.items():
        ours, theirs = here[part].astype(np.float64), there[part].astype(np.float64)
        assert ours.shape == theirs.shape, json.dumps([part, ours.shape, theirs.shape])
        apart, size = np.abs(ours - theirs), np.abs(theirs)
        far = {"losses": (apart / size.clip(1e-9)).max(), "image": apart.mean()}.get(part, apart.max() / size.max())
        what = f"{KINDS[kind]}: {part} apart from the CPU's, {PARTS[part]}"
        yield Result(step=step, what=what, value=float(far), most=most)
