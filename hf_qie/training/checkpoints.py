"""Checkpoints on disk: what says that one is whole, which is the last such, and whether a run may go on from it."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from torch.optim import Optimizer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_qie.errors import InputError
from hf_qie.runtime.files import flush, samples, write_durably

logger = get_logger(__name__)

MOMENTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"}  # torch's names
NEVER_LOADED = "training_args.bin"  # Trainer's notes of its own arguments

COMPLETE = "complete.json"
WEIGHTS_ALONE = "it holds weights alone (save_only_model)"
WHOLE_BYTES = 1 << 30  # larger files are checked by samples: minutes of reading would tell little more
SAMPLES, SAMPLE_BYTES = 64, 1 << 20


def mark_complete(folder: Path, **known: Any) -> None:
    """Wait until every file of a checkpoint is on the disk, then say so in its `complete.json`.

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
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        for part in samples(file, count=SAMPLES, num_bytes=SAMPLE_BYTES):
            digest.update(part)
        return digest.hexdigest()


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint that is whole; a warning names the newer ones that are not, and why."""
    found = [path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name[11:].isdecimal()]
    for folder in sorted(found, key=step_of, reverse=True):
        if (reason := misfit(folder)) is None:
            return folder
        logger.warning("%s is passed over: %s", folder, reason)
    return None


def step_of(checkpoint: Path) -> int:
    """How many steps the run had done."""
    return int(checkpoint.name.rpartition("-")[2])


def misfit(folder: Path) -> str | None:
    """Why a checkpoint cannot be resumed from; None where it can."""
    try:
        files = read_complete(folder)["files"]
    except FileNotFoundError:
        return f"it has no {COMPLETE}, so it was not finished"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"its {COMPLETE} cannot be read"
    for name, was in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != was["bytes"] or file_digest(path) != was["sha256"]:
            return f"{name} is not what was written"
    if not is_state_of(folder / TRAINER_STATE_NAME, step=step_of(folder)):
        return f"its {TRAINER_STATE_NAME} is not that of step {step_of(folder)}"
    if "scheduler.pt" not in files:
        return WEIGHTS_ALONE
    return None


def read_complete(folder: Path) -> dict[str, Any]:
    """What says that a checkpoint is whole; raises what reading JSON does, and ValueError where it says nothing."""
    complete = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
    files, identity, settings = complete["files"], complete["identity"], complete.get("settings", {})
    inside = all(not Path(name).is_absolute() and ".." not in Path(name).parts for name in files)
    if not inside or not isinstance(identity, dict) or not isinstance(settings, dict):
        raise ValueError("files that lie elsewhere, or no identity")
    files = {name: {"bytes": was["bytes"], "sha256": was["sha256"]} for name, was in files.items()}
    return {"files": files, "identity": identity, "settings": settings}


def is_state_of(path: Path, *, step: int) -> bool:
    """Whether a file is what Trainer notes at `step`."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        known = {field.name for field in fields(TrainerState)}
        return state["global_step"] == step and isinstance(state["log_history"], list) and state.keys() <= known
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def check_identity(checkpoint: Path, identity: Mapping[str, Any]) -> None:
    """Raise InputError where a checkpoint belongs to another run than `identity`, naming the fields that differ."""
    was = read_complete(checkpoint)["identity"]
    identity = json.loads(json.dumps(identity))  # as JSON has it
    if differing := sorted(key for key in was.keys() | identity.keys() if was.get(key) != identity.get(key)):
        changes = "; ".join(f"{key} was {was.get(key)}, is {identity.get(key)}" for key in differing)
        raise InputError(
            f"{checkpoint.parent}: holds a run with another {', '.join(differing)}, which cannot go on as this one "
            f"({changes}); set training.output_dir to another folder, or undo the change"
        )


@contextmanager
def states_of(checkpoint: str | None) -> Iterator[None]:
    """Around the loading of a checkpoint's states: raise InputError where they are not what such a run saves."""
    try:
        yield
    except torch.OutOfMemoryError:  # which says of the checkpoint nothing
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(
            f"{checkpoint}: does not load ({type(error).__name__}: {error}); take another one, or delete it"
        ) from error


def check_shapes(optimizer: Optimizer) -> None:
    """Raise ValueError where a moment has not the shape of its parameter; torch's own optimizers would take any.

    Of others nothing is asked: some keep moments of fewer numbers.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper shows no states
    if not type(optimizer).__module__.startswith("torch.optim."):
        return
    for parameter, states in optimizer.state.items():
        for name in MOMENTS & states.keys():
            if states[name].shape != parameter.shape:
                got = list(states[name].shape)
                raise ValueError(f"{name} of shape {got} for a parameter of {list(parameter.shape)}")
