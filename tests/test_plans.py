"""Of several ranks one reads the data, and all end with what it finds wrong."""

import json
import time

import pytest
from datasets import load_from_disk
from launches import Launch
from small_recipes import write_recipe

GONE = "target_image: gone.png: No such file or directory"


@pytest.mark.two_rank
def test_the_first_rank_alone_looks_at_files_and_all_end_with_what_it_finds_wrong(tmp_path, tiny, edits):
    lines = (edits / "text_to_image.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:8]]
    rows = [row | {"target_image": str(edits / row["target_image"])} for row in rows]
    rows[1]["target_image"] = rows[6]["target_image"] = "gone.png"
    settings = {"batch_size": 1, "chunk_rows": 2, "max_bad_share": 0.25}
    recipe, notes = write_recipe(tmp_path, tiny(), {"task": rows}, extract=settings), tmp_path / "notes"
    refused = Launch(recipe, "extract.max_bad_share=0.1", notes=notes, ranks=2)
    started = time.monotonic()
    assert refused.join(60) == [1, 1]
    said = notes.with_suffix(".log").read_text()
    assert time.monotonic() - started < 30, said  # before one would take the other for dead
    assert (
        said.count(f"InputError: {tmp_path}/task.jsonl:2: {GONE}\n{tmp_path}/task.jsonl:7: {GONE}\ntasks.task: ") == 2
    )
    assert not notes.exists()

    assert Launch(recipe, notes=notes, ranks=2).join(120) == [0, 0], notes.with_suffix(".log").read_text()
    assert set(notes.with_suffix(".looked").read_text()) == {"0"}
    assert load_from_disk(tmp_path / "sets" / "task")["row"][:] == [0, 2, 3, 4, 5, 7]
    bad = (tmp_path / "sets" / "task" / "bad_rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(row)["row"] for row in bad] == [1, 6]
    assert [path.name for path in (tmp_path / "sets").iterdir()] == ["task"]
