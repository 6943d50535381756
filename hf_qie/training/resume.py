"""What a resumed run shares with the run it resumes, and what may change: settings of the optimizer and its schedule.

The checkpoint's state holds settings too, those of the run before; the recipe's take their place.
"""

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

from hf_qie.config.recipe import Recipe, as_dict, leaves
from hf_qie.errors import InputError
from hf_qie.training.checkpoints import check_identity, last_checkpoint, read_complete, step_of

logger = get_logger(__name__)

# Sections of the recipe that must not change, beside the sets and the size of a step.
SAME = ("model", "revision", "seed", "mix", "loss", "trainable")
# Of TrainingArguments, what decides the learning rate and how the optimizer works.
KEYS = ("optim", "optim_args", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
KEYS += ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps")
# Optimizers that can use each other's state, by the name of one; schedules that only can use their own.
ALIKE = {"adamw_torch_fused": "adamw_torch", "adamw_bnb_8bit": "adamw_8bit"}
BY_METRIC = ("reduce_lr_on_plateau", "greedy")


def run_identity(
    recipe: Recipe,
    sets: Mapping[str, Dataset],
    arguments: TrainingArguments,
    *,
    same_shape: int,
    global_batch_size: int,
) -> dict[str, Any]:
    """What decides the course of a run, by address: a run of another identity cannot resume its checkpoints.

    The number of ranks, the cut of a step at the same global batch, the number of steps and all else of `training`
    may change.
    """
    identity = {at: as_dict(value) for at, value in leaves(recipe) if at.split(".")[0] in SAME}
    for name, data in sets.items():
        task = recipe.tasks[name]
        if task.weight > 0:
            identity |= {f"tasks.{name}.{key}": getattr(task, key) for key in ("weight", "eval_rows")}
            identity[f"tasks.{name}.embeddings"] = data._fingerprint
    if arguments.fsdp:  # full and sharded checkpoints have different files
        identity["training.fsdp_config.state_dict_type"] = arguments.fsdp_plugin_args["state_dict_type"]
    return identity | {"mix.same_shape": same_shape, "global batch": global_batch_size}


def checkpoint_of(arguments: TrainingArguments, identity: Mapping[str, Any]) -> Path | None:
    """The last complete checkpoint in the output folder, by rank 0, so that all resume from the same one.

    Raises InputError where it belongs to another run than `identity`, or is not on this machine.
    """
    found = [last_checkpoint(arguments.output_dir) if PartialState().is_main_process else None]
    (checkpoint,) = broadcast_object_list(found)
    if checkpoint is not None:
        if not checkpoint.is_dir():
            raise InputError(
                f"{checkpoint}: not found on this machine; output_dir must be a folder that all machines share"
            )
        check_identity(checkpoint, identity)
    return checkpoint


def changes(checkpoint: Path, arguments: TrainingArguments) -> list[dict[str, Any]]:
    """With which settings a run was resumed at which steps, this time included: {step, changed: {key: [was, is]}}.

    Raises InputError where what `arguments` ask for cannot use the checkpoint's state.
    """
    before, now = read_complete(checkpoint)["settings"], _keys(arguments)
    was = before.get("keys", now)
    changed = {key: [was[key], now[key]] for key in KEYS if was[key] != now[key]}
    optimizers = {ALIKE.get(name, name) for name in changed.get("optim", ())}
    schedules = set(changed.get("lr_scheduler_type", ()))
    for key, apart in (("optim", len(optimizers) > 1), ("lr_scheduler_type", not schedules.isdisjoint(BY_METRIC))):
        if apart:
            raise InputError(
                f"training.{key}: {now[key]}, but {checkpoint} was trained with {was[key]}, whose state it cannot "
                "use; set it back, or give another training.output_dir"
            )
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
    before = was.get("groups") or [{}] * len(now["groups"])
    changed = set()
    for group, old, new in zip(optimizer.param_groups, before, now["groups"], strict=True):
        for key in (key for key in new if key != "lr" and old.get(key) != new[key]):
            _put(group, key, new[key])
            changed.add(key)
    if changed & {"fused", "capturable"}:
        optimizer.load_state_dict(optimizer.state_dict())  # moves the count of steps to the device they expect
    if "schedule" in was:
        old = was["schedule"]
        new = {key: value for key, value in now["schedule"].items() if old.get(key) != value}
        schedule.load_state_dict(schedule.state_dict() | new)
    rates = [group["lr"] for group in now["groups"]]
    if isinstance(schedule, LambdaLR):
        schedule.base_lrs = rates
        rates = [rate * factor(schedule.last_epoch) for rate, factor in zip(rates, schedule.lr_lambdas, strict=True)]
    else:  # no closed form: the reductions made so far are kept
        groups = zip(optimizer.param_groups, before, rates, strict=True)
        rates = [float(one["lr"]) * rate / old["lr"] if old.get("lr") else rate for one, old, rate in groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        _put(group, "lr", rate)
    schedule._last_lr = rates


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
