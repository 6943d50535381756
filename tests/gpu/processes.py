"""A process for each step, so that none that fails or hangs ends the others; each is at hand before its turn.

The next step's process imports while the present one runs, and waits for its turn without touching the device.
"""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from gpu.results import FAILED, Result, as_json, read_lines
from gpu.steps import Step

STARTING_S = 90  # for imports, which the limit of a step does not count
ENDING_S = 5  # for the exit of a process that has done its step
LONGEST_TMPDIR = 70  # characters: the name of a socket in it may have 107
CACHES = ("HF_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH", "MPLCONFIGDIR", "TMPDIR")
PRELOADED = ["gpu.cases", "gpu.training", "gpu.encoding", "gpu.profiling", "gpu.tiny_flow", "gpu.sharding"]


def context_of(*, small: bool) -> Any:
    """How processes start: afresh, as CUDA asks for, and in a test from one that has imported all."""
    if not small:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class Worker:
    """The process of a step, which begins when it is told the results of the steps before."""

    def __init__(self, step: Step, folder: Path, *, small: bool):
        self.step, self.lines, self.log = step, folder / f"{step.name}.jsonl", folder / f"{step.name}.log"
        for path in (self.lines, self.log):
            path.unlink(missing_ok=True)
        context = context_of(small=small)
        self.begin, other = context.Pipe()
        self.process = context.Process(target=work, args=(step, folder, small, other))
        self.process.start()
        other.close()

    def wait(self) -> None:
        """Until it has imported all, or ended."""
        with suppress(EOFError, OSError):
            if self.begin.poll(STARTING_S):
                self.begin.recv()

    def run(self, earlier: Sequence[Result], limit_s: float) -> tuple[list[Result], float]:
        """The results, among them one that says why there are no more, and the seconds that all took."""
        with suppress(OSError):  # it has ended already; its exit code says more
            self.begin.send(list(earlier))
        started = time.monotonic()
        try:
            self.process.join(limit_s)
            late = self.process.is_alive()
        finally:  # also where this process is told to end
            self.stop()
        results, error = read_lines(self.lines), None
        if late:
            error = f"no end within {limit_s:.0f} s; {last_line(self.log)}"
        elif code := self.process.exitcode:
            error = f"exit code {code}; {last_line(self.log)}"
        if error:
            results.append(Result(step=self.step.name, what=FAILED, value=error))
        return results, time.monotonic() - started

    def stop(self) -> None:
        """Kill the process and all that it has started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # it has no group of its own yet, or is gone
            self.process.kill()
        self.process.join(ENDING_S)


def work(step: Step, folder: Path, small: bool, begin: Connection) -> None:
    """What the process does; it writes each result at once, so that a later failure takes none back."""
    os.setsid()
    with (folder / f"{step.name}.log").open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        own = folder / "work" / step.name
        prepare(folder, own)
        measure, context, arguments = imported(step, own, small)
        begin.send("ready")
        earlier = begin.recv()
        from hf_qie.runtime.device import own_device

        context = replace(context, device=own_device(), earlier=earlier)
        with (folder / f"{step.name}.jsonl").open("a", encoding="utf-8") as lines:
            for result in measure(context, step=step.name, **arguments):
                lines.write(json.dumps(as_json(result)) + "\n")
                lines.flush()
        shutil.rmtree(own, ignore_errors=True)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sys.stderr.flush()
    os._exit(0)  # what a library still has to say at its exit is no failure of the step


def prepare(folder: Path, own: Path) -> None:
    """An empty folder for the step, and caches of libraries beside it."""
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(parents=True)
    for name in CACHES:
        path = folder / "caches" / name.lower()
        path.mkdir(parents=True, exist_ok=True)
        if name != "TMPDIR" or len(str(path)) <= LONGEST_TMPDIR:
            os.environ[name] = str(path)


def imported(step: Step, own: Path, small: bool) -> tuple[Callable, Any, Mapping[str, Any]]:
    """What the step calls, and with what; the device is not asked for anything yet."""
    import logging

    import torch
    from gpu.cases import Case, Context

    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("hf_qie").setLevel(logging.INFO)
    case = {} if step.case is None else {"case": Case(**step.case)}
    context = Context(folder=own, device=torch.device("cpu"), small=small)
    return resolve_name(step.function), context, {**case, **step.settings}


def last_line(log: Path) -> str:
    """Of what a step has said."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    said = [line.strip() for line in lines if line.strip()]
    return f"{said[-1][:200]} ({log.name})" if said else f"nothing in {log.name}"
