"""README: its commands run, its recipe is the file, its list of modules is the package."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_layout import LAYERS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORTER = {"hf_qie/tiny.py": ["--rows", "8"], "hf_qie/train.py": ["training.max_steps=10"]}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.M | re.S)


def run(command: list[str], folder: Path) -> str:
    # the environment that runs the tests is the one that a reader would have activated
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=os.environ | {"PATH": path}, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A folder that looks like a clone, in which the commands of the first screen have run."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("hf_qie", "recipes"):
        (folder / name).symlink_to(ROOT / name)
    install, *commands = blocks("bash")[0].splitlines()
    assert install == "pip install -c constraints.txt -e ."
    for line in commands:
        command = shlex.split(line)
        script = next(part for part in command if part.startswith("hf_qie/"))
        run([*command, *SHORTER.get(script, [])], folder)
    return folder


def test_the_commands_leave_what_the_readme_says(clone):
    demo = clone / "outputs" / "demo"
    assert (demo / "run" / "pytorch_lora_weights.safetensors").is_file()
    assert {path.name for path in (demo / "embeddings").iterdir()} >= {"edit", "combine", "text_to_image"}


def test_the_other_commands_run(clone):
    for block in blocks("bash")[1:]:
        for line in block.splitlines():
            run(shlex.split(line), clone)


def test_the_python_examples_run(clone):
    for code in blocks("python"):
        run([sys.executable, "-c", code], clone)


def test_the_recipe_shown_is_the_recipe_shipped():
    assert (ROOT / "recipes" / "lora_one_gpu.yaml").read_text(encoding="utf-8") in blocks("yaml")


def test_every_module_is_linked_in_its_order():
    assert re.findall(r"\]\(hf_qie/(\w+)\.py\)", README) == LAYERS
