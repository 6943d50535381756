"""The manifest of a chunk: what became of its rows, and size and digest of its file.

It is on the disk before the chunk appears under its name, so that whoever finds a chunk can tell whether it is
complete.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_qie.data.samples import BadRow
from hf_qie.errors import InputError
from hf_qie.extraction.plan import Plan
from hf_qie.runtime.files import move_durably, size_misfit, write_durably, written

STAGING = "staging"  # folder in that of a set, until the set is complete: what is not to be read as part of it


@dataclass(kw_only=True)
class Counts:
    """What became of the rows of a chunk, or of a set."""

    rows_in: int = 0
    rows_out: int = 0
    rows_reused: int = 0  # of these, from before the data changed
    rows_without_caption: int = 0
    num_tokens: int = 0  # that the encoder ran
    num_tokens_padded: int = 0  # with the padding of its batches
    num_tokens_apart: int = 0  # of one pass per caption
    bad: list[dict[str, Any]] = field(default_factory=list)

    def add(self, other: "Counts") -> None:
        """Add those of other rows."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def add_good(self, row: Mapping[str, Any], plan: Plan, *, is_reused: bool) -> None:
        """Count a row that is written."""
        self.rows_out += 1
        self.rows_reused += is_reused
        self.rows_without_caption += not any(row["texts"][caption] for caption in plan.task.columns.captions)

    def add_bad(self, row: Mapping[str, Any], bad: BadRow, plan: Plan, *, where: str) -> None:
        """List a bad row, or stop the run where the recipe says so: raises InputError."""
        if plan.extract.on_bad_row == "fail":
            remedy = "fix it, or set extract.on_bad_row: skip to list such rows and go on"
            raise InputError(f"{where}: {bad.named}; {remedy}") from bad
        self.bad.append({"row": row["row"], "column": bad.column, "path": bad.path, "reason": bad.reason})


def manifest_path(chunk: Path) -> Path:
    """Where the manifest of a chunk lies."""
    return chunk.parent / STAGING / f"{chunk.stem}.json"


def complete_chunk(staged: Path, chunk: Path, counts: Counts) -> None:
    """Write the manifest of the file `staged`, then let the file appear under its name `chunk`."""
    write_durably(manifest_path(chunk), json.dumps({"rows": vars(counts), "file": written(staged)}))
    move_durably(staged, chunk)


def read_manifest(chunk: Path) -> tuple[Counts, dict[str, Any]]:
    """The counts of a chunk, and `bytes` and `sha256` of its file as written. Raises ValueError."""
    path = manifest_path(chunk)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        counts, file = Counts(**manifest["rows"]), {name: manifest["file"][name] for name in ("bytes", "sha256")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"its manifest {path} cannot be read ({error})") from error
    if why := size_misfit(chunk, file):
        raise ValueError(f"it {why}")
    return counts, file
