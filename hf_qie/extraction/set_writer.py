"""An embedding set while it is written: one folder that every rank, machine and launch writes its chunks into.

What the set is made from is written first, `provenance.json` last. A chunk is locked while it is written, and appears
under its name once it is complete; whoever finds all chunks there completes the set.
"""

import json
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import DatasetInfo
from datasets.config import DATASET_INFO_FILENAME, DATASET_STATE_JSON_FILENAME
from filelock import BaseFileLock

from hf_qie.config.recipe import as_dict, save_recipe
from hf_qie.data.provenance import PROVENANCE, files_of, fingerprint, read_provenance, request_differences
from hf_qie.errors import InputError
from hf_qie.extraction.manifest import STAGING, Counts, read_manifest
from hf_qie.extraction.plan import Plan
from hf_qie.extraction.reuse import (
    REQUEST,
    ROW_DIGESTS,
    delete_previous,
    digests_of,
    has_reusable,
    previous_sets,
    read_digests,
    read_request,
    rename_to_previous,
)
from hf_qie.models.base import family_name
from hf_qie.runtime.device import AUTO
from hf_qie.runtime.files import check_sizes, move_durably, write_durably, written
from hf_qie.runtime.lock import in_turn, in_use, take
from hf_qie.runtime.ranks import rank, world_size

PART = ".part"  # ends the name of a chunk file that is being written

logger = logging.getLogger(__name__)


def request_of(plan: Plan, compat: Mapping[str, Any], *, dtype: torch.dtype | str) -> dict[str, Any]:
    """All that decides the content of a set, as JSON; a set is only resumed if this is unchanged.

    `dtype`: what encoder and VAE compute in. Not the batch sizes, though they move the last bits: who runs out of
    memory may resume with smaller ones.
    """
    task, settings = plan.task, as_dict(plan.extract)
    roots = [task.image_root] if task.image_root else sorted({str(Path(name).parent) for name in task.data})
    sizes = {"vae_area_px": plan.source_area_px, "drop_caption": plan.extract.drop_caption}
    compat = dict(compat) | {field: compat.get(field, value) for field, value in sizes.items()}
    request = {"compat": compat, "data": plan.rows.digest, "identity": plan.rows.identity}
    request |= {"image_root": roots, "t2i": task.t2i}
    request |= {"columns": as_dict(plan.recipe.tasks[task.name].columns)}  # as lists of captions may grow, row by row
    request |= {"dtype": str(dtype).removeprefix("torch.")}
    request |= {name: settings[name] for name in ("image_sample_size", "inverse", "latents", "chunk_rows")}
    return json.loads(json.dumps(request))


def set_lock(folder: Path) -> AbstractContextManager[None]:
    """The lock that is held to open a set, to claim a chunk of it and to finish it; it lies beside the folder."""
    return in_turn(folder.with_name(f".{folder.name}.lock"))


def check_request(folder: Path, request: Mapping[str, Any]) -> None:
    """Raise InputError where the set in `folder` is no more the one that was opened for `request`."""
    if read_request(folder) != request:
        raise InputError(f"{folder}: another launch began it anew, from other data or settings; start again")


class SetWriter:
    """Writes the set of a task; `request` is what it is made from, as by `request_of`.

    `can_reuse`: whether the digests of rows cover all that they are made from, so that equal ones are taken over.
    """

    def __init__(self, plan: Plan, request: Mapping[str, Any], *, can_reuse: bool = True):
        self.plan, self.request, self.can_reuse, self.folder = plan, request, can_reuse, plan.folder
        self.staging = self.folder / STAGING

    @property
    def is_finished(self) -> bool:
        """Whether the set may be read."""
        return (self.folder / PROVENANCE).exists()

    @cached_property
    def chunks(self) -> dict[Path, range]:
        """Every chunk file of the set and the rows it holds; fixed by `chunk_rows`, whoever writes them."""
        num_rows, step = len(self.plan.rows.table), self.plan.extract.chunk_rows
        starts = range(0, num_rows, step)
        return {
            self.folder / f"data-{i:05d}-of-{len(starts):05d}.arrow": range(start, min(start + step, num_rows))
            for i, start in enumerate(starts)
        }

    def rows_done(self) -> int:
        """Rows of the chunks that are there."""
        names = set(os.listdir(self.folder))
        return sum(len(rows) for path, rows in self.chunks.items() if path.name in names)

    def open(self) -> None:
        """Make the folder ready: for a new set, or to resume one of the same request.

        Where nothing but the data differ, a set is replaced by one that reuses the rows that are the same. Raises
        InputError for a set made from something else, unless `extract.overwrite` is set, and for one that would be
        replaced but is in use.
        """
        with set_lock(self.folder):
            sets = [self.folder, *reversed(previous_sets(self.folder))]
            found = next(filter(None, map(read_request, sets)), self.request)
            differing = request_differences(found, self.request)
            if differing == ["dtype"] and self.plan.extract.dtype == AUTO and self.is_finished:
                differing = []  # such a set is right whatever device opens it
            if differing:
                is_reused = self.can_reuse and differing == ["data"] and has_reusable(self.plan)
                if not is_reused and not self.plan.extract.overwrite:
                    raise self._refusal(found, differing)
                for path in self.staging.glob("*.lock"):
                    if (lock := take(path)) is None:
                        raise in_use(self.folder, path, remedy="give another extract.output_dir")
                    lock.release()
                rename_to_previous(self.folder)
                if not is_reused:
                    delete_previous(self.folder)
            self._clean()

    def _refusal(self, found: Mapping[str, Any], differing: list[str]) -> InputError:
        made_for, family = (family_name(request["compat"]) for request in (found, self.request))
        if made_for != family:
            return InputError(
                f"{self.folder}: was made for {made_for}, {self.plan.recipe.model} is {family}; give another "
                "extract.output_dir, or set extract.overwrite: true to delete it and start again"
            )
        fields = ", ".join(differing)
        if differing == ["data"] and (old := read_digests(self.folder)) is not None:
            what = "size or time of their images" if found.get("identity") == self.request["identity"] else "the data"
            fields += f" ({what} changed in all of its {len(old):,} rows)"
        return InputError(
            f"{self.folder}: was made with another {fields}; give another extract.output_dir, or set "
            "extract.overwrite: true to delete it and start again"
        )

    def _clean(self) -> None:
        """Delete what a finished set needs no more, or begin an incomplete one and delete its damaged chunks."""
        if self.is_finished:
            delete_previous(self.folder)
            shutil.rmtree(self.staging, ignore_errors=True)
            check_sizes(self.folder, files_of(read_provenance(self.folder)))
            return
        if read_request(self.folder) is None:
            if self.folder.exists() and any(path != self.staging for path in self.folder.iterdir()):
                raise InputError(
                    f"{self.folder}: holds files that are no embedding set; give another extract.output_dir"
                )
            self.staging.mkdir(parents=True, exist_ok=True)
            if self.can_reuse:
                np.save(self.staging / ROW_DIGESTS, digests_of(self.plan.rows.table), allow_pickle=False)
            write_durably(self.folder / REQUEST, json.dumps(self.request))
        for path in filter(Path.exists, self.chunks):
            try:
                read_manifest(path)
            except ValueError as error:
                logger.warning("%s: %s; it is written again", path, error)
                path.unlink()

    def claims(self) -> Iterator[tuple[Path, range, BaseFileLock]]:
        """The chunks to write, with their locks; the caller releases each once the chunk is complete.

        Raises InputError where another launch has begun the set anew.
        """
        i, n = self.plan.extract.shard or (0, 1)
        chunks = list(self.chunks.items())[i::n]
        # ranks begin apart: they seldom ask for the same chunk, though a file system lock for one machine alone
        first = len(chunks) * rank() // world_size()
        for path, rows in chunks[first:] + chunks[:first]:
            if not path.exists() and (lock := self._claim(path)):
                yield path, rows, lock

    def _claim(self, path: Path) -> BaseFileLock | None:
        with set_lock(self.folder):
            check_request(self.folder, self.request)
            lock = None if self.is_finished else take(self.staging / f"{path.stem}.lock")
            if lock and path.exists():  # completed in between
                lock.release()
                return None
            for part in self.staging.glob(f"{path.stem}-*{PART}") if lock else ():
                part.unlink()  # of a process that was killed
            return lock

    def part(self, chunk: Path) -> Path:
        """Where to write the file of a claimed chunk: apart from machines that locks do not reach."""
        return self.staging / f"{chunk.stem}-{socket.gethostname()}{PART}"

    def finish(self, record: Callable[[], Mapping[str, Any]]) -> bool:
        """Complete the set if all its chunks are there; True for the one process that did.

        `record` says what the set was made with, for the reader.
        """
        with set_lock(self.folder):
            is_ours = not self.is_finished and read_request(self.folder) == self.request
            if not is_ours or self.rows_done() < len(self.plan.rows.table):
                return False
            self._write_rest(record())
            self._clean()
            return True

    def _write_rest(self, record: Mapping[str, Any]) -> None:
        """Write what stands beside the chunk files; `provenance.json`, the last, says that the set is complete."""
        total, files = Counts(), {}
        for path in self.chunks:
            try:
                counts, files[path.name] = read_manifest(path)
            except ValueError as error:
                raise InputError(f"{path}: {error}; start again") from error
            total.add(counts)
        assert total.rows_in == total.rows_out + len(total.bad) == len(self.plan.rows.table)
        state = {
            "_data_files": [{"filename": name} for name in files],
            "_fingerprint": fingerprint(self.request)[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": "train",
        }
        bad = [json.dumps(bad, ensure_ascii=False) + "\n" for bad in total.bad]
        (self.staging / DATASET_STATE_JSON_FILENAME).write_text(json.dumps(state, indent=2), encoding="utf-8")
        (self.staging / "bad_rows.jsonl").write_text("".join(bad), encoding="utf-8")
        DatasetInfo(features=self.plan.features).write_to_directory(str(self.staging), pretty_print=True)
        save_recipe(self.plan.recipe, self.staging / "recipe.yaml")
        recorded = [DATASET_STATE_JSON_FILENAME, DATASET_INFO_FILENAME, ROW_DIGESTS]
        for name in (*recorded, "bad_rows.jsonl", "recipe.yaml"):
            if (self.staging / name).exists():
                move_durably(self.staging / name, self.folder / name)
        files |= {name: written(self.folder / name) for name in recorded if (self.folder / name).exists()}
        num_bytes = sum(file["bytes"] for name, file in files.items() if name.endswith(".arrow"))
        counts = vars(total) | {"bad": len(total.bad), "num_bytes": num_bytes}
        record = {"request": self.request, "counts": counts, "files": files, **record}
        compat = self.request["compat"]
        provenance = {"compat": compat, "fingerprint": fingerprint(compat), "record": record}
        write_durably(
            self.folder / PROVENANCE, json.dumps(provenance, indent=2, ensure_ascii=False), aside=self.staging
        )
