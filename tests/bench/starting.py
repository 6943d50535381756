"""Point 9: how long `--help` takes, and the error on a recipe that is wrong.

The usual way is a script that imports what it trains with at its top, as most do, and then reads its arguments.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from figures import Figure, at_most

SCRIPT = Path(__file__).resolve().parents[2] / "hf_qie" / "train.py"
USUAL = """
import argparse
import torch, transformers, accelerate, diffusers
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from transformers import Qwen2_5_VLForConditionalGeneration
parser = argparse.ArgumentParser()
parser.add_argument("--learning_rate", type=float)
parser.parse_args()
"""
# the recipe's reader, with what pydantic and yaml bring (cython also under the name of its version), and progress bars
ALLOWED = {"hf_qie", "yaml", "_yaml", "cython_runtime", "tqdm"}
ALLOWED |= {"pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"}
LOADED = """
import json, runpy, sys
script, sys.argv = sys.argv[1], sys.argv[1:]
before = set(sys.modules)  # what the interpreter's own start-up has brought
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit:
    pass
new = {name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(json.dumps(sorted(new - {"__main__"})), file=sys.stderr)
"""


def seconds(command: list[str]) -> float:
    """Of a process, start to end; the median of three, after one that fills the caches."""
    taken = []
    for _ in range(4):
        started = time.perf_counter()
        subprocess.run([sys.executable, *command], capture_output=True, check=False)
        taken.append(time.perf_counter() - started)
    return median(taken[1:])


def imported(arguments: list[str]) -> list[str]:
    """Packages, the standard library aside, that the script has imported when it ends."""
    command = [sys.executable, "-c", LOADED, str(SCRIPT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return json.loads(done.stderr.splitlines()[-1])


def unwanted(found: list[str]) -> list[str]:
    """Those that neither the recipe nor its reader needs."""
    return [name for name in found if name not in ALLOWED and not name.startswith(("_cython_", "_sysconfigdata"))]


def measure(folder: Path) -> list[Figure]:
    """`--help` and a recipe with a wrong key."""
    bad = folder / "bad.yaml"
    bad.write_text("model: m\ntasks: {edit: {data: rows.jsonl}}\nlearning_rat: 1\n")
    usual, figures = seconds(["-c", USUAL, "--help"]), []
    for what, arguments in (("--help", ["--help"]), ("the error on a bad recipe", [str(bad)])):
        took, found = seconds([str(SCRIPT), *arguments]), imported(arguments)
        name = f"train.py: {what}; imports {', '.join(found)}"
        figure = at_most(2, ratio=False, point="9", what=name, ours=took, usual=usual, unit="s")
        figures.append(Figure(**{**vars(figure), "met": figure.met and not unwanted(found)}))
    return figures
