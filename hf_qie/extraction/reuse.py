"""Rows of a set that are still right after its data or images changed: only the others pass the models again.

The set as it was is renamed to `.<task>-previous-<n>`, beside its folder, and deleted once the new one is complete.
"""

import json
import logging
import shutil
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features

from hf_qie.data.provenance import PROVENANCE, files_of, read_provenance, request_differences
from hf_qie.data.schema import matrix_width
from hf_qie.errors import InputError
from hf_qie.extraction.manifest import STAGING, read_manifest
from hf_qie.extraction.plan import Plan
from hf_qie.runtime.files import misfit

REQUEST = f"{STAGING}/request.json"  # what an incomplete set is made from
ROW_DIGESTS = "row_digests.npy"  # [rows, 16] uint8: what each row of the data, good or bad, was made from
DIGEST_BYTES = 16

logger = logging.getLogger(__name__)


class Reuse:
    """The rows of `table` that lie in `folders`, previous sets of the same task."""

    def __init__(self, folders: Sequence[Path], table: Dataset, features: Features):
        self.features, self.files, tables, digests = features, [], [], []
        for previous in folders:
            known = read_digests(previous)
            for path in sorted(previous.glob("data-*.arrow")) if known is not None else ():
                with suppress(OSError, LookupError, ValueError, pa.ArrowException):  # of a damaged one no row is used
                    rows = Dataset.from_file(str(path)).data.table  # memory-mapped
                    digests.append(known[rows.column("row").to_numpy()])
                    self.files.append(path)
                    tables.append(rows)
        self.rows = pa.concat_tables(tables, promote_options="default") if tables else None
        self.starts, self.is_intact = np.cumsum([0, *map(len, digests)]), cache(_is_intact)
        old = _as_binary(np.concatenate([np.empty((0, DIGEST_BYTES), np.uint8), *digests]))
        present = _as_binary(digests_of(table))
        self.places = pc.index_in(present, value_set=old).fill_null(-1).to_numpy()

    def __str__(self) -> str:
        """How many rows are reused, and how many are not."""
        num_reused = int((self.places >= 0).sum())
        return f"{num_reused:,} rows reused, {len(self.places) - num_reused:,} new or changed"

    def has(self, row: int) -> bool:
        """Whether a row needs no model."""
        place = self.places[row]
        return bool(place >= 0 and self.is_intact(self.files[np.searchsorted(self.starts, place, side="right") - 1]))

    def row(self, row: int) -> dict[str, Any]:
        """The columns of a row that `has` answered for, under its present number."""
        old, columns = self.rows.slice(self.places[row], 1), {}
        for name in self.features.keys() & set(old.column_names):
            (value,) = old.column(name)
            width = matrix_width(self.features[name]) if value.is_valid else None
            columns[name] = value.values.flatten().to_numpy().reshape(-1, width) if width else value.as_py()
        return columns | {"row": row}


def find_reuse(plan: Plan) -> Reuse | None:
    """The rows of previous sets that the set of `plan` takes over; None where there is no previous set."""
    request, folders = read_request(plan.folder), []
    for previous in previous_sets(plan.folder):
        found = read_request(previous)
        if found and request_differences(found, request) in ([], ["data"]):
            folders.append(previous)
    return Reuse(folders, plan.rows.table, plan.features) if folders else None


def has_reusable(plan: Plan) -> bool:
    """Whether a set is made anew after its data changed: a finished one only if some of its rows are the same."""
    sets = [plan.folder, *previous_sets(plan.folder)]
    return not any((one / PROVENANCE).exists() for one in sets) or any(_has_rows_of(plan, one) for one in sets)


def is_remade(plan: Plan) -> bool:
    """Whether the set that is there is of other data than those of `plan`, and has some of its rows."""
    found = read_request(plan.folder)
    return bool(found and found.get("data") != plan.rows.digest) and _has_rows_of(plan, plan.folder)


def previous_sets(folder: Path) -> list[Path]:
    """Where the sets lie that the one in `folder` takes the place of."""
    return sorted(folder.parent.glob(f".{folder.name}-previous-*"))


def rename_to_previous(folder: Path) -> None:
    """Rename a set to that of a previous one."""
    number = 1 + max((int(one.name.rpartition("-")[2]) for one in previous_sets(folder)), default=-1)
    with suppress(FileNotFoundError):  # a launch was killed after it had renamed the set
        folder.rename(folder.with_name(f".{folder.name}-previous-{number}"))


def delete_previous(folder: Path) -> None:
    """Delete the previous sets."""
    for previous in previous_sets(folder):
        shutil.rmtree(previous, ignore_errors=True)


def read_request(folder: Path) -> dict[str, Any] | None:
    """What the set in `folder`, finished or not, is made from; None where there is none. Raises InputError."""
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


def digests_of(table: Dataset) -> np.ndarray:
    """`[rows, 16]` uint8 of the rows of a task."""
    content = b"".join(table.data.column("digest").to_pylist())
    return np.frombuffer(content, np.uint8).reshape(-1, DIGEST_BYTES)


def read_digests(folder: Path) -> np.ndarray | None:
    """`[rows, 16]` uint8 of the set in `folder`, finished or not; None for a set of before there were digests."""
    for path in (folder / ROW_DIGESTS, folder / STAGING / ROW_DIGESTS):
        with suppress(OSError, ValueError, EOFError):
            digests = np.load(path, allow_pickle=False)
            if digests.dtype == np.uint8 and digests.shape[1:] == (DIGEST_BYTES,):
                return digests
    return None


def _is_intact(path: Path) -> bool:
    """Whether a chunk file of a previous set is as it was written: its rows are to be trained on."""
    try:
        if (path.parent / PROVENANCE).exists():
            was = files_of(read_provenance(path.parent))[path.name]
        else:
            was = read_manifest(path)[1]
        why = misfit(path, was)
    except (InputError, ValueError, KeyError) as error:
        why = str(error)
    if why:
        logger.warning("%s: %s; its rows are extracted again", path, why)
    return why is None


def _as_binary(digests: np.ndarray) -> pa.Array:
    """`[rows, 16]` uint8 as an Arrow column."""
    buffers = [None, pa.py_buffer(digests.tobytes())]
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(DIGEST_BYTES), len(digests), buffers)


def _has_rows_of(plan: Plan, folder: Path) -> bool:
    """Whether some row of `plan` is in the set in `folder`."""
    old, present = read_digests(folder), _as_binary(digests_of(plan.rows.table))
    return old is not None and bool(pc.any(pc.is_in(_as_binary(old), value_set=present)).as_py())
