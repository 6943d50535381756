"""Checkpoints on disk: which are complete, which is the last, and whether it belongs to this run."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_qie.errors import InputError
from hf_qie.runtime.files import flush, samples, write_durably

logger = get_logger(__name__)

COMPLETE = "complete.json"
WEIGHTS_ALONE = "it holds weights alone (save_only_model)"
WHOLE_BYTES = 1 << 30  # larger files are checked by samples: minutes of reading would tell little more
SAMPLES, SAMPLE_BYTES = 64, 1 << 20


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

    Raises ValueError, KeyError or TypeError where it is none.
    """
    complete = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
    return {"files": complete["files"], "identity": complete["identity"], "settings": complete.get("settings", {})}


def check_identity(checkpoint: Path, identity: Mapping[str, Any]) -> None:
    """Raise InputError where a checkpoint belongs to another run than `identity`, naming the fields that differ."""
    was = read_complete(checkpoint)["identity"]
    identity = json.loads(json.dumps(identity))  # as JSON has it
    if differing := sorted(key for key in was.keys() | identity.keys() if was.get(key) != identity.get(key)):
        changes = "; ".join(f"{key} was {was.get(key)}, is {identity.get(key)}" for key in differing)
        raise InputError(
            f"{checkpoint.parent}: holds a run with another {', '.join(differing)}, which this one cannot resume "
            f"({changes}); set training.output_dir to another folder, or undo the change"
        )
