"""One launch at a time in a folder: a lock of the operating system, and beside it a text that says whose it is.

The lock of a process that was killed is free at once, on its machine and on file systems that lock for all machines.
"""

import errno
import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from hf_qie.errors import InputError
from hf_qie.runtime.files import disk_trouble
from hf_qie.runtime.ranks import rank

WAIT_S = 1.0  # for a launch that is just ending
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # what file systems say that have none

logger = logging.getLogger(__name__)


@contextmanager
def held(folder: Path, *, remedy: str) -> Iterator[None]:
    """Hold `folder` for this launch: rank 0 locks `.lock` in it, which names its holder.

    Raises InputError, on rank 0, where another launch holds it; `remedy` says what else could be done.
    """
    if rank() != 0:
        yield
        return
    with _held(folder, folder / ".lock", remedy):
        yield


@contextmanager
def held_by_launch(locks: Mapping[Path, Path], *, remedy: str) -> Iterator[None]:
    """Hold `locks`, a file for each folder, for all ranks of this launch, which have joined; rank 0 does.

    Raises InputError, on every rank, where another launch holds one; `remedy` says what else could be done.
    """
    with ExitStack() as stack:
        why = None
        if os.environ.get("RANK", "0") == "0":
            try:
                for folder, path in locks.items():
                    stack.enter_context(_held(folder, path, remedy))
            except (InputError, OSError) as error:
                why = disk_trouble(error) or str(error)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate.utils import broadcast_object_list  # seconds, that a process alone need not wait

            (why,) = broadcast_object_list([why])
        if why:
            raise InputError(why)
        yield


def lock_of(folder: Path, part: str) -> Path:
    """The lock of a part of what is done in `folder`; beside it, as the folder may be deleted."""
    return folder.with_name(f".{folder.name}-{part}.lock")


@contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """Wait until no other launch opens or ends `folder`, and let none do so meanwhile; without locks none waits."""
    path = lock_of(folder, "opening")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held, as below
        lock.release()


def refuse_holder(folder: Path, path: Path, *, remedy: str) -> None:
    """Raise InputError where a launch holds the lock `path`."""
    lock = _acquire(folder, path, path.with_name(f"{path.name}.json"), remedy)
    path.unlink(missing_ok=True)
    lock.release()


@contextmanager
def _held(folder: Path, path: Path, remedy: str) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.with_name(f"{path.name}.json")
    lock = _acquire(folder, path, text, remedy)
    try:
        if text.exists() and f" on {socket.gethostname()} " not in (before := _holder(text)):
            logger.warning(
                "%s: was in use by %s, which was killed, or runs still and this file system locks for one machine "
                "alone; make sure that it has ended",
                folder,
                before,
            )
        me = {"process": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
        text.write_text(json.dumps(me), encoding="utf-8")
        yield
    finally:
        text.unlink(missing_ok=True)
        path.unlink(missing_ok=True)  # while it is held: who waits for it looks whether it is still there
        lock.release()


def _acquire(folder: Path, path: Path, text: Path, remedy: str) -> BaseFileLock:
    """The lock, held; where the file system has no locks, the existence of another file is one."""
    lock: BaseFileLock = FileLock(path, fallback_to_soft=False)
    try:
        try:
            lock.acquire(timeout=WAIT_S)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            lock = SoftFileLock(f"{path}.soft")
            lock.acquire(timeout=WAIT_S)
            logger.warning(
                "%s: the file system has no locks, so that the existence of this file is one", lock.lock_file
            )
    except Timeout:
        killed = f"; if it was killed, delete {lock.lock_file}" if isinstance(lock, SoftFileLock) else ""
        raise InputError(
            f"{folder}: in use by {_holder(text)}; wait until it has ended, or {remedy}{killed}"
        ) from None
    return lock


def _holder(text: Path) -> str:
    """Who holds a lock, by the text beside it."""
    try:
        holder = json.loads(text.read_text(encoding="utf-8"))
        return f"process {holder['process']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another launch"
