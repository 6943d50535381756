"""The rows of a task: images, captions and what is wrong with them, before any model is loaded.

A caption column may hold a list of up to K captions, of which one is drawn at a time. In the set it becomes columns,
`instruction`, `instruction_2` to `instruction_K`; so does its inverse: the i-th inverse belongs to the i-th caption.
"""

import errno
import hashlib
import json
import math
import os
import re
import stat
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter

from hf_qie.config.data import SET_COLUMNS, Columns
from hf_qie.config.recipe import Extract, Task
from hf_qie.data.fetch import PASSWORD, holds_password, is_url
from hf_qie.data.readers import open_data
from hf_qie.data.schema import SOURCES, columns_of
from hf_qie.data.tables import DataRow, Embedded, Table, no_rows
from hf_qie.errors import InputError
from hf_qie.runtime.rules import show

THREADS = 64  # on a network disk a look at a file is a wait
PART_ROWS, BATCH_ROWS = 16, 1000  # checked by a thread at a time, written together
AHEAD = 2  # batches that are checked while the next one is read
MAX_CAPTIONS, EXAMPLES = 16, 5  # in a list; of bad rows in a message
SURROGATES = re.compile("[\ud800-\udfff]")  # halves of a character: JSON can escape them, UTF-8 cannot hold them


class BadRow(ValueError):
    """One row that cannot be used; the row is listed and the run continues, or stops with `on_bad_row: fail`.

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
    other images by name, `root` (where relative paths start), `texts` (by caption and inverse caption, null where the
    row has none), `bad` (null, or column, path and reason; such a row has no images and texts) and `digest` (16 bytes
    over what a row is made from: its values, size and time of its image files, content of embedded images). An
    embedded image has a name in place of a path, by which `stored` reads it.
    """

    table: Dataset
    columns: Columns  # those of the task, with one for each caption of a list
    stored: Table | None = None  # the data where images may be embedded
    has_inverse: bool  # some row has one
    digest: str  # sha256 over the rows'
    identity: str  # sha256 of the data alone, without the files that it names


def read_rows(task: Task, *, folder: Path, max_sources: int | None = None, extract: Extract | None = None) -> Rows:
    """Read the data of `task` and look at its files; the table is memory-mapped in `folder`.

    `max_sources` is what the checkpoint takes. Bad rows are marked; with `extract`, more of them than it allows are an
    error. Raises InputError for what is wrong with the task as a whole.
    """
    identity, names, examples, inverse = hashlib.sha256(), set(), [], False
    data, stored = open_data(task, identity)
    check = partial(_check, task=task, max_sources=max_sources, embedded=identity.hexdigest())
    path, features = folder / f"{task.name}.arrow", _features(task.columns)
    with ArrowWriter(features=features, path=str(path)) as writer:
        for batch in _in_threads(check, data):
            for where, columns, row in batch:
                names |= columns
                inverse = inverse or has_inverse(row, task)
                if row["bad"] and len(examples) < EXAMPLES:
                    examples.append(f"{where}: {BadRow(**row['bad']).named}")
            writer.write_table(pa.Table.from_pylist([row for *_, row in batch], schema=features.arrow_schema))
        writer.finalize()
    table = Dataset.from_file(str(path)).data.table
    if not len(table):
        raise InputError(no_rows(task))
    merged = [image for image in columns_of("image") if len(image.data_columns(task.columns)) > 1]
    names -= {image.label(task.columns) for image in merged}  # which no column of the data has
    _check_columns(task, names)
    _refuse_bad_rows(task, extract, table, examples=examples, names=names)
    digest = hashlib.sha256(b"".join(table.column("digest").to_pylist())).hexdigest()
    return open_rows(task, path, stored=stored, has_inverse=inverse, digest=digest, identity=identity.hexdigest())


def open_rows(task: Task, path: Path, *, stored: Table | None, **known: Any) -> Rows:
    """The rows whose table `read_rows` has written to `path`; `known`: the other fields of `Rows`."""
    table, columns = _split_lists(Dataset.from_file(str(path)), task)
    return Rows(table=table, columns=columns, stored=stored, **known)


def most_bad(extract: Extract, num_rows: int) -> float:
    """How many bad rows a task may have."""
    return 0 if extract.on_bad_row == "fail" else max(1, extract.max_bad_share * num_rows)


def refuse_bad(row: Mapping[str, Any]) -> None:
    """Raise BadRow for a row of the table that is known to be bad."""
    if row["bad"]:
        raise BadRow(**row["bad"])


def has_inverse(row: Mapping[str, Any], task: Task) -> bool:
    """Whether a row has an inverse: exactly one source and at least one inverse caption."""
    return len(row["sources"]) == 1 and any(row["texts"][caption] for caption in task.columns.inverse_captions)


def images_of(row: Mapping[str, Any], columns: Columns) -> list[tuple[str, str]]:
    """The images of a row: in a message the column of each, and its path."""
    return [(image.label(columns), path) for image in columns_of("image") for path in image.paths(row)]


def _features(columns: Columns) -> Features:
    text, texts = Value("string"), dict.fromkeys(text_columns(columns), List(Value("string")))
    bad, images = dict.fromkeys(("column", "path", "reason"), text), columns_of("image")
    features = {"row": Value("int64"), "root": text, "texts": texts, "bad": bad, "digest": Value("binary")}
    return Features(features | {image.row_key: image.type for image in images})


def text_columns(columns: Columns) -> tuple[str, ...]:
    """All columns of captions and inverse captions."""
    return (*columns.captions, *columns.inverse_captions)


def _in_threads(check: Callable[[tuple[int, DataRow]], Any], data: Iterator[DataRow]) -> Iterator[list]:
    """What `check` gives for each numbered row of the data, in batches; threads run it while others are read."""
    numbered, waiting = enumerate(data), deque()
    with ThreadPoolExecutor(THREADS, "check") as threads:
        while (batch := list(islice(numbered, BATCH_ROWS))) or waiting:
            if starts := range(0, len(batch), PART_ROWS):
                waiting.append([threads.submit(list, map(check, batch[i : i + PART_ROWS])) for i in starts])
            if len(waiting) > AHEAD or not batch:
                yield list(chain.from_iterable(part.result() for part in waiting.popleft()))


def _check(
    numbered: tuple[int, DataRow], *, task: Task, max_sources: int | None, embedded: str
) -> tuple[str, Set[str], dict[str, Any]]:
    """Where a row stands, its columns, and the row of the table; `embedded`: digest of data with embedded images."""
    number, (where, root, values) = numbered
    nothing = {"texts": dict.fromkeys(text_columns(task.columns), ())}
    nothing |= {image.row_key: [] if image.many else None for image in columns_of("image")}
    row, bad, files, names = {"row": number, "root": root} | nothing, None, [], []
    try:
        row |= _check_values(values, task, max_sources)
        images = images_of(row, task.columns)
        names = [path for _, path in images if isinstance(path, Embedded)]
        local = [(column, path) for column, path in images if not (isinstance(path, Embedded) or is_url(path))]
        files = [_look_at(os.path.join(root, path)) for _, path in local]
        for (column, path), file in zip(local, files, strict=True):
            if isinstance(file, str):
                raise BadRow(file, column=column, path=path)
    except BadRow as error:
        bad = vars(error)
    content = json.dumps([{**row, "row": None, "bad": bad}, task.t2i, files, names and embedded], sort_keys=True)
    digest = hashlib.blake2b(content.encode(), digest_size=16).digest()  # without the number: a row may move
    return where, values.keys(), row | (nothing if bad else {}) | {"bad": bad, "digest": digest}


def _refuse_bad_rows(
    task: Task, extract: Extract | None, table: pa.Table, *, examples: Sequence[str], names: Set[str]
) -> None:
    """Raise InputError where no row of the table is usable or, by `extract`, too many are bad.

    `examples` tells of the first bad rows, `names` are the columns of the data.
    """
    bad = table.select(["bad", "root"]).filter(pc.is_valid(table.column("bad"))).to_pylist()
    if bad and extract and extract.on_bad_row == "fail":
        raise InputError(f"{examples[0]}; fix it, or set extract.on_bad_row: skip to list such rows")
    most = most_bad(extract, len(table)) if extract else math.inf
    if len(bad) < len(table) and len(bad) <= most:
        return
    at, reasons = f"tasks.{task.name}", Counter(f"{row['bad']['column']}: {row['bad']['reason']}" for row in bad)
    rule = "none is left" if len(bad) == len(table) else f"extract.max_bad_share allows {most:,.0f}"
    lines = [f"{at}: {len(bad):,} of {len(table):,} rows are bad, {rule}:"]
    lines += [f"  {number:,}: {reason}" for reason, number in reasons.most_common()]
    lines += [f"relative paths start from {bad[0]['root']}; name another folder with {at}.image_root"]
    lines += [f"the columns in the data are {', '.join(sorted(names))}; name others with {at}.columns"]
    raise InputError("\n".join([*examples, *lines]))


def _look_at(file: str) -> tuple[int, int] | str:
    """Size and time of modification (ns) of a file, or why it cannot be used."""
    try:
        status = os.stat(file)
    except (OSError, ValueError) as error:  # ValueError: a name with a zero or a surrogate
        return getattr(error, "strerror", os.strerror(errno.ENOENT))
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else "a folder or device, not a file"


def _check_values(values: Mapping[str, Any], task: Task, max_sources: int | None) -> dict[str, Any]:
    """Images and texts of one row of the data; raises BadRow."""
    row, texts = {}, {}
    for image in columns_of("image"):
        label = image.label(task.columns)
        if not image.many and label not in values:
            raise BadRow("missing", column=label)
        row[image.row_key] = found = [] if image.many and task.t2i else values.get(label, [])
        for path in found if image.many and isinstance(found, list) else [found]:
            _check_path(path, column=label)
        if image.name == SOURCES and max_sources is not None and len(found) > max_sources:
            remedy = "use a checkpoint that takes more" + f", or set tasks.{task.name}.t2i: true" * (not max_sources)
            raise BadRow(f"{len(found)} sources, this checkpoint takes {max_sources}; {remedy}", column=label)
    for column in text_columns(task.columns):
        found = values.get(column)
        found = found if isinstance(found, list) else [found]
        if wrong := [text for text in found if text is not None and not _is_text(text)]:
            raise BadRow(f"got {_kind_of(wrong[0])}, expected a string or null", column=column)
        texts[column] = [text for text in found if text and text.strip()]
        if (count := len(texts[column])) > MAX_CAPTIONS:
            raise BadRow(f"{count} captions, at most {MAX_CAPTIONS} are stored; shorten the list", column=column)
    return row | {"texts": texts}


def _check_path(path: Any, *, column: str) -> None:
    if not _is_text(path) or not path:
        shown = None if path is None else show(path).encode(errors="replace").decode()
        raise BadRow(f"got {_kind_of(path)}, expected the path or URL of an image", column=column, path=shown)
    if is_url(path) and holds_password(path):
        raise BadRow(PASSWORD, column=column, path=re.sub("//[^/?#]*@", "//", path, count=1))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not SURROGATES.search(value)


def _kind_of(value: Any) -> str:
    if isinstance(value, str):
        return "text that is not UTF-8" if value else "an empty string"
    return "null" if value is None else type(value).__name__


def _check_columns(task: Task, names: set[str]) -> None:
    """Raise InputError where a column that the task needs is in no row; `names` are the columns of the data."""
    columns, at, there = task.columns, f"tasks.{task.name}", f"there are {', '.join(sorted(names))}"
    for image in columns_of("image"):
        absent = ", ".join(name for name in image.data_columns(columns) if name not in names)
        if absent and not (image.many and task.t2i):
            key, remedy = f"columns.{image.key}" if image.key else "data", f", or set {at}.t2i: true" * image.many
            raise InputError(f"{at}.{key}: no row has {absent}; {there}: name the column{remedy}")
    if absent := [column for column in columns.required if column not in names]:
        raise InputError(f"{at}.columns: no row has {', '.join(absent)}; {there}")
    if names.isdisjoint(columns.captions):
        absent = " or ".join(columns.captions)
        raise InputError(f"{at}.columns.captions: no row has {absent}; {there}: name the caption columns")


def _split_lists(table: Dataset, task: Task) -> tuple[Dataset, Columns]:
    """`table`, whose `texts` are lists by caption column, with a column for each caption of a list.

    Returns also the columns of the task with these. Raises InputError for a name that another column has.
    """
    columns, names = task.columns, {}
    for pair in zip_longest(columns.captions, columns.inverse_captions):
        pair = [name for name in pair if name]
        lists = [texts.field(name) for texts in table.data.column("texts").chunks for name in pair]
        longest = max(1, *(pc.max(pc.list_value_length(one)).as_py() for one in lists))
        names |= {name: [name, *(f"{name}_{i}" for i in range(2, longest + 1))] for name in pair}
    new = {column for name in names for column in names[name][1:]}
    if clash := sorted(new & ({*names, *(column.name for column in columns_of())} | SET_COLUMNS)):
        raise InputError(
            f"tasks.{task.name}.columns: the captions in the lists become columns, and {clash[0]} is one already; "
            "rename the column"
        )
    if new:  # what the set is made from names them
        split = [tuple(chain(*map(names.get, some))) for some in (columns.captions, columns.inverse_captions)]
        columns = columns.model_copy(update=dict(zip(("captions", "inverse_captions"), split, strict=True)))
    return table.with_transform(partial(_one_each, names=names)), columns


def _one_each(batch: dict[str, list[Any]], names: Mapping[str, list[str]]) -> dict[str, list[Any]]:
    """A batch of rows with a caption, or null, by column."""
    if "texts" in batch:
        batch["texts"] = [
            {column: text for name, columns in names.items() for column, text in zip_longest(columns, lists[name])}
            for lists in batch["texts"]
        ]
    return batch
