"""A task's data as rows: sources, target, captions, and what is wrong with them, before any model is loaded."""

import errno
import hashlib
import json
import os
import re
import stat
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter

from hf_qie.config.recipe import Columns, Extract, Task
from hf_qie.data.captions import MOST_TEXTS, by_column, text_columns
from hf_qie.data.fetch import PASSWORD, holds_password, is_url
from hf_qie.data.readers import open_data
from hf_qie.data.schema import columns_of
from hf_qie.data.tables import DataRow, Embedded, Table, no_rows
from hf_qie.data.text_files import clip
from hf_qie.errors import InputError

BATCH_ROWS = 1000  # checked together
LOOKERS = 64  # threads: on a network disk a look at a file is a wait
AHEAD = 2  # batches whose files are looked at while the next one is parsed
EXAMPLES_NAMED = 5  # of many bad rows
HALVES = re.compile("[\ud800-\udfff]")


class BadRow(ValueError):
    """One row that cannot be used; the row is listed and the run goes on, or stops with `on_bad_row: fail`.

    A reason holds no value of the row, so that rows which are bad for the same reason are counted together.
    """

    def __init__(self, reason: str, *, column: str, path: str | None = None):
        super().__init__(reason)
        self.reason, self.column, self.path = reason, column, path

    @property
    def named(self) -> str:
        """Column, path and reason."""
        return f"{self.column}: {f'{self.path[:300]}: ' if self.path else ''}{self.reason}"


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a task, in the order of its data.

    `table` has the columns `row` (0-based), `sources` (paths or URLs as given, [] for text-to-image), `target` and
    other images of the set by name, `root` (the folder that relative paths start from), `texts`, by caption and
    inverse caption, null where the row has none, `bad` and `digest`. An image that lies in the data has a name in
    place of a path, by which `stored` reads it. `bad` is null for a good row, else the column, path and reason of what
    is wrong with its values; such a row has no images and texts. `digest`, 16 bytes, differs where anything differs
    that a row is made from: its values, size and time of its image files, content of images that lie in the data; URLs
    count as they are.
    """

    table: Dataset
    columns: Columns  # those of the task, with one for each text of a list
    stored: Table | None = None  # the data where images may lie in it
    has_inverse: bool  # some row has one
    digest: str  # sha256 over the rows'
    identity: str  # sha256 of the data alone, whatever became of the images that it names


def read_rows(task: Task, *, folder: Path, max_sources: int | None = None, extract: Extract | None = None) -> Rows:
    """Read the data of `task` and look at its files; the table lies memory-mapped in `folder`.

    `max_sources` is what the checkpoint takes. Bad rows are marked; with `extract`, more of them than it allows are an
    error. Raises InputError for what is wrong with the task as a whole.
    """
    identity = hashlib.sha256()
    lines, stored = open_data(task, identity)
    reader = Reader(task, max_sources=max_sources, identity=identity.hexdigest())
    text = Value("string")
    texts = dict.fromkeys(text_columns(task.columns), List(text))
    columns = {"row": Value("int64"), "root": text, "texts": texts}
    columns |= {image.row_key: image.type for image in columns_of("image")}
    columns |= {"bad": dict.fromkeys(("column", "path", "reason"), text), "digest": Value("binary")}
    path, features = folder / f"{task.name}.arrow", Features(columns)
    with ArrowWriter(features=features, path=str(path)) as writer:
        for rows in reader.read(lines):
            writer.write_table(pa.Table.from_pylist(rows, schema=features.arrow_schema))
        if not reader.num_rows:
            raise InputError(no_rows(task))
        writer.finalize()
    check_columns(task, reader.seen)
    reader.refuse(extract)
    known = {"has_inverse": reader.has_inverse, "digest": reader.digest.hexdigest(), "identity": identity.hexdigest()}
    return open_rows(task, path, stored=stored, **known)


def open_rows(task: Task, path: Path, *, stored: Table | None, **known: Any) -> Rows:
    """The rows whose table `read_rows` has written to `path`; `known`: the other fields of `Rows`."""
    table, columns = by_column(Dataset.from_file(str(path)), task)
    return Rows(table=table, columns=columns, stored=stored, **known)


def most_bad(extract: Extract, num_rows: int) -> float:
    """How many bad rows a task may have."""
    return 0 if extract.on_bad_row == "fail" else max(1, extract.max_bad_share * num_rows)


def refuse_bad(row: Mapping[str, Any]) -> None:
    """Raise BadRow for a row of the table that is known to be bad."""
    if row["bad"]:
        raise BadRow(**row["bad"])


class Reader:
    """Turns the lines of a task's data into rows of the table, and counts what is wrong with them.

    `identity` is that of data in which images may lie.
    """

    def __init__(self, task: Task, *, max_sources: int | None, identity: str):
        self.task, self.max_sources, self.identity = task, max_sources, identity
        self.num_rows, self.seen, self.has_inverse, self.digest = 0, set(), False, hashlib.sha256()
        self.merged = {task.columns.source_label} - {*task.columns.source_columns}  # no column of the data
        self.reasons: Counter[str] = Counter()  # of bad rows, by column and reason
        self.examples: list[str] = []  # the first bad rows
        self.roots: Counter[str] = Counter()  # of bad rows whose file cannot be used, where its path starts

    def read(self, lines: Iterator[DataRow]) -> Iterator[list[dict[str, Any]]]:
        """The rows of the table, some at a time; their files are looked at in threads while others are parsed."""
        waiting: deque[tuple[list, list]] = deque()
        with ThreadPoolExecutor(LOOKERS, "look") as lookers:
            while batch := list(islice(lines, BATCH_ROWS)):
                parsed = [self.parse(*line) for line in batch]
                files = list({file for *_, there in parsed for *_, file in there})
                parts = [files[start::LOOKERS] for start in range(min(LOOKERS, len(files)))]
                waiting.append((parsed, [(part, lookers.submit(look_at, part)) for part in parts]))
                if len(waiting) > AHEAD:
                    yield self.finish(*waiting.popleft())
            while waiting:
                yield self.finish(*waiting.popleft())

    def parse(self, where: str, root: str, line: Mapping[str, Any]) -> tuple[str, dict, BadRow | None, list]:
        """Where a row stands; the row, or what is wrong with it, as far as is known without its files; and these."""
        row = {"row": self.num_rows, "root": root}
        self.num_rows += 1
        self.seen.update(line.keys() - self.merged)
        try:
            row |= check_row(line, task=self.task, max_sources=self.max_sources)
        except BadRow as error:
            return where, row | nothing(self.task), error, []
        images = images_of(row, self.task.columns)
        local = [(column, path) for column, path in images if not (isinstance(path, Embedded) or is_url(path))]
        return where, row, None, [(column, path, os.path.join(root, path)) for column, path in local]

    def finish(self, parsed: list, looks: list) -> list[dict[str, Any]]:
        """The rows of a batch, once their files are looked at."""
        found = {file: one for part, look in looks for file, one in zip(part, look.result(), strict=True)}
        return [self.row(*one, found) for one in parsed]

    def row(self, where: str, row: dict, bad: BadRow | None, files: list, found: Mapping[str, Any]) -> dict[str, Any]:
        """One row of the table; a bad one is counted."""
        self.has_inverse = self.has_inverse or has_inverse(row, self.task)
        for column, path, file in files:
            if isinstance(found[file], str) and bad is None:
                bad = BadRow(found[file], column=column, path=path)
                self.roots[row["root"]] += 1
        names = [path for _, path in images_of(row, self.task.columns) if isinstance(path, Embedded)]
        known = {**row, "row": None, "bad": vars(bad) if bad else None}  # a row may move
        content = json.dumps(
            [known, self.task.t2i, [found[file] for *_, file in files], names and self.identity], sort_keys=True
        )
        digest = hashlib.blake2b(content.encode(), digest_size=16).digest()
        self.digest.update(digest)
        if bad:
            self.reasons[f"{bad.column}: {bad.reason}"] += 1
            if len(self.examples) < EXAMPLES_NAMED:
                self.examples.append(f"{where}: {bad.named}")
            row |= nothing(self.task)
        return row | {"bad": known["bad"], "digest": digest}

    def refuse(self, extract: Extract | None) -> None:
        """Raise InputError where no row is usable or, by `extract`, too many are bad."""
        count, name = self.reasons.total(), self.task.name
        if count and extract and extract.on_bad_row == "fail":
            raise InputError(
                f"{self.examples[0]}; fix it, or set extract.on_bad_row: skip to list such rows and go on"
            )
        rule = "none is left"
        if count < self.num_rows:
            if not extract or count <= (most := most_bad(extract, self.num_rows)):
                return
            rule = f"extract.max_bad_share allows {most:,.0f}"
        cause = f"the columns in the data are {', '.join(sorted(self.seen))}; name others with tasks.{name}.columns"
        if 2 * self.roots.total() >= count:
            root = self.roots.most_common(1)[0][0]
            cause = f"relative paths start from {root}; name another folder with tasks.{name}.image_root"
        lines = [f"tasks.{name}: {count:,} of {self.num_rows:,} rows are bad, {rule}:"]
        lines += [f"  {number:,}: {reason}" for reason, number in self.reasons.most_common()]
        raise InputError("\n".join([*self.examples, *lines, cause]))


def look_at(files: Sequence[str]) -> list[tuple[int, int] | str]:
    """Size and time of modification (ns) of each file, or why it is none. Runs in many threads."""
    found: list[tuple[int, int] | str] = []
    for file in files:
        try:
            status = os.stat(file)
        except OSError as error:
            found.append(error.strerror)
        except ValueError:  # no name of a file: it holds a zero, or half a character
            found.append(os.strerror(errno.ENOENT))
        else:
            is_file = stat.S_ISREG(status.st_mode)
            found.append((status.st_size, status.st_mtime_ns) if is_file else "a folder or device, not a file")
    return found


def has_inverse(row: Mapping[str, Any], task: Task) -> bool:
    """An inverse takes exactly one source and at least one inverse caption."""
    return len(row["sources"]) == 1 and any(row["texts"][caption] for caption in task.columns.inverse_captions)


def images_of(row: Mapping[str, Any], columns: Columns) -> list[tuple[str, str]]:
    """The images of a row: in a message the column of each, and its path."""
    return [(image.label(columns), path) for image in columns_of("image") for path in image.paths(row)]


def nothing(task: Task) -> dict[str, Any]:
    """Images and texts of a row that has none."""
    images = {image.row_key: [] if image.many else None for image in columns_of("image")}
    return images | {"texts": dict.fromkeys(text_columns(task.columns), ())}


def check_row(line: Mapping[str, Any], *, task: Task, max_sources: int | None) -> dict[str, Any]:
    """Sources, target and texts of one line of the data; raises BadRow."""
    columns, images = task.columns, {}
    for image in columns_of("image"):
        label = image.label(columns)
        if not image.many and label not in line:
            raise BadRow("missing", column=label)
        found = [] if image.many and task.t2i else line.get(label, [])
        for path in found if image.many and isinstance(found, list) else [found]:
            check_path(path, column=label)
        images[image.row_key] = found
    sources = images["sources"]
    if max_sources is not None and len(sources) > max_sources:
        raise BadRow(
            f"{len(sources)} sources, this checkpoint takes {max_sources}; use an Edit-Plus checkpoint"
            f"{'' if max_sources else f' or set tasks.{task.name}.t2i: true'}",
            column=columns.source_label,
        )
    texts = {}
    for column in text_columns(columns):
        found = line.get(column)
        found = found if isinstance(found, list) else [found]
        if wrong := [text for text in found if text is not None and not is_text(text)]:
            raise BadRow(f"{kind_of(wrong[0])}, wanted text or null", column=column)
        texts[column] = [text for text in found if text and text.strip()]
        if (count := len(texts[column])) > MOST_TEXTS:
            raise BadRow(
                f"{count} captions, at most {MOST_TEXTS} are stored with a row; shorten the list", column=column
            )
    return images | {"texts": texts}


def check_path(path: Any, *, column: str) -> None:
    """Raise BadRow for what is neither the path nor the URL of an image."""
    if not is_text(path) or not path:
        shown = None if path is None else legible(path)
        raise BadRow(f"{kind_of(path)}, wanted the path or URL of an image", column=column, path=shown)
    if is_url(path) and holds_password(path):
        raise BadRow(PASSWORD, column=column, path=re.sub("//[^/?#]*@", "//", path, count=1))


def legible(value: Any) -> str:
    """A value that is no path, in the place of one."""
    return clip(value).encode(errors="replace").decode()


def kind_of(value: Any) -> str:
    """What a value is that should be a path or a text."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return "not UTF-8" if value else "an empty string"
    kinds = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def is_text(value: Any) -> bool:
    """Whether `value` is a string that UTF-8 can hold: JSON's escapes allow halves of a character."""
    return isinstance(value, str) and not HALVES.search(value)


def check_columns(task: Task, seen: set[str]) -> None:
    """Raise InputError where a column that the task needs occurs in no row; `seen` are those that occur."""
    columns: Columns = task.columns
    there = ", ".join(sorted(seen))
    for image in columns_of("image"):
        if not image.many and (name := image.label(columns)) not in seen:
            at = f"tasks.{task.name}.{f'columns.{image.key}' if image.key else 'data'}"
            raise InputError(f"{at}: no row has {name}; there are {there}: name the column")
    if not task.t2i and (absent := [column for column in columns.source_columns if column not in seen]):
        raise InputError(
            f"tasks.{task.name}.columns.sources: no row has {', '.join(absent)}; there are {there}: "
            f"name the column, or set tasks.{task.name}.t2i: true"
        )
    if absent := [column for column in columns.required if column not in seen]:
        raise InputError(f"tasks.{task.name}.columns: no row has {', '.join(absent)}; there are {there}")
    if seen.isdisjoint(columns.captions):
        raise InputError(
            f"tasks.{task.name}.columns.captions: no row has {' or '.join(columns.captions)}; "
            f"there are {there}: name the caption columns"
        )
