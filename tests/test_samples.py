"""Data becomes rows, or says in which file, line and column what is wrong and what to do."""

import json
import os
from pathlib import Path

import pytest

from hf_qie.config.data import Columns
from hf_qie.config.recipe import Extract, Task
from hf_qie.data.samples import Rows, read_rows
from hf_qie.errors import InputError

IMAGES = ("a.png", "b.png", "c.png")
ROW = {"source_image": "a.png", "target_image": "b.png", "instruction": "Paint it red."}


@pytest.fixture
def data(tmp_path):
    """`data(lines, name)` -> a JSONL file of `lines`, dicts or raw text, beside three files for images."""
    for name in IMAGES:
        (tmp_path / name).touch()

    def write(lines, name="data.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        raw = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
        path.write_text("\n".join(raw) + "\n", encoding="utf-8")
        return path

    return write


def task_of(*files, **settings) -> Task:
    settings.setdefault("columns", Columns())
    return Task(name="faces", data=tuple(map(str, files)), **settings)


def read(tmp_path: Path, *files, max_sources=None, extract=None, **settings) -> Rows:
    (tmp_path / "tables").mkdir(exist_ok=True)
    task = task_of(*files, **settings)
    return read_rows(task, folder=tmp_path / "tables", max_sources=max_sources, extract=extract)


def refusal(tmp_path: Path, *files, **settings) -> str:
    """The message with which reading ends."""
    with pytest.raises(InputError) as error:
        read(tmp_path, *files, **settings)
    return str(error.value)


def columns_of(*captions: str, inverse: tuple[str, ...] = (), **names: str) -> Columns:
    """Columns as the recipe gives them: the caption columns that it names are required."""
    return Columns(captions=captions, inverse_captions=inverse, **names)


# --- what is read


def test_sources_are_none_one_or_many_in_their_order(data, tmp_path):
    sources = [None, "", "a.png", [], ["b.png"], ["c.png", "a.png", "c.png"]]
    rows = read(tmp_path, data([{**ROW, "source_image": given} for given in sources]))
    assert rows.table["sources"][:] == [[], [], ["a.png"], [], ["b.png"], ["c.png", "a.png", "c.png"]]
    assert rows.table["row"][:] == [0, 1, 2, 3, 4, 5]
    assert set(rows.table["root"]) == {str(tmp_path)}


def test_a_missing_null_or_blank_caption_is_none(data, tmp_path):
    bare = {"source_image": "a.png", "target_image": "b.png"}
    captions = [{"instruction": "x"}, {}, {"instruction": None}, {"instruction": ""}, {"instruction": " \n\t　"}]
    rows = read(tmp_path, data([bare | more for more in captions]))
    assert [texts["instruction"] for texts in rows.table["texts"]] == ["x", None, None, None, None]
    assert {texts["instruction_cn"] for texts in rows.table["texts"]} == {None}


def test_captions_keep_every_character(data, tmp_path):
    caption = '  把天空变红 🙂 "quoted" \\ {braces}\n\ttwo lines '
    rows = read(tmp_path, data([{**ROW, "instruction": caption}]))
    assert rows.table[0]["texts"]["instruction"] == caption


def test_columns_may_have_any_name(data, tmp_path):
    line = {"before": ["a.png"], "after": "b.png", "target": "a caption", "root": "another", "row": "ignored"}
    columns = columns_of("target", "root", sources="before", target="after")
    (row,) = read(tmp_path, data([line]), columns=columns).table
    assert len(row.pop("digest")) == 16
    assert row == {
        "bad": None,
        "row": 0,
        "sources": ["a.png"],
        "target": "b.png",
        "root": str(tmp_path),
        "texts": {"target": "a caption", "root": "another"},
    }


def test_files_follow_each_other_and_globs_are_sorted(data, tmp_path):
    for i in (10, 2, 1):
        data([{**ROW, "instruction": f"file {i}"}], f"part-{i:02d}.jsonl")
    last = data([{**ROW, "instruction": "last"}], "a.jsonl")
    rows = read(tmp_path, tmp_path / "part-*.jsonl", last)
    assert [texts["instruction"] for texts in rows.table["texts"]] == ["file 1", "file 2", "file 10", "last"]
    assert rows.table["row"][:] == [0, 1, 2, 3]


def test_a_file_name_may_have_brackets(data, tmp_path):
    assert len(read(tmp_path, data([ROW], "data[1].jsonl")).table) == 1


def test_each_file_starts_paths_at_its_own_folder(data, tmp_path):
    for name in ("one", "two"):
        data([ROW], f"{name}/data.jsonl")
        for image in IMAGES:
            (tmp_path / name / image).touch()
    rows = read(tmp_path, tmp_path / "*" / "data.jsonl")
    assert rows.table["root"][:] == [str(tmp_path / "one"), str(tmp_path / "two")]


def test_image_root_and_absolute_paths(data, tmp_path):
    file = data([{**ROW, "target_image": str(tmp_path / "b.png")}], "deep/data.jsonl")
    assert len(read(tmp_path, file, image_root=str(tmp_path)).table) == 1
    assert f"relative paths start from {tmp_path}/deep; " in refusal(tmp_path, file)


def test_blank_lines_and_a_byte_order_mark_do_not_count(data, tmp_path):
    file = data(["\ufeff" + json.dumps(ROW), "", "  ", ROW])
    assert read(tmp_path, file).table["row"][:] == [0, 1]
    file = data([ROW, "", "{"])
    assert refusal(tmp_path, file).startswith(f"{file}:3: invalid JSON")


def test_t2i_ignores_sources(data, tmp_path):
    lines = [{**ROW, "source_image": ["not.there", 7]}, {**ROW, "source_image": None}]
    assert read(tmp_path, data(lines), t2i=True, max_sources=0).table["sources"][:] == [[], []]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"inverse_instruction": "back"}, True),
        ({"inverse_instruction_cn": "复原"}, True),
        ({"inverse_instruction": " "}, False),
        ({"inverse_instruction": "back", "source_image": ["a.png", "c.png"]}, False),
        ({"inverse_instruction": "back", "source_image": None}, False),
        ({}, False),
    ],
)
def test_an_inverse_takes_one_source_and_an_inverse_caption(data, tmp_path, more, expected):
    assert read(tmp_path, data([ROW, ROW | more])).has_inverse is expected


def digests(tmp_path: Path, *files, **settings) -> list[bytes]:
    return read(tmp_path, *files, **settings).table["digest"][:]


def test_the_digest_of_a_row_changes_with_what_it_is_made_from_and_with_nothing_else(data, tmp_path):
    lines = [ROW, {**ROW, "source_image": "c.png"}]
    one = digests(tmp_path, data(lines))
    assert digests(tmp_path, data([{**line, "note": "not used"} for line in lines], "again.jsonl")) == one
    assert digests(tmp_path, data(lines[::-1])) == one[::-1]
    for more in ({"instruction": "x"}, {"inverse_instruction": "x"}, {"source_image": ["a.png", "a.png"]}):
        assert digests(tmp_path, data([lines[0], lines[1] | more]))[0] == one[0]
        assert digests(tmp_path, data([lines[0], lines[1] | more]))[1] != one[1]
    assert not set(digests(tmp_path, data(lines), t2i=True)) & set(one)


@pytest.mark.parametrize("edit", ["size", "time", "removed"])
def test_the_digest_of_a_row_changes_with_its_image_files(data, tmp_path, edit):
    file = data([ROW, {**ROW, "source_image": "c.png"}])
    rows = read(tmp_path, file)
    before, digest = rows.table["digest"][:], rows.digest
    path = tmp_path / "c.png"
    if edit == "size":
        path.write_text("other")
        os.utime(path, ns=(0, (tmp_path / "a.png").stat().st_mtime_ns))
    elif edit == "time":
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))
    else:
        path.unlink()
    rows = read(tmp_path, file)
    assert [a == b for a, b in zip(before, rows.table["digest"], strict=True)] == [True, False]
    assert digest != rows.digest


# --- several columns of sources, lists of captions


def test_several_columns_of_sources_are_one_list_in_their_order(data, tmp_path):
    lines = [
        {"control_1": "c.png", "control_0": "a.png"},
        {"control_0": None, "control_1": "a.png"},
        {"control_0": "", "control_1": None},
        {"control_0": "c.png"},
    ]
    columns = columns_of("instruction", sources=("control_0", "control_1"))
    file = data([line | {"target_image": "b.png", "instruction": "x"} for line in lines])
    rows = read(tmp_path, file, columns=columns)
    assert rows.table["sources"][:] == [["a.png", "c.png"], ["a.png"], [], ["c.png"]]
    data([{"control_0": "gone.png", "control_1": None, "target_image": "b.png", "instruction": "x"}])
    message = refusal(tmp_path, file, columns=columns)
    assert message.startswith(f"{file}:1: control_0, control_1: gone.png: No such file or directory")


def test_each_column_of_sources_must_occur(data, tmp_path):
    file = data([ROW])
    assert refusal(tmp_path, file, columns=columns_of("instruction", sources=("source_image", "control"))) == (
        "tasks.faces.columns.sources: no row has control; there are instruction, source_image, target_image: "
        "name the column, or set tasks.faces.t2i: true"
    )


def test_a_list_of_captions_becomes_columns_and_so_does_its_inverse(data, tmp_path):
    captions = ["one", ["one", " ", "two", None, "three"], [], None]
    inverses = [["back", "undo"], "back", None, []]
    lines = [
        {**ROW, "instruction": caption, "inverse_instruction": inverse, "instruction_cn": "红"}
        for caption, inverse in zip(captions, inverses, strict=True)
    ]
    rows = read(tmp_path, data(lines))
    names = ("instruction", "instruction_2", "instruction_3", "instruction_cn")
    assert rows.columns.captions == names
    assert rows.columns.inverse_captions == tuple(f"inverse_{name}" for name in names)  # the i-th of the i-th
    assert [[texts[name] for name in names[:3]] for texts in rows.table["texts"]] == [
        ["one", None, None],
        ["one", "two", "three"],
        [None] * 3,
        [None] * 3,
    ]
    assert [texts["inverse_instruction_2"] for texts in rows.table["texts"]] == ["undo", None, None, None]
    assert rows.table[3]["texts"]["instruction_cn"] == "红"
    assert rows.has_inverse


def test_lists_of_captions_leave_those_of_other_columns_as_they_are(data, tmp_path):
    rows = read(tmp_path, data([ROW]))
    assert rows.columns == Columns()


def test_a_list_of_captions_that_cannot_be_columns_is_refused(data, tmp_path):
    file = data([ROW | {"instruction": ["x", "y"], "instruction_2": "z"}])
    assert refusal(tmp_path, file, columns=columns_of("instruction", "instruction_2")) == (
        "tasks.faces.columns: the captions in the lists become columns, and instruction_2 is one already; "
        "rename the column"
    )


# --- paths as other systems and programs write them


def test_a_list_in_a_string_is_read_as_json_or_python_writes_it(data, tmp_path):
    given = ['["a.png", "b.png"]', "['a.png', 'b.png']", "[]"]
    rows = read(tmp_path, data([{**ROW, "source_image": one} for one in given]))
    assert rows.table["sources"][:] == [["a.png", "b.png"], ["a.png", "b.png"], []]


def test_backslashes_and_file_urls_name_files(data, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a b.png").touch()
    sources = ["sub\\a b.png", f"file://{tmp_path}/sub/a%20b.png"]
    rows = read(
        tmp_path, data([{**ROW, "source_image": sources, "target_image": f"file://localhost{tmp_path}/b.png"}])
    )
    assert rows.table[0]["sources"] == ["sub/a b.png", f"{tmp_path}/sub/a b.png"]
    assert rows.table[0]["target"] == f"{tmp_path}/b.png"


# --- what is wrong with a row, and what with the task: one message each, in full


BAD_LINES = {
    '{"source_image": ': (
        "invalid JSON (Expecting value: line 2 column 1 (char 18)); expected one JSON object in each line"
    ),
    '["a.png"]': 'got ["a.png"], expected a JSON object with columns',
    "null": "got null, expected a JSON object with columns",
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.items())
def test_a_line_that_is_no_json_is_named_by_file_and_line(data, tmp_path, line, message):
    file = data([ROW, line, ROW])
    assert refusal(tmp_path, file) == f"{file}:2: {message}"


PATH, TEXT = "expected the path or URL of an image", "expected a string or null"
PASSWORD = "the URL holds a user name or password, which would be stored with the row; leave it out"
BAD_ROWS = {
    '{"target_image": null}': ("target_image", None, f"got null, {PATH}"),
    '{"target_image": ""}': ("target_image", '""', f"got an empty string, {PATH}"),
    '{"target_image": ["b.png"]}': ("target_image", '["b.png"]', f"got list, {PATH}"),
    '{"target_image": 7.5}': ("target_image", "7.5", f"got float, {PATH}"),
    '{"target_image": true}': ("target_image", "true", f"got bool, {PATH}"),
    '{"target_image": "folder"}': ("target_image", "folder", "a folder or device, not a file"),
    '{"target_image": "gone.png"}': ("target_image", "gone.png", "No such file or directory"),
    '{"target_image": "a.png/b.png"}': ("target_image", "a.png/b.png", "Not a directory"),
    '{"target_image": "nul\\u0000"}': ("target_image", "nul\0", "No such file or directory"),
    '{"target_image": "half \\ud83d"}': ("target_image", '"half ?"', f"got text that is not UTF-8, {PATH}"),
    '{"source_image": ["a.png", "gone.png"]}': ("source_image", "gone.png", "No such file or directory"),
    '{"source_image": 3}': ("source_image", "3", f"got int, {PATH}"),
    '{"source_image": ["a.png", null]}': ("source_image", None, f"got null, {PATH}"),
    '{"source_image": ["a.png", ""]}': ("source_image", '""', f"got an empty string, {PATH}"),
    '{"source_image": [["a.png"]]}': ("source_image", '["a.png"]', f"got list, {PATH}"),
    '{"source_image": {"bytes": "eA=="}}': ("source_image", '{"bytes": "eA=="}', f"got dict, {PATH}"),
    '{"source_image": "https://me:secret@example.org/a.png"}': ("source_image", "https://example.org/a.png", PASSWORD),
    '{"source_image": ["a.png", "c.png", "a.png"]}': (
        *("source_image", None, "3 sources, this checkpoint takes 2; use a checkpoint that takes more"),
    ),
    '{"instruction": [["x"]]}': ("instruction", None, f"got list, {TEXT}"),
    f'{{"instruction": {json.dumps(["x"] * 17)}}}': (
        *("instruction", None, "17 captions, at most 16 are stored; shorten the list"),
    ),
    '{"source_image": "file://[x"}': ("source_image", "file://[x", "No such file or directory"),
    '{"source_image": "[{[]}]"}': ("source_image", "[{[]}]", "No such file or directory"),
    '{"instruction": NaN}': ("instruction", None, f"got float, {TEXT}"),
    '{"inverse_instruction_cn": "half \\ud83d"}': (
        "inverse_instruction_cn",
        None,
        f"got text that is not UTF-8, {TEXT}",
    ),
}


@pytest.mark.parametrize(("line", "bad"), BAD_ROWS.items())
def test_a_bad_row_is_marked_with_column_path_and_reason_and_the_others_stay(data, tmp_path, line, bad):
    (tmp_path / "folder").mkdir()
    line = f"{json.dumps(ROW)[:-1]}, {line[1:]}"  # of a name that occurs twice the last value holds
    good, row, last = read(tmp_path, data([ROW, line, ROW]), max_sources=2).table
    assert good["bad"] is last["bad"] is None and good["digest"] == last["digest"] != row["digest"]
    assert row["bad"] == dict(zip(("column", "path", "reason"), bad, strict=True))
    assert (row["sources"], row["target"], set(row["texts"].values())) == ([], None, {None})


def test_a_row_without_target_is_bad(data, tmp_path):
    _, row = read(tmp_path, data([ROW, {"source_image": "a.png"}])).table
    assert row["bad"] == {"column": "target_image", "path": None, "reason": "missing"}


def test_bad_rows_are_refused_where_the_recipe_allows_fewer(data, tmp_path):
    lines = [ROW, *({**ROW, "source_image": ["a.png", f"gone_{i}.png"]} for i in range(4))]
    lines += [{**ROW, "target_image": f"{i}.png"} for i in range(2)] + [{**ROW, "instruction": 7}, ROW, ROW]
    file = data(lines)
    assert len(read(tmp_path, file, extract=Extract(max_bad_share=0.7)).table) == 10
    with pytest.raises(InputError) as error:
        read(tmp_path, file, extract=Extract(max_bad_share=0.65))
    assert str(error.value).splitlines() == [
        *(f"{file}:{i + 2}: source_image: gone_{i}.png: No such file or directory" for i in range(4)),
        f"{file}:6: target_image: 0.png: No such file or directory",
        "tasks.faces: 7 of 10 rows are bad, extract.max_bad_share allows 6:",
        "  4: source_image: No such file or directory",
        "  2: target_image: No such file or directory",
        "  1: instruction: got int, expected a string or null",
        f"relative paths start from {tmp_path}; name another folder with tasks.faces.image_root",
        "the columns in the data are instruction, source_image, target_image; name others with tasks.faces.columns",
    ]
    with pytest.raises(InputError) as error:
        read(tmp_path, file, extract=Extract(on_bad_row="fail", max_bad_share=1.0))
    assert str(error.value) == (
        f"{file}:2: source_image: gone_0.png: No such file or directory; fix it, or set extract.on_bad_row: skip to "
        "list such rows"
    )


def test_one_bad_row_is_always_allowed_and_none_usable_never(data, tmp_path):
    bad = {**ROW, "target_image": None}
    assert len(read(tmp_path, data([bad, ROW]), extract=Extract(max_bad_share=0.0)).table) == 2
    assert "2 of 3 rows are bad, extract.max_bad_share allows 1:" in refusal(
        tmp_path, data([bad, bad, ROW]), extract=Extract(max_bad_share=0.0)
    )
    file = data([bad, bad])
    for extract in (None, Extract(max_bad_share=1.0)):
        assert refusal(tmp_path, file, extract=extract).splitlines() == [
            *(f"{file}:{i}: target_image: got null, expected the path or URL of an image" for i in (1, 2)),
            "tasks.faces: 2 of 2 rows are bad, none is left:",
            "  2: target_image: got null, expected the path or URL of an image",
            f"relative paths start from {tmp_path}; name another folder with tasks.faces.image_root",
            "the columns in the data are instruction, source_image, target_image; name others with "
            "tasks.faces.columns",
        ]


def test_bytes_that_are_no_utf_8_are_named(tmp_path):
    file = tmp_path / "latin.jsonl"
    file.write_bytes(b'{"instruction": "caf\xe9"}\n')
    assert refusal(tmp_path, file).startswith(f"{file}:1: invalid JSON ('utf-8' codec can't decode byte 0xe9")


def test_a_part_of_a_byte_order_mark_is_no_blank_line(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_bytes(b"\xef\n")
    assert refusal(tmp_path, file).startswith(f"{file}:1: invalid JSON")


def test_a_long_value_is_cut(data, tmp_path):
    for value in ("x" * 10_000, ["x" * 10_000]):
        assert len(refusal(tmp_path, data([{**ROW, "target_image": value}]))) < 1000


def test_no_row_with_a_target_column_is_an_error_of_the_task(data, tmp_path):
    file = data([{"source_image": "a.png", "after": "b.png"}] * 3)
    assert refusal(tmp_path, file, extract=Extract(max_bad_share=1.0)) == (
        "tasks.faces.columns.target: no row has target_image; there are after, source_image: name the column"
    )


def test_a_mistyped_source_column_does_not_become_text_to_image(data, tmp_path):
    file = data([{"input_image": "a.png", "target_image": "b.png", "instruction": "x"}])
    assert refusal(tmp_path, file) == (
        "tasks.faces.columns.sources: no row has source_image; there are input_image, instruction, target_image: "
        "name the column, or set tasks.faces.t2i: true"
    )


def test_of_captions_that_the_recipe_names_each_must_occur(data, tmp_path):
    file = data([{**ROW, "undo": "back"}])
    columns = columns_of("instruction", "prompt", inverse=("undo", "undo_cn"))
    assert refusal(tmp_path, file, columns=columns) == (
        "tasks.faces.columns: no row has prompt, undo_cn; there are instruction, source_image, target_image, undo"
    )
    assert len(read(tmp_path, file, columns=columns_of("instruction", inverse=("undo",))).table) == 1


def test_of_the_default_captions_at_least_one_must_occur(data, tmp_path):
    file = data([{"source_image": "a.png", "target_image": "b.png", "prompt": "x"}])
    assert refusal(tmp_path, file) == (
        "tasks.faces.columns.captions: no row has instruction or instruction_cn; "
        "there are prompt, source_image, target_image: name the caption columns"
    )
    only_chinese = {"source_image": "a.png", "target_image": "b.png", "instruction_cn": "变红"}
    assert len(read(tmp_path, data([only_chinese])).table) == 1


@pytest.mark.parametrize(
    ("max_sources", "remedy"),
    [
        (1, "this checkpoint takes 1; use a checkpoint that takes more"),
        (0, "this checkpoint takes 0; use a checkpoint that takes more, or set tasks.faces.t2i: true"),
    ],
)
def test_more_sources_than_the_checkpoint_takes_are_refused_with_the_remedy(data, tmp_path, max_sources, remedy):
    file = data([{**ROW, "source_image": ["a.png", "c.png"]}])
    message = refusal(tmp_path, file, max_sources=max_sources)
    assert message.startswith(f"{file}:1: source_image: 2 sources, {remedy}\n")


def test_data_that_is_not_there_or_empty_is_refused(data, tmp_path):
    assert refusal(tmp_path, tmp_path / "no-*.jsonl") == (
        f"tasks.faces.data: file not found: {tmp_path}/no-*.jsonl (from {Path.cwd()})"
    )
    empty = data(["", " "])
    assert refusal(tmp_path, empty) == f"tasks.faces.data: {empty} holds no rows"
