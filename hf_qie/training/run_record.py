"""`run.json`, written as a run starts, beside the recipe: what its model card needs."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainingArguments

from hf_qie.config.recipe import Recipe
from hf_qie.data.mixture import Group
from hf_qie.models.checkpoint import checkpoint_file

RECORD = "run.json"  # beside the recipe
STATE = "trainer_state.json"  # Trainer's name; in the output folder it says that the run there has ended
LIBRARIES = ("torch", "transformers", "diffusers", "accelerate", "peft", "datasets")


def run_record(
    recipe: Recipe, arguments: TrainingArguments, groups: Sequence[Group], shares: np.ndarray
) -> dict[str, Any]:
    """What neither the recipe nor Trainer's state has: the groups of the mixture, defaults, machine and versions."""
    device = arguments.device
    return {
        "commit": base_commit(recipe),
        "started_in": str(Path.cwd()),  # where relative paths of the recipe start
        "mix": [
            {"task": one.task, "sources": one.num_sources, "rows": one.num_rows, "weight": one.weight, "share": share}
            for one, share in zip(groups, shares.tolist(), strict=True)
        ],
        "steps": arguments.max_steps,
        "ranks": arguments.world_size,
        "rows_a_rank": arguments.per_device_train_batch_size,
        "accumulated": arguments.gradient_accumulation_steps,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "sharded": bool(arguments.fsdp),
        "arithmetic": {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}[arguments.mixed_precision],
        "learning_rate": arguments.learning_rate,
        "schedule": str(getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)),
        "optimizer": str(getattr(arguments.optim, "value", arguments.optim)),
        "versions": {name: version(name) for name in LIBRARIES},
    }


def base_commit(recipe: Recipe) -> str | None:
    """The commit of a base from the Hub, whose cache has a folder for each."""
    if Path(recipe.model).is_dir():
        return None
    return checkpoint_file(recipe.model, "model_index.json", revision=recipe.revision).parent.name
