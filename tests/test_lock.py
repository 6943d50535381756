"""A folder that one launch works in is no other launch's."""

import errno
import fcntl
import json
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import load_from_disk
from launches import Launch
from small_recipes import write_recipe

from hf_qie.config.recipe import load_recipe
from hf_qie.errors import InputError
from hf_qie.extract import signs_folder
from hf_qie.runtime.lock import held

HOLD = """
import sys, time
from pathlib import Path
from hf_qie.runtime.lock import held
with held(Path(sys.argv[1]), remedy="go elsewhere"):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def other(tmp_path, root):
    """A process that holds `tmp_path`/run/.lock."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(root)}, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def refusal(lock: Path) -> str:
    """What a launch that wants the lock is told."""
    with pytest.raises(InputError) as refused, held(lock.parent, remedy="go elsewhere"):
        pass
    return str(refused.value)


def test_a_second_launch_is_told_who_holds_the_folder_and_a_killed_one_holds_it_no_more(tmp_path, other):
    lock = tmp_path / "run" / ".lock"
    told = rf".*run: in use by process {other.pid} on \S+ since 20[-0-9: ]+; wait until it has ended, or go elsewhere"
    assert re.fullmatch(told, refusal(lock))
    other.kill()
    other.wait()
    with held(lock.parent, remedy="go elsewhere"):
        assert json.loads(Path(f"{lock}.json").read_text())["process"] == os.getpid()
    assert list(lock.parent.iterdir()) == []


def test_what_fails_gives_the_folder_back(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), held(tmp_path, remedy=""):
            raise ZeroDivisionError


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_where_a_file_system_has_no_locks_a_file_is_one_and_that_is_said(tmp_path, monkeypatch, caplog, number):
    def no_flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_flock)
    lock = tmp_path / ".lock"
    with held(lock.parent, remedy="go elsewhere"):
        assert f"{lock}.soft: the file system has no locks" in caplog.text
        assert re.search(f"in use by process {os.getpid()} .*; if it was killed, delete {lock}.soft$", refusal(lock))
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_another_machine_did_not_give_back_is_taken_with_a_warning(tmp_path, caplog):
    holder = {"process": 1, "host": "elsewhere", "since": "2026-01-01 00:00:00"}
    Path(tmp_path, ".lock.json").write_text(json.dumps(holder))
    with caplog.at_level(logging.WARNING), held(tmp_path, remedy=""):
        pass
    assert "was in use by process 1 on elsewhere since 2026-01-01 00:00:00, which was killed, or" in caplog.text


def test_launches_that_share_an_output_folder_keep_their_signs_of_life_apart(tmp_path):
    one, other = (load_recipe(write_recipe(tmp_path, tmp_path, {task: []})) for task in ("one", "other"))
    shards = [load_recipe(other.path, [f"extract.shard=[{i},2]"]) for i in (0, 1)]
    assert len({signs_folder(recipe) for recipe in (one, other, *shards)}) == 4


def test_an_extraction_that_is_at_work_is_not_begun_again_but_shared_by_shards(tmp_path, tiny, edits):
    rows = [json.loads(line) for line in (edits / "edit.jsonl").read_text(encoding="utf-8").splitlines()][:6]
    rows = [row | {name: str(edits / row[name]) for name in ("source_image", "target_image")} for row in rows]
    recipe = write_recipe(tmp_path, tiny(), {"task": rows}, extract={"batch_size": 1, "chunk_rows": 2})
    first = Launch(recipe, "extract.shard=[0,2]", notes=tmp_path / "first", stops=(3, None))
    while not (tmp_path / "first.stopped").exists():
        assert first.alive(), (tmp_path / "first.log").read_text()
        time.sleep(0.1)
    assert Launch(recipe, "extract.shard=[0,2]", notes=tmp_path / "again").join(60) == [1]
    said = (tmp_path / "again.log").read_text()
    assert f"sets/task: in use by process {first.ranks[0].pid} on " in said
    assert "extract.shard" in said
    assert not (tmp_path / "again").exists(), "it encodes no row"
    assert Launch(recipe, "extract.shard=[1,2]", notes=tmp_path / "other").join(60) == [0]
    assert first.kill()
    assert Launch(recipe, "extract.shard=[0,2]", notes=tmp_path / "last").join(60) == [0]
    assert len(load_from_disk(tmp_path / "sets" / "task")) == len(rows)
    assert sorted(path.name for path in (tmp_path / "sets").iterdir()) == ["task"]
