"""A rank that dies, hangs or fails ends the others, with the reason."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from datasets import load_from_disk
from launches import Launch
from small_recipes import write_recipe

from hf_qie.runtime.alive import Alive, at, at_any_length

# A beat is a fiftieth of its length here, and so is the patience; the mechanism is the same.
RANK = """
import sys, time
from pathlib import Path
import hf_qie.runtime.alive as alive
from hf_qie.config.recipe import InputError
alive.BEAT_S /= 50
rounds, then = int(sys.argv[2]), sys.argv[3]
with alive.Alive(Path(sys.argv[1]), stuck_s=alive.STUCK_S / 50):
    print("there", flush=True)
    for i in range(rounds):
        alive.at(f"round {i}")
        time.sleep(0.02)
    if then == "fail":
        raise InputError("rows.jsonl: line 3: no such picture")
    if then == "lose":
        raise RuntimeError("[gloo/transport/tcp/pair.cc:544] Connection closed by peer [127.0.0.1]:1")
    if then == "hang":
        time.sleep(100)
    if then == "wait":
        with alive.at_any_length("waiting for the others"):
            time.sleep(100)
"""
FOREVER = 10**9


@pytest.fixture
def rank(tmp_path, root) -> Iterator[Callable[..., subprocess.Popen]]:
    """`rank(i, n, rounds, then)` -> the i-th process of n, once it has given its first sign."""
    started = []

    def start(i: int, n: int, rounds: int, then: str) -> subprocess.Popen:
        command = [sys.executable, "-c", RANK, str(tmp_path / "signs"), str(rounds), then]
        environment = os.environ | {"RANK": str(i), "WORLD_SIZE": str(n), "PYTHONPATH": str(root)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=environment, **pipes))
        assert started[-1].stdout.readline() == "there\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_rank_says_at_once_that_it_saves_as_the_disk_may_then_be_too_busy_for_a_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("hf_qie.runtime.alive.BEAT_S", 1e6)  # none comes by itself
    with Alive(tmp_path / "signs") as one:
        at("step 7")
        one.write()
        assert not one.read(0)["excused"]
        with at_any_length("saving", tell=True):
            assert one.read(0)["excused"]
            assert one.read(0)["place"] == "saving"


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("lost", [0, 1])
def test_ranks_end_when_one_gives_no_sign_any_more(rank, lost, sent):
    ranks = [rank(i, 3, FOREVER, "") for i in range(3)]
    time.sleep(0.5)
    ranks[lost].send_signal(sent)
    for i, process in enumerate(ranks):
        if i != lost:
            _, said = process.communicate(timeout=20)
            assert process.returncode == 1
            assert f"rank {lost} (process {ranks[lost].pid} on " in said
            assert "has given no sign of life" in said
            assert f"rank {i} ends at round " in said
            assert "Traceback" not in said


@pytest.mark.parametrize("stuck", [0, 1])
def test_ranks_end_when_one_is_at_one_place_for_too_long(rank, stuck):
    order = sorted(range(3), key=lambda i: i == stuck)  # all are there before it hangs
    ranks = {i: rank(i, 3, 50 if i == stuck else FOREVER, "hang") for i in order}
    for i, process in ranks.items():
        _, said = process.communicate(timeout=20)
        assert process.returncode == 1
        assert f"rank {stuck} (process {ranks[stuck].pid} on " in said
        assert "has been at round 49 for " in said
        assert ": 1 of 3 ranks hang, or wait for one that does" in said
        if i == stuck:
            assert 'File "<string>", line' in said  # where it hangs


def test_who_waits_for_others_may_take_any_time(rank):
    waiting, working = rank(1, 2, 50, "wait"), rank(0, 2, 200, "")
    time.sleep(0.02 * 200 + 1)  # four times the patience
    assert waiting.poll() is None
    assert working.wait(20) == 0
    time.sleep(1)
    assert waiting.poll() is None  # the other one left, which is no trouble


@pytest.mark.parametrize("failing", [0, 1])
def test_ranks_end_with_the_reason_of_the_one_that_failed(rank, failing):
    order = sorted(range(3), key=lambda i: i == failing)  # all are there before it fails
    ranks = {i: rank(i, 3, 20 if i == failing else FOREVER, "fail") for i in order}
    for i, process in ranks.items():
        _, said = process.communicate(timeout=20)
        assert process.returncode == 1
        if i != failing:
            assert f"as rank {failing} (process" in said
            assert "rows.jsonl: line 3: no such picture" in said


def test_a_broken_connection_is_traced_to_the_rank_that_is_gone(rank):
    losing, lost = rank(0, 2, 200, "lose"), rank(1, 2, FOREVER, "")
    lost.kill()
    _, said = losing.communicate(timeout=20)
    assert losing.returncode == 1
    assert f"rank 1 (process {lost.pid} on " in said
    assert "Traceback" not in said


def test_what_a_launch_before_has_left_is_nobodys_sign(rank, tmp_path):
    dead = rank(1, 2, FOREVER, "")
    dead.kill()
    assert (tmp_path / "signs" / "1.json").exists()
    first = rank(0, 2, 100, "")
    time.sleep(1.2)  # twice the silence that is taken for death
    second = rank(1, 2, 20, "")
    assert (first.wait(20), second.wait(20)) == (0, 0)
    assert not (tmp_path / "signs").exists()


def test_one_process_alone_leaves_no_trace(tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with Alive(tmp_path / "signs"):
        at("work")
        with at_any_length("more work"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_two_files_a_rank_and_beat_are_read_however_many_there_are(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "512")
    monkeypatch.setenv("RANK", "511")
    assert list(Alive(Path(tmp_path)).others) == [0]
    monkeypatch.setenv("RANK", "0")
    assert len(Alive(Path(tmp_path)).others) == 511


# --- the two runs themselves


STOPS = [signal.SIGKILL, signal.SIGSTOP, None]
MINUTE_S = 60


@pytest.mark.faults
@pytest.mark.parametrize("sent", STOPS)
def test_a_rank_of_extraction_that_stops_ends_the_others_within_a_minute_and_the_set_goes_on(
    tmp_path, tiny, edits, sent, record_property
):
    rows = [json.loads(line) for line in (edits / "edit.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row | {name: str(edits / row[name]) for name in ("source_image", "target_image")} for row in rows]
    recipe = write_recipe(tmp_path, tiny(), {"task": rows}, extract={"batch_size": 1, "chunk_rows": 3})
    notes = tmp_path / "notes"
    launch = Launch(recipe, notes=notes, ranks=2, stops=(8, sent))
    first, last = launch.ranks
    while not notes.with_suffix(".stopped").exists():
        assert first.is_alive(), notes.with_suffix(".log").read_text()
        time.sleep(0.1)
    since = time.monotonic()
    first.join(2 * MINUTE_S)
    record_property("seconds to the end of the other rank", time.monotonic() - since)
    assert time.monotonic() - since < MINUTE_S
    assert first.exitcode == 1
    said = notes.with_suffix(".log").read_text()
    assert f"rank 0 ends at the end of its chunks, waiting for those of others, as rank 1 (process {last.pid} " in said
    assert ("has given no sign of life" if sent else "1 of 2 ranks hang") in said
    last.kill()
    last.join()
    assert Launch(recipe, notes=notes, ranks=2).join(300) == [0, 0]
    assert len(load_from_disk(tmp_path / "sets" / "task")) == len(rows)
