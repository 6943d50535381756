"""Signs of life between the ranks of a launch: one that died, or hangs, ends the others with the reason.

Ranks wait for each other in collectives, in RUN 1 for as long as it takes, and a rank that is no more answers none. So
each writes down every two seconds, in a folder that all machines share, what it is at. The first rank reads what all
wrote, the others what the first one wrote: hundreds of ranks cost a file system no more than two files each.
"""

import faulthandler
import json
import math
import os
import re
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Lock, Thread
from types import TracebackType
from typing import Any

from hf_qie.errors import InputError

BETWEEN = "its start or its end"  # or between two steps, which may take any time
BEAT_S = 2.0
SILENT_BEATS = 15  # without a new sign a rank is taken for dead,
SAVING_BEATS = 300  # at what may take any time: a disk that is written to as fast as it can holds up the signs too
STUCK_S = 45.0  # at one place for so long,
STUCK_TIMES = 8  # and so many times as long as at any of the latest ones, it is taken to hang,
STEADY = 8  # once so many are behind it: compilers and caches make the first ones slow
LATEST = 32
NAMED = 8  # ranks of a message
LOST = re.compile("gloo|nccl|connection (closed|reset)", re.IGNORECASE)  # what a collective says when a rank is gone


class Alive:
    """This rank's signs of life, and a thread that ends the process when another rank gives none.

    Enter it where ranks start to depend on each other. One process alone has nobody to tell, and does nothing.
    """

    current: "Alive | None" = None

    def __init__(self, folder: Path, *, stuck_s: float = STUCK_S):
        """`folder` is this launch's own; a rank may be at one place for `stuck_s` at least."""
        self.folder, self.stuck_s = folder, stuck_s
        self.rank, self.num_ranks = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE"))
        self.place, self.since = BETWEEN, time.monotonic()
        self.latest: deque[float] = deque(maxlen=LATEST)  # seconds at the places before
        self.writing = Lock()
        self.excused, self.lock = 0, Lock()  # how many threads are at what may take any time
        self.beats, self.left = 0, Event()
        self.seen: dict[int, tuple[Any, int]] = {}  # by rank: its latest sign, and the beats without a new one

    def __enter__(self) -> "Alive":
        """Give the first sign."""
        if self.num_ranks > 1:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.seen = {rank: (self.read(rank), -1) for rank in self.others}  # what a launch before has left
            self.write()
            Alive.current = self
            self.thread = Thread(target=self.watch, name="alive", daemon=True)
            self.thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Say good-bye, or why this rank ends."""
        if self.num_ranks > 1:
            if error is not None and LOST.search(str(error)):
                time.sleep((SILENT_BEATS + 2) * BEAT_S)  # the thread finds out whom this rank lost, and ends it
            Alive.current = None
            self.left.set()
            self.thread.join()
            with suppress(OSError):
                if error is None:
                    self.path(self.rank).unlink()
                    self.folder.rmdir()  # the last one
                else:
                    self.write(ended=f"{kind.__name__}: {error}" if not isinstance(error, InputError) else str(error))

    @property
    def others(self) -> range:
        """The ranks whose signs this one reads."""
        return range(1, self.num_ranks) if self.rank == 0 else range(1)

    def path(self, rank: int) -> Path:
        """The file of a rank's signs."""
        return self.folder / f"{rank}.json"

    def write(self, *, ended: str | None = None) -> None:
        """Give a sign."""
        with self.writing:  # the thread gives signs too
            self.beats += 1
            sign = self.sign() | {"beat": self.beats, "ended": ended}
            beside = self.path(self.rank).with_suffix(".new")
            beside.write_text(json.dumps(sign), encoding="utf-8")
            os.replace(beside, self.path(self.rank))

    def sign(self) -> dict[str, Any]:
        """What this rank is at, for how many seconds, and after how many it would be taken to hang, if at all."""
        latest = tuple(self.latest)  # other threads add to it
        excused = self.excused > 0
        judged = len(latest) >= STEADY and not excused and self.place != BETWEEN
        patience_s = max(self.stuck_s, STUCK_TIMES * max(latest)) if judged else None
        where = {"place": self.place, "process": os.getpid(), "host": socket.gethostname(), "excused": excused}
        return where | {"for_s": time.monotonic() - self.since, "patience_s": patience_s}

    def read(self, rank: int) -> dict[str, Any] | None:
        """A rank's latest sign; None where there is none."""
        try:
            return json.loads(self.path(rank).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def watch(self) -> None:
        """Give signs until the rank leaves, and end the process when another one ended or hangs. Runs in a thread."""
        while not self.left.wait(BEAT_S):
            with suppress(OSError):  # one that is not written is one that the others miss
                self.write()
            if reason := self.trouble():
                self.end(reason)

    def trouble(self) -> str | None:
        """Why this rank has to end; None while all is well."""
        for rank in self.others:
            (before, silent), sign = self.seen[rank], self.read(rank)
            if sign is None:
                self.seen[rank] = None, -1  # it has not begun, or has left
            elif sign != before:
                self.seen[rank] = sign, 0
            elif silent >= 0:  # else it is of a launch before
                self.seen[rank] = sign, silent + 1
            if reason := self.judge(rank):
                return reason
        return self.standstill() if self.rank == 0 else None

    def judge(self, rank: int) -> str | None:
        """Why another rank is no more."""
        sign, silent = self.seen[rank]
        if silent < 0:
            return None
        name = name_of(rank, sign)
        if sign["ended"]:
            return sign["ended"] if rank == 0 and sign["ended"].startswith("rank ") else f"{name}: {sign['ended']}"
        if silent >= (SAVING_BEATS if sign["excused"] else SILENT_BEATS):
            return f"{name} has given no sign of life for {silent * BEAT_S:.0f} s; the last was from {sign['place']}"
        return None

    def standstill(self) -> str | None:
        """Which ranks are at one place for too long; of those that wait for each other nobody can tell who began."""
        signs = {rank: sign for rank, (sign, silent) in self.seen.items() if silent >= 0} | {0: self.sign()}
        if not any(overdue_s(sign) > 0 for sign in signs.values()):
            return None
        late = [rank for rank in sorted(signs, key=lambda rank: -overdue_s(signs[rank])) if is_late(signs[rank])]
        places = [
            f"{name_of(rank, signs[rank])} has been at {signs[rank]['place']} for {signs[rank]['for_s']:.0f} s"
            for rank in late[:NAMED]
        ]
        return f"{'; '.join(places)}: {len(late)} of {self.num_ranks} ranks hang, or wait for one that does"

    def end(self, reason: str) -> None:
        """End the process, which may be inside a collective that nothing else ends."""
        with suppress(OSError):
            self.write(ended=reason)
        sys.stderr.write(f"rank {self.rank} ends at {self.place}, as {reason}. Start again to go on from there\n")
        if is_late(self.sign()):
            faulthandler.dump_traceback(sys.stderr)  # where each of its threads is
        sys.stderr.flush()
        os._exit(1)


def name_of(rank: int, sign: Mapping[str, Any]) -> str:
    """A rank in words that help to find it."""
    return f"rank {rank} (process {sign['process']} on {sign['host']})"


def overdue_s(sign: Mapping[str, Any]) -> float:
    """For how long a rank is at one place beyond what it may be."""
    return sign["for_s"] - (math.inf if sign["patience_s"] is None else sign["patience_s"])


def is_late(sign: Mapping[str, Any]) -> bool:
    """Whether a rank is overdue, or about to be: signs are not all of the same moment."""
    return overdue_s(sign) > -2 * BEAT_S


def at(place: str) -> None:
    """Note what this rank is at now, which will not take many times as long as what it was at before."""
    if alive := Alive.current:
        now = time.monotonic()
        if not alive.excused and alive.place != BETWEEN:
            alive.latest.append(now - alive.since)
        alive.place, alive.since = place, now


@contextmanager
def at_any_length(place: str, *, tell: bool = False) -> Iterator[None]:
    """Around what may take any time: waiting for other ranks, or for what has a limit of its own.

    `tell`: give a sign of it at once, as the disk may be too busy for the next one.
    """
    if (alive := Alive.current) is None:
        yield
        return
    with alive.lock:
        alive.excused += 1
    alive.place = place
    if tell:
        with suppress(OSError):
            alive.write()
    try:
        yield
    finally:
        with alive.lock:
            alive.excused -= 1
        alive.since = time.monotonic()
