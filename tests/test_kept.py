"""Data or images that changed: rows that are the same are reused, all others extracted again, and both never mixed."""

import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, Features, Value, load_from_disk
from datasets.arrow_writer import ArrowWriter
from PIL import Image
from small_recipes import write_recipe

from hf_qie.config.recipe import load_recipe
from hf_qie.data.provenance import PROVENANCE, read_provenance
from hf_qie.data.schema import shared_embeds
from hf_qie.errors import InputError
from hf_qie.extract import main
from hf_qie.extraction import run as extraction
from hf_qie.extraction.chunk_writer import ChunkWriter, Models
from hf_qie.extraction.manifest import Counts, complete_chunk
from hf_qie.extraction.reuse import digests_of
from hf_qie.extraction.set_writer import SetWriter, set_lock
from hf_qie.models.base import read_family
from hf_qie.runtime.device import compute_dtype

ROWS = 7
SETTINGS = {"batch_size": 1, "chunk_rows": 3, "max_bad_share": 1.0}  # alone in its batch, a row has the same bits


class Killed(Exception):
    """What ends a launch where a test wants it to."""


@pytest.fixture(scope="module")
def model(tiny, request) -> Path:
    """The checkpoint; tests of both families give others."""
    return tiny(getattr(request, "param", "edit_plus"))


@pytest.fixture(scope="module")
def models(tmp_path_factory, model) -> Models:
    recipe = load_recipe(write_recipe(tmp_path_factory.mktemp("models"), model, {"task": Path("none.jsonl")}))
    device = torch.device("cpu")
    return extraction.load_models(
        recipe, read_family(recipe.model), dtype=compute_dtype(recipe.extract.dtype, device), device=device
    )


class Task:
    """Rows of a target each, extracted into `sets`; `encoded` are the rows of the last launch that passed a model."""

    def __init__(self, home: Path, model: Path):
        self.home, self.model, self.encoded = home, model, []
        self.rows = [{"source_image": None, "target_image": f"{i}.png", "instruction": f"a {i}"} for i in range(ROWS)]
        for i in range(ROWS + 2):
            self.paint(i, seed=i)

    def paint(self, i: int, seed: int) -> None:
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(self.home / f"{i}.png")
        os.utime(self.home / f"{i}.png", times=(seed, seed))  # else two edits within a moment look the same

    def recipe(self, name: str = "sets") -> Path:
        settings = SETTINGS | {"output_dir": str(self.home / name)}
        return write_recipe(self.home, self.model, {"task": self.rows}, extract=settings)

    def run(self, *overrides: str, name: str = "sets") -> int:
        self.encoded.clear()
        return main([str(self.recipe(name)), *overrides])

    @property
    def folder(self) -> Path:
        return self.home / "sets" / "task"

    @property
    def reused(self) -> int:
        return read_provenance(self.folder)["record"]["counts"]["rows_reused"]

    def check(self, *overrides: str) -> None:
        """The set is what a first extraction of the same data leaves, byte for byte."""
        shutil.rmtree(self.home / "fresh", ignore_errors=True)
        encoded = [*self.encoded]
        self.run(*overrides, name="fresh")
        assert content(self.folder) == content(self.home / "fresh" / "task")
        counts = [
            read_provenance(home / "task")["record"]["counts"] for home in (self.folder.parent, self.home / "fresh")
        ]
        for name in ("rows_in", "rows_out", "rows_without_caption", "bad", "num_bytes"):
            assert counts[0][name] == counts[1][name]
        self.encoded[:] = encoded


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in files
        if path.name not in ("provenance.json", "recipe.yaml")
    }


@pytest.fixture
def task(tmp_path, model, models, monkeypatch) -> Task:
    """A task that is extracted; models are loaded once for all tests of a family."""
    made, encode_prompts = Task(tmp_path, model), ChunkWriter.encode_prompts

    def noted(self, rows, *rest):
        made.encoded.extend(row.columns["row"] for row in rows)
        return encode_prompts(self, rows, *rest)

    monkeypatch.setattr(ChunkWriter, "encode_prompts", noted)
    monkeypatch.setattr(extraction, "load_models", lambda *_, **__: models)
    assert made.run() == 0
    return made


def change_rows(change: Callable[[list[dict]], object]) -> Callable[[Task], object]:
    return lambda task: change(task.rows)


CHANGES = {
    "an image": (lambda task: task.paint(4, seed=90), [4]),
    "an image and back": (lambda task: [task.paint(4, seed=90), task.paint(4, seed=4)], None),
    "a caption": (change_rows(lambda rows: rows[1].update(instruction="other")), [1]),
    "no caption": (change_rows(lambda rows: rows[1].update(instruction=None)), [1]),
    "a row more": (change_rows(lambda rows: rows.insert(0, {**rows[0], "target_image": "7.png"})), [0]),
    "a row less": (change_rows(lambda rows: rows.pop(2)), []),
    "a row twice": (change_rows(lambda rows: rows.append(rows[0])), []),
    "another order": (change_rows(lambda rows: rows.reverse()), []),
    "an image gone": (lambda task: (task.home / "3.png").unlink(), []),
    "an inverse": (
        change_rows(lambda rows: rows[5].update(source_image="0.png", inverse_instruction="undo")),
        [5],
    ),
}


CASES = [("edit_plus", change) for change in CHANGES]
CASES += [("qwen_image_21", "an image"), ("qwen_image_21", "an inverse")]


@pytest.mark.parametrize(("model", "change"), CASES, indirect=["model"])
def test_only_rows_that_changed_pass_the_models_and_the_set_is_that_of_a_first_extraction(task, change):
    before = load_from_disk(task.folder)._fingerprint
    edit, redone = CHANGES[change]
    edit(task)
    assert task.run() == 0
    assert sorted(task.encoded) == (redone or [])
    assert (load_from_disk(task.folder)._fingerprint == before) == (redone is None)  # training compares it
    assert not (task.folder / "staging").exists()
    task.check()


@pytest.mark.parametrize("model", ["edit_plus", "qwen_image_21"], indirect=True)
def test_columns_of_inverses_come_and_go_with_the_rows_that_have_them(task):
    task.rows[5].update(source_image="0.png", inverse_instruction="undo")
    task.run()
    names = load_from_disk(task.folder).column_names
    assert f"inverse_{shared_embeds(names)}" in names
    task.rows.pop(5)
    task.run()
    assert task.encoded == []
    task.check()


def test_bad_rows_are_tried_again_and_listed_anew(task):
    whole = (task.home / "3.png").read_bytes()
    (task.home / "3.png").write_bytes(whole[:50])
    task.rows[0]["instruction"] = "<|image_pad|>"
    task.run()
    assert task.reused == ROWS - 2
    (task.home / "3.png").write_bytes(whole)
    task.run()
    assert task.encoded == [3]
    bad = [json.loads(line)["row"] for line in (task.folder / "bad_rows.jsonl").read_text().splitlines()]
    assert bad == [0]
    task.check()


def test_what_is_reused_and_what_is_not_is_said_once_and_so_is_a_set_that_is_left_alone(task, caplog):
    caplog.set_level(logging.INFO, logger="hf_qie")
    task.paint(4, seed=90)
    task.rows.pop(0)
    task.run()
    size = sum(path.stat().st_size for path in task.folder.glob("*.arrow"))
    told = int(re.search(r"about ([\d,]+) bytes to write", caplog.text)[1].replace(",", ""))
    assert size / 2 < told < 2 * size  # the old one stays until the new one is whole
    assert caplog.text.count("task: its data or images changed: 5 rows reused, 1 new or changed") == 1
    assert "6 rows in, 6 out (5 of them reused), 0 bad; " in caplog.text
    caplog.clear()
    task.run()
    assert "task: finished before: 6 rows in, 6 out (5 of them reused), 0 bad; delete " in caplog.text
    assert "tokens run" not in caplog.text


def test_a_finished_set_without_a_row_of_the_present_data_is_left_alone_unless_told_otherwise(task):
    before = content(task.folder)
    for i in range(ROWS):
        task.paint(i, seed=90 + i)
    with pytest.raises(InputError, match=r"another data \(size or time of their images changed in all of its 7 rows"):
        task.run()
    task.rows = [{**row, "instruction": "other"} for row in task.rows]
    with pytest.raises(InputError, match=r"another data \(the data changed in all of its 7 rows\); give"):
        task.run()
    assert content(task.folder) == before
    task.run("extract.overwrite=true")
    task.check()


def test_a_set_from_before_rows_had_digests_is_left_alone_while_its_data_are_the_same(task, caplog):
    caplog.set_level(logging.INFO, logger="hf_qie")
    provenance = json.loads((task.folder / PROVENANCE).read_text())
    record = provenance["record"]
    record["request"]["data"] = record["request"].pop("identity")
    del record["files"]["row_digests.npy"], record["counts"]["rows_reused"], record["counts"]["rows_without_caption"]
    (task.folder / "row_digests.npy").unlink()
    (task.folder / PROVENANCE).write_text(json.dumps(provenance))
    task.run()
    assert "task: finished before: " in caplog.text
    task.rows.pop()
    with pytest.raises(InputError, match="was made with another data; give another"):
        task.run()


def test_a_launch_that_is_killed_as_it_sets_a_set_aside_loses_nothing(task, monkeypatch):
    task.paint(0, seed=90)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(SetWriter, "_clean", lambda *_: (_ for _ in ()).throw(Killed))
        task.run()  # the set has its other name, and nothing says yet what is to be made of it
    assert not task.folder.exists()
    task.run()
    assert task.encoded == [0]
    task.check()


def test_no_row_is_reused_that_was_made_with_other_settings(task, monkeypatch):
    task.paint(0, seed=90)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(extraction, "write_chunks", lambda *_: (_ for _ in ()).throw(Killed))
        task.run()
    changed = "extract.image_sample_size=96", "extract.overwrite=true"
    with pytest.raises(InputError, match="was made with another image_sample_size; "):
        task.run(changed[0])
    task.run(*changed)
    assert task.encoded == [*range(ROWS)]
    task.check(changed[0])


def test_data_that_are_changed_back_while_a_set_is_made_anew_find_all_rows_again(task, monkeypatch):
    before = content(task.folder)
    task.rows.reverse()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ChunkWriter, "write", lambda *_, **__: (_ for _ in ()).throw(Killed))
        task.run()
    assert not (task.folder / PROVENANCE).exists()
    task.rows.reverse()
    task.run()
    assert task.encoded == []
    assert content(task.folder) == before


def test_of_a_killed_launch_only_chunks_of_the_present_images_are_kept(task, monkeypatch):
    shutil.rmtree(task.folder)
    write, chunks = ChunkWriter.write, []

    def killed(self, path, chunk, **settings):
        if chunks:
            raise Killed
        chunks.append(path)
        write(self, path, chunk, **settings)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ChunkWriter, "write", killed)
        task.run()
    for i in (1, 5):
        task.paint(i, seed=90)
    task.run()
    assert task.encoded == [1, 3, 4, 5, 6]
    task.check()


def test_a_longer_list_of_captions_leaves_the_other_rows_as_they_are(task):
    task.rows[1]["instruction"] = ["one", "two"]
    task.run()
    assert task.encoded == [1]
    task.rows[2]["instruction"] = ["one", "two", "three"]
    task.run()
    assert task.encoded == [2]
    assert "instruction_3" in load_from_disk(task.folder).column_names
    task.check()


def test_rows_of_a_file_that_is_damaged_are_extracted_again(task, monkeypatch, caplog):
    task.paint(0, seed=90)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(extraction, "write_chunks", lambda *_, **__: (_ for _ in ()).throw(Killed))
        task.run()
    (victim,) = task.home.glob("sets/.task-previous-0/data-00001-*")
    damaged = bytearray(victim.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    victim.write_bytes(damaged)
    task.run()
    assert task.encoded == [0, 3, 4, 5]
    assert "is not what was written; its rows are extracted again" in caplog.text
    task.check()


def test_an_image_that_is_edited_before_it_is_read_is_read_again_by_the_next_launch(task, monkeypatch):
    shutil.rmtree(task.folder)
    open_sets = extraction.open_sets

    def edited(*rest):
        opened = open_sets(*rest)
        task.paint(2, seed=90)  # between the first pass and the reading
        return opened

    with monkeypatch.context() as patch:
        patch.setattr(extraction, "open_sets", edited)
        task.run()
    task.run()
    assert task.encoded == [2]
    task.check()


# --- several launches on one set, by its files alone

FEATURES = Features({"row": Value("int64"), "target_image": Value("string")})


class Set(SetWriter):
    """A set of rows that are told by their names, one a chunk."""

    def __init__(self, home: Path, names: str):
        self.names = names.split()
        table = Dataset(pa.table({"digest": pa.array([name.encode().ljust(16) for name in self.names])}))
        extract = SimpleNamespace(shard=None, overwrite=False, dtype="auto", chunk_rows=1)
        plan = SimpleNamespace(
            rows=SimpleNamespace(table=table), folder=home / "task", extract=extract, features=FEATURES
        )
        request = {"compat": {"format": 1}, "data": names, "identity": names}
        super().__init__(plan, request)

    def start(self) -> None:
        self.open()

    def add_chunk(self) -> None:
        path, rows, lock = next(self.claims())
        with ArrowWriter(features=FEATURES, path=str(self.part(path))) as writer:
            writer.write_table(pa.table({"row": list(rows), "target_image": ["x"]}, schema=FEATURES.arrow_schema))
            writer.finalize()
        complete_chunk(self.part(path), path, Counts(rows_in=1, rows_out=1))
        lock.release()

    def finished(self) -> "Set":
        self.folder.mkdir()
        np.save(self.folder / "row_digests.npy", digests_of(self.plan.rows.table))
        (self.folder / "data-00000-of-00001.arrow").write_bytes(b"rows")
        record = {"model": "m", "request": self.request}
        (self.folder / PROVENANCE).write_text(json.dumps({"compat": self.request["compat"], "record": record}))
        return self


def test_a_launch_finds_out_that_another_one_has_begun_its_set_anew(tmp_path):
    one, two = Set(tmp_path, "a b c"), Set(tmp_path, "new a b")
    one.start()
    one.add_chunk()
    two.start()
    for other in (one.add_chunk, lambda: next(one.claims())):
        with pytest.raises(InputError, match="task: another launch began it anew, from other data"):
            other()
    assert not one.finish(dict)
    two.add_chunk()


def test_a_finished_set_that_is_being_made_anew_is_not_given_up_for_data_without_its_rows(tmp_path):
    Set(tmp_path, "a b").finished()
    Set(tmp_path, "a c").start()
    before = content(tmp_path)
    with pytest.raises(InputError, match=r"another data \(the data changed in all of its 2 rows\); give"):
        Set(tmp_path, "x y").start()
    assert content(tmp_path) == before
    Set(tmp_path, "b z").start()  # reuses a row of the previous one


def test_a_set_is_not_begun_anew_while_a_chunk_of_it_is_written(tmp_path):
    one, two = Set(tmp_path, "a b"), Set(tmp_path, "a c")
    one.start()
    _, _, lock = next(one.claims())
    before = content(tmp_path)
    with pytest.raises(InputError, match=rf"task: in use by process {os.getpid()} on "):
        two.start()
    assert content(tmp_path) == before
    lock.release()
    two.start()
    assert json.loads((two.folder / "staging" / "request.json").read_text()) == two.request


def test_a_set_that_another_launch_has_finished_is_left_as_it_is(tmp_path):
    one = Set(tmp_path, "a").finished()
    before = content(tmp_path)
    assert not one.finish(dict)
    assert content(tmp_path) == before


def test_a_set_is_opened_by_one_launch_at_a_time(tmp_path):
    one = Set(tmp_path, "a")
    with set_lock(one.folder):
        other = threading.Thread(target=one.start)
        other.start()
        other.join(0.2)
        assert other.is_alive() and not one.folder.exists()
    other.join()
    assert (one.folder / "staging" / "request.json").exists()
    assert list(tmp_path.iterdir()) == [one.folder]
