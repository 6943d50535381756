"""What a disk says when it does not take what is written, in words that name a remedy."""

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

KEPT = "then start again: what is finished is kept"
FULL = f"no space is left on the disk; free some, {KEPT}"
READ_ONLY = "the disk is read-only; write elsewhere, or have it mounted for writing"
TROUBLES = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: f"the quota of the disk is used up; free some, {KEPT}",
    errno.EROFS: READ_ONLY,
    errno.EACCES: "permission denied; take what you may read and write, or have the permission changed",
    errno.EPERM: "not permitted; take what you may read and write, or have the permission changed",
    errno.EIO: f"the disk fails; see to it, {KEPT}",
}
# of libraries that write by themselves and hand on no number
WORDS = {
    re.compile(r"No space left on device|PytorchStreamWriter failed writing|unexpected pos \d+ vs"): FULL,
    re.compile(r"Read-only file system"): READ_ONLY,
}


def disk_trouble(error: BaseException) -> str | None:
    """What an error, or one behind it, says of a disk; None where it is about something else."""
    for one in behind(error):
        text = str(one)
        if isinstance(one, OSError) and one.errno in TROUBLES:
            return f"{one.filename or text}: {TROUBLES[one.errno]}"
        for pattern, words in WORDS.items():
            if pattern.search(text):
                return f"{words} ({text.splitlines()[0]})"
    return None


def behind(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def prove_writable(folder: Path) -> None:
    """Make `folder`, and a file in it for a moment; raises OSError where that cannot be done."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".writable-{os.getpid()}"
    probe.write_text("written")
    probe.unlink()
