"""Text files of rows: JSON lines, a JSON array, CSV with any of three delimiters; each also compressed with gzip.

A row is its place in the file, as `:3` for a line or `, item 3` for one of an array, and its values by column.
"""

import ast
import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from hf_qie.errors import InputError

SUFFIXES = {".jsonl": "JSON", ".ndjson": "JSON", ".json": "JSON", ".csv": "CSV", ".tsv": "CSV"}
DELIMITERS = ",;\t"  # of CSV, as Excel writes it by country; the one that the first line has most of
BLANK = b"\xef\xbb\xbf \t\r\n"  # with the byte order mark of UTF-8

Row = tuple[str, dict[str, Any]]


def suffix_of(path: str | Path) -> str:
    """What says of which kind a file is: its ending in lower case, that of gzip aside."""
    path = Path(str(path).lower())
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def text_rows(file: Path, digest: Any) -> Iterator[Row]:
    """The rows of a file; `digest` takes in its text as it is read. Raises InputError for what cannot be read."""
    rows_of = {"JSON": json_rows, "CSV": csv_rows}[SUFFIXES[suffix_of(file)]]
    compressed = file.suffix.lower() == ".gz"
    with gzip.open(file) if compressed else file.open("rb") as binary:
        try:
            yield from rows_of(file, hashed(binary, digest))
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise InputError(f"{file}: cannot be decompressed ({error}); compress it with gzip again") from error


def hashed(lines: Iterable[bytes], digest: Any) -> Iterator[bytes]:
    """`lines`, taken in by `digest` as they go by."""
    for line in lines:
        digest.update(line)
        yield line


def json_rows(file: Path, lines: Iterator[bytes]) -> Iterator[Row]:
    """The object of each line that is not blank, or those of one array that is the whole file."""
    first = True
    for number, line in enumerate(lines, start=1):
        if not line.strip(BLANK):
            continue
        is_array, first = first and line.lstrip(BLANK).startswith(b"["), False
        try:
            found = json.loads(b"".join([line, *lines]) if is_array else line)
        except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are the first
            wanted = "the file has to be one array" if is_array else "each line has to be one JSON object"
            raise InputError(f"{file}:{number}: no JSON ({error}); {wanted}") from error
        for item, row in enumerate(found if is_array else [found], start=1):
            place = f", item {item}" if is_array else f":{number}"
            if not isinstance(row, dict):
                raise InputError(f"{file}{place}: {clip(row)} is no JSON object with columns")
            yield place, row


def csv_rows(file: Path, lines: Iterator[bytes]) -> Iterator[Row]:
    """Fields by the names of the first line, placed by their last line; an empty field is null, one may be a list."""
    first = next(lines, b"")
    delimiter = max(DELIMITERS, key=lambda one: first.count(one.encode()))
    # with the mark that Excel puts before UTF-8
    texts = (line.decode("utf-8-sig") for line in chain([first], lines))
    reader = csv.DictReader(texts, strict=True, delimiter=delimiter)
    try:
        names = reader.fieldnames or []
        if len(set(names)) < len(names):
            raise InputError(f"{file}:1: a column occurs twice in {', '.join(names)}")
        for row in reader:
            if None in row:
                raise InputError(
                    f"{file}:{reader.line_num}: more fields than the {len(names)} names of the first line"
                )
            yield f":{reader.line_num}", {name: field_of(value) for name, value in row.items()}
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{file}, after line {reader.line_num}: no CSV in UTF-8 ({error})") from error


def field_of(value: str | None) -> str | list[str] | None:
    """What a field of CSV holds."""
    found = list_in(value or "")
    return (value or None) if found is None else found


def list_in(text: str) -> list[str] | None:
    """The list of strings that a string holds, as JSON or Python write it, since CSV has none; None for other text."""
    if not (text.startswith("[") and text.endswith("]")):
        return None
    for read in (json.loads, ast.literal_eval):
        # a path or a caption may begin so too
        with suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            found = read(text)
            if isinstance(found, list) and all(isinstance(item, str) for item in found):
                return found
    return None


def clip(value: Any) -> str:
    """A value for an error message, not longer than a line."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
