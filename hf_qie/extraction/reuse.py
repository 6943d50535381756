"""Rows of a set that are still right after its data or images changed: only the others pass the models again.

What was made of the old data is set aside within the set's folder, and deleted once the set is whole again.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache, lru_cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from accelerate.logging import get_logger
from datasets import Dataset, Features

from hf_qie.data.provenance import PROVENANCE, files_of, read_provenance, request_differences
from hf_qie.data.samples import Rows
from hf_qie.errors import InputError
from hf_qie.extraction.manifest import REQUEST, UNFINISHED, read_account
from hf_qie.runtime.alive import at_any_length
from hf_qie.runtime.files import misfit, move_durably

ROW_DIGESTS = "row_digests.npy"  # [rows, 16] uint8: what each row of the data, good or bad, was made from
DIGEST_BYTES = 16
FILES_OPEN = 8  # of what was set aside, which rows of the new order come from

logger = get_logger(__name__)


class Kept:
    """The rows of `table` that lie in `folders`, which were set aside."""

    def __init__(self, folders: Sequence[Path], table: Dataset, features: Features):
        self.features, self.files, digests = features, [], []
        self.open_file, self.is_whole = lru_cache(FILES_OPEN)(open_file), cache(is_whole)
        for before in folders:
            known = read_digests(before)
            for path in sorted(before.glob("data-*.arrow")) if known is not None else ():
                with suppress(OSError, LookupError, ValueError, pa.ArrowException):  # a damaged one keeps no rows
                    digests.append(known[open_file(path).column("row").to_numpy()])
                    self.files.append(path)
        self.starts = np.cumsum([0, *map(len, digests)])
        old = as_binary(np.concatenate(digests) if digests else np.empty((0, DIGEST_BYTES), np.uint8))
        present = as_binary(digests_of(table))
        self.places = pc.index_in(present, value_set=old).fill_null(-1).to_numpy()
        gone = pc.invert(pc.is_in(old.unique(), value_set=present))
        self.num_gone = int(pc.sum(gone).as_py() or 0)

    def __str__(self) -> str:
        """How many rows are kept, new or changed, and removed."""
        num_kept = int((self.places >= 0).sum())
        num_new = len(self.places) - num_kept
        removed = max(0, self.num_gone - num_new)
        return f"{num_kept:,} rows kept, {num_new:,} new or changed, {removed:,} removed"

    def has(self, row: int) -> bool:
        """Whether a row needs no model."""
        place = self.places[row]
        return bool(place >= 0 and self.is_whole(self.files[self.file_of(place)]))

    def row(self, row: int) -> pa.Table:
        """The columns of a row that `has` answered for, under its present number."""
        place = self.places[row]
        number = self.file_of(place)
        old = self.open_file(self.files[number]).slice(place - self.starts[number], 1)
        schema = pa.schema(self.features.type)
        arrays = [
            old.column(field.name).cast(field.type) if field.name in old.column_names else pa.nulls(1, field.type)
            for field in schema
        ]
        arrays[schema.get_field_index("row")] = pa.array([row])
        return pa.table(arrays, schema=schema)

    def file_of(self, place: int) -> int:
        """Which file holds a row."""
        return int(np.searchsorted(self.starts, place, side="right")) - 1


def find_kept(folder: Path, table: Dataset, features: Features, *, task: str) -> Kept | None:
    """What is kept of a set whose data changed; None where nothing was set aside."""
    request = read_request(folder)
    folders = [before for before in set_aside_in(folder) if fits(read_request(before), request)]
    if not folders:
        return None
    with at_any_length("the reading of what was extracted before"):
        kept = Kept(folders, table, features)
    logger.info("%s: its data or images changed: %s", task, kept)
    return kept


def fits(found: Mapping[str, Any] | None, request: Mapping[str, Any] | None) -> bool:
    """Whether rows of a set are those of another one whose data alone differ."""
    return bool(found and request) and request_differences(found, request) in ([], ["data"])


def open_file(path: Path) -> pa.Table:
    """A chunk file, memory-mapped."""
    return Dataset.from_file(str(path)).data.table


def is_whole(path: Path) -> bool:
    """Whether a chunk file that was set aside is what was written: its rows are to be trained on."""
    with at_any_length("the reading of what was extracted before"):
        try:
            finished = (path.parent / PROVENANCE).exists()
            if finished:
                was = files_of(read_provenance(path.parent))[path.name]
            else:  # a launch that began with other data may have written it among those of this request
                was = read_account(path, data=read_request(path.parent)["data"])[1]
            why = misfit(path, was)
        except (InputError, ValueError, KeyError) as error:
            why = str(error)
    if why:
        logger.warning("%s %s; its rows are extracted again", path, why, main_process_only=False)
    return why is None


def in_order(made: pa.Table, places: Sequence[int | pa.Table]) -> pa.Table:
    """Rows of `made`, by their place there, and tables of one row each that were kept."""
    rows = [one if isinstance(one, pa.Table) else made.slice(one, 1) for one in places]
    rows.append(rows[0].slice(0, 0))  # else one row alone stays a view of the file that it lies in
    return pa.concat_tables(rows).combine_chunks()


def digests_of(table: Dataset) -> np.ndarray:
    """`[rows, 16]` uint8 of the rows of a task."""
    content = b"".join(table.data.column("digest").to_pylist())
    return np.frombuffer(content, np.uint8).reshape(-1, DIGEST_BYTES)


def as_binary(digests: np.ndarray) -> pa.Array:
    """`[rows, 16]` uint8 as an Arrow column."""
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(DIGEST_BYTES), len(digests), [None, pa.py_buffer(digests.tobytes())]
    )


def share(old: np.ndarray | None, present: np.ndarray) -> bool:
    """Whether some row is in both."""
    return old is not None and bool(pc.any(pc.is_in(as_binary(old), value_set=as_binary(present))).as_py())


def read_request(folder: Path) -> dict[str, Any] | None:
    """What the set in `folder`, finished or not, is made from; None where there is none."""
    if (folder / PROVENANCE).exists():
        request = read_provenance(folder)["record"].get("request")
    elif (folder / REQUEST).exists():
        try:
            request = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            request = None
    else:
        return None
    if not isinstance(request, dict) or not isinstance(request.get("compat"), dict):
        raise InputError(f"{folder}: does not say what it is made from, as extract.py does; delete it and start again")
    return request


def keeps_some(folder: Path, rows: Rows) -> bool:
    """Whether a set is of other data than `rows`, and has some of them."""
    found = read_request(folder)
    return (
        found is not None and found.get("data") != rows.digest and share(read_digests(folder), digests_of(rows.table))
    )


def read_digests(folder: Path) -> np.ndarray | None:
    """`[rows, 16]` uint8 of the set in `folder`, finished or not; None where it has none, as older ones."""
    for path in (folder / ROW_DIGESTS, folder / UNFINISHED / ROW_DIGESTS):
        with suppress(OSError, ValueError, EOFError):
            digests = np.load(path, allow_pickle=False)
            if digests.dtype == np.uint8 and digests.shape[1:] == (DIGEST_BYTES,):
                return digests
    return None


def write_digests(digests: np.ndarray, path: Path, *, aside: Path) -> None:
    """Write `path`, which appears when it is whole."""
    np.save(aside / path.name, digests, allow_pickle=False)
    move_durably(aside / path.name, path)


def is_marked(folder: Path) -> bool:
    """Whether a folder says what its set is made from."""
    return any((folder / name).exists() for name in (PROVENANCE, REQUEST))


def is_interrupted(folder: Path) -> bool:
    """Whether a launch was killed while it set aside what is in `folder`."""
    return not all(map(is_marked, set_aside_in(folder)))


def set_aside_in(folder: Path) -> list[Path]:
    """Where what was set aside lies."""
    return sorted((folder / UNFINISHED).glob("before-*"))


def set_aside(folder: Path) -> None:
    """Move what is made of a set out of the way of what is to be made; called again, it ends what a kill interrupted.

    The file that says what it is made from moves last. Several launches may be at it.
    """
    unfinished = folder / UNFINISHED
    if (folder / PROVENANCE).exists():
        (folder / REQUEST).unlink(missing_ok=True)
    aside = next(path for n in count() if not is_marked(path := unfinished / f"before-{n}"))
    (aside / UNFINISHED).mkdir(parents=True, exist_ok=True)
    files = [path for path in (*folder.iterdir(), *unfinished.iterdir()) if path.is_file()]
    for path in sorted(files, key=lambda path: path in (folder / PROVENANCE, folder / REQUEST)):
        with suppress(FileNotFoundError):
            path.replace(aside / path.relative_to(folder))
