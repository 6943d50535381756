"""All that has to be known of a GPU, in one call of at most ten minutes: `make gpu`.

    python tests/gpu/run.py [--steps a,b] [--json outputs/gpu.json] [--minutes 10] [--list]
    python tests/gpu/run.py --page outputs/gpu.json [--into docs/performance.md]

For one GPU of 80 GB or more; with two or more the step `sharded` runs too. Each step is a process with its own time
limit, the most important first; a step that fails or hangs is a line of the table and ends no other. After each step
the table is printed and the JSON file written, so that whatever ends the call leaves what is there. --page fills the
section "On a GPU" of docs/performance.md from such a file.

What it does to a machine: it downloads nothing, as models have random values, made on the GPU. It writes the JSON file
and, in the folder of that name without `.json`, logs, caches of libraries and what a step works on, which is removed
with its end. Of the host's memory it takes some 30 GB, most of it pinned, for weights that are streamed. It changes no
setting of the device, and ends the processes that it has started, no others.

--small: on the CPU, in small shapes, within a minute: that the steps run, for a test.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
if not __package__:  # run as a script: in the place of this folder, whose names are too short to share
    sys.path[:1] = [str(ROOT / "tests"), str(ROOT)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault(
    "PYTORCH_NVML_BASED_CUDA_CHECK", "1"
)  # that there is a GPU is found out without CUDA: ranks fork

from gpu.page import fill  # noqa: E402
from gpu.processes import Worker  # noqa: E402
from gpu.results import FAILED, Result, as_json, table  # noqa: E402
from gpu.steps import STEPS, Step  # noqa: E402

LEAST_S = 10  # a step is not begun with less time left


def main(argv: Sequence[str]) -> int:
    """Run the steps, or fill the page; 1 where a step has failed."""
    given = parse(argv)
    if given.page:
        given.into.write_text(
            fill(given.into.read_text(encoding="utf-8"), json.loads(given.page.read_text(encoding="utf-8"))),
            encoding="utf-8",
        )
        return 0
    steps = [step for step in STEPS if given.steps is None or step.name in given.steps]
    if given.list:
        print("\n".join(f"{step.name:<16} {step.limit_s:4.0f} s  {step.what}" for step in steps))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # with all processes, which have sessions of their own
    machine = look_at_machine(given.small)
    if not machine:
        print("make gpu: torch finds no GPU on this machine", file=sys.stderr)
        return 1
    results = run_steps(steps, given, machine)
    return int(any(result.what == FAILED for result in results))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    names = [step.name for step in STEPS]

    def some(text: str) -> list[str]:
        found = [name for name in names if name in text.split(",")]
        if unknown := sorted({*text.split(",")} - {*found}):
            raise argparse.ArgumentTypeError(f"no step {unknown[0]!r}; there are {', '.join(names)}")
        return found

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=some, default=None)
    parser.add_argument("--json", type=Path, default=Path("outputs/gpu.json"))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--page", type=Path)
    parser.add_argument("--into", type=Path, default=ROOT / "docs" / "performance.md")
    parser.set_defaults(started=time.monotonic())
    return parser.parse_args(argv)


def look_at_machine(small: bool) -> dict[str, Any] | None:
    """Device, versions and commit; None where there is no GPU. In a process that ends, so that none holds a GPU."""
    code = "import json; from gpu.machine import describe; print(json.dumps(describe()))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT / "tests"), str(ROOT)))}
    if small:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    said = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, check=True)
    machine = json.loads(said.stdout.splitlines()[-1])
    return machine if small or machine["device"] != "cpu" else None


def run_steps(steps: Sequence[Step], given: argparse.Namespace, machine: dict[str, Any]) -> list[Result]:
    """One after the other, until the time is over."""
    if given.small:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for all processes
    folder, ends_at = given.json.resolve().with_suffix(""), given.started + 60 * given.minutes
    folder.mkdir(parents=True, exist_ok=True)
    steps = [step for step in steps if given.steps or step.least_gpus <= machine["count"]]
    results: list[Result] = []
    seconds: dict[str, float] = {}
    waiting = Worker(steps[0], folder, small=given.small) if steps else None
    try:
        for number, step in enumerate(steps):
            worker, waiting = waiting, None
            if number + 1 < len(steps):
                waiting = Worker(steps[number + 1], folder, small=given.small)
            worker.wait()
            limit_s = min(step.limit_s, ends_at - time.monotonic())
            if limit_s < LEAST_S:
                worker.stop()
                found = [Result(step=step.name, what=FAILED, value=f"not begun: {given.minutes:g} minutes are over")]
            else:
                found, seconds[step.name] = worker.run(results, limit_s)
            results += found
            write(given.json, machine, seconds, results)
            print(f"\n{step.name}: {step.what}\n{table(found)}", flush=True)
    finally:
        if waiting:
            waiting.stop()
    print(f"\n{machine}\n{table(results)}", flush=True)
    return results


def write(path: Path, machine: dict[str, Any], seconds: dict[str, float], results: Sequence[Result]) -> None:
    """All that is known so far; a reader never sees half of it."""
    report = {"machine": machine, "seconds": seconds, "results": [as_json(result) for result in results]}
    part = path.with_suffix(".part")
    part.write_text(json.dumps(report, indent=2), encoding="utf-8")
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
