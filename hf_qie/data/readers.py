"""The data of a task as rows, of whatever kind: text files, Parquet, a folder of `save_to_disk`, a dataset of the Hub.

A row is where it stands, the folder that its relative paths start from, and its values by column. It holds no pixels:
an embedded image has an `Embedded` name, by which `Table.read` gives its content.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from glob import glob
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from hf_qie.config.recipe import Task
from hf_qie.data.schema import columns_of
from hf_qie.data.tables import HUB_ID, DataRow, Embedded, Table, hub_table, parquet_table, refuse_split, saved_table
from hf_qie.data.text_files import SUFFIXES, list_in, suffix_of, text_rows
from hf_qie.errors import InputError

KINDS = {**SUFFIXES, ".parquet": "Parquet"}
SAVED = ("state.json", "dataset_dict.json")  # what save_to_disk writes, of one dataset or of several splits
REMEDIES = {
    ".arrow": "an Arrow file; give the folder of save_to_disk that holds it",
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "a spreadsheet; save it as CSV"),
    **dict.fromkeys(
        (".jpg", ".jpeg", ".png", ".webp", ".bmp"),
        "images; give a data file with a row for each, as README.md has it under Your data",
    ),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".zst", ".bz2", ".xz"), "an archive; unpack it"),
}


def open_data(task: Task, digest: Any) -> tuple[Iterator[DataRow], Table | None]:
    """The rows of a task's data, and its table where images may be embedded.

    `digest`, of hashlib, has all content once the rows are read; None where it is known already. Raises InputError for
    what is not found or cannot be read, and so does reading the rows.
    """
    first, *more = task.data
    if not more and any(os.path.isfile(os.path.join(first, name)) for name in SAVED):
        table = saved_table(task, digest)
    elif not more and not os.path.exists(first) and HUB_ID.fullmatch(first) and suffix_of(first) not in KINDS:
        table = hub_table(task, digest)
    else:
        kind, files = _data_files(task)
        if kind != "Parquet":
            found = ((file, place, row) for file in files for place, row in text_rows(file, digest))
            rows = ((f"{file}{place}", task.image_root or str(file.parent), row) for file, place, row in found)
            return _with_paths(rows, task), None
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
    kinds = {KINDS.get(suffix_of(file)) if file.is_file() else None: file for file in reversed(files)}
    if None in kinds:
        raise InputError(f"{at}: cannot read {kinds[None]}: {_remedy(kinds[None])}")
    if len(kinds) > 1:
        names = " and ".join(sorted(map(str, kinds.values())))
        raise InputError(f"{at}: {names} differ in kind; give them as two tasks")
    return next(iter(kinds)), files


def _remedy(path: Path) -> str:
    """What to give in place of a file or folder that cannot be read."""
    inside = sorted(path.iterdir()) if path.is_dir() else [path]
    if known := [file for file in inside if suffix_of(file) in KINDS]:
        target = ", and file_name as columns.target" if known[0].stem == "metadata" else ""
        return f"a folder of {known[0].suffix} files; give {path}/*{known[0].suffix}{target}"
    others = f"give {', '.join(KINDS)} files, text also as .gz, one folder of save_to_disk or one dataset of the Hub"
    return next((REMEDIES[suffix_of(file)] for file in inside if suffix_of(file) in REMEDIES), f"{others} as org/name")


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
    found = list_in(given) if isinstance(given, str) else given
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
