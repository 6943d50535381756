"""Files that a crash leaves complete or not at all, checks of what is read, and what a disk error means."""

import errno
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

from tqdm import tqdm

from hf_qie.errors import InputError

READERS = 8  # threads: a disk is asked for several files at a time, and hashing takes a core each
NAMED = 8  # files of an error message


def write_durably(path: Path, text: str, *, aside: Path | None = None) -> None:
    """Write a small file so that a crash leaves the old one or the new one.

    `aside`: the folder on the same disk where the temporary file lies; without it, that of the file.
    """
    temporary = (aside or path.parent) / f"{path.name}.{uuid4().hex}"  # several launches may write the same file
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
    move_durably(temporary, path)


def move_durably(source: Path, target: Path) -> None:
    """Rename a finished file and wait until file and name are on the disk."""
    flush(source)
    os.replace(source, target)
    flush(target.parent)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def written(path: Path) -> dict[str, Any]:
    """`bytes` and `sha256` of a file, by which it is checked later."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def samples(file: BinaryIO, *, count: int, num_bytes: int) -> Iterator[bytes]:
    """`count` parts of an open file, evenly spread: the first starts with the file, the last ends with it."""
    size = file.seek(0, os.SEEK_END)
    for i in range(count):
        file.seek(max(size - num_bytes, 0) * i // (count - 1))
        yield file.read(num_bytes)


def size_misfit(path: Path, was: Mapping[str, Any]) -> str | None:
    """Why a file does not have the size of the one of which `was` has `bytes`; None where it has."""
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    return None if size == was["bytes"] else f"has {size:,} bytes, but {was['bytes']:,} were written"


def misfit(path: Path, was: Mapping[str, Any]) -> str | None:
    """Why a file is not the one of which `was` has `bytes` and `sha256`; None where it is."""
    return size_misfit(path, was) or (None if written(path) == was else "is not what was written")


def check_sizes(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise InputError naming the files of `folder` that are missing or have not the size in `files`, by name."""
    _refuse(folder, {name: size_misfit(folder / name, was) for name, was in files.items()})


def check_digests(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """`check_sizes`, and reads every byte to compare it with the `sha256` in `files`."""
    with ThreadPoolExecutor(READERS) as readers:
        reasons = readers.map(lambda name: misfit(folder / name, files[name]), files)
        reasons = tqdm(reasons, f"checking {folder}", len(files), delay=2, disable=None)
        _refuse(folder, dict(zip(files, reasons, strict=True)))


def _refuse(folder: Path, reasons: Mapping[str, str | None]) -> None:
    if wrong := [f"{name} {why}" for name, why in reasons.items() if why]:
        more = f" and {len(wrong) - NAMED:,} more" if len(wrong) > NAMED else ""
        raise InputError(
            f"{folder}: {'; '.join(wrong[:NAMED])}{more}. Copy the set again, or delete {folder} and extract it again"
        )


# --- disk errors -----------------------------------------------------------------------------------------------------

_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
# libraries hand on the text of an error without its number
_TEXTS = re.compile(r"No space left on|Read-only file system|PytorchStreamWriter failed writing|unexpected pos \d+ vs")


def disk_trouble(error: BaseException | None) -> str | None:
    """What an error, or one of its causes, says of a disk, with a remedy; None where it is about something else."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno in _ERRORS) or _TEXTS.search(str(error)):
            fix = "the disk cannot be read or written; fix that (space, quota, permission) and start again"
            return f"{str(error).splitlines()[0]}; {fix}, what is finished is kept"
        error = error.__cause__ or error.__context__
    return None
