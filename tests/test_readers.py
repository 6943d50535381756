"""The same rows, told in any kind of data, are the same lines; what is wrong with them is named with its place."""

import csv
import gzip
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict, DatasetInfo, Features, Image, List, Value, load_from_disk
from datasets.info import DatasetInfosDict
from hub import Hub
from huggingface_hub import DatasetCardData
from image_server import ImageServer, image_server
from pyarrow import parquet

from hf_qie.config.data import Columns
from hf_qie.config.recipe import Extract, Task
from hf_qie.data import tables
from hf_qie.data.readers import open_data
from hf_qie.data.samples import read_rows
from hf_qie.data.tables import Embedded
from hf_qie.errors import InputError
from hf_qie.extraction.run import TOO_MANY_BAD

TEXT = "text_embeds_"
TEXTS = ("instruction", "instruction_cn", "inverse_instruction")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """What datasets makes of Parquet lies in the test's own folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def rows(edits) -> list[dict]:
    """Six rows of no, one, two and three sources; relative paths start at the folder of the edits."""
    lines = {name: (edits / f"{name}.jsonl").read_text("utf-8").splitlines() for name in ("edit", "combine")}
    found = [json.loads(line) for line in (*lines["edit"][:3], *lines["combine"][:2])]
    found.append(json.loads((edits / "text_to_image.jsonl").read_text("utf-8").splitlines()[0]))
    assert [row["source_image"] and len(as_list(row["source_image"])) for row in found] == [1, 1, 1, 2, 3, None]
    wanted = ("source_image", "target_image", *TEXTS)
    return [{name: row.get(name) for name in wanted} for row in found]


def as_list(value) -> list:
    return value if isinstance(value, list) else [value] if value else []


# --- the kinds, each written as its users write it


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def write_csv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", encoding="utf-8-sig", newline="") as file:  # with the mark of Excel
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            several = isinstance(row["source_image"], list)
            writer.writerow(row | ({"source_image": json.dumps(row["source_image"])} if several else {}))
    return path


def embedded(rows: list[dict], folder: Path, *, names: bool = False) -> Dataset:
    """The rows with the images in them, all under one file name or none, as `datasets.Image` stores them."""

    def stored_image(path: str) -> dict:
        return {"bytes": (folder / path).read_bytes(), "path": "image.png" if names else None}

    texts = dict.fromkeys(TEXTS, Value("string"))
    features = Features({"source_image": List(Image()), "target_image": Image()} | texts)
    return Dataset.from_list(
        [
            row
            | {
                "source_image": row["source_image"] and [stored_image(path) for path in as_list(row["source_image"])],
                "target_image": stored_image(row["target_image"]),
            }
            for row in rows
        ],
        features=features,
    )


def task_of(*data: Path | str, **more) -> Task:
    columns = Columns(captions=TEXTS[:2], inverse_captions=TEXTS[2:])
    return Task(name="a", data=tuple(map(str, data)), **{"columns": columns} | more)


def read(task: Task) -> list[tuple]:
    lines, _ = open_data(task, hashlib.sha256())
    return list(lines)


def digest_of(task: Task) -> str:
    digest = hashlib.sha256()
    lines, _ = open_data(task, digest)
    assert list(lines)
    return digest.hexdigest()


def message(task: Task) -> str:
    with pytest.raises(InputError) as error:
        read(task)
    return str(error.value)


# --- what the lines hold


def test_csv_gives_the_rows_of_jsonl(tmp_path, edits, rows):
    task = {"image_root": str(edits)}
    one, other = (
        read_rows(task_of(write(tmp_path / f"a.{kind}", rows), **task), folder=tmp_path)
        for kind, write in (("jsonl", write_jsonl), ("csv", write_csv))
    )
    assert one.table[:] == other.table[:]
    assert one.table["sources"][:] == [as_list(row["source_image"]) for row in rows]


def test_a_table_of_paths_gives_the_rows_of_jsonl(tmp_path, edits, rows):
    rows = [row | {"source_image": as_list(row["source_image"])} for row in rows]
    data = Dataset.from_list(rows)
    parquet.write_table(data.with_format("arrow")[:], tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved")
    tables = [
        read_rows(task_of(tmp_path / name, image_root=str(edits)), folder=tmp_path).table[:]
        for name in (write_jsonl(tmp_path / "a.jsonl", rows).name, "a.parquet", "saved")
    ]
    assert tables[0] == tables[1] == tables[2]


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_images_in_the_data_are_read_by_their_names(tmp_path, edits, rows, kind):
    data = embedded(rows, edits, names=True)
    if kind == "saved":
        data.save_to_disk(tmp_path / "a.saved")
    else:
        parquet.write_table(data.with_format("arrow")[:], tmp_path / "a.parquet")
    found = read_rows(task_of(tmp_path / f"a.{kind}"), folder=tmp_path)
    assert found.table[3]["sources"] == ["row-3-source-0", "row-3-source-1"]
    assert found.table[3]["target"] == "row-3-target"
    for row, given in zip(found.table, rows, strict=True):
        paths = [*as_list(given["source_image"]), given["target_image"]]
        stored = [found.stored.read(name) for name in (*row["sources"], row["target"])]
        assert stored == [(edits / path).read_bytes() for path in paths]
        assert row["texts"] == {name: given[name] for name in TEXTS}
    assert found.stored.read("images/1.png") is None


def test_one_image_column_holds_bytes_paths_and_nulls(tmp_path):
    images = [b"bare", None]
    structs = [{"bytes": b"in a struct", "path": "x.png"}, {"bytes": None, "path": "b.png"}]
    data = {"source_image": pa.array(images, pa.large_binary()), "target_image": structs, "instruction": ["x", "y"]}
    parquet.write_table(pa.table(data), tmp_path / "a.parquet")
    task = task_of(tmp_path / "a.parquet")
    lines, table = open_data(task, hashlib.sha256())
    values = [(line["source_image"], line["target_image"]) for _, _, line in lines]
    assert values == [(["row-0-source"], "row-0-target"), ([], "b.png")]
    assert [isinstance(value, Embedded) for value in (values[0][0][0], values[0][1], values[1][1])] == [
        True,
        True,
        False,
    ]
    assert (table.read("row-0-source"), table.read("row-0-target")) == (b"bare", b"in a struct")
    assert table.read("row-1-target") is None  # a file of that name is no image of the data


def test_several_files_of_a_kind_follow_each_other_in_order(tmp_path, rows):
    for name, part in (("b", rows[:2]), ("a[1]", rows[2:3]), ("c", rows[3:])):
        part = [row | {"source_image": as_list(row["source_image"])} for row in part]
        write_jsonl(tmp_path / f"{name}.jsonl", part)
        parquet.write_table(pa.Table.from_pylist(part), tmp_path / f"{name}.parquet")
    for kind, first in (("jsonl", ":1"), ("parquet", ", row 0")):
        found = read(task_of(tmp_path / f"a[1].{kind}", tmp_path / f"[bc].{kind}"))
        assert [row["target_image"] for *_, row in found] == [rows[i]["target_image"] for i in (2, 0, 1, 3, 4, 5)]
        assert [where for where, *_ in found if where.endswith(first)] == [
            f"{tmp_path}/{name}.{kind}{first}" for name in ("a[1]", "b", "c")
        ]
        assert {root for _, root, _ in found} == {str(tmp_path)}


def test_text_files_of_any_ending_give_the_rows_of_jsonl(tmp_path, edits, rows):
    rows = [row | {"source_image": as_list(row["source_image"])} for row in rows]
    text = write_jsonl(tmp_path / "a.jsonl", rows).read_bytes()
    lists = [row | {"source_image": str(row["source_image"])} for row in rows]  # as pandas writes them
    for name in ("a.JSONL", "lines.json"):
        (tmp_path / name).write_bytes(text)
    (tmp_path / "array.json").write_text("\ufeff\n" + json.dumps(rows, indent=1), "utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text))
    for name, delimiter in (("a.csv", ","), ("semicolon.csv", ";"), ("a.tsv", "\t")):
        with (tmp_path / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(lists)
    (tmp_path / "a.CSV.GZ").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    found = {
        path.name: read_rows(task_of(path, image_root=str(edits)), folder=tmp_path).table[:]
        for path in tmp_path.iterdir()
        if path.suffix != ".arrow"
    }
    assert len(found) == 9
    for name, table in found.items():
        assert table == found["a.jsonl"], name


def test_a_row_of_an_array_is_named_by_its_item(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"target_image": "a.png"}, 7], indent=1))
    assert (
        message(task_of(tmp_path / "a.json"))
        == f"{tmp_path}/a.json, item 2: got 7, expected a JSON object with columns"
    )


def test_several_columns_of_sources_may_hold_images(tmp_path):
    images = [{"bytes": b"one", "path": None}, {"bytes": b"two", "path": None}]
    data = {"control_0": [images[0], None], "control_1": [images[1], images[0]], "target_image": ["a.png", "b.png"]}
    parquet.write_table(pa.table(data), tmp_path / "a.parquet")
    columns = Columns(sources=("control_0", "control_1"))
    lines, table = open_data(task_of(tmp_path / "a.parquet", columns=columns), hashlib.sha256())
    sources = [line[", ".join(columns.sources)] for *_, line in lines]
    assert [[table.read(name) for name in names] for names in sources] == [[b"one", b"two"], [b"one"]]
    assert sources == [["row-0-source-0", "row-0-source-1"], ["row-1-source-1"]]


def test_columns_that_the_recipe_does_not_name_may_differ_from_file_to_file(tmp_path):
    one = {"target_image": ["a.png"], "instruction": ["x"]}
    others = [{"note": [None], "score": [1]}, {"note": ["n"], "score": [0.5]}, {"score": ["high"], "more": [[1]]}]
    for i, other in enumerate(others):
        parquet.write_table(pa.table(one | other), tmp_path / f"{i}.parquet")
    found = read(task_of(tmp_path / "*.parquet"))
    assert [(line["target_image"], line["instruction"]) for *_, line in found] == [("a.png", "x")] * 3
    assert found[0][2].keys() >= {"note", "score", "more"}  # for the message that names what there is


def test_a_named_column_is_null_where_a_file_lacks_it_or_has_nulls_alone(tmp_path):
    for i, texts in enumerate(([None], ["红"], None, pa.array(["蓝"]).dictionary_encode())):
        columns = {"target_image": [f"{i}.png"]} | ({} if texts is None else {"instruction_cn": texts})
        parquet.write_table(pa.table(columns), tmp_path / f"{i}.parquet")
    found = [(line["target_image"], line["instruction_cn"]) for *_, line in read(task_of(tmp_path / "*.parquet"))]
    assert found == [("0.png", None), ("1.png", "红"), ("2.png", None), ("3.png", "蓝")]


def test_images_of_unused_columns_are_not_copied(tmp_path):
    data = {"target_image": ["a.png"], "mask": [b"x" * 1_000_000]}
    parquet.write_table(pa.table(data), tmp_path / "a.parquet")
    assert len(read(task_of(tmp_path / "a.parquet"))) == 1
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.arrow")) < 10_000


def test_paths_of_a_saved_dataset_start_beside_it(tmp_path):
    Dataset.from_dict({"target_image": ["a.png"], "instruction": ["x"]}).save_to_disk(tmp_path / "data" / "set")
    assert [root for _, root, _ in read(task_of(tmp_path / "data" / "set"))] == [str(tmp_path / "data")]


def test_a_saved_dataset_of_several_splits_gives_the_tasks(tmp_path):
    splits = {name: Dataset.from_dict({"target_image": [f"{name}.png"]}) for name in ("train", "test")}
    DatasetDict(splits).save_to_disk(tmp_path / "set")
    assert [line for *_, line in read(task_of(tmp_path / "set", split="test"))] == [{"target_image": "test.png"}]
    assert message(task_of(tmp_path / "set", split="validation")) == (
        f"tasks.a.split: {tmp_path}/set has no validation; there are train, test"
    )


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "saved"])
def test_a_split_of_data_that_has_none_is_refused(tmp_path, rows, kind):
    data = Dataset.from_dict({"target_image": ["a.png"]})
    if kind == "saved":
        data.save_to_disk(tmp_path / "a.saved")
    else:
        {"jsonl": data.to_json, "csv": data.to_csv, "parquet": data.to_parquet}[kind](str(tmp_path / f"a.{kind}"))
    why = f"{tmp_path}/a.saved holds one dataset without splits" if kind == "saved" else "files have no splits"
    assert message(task_of(tmp_path / f"a.{kind}", split="test")).startswith(f"tasks.a.split: test: {why}")
    assert len(read(task_of(tmp_path / f"a.{kind}"))) == 1


def test_a_csv_field_may_have_line_breaks_commas_and_quotes(tmp_path):
    text = 'Make it "red",\n\nthen 红.'
    write_csv(tmp_path / "a.csv", [{"source_image": None, "target_image": "a.png", "instruction": text}])
    ((where, _, row),) = read(task_of(tmp_path / "a.csv"))
    assert row == {"source_image": [], "target_image": "a.png", "instruction": text}
    assert where == f"{tmp_path}/a.csv:4"


def test_a_csv_field_may_be_a_list_of_captions(tmp_path):
    texts = [["Make it red.", "Don't."], "[trigger] Make it red.", "[1, 2]"]
    rows = [{"source_image": None, "target_image": "a.png", "instruction": str(text)} for text in texts]
    write_csv(tmp_path / "a.csv", rows)
    assert [row["instruction"] for *_, row in read(task_of(tmp_path / "a.csv"))] == texts


def test_an_empty_list_in_a_csv_field_is_no_caption(tmp_path):
    (tmp_path / "a.csv").write_text("target_image,instruction\na.png,[]\n")
    assert [row["instruction"] for *_, row in read(task_of(tmp_path / "a.csv"))] == [[]]


def test_a_path_may_begin_like_a_list(tmp_path):
    (tmp_path / "[1] a.png").touch()
    write_csv(tmp_path / "a.csv", [{"source_image": "[1] a.png", "target_image": "[1] a.png", "instruction": "x"}])
    task = task_of(tmp_path / "a.csv", columns=Columns())
    assert read_rows(task, folder=tmp_path).table["sources"][:] == [["[1] a.png"]]


# --- what is wrong with them


def test_kinds_are_not_mixed(tmp_path):
    for name in ("a.jsonl", "b.csv"):
        (tmp_path / name).touch()
    told = f"{tmp_path}/a.jsonl and {tmp_path}/b.csv differ in kind; give them as two tasks"
    assert message(task_of(tmp_path / "*")) == f"tasks.a.data: {told}"


@pytest.mark.parametrize("name", ["a.txt", "folder"])
def test_what_is_of_no_kind_is_refused_with_those_that_are(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.txt").touch()
    (tmp_path / "a.jsonl").touch()
    assert message(task_of(tmp_path / "a.jsonl", tmp_path / name)) == (
        f"tasks.a.data: cannot read {tmp_path / name}: give .jsonl, .ndjson, .json, .csv, .tsv, .parquet files, "
        "text also as .gz, one folder of save_to_disk or one dataset of the Hub as org/name"
    )


def test_a_folder_of_data_files_is_refused_with_the_way_to_name_them(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "part.csv").touch()
    assert message(task_of(tmp_path / "folder")) == (
        f"tasks.a.data: cannot read {tmp_path}/folder: a folder of .csv files; give {tmp_path}/folder/*.csv"
    )


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"a,b\n1,2\n1,2,3\n", ":3: more fields than the 2 names in the first line"),
        (b"a,b,a\n1,2,3\n", ":1: a column occurs twice in a, b, a"),
        (b"a,b\n1,2\n\xff,2\n", ", after line 2: invalid CSV, expected UTF-8 ("),
        (b'a,b\n1,"2"x\n', ", after line 1: invalid CSV, expected UTF-8 ("),
    ],
)
def test_a_broken_csv_is_named_with_its_line(tmp_path, content, told):
    (tmp_path / "a.csv").write_bytes(content)
    assert message(task_of(tmp_path / "a.csv")).startswith(f"{tmp_path}/a.csv{told}")


def test_a_broken_parquet_file_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"nonsense")
    assert message(task_of(tmp_path / "a.parquet")).startswith(f"{tmp_path}/a.parquet: invalid Parquet (")


def test_text_of_parquet_that_is_not_utf_8_is_one_bad_row(tmp_path):
    (tmp_path / "t.png").touch()
    offsets, text = pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"\xff\xfehi")
    data = {"source_image": ["t.png"] * 2, "target_image": ["t.png"] * 2}
    for name in ("source_image", "instruction"):
        table = pa.table(data | {"instruction": ["hi"] * 2} | {name: pa.StringArray.from_buffers(2, offsets, text)})
        parquet.write_table(table, tmp_path / f"{name}.parquet")
        task = task_of(tmp_path / f"{name}.parquet", columns=Columns())
        first = read_rows(task, folder=tmp_path).table[0] if name == "instruction" else None
        lines, _ = open_data(task, hashlib.sha256())
        assert next(lines)[2][name] in ("\ud800", ["\ud800"])
        assert first is None or (first["bad"]["column"], first["bad"]["reason"][:27]) == (
            name,
            "got text that is not UTF-8,",
        )


def test_a_parquet_file_with_no_column_of_the_task_is_named(tmp_path):
    parquet.write_table(pa.table({"other": [1]}), tmp_path / "a.parquet")
    parquet.write_table(pa.table({"target_image": ["a.png"]}), tmp_path / "b.parquet")
    assert message(task_of(tmp_path / "*.parquet")).startswith(
        f"tasks.a.data: {tmp_path}/a.parquet: has other, and none of "
    )


def test_json_that_is_nested_too_deeply_is_named_with_its_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"target_image": "a.png"}\n' + "[" * 100_000 + "\n")
    assert message(task_of(tmp_path / "a.jsonl")).startswith(f"{tmp_path}/a.jsonl:2: invalid JSON (maximum recursion")


def test_of_several_parquet_files_the_damaged_one_is_named(tmp_path):
    for name in ("a", "b", "c"):
        table = pa.table({"target_image": [f"{name}-{i}.png" for i in range(1000)]})
        parquet.write_table(table, tmp_path / f"{name}.parquet", use_dictionary=False)
    content = bytearray((tmp_path / "b.parquet").read_bytes())
    content[40:400] = bytes(360)
    (tmp_path / "b.parquet").write_bytes(content)
    assert message(task_of(tmp_path / "*.parquet")).startswith(f"tasks.a.data: {tmp_path}/b.parquet is damaged (")


def test_a_named_column_of_two_types_is_refused_with_the_file(tmp_path):
    for name, value in (("a", "a.png"), ("b", 7)):
        parquet.write_table(pa.table({"target_image": [value]}), tmp_path / f"{name}.parquet")
    assert message(task_of(tmp_path / "*.parquet")) == (
        f"tasks.a.data: {tmp_path}/b.parquet: Unable to merge: Field target_image has incompatible types: string vs "
        "int64; write a column with the same type in all files"
    )


def test_a_table_without_the_target_column_is_refused_with_those_that_it_has(tmp_path):
    data = Dataset.from_dict({"image": ["a.png"], "instruction": ["x"]})
    data.to_parquet(str(tmp_path / "a.parquet"))
    data.save_to_disk(tmp_path / "saved")
    for name in ("a.parquet", "saved"):
        assert message(task_of(tmp_path / name)) == (
            "tasks.a.columns.target: no row has target_image; there are image, instruction: name the column"
        )


def test_a_broken_gzip_is_named(tmp_path):
    whole = gzip.compress(b'{"target_image": "a.png"}\n' * 1000)
    for content in (b"nonsense", whole[: len(whole) // 2], whole[:20] + b"x" * 20):
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        assert message(task_of(tmp_path / "a.jsonl.gz")).startswith(f"{tmp_path}/a.jsonl.gz: cannot be decompressed (")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "saved"])
def test_data_without_rows_is_refused(tmp_path, kind):
    empty = Dataset.from_dict({"target_image": []}, features=Features({"target_image": Value("string")}))
    if kind == "saved":
        empty.save_to_disk(tmp_path / "a.saved")
    else:
        (tmp_path / f"a.{kind}").write_text("target_image\n" if kind == "csv" else "")
    if kind == "parquet":
        parquet.write_table(empty.with_format("arrow")[:], tmp_path / "a.parquet")
    with pytest.raises(InputError, match="holds no rows"):
        read_rows(task_of(tmp_path / f"a.{kind}"), folder=tmp_path)


def test_an_image_file_that_a_table_lacks_is_named_with_its_row(tmp_path):
    table = {"source_image": [None, None], "target_image": ["a.png", "b.png"], "instruction": ["x", "y"]}
    parquet.write_table(pa.table(table), tmp_path / "a.parquet")
    (tmp_path / "a.png").touch()
    with pytest.raises(InputError) as error:
        task = task_of(tmp_path / "a.parquet", columns=Columns())
        read_rows(task, folder=tmp_path, extract=Extract(on_bad_row="fail"))
    told = f"{tmp_path}/a.parquet, row 1: target_image: b.png: No such file or directory; "
    assert str(error.value).startswith(told)


# --- whether the data is the same as before


@pytest.mark.parametrize("whole_bytes", [tables.WHOLE_BYTES, 0], ids=["whole", "sampled"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "saved"])
def test_the_digest_tells_another_caption_or_image_and_nothing_else(
    tmp_path, edits, rows, monkeypatch, kind, whole_bytes
):
    monkeypatch.setattr(tables, "WHOLE_BYTES", whole_bytes)

    def digest(name: str, rows: list[dict], images: Path = edits) -> str:
        folder = tmp_path / name
        folder.mkdir()
        if kind in ("jsonl", "csv"):
            data = {"jsonl": write_jsonl, "csv": write_csv}[kind](folder / f"a.{kind}", rows)
        elif kind == "saved":
            embedded(rows, images).save_to_disk(data := folder / "set")
        else:
            parquet.write_table(embedded(rows, images).with_format("arrow")[:], data := folder / "a.parquet")
        return digest_of(task_of(data))

    first = digest("first", rows)
    assert digest("again", rows) == first
    assert digest("caption", [*rows[:5], rows[5] | {"instruction": "Another"}]) != first
    assert digest("order", rows[::-1]) != first
    if kind in ("parquet", "saved"):
        (tmp_path / "images").mkdir()
        for path in (edits / "images").iterdir():  # of the same length, so that no size tells
            (tmp_path / "images" / path.name).write_bytes(path.read_bytes()[:-1] + b"x")
        assert digest("image", rows, tmp_path) != first


def test_samples_of_data_reach_its_first_and_last_byte(tmp_path, monkeypatch):
    for name, value in {"WHOLE_BYTES": 0, "SAMPLES": 3, "SAMPLE_BYTES": 2}.items():
        monkeypatch.setattr(tables, name, value)
    path, digests = tmp_path / "a", {}
    for place in range(10):
        path.write_bytes(bytes(place) + b"x" + bytes(9 - place))
        tables._update(digest := hashlib.sha256(), [path])
        digests.setdefault(digest.hexdigest(), []).append(place)
    assert [places for places in digests.values() if len(places) == 1] == [[0], [1], [4], [5], [8], [9]]


def test_a_caption_shows_in_the_digest_though_no_sample_meets_it(tmp_path, monkeypatch):
    for name, value in {"WHOLE_BYTES": 0, "SAMPLES": 2, "SAMPLE_BYTES": 8}.items():
        monkeypatch.setattr(tables, name, value)
    digests = set()
    for text in ("red", "tan", "red"):
        data = {"target_image": ["a.png"], "instruction": [text]}
        Dataset.from_dict(data).save_to_disk(folder := tmp_path / f"{text}-{len(digests)}")
        digests.add(digest_of(task_of(folder)))
    assert len(digests) == 2


# --- the Hub

READ = """
import hashlib, json, sys
from hf_qie.config.data import Columns
from hf_qie.config.recipe import Extract, InputError, Task
from hf_qie.data.readers import open_data
from hf_qie.data.samples import read_rows
from pathlib import Path

folder, data, split = sys.argv[1:]
try:
    found = read_rows(Task(name="a", data=(data,), split=split, columns=Columns()), folder=Path(folder))
except InputError as error:
    print(json.dumps({"error": str(error)}))
else:
    images = [found.stored.read(row["target"]) for row in found.table]
    told = {"sources": found.table["sources"][:], "digest": found.digest}
    print(json.dumps(told | {"images": [hashlib.sha256(image).hexdigest() for image in images]}))
"""


def read_from(hub: Hub, home: Path, data: str, *, split: str = "train", **environment: str) -> dict:
    """What a process sees of a dataset of the Hub; the address of the Hub is fixed when a process imports datasets."""
    home.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", READ, str(home), data, split],
        env=hub.environment(home) | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_a_dataset_of_the_hub_is_read_at_its_commit(tmp_path, edits, rows):
    files = tmp_path / "files"
    files.mkdir()
    embedded(rows[:1], edits).to_parquet(files / "test-00000-of-00001.parquet")
    data = embedded(rows, edits).add_column("note", ["not needed"] * len(rows))
    data.to_parquet(files / "train-00000-of-00001.parquet")
    with Hub(tmp_path / "hub") as hub:
        hub.upload("org/edits", files, kind="datasets")
        hub.tag("org/edits", "v1")
        found = read_from(hub, tmp_path / "home", "org/edits")
        names = [[f"row-{row}-source-{place}" for place in range(count)] for row, count in ((3, 2), (4, 3), (5, 0))]
        assert found["sources"][3:] == names
        paths = [edits / row["target_image"] for row in rows]
        assert found["images"] == [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
        assert read_from(hub, tmp_path / "home", "org/edits@v1", split="test")["images"] == found["images"][:1]
        # on another machine, and without internet once it is in the cache
        assert read_from(hub, tmp_path / "other", "org/edits:default@v1") == found
        assert read_from(hub, tmp_path / "home", "org/edits", HF_HUB_OFFLINE="1") == found
        card = DatasetCardData()
        DatasetInfosDict({"default": DatasetInfo(features=data.features)}).to_dataset_card_data(card)
        (files / "README.md").write_text(f"---\n{card.to_yaml()}\n---\nMore words, the same rows.")
        hub.upload("org/edits", files, kind="datasets")
        again = read_from(hub, tmp_path / "last", "org/edits")
        assert again | {"digest": found["digest"]} == found != again
        (copied,) = (tmp_path / "last").rglob("edits-train.arrow")
        assert "note" not in Dataset.from_file(str(copied)).column_names  # the card says which columns there are
        for data in ("org/nothing", "org/edits@v2", "org/edits:small"):
            told = f"tasks.a.data: {data} is not a file or folder here, and cannot be loaded as a dataset of the Hub: "
            assert read_from(hub, tmp_path / "home", data)["error"].startswith(told)


# --- extraction


def test_states_and_latents_do_not_depend_on_the_kind_of_data(tmp_path, edits, rows, tiny):
    with image_server() as server:
        server.put_folder(edits)
        data = embedded(rows, edits)
        data.save_to_disk(tmp_path / "saved")
        parquet.write_table(data.with_format("arrow")[:], tmp_path / "a.parquet")
        (tmp_path / "urls").mkdir()
        tasks = {
            "paths": {"data": str(write_jsonl(tmp_path / "a.jsonl", rows)), "image_root": str(edits)},
            "fields": {"data": str(write_csv(tmp_path / "a.csv", rows)), "image_root": str(edits)},
            "parquet": {"data": str(tmp_path / "a.parquet")},
            "saved": {"data": str(tmp_path / "saved")},
            "lists": {
                "data": str(write_jsonl(tmp_path / "lists.jsonl", [with_list(row) for row in rows])),
                "image_root": str(edits),
                "columns": {"captions": TEXTS[0]},
            },
            "urls": {
                "data": str(write_jsonl(tmp_path / "urls" / "a.jsonl", [with_urls(row, server) for row in rows]))
            },
        }
        columns = {"captions": TEXTS[:2], "inverse_captions": TEXTS[2:]}
        recipe = {
            "model": str(tiny("edit_plus")),
            "tasks": {name: {"columns": columns} | task for name, task in tasks.items()},
            "extract": {"output_dir": str(tmp_path / "sets"), "image_sample_size": 64, "source_sample_size": 64},
        }
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), "utf-8")  # JSON is YAML
        refused = extract(tmp_path, "extract.output_dir=" + str(tmp_path / "refused"))
        assert refused == TOO_MANY_BAD
        assert extract(tmp_path, "extract.allow_private_urls=true") == 0
    sets = {name: load_from_disk(str(tmp_path / "sets" / name)) for name in tasks}
    lists = sets.pop("lists").rename_columns({f"{text}instruction_2": f"{text}instruction_cn" for text in ("", TEXT)})
    sets["lists"] = lists.remove_columns("inverse_text_embeds_inverse_instruction_2")  # null, of the second caption
    given = ["source_image", "target_image"]
    for name, found in sets.items():
        assert len(found) == len(rows)
        for column in found.remove_columns(given).column_names:
            assert found.data.column(column).equals(sets["paths"].data.column(column)), (name, column)
    assert sets["urls"]["target_image"][0] == server.url(f"/{rows[0]['target_image']}")
    assert sets["saved"][3]["source_image"] == ["row-3-source-0", "row-3-source-1"]
    bad = [json.loads(line) for line in (tmp_path / "refused" / "urls" / "bad_rows.jsonl").open()]
    assert [row["row"] for row in bad] == list(range(6))
    told = "127.0.0.1 is not a public address; extract.allow_private_urls: true allows it"
    assert {row["reason"] for row in bad} == {told}


def with_list(row: dict) -> dict:
    return row | {"instruction": [row["instruction"], row["instruction_cn"]]}


def with_urls(row: dict, server: ImageServer) -> dict:
    sources = [server.url(f"/{path}") for path in as_list(row["source_image"])]
    return row | {"source_image": sources, "target_image": server.url(f"/{row['target_image']}")}


def extract(folder: Path, override: str) -> int:
    from hf_qie.extract import main

    return main([str(folder / "recipe.yaml"), override])
