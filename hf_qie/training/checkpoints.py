"""Checkpoints on disk, which are complete, and what a run that resumes from one may change.

A checkpoint's state holds settings of the optimizer and its schedule; the recipe's take their place.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_qie.config.recipe import Recipe, as_dict, leaves
from hf_qie.errors import InputError
from hf_qie.runtime.files import flush, samples, write_durably

logger = get_logger(__name__)

COMPLETE = "complete.json"
RECORD = "run.json"  # in the output folder, beside the recipe: what the model card needs
STATE = "trainer_state.json"  # Trainer's name; in the output folder it says that the run there has ended
WEIGHTS_ALONE = "it holds weights alone (save_only_model)"
WHOLE_BYTES = 1 << 30  # larger files are checked by samples: minutes of reading would tell little more
SAMPLES, SAMPLE_BYTES = 64, 1 << 20
NAMED = 5  # keys of a message
# Sections of the recipe that must not change, beside the sets and the size of a step.
SAME = ("model", "revision", "seed", "mix", "loss", "trainable", "ema")
# Of the identity: keys that older checkpoints lack, and what they had.
ADDED = {"mix.draws_per_row": 1, "loss.edit_weight": 0.0}
# Of TrainingArguments, what decides the learning rate and how the optimizer works.
KEYS = ("optim", "optim_args", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
KEYS += ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps")
# Optimizers that can use each other's state, by the name of one; schedules that only can use their own.
ALIKE = {"adamw_torch_fused": "adamw_torch", "adamw_bnb_8bit": "adamw_8bit"}
BY_METRIC = ("reduce_lr_on_plateau", "greedy")


def mark_complete(folder: Path, **known: Any) -> None:
    """Wait until every file of a checkpoint is on the disk, then write its `complete.json`.

    `known`: the step, the ranks, the identity of the run and the settings of its optimizer.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        flush(path)
        if path.is_file():
            files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    write_durably(folder / COMPLETE, json.dumps(known | {"files": files}, indent=2))


def file_digest(path: Path) -> str:
    """sha256 of a file up to 1 GB; of a larger one that of 64 MB, evenly spread from its first byte to its last."""
    with path.open("rb") as file:
        if path.stat().st_size <= WHOLE_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        return hashlib.sha256(b"".join(samples(file, count=SAMPLES, num_bytes=SAMPLE_BYTES))).hexdigest()


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint; a warning names newer ones that are incomplete, and why."""
    found = [path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name[11:].isdecimal()]
    for folder in sorted(found, key=step_of, reverse=True):
        if (reason := misfit(folder)) is None:
            return folder
        logger.warning("%s is skipped: %s", folder, reason)
    return None


def step_of(checkpoint: Path) -> int:
    """How many steps the run had done."""
    return int(checkpoint.name.rpartition("-")[2])


def misfit(folder: Path) -> str | None:
    """Why a checkpoint cannot be resumed from; None where it can."""
    try:
        files = read_complete(folder)["files"]
        for name, was in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != was["bytes"] or file_digest(path) != was["sha256"]:
                return f"{name} has changed since it was written"
    except FileNotFoundError:
        return f"it has no {COMPLETE}, so saving it was interrupted"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {COMPLETE} cannot be read"
    return None if SCHEDULER_NAME in files else WEIGHTS_ALONE


def read_complete(folder: Path) -> dict[str, Any]:
    """A checkpoint's `complete.json`: its `files`, the `identity` of its run, and `settings`.

    Raises ValueError, KeyError or TypeError where it cannot be read.
    """
    complete = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
    return {key: complete[key] for key in ("files", "identity", "settings")}


# --- resuming --------------------------------------------------------------------------------------------------------


def run_identity(recipe: Recipe, sets: Mapping[str, Dataset], arguments: TrainingArguments) -> dict[str, Any]:
    """What decides the course of a run, by address: a run of another identity cannot resume its checkpoints.

    The number of ranks, the cut of a step at the same global batch, the number of steps and all else of `training`
    may change.
    """
    identity = {at: as_dict(value) for at, value in leaves(recipe) if at.split(".")[0] in SAME}
    identity["memory.quantization"] = recipe.memory.quantization  # another base; how memory is saved may change
    for name, data in sets.items():
        task = recipe.tasks[name]
        if task.weight > 0:
            identity |= {f"tasks.{name}.{key}": getattr(task, key) for key in ("weight", "eval_rows")}
            identity[f"tasks.{name}.embeddings"] = data._fingerprint
    if arguments.fsdp:  # full and sharded checkpoints have different files
        identity["training.fsdp_config.state_dict_type"] = arguments.fsdp_plugin_args["state_dict_type"]
    return identity


def checkpoint_of(arguments: TrainingArguments, identity: Mapping[str, Any]) -> Path | None:
    """The last complete checkpoint in the output folder, by rank 0, so that all resume from the same one.

    Raises InputError where it belongs to another run than `identity`, has other states or more steps than the run, or
    is not on this machine.
    """
    found = [last_checkpoint(arguments.output_dir) if PartialState().is_main_process else None]
    (checkpoint,) = broadcast_object_list(found)
    if checkpoint is None:
        return None
    if not checkpoint.is_dir():
        raise InputError(
            f"{checkpoint}: not found on this machine; output_dir must be a folder that all machines share"
        )
    complete = read_complete(checkpoint)
    was = ADDED | complete["identity"] | _kinds(complete["settings"]["keys"])
    identity = _plain(identity) | _kinds(_keys(arguments))
    if differing := sorted(key for key in was.keys() | identity.keys() if was.get(key) != identity.get(key)):
        fields = ", ".join(differing[:NAMED]) + (f" and {len(differing) - NAMED} more" * (len(differing) > NAMED))
        said = "; ".join(f"{key} was {was.get(key)}, is {identity.get(key)}" for key in differing[:NAMED])
        raise InputError(
            f"{checkpoint.parent}: holds a run with another {fields}, which this one cannot resume ({said}); set "
            "training.output_dir to another folder, where trainable.lora.init_from may name the weights to start "
            "from, or undo the change"
        )
    if step_of(checkpoint) > arguments.max_steps:
        raise InputError(
            f"training.max_steps: {arguments.max_steps}, but {checkpoint} has more steps; raise it, or set "
            "training.output_dir to another folder"
        )
    return checkpoint


def _kinds(keys: Mapping[str, Any]) -> dict[str, str]:
    """Optimizer and schedule, whose states only their like can use."""
    optimizer, schedule = keys["optim"], keys["lr_scheduler_type"]
    schedule = schedule if schedule in BY_METRIC else "one that goes by the step"
    return {"training.optim": ALIKE.get(optimizer, optimizer), "training.lr_scheduler_type": schedule}


def changes(checkpoint: Path, arguments: TrainingArguments) -> list[dict[str, Any]]:
    """With which settings a run was resumed at which steps, this time included: {step, changed: {key: [was, is]}}."""
    before, now = read_complete(checkpoint)["settings"], _keys(arguments)
    was = before["keys"]
    changed = {key: [was[key], now[key]] for key in KEYS if was[key] != now[key]}
    if changed:
        said = ", ".join(f"training.{key} {old} -> {new}" for key, (old, new) in changed.items())
        logger.info("from %s on: %s", checkpoint, said)
    return before.get("changes", []) + ([{"step": step_of(checkpoint), "changed": changed}] if changed else [])


def settings_of(arguments: TrainingArguments, optimizer: Any, schedule: Any) -> dict[str, Any]:
    """The settings of an optimizer and its schedule before the first step, as JSON has them.

    Two such records differ in settings alone; what else their state holds was computed during training.
    """
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    for group in groups:
        group["lr"] = group.get("initial_lr", group["lr"])  # without the schedule's factor
    state = {key: value for key, value in schedule.state_dict().items() if key not in ("_last_lr", "lr_lambdas")}
    return {"keys": _keys(arguments), "groups": _plain(groups), "schedule": _plain(state)}


def apply_settings(was: Mapping[str, Any], now: Mapping[str, Any], optimizer: Any, schedule: Any) -> None:
    """Give an optimizer and a schedule with the state of a run of settings `was` the settings `now`."""
    if all(was.get(key) == value for key, value in now.items()):  # a checkpoint's has `changes` beside them
        return
    changed = set()
    for group, old, new in zip(optimizer.param_groups, was["groups"], now["groups"], strict=True):
        for key in (key for key in new if key != "lr" and old.get(key) != new[key]):
            _put(group, key, new[key])
            changed.add(key)
    if changed & {"fused", "capturable"}:
        optimizer.load_state_dict(optimizer.state_dict())  # moves the count of steps to the device they expect
    new = {key: value for key, value in now["schedule"].items() if was["schedule"].get(key) != value}
    schedule.load_state_dict(schedule.state_dict() | new)
    if isinstance(schedule, LambdaLR):
        schedule.base_lrs = [group["lr"] for group in now["groups"]]
        schedule.last_epoch -= 1
        schedule.step()  # to the step it was at, now with its new rate
        return
    for group, old, new in zip(optimizer.param_groups, was["groups"], now["groups"], strict=True):
        reduced = float(group["lr"]) / old["lr"] if old["lr"] else 1.0  # no closed form: reductions made are kept
        _put(group, "lr", reduced * new["lr"])
    schedule._last_lr = [float(group["lr"]) for group in optimizer.param_groups]


def _put(group: dict[str, Any], key: str, value: Any) -> None:
    if isinstance(group.get(key), Tensor):  # compiled optimizers read it where it is
        group[key].fill_(value)
    else:
        group[key] = tuple(value) if isinstance(group.get(key), tuple) else value


def _keys(arguments: TrainingArguments) -> dict[str, Any]:
    return _plain({key: getattr(value := getattr(arguments, key), "value", value) for key in KEYS})


def _plain(value: Any) -> Any:
    """As JSON has it."""
    return json.loads(json.dumps(value, default=lambda one: one.tolist() if torch.is_tensor(one) else str(one)))
