"""What is on a disk is what was written, or is not used: damaged files, full disks, folders that take nothing."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import embedding_sets
import pytest
import small_recipes

from hf_qie import extract, train
from hf_qie.config.recipe import load_recipe
from hf_qie.data.embedding_sets import open_set
from hf_qie.data.provenance import read_provenance
from hf_qie.errors import InputError
from hf_qie.extraction.chunk_writer import ChunkWriter
from hf_qie.extraction.manifest import manifest_path
from hf_qie.runtime.files import (
    check_digests,
    check_sizes,
    disk_trouble,
    flush,
    misfit,
    write_durably,
    written,
)
from hf_qie.training.sets import open_sets


def flip(path: Path, *, place: float = 0.5) -> None:
    """Turn over one bit of a file."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    """Take a file's last byte."""
    os.truncate(path, path.stat().st_size - 1)


DAMAGES = {cut: "bytes, but", Path.unlink: "is missing", flip: "is not what was written"}
SEEN_BY_SIZE = [cut, Path.unlink]


# --- files


def test_what_is_written_is_known_again(tmp_path):
    file = tmp_path / "file"
    write_durably(file, "Bild")
    assert written(file) == {"bytes": 4, "sha256": hashlib.sha256(b"Bild").hexdigest()}
    assert misfit(file, written(file)) is None
    assert list(tmp_path.iterdir()) == [file]


def test_a_crash_leaves_nothing_beside_what_is_written_aside(tmp_path, monkeypatch):
    aside = tmp_path / "aside"
    aside.mkdir()

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_qie.runtime.files.move_durably", killed)
    with pytest.raises(KeyboardInterrupt):
        write_durably(tmp_path / "file", "Bild", aside=aside)
    assert list(tmp_path.iterdir()) == [aside]
    assert len(list(aside.iterdir())) == 1


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_file_is_named_by_its_size_or_by_its_bytes(tmp_path, damage):
    files = {}
    for name in ("one", "other"):
        (tmp_path / name).write_bytes(os.urandom(3000))
        files[name] = written(tmp_path / name)
    check_sizes(tmp_path, files)
    check_digests(tmp_path, files)
    damage(tmp_path / "other")
    for check in (check_sizes, check_digests) if damage in SEEN_BY_SIZE else (check_digests,):
        with pytest.raises(InputError, match=f": other .*{DAMAGES[damage]}") as told:
            check(tmp_path, files)
        assert "one" not in str(told.value).replace(str(tmp_path), "")
        assert f"delete {tmp_path} and extract it again" in str(told.value)


def test_a_file_that_cannot_be_flushed_leaves_no_handle_open(tmp_path, monkeypatch):
    def fail(handle):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="Input"):
        flush(tmp_path)
    assert len(os.listdir("/proc/self/fd")) <= before  # those of other tests may be closed meanwhile


# --- chunks and sets


@pytest.fixture
def recipe(tmp_path, tiny, edits) -> Path:
    """Seven rows in chunks of two."""
    rows = [json.loads(line) for line in (edits / "edit.jsonl").read_text(encoding="utf-8").splitlines()[:7]]
    rows = [row | {name: str(edits / row[name]) for name in ("source_image", "target_image")} for row in rows]
    return small_recipes.write_recipe(tmp_path, tiny(), {"task": rows}, extract={"chunk_rows": 2})


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.arrow")}


@pytest.mark.parametrize("damage", [cut, "manifest"])
def test_a_damaged_chunk_of_a_launch_before_is_named_and_written_again(recipe, tmp_path, damage, monkeypatch, caplog):
    assert extract.main([str(recipe)]) == 0
    folder = tmp_path / "sets" / "task"
    whole = content(folder)
    again = tmp_path / "again"
    write, chunks = ChunkWriter.write, []

    def killed_at_the_third(self, path, chunk, **places):
        if len(chunks) == 2:
            raise KeyboardInterrupt
        chunks.append(path)
        write(self, path, chunk, **places)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ChunkWriter, "write", killed_at_the_third)
        extract.main([str(recipe), f"extract.output_dir={again}"])
    victim = chunks[1]
    if damage == "manifest":
        flip(manifest_path(victim), place=0)
    else:
        damage(victim)
    chunks.clear()

    def counted(self, path, chunk, **places):
        chunks.append(path.name)
        write(self, path, chunk, **places)

    monkeypatch.setattr(ChunkWriter, "write", counted)
    assert extract.main([str(recipe), f"extract.output_dir={again}"]) == 0
    assert f"{victim}: " in caplog.text
    assert "; it is written again" in caplog.text
    assert len(chunks) == 3  # of four, as one was whole
    assert content(again / "task") == whole


@pytest.mark.parametrize("damage", SEEN_BY_SIZE, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", ["data-00002-of-00004.arrow", "dataset_info.json", "state.json"])
def test_a_set_with_a_damaged_file_is_neither_trained_on_nor_taken_for_finished(recipe, tmp_path, name, damage):
    assert extract.main([str(recipe)]) == 0
    loaded = load_recipe(recipe, [f"training.output_dir={tmp_path / 'run'}"])
    assert len(open_sets(loaded)["task"]) == 7
    damage(tmp_path / "sets" / "task" / name)
    words = rf"sets/task: {name} .*{DAMAGES[damage]}.* or delete .*/sets/task and extract it again"
    with pytest.raises(InputError, match=words):
        open_sets(loaded)
    with pytest.raises(InputError, match=words):
        extract.main([str(recipe)])


def test_the_record_of_a_set_has_the_digest_of_each_of_its_files(recipe, tmp_path):
    assert extract.main([str(recipe)]) == 0
    folder = tmp_path / "sets" / "task"
    files = read_provenance(folder)["record"]["files"]
    assert set(files) == {*content(folder), "state.json", "row_digests.npy", "dataset_info.json"}
    assert all(written(folder / name) == was for name, was in files.items())


# --- disks that take nothing


def test_trouble_with_a_disk_is_told_from_other_trouble():
    full = OSError(errno.ENOSPC, "No space left on device", "chunk.arrow")
    assert disk_trouble(full).startswith(
        "[Errno 28] No space left on device: 'chunk.arrow'; the disk cannot be read or written; "
    )
    hidden = RuntimeError("it broke")
    hidden.__cause__ = full
    assert disk_trouble(hidden) == disk_trouble(full)
    assert disk_trouble(FileNotFoundError(errno.ENOENT, "No such file", "rows.jsonl")) is None
    assert disk_trouble(ValueError("7")) is None


SCRIPT = """
set -u
mount -t tmpfs -o size={size} tmpfs {disk}
echo "$$" > {ready}
{commands}
"""


def on_a_small_disk(folder: Path, root: Path, *, size: str, commands: str) -> subprocess.CompletedProcess:
    """Run shell commands in a namespace of their own, where `folder`/disk is a file system in memory."""
    disk = folder / "disk"
    disk.mkdir()
    script = SCRIPT.format(size=size, disk=disk, ready=folder / "ready", commands=commands)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "PYTHON": sys.executable}
    as_root = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    done = subprocess.run(
        [*as_root, "sh", "-c", script], capture_output=True, text=True, env=environment, cwd=root, timeout=300
    )
    if not (folder / "ready").exists():
        pytest.skip(f"this machine lets nobody mount a disk: {done.stderr}")
    return done


def test_extraction_onto_a_disk_that_fills_up_says_so_and_goes_on_once_there_is_room(recipe, tmp_path, root):
    assert extract.main([str(recipe)]) == 0
    whole = content(tmp_path / "sets" / "task")
    run = f"$PYTHON hf_qie/extract.py {recipe} extract.output_dir={tmp_path}/disk/sets"
    chunks = f"{tmp_path}/disk/sets/task/*.arrow"
    commands = f"""
    {run} & running=$!
    while ! ls {chunks} > {tmp_path}/ls 2>&1; do sleep 0.01; done
    cat /dev/zero > {tmp_path}/disk/filler
    wait $running; echo "exit $?"
    rm {tmp_path}/disk/filler
    {run}; echo "exit $?"
    cp -r {tmp_path}/disk/sets {tmp_path}/copied
    """
    done = on_a_small_disk(tmp_path, root, size="40m", commands=commands)
    assert done.stdout.split() == ["exit", "1", "exit", "0"], done.stderr
    assert "the disk cannot be read or written; fix that" in done.stderr
    assert "Traceback" not in done.stderr
    assert content(tmp_path / "copied" / "task") == whole


def test_a_checkpoint_onto_a_full_disk_says_so_and_the_run_goes_on_once_there_is_room(tmp_path, tiny, root):
    training = {"max_steps": 6, "save_total_limit": None}
    recipe = embedding_sets.write_recipe(tmp_path, tiny(), training=training)
    straight = load_recipe(recipe)
    train.train(straight, open_sets(straight))
    checkpoint = sum(path.stat().st_size for path in (tmp_path / "run" / "checkpoint-2").rglob("*"))
    run = f"$PYTHON hf_qie/train.py {recipe} training.output_dir={tmp_path}/disk/run"
    commands = f"""
    {run}; echo "exit $?"
    ls {tmp_path}/disk/run/checkpoint-*/complete.json
    mount -o remount,size={8 * checkpoint} {tmp_path}/disk
    {run}; echo "exit $?"
    cp -r {tmp_path}/disk/run {tmp_path}/copied
    """
    done = on_a_small_disk(tmp_path, root, size=str(int(1.6 * checkpoint)), commands=commands)
    first, *complete, last = [line for line in done.stdout.splitlines() if line.startswith(("exit", "/"))]
    assert (first, last) == ("exit 1", "exit 0"), done.stderr
    assert [Path(path).parent.name for path in complete] == ["checkpoint-2"]
    assert "the disk cannot be read or written; fix that" in done.stderr
    assert "Traceback" not in done.stderr
    assert f"resuming from {tmp_path}/disk/run/checkpoint-2" in done.stderr
    for path in (tmp_path / "run").rglob("transformer/*.safetensors"):
        other = tmp_path / "copied" / path.relative_to(tmp_path / "run")
        assert path.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("script", ["extract", "train"])
def test_a_disk_that_is_read_only_is_named_before_a_model_is_loaded(tmp_path, tiny, edits, root, script):
    recipes = {
        "extract": lambda: small_recipes.write_recipe(tmp_path, tiny(), {"task": edits / "edit.jsonl"}),
        "train": lambda: embedding_sets.write_recipe(tmp_path, tiny()),
    }
    recipe, key = recipes[script](), {"extract": "extract", "train": "training"}[script] + ".output_dir"
    weightless = small_recipes.weightless(tiny(), tmp_path / "model")
    commands = f"""
    mount -o remount,ro {tmp_path}/disk
    $PYTHON hf_qie/{script}.py {recipe} {key}={tmp_path}/disk/out model={weightless}; echo "exit $?"
    """
    done = on_a_small_disk(tmp_path, root, size="4m", commands=commands)
    assert done.stdout.split() == ["exit", "1"]
    assert f"{tmp_path}/disk/out" in done.stderr
    assert "Read-only file system" in done.stderr
    assert "Traceback" not in done.stderr


def test_sets_of_before_digests_were_recorded_are_read_as_they_are(tmp_path, tiny):
    folder = embedding_sets.write_set(tmp_path / "set", tiny())
    assert "files" not in read_provenance(folder)["record"]
    assert len(open_set(folder)) == 8
