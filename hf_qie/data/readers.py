"""What a task's `data` names, of any kind, as lines: text files, Parquet, a saved dataset or one of the Hub.

A line is where it stands, the folder that its relative paths start from, and its values by column. It holds no pixels:
for an image that lies in the data itself it has an `Embedded` name, by which `Table.read` gives the bytes. Of tables
only the columns that the recipe names are read.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from glob import glob
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from hf_qie.config.recipe import Task
from hf_qie.data.schema import columns_of
from hf_qie.data.tables import HUB_ID, Embedded, Line, Table, hub_table, parquet_table, refuse_split, saved_table
from hf_qie.data.text_files import SUFFIXES, list_in, suffix_of, text_rows
from hf_qie.errors import InputError

KINDS = {**SUFFIXES, ".parquet": "Parquet"}
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
SAVED = ("state.json", "dataset_dict.json")  # what save_to_disk writes, of one dataset or of several splits
# of files that others read, what to do
REMEDIES = {
    ".arrow": "an Arrow file; give the folder of save_to_disk in which it lies",
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "a spreadsheet; save it as CSV"),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".zst", ".bz2", ".xz"), "an archive; unpack it"),
}
# run by test_records.py as it stands
FROM_FOLDER = (
    'python -c "import json, pathlib; '
    "[print(json.dumps(dict(source_image='SOURCES/' + i.name, target_image=str(i), "
    "instruction=i.with_suffix('.txt').read_text('utf-8')))) "
    "for i in sorted(pathlib.Path('{folder}').resolve().iterdir()) "
    "if i.suffix != '.txt' and i.with_suffix('.txt').is_file()]\" > '{folder}.jsonl'"
)


def open_data(task: Task, digest: Any) -> "tuple[Iterator[Line], Table | None]":
    """The lines of a task's data, and its table where images may lie in it.

    `digest`, of hashlib, has taken in all content once the lines are read; None where it is known already. Raises
    InputError for what is not there or cannot be read, and so do the lines.
    """
    first, *more = task.data
    is_file = suffix_of(first) in KINDS
    if not more and any(os.path.isfile(os.path.join(first, name)) for name in SAVED):
        table = saved_table(task, digest)
    elif not more and not os.path.exists(first) and HUB_ID.fullmatch(first) and not is_file:
        table = hub_table(task, digest)
    else:
        kind, files = data_files(task)
        if kind != "Parquet":
            return with_paths(text_lines(task, files, digest), task), None
        table = parquet_table(task, files, digest)
    return with_paths(table.lines(digest), task), table


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
    kinds = {KINDS.get(suffix_of(file)) if file.is_file() else None: file for file in reversed(files)}
    if None in kinds:
        raise InputError(f"{at}: {kinds[None]} cannot be read: {way_on(kinds[None])}")
    if len(kinds) > 1:
        names = " and ".join(sorted(map(str, kinds.values())))
        raise InputError(f"{at}: {names} differ in kind; give them as two tasks")
    return next(iter(kinds)), files


def way_on(path: Path) -> str:
    """What to give in place of a file or folder that is of no known kind."""
    inside = sorted(path.iterdir()) if path.is_dir() else [path]
    if known := [file for file in inside if suffix_of(file) in KINDS]:
        target = ", and file_name as columns.target" if known[0].stem == "metadata" else ""
        return f"a folder of {known[0].suffix} files; give {path}/*{known[0].suffix}{target}"
    if any(suffix_of(file) in IMAGES for file in inside):
        command = FROM_FOLDER.format(folder=path if path.is_dir() else path.parent)
        return (
            "images. Where each has its caption in a .txt file beside it, and the image to edit has the same name in "
            f"a folder SOURCES, this writes the data file: {command}"
        )
    if remedy := REMEDIES.get(path.suffix.lower()):
        return remedy
    return (
        f"give {', '.join(KINDS)} files, text also as .gz, one folder of save_to_disk or one dataset of the Hub as "
        "org/name"
    )


def text_lines(task: Task, files: Iterable[Path], digest: Any) -> Iterator[Line]:
    """The lines of text files, by file and line; `digest` takes in the files as they are read."""
    for file in files:
        for place, row in text_rows(file, digest):
            yield f"{file}{place}", task.image_root or str(file.parent), row


def with_paths(lines: Iterator[Line], task: Task) -> Iterator[Line]:
    """`lines` with the sources as a list, in one column; paths are those of this system."""
    names, label = task.columns.source_columns, task.columns.source_label
    single = [name for image in columns_of("image") if not image.many for name in image.data_columns(task.columns)]
    for where, root, row in lines:
        if cells := [] if task.t2i else [row[name] for name in names if name in row]:
            several = len(names) > 1
            sources = [cell for cell in cells if cell not in (None, "", [])] if several else as_list(cells[0])
            if isinstance(sources, list):
                sources = [local_path(path, root) for path in sources]
            row[label] = sources
        row |= {name: local_path(row[name], root) for name in single if name in row}
        yield where, root, row


def as_list(sources: Any) -> Any:
    """No image, one or several as a list."""
    if isinstance(sources, str):
        found = list_in(sources)
        return found if found is not None else [sources] if sources else []
    return [] if sources is None else sources


def local_path(path: Any, root: str) -> Any:
    """What a `file://` URL names; a path of Windows with the slashes of this system, unless there is such a file."""
    if not isinstance(path, str) or isinstance(path, Embedded):
        return path
    if path[:7].lower() == "file://":
        with suppress(ValueError):  # no valid URL: a bad row, as no such file is there
            if urlsplit(path).netloc in ("", "localhost"):
                return url2pathname(urlsplit(path).path)
    if "\\" in path and "://" not in path:
        folder, slash, _ = path.partition("\\")[0].rpartition("/")
        name = path[len(folder + slash) :].partition("/")[0]
        if name not in with_backslashes(os.path.join(root, folder + slash)):
            return path.replace("\\", "/")
    return path


@cache  # a look at each of a million files takes minutes on a network disk
def with_backslashes(folder: str) -> frozenset[str]:
    """The names in a folder that have one."""
    with suppress(OSError, ValueError):
        return frozenset(name for name in os.listdir(folder or ".") if "\\" in name)
    return frozenset()
