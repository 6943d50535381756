"""Data becomes rows, or says in which file, line and column what is wrong and what to do."""

import json
from pathlib import Path

import pytest

from hf_qie.recipe import Columns, InputError, Task
from hf_qie.rows import Rows, read_rows

PICTURES = ("a.png", "b.png", "c.png")
ROW = {"source_image": "a.png", "target_image": "b.png", "instruction": "Paint it red."}


@pytest.fixture
def data(tmp_path):
    """`data(lines, name)` -> a JSONL file of `lines`, dicts or raw text, beside three files for pictures."""
    for name in PICTURES:
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


def read(tmp_path: Path, *files, max_sources=None, **settings) -> Rows:
    (tmp_path / "tables").mkdir(exist_ok=True)
    return read_rows(task_of(*files, **settings), folder=tmp_path / "tables", max_sources=max_sources)


def refusal(tmp_path: Path, *files, **settings) -> str:
    """The message with which reading ends."""
    with pytest.raises(InputError) as error:
        read(tmp_path, *files, **settings)
    return str(error.value)


def columns_of(*captions: str, inverse: tuple[str, ...] = (), **names: str) -> Columns:
    """Columns as the recipe gives them: the caption columns that it names are required."""
    return Columns(captions=captions, inverse_captions=inverse, required=(*captions, *inverse), **names)


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
    assert row == {
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
        for picture in PICTURES:
            (tmp_path / name / picture).touch()
    rows = read(tmp_path, tmp_path / "*" / "data.jsonl")
    assert rows.table["root"][:] == [str(tmp_path / "one"), str(tmp_path / "two")]


def test_image_root_and_absolute_paths(data, tmp_path):
    file = data([{**ROW, "target_image": str(tmp_path / "b.png")}], "deep/data.jsonl")
    assert len(read(tmp_path, file, image_root=str(tmp_path)).table) == 1
    assert "no file" in refusal(tmp_path, file)


def test_blank_lines_and_a_byte_order_mark_do_not_count(data, tmp_path):
    file = data(["\ufeff" + json.dumps(ROW), "", "  ", ROW])
    assert read(tmp_path, file).table["row"][:] == [0, 1]
    file = data([ROW, "", "{"])
    assert refusal(tmp_path, file).startswith(f"{file}:3: no JSON")


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


def test_the_digest_changes_with_any_byte_and_with_nothing_else(data, tmp_path):
    one = read(tmp_path, data([ROW])).digest
    assert read(tmp_path, data([ROW], "again.jsonl")).digest == one
    assert read(tmp_path, data([{**ROW, "note": "not used"}])).digest != one


# --- what is refused: one message each, in full


BAD_LINES = {
    '{"source_image": ': "no JSON (Expecting value: line 2 column 1 (char 18)); each line has to be one JSON object",
    '["a.png"]': '["a.png"] is no JSON object with columns',
    "null": "null is no JSON object with columns",
    '{"source_image": "a.png", "instruction": "x"}': (
        "target_image: missing, there are source_image, instruction; name the column with tasks.faces.columns.target"
    ),
    '{"source_image": "a.png", "target_image": null}': (
        "target_image: null is no path; name the column with tasks.faces.columns.target"
    ),
    '{"source_image": "a.png", "target_image": ["b.png"]}': (
        'target_image: ["b.png"] is no path; name the column with tasks.faces.columns.target'
    ),
    '{"source_image": 3, "target_image": "b.png"}': "source_image: 3 is no path, list of paths or null",
    '{"source_image": ["a.png", null], "target_image": "b.png"}': (
        'source_image: ["a.png", null] is no path, list of paths or null'
    ),
    '{"source_image": {"bytes": "eA=="}, "target_image": "b.png"}': (
        'source_image: {"bytes": "eA=="} is no path, list of paths or null'
    ),
    '{"source_image": "a.png", "target_image": "b.png", "instruction": ["x"]}': (
        'instruction: ["x"] is no text (in UTF-8) or null'
    ),
    '{"source_image": "a.png", "target_image": "b.png", "instruction": NaN}': (
        "instruction: NaN is no text (in UTF-8) or null"
    ),
    '{"source_image": "a.png", "target_image": "b.png", "instruction": "half \\ud83d"}': (
        'instruction: "half \ud83d" is no text (in UTF-8) or null'
    ),
    '{"source_image": "https://me:secret@example.org/a.png", "target_image": "b.png"}': (
        "source_image: the URL holds a user name or password, which would be stored with the row; leave it out"
    ),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.items())
def test_a_bad_line_is_named_by_file_line_and_column(data, tmp_path, line, message):
    file = data([ROW, line, ROW])
    assert refusal(tmp_path, file) == f"{file}:2: {message}"


def test_bytes_that_are_no_utf_8_are_named(tmp_path):
    file = tmp_path / "latin.jsonl"
    file.write_bytes(b'{"instruction": "caf\xe9"}\n')
    assert refusal(tmp_path, file).startswith(f"{file}:1: no JSON ('utf-8' codec can't decode byte 0xe9")


def test_a_long_value_is_cut_to_a_line(data, tmp_path):
    message = refusal(tmp_path, data([{**ROW, "instruction": ["x" * 10_000]}]))
    assert len(message) < 300 and "xxx... is no text" in message


def test_of_many_missing_pictures_all_are_counted_and_five_named(data, tmp_path):
    lines = [ROW, *({**ROW, "source_image": ["a.png", f"gone_{i}.png"]} for i in range(4))]
    lines += [{**ROW, "target_image": f"{i}.png"} for i in range(3)]
    file = data(lines)
    assert refusal(tmp_path, file).splitlines() == [
        *(f"{file}:{i + 2}: source_image: no file {tmp_path}/gone_{i}.png" for i in range(4)),
        f"{file}:6: target_image: no file {tmp_path}/0.png",
        "7 pictures are missing; paths are relative to tasks.faces.image_root, by default the folder of the data file",
    ]


@pytest.mark.parametrize("path", [".", "x" * 5000, "nul\0", "data:image/png;base64," + "A" * 5000])
def test_what_can_be_no_file_counts_as_missing(data, tmp_path, path):
    assert "1 pictures are missing" in refusal(tmp_path, data([{**ROW, "target_image": path}]))


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
        (1, "this checkpoint takes 1; use an Edit-Plus checkpoint"),
        (0, "this checkpoint takes 0; use an Edit-Plus checkpoint or set tasks.faces.t2i: true"),
    ],
)
def test_more_sources_than_the_checkpoint_takes_are_refused(data, tmp_path, max_sources, remedy):
    file = data([{**ROW, "source_image": ["a.png", "c.png"]}])
    message = refusal(tmp_path, file, max_sources=max_sources)
    assert message == f"{file}:1: source_image: 2 sources, {remedy}"


def test_data_that_is_not_there_or_empty_is_refused(data, tmp_path):
    assert refusal(tmp_path, tmp_path / "no-*.jsonl") == (
        f"tasks.faces.data: no file {tmp_path}/no-*.jsonl (looked from {Path.cwd()})"
    )
    empty = data(["", " "])
    assert refusal(tmp_path, empty) == f"tasks.faces.data: {empty} holds no rows"
