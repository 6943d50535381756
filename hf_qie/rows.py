"""A task's data as rows: sources, target, captions, checked before any model is loaded."""

import glob
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter

from hf_qie.recipe import Columns, InputError, Task

EXAMPLES_NAMED = 5  # of many missing files


class BadRow(ValueError):
    """One row that cannot be used; the row is listed and the run goes on, or stops with `on_bad_row: fail`."""

    def __init__(self, reason: str, *, column: str, path: str | None = None):
        super().__init__(reason)
        self.reason, self.column, self.path = reason, column, path


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a task, in the order of its data.

    `table` has the columns `row` (0-based), `sources` (paths as given, [] for text-to-image), `target`, `root` (the
    folder that relative paths start from), and one string column per caption and inverse caption that occurs.
    """

    table: Dataset
    captions: tuple[str, ...]  # caption columns that occur in the data
    inverse_captions: tuple[str, ...]
    digest: str  # sha256 of the data files


def read_rows(task: Task, *, folder: Path, max_sources: int | None = None) -> Rows:
    """Read and check the data of `task`; the table lies memory-mapped in `folder`.

    `max_sources` is what the checkpoint takes. Raises InputError naming file, line, column, value and remedy.
    """
    captions, inverse_captions = task.columns.captions, task.columns.inverse_captions
    strings = dict.fromkeys(("target", "root", *captions, *inverse_captions), Value("string"))
    features = Features({"row": Value("int64"), "sources": List(Value("string"))} | strings)
    seen, digest, missing = Counter(), hashlib.sha256(), Missing(task.name)
    path = folder / f"{task.name}.arrow"
    with ArrowWriter(features=features, path=str(path), writer_batch_size=1000) as writer:
        number = -1
        for number, (where, row) in enumerate(read_lines(task, digest)):
            seen.update(row.keys() - {"root"})
            writer.write(check_row(row, where=where, number=number, task=task, max_sources=max_sources))
            missing.look(row, where=where, task=task)
        if number < 0:
            raise InputError(f"tasks.{task.name}.data: {', '.join(task.data)} holds no rows")
        writer.finalize()
    missing.refuse()
    check_columns(task, seen)
    return Rows(
        table=Dataset.from_file(str(path)),
        captions=tuple(column for column in captions if seen[column]),
        inverse_captions=tuple(column for column in inverse_captions if seen[column]),
        digest=digest.hexdigest(),
    )


def data_files(task: Task) -> list[Path]:
    """The files that `data` names, globs in sorted order; raises InputError for what is not there or not JSONL."""
    found = []
    for pattern in task.data:
        files = sorted(Path(name) for name in glob.glob(pattern, recursive=True))
        if not files:
            raise InputError(f"tasks.{task.name}.data: no file {pattern} (looked from {Path.cwd()})")
        for file in files:
            if file.suffix not in (".jsonl", ".ndjson") or not file.is_file():
                raise InputError(
                    f"tasks.{task.name}.data: {file} is not read yet; give .jsonl files (one JSON object a line)"
                )
        found += files
    return found


def read_lines(task: Task, digest: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """`file:line` and the row of each line that is not blank; `digest` takes in the files as they are read."""
    for file in data_files(task):
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                digest.update(line)
                if not line.strip():
                    continue
                where = f"{file}:{number}"
                try:
                    row = json.loads(line)
                except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are
                    raise InputError(f"{where}: no JSON ({error}); each line has to be one JSON object") from error
                if not isinstance(row, dict):
                    raise InputError(f"{where}: {clip(row)} is no JSON object with columns")
                yield where, row | {"root": task.image_root or str(file.parent)}


def check_row(row: dict[str, Any], *, where: str, number: int, task: Task, max_sources: int | None) -> dict[str, Any]:
    """The row of `Rows.table` for one line of the data."""
    columns = task.columns
    sources = [] if task.t2i else row.get(columns.sources)
    if isinstance(sources, str | None):
        sources = [sources] if sources else []
    if not (isinstance(sources, list) and all(isinstance(path, str) and path for path in sources)):
        raise InputError(f"{where}: {columns.sources}: {clip(sources)} is no path, list of paths or null")
    target = row.get(columns.target)
    if not isinstance(target, str) or not target:
        wrong = f"{clip(target)} is no path" if columns.target in row else f"missing, there are {', '.join(row)}"
        raise InputError(f"{where}: {columns.target}: {wrong}; name the column with tasks.{task.name}.columns.target")
    if max_sources is not None and len(sources) > max_sources:
        raise InputError(
            f"{where}: {columns.sources}: {len(sources)} sources, this checkpoint takes {max_sources}; "
            f"use an Edit-Plus checkpoint{'' if max_sources else f' or set tasks.{task.name}.t2i: true'}"
        )
    texts = {column: row.get(column) for column in (*columns.captions, *columns.inverse_captions)}
    for column, text in texts.items():
        if not isinstance(text, str | None):
            raise InputError(f"{where}: {column}: {clip(text)} is no text")
    texts = {column: text if text and text.strip() else None for column, text in texts.items()}
    return {"row": number, "sources": sources, "target": target, "root": row["root"]} | texts


def check_columns(task: Task, seen: Counter) -> None:
    """Raise InputError where a column that the task needs occurs in no row."""
    columns: Columns = task.columns
    if not task.t2i and not seen[columns.sources]:
        raise InputError(
            f"tasks.{task.name}.columns.sources: no row has {columns.sources}; there are {', '.join(sorted(seen))}: "
            f"name the column, or set tasks.{task.name}.t2i: true"
        )
    if absent := [column for column in columns.required if not seen[column]]:
        raise InputError(
            f"tasks.{task.name}.columns: no row has {', '.join(absent)}; there are {', '.join(sorted(seen))}"
        )
    if not any(seen[column] for column in columns.captions):
        raise InputError(
            f"tasks.{task.name}.columns.captions: no row has {' or '.join(columns.captions)}; "
            f"there are {', '.join(sorted(seen))}: name the caption columns"
        )


class Missing:
    """Picture files that are not there, gathered so that one run names them all."""

    def __init__(self, task: str):
        self.task, self.count, self.examples = task, 0, []

    def look(self, row: dict[str, Any], *, where: str, task: Task) -> None:
        """Note the pictures of `row` that are not files."""
        sources = [] if task.t2i else row.get(task.columns.sources) or []
        named = [(task.columns.sources, path) for path in ([sources] if isinstance(sources, str) else sources)]
        for column, path in [*named, (task.columns.target, row[task.columns.target])]:
            if path.startswith(("http://", "https://")):
                raise InputError(f"{where}: {column}: {path}: URLs are not read yet; download the pictures first")
            if not Path(row["root"], path).is_file():
                self.count += 1
                if len(self.examples) < EXAMPLES_NAMED:
                    self.examples.append(f"{where}: {column}: no file {Path(row['root'], path)}")

    def refuse(self) -> None:
        """Raise InputError if anything was missing."""
        if self.count:
            raise InputError(
                "\n".join(self.examples)
                + f"\n{self.count:,} pictures are missing; paths are relative to tasks.{self.task}.image_root, "
                "by default the folder of the data file"
            )


def clip(value: Any) -> str:
    """A value for an error message, not longer than a line."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
