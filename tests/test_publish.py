"""Embedding sets to the Hub and back, over HTTP with a Hub on loopback."""

import json
import logging
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from accelerate import PartialState
from datasets import load_from_disk
from hub import TOKEN, Hub, folders_of_this_machine
from push_rate import measure
from safetensors.torch import load_file

from hf_qie.config.recipe import load_recipe
from hf_qie.errors import InputError
from hf_qie.extraction.run import TOO_MANY_BAD
from hf_qie.hub.dataset_card import BEGIN, END
from hf_qie.hub.publish import push_unless_bad
from hf_qie.hub.redact import public, public_path

TASKS = ("edit", "combine", "text_to_image")
# `load_dataset` in a process of its own: each config is left in a folder as it comes
LOAD = """
import sys
from datasets import load_dataset
for name in sys.argv[3:]:
    load_dataset(sys.argv[1], name, split="train").save_to_disk(f"{sys.argv[2]}/{name}")
assert "hf_qie" not in sys.modules
"""
# a push without what extract.py imports for its other work; small shards, one a commit
PUSH = """
import sys
from pathlib import Path
from hf_qie.hub import publish
from hf_qie.runtime.cli import run_script
from hf_qie.config.recipe import load_recipe
publish.SHARD_BYTES, publish.SHARDS_PER_COMMIT = 200_000, 1
def main(argv):
    recipe = load_recipe(argv[0], argv[2:])
    folders = {name: Path(recipe.extract.output_dir, name) for name in argv[1].split(",")}
    publish.push_sets(folders, tasks=recipe.tasks, extract=recipe.extract)
run_script(main)
"""


def run(hub: Hub, home: Path, *command: object, **changes) -> subprocess.CompletedProcess:
    """A process of Python that takes `hub` for the Hub."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env=hub.environment(home) | changes,
        capture_output=True,
        text=True,
        timeout=240,
    )


def push(hub: Hub, recipe: Path, tasks: str, *overrides: str, code: int = 0, **changes) -> str:
    """Push finished sets in small shards; returns what was said."""
    done = run(hub, recipe.parent / "home", "-c", PUSH, recipe, tasks, *overrides, **changes)
    assert done.returncode == code, done.stderr
    return done.stderr


def write_data(folder: Path, edits: Path) -> None:
    """The three tasks of the synthetic edits, 6 rows each, with paths as people have them and one row that is bad."""
    shutil.copytree(edits, folder)
    for task in TASKS:
        path = folder / f"{task}.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:6]]
        if task == "edit":
            rows[0]["target_image"] = str(folder / rows[0]["target_image"])
            rows[1]["target_image"] = str(folder.parent / "elsewhere" / "target.png")
            rows[2]["target_image"] = "../elsewhere/target.png"
            rows[3]["target_image"] = "../elsewhere/broken.png"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(next((folder / "images").iterdir()), elsewhere / "target.png")
    (elsewhere / "broken.png").write_bytes(b"no image")


@pytest.fixture(scope="session")
def pushed(built_once, tiny, edits, root) -> Path:
    """What a run of extract.py with `push_to_hub` leaves: embeddings/, hub/, recipe.yaml, requests.json, said.txt."""

    def build(folder: Path) -> None:
        folder.mkdir()
        write_data(folder / "private-data", edits)
        recipe = {
            "model": str(tiny()),
            "tasks": {task: {"data": str(folder / "private-data" / f"{task}.jsonl")} for task in TASKS},
            "extract": {
                "output_dir": str(folder / "embeddings"),
                "image_sample_size": 64,
                "source_sample_size": 64,
                "push_to_hub": "org/edits",
                "max_bad_share": 0.2,
                "license": "cc-by-4.0",
            },
        }
        (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
        with Hub(folder / "hub") as hub:
            done = run(hub, folder / "home", root / "hf_qie" / "extract.py", folder / "recipe.yaml")
            assert done.returncode == 0, done.stderr
            requests = [[one.method, one.path, one.body.decode()] for one in hub.requests]
        (folder / "requests.json").write_text(json.dumps(requests), encoding="utf-8")
        (folder / "said.txt").write_text(done.stdout + done.stderr, encoding="utf-8")

    return built_once("pushed", build)


@pytest.fixture
def work(pushed, tmp_path) -> Path:
    """A recipe.yaml with sets of its own, embeddings/, not pushed yet."""
    shutil.copytree(pushed / "embeddings", tmp_path / "embeddings")
    recipe = json.loads((pushed / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["extract"]["output_dir"] = str(tmp_path / "embeddings")
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    return tmp_path / "recipe.yaml"


def card_of(hub: Hub) -> tuple[dict, str]:
    """Metadata and text of the card."""
    _, metadata, text = hub.read("org/edits", "README.md").decode().split("---\n", 2)
    return yaml.safe_load(metadata), text


def shards_of(hub: Hub) -> list[str]:
    return sorted(path for path in hub.files("org/edits") if path.endswith(".parquet"))


def test_what_load_dataset_gives_is_the_set_row_for_row_and_type_for_type(pushed, tmp_path):
    with Hub(pushed / "hub") as hub:
        done = run(hub, tmp_path / "home", "-c", LOAD, "org/edits", tmp_path, *TASKS)
        assert done.returncode == 0, done.stderr
    for task in TASKS:
        back, there = load_from_disk(tmp_path / task), load_from_disk(pushed / "embeddings" / task)
        assert back.features == there.features
        assert len(back) == (5 if task == "edit" else 6)
        assert back.remove_columns("target_image")[:] == there.remove_columns("target_image")[:]
    own = [json.loads(line)["target_image"] for line in (pushed / "private-data" / "edit.jsonl").open()]
    expected = [Path(own[0]).relative_to(pushed / "private-data").as_posix(), "target.png", "target.png", *own[4:]]
    assert load_from_disk(tmp_path / "edit")["target_image"][:] == expected


def test_the_three_lines_of_the_card_run_as_printed(pushed, tmp_path):
    with Hub(pushed / "hub") as hub:
        (lines,) = re.findall(r"```python\n(.*?)```", card_of(hub)[1], re.DOTALL)
        assert lines.count("\n") == 3
        show = "row = ds[0]\nprint({name: (str(row[name].dtype), row[name].shape[1]) for name in row})"
        done = run(hub, tmp_path / "home", "-c", lines + show)
    assert done.stdout == (
        "{'image_embeds': ('torch.float16', 96), 'text_embeds_instruction': ('torch.float16', 96)}\n"
    ), done.stderr


def test_the_repository_is_private_unless_the_recipe_says_otherwise(pushed):
    requests = json.loads((pushed / "requests.json").read_text(encoding="utf-8"))
    (created,) = {body for _, path, body in requests if path == "/api/repos/create"}
    expected = {"name": "edits", "organization": "org", "visibility": "private", "type": "dataset"}
    assert json.loads(created) == expected


def test_no_token_and_no_folder_of_this_machine_leaves_it(pushed):
    secrets = [TOKEN, str(pushed), str(pushed.parent), "private-data", "elsewhere", *folders_of_this_machine()]
    texts = {"log": (pushed / "said.txt").read_text(encoding="utf-8")}
    assert TOKEN not in texts.pop("log")
    texts |= {path: body for _, path, body in json.loads((pushed / "requests.json").read_text(encoding="utf-8"))}
    texts |= {path.name: path.read_bytes().decode("latin-1") for path in (pushed / "hub" / "blobs").iterdir()}
    with Hub(pushed / "hub") as hub:
        for shard in shards_of(hub):  # strings are compressed in there
            table = pq.read_table(pushed / "hub" / "blobs" / hub.files("org/edits")[shard]["sha256"])
            texts[shard] = repr(table.select(["source_image", "target_image", "instruction"]).to_pylist())
            texts[f"{shard}: schema"] = repr(table.schema.metadata)
    found = {(name, secret) for name, text in texts.items() for secret in secrets if secret in text}
    assert not found
    for folder in ("embeddings", "hub"):
        for path in (pushed / folder).rglob("*"):
            assert not path.is_file() or TOKEN.encode() not in path.read_bytes()


def test_the_card_tells_what_was_recorded(pushed):
    with Hub(pushed / "hub") as hub:
        metadata, text = card_of(hub)
        provenance = json.loads(hub.read("org/edits", "provenance/edit.json"))
        assert not [path for path in hub.files("org/edits") if "bad_rows" in path]
    assert metadata["license"] == "cc-by-4.0"
    configs = {config["config_name"]: config for config in metadata["configs"]}
    assert set(configs) == set(TASKS)
    assert [name for name, config in configs.items() if config.get("default")] == ["edit"]
    assert all(config["data_files"][0]["path"].startswith(f"data/{name}/") for name, config in configs.items())
    local = json.loads((pushed / "embeddings" / "edit" / "provenance.json").read_text(encoding="utf-8"))
    assert provenance["compat"] == local["compat"]
    assert provenance["fingerprint"] == local["fingerprint"]
    assert "| `edit` | 5 | 0 | 1 of 6 | " in text
    assert re.search(r"## Skipped rows\n\n`edit`:\n\n- 1: target_image: cannot read the image \(\w+: .*…\)\n", text)
    assert "model `edit_plus`" in text
    assert "Picture {number}: <|vision_start|><|image_pad|><|vision_end|>{caption}<|im_end|>" in text
    assert "the stock pipeline\n  takes another area" in text
    for column in load_from_disk(pushed / "embeddings" / "edit").column_names:
        assert f"\n| `{column}` | `" in text
    (recipe,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    shown, own = yaml.safe_load(recipe), json.loads((pushed / "recipe.yaml").read_text(encoding="utf-8"))
    assert shown["extract"]["push_to_hub"] == "org/edits"
    assert shown["tasks"]["edit"]["data"] == ["edit.jsonl"]
    assert shown.keys() > own.keys()
    assert "## Licence\n\ncc-by-4.0\n" in text


def test_a_push_resumes_where_it_was_killed(work, loopback_hub):
    """Shards on the Hub are neither prepared nor sent again, and what is prepared is not prepared again."""
    reached, prepared = threading.Event(), work.parent / "embeddings" / "combine" / "parquet"

    def hold_fourth(method, path):
        if method == "PUT" and len(loopback_hub.asked("PUT", "^/lfs/")) >= 3:
            reached.set()
            threading.Event().wait(30)
            return 500
        return None

    loopback_hub.intercept = hold_fourth
    first = subprocess.Popen(
        [sys.executable, "-c", PUSH, work, "combine"],
        env=loopback_hub.environment(work.parent / "home"),
        stderr=subprocess.DEVNULL,
    )
    assert reached.wait(60)
    before = {path.name: path.stat().st_mtime_ns for path in prepared.glob("*.parquet")}
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert len(shards_of(loopback_hub)) == 3  # of four; the last is only prepared
    assert len(before) == 1
    times = {}

    def watch(method, path):
        times.update({path.name: path.stat().st_mtime_ns for path in prepared.glob("*.parquet")})

    loopback_hub.intercept = watch
    push(loopback_hub, work, "combine")
    assert times == before
    sent = [one.path for one in loopback_hub.asked("PUT", "^/lfs/")]
    assert len(sent) == len(set(sent)) == len(shards_of(loopback_hub)) == 4
    assert not prepared.exists() or not any(prepared.iterdir())


def test_a_hub_that_fails_ends_the_push_with_its_error_and_the_next_one_resumes(work, loopback_hub):
    loopback_hub.intercept = lambda method, path: (
        507 if method == "PUT" and len(loopback_hub.asked("PUT", "^/lfs/")) >= 1 else None
    )
    said = push(loopback_hub, work, "combine", code=1)
    assert "extract.push_to_hub: org/edits; the Hub answers: " in said
    assert "507" in said
    assert said.rstrip().endswith("start again: the push resumes where it stopped")
    assert "Traceback" not in said
    loopback_hub.intercept = lambda method, path: None
    push(loopback_hub, work, "combine")
    sent = [one.path for one in loopback_hub.asked("PUT", "^/lfs/")]
    assert len(sent) == len(set(sent)) == len(shards_of(loopback_hub)) == 4


def test_a_push_of_one_more_task_keeps_the_others_and_what_people_wrote(work, loopback_hub):
    push(loopback_hub, work, "text_to_image")
    metadata, text = card_of(loopback_hub)
    head = f"---\nlanguage: [en, zh]\n{yaml.safe_dump(metadata, sort_keys=False)}---\n"
    loopback_hub.write("org/edits", "README.md", f"{head}\nOur images.\n\n{text.strip()}\nAsk us.\n".encode())
    push(loopback_hub, work, "edit", "extract.license=mit")
    after, text = card_of(loopback_hub)
    assert text.strip().startswith(f"Our images.\n\n{BEGIN}")
    assert text.endswith(f"{END}Ask us.\n")
    assert after["language"] == ["en", "zh"]
    assert after["license"] == "mit"
    assert [config["config_name"] for config in after["configs"]] == ["edit", "text_to_image"]
    assert after["configs"][1] == metadata["configs"][0]
    assert "default" not in after["configs"][0]
    assert after["dataset_info"][1] == metadata["dataset_info"]
    assert 'load_dataset("org/edits", "text_to_image"' in text
    assert "| `edit` | 5 |" in text
    assert "| `text_to_image` | 6 |" in text


def test_a_card_that_somebody_changed_meanwhile_is_not_overwritten(work, loopback_hub):
    def meddle(method, path):
        if (
            path.endswith("/commit/main") and len(loopback_hub.asked("POST", "/commit/main")) == 1
        ):  # the second to come
            loopback_hub.write("org/edits", "README.md", b"Ours.\n")

    loopback_hub.intercept = meddle
    said = push(loopback_hub, work, "text_to_image", code=1)
    assert "412" in said
    assert said.rstrip().endswith("start again: the push resumes where it stopped")
    assert loopback_hub.read("org/edits", "README.md") == b"Ours.\n"
    push(loopback_hub, work, "text_to_image")
    assert card_of(loopback_hub)[1].strip().startswith(f"Ours.\n\n{BEGIN}")


def test_nothing_is_pushed_where_too_many_rows_are_bad(work, caplog):
    PartialState(cpu=True)
    push_unless_bad(load_recipe(work), TOO_MANY_BAD)  # a push would fail: tests are offline
    assert "nothing is pushed; fix the bad rows, or raise extract.max_bad_share" in caplog.text


def test_another_set_under_the_same_name_is_refused_unless_it_is_to_be_replaced(work, loopback_hub):
    push(loopback_hub, work, "edit")
    before = loopback_hub.files("org/edits")
    path = work.parent / "embeddings" / "edit" / "provenance.json"
    provenance = json.loads(path.read_text(encoding="utf-8"))
    provenance["record"]["request"]["data"] = "other rows"
    path.write_text(json.dumps(provenance), encoding="utf-8")
    said = push(loopback_hub, work, "edit", code=1)
    assert said.strip() == (
        "extract.push_to_hub: org/edits has a config edit that is made with another data; push elsewhere, rename the "
        "task, or set extract.overwrite: true to replace it"
    )
    assert loopback_hub.files("org/edits") == before
    push(loopback_hub, work, "edit", "extract.overwrite=true")
    assert len(shards_of(loopback_hub)) == 3
    assert not set(shards_of(loopback_hub)) & set(before)


# tries to open a repository by each of the settings given, and says what went wrong
REFUSED = """
import json, sys
from hf_qie.hub.publish import open_repo
from hf_qie.config.recipe import Extract, InputError
for settings in sys.argv[1:]:
    try:
        open_repo(Extract(**json.loads(settings)))
    except InputError as error:
        print(json.dumps(str(error)))
"""


def test_a_push_that_cannot_succeed_is_refused_at_once(loopback_hub, tmp_path):
    loopback_hub.create("org/edits", private=True)
    login = "log in with `hf auth login`, or set HF_TOKEN to a token with access to it"
    expected = [
        (
            {"private": False},
            "extract.push_to_hub: org/edits exists and is private; change extract.private to match, or push elsewhere",
        ),
        ({"license": "mine"}, "extract.license: the Hub does not take 'mine'; give an identifier of https://hf.co/"),
        (
            {"push_to_hub": "org/a..b"},
            "extract.push_to_hub: org/a..b; invalid Hub id: Cannot have -- or .. in repo_id: 'org/a..b'",
        ),
    ]
    settings = [json.dumps({"push_to_hub": "org/edits"} | changes) for changes, _ in expected]
    done = run(loopback_hub, tmp_path / "home", "-c", REFUSED, *settings)
    said = [json.loads(line) for line in done.stdout.splitlines()]
    for message, (_, start) in zip(said, expected, strict=True):
        assert message.startswith(start)
    done = run(loopback_hub, tmp_path / "home", "-c", REFUSED, '{"push_to_hub": "org/edits"}', HF_TOKEN="hf_wrong")
    (message,) = (json.loads(line) for line in done.stdout.splitlines())
    assert re.fullmatch(rf"extract\.push_to_hub: org/edits; .*401.*\n{re.escape(login)}", message, re.DOTALL)
    assert "hf_wrong" not in message


def test_a_repository_needs_an_organisation_and_a_name(work):
    with pytest.raises(InputError, match=r"extract\.push_to_hub: got \"edits\", expected a Hub id like org/name"):
        load_recipe(work, ["extract.push_to_hub=edits"])


# opens a set as training does, and leaves its rows and provenance in a folder
OPEN = """
import json, sys
from hf_qie.data.embedding_sets import open_embeddings
from hf_qie.runtime.cli import run_script
def main(argv):
    data, provenance = open_embeddings(argv[0], task=argv[1])
    data.save_to_disk(argv[2])
    with open(f"{argv[2]}/opened.json", "w") as file:
        json.dump([data._fingerprint, provenance], file)
run_script(main)
"""


def test_a_set_is_opened_from_the_hub_as_from_its_folder(work, loopback_hub, tmp_path):
    """By task, config and revision; and again when the Hub cannot be reached."""
    push(loopback_hub, work, "combine")
    loopback_hub.tag("org/edits", "v1")
    there = load_from_disk(work.parent / "embeddings" / "combine")
    path = work.parent / "embeddings" / "combine" / "provenance.json"
    compat = json.loads(path.read_text(encoding="utf-8"))["compat"]
    provenance = json.loads(path.read_text(encoding="utf-8"))
    provenance["record"]["request"]["data"] = "other rows"
    path.write_text(json.dumps(provenance), encoding="utf-8")
    push(loopback_hub, work, "combine", "extract.overwrite=true")  # v1 stays what it was
    names = [("org/edits:combine@v1", "any", {}), ("org/edits@v1", "combine", {"HF_HUB_OFFLINE": "1"})]
    for number, (name, task, changes) in enumerate(names):
        folder = tmp_path / f"opened{number}"
        done = run(loopback_hub, tmp_path / "home", "-c", OPEN, name, task, folder, **changes)
        assert done.returncode == 0, done.stderr
        back = load_from_disk(folder)
        assert back.features == there.features
        assert back[:] == there[:]
        fingerprint, provenance = json.loads((folder / "opened.json").read_text(encoding="utf-8"))
        assert fingerprint == there._fingerprint
        assert provenance["compat"] == compat
        assert provenance["record"]["request"]["data"] != "other rows"


# tries to open each of the sets given, and says what went wrong
MISSING = """
import json, sys
from hf_qie.data.embedding_sets import open_embeddings
from hf_qie.config.recipe import InputError
for name in sys.argv[1:]:
    try:
        open_embeddings(name, task="any")
    except InputError as error:
        print(json.dumps(str(error)))
"""


def test_a_set_that_is_not_there_is_told_with_what_is(pushed, tmp_path):
    expected = {
        "org/edits:portraits": "org/edits has no embedding set portraits; there are combine, edit, text_to_image",
        "org/edits:edit@v7": r"is not a folder here; the Hub answers: .*Revision Not Found",
        "org/nothing": r"is not a folder here; the Hub answers: .*Repository Not Found",
        "nothing": "no folder here, and no Hub id like org/name, org/name:config or org/name@revision",
    }
    with Hub(pushed / "hub") as hub:
        done = run(hub, tmp_path / "home", "-c", MISSING, *expected)
    said = [json.loads(line) for line in done.stdout.splitlines()]
    for message, (name, told) in zip(said, expected.items(), strict=True):
        assert re.match(rf"tasks\.any\.embeddings: {name}:? {told}", message, re.DOTALL)


def test_training_on_a_set_of_the_hub_gives_the_weights_of_training_on_its_folder(pushed, root, tmp_path):
    train = """
import sys
from hf_qie.train import main
for embeddings, output_dir in zip(sys.argv[2::2], sys.argv[3::2]):
    main([sys.argv[1], f"tasks.edit.embeddings={embeddings}", f"training.output_dir={output_dir}"])
"""
    recipe = {
        "model": json.loads((pushed / "recipe.yaml").read_text(encoding="utf-8"))["model"],
        "tasks": {"edit": {}},
        "trainable": {"lora": {"rank": 4}},
        "training": {"use_cpu": True, "max_steps": 2, "logging_steps": 1, "learning_rate": 1e-2, "report_to": "none"},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    sets = ["org/edits", tmp_path / "hub", pushed / "embeddings" / "edit", tmp_path / "folder"]
    with Hub(pushed / "hub") as hub:
        done = run(hub, tmp_path / "home", "-c", train, tmp_path / "recipe.yaml", *sets)
    assert done.returncode == 0, done.stderr
    ours, local = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("hub", "folder"))
    assert ours.keys() == local.keys()
    assert all(torch.equal(ours[name], local[name]) for name in ours)


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("a/b.png", "a/b.png"),
        ("./a//b.png", "a/b.png"),
        ("/data/set/a/b.png", "a/b.png"),
        ("../b.png", "b.png"),
        ("../../home/someone/b.png", "b.png"),
        ("/data/settled/b.png", "b.png"),
        ("file:///home/someone/b.png", "b.png"),
        ("row-7-target", "row-7-target"),
        ("https://host:8080/a/b.png?X-Amz-Signature=1&x=2#top", "https://host:8080/a/b.png"),
        ("HTTPS://someone:pa@ss@host/a@b.png", "HTTPS://host/a@b.png"),
        (None, None),
    ],
)
def test_a_path_is_shown_from_the_images_root_and_a_url_without_who_asks(path, shown):
    assert public_path(path, [Path("/data/set")]) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("Qwen/Qwen-Image-Edit-2509", "Qwen/Qwen-Image-Edit-2509"),
        ("outputs/run", "outputs/run"),
        ("/home/someone/models/edit/", "edit"),
        ("~/data/*.jsonl", "*.jsonl"),
        ("../someone/rows.jsonl", "rows.jsonl"),
        ("/homes/me", "~"),
        ("/scratch/me/", "~"),
        ({"image_root": "/home/someone/pictures"}, {}),
        ("C:\\Users\\someone\\rows.jsonl", "rows.jsonl"),
        ('{"folder": "/home/someone/x", "and/or": 1}', '{"folder": "x", "and/or": 1}'),
        ("https://someone:secret@host/rows.jsonl?token=1", "https://host/rows.jsonl"),
        ({"a": ["/tmp/x/y", 1, None, True]}, {"a": ["y", 1, None, True]}),
    ],
)
def test_a_recorded_value_is_shown_without_folders_of_the_machine(value, shown, monkeypatch):
    monkeypatch.setenv("HOME", "/homes/me")
    assert public(value) == shown


def test_shards_of_real_width_are_prepared_fast(tmp_path):
    """80 MB/s and more on an idle core; a quarter of it leaves room for what else runs here."""
    megabytes_per_s = measure(tmp_path, rows=48)
    logging.getLogger(__name__).info("%.0f MB/s of one core", megabytes_per_s)
    assert megabytes_per_s > 20
