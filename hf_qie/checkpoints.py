"""Checkpoints on disk: what says that one is whole, which is the last such, and whether a run may go on from it."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_qie.durable import flush, write_durably
from hf_qie.recipe import InputError

logger = get_logger(__name__)

COMPLETE = "complete.json"
WEIGHTS_ALONE = "it holds weights alone (save_only_model)"
WHOLE_BYTES = 1 << 30  # larger files are checked by samples: minutes of reading would tell little more
SAMPLES, SAMPLE_BYTES = 64, 1 << 20


def mark_complete(folder: Path, *, step: int, ranks: int, identity: Mapping[str, Any]) -> None:
    """Wait until every file of a checkpoint is on the disk, then say so in its `complete.json`."""
    files = {}
    for path in sorted(folder.rglob("*")):
        flush(path)
        if path.is_file():
            files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    complete = {"step": step, "ranks": ranks, "identity": identity, "files": files}
    write_durably(folder / COMPLETE, json.dumps(complete, indent=2))


def file_digest(path: Path) -> str:
    """sha256 of a file up to 1 GB; of a larger one that of 64 MB, evenly spread from its first byte to its last."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        for i in range(SAMPLES):
            file.seek((size - SAMPLE_BYTES) * i // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
        return digest.hexdigest()


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint that is whole; a warning names the newer ones that are not, and why."""
    for folder in sorted(Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-[0-9]*"), key=step_of, reverse=True):
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
        files = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"it has no {COMPLETE}, so it was not finished"
    except (ValueError, KeyError, TypeError):
        return f"its {COMPLETE} cannot be read"
    for name, was in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != was["bytes"] or file_digest(path) != was["sha256"]:
            return f"{name} is not what was written"
    if "scheduler.pt" not in files:
        return WEIGHTS_ALONE
    return None


def check_identity(checkpoint: Path, identity: Mapping[str, Any]) -> None:
    """Raise InputError where a checkpoint belongs to another run than `identity`, naming the fields that differ."""
    was = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))["identity"]
    identity = json.loads(json.dumps(identity))  # as JSON has it
    if differing := sorted(key for key in was.keys() | identity.keys() if was.get(key) != identity.get(key)):
        changes = "; ".join(f"{key} was {was.get(key)}, is {identity.get(key)}" for key in differing)
        raise InputError(
            f"{checkpoint.parent}: holds a run with another {', '.join(differing)}, which cannot go on as this one "
            f"({changes}); set training.output_dir to another folder, or undo the change"
        )
