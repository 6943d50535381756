"""A task's data as rows: sources, target, captions, checked before any model is loaded."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter

from hf_qie.recipe import Columns, InputError, Task

EXAMPLES_NAMED = 5  # of many missing files
HALVES = re.compile("[\ud800-\udfff]")


class BadRow(ValueError):
    """One row that cannot be used; the row is listed and the run goes on, or stops with `on_bad_row: fail`."""

    def __init__(self, reason: str, *, column: str, path: str | None = None):
        super().__init__(reason)
        self.reason, self.column, self.path = reason, column, path


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a task, in the order of its data.

    `table` has the columns `row` (0-based), `sources` (paths as given, [] for text-to-image), `target`, `root` (the
    folder that relative paths start from) and `texts`, by caption and inverse caption, null where the row has none.
    """

    table: Dataset
    has_inverse: bool  # some row has one
    digest: str  # sha256 of the data files


def read_rows(task: Task, *, folder: Path, max_sources: int | None = None) -> Rows:
    """Read and check the data of `task`; the table lies memory-mapped in `folder`.

    `max_sources` is what the checkpoint takes. Raises InputError naming file, line, column, value and remedy.
    """
    text = Value("string")
    texts = dict.fromkeys((*task.columns.captions, *task.columns.inverse_captions), text)
    columns = {"row": Value("int64"), "sources": List(text), "target": text, "root": text, "texts": texts}
    seen, digest, missing, inverse = set(), hashlib.sha256(), Missing(task), False
    path = folder / f"{task.name}.arrow"
    with ArrowWriter(features=Features(columns), path=str(path), writer_batch_size=1000) as writer:
        for number, (where, root, line) in enumerate(read_lines(task, digest)):
            row = {"row": number, "root": root} | check_row(line, where=where, task=task, max_sources=max_sources)
            writer.write(row)
            seen.update(line)
            missing.look(row, where=where)
            inverse = inverse or has_inverse(row, task)
        if not seen:
            raise InputError(f"tasks.{task.name}.data: {', '.join(task.data)} holds no rows")
        writer.finalize()
    missing.refuse()
    check_columns(task, seen)
    return Rows(table=Dataset.from_file(str(path)), has_inverse=inverse, digest=digest.hexdigest())


def has_inverse(row: Mapping[str, Any], task: Task) -> bool:
    """An inverse takes exactly one source and at least one inverse caption."""
    return len(row["sources"]) == 1 and any(row["texts"][caption] for caption in task.columns.inverse_captions)


def data_files(task: Task) -> list[Path]:
    """The files that `data` names, globs in sorted order; raises InputError for what is not there or not JSONL."""
    found = []
    for pattern in task.data:
        # as it stands first: a name may have brackets
        names = [pattern] if os.path.exists(pattern) else sorted(glob(pattern, recursive=True))
        if not names:
            raise InputError(f"tasks.{task.name}.data: no file {pattern} (looked from {Path.cwd()})")
        for file in map(Path, names):
            if file.suffix not in (".jsonl", ".ndjson") or not file.is_file():
                raise InputError(
                    f"tasks.{task.name}.data: {file} is not read yet; give .jsonl files (one JSON object a line)"
                )
            found.append(file)
    return found


def read_lines(task: Task, digest: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """`file:line`, root of relative paths and content of each line not blank; `digest` takes in the files as read."""
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
                yield where, task.image_root or str(file.parent), row


def check_row(line: dict[str, Any], *, where: str, task: Task, max_sources: int | None) -> dict[str, Any]:
    """Sources, target and texts of one line of the data."""
    columns = task.columns
    sources = [] if task.t2i else line.get(columns.sources)
    if isinstance(sources, str | None):
        sources = [sources] if sources else []
    if not (isinstance(sources, list) and all(is_text(path) and path for path in sources)):
        raise InputError(f"{where}: {columns.sources}: {clip(sources)} is no path, list of paths or null")
    target = line.get(columns.target)
    if not is_text(target) or not target:
        wrong = f"{clip(target)} is no path" if columns.target in line else f"missing, there are {', '.join(line)}"
        raise InputError(f"{where}: {columns.target}: {wrong}; name the column with tasks.{task.name}.columns.target")
    if max_sources is not None and len(sources) > max_sources:
        raise InputError(
            f"{where}: {columns.sources}: {len(sources)} sources, this checkpoint takes {max_sources}; "
            f"use an Edit-Plus checkpoint{'' if max_sources else f' or set tasks.{task.name}.t2i: true'}"
        )
    texts = {column: line.get(column) for column in (*columns.captions, *columns.inverse_captions)}
    for column, text in texts.items():
        if text is not None and not is_text(text):
            raise InputError(f"{where}: {column}: {clip(text)} is no text (in UTF-8) or null")
    texts = {column: text if text and text.strip() else None for column, text in texts.items()}
    return {"sources": sources, "target": target, "texts": texts}


def is_text(value: Any) -> bool:
    """Whether `value` is a string that UTF-8 can hold: JSON's escapes allow halves of a character."""
    return isinstance(value, str) and not HALVES.search(value)


def check_columns(task: Task, seen: set[str]) -> None:
    """Raise InputError where a column that the task needs occurs in no row; `seen` are those that occur."""
    columns: Columns = task.columns
    if not task.t2i and columns.sources not in seen:
        raise InputError(
            f"tasks.{task.name}.columns.sources: no row has {columns.sources}; there are {', '.join(sorted(seen))}: "
            f"name the column, or set tasks.{task.name}.t2i: true"
        )
    if absent := [column for column in columns.required if column not in seen]:
        raise InputError(
            f"tasks.{task.name}.columns: no row has {', '.join(absent)}; there are {', '.join(sorted(seen))}"
        )
    if seen.isdisjoint(columns.captions):
        raise InputError(
            f"tasks.{task.name}.columns.captions: no row has {' or '.join(columns.captions)}; "
            f"there are {', '.join(sorted(seen))}: name the caption columns"
        )


class Missing:
    """Picture files that are not there, gathered so that one run names them all."""

    def __init__(self, task: Task):
        self.task, self.count, self.examples = task, 0, []

    def look(self, row: Mapping[str, Any], *, where: str) -> None:
        """Note the pictures of `row` that are not files."""
        columns = self.task.columns
        for column, path in [*((columns.sources, path) for path in row["sources"]), (columns.target, row["target"])]:
            if path.startswith(("http://", "https://")):
                raise InputError(f"{where}: {column}: {path}: URLs are not read yet; download the pictures first")
            file = os.path.join(row["root"], path)
            if not os.path.isfile(file):
                self.count += 1
                if len(self.examples) < EXAMPLES_NAMED:
                    self.examples.append(f"{where}: {column}: no file {file[:300]}")

    def refuse(self) -> None:
        """Raise InputError if anything was missing."""
        if self.count:
            raise InputError(
                "\n".join(self.examples)
                + f"\n{self.count:,} pictures are missing; paths are relative to tasks.{self.task.name}.image_root, "
                "by default the folder of the data file"
            )


def clip(value: Any) -> str:
    """A value for an error message, not longer than a line."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
