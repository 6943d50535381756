"""Locks on files: the operating system frees those of a process that was killed.

Where a file system has no locks, filelock takes the existence of the file for one, with a warning; such a file has to
be deleted by hand after its holder was killed on another machine.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from hf_qie.errors import InputError
from hf_qie.runtime.ranks import rank

WAIT_S = 1.0  # for a launch that is just ending


def take(path: Path, *, wait_s: float = 0) -> BaseFileLock | None:
    """The lock `path`, held from now on, with process and host in it; None where another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=wait_s)
    except Timeout:
        return None
    if type(lock) is FileLock:  # the existence of a file as a lock has the same in it
        path.write_text(f"{os.getpid()}\n{socket.gethostname()}\n", encoding="utf-8")
    return lock


@contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """Wait until no other process holds the lock `path`, and hold it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # while it is held: a process that waits checks that the file is still there


@contextmanager
def held(folder: Path, *, remedy: str) -> Iterator[None]:
    """Hold `folder` for this launch, by the lock `.lock` of rank 0.

    Raises InputError, on rank 0, where another launch holds it; `remedy` says what else could be done.
    """
    path = folder / ".lock"
    if rank() != 0:
        yield
        return
    if (lock := take(path, wait_s=WAIT_S)) is None:
        raise in_use(folder, path, remedy=remedy)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def in_use(folder: Path, path: Path, *, remedy: str) -> InputError:
    """The error for a `folder` whose lock `path` another process holds; that process has noted itself there."""
    try:
        process, host = path.read_text(encoding="utf-8").split()[:2]
        since = datetime.fromtimestamp(path.stat().st_mtime)
        holder = f"process {process} on {host} since {since:%Y-%m-%d %H:%M:%S}"
    except (OSError, ValueError):  # it is just ending
        holder = "another process"
    return InputError(f"{folder}: in use by {holder}, which holds {path}; wait until it has ended, or {remedy}")
