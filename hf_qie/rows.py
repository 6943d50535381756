"""A task's data as rows: sources, target, captions, checked before any model is loaded."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter

from hf_qie.fetch import PASSWORD, holds_password, is_url
from hf_qie.recipe import Columns, InputError, Task
from hf_qie.records import Embedded, Table, clip, no_rows, open_data

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

    `table` has the columns `row` (0-based), `sources` (paths or URLs as given, [] for text-to-image), `target`, `root`
    (the folder that relative paths start from) and `texts`, by caption and inverse caption, null where the row has
    none. A picture that lies in the data itself has a name in place of a path, by which `stored` reads it.
    """

    table: Dataset
    stored: Table | None = None  # the data where pictures may lie in it
    has_inverse: bool  # some row has one
    digest: str  # sha256 of the data


def read_rows(task: Task, *, folder: Path, max_sources: int | None = None) -> Rows:
    """Read and check the data of `task`; the table lies memory-mapped in `folder`.

    `max_sources` is what the checkpoint takes. Raises InputError naming file, line, column, value and remedy.
    """
    text, missing, inverse, seen, digest = Value("string"), Missing(task), False, set(), hashlib.sha256()
    lines, stored = open_data(task, digest)
    texts = dict.fromkeys((*task.columns.captions, *task.columns.inverse_captions), text)
    columns = {"row": Value("int64"), "sources": List(text), "target": text, "root": text, "texts": texts}
    path = folder / f"{task.name}.arrow"
    with ArrowWriter(features=Features(columns), path=str(path), writer_batch_size=1000) as writer:
        for number, (where, root, line) in enumerate(lines):
            row = {"row": number, "root": root} | check_row(line, where=where, task=task, max_sources=max_sources)
            writer.write(row)
            seen.update(line)
            missing.look(row, where=where)
            inverse = inverse or has_inverse(row, task)
        if not seen:
            raise InputError(no_rows(task))
        writer.finalize()
    missing.refuse()
    check_columns(task, seen)
    table = Dataset.from_file(str(path))
    return Rows(table=table, stored=stored, has_inverse=inverse, digest=digest.hexdigest())


def has_inverse(row: Mapping[str, Any], task: Task) -> bool:
    """An inverse takes exactly one source and at least one inverse caption."""
    return len(row["sources"]) == 1 and any(row["texts"][caption] for caption in task.columns.inverse_captions)


def check_row(line: dict[str, Any], *, where: str, task: Task, max_sources: int | None) -> dict[str, Any]:
    """Sources, target and texts of one line of the data."""
    columns = task.columns
    sources = [] if task.t2i else as_list(line.get(columns.sources))
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


def as_list(sources: Any) -> Any:
    """No picture, one or several as a list; as CSV has no lists, a string may hold one in JSON."""
    if isinstance(sources, str) and sources.startswith("["):
        with suppress(ValueError):  # a path may begin so too
            return json.loads(sources)
    if isinstance(sources, str | None):
        return [sources] if sources else []
    return sources


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
        """Note the pictures of `row` that should be files and are not; raises InputError for a URL with a password."""
        columns = self.task.columns
        for column, path in [*((columns.sources, path) for path in row["sources"]), (columns.target, row["target"])]:
            if isinstance(path, Embedded):
                continue
            if is_url(path):  # whether it gives a picture shows when it is fetched
                if holds_password(path):
                    raise InputError(f"{where}: {column}: {PASSWORD}")
                continue
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
