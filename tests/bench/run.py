"""Measure what docs/performance.md claims, on this machine: one table, and outputs/bench.json.

    python tests/bench/run.py [subject ...]

Ours and the usual way get the same inputs in the same run; read ratios, not times, on a machine that does other work.
"""

import json
import logging
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
SUBJECTS = (
    "starting",
    "storage",
    "reading",
    "keeping_busy",
    "memory",
    "planning",
    "training",
    "resuming",
    "arithmetic",
)  # one file each

from figures import Figure, table  # noqa: E402


def measured(subject: str) -> list[Figure]:
    """The figures of one subject; what it writes is removed."""
    import torch

    sys.stdout = sys.stderr  # the table alone goes to the other
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="hf_qie-bench-") as folder:
        return import_module(subject).measure(Path(folder))


def main(subjects: list[str]) -> None:
    """All subjects, or those named, each in a process of its own."""
    figures = []
    for subject in subjects or SUBJECTS:
        started = time.perf_counter()
        sys.stderr.write(f"{subject} ... ")
        sys.stderr.flush()
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            figures += process.submit(measured, subject).result()
        sys.stderr.write(f"{time.perf_counter() - started:.0f} s\n")
    figures.sort(key=lambda figure: int(figure.point))
    path = Path("outputs/bench.json")
    path.parent.mkdir(exist_ok=True)
    where = {"cores": os.cpu_count(), "when": time.strftime("%Y-%m-%d")}
    results = [asdict(figure) | {"ratio": figure.ratio} for figure in figures]
    path.write_text(json.dumps(where | {"figures": results}, indent=2))
    print(table(figures))


if __name__ == "__main__":
    main(sys.argv[1:])
