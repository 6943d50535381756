"""The data of a task as rows, of whatever kind: text files, Parquet, a folder of `save_to_disk`, a dataset of the Hub.

A row is where it stands, the folder that its relative paths start from, and its values by column. It holds no pixels:
an embedded image has an `Embedded` name, by which `Table.read` gives its content. Text files are read here, tables
in tables.py.
"""

import ast
import csv
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import suppress
from glob import glob
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from hf_qie.config.recipe import Task
from hf_qie.data.schema import columns_of
from hf_qie.data.tables import HUB_ID, DataRow, Embedded, Table, hub_table, parquet_table, refuse_split, saved_table
from hf_qie.errors import InputError
from hf_qie.runtime.rules import show

KINDS = {".jsonl": "JSON", ".ndjson": "JSON", ".json": "JSON", ".csv": "CSV", ".tsv": "CSV", ".parquet": "Parquet"}
DELIMITERS = ",;\t"  # of CSV, as Excel writes it by country; the one that the first line has most of
BOM = b"\xef\xbb\xbf"  # the byte order mark of UTF-8, with which some editors begin a file
SAVED = ("state.json", "dataset_dict.json")  # what save_to_disk writes, of one dataset or of several splits
TextRow = tuple[str, dict[str, Any]]  # place in the file, as `:3` or `, item 3` of an array; its values by column


def open_data(task: Task, digest: Any) -> tuple[Iterator[DataRow], Table | None]:
    """The rows of a task's data, and its table where images may be embedded.

    `digest`, of hashlib, has all content once the rows are read; None where it is known already. Raises InputError for
    what is not found or cannot be read, and so does reading the rows.
    """
    first, *more = task.data
    if not more and any(os.path.isfile(os.path.join(first, name)) for name in SAVED):
        table = saved_table(task, digest)
    elif not more and not os.path.exists(first) and HUB_ID.fullmatch(first) and _suffix_of(first) not in KINDS:
        table = hub_table(task, digest)
    else:
        kind, files = _data_files(task)
        if kind != "Parquet":
            return _with_paths((row for file in files for row in _text_rows(file, task, digest)), task), None
        table = parquet_table(task, files, digest)
    return _with_paths(table.rows(digest), task), table


def _data_files(task: Task) -> tuple[str, list[Path]]:
    """The kind of the files that `data` names, and the files, globs in sorted order; raises InputError."""
    at, files = f"tasks.{task.name}.data", []
    refuse_split(task, "files have no splits; name those of one split under data")
    for pattern in task.data:
        # as it stands first: a name may have brackets
        names = [pattern] if os.path.exists(pattern) else sorted(glob(pattern, recursive=True))
        if not names:
            raise InputError(f"{at}: file not found: {pattern} (from {Path.cwd()})")
        files += map(Path, names)
    kinds = {KINDS.get(_suffix_of(file)) if file.is_file() else None: file for file in reversed(files)}
    if None in kinds:
        raise InputError(f"{at}: cannot read {kinds[None]}: {_remedy(kinds[None])}")
    if len(kinds) > 1:
        names = " and ".join(sorted(map(str, kinds.values())))
        raise InputError(f"{at}: {names} differ in kind; give them as two tasks")
    return next(iter(kinds)), files


def _remedy(path: Path) -> str:
    """What to give in place of a file or folder that cannot be read."""
    inside = sorted(path.iterdir()) if path.is_dir() else []
    if endings := ["".join(file.suffixes) for file in inside if _suffix_of(file) in KINDS]:
        return f"a folder of {endings[0]} files; give {path}/*{endings[0]}"
    others = "text also as .gz, one folder of save_to_disk or one dataset of the Hub as org/name"
    return f"give {', '.join(KINDS)} files, {others}"


def _suffix_of(path: str | Path) -> str:
    """The ending that tells the kind of a file, in lower case and without `.gz`."""
    path = Path(str(path).lower())
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _text_rows(file: Path, task: Task, digest: Any) -> Iterator[DataRow]:
    rows_of, root = _json_rows if KINDS[_suffix_of(file)] == "JSON" else _csv_rows, task.image_root or str(file.parent)
    with gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb") as binary:
        try:
            for place, row in rows_of(file, (digest.update(line) or line for line in binary)):
                yield f"{file}{place}", root, row
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise InputError(f"{file}: cannot be decompressed ({error}); compress it with gzip again") from error


def _json_rows(file: Path, lines: Iterator[bytes]) -> Iterator[TextRow]:
    """The object of each line that is not blank, or those of one array that is the whole file."""
    is_array = None  # until the first of these lines
    for number, line in enumerate(lines, start=1):
        text = line.removeprefix(BOM).strip(b" \t\r\n")
        if not text:
            continue
        is_array = text.startswith(b"[") if is_array is None else False
        try:
            found = json.loads(b"".join([line, *lines]) if is_array else line)
        except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
            expected = "one JSON array in the file" if is_array else "one JSON object in each line"
            raise InputError(f"{file}:{number}: invalid JSON ({error}); expected {expected}") from error
        for item, row in enumerate(found if is_array else [found], start=1):
            place = f", item {item}" if is_array else f":{number}"
            if not isinstance(row, dict):
                raise InputError(f"{file}{place}: got {show(row)}, expected a JSON object with columns")
            yield place, row


def _csv_rows(file: Path, lines: Iterator[bytes]) -> Iterator[TextRow]:
    """Fields by the names in the first line, placed by their last line; an empty field is null, one may be a list."""
    first = next(lines, b"")
    delimiter = max(DELIMITERS, key=lambda one: first.count(one.encode()))
    texts = (line.decode("utf-8-sig") for line in chain([first], lines))  # Excel puts a byte order mark first
    reader = csv.DictReader(texts, strict=True, delimiter=delimiter)
    try:
        names = reader.fieldnames or []
        if len(set(names)) < len(names):
            raise InputError(f"{file}:1: a column occurs twice in {', '.join(names)}")
        for row in reader:
            place = f":{reader.line_num}"
            if None in row:
                raise InputError(f"{file}{place}: more fields than the {len(names)} names in the first line")
            lists = {name: _list_in(value or "") for name, value in row.items()}
            yield place, {name: (row[name] or None) if found is None else found for name, found in lists.items()}
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{file}, after line {reader.line_num}: invalid CSV, expected UTF-8 ({error})") from error


def _list_in(text: str) -> list[str] | None:
    """The list of strings in a field of CSV, as JSON or Python write one; None for other text."""
    if not (text.startswith("[") and text.endswith("]")):
        return None
    for read in (json.loads, ast.literal_eval):
        # a path or a caption may look like a list
        with suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            found = read(text)
            if isinstance(found, list) and all(isinstance(item, str) for item in found):
                return found
    return None


def _with_paths(rows: Iterator[DataRow], task: Task) -> Iterator[DataRow]:
    """`rows` with the sources as a list in one column, and with paths of this system."""
    columns = task.columns
    images = [(one.label(columns), one.data_columns(columns), one.many) for one in columns_of("image")]
    for where, root, row in rows:
        for label, names, many in images:
            cells = [row[name] for name in names if name in row]
            if cells and not many:
                row[label] = _local_path(cells[0])
            elif cells and not task.t2i:
                several = [cell for cell in cells if cell not in (None, "", [])]
                row[label] = _sources(several if len(names) > 1 else cells[0])
        yield where, root, row


def _sources(given: Any) -> list[Any] | Any:
    """The sources of a row as a list; what is neither a path nor a list as it is."""
    found = _list_in(given) if isinstance(given, str) else given
    if found is None:
        found = [given] if given else []
    return [_local_path(path) for path in found] if isinstance(found, list) else found


def _local_path(path: Any) -> Any:
    """The path of a `file://` URL, and a path of Windows with slashes."""
    if not isinstance(path, str) or isinstance(path, Embedded):
        return path
    if path[:7].lower() == "file://":
        with suppress(ValueError):  # an invalid URL is not found, and so a bad row
            parts = urlsplit(path)
            return url2pathname(parts.path) if parts.netloc in ("", "localhost") else path
    return path if "://" in path else path.replace("\\", "/")
