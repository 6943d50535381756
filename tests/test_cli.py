"""The scripts' command lines: one style of options, checked where they are read; an error is one line."""

import ast
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from test_layout import PACKAGE
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from hf_qie import check, convert, export, sampling
from hf_qie.errors import InputError
from hf_qie.runtime.cli import LAUNCHED, RANK_0_FIRST_S, Options, checked
from hf_qie.runtime.rules import Count, Weight

SCRIPT = '''"""Count the tasks.

    count.py recipe.yaml
"""
import sys

from hf_qie.runtime.cli import run_script
from hf_qie.config.recipe import load_recipe


def main(argv):
    if argv[0] == "bug":
        raise ValueError("a bug")
    recipe = load_recipe(argv[0], argv[1:])
    heavy = {"torch", "transformers", "datasets", "numpy"} & set(sys.modules)
    print(len(recipe.tasks), sorted(heavy))
    return 3


if __name__ == "__main__":
    run_script(main)
'''


@pytest.fixture
def script(tmp_path):
    """Run a script in a process of its own, as a launcher does."""
    (tmp_path / "lora.yaml").write_text("tasks: {portraits: {data: pairs.jsonl}}\n")
    (tmp_path / "count.py").write_text(SCRIPT)

    def run(*argv: str, launch: Sequence[str] = (), **ranks: str) -> subprocess.CompletedProcess:
        environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", *LAUNCHED)}
        command = [sys.executable, *launch, "count.py", *argv]
        return subprocess.run(
            command, cwd=tmp_path, env=environment | ranks, capture_output=True, text=True, check=False
        )

    return run


def test_reading_a_recipe_imports_nothing_heavy_and_main_gives_the_exit_status(script):
    done = script("lora.yaml")
    assert (done.stdout, done.stderr, done.returncode) == ("1 []\n", "", 3)


def test_a_bad_recipe_is_refused_without_a_traceback(script):
    done = script("lora.yaml", "seed=x")
    told = "lora.yaml: override 'seed=x': seed: got \"x\", expected an integer from 0 to 4294967295\n"
    assert (done.stdout, done.stderr, done.returncode) == ("", told, 1)


@pytest.mark.parametrize(
    ("ranks", "speaker"),
    [({"RANK": "0"}, ""), ({"RANK": "4", "LOCAL_RANK": "0"}, ""), ({"RANK": "5", "LOCAL_RANK": "1"}, "rank 5: ")],
)
def test_the_first_process_of_a_machine_speaks_before_the_others(script, ranks, speaker):
    start = time.perf_counter()
    done = script("lora.yaml", "seed=x", **ranks)
    assert done.stderr.startswith(f"{speaker}lora.yaml: override ")
    # a launcher ends all of them when the first one ends
    assert not speaker or time.perf_counter() - start > RANK_0_FIRST_S


def test_any_other_error_keeps_its_traceback(script):
    done = script("bug")
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("ValueError: a bug\n")
    assert done.returncode == 1


def test_help_is_the_docstring_of_the_script(script):
    done = script("--help")
    assert done.stdout.startswith("Count the tasks.\n")
    assert done.returncode == 0


def test_no_arguments_are_answered_with_the_docstring_as_an_error(script):
    done = script()
    assert (done.stdout, done.returncode) == ("", 2)
    assert done.stderr.startswith("Count the tasks.\n")


@pytest.mark.parametrize("launcher", LAUNCHED)
def test_under_a_launcher_the_last_line_says_where_the_error_stands(script, launcher):
    first, last = script("lora.yaml", "seed=x", **{launcher: "no"}).stderr.splitlines()
    assert first.startswith("lora.yaml: override 'seed=x': seed: ")
    assert last == "See the error above; a traceback below is the launcher's."


def test_of_several_ranks_the_launcher_repeats_the_message_at_its_end(script, tmp_path):
    script("lora.yaml", "seed=x", RANK="0", TORCHELASTIC_ERROR_FILE=str(tmp_path / "error.json"))
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(tmp_path / "error.json"))
    assert failure.message.startswith("lora.yaml: override 'seed=x': seed: ")


def test_of_one_process_the_launcher_adds_nothing_when_it_is_told_to_be_quiet(script):
    launch = ["-m", "accelerate.commands.launch", "-q", "--num_processes", "1"]
    done = script("lora.yaml", "seed=x", launch=launch)
    assert done.returncode == 1
    assert done.stderr.endswith("a traceback below is the launcher's.\n")
    assert "Traceback" not in done.stderr


# --- options ---------------------------------------------------------------------------------------------------------


def options_of(path: Path) -> list[list[str]]:
    """The names of every option that a file adds, its own first."""
    calls = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
    calls = (call for call in calls if ast.unparse(call.func).endswith(".add_argument"))
    names = ([ast.literal_eval(word) for word in call.args] for call in calls if not ast.unparse(call).count("*"))
    return [given for given in names if given[0].startswith("-")]


SCRIPTS = [path for path in sorted(PACKAGE.rglob("*.py")) if options_of(path)]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_options_are_snake_case_and_the_help_names_each(path):
    text = path.read_text(encoding="utf-8")
    assert "Options()" in text and "ArgumentParser" not in text
    told = ast.get_docstring(ast.parse(text))
    for name, *_ in options_of(path):
        assert re.fullmatch(r"--[a-z][a-z0-9]*(_[a-z0-9]+)*", name)
        assert re.search(rf"{name}\b", told), name


def test_there_are_scripts_with_options():
    assert {path.stem for path in SCRIPTS} >= {"check", "convert", "export", "sampling", "tiny"}


@pytest.mark.parametrize("name", ["--num_inference_steps", "--steps"])
def test_an_option_goes_by_its_older_names(name):
    parser = Options()
    parser.add_argument("--num_inference_steps", "--steps", type=checked(Count))
    assert parser.parse_args([name, "3"]).num_inference_steps == 3


SAMPLE = ["r.yaml", "--instruction", "x", "--output", "o.png"]


@pytest.mark.parametrize(
    ("main", "argv", "told"),
    [
        (sampling.main, [*SAMPLE, "--steps", "0"], "--num_inference_steps: got 0, expected an integer of at least 2"),
        (sampling.main, [*SAMPLE, "--steps", "1"], "--num_inference_steps: got 1, expected an integer of at least 2"),
        (sampling.main, [*SAMPLE, "--steps", "-1"], "--num_inference_steps: got -1, expected an integer"),
        (sampling.main, [*SAMPLE, "--steps", "2.5"], "--num_inference_steps: got 2.5, expected an integer"),
        (sampling.main, [*SAMPLE, "--cfg", ".nan"], "--true_cfg_scale: got NaN, expected a number of at least 0"),
        (sampling.main, [*SAMPLE, "--cfg=nan"], '--true_cfg_scale: got "nan", expected a number of at least 0'),
        (sampling.main, [*SAMPLE, "--cfg", ".inf"], "--true_cfg_scale: got Infinity, expected a number of at least 0"),
        (sampling.main, [*SAMPLE, "--seed=-1"], "--seed: got -1, expected an integer from 0 to 4294967295"),
        (sampling.main, [*SAMPLE, "--stepz=2"], "--stepz: unknown option, did you mean '--steps'?"),
        (sampling.main, SAMPLE[:1], "--instruction, --output: missing; --help shows the command line"),
        (check.main, ["r.yaml", "--verify", "0"], "--verify: got 0, expected an integer of at least 1"),
        (check.main, ["--verify", "1"], "recipe: missing; --help shows the command line"),
        (export.main, ["run", "--to", "lor"], "--to: invalid choice: 'lor' (choose from "),
        (convert.main, ["r.yaml", "--empty-text", "x"], "--empty-text: unknown option, did you mean '--empty_text'?"),
    ],
)  # fmt: skip
def test_what_no_option_can_be_is_one_line_before_anything_else(main, argv, told):
    with pytest.raises(InputError) as error:
        main(argv)
    assert str(error.value).startswith(told)


@pytest.mark.parametrize("text", ["nan", "NaN", ".nan", "inf", "-1", "x", "true", "", "1" + "0" * 400])
def test_a_number_is_finite_and_not_below_its_least(text):
    parser = Options()
    parser.add_argument("--true_cfg_scale", type=checked(Weight))
    with pytest.raises(InputError, match=r"^--true_cfg_scale: got .*, expected a number of at least 0$"):
        parser.parse_args([f"--true_cfg_scale={text}"])


def test_an_option_is_written_out():
    options = Options()
    options.add_argument("--push_to_hub")
    with pytest.raises(InputError, match="--push: unknown option, did you mean '--push_to_hub'"):
        options.parse_args(["--push", "org/x"])
    assert options.parse_args(["--push_to_hub", "org/x"]).push_to_hub == "org/x"
