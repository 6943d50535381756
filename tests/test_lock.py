"""A folder that one launch works in is no other launch's."""

import errno
import fcntl
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import load_from_disk
from launches import Launch
from small_recipes import write_recipe

from hf_qie.errors import InputError
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
    told = (
        rf".*run: in use by process {other.pid} on \S+ since 20[-0-9: ]+, which holds {lock}; wait .*, or go elsewhere"
    )
    assert re.fullmatch(told, refusal(lock))
    other.kill()
    other.wait()
    with held(lock.parent, remedy="go elsewhere"):
        assert lock.read_text().split() == [str(os.getpid()), socket.gethostname()]
    assert list(lock.parent.iterdir()) == []


def test_what_fails_gives_the_folder_back(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), held(tmp_path, remedy=""):
            raise ZeroDivisionError


def test_where_a_file_system_has_no_locks_a_file_is_one_and_that_is_said(tmp_path, monkeypatch):
    def no_flock(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", no_flock)
    with pytest.warns(UserWarning, match="falling back to SoftFileLock"), held(tmp_path, remedy="go elsewhere"):
        assert f"in use by process {os.getpid()} on {socket.gethostname()} since 20" in refusal(tmp_path / ".lock")
    assert list(tmp_path.iterdir()) == []


def test_ranks_but_the_first_hold_nothing(tmp_path, other, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with held(tmp_path / "run", remedy=""):
        pass


def test_launches_share_the_chunks_of_a_set_and_other_data_wait_until_none_is_under_way(tmp_path, tiny, edits):
    rows = [json.loads(line) for line in (edits / "edit.jsonl").read_text(encoding="utf-8").splitlines()][:8]
    rows = [row | {name: str(edits / row[name]) for name in ("source_image", "target_image")} for row in rows]
    recipe = write_recipe(tmp_path, tiny(), {"task": rows}, extract={"batch_size": 1, "chunk_rows": 2})
    first = Launch(recipe, notes=tmp_path / "first", stops=(3, None))
    while not (tmp_path / "first.stopped").exists():
        assert first.alive(), (tmp_path / "first.log").read_text()
        time.sleep(0.1)
    assert Launch(recipe, notes=tmp_path / "second").join(60) == [0]  # leaves the chunk that is under way
    assert len((tmp_path / "second").read_text().split()) == 2
    changed = "extract.overwrite=true", "extract.image_sample_size=96"
    assert Launch(recipe, *changed, notes=tmp_path / "other").join(60) == [1]
    assert f"sets/task: in use by process {first.ranks[0].pid} on " in (tmp_path / "other.log").read_text()
    assert first.kill()
    assert Launch(recipe, notes=tmp_path / "last").join(60) == [0]
    assert len(load_from_disk(tmp_path / "sets" / "task")) == len(rows)
    assert sorted(path.name for path in (tmp_path / "sets").iterdir()) == ["task"]
