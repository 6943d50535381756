"""Rows of text files: JSON Lines, a JSON array, CSV with any of three delimiters; each also compressed with gzip."""

import ast
import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from hf_qie.errors import InputError
from hf_qie.runtime.rules import show

SUFFIXES = {".jsonl": "JSON", ".ndjson": "JSON", ".json": "JSON", ".csv": "CSV", ".tsv": "CSV"}
DELIMITERS = ",;\t"  # of CSV, as Excel writes it by country; the one that the first line has most of
BLANK = b"\xef\xbb\xbf \t\r\n"  # with the byte order mark of UTF-8

TextRow = tuple[str, dict[str, Any]]  # place in the file, as `:3` or `, item 3` of an array; its values by column


def suffix_of(path: str | Path) -> str:
    """The ending that tells the kind of a file, in lower case and without `.gz`."""
    path = Path(str(path).lower())
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def text_rows(file: Path, digest: Any) -> Iterator[TextRow]:
    """The rows of a file; `digest`, of hashlib, is updated with its text as it is read. Raises InputError."""
    rows_of = _json_rows if SUFFIXES[suffix_of(file)] == "JSON" else _csv_rows
    with gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb") as binary:
        try:
            yield from rows_of(file, (digest.update(line) or line for line in binary))
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise InputError(f"{file}: cannot be decompressed ({error}); compress it with gzip again") from error


def _json_rows(file: Path, lines: Iterator[bytes]) -> Iterator[TextRow]:
    """The object of each line that is not blank, or those of one array that is the whole file."""
    is_array = None  # until the first of these lines
    for number, line in enumerate(lines, start=1):
        if not line.strip(BLANK):
            continue
        is_array = line.lstrip(BLANK).startswith(b"[") if is_array is None else False
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
            lists = {name: list_in(value or "") for name, value in row.items()}
            yield place, {name: (row[name] or None) if found is None else found for name, found in lists.items()}
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{file}, after line {reader.line_num}: invalid CSV, expected UTF-8 ({error})") from error


def list_in(text: str) -> list[str] | None:
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
