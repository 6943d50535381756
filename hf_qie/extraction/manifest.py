"""The account of a chunk: what became of its rows, and what its file was when it was written.

It is on the disk before the chunk appears under its name, and so whoever finds a chunk can tell whether it is whole.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_qie.runtime.files import move_durably, size_misfit, write_durably, written

UNFINISHED = "unfinished"  # beside the chunks of a set until it is whole
REQUEST = f"{UNFINISHED}/request.json"  # what it is being made from


@dataclass(kw_only=True)
class Account:
    """What became of the rows of a chunk."""

    rows_in: int = 0
    rows_out: int = 0
    rows_kept: int = 0  # of these, from before the data changed
    rows_without_caption: int = 0
    num_tokens: int = 0  # that the encoder ran
    num_tokens_padded: int = 0  # with the padding of its batches
    num_tokens_apart: int = 0  # of one pass per caption
    bad: list[dict[str, Any]] = field(default_factory=list)

    def add(self, other: "Account") -> None:
        """Take in another one."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def account_path(path: Path) -> Path:
    """Where the account of a chunk file lies."""
    return path.parent / UNFINISHED / f"{path.stem}.json"


def keep_chunk(aside: Path, path: Path, account: Account, *, data: str) -> None:
    """Let the finished file `aside` appear under the chunk's name; `data` is the digest of what it is made from."""
    noted = {"rows": vars(account), "file": written(aside), "data": data}
    write_durably(account_path(path), json.dumps(noted, ensure_ascii=False))
    move_durably(aside, path)


def read_account(path: Path, *, data: str | None = None) -> tuple[Account, dict[str, Any]]:
    """The account of a chunk file, and its `bytes` and `sha256` as written.

    Raises ValueError where it is damaged, or the chunk is not made from `data`.
    """
    try:
        noted = json.loads(account_path(path).read_text(encoding="utf-8"))
        account, file = Account(**noted["rows"]), {name: noted["file"][name] for name in ("bytes", "sha256")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"has no account: {account_path(path)} cannot be read ({error})") from error
    if data and noted.get("data", data) != data:
        raise ValueError("was made by another launch, of data that have changed since")
    return account, file


def damage(path: Path, *, data: str) -> str | None:
    """Why a chunk file is not to be used; None where it is what was written of `data`, and has not changed since."""
    try:
        _, was = read_account(path, data=data)
    except ValueError as error:
        return str(error)
    return size_misfit(path, was)
