"""README and docs: commands run, recipes and tables are those of the package, both languages say the same."""

import ast
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset, Features, Value
from test_layout import LAYERS, PACKAGE
from transformers import TrainingArguments

from hf_qie.config.evaluation import Evaluation, Sampling
from hf_qie.config.recipe import Extract, Lora, Loss, Mix, Task, Trainable, load_recipe
from hf_qie.data.mixture import group_shares, mix_table, read_groups
from hf_qie.data.schema import GRID, GRIDS
from hf_qie.demo.run import STAGES
from hf_qie.measures.edits import FOREIGN, JUDGED, SCORES

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
WEIGHTS = (ROOT / "docs" / "weights.md").read_text(encoding="utf-8")
TROUBLESHOOTING = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
IN_TWO_LANGUAGES = ["README.md", "docs/weights.md", "docs/migration.md", "docs/troubleshooting.md"]
PAGES = [*IN_TWO_LANGUAGES, "docs/performance.md", "recipes/README.md", "CONTRIBUTING.md"]
SHORTER = {
    "hf_qie/demo/tiny.py": ["--rows", "8"],
    "hf_qie/train.py": ["training.max_steps=10"],
    "hf_qie/score.py": ["evaluation.rows=2", "evaluation.num_inference_steps=2"],
    "hf_qie/sampling.py": ["--num_inference_steps", "2"],
}


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


def test_the_commands_of_the_page_run_one_after_the_other_and_so_do_its_python_examples(tmp_path):
    """In a folder that looks like a clone; each reads what those before it wrote."""
    for name in ("hf_qie", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    first, *others = blocks("bash")
    install, *commands = first.splitlines()
    assert install == "pip install -c constraints.txt -e ."
    for line in commands:
        command = shlex.split(line)
        script = next(part for part in command if part.startswith("hf_qie/"))
        run([*command, *SHORTER.get(script, [])], tmp_path)
    demo = tmp_path / "outputs" / "demo"
    assert {path.name for path in (demo / "embeddings").iterdir()} >= {"repaint", "negative"}
    for name in (
        "run/transformer/config.json",
        "run/loss.png",
        "run/evaluation/base.png",
        "red.png",
        "run/export/merged/README.md",
    ):
        assert (demo / name).is_file(), name
    for block in others:
        for line in block.splitlines():
            run(shlex.split(line), tmp_path)
    for code in blocks("python"):
        run([sys.executable, "-c", code], tmp_path)


def test_the_recipe_shown_is_the_recipe_shipped():
    assert (ROOT / "recipes" / "lora_one_gpu.yaml").read_text(encoding="utf-8") in blocks("yaml")


def test_every_room_is_linked_and_imports_only_from_those_above_it():
    rooms = re.findall(r"\]\(hf_qie/(\w+)/\)", README)
    assert sorted(rooms) == sorted({name.split(".")[0] for name in LAYERS if "." in name})
    for number, room in enumerate(rooms):
        for path in (PACKAGE / room).rglob("*.py"):
            used = set(re.findall(r"^ *from hf_qie\.(\w+)\.", path.read_text(encoding="utf-8"), flags=re.M))
            assert used <= set(rooms[: number + 1]), path


def tables(page: str) -> list[list[list[str]]]:
    """The tables of a page, as cells by line, without the header and the line of dashes."""
    found = re.findall(r"(?:^\|.*\n)+", page, flags=re.M)
    return [[[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:]] for table in found]


def rows_with(counts: dict[int, int]) -> Dataset:
    sources = [number for number, rows in counts.items() for _ in range(rows)]
    grids = [[[64, 64]] * number for number in sources]
    rows = {"num_sources": sources, "target_grid": [[32, 32]] * len(sources), "source_grids": grids}
    features = Features({"num_sources": Value("int8"), "target_grid": GRID, "source_grids": GRIDS})
    return Dataset.from_dict(rows, features=features)


def test_the_example_of_weights_is_what_the_mix_makes_of_it():
    (tasks,) = tables(WEIGHTS)
    numbers = {"without": 0, "one": 1, "two": 2, "three": 3}
    sets, weights = {}, {}
    for name, rows, weight in tasks:
        counts = re.findall(r"([\d,]+)[a-z ]* (without|with one|with two|with three)", rows)
        sets[name.strip("`")] = rows_with({numbers[w.split()[-1]]: int(n.replace(",", "")) for n, w in counts})
        weights[name.strip("`")] = float(weight)
    (rows_drawn,) = re.findall(r"([\d,]+) draws \(", WEIGHTS)
    shown = re.findall(r"^```\n(.*?)\n```$", WEIGHTS, flags=re.M | re.S)
    for mix, table in zip((Mix(), Mix(source_count_weights={0: 1, 1: 1, 2: 1, 3: 0})), shown, strict=True):
        groups = read_groups(sets, weights, mix)
        assert mix_table(groups, group_shares(groups, mix), rows_drawn=int(rows_drawn.replace(",", ""))) == table


def test_the_mix_of_the_demo_is_what_the_recipe_draws():
    recipe = load_recipe(ROOT / "recipes" / "demo.yaml")
    weights = {name: task.weight for name, task in recipe.tasks.items()}
    rows = int(re.search(r"--rows (\d+)", STAGES["data"])[1])
    groups = read_groups({task: rows_with({1: rows}) for task in recipe.tasks}, weights, recipe.mix)
    rows_drawn = recipe.training["max_steps"] * recipe.training["per_device_train_batch_size"]
    assert mix_table(groups, group_shares(groups, recipe.mix), rows_drawn=rows_drawn) in README


def test_the_scores_explained_are_those_that_there_are():
    explained = [[row[0].strip("`") for row in table] for table in tables(README)]
    for scores in (SCORES, JUDGED, FOREIGN):
        assert [*scores] in explained


def test_the_scores_of_the_demo_are_of_the_checkpoints_that_its_recipe_keeps():
    recipe = load_recipe(ROOT / "recipes" / "demo.yaml")
    shown = re.search(r"^```\n(checkpoint .*?)\n```$", README, flags=re.M | re.S)[1]
    lines = [re.split(r" {2,}", line) for line in shown.splitlines()]
    names = {name + (f" ({score.unit})" if score.unit else "") for name, score in SCORES.items()}
    assert set(lines[0]) <= {"checkpoint", "task", *names}
    every, most = recipe.training["save_steps"], recipe.training["max_steps"]
    checkpoints = ["base", *(f"checkpoint-{step}" for step in range(every, most + 1, every))]
    parts = ["all", *sorted(recipe.tasks)]
    assert [line[:2] for line in lines[1:]] == [[name, part] for name in checkpoints for part in parts]


def messages() -> str:
    """Every text of the package as it is shown, with … for what is put in."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_every_message_that_is_explained_is_one_of_ours():
    rows = [row for table in tables(TROUBLESHOOTING) for row in table]
    assert len(rows) >= 12
    known = messages()
    for message, cause, remedy in rows:
        assert message.strip("`") in known, message
        assert cause and remedy


@pytest.mark.parametrize(
    "message",
    [
        "was made for …, … is …; give another extract.output_dir",
        "the processor of … resizes a source of … x … pixels once more",
        "its embedding set was made for …, … is of …",
        "makes of prompt and sources depends on the noise",
    ],
)
def test_what_another_family_of_models_refuses_is_explained_in_both_languages(message):
    chinese = (ROOT / "docs" / "troubleshooting_zh.md").read_text(encoding="utf-8")
    assert message in TROUBLESHOOTING and message in chinese


KEYS = {
    "extract": Extract,
    "mix": Mix,
    "loss": Loss,
    "sampling": Sampling,
    "evaluation": Evaluation,
    "trainable": Trainable,
    "tasks.<name>": Task,
}


@pytest.mark.parametrize("name", [*IN_TWO_LANGUAGES, "recipes/README.md"])
def test_every_key_of_the_recipe_that_is_named_is_one(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    named = re.findall(
        r"`(extract|mix|loss|sampling|evaluation|trainable|training|tasks\.<name>)\.(?!py\b|png\b)(\w+)(?:\.(\w+))?",
        text,
    )
    assert named
    for section, key, inner in named:
        if section == "training":
            assert key in TrainingArguments.__dataclass_fields__, key
        else:
            assert key in KEYS[section].model_fields, (section, key)
        if key == "lora" and inner:
            assert inner in Lora.model_fields


SAME_IN_BOTH = {
    "blocks of code": r"^```.*?^```$",
    "depths of headings": r"^#+(?= )",
    "links": r"\]\([^)]+\)",
    "lines of tables": r"^\|(?=.)",
}


def both_languages(name: str) -> list[str]:
    path = ROOT / name
    return [file.read_text(encoding="utf-8") for file in (path, path.with_stem(f"{path.stem}_zh"))]


@pytest.mark.parametrize("name", IN_TWO_LANGUAGES)
@pytest.mark.parametrize("what", SAME_IN_BOTH)
def test_both_languages_have_the_same(what, name):
    english, chinese = (
        [part.replace("_zh.md", ".md") for part in re.findall(SAME_IN_BOTH[what], text, flags=re.M | re.S)]
        for text in both_languages(name)
    )
    assert english == chinese


@pytest.mark.parametrize("name", IN_TWO_LANGUAGES)
def test_both_languages_name_the_same_code_section_by_section(name):
    """In tables by line; in prose, where words stand in another order, by section."""
    code = re.compile(r"`([^`\n]+)`")
    sections = [
        re.split(r"^## ", re.sub(SAME_IN_BOTH["blocks of code"], "", text, flags=re.M | re.S), flags=re.M)
        for text in both_languages(name)
    ]
    for english, chinese in zip(*sections, strict=True):
        rows = [re.findall(r"^\|.*$", text, flags=re.M) for text in (english, chinese)]
        for one, other in zip(*rows, strict=True):
            assert sorted(code.findall(one)) == sorted(code.findall(other))
        assert set(code.findall(english)) == set(code.findall(chinese)), english.splitlines()[0]
        numbers = [Counter(re.findall(r"\d[\d,.]*\d|\d", "\n".join(lines))) for lines in rows]
        assert numbers[0] == numbers[1], "figures of tables"


@pytest.mark.parametrize("name", [*PAGES, *(name.replace(".md", "_zh.md") for name in IN_TWO_LANGUAGES)])
def test_links_lead_to_files_in_the_language_of_the_page_and_prose_fits_the_line_length(name):
    path = ROOT / name
    text = re.sub(SAME_IN_BOTH["blocks of code"], "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    links = re.findall(r"\[([^\]]*)\]\((?!https?:)([^)#]+)", text)
    for link in (link for label, link in links if label not in ("中文", "English")):
        assert (path.parent / link).exists(), link
        chinese = path.parent / link.replace(".md", "_zh.md")
        assert "_zh" not in name or chinese == path.parent / link or not chinese.exists(), f"{link} is in English"
        assert "_zh" in name or "_zh.md" not in link
    prose = [line for line in text.splitlines() if not line.startswith(("|", "!", "[", "- the scripts", "- 脚本"))]
    assert [line for line in prose if len(line) > 119] == []
