"""What a task's `data` names, of any kind, as lines: JSONL, CSV, Parquet, a saved dataset or one of the Hub.

A line is where it stands, the folder that its relative paths start from, and its values by column. It holds no pixels:
for a picture that lies in the data itself it has an `Embedded` name, by which `Table.read` gives the bytes.
"""

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from glob import escape, glob
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, load_dataset, load_dataset_builder, load_from_disk
from datasets.exceptions import DatasetsError
from pyarrow import parquet

from hf_qie.recipe import Columns, InputError, Task

Line = tuple[str, str, dict[str, Any]]

SUFFIXES = {".jsonl": "JSONL", ".ndjson": "JSONL", ".csv": "CSV", ".parquet": "Parquet"}
HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<revision>\S+))?")
EMBEDDED = re.compile(r"row-(?P<row>\d+)-(?P<column>source|target)(-(?P<place>\d+))?")
BATCH_ROWS = 1000  # of a table at a time
WHOLE_BYTES = 1 << 30  # beyond it files are told by size and samples: terabytes of pictures take seconds, not hours
SAMPLES, SAMPLE_BYTES = 16, 1 << 16


class Embedded(str):
    """The name of a picture that lies in the data itself: `row-7-target`, `row-7-source-0`."""


def open_data(task: Task, digest: Any) -> "tuple[Iterator[Line], Table | None]":
    """The lines of a task's data, and its table where pictures may lie in it.

    `digest`, of hashlib, has taken in all content once the lines are read. Raises InputError for what is not there or
    cannot be read, and so do the lines.
    """
    first, *more = task.data
    if not more and os.path.isdir(first):
        table = saved_table(task, digest)
    elif not more and not os.path.exists(first) and HUB_ID.fullmatch(first) and Path(first).suffix not in SUFFIXES:
        table = hub_table(task, digest)
    else:
        kind, files = data_files(task)
        if kind != "Parquet":
            return text_lines(task, kind, files, digest), None
        table = parquet_table(task, files, digest)
    return table.lines(digest), table


def data_files(task: Task) -> tuple[str, list[Path]]:
    """The kind of the files that `data` names, and the files, globs in sorted order; raises InputError."""
    at, files = f"tasks.{task.name}.data", []
    refuse_split(task, "files have no splits; name those of one split under data")
    for pattern in task.data:
        # as it stands first: a name may have brackets
        names = [pattern] if os.path.exists(pattern) else sorted(glob(pattern, recursive=True))
        if not names:
            raise InputError(f"{at}: no file {pattern} (looked from {Path.cwd()})")
        files += map(Path, names)
    kinds = {SUFFIXES.get(file.suffix) if file.is_file() else None: file for file in files}
    if None in kinds:
        raise InputError(
            f"{at}: {kinds[None]} cannot be read; give {', '.join(SUFFIXES)} files, one folder of save_to_disk or one "
            "dataset of the Hub as org/name"
        )
    if len(kinds) > 1:
        raise InputError(f"{at}: {' and '.join(map(str, kinds.values()))} differ in kind; give them as two tasks")
    return next(iter(kinds)), files


def text_lines(task: Task, kind: str, files: Iterable[Path], digest: Any) -> Iterator[Line]:
    """The lines of JSONL or CSV files, by `file:line`; `digest` takes in the files as they are read."""
    rows_of = {"JSONL": json_rows, "CSV": csv_rows}[kind]
    for file in files:
        with file.open("rb") as binary:
            for number, row in rows_of(file, hashed(binary, digest)):
                yield f"{file}:{number}", task.image_root or str(file.parent), row


def hashed(lines: Iterable[bytes], digest: Any) -> Iterator[bytes]:
    """`lines`, taken in by `digest` as they go by."""
    for line in lines:
        digest.update(line)
        yield line


def json_rows(file: Path, lines: Iterable[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of each line that is not blank."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are
            raise InputError(f"{file}:{number}: no JSON ({error}); each line has to be one JSON object") from error
        if not isinstance(row, dict):
            raise InputError(f"{file}:{number}: {clip(row)} is no JSON object with columns")
        yield number, row


def csv_rows(file: Path, lines: Iterable[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number of the last line and fields by the names of the first; an empty field is null."""
    # with the mark that Excel puts before UTF-8
    reader = csv.DictReader((line.decode("utf-8-sig") for line in lines), strict=True)
    try:
        names = reader.fieldnames or []
        if len(set(names)) < len(names):
            raise InputError(f"{file}:1: a column occurs twice in {', '.join(names)}")
        for row in reader:
            if None in row:
                raise InputError(
                    f"{file}:{reader.line_num}: more fields than the {len(names)} names of the first line"
                )
            yield reader.line_num, {name: value or None for name, value in row.items()}
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{file}, after line {reader.line_num}: no CSV in UTF-8 ({error})") from error


@dataclass(frozen=True, kw_only=True)
class Table:
    """A dataset whose rows are lines; memory-mapped, so that it takes no memory however large it is."""

    dataset: Dataset  # in Arrow format, which decodes nothing
    parts: list[tuple[str, str, int]]  # of each of its files the name, the folder of relative paths, the rows
    columns: Columns

    def lines(self, digest: Any) -> Iterator[Line]:
        """Its lines, by file and 0-based row; `digest` takes in what they hold."""
        places = ((f"{name}, row {row}", root) for name, root, num_rows in self.parts for row in range(num_rows))
        pictures = {self.columns.sources: "source", self.columns.target: "target"}
        texts = {*self.columns.captions, *self.columns.inverse_captions}
        for start in range(0, len(self.dataset), BATCH_ROWS):
            batch = self.dataset[start : start + BATCH_ROWS]
            values = {name: [None] * len(batch) for name in batch.column_names}  # others may hold pixels as well
            values |= {name: batch[name].to_pylist() for name in texts & values.keys()}
            for name in pictures.keys() & values.keys():
                numbered = enumerate(batch[name], start)
                values[name] = [without_pixels(value, f"row-{row}-{pictures[name]}") for row, value in numbered]
            for row in zip(*values.values(), strict=True):
                digest.update(repr(row).encode())
                yield *next(places), dict(zip(values, row, strict=True))

    def read(self, name: str) -> bytes | None:
        """The picture of an `Embedded` name; None for any other name."""
        if (found := EMBEDDED.fullmatch(name)) is None:
            return None
        column = self.columns.target if found["column"] == "target" else self.columns.sources
        value = self.dataset[int(found["row"])][column][0]
        stored = bytes_of(value if found["place"] is None else value[int(found["place"])])
        return None if stored is None else stored.as_py()


def without_pixels(value: pa.Scalar, name: str) -> Any:
    """A path as it is, `Embedded(name)` for a picture, null for none; of a list each."""
    if isinstance(value, pa.ListScalar) and value.is_valid:
        return [without_pixels(item, f"{name}-{place}") for place, item in enumerate(value.values)]
    if bytes_of(value) is not None:
        return Embedded(name)
    if isinstance(value, pa.StructScalar) and "path" in value:
        return value["path"].as_py()
    return value.as_py()


def bytes_of(value: pa.Scalar) -> pa.Scalar | None:
    """The bytes of a picture, not copied yet: bare, or in a struct as of datasets.Image; None where there are none."""
    if isinstance(value, pa.StructScalar) and "bytes" in value:
        value = value["bytes"]
    is_binary = pa.types.is_binary(value.type) or pa.types.is_large_binary(value.type)
    return value if is_binary and value.is_valid else None


def parquet_table(task: Task, files: list[Path], digest: Any) -> Table:
    """Parquet files as one table, by way of the cache of datasets; raises InputError."""
    num_rows = {}
    for file in files:
        try:
            num_rows[file] = parquet.read_metadata(file).num_rows
        except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
            raise InputError(f"{file}: no Parquet ({error})") from error
    files = [file for file in files if num_rows[file]]  # datasets cannot read one without rows
    if not files:
        raise InputError(no_rows(task))
    take_in(files, digest)
    try:
        data = load_dataset("parquet", data_files={"train": [escape(str(file)) for file in files]}, split="train")
    except (DatasetsError, OSError, ValueError) as error:
        raise InputError(f"tasks.{task.name}.data: cannot read {files[0]} ... ({error.__cause__ or error})") from error
    parts = [(str(file), task.image_root or str(file.parent), num_rows[file]) for file in files]
    return Table(dataset=data.with_format("arrow"), parts=parts, columns=task.columns)


def saved_table(task: Task, digest: Any) -> Table:
    """A folder of `save_to_disk` as a table; of several splits the task's. Raises InputError."""
    folder = Path(task.data[0])
    try:
        data = load_from_disk(str(folder))
    except IndexError as error:  # what datasets makes of one without rows
        raise InputError(no_rows(task)) from error
    except (OSError, ValueError) as error:
        raise InputError(f"tasks.{task.name}.data: {folder} is no folder of save_to_disk ({error})") from error
    if isinstance(data, dict):
        if task.split not in data:
            raise InputError(f"tasks.{task.name}.split: {folder} has no {task.split}; there are {', '.join(data)}")
        data = data[task.split]
    else:
        refuse_split(task, f"{folder} holds one dataset without splits")
    take_in([Path(file["filename"]) for file in data.cache_files], digest)
    parts = [(str(folder), task.image_root or str(folder.parent), len(data))]
    return Table(dataset=data.with_format("arrow"), parts=parts, columns=task.columns)


def hub_table(task: Task, digest: Any) -> Table:
    """A dataset of the Hub, at its present commit unless one is named, as a table; raises InputError."""
    found = HUB_ID.fullmatch(task.data[0])
    try:
        builder = load_dataset_builder(found["repo"], found["config"], revision=found["revision"])
        builder.download_and_prepare()
        data = builder.as_dataset(task.split)
    except (DatasetsError, OSError, ValueError) as error:
        raise InputError(
            f"tasks.{task.name}.data: {task.data[0]} is no file or folder here, and as a dataset of the Hub it cannot "
            f"be loaded: {error.__cause__ or error}"
        ) from error
    digest.update(builder.hash.encode())  # the commit
    parts = [(task.data[0], task.image_root or ".", len(data))]
    return Table(dataset=data.with_format("arrow"), parts=parts, columns=task.columns)


def refuse_split(task: Task, why: str) -> None:
    """Raise InputError for a split that would be passed over in silence."""
    if task.split != type(task).split:
        raise InputError(f"tasks.{task.name}.split: {task.split}: {why}, and leave split out")


def take_in(files: list[Path], digest: Any) -> None:
    """Let `digest` tell files from others: whole up to 1 GB in all, beyond it by size and samples."""
    sizes = [file.stat().st_size for file in files]
    for file, size in zip(files, sizes, strict=True):
        digest.update(str(size).encode())
        whole = sum(sizes) <= WHOLE_BYTES
        with file.open("rb") as binary:
            for offset in range(0, size, SAMPLE_BYTES) if whole else (size * i // SAMPLES for i in range(SAMPLES)):
                binary.seek(offset)
                digest.update(binary.read(SAMPLE_BYTES))


def no_rows(task: Task) -> str:
    """What to say where there is no line at all."""
    return f"tasks.{task.name}.data: {', '.join(task.data)} holds no rows"


def clip(value: Any) -> str:
    """A value for an error message, not longer than a line."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
