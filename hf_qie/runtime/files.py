"""Files that are written whole, and found to be whole.

A crash leaves no half of one, and a digest tells whether a file is still what was written: a bit that flips on a disk,
or a copy that ended early, would train as if it were data.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

from datasets import config
from tqdm import tqdm

from hf_qie.errors import InputError

CHECKED = Path(config.HF_CACHE_HOME, "hf_qie", "checked")
READERS = 8  # threads: a disk is asked for several files at a time, and hashing takes a core each
NAMED = 8  # files of an error message


def write_durably(path: Path, text: str, *, aside: Path | None = None) -> None:
    """Write a small file so that a crash leaves the old one or the new one, whole.

    `aside`: the folder on the same disk in which a crash may leave half of one; without it, that of the file.
    """
    beside = (aside or path.parent) / f"{path.name}.{uuid4().hex}"  # several launches may write the same file
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
    move_durably(beside, path)


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
    """What is written down of a file, to know it again by: `bytes` and `sha256`."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def samples(file: BinaryIO, *, count: int, num_bytes: int) -> Iterator[bytes]:
    """`count` parts of an open file, evenly spread: the first starts with the file, the last ends with it."""
    size = file.seek(0, os.SEEK_END)
    for i in range(count):
        file.seek(max(size - num_bytes, 0) * i // (count - 1))
        yield file.read(num_bytes)


def misfit(path: Path, was: Mapping[str, Any]) -> str | None:
    """Why a file is not the one of which `was` tells `bytes` and `sha256`; None where it is."""
    if not path.is_file():
        return "is missing"
    if (size := path.stat().st_size) != was["bytes"]:
        return f"has {size:,} bytes, but {was['bytes']:,} were written"
    return None if written(path) == was else "is not what was written"


def check_files(folder: Path, files: Mapping[str, Mapping[str, Any]], *, anew: bool = False) -> None:
    """Raise InputError naming the files of `folder` that are not what was written; `files` tells by name what was.

    What has been read since its last change is not read again, unless `anew`.
    """

    def reason(name: str) -> str | None:
        path, was = folder / name, files[name]
        if not anew and is_noted(path, was["sha256"]):
            return None
        if (why := misfit(path, was)) is None:
            note(path, was["sha256"])
        return why and f"{name} {why}"

    with ThreadPoolExecutor(READERS) as readers:
        checks = readers.map(reason, files)
        wrong = [why for why in tqdm(checks, f"checking {folder}", len(files), delay=2, disable=None) if why]
    if wrong:
        more = f" and {len(wrong) - NAMED:,} more" if len(wrong) > NAMED else ""
        raise InputError(
            f"{folder}: {'; '.join(wrong[:NAMED])}{more}. Copy the set again, or delete {folder} and extract it again"
        )


def note(path: Path, found: str) -> None:
    """Note what was found of a file that has been read, to hold until the file changes."""
    with suppress(OSError):  # who cannot note it reads the file again
        mark_of(path, found).parent.mkdir(parents=True, exist_ok=True)
        mark_of(path, found).touch()


def is_noted(path: Path, found: str) -> bool:
    """Whether this was found of a file, as it is now."""
    return path.is_file() and mark_of(path, found).exists()


def mark_of(path: Path, found: str) -> Path:
    """Where it is noted. Not beside the file, for a set may be another's to write."""
    seen = path.stat()  # the time of change, which nobody can set, as that of writing can be
    key = repr((str(path.resolve()), seen.st_size, seen.st_ctime_ns, found))
    return CHECKED / hashlib.sha256(key.encode()).hexdigest()
