"""Finished embedding sets, opened: from a folder, or from the Hub; what is damaged or not of the format is refused."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, load_dataset, load_from_disk
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from hf_qie.data.provenance import PROVENANCE, files_of, fingerprint, parse_provenance, read_provenance
from hf_qie.data.tables import HUB_ID
from hf_qie.data.validation import DAMAGED, check_columns
from hf_qie.errors import InputError
from hf_qie.runtime.files import check_sizes
from hf_qie.runtime.hub_errors import hub_errors


def open_set(folder: Path) -> Dataset:
    """The embedding set in `folder`; raises InputError where there is none, or it is incomplete.

    Sizes, footers and columns are checked; `check.py --verify` reads every byte.
    """
    if not (folder / PROVENANCE).is_file():
        raise InputError(f"{folder}: no finished embedding set; run hf_qie/extract.py with this recipe first")
    if is_first_here():
        check_sizes(folder, files_of(read_provenance(folder)))
    try:
        data = load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        raise InputError(f"{folder}: does not open as a dataset ({first_line(error)}); {DAMAGED}") from error
    if is_first_here():
        check_columns(data, where=str(folder))
    return data


def is_first_here() -> bool:
    """Whether this process is the one of its machine that looks through sets: whole ones are read for it."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def first_line(error: Exception) -> str:
    """What an error says, in short."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def open_embeddings(embeddings: str | Path, *, task: str) -> tuple[Dataset, dict[str, Any]]:
    """A set and its provenance, from a folder, or from the Hub where a string names no folder.

    `org/name` has the config `task`, `org/name:config` that one; `@revision` may follow: a branch, tag or commit.
    Raises InputError where there is no such set.
    """
    if isinstance(embeddings, Path) or Path(embeddings).is_dir():
        return open_set(Path(embeddings)), read_provenance(Path(embeddings))
    at, found = f"tasks.{task}.embeddings: {embeddings}", HUB_ID.fullmatch(embeddings)
    if not found:
        raise InputError(f"{at}: no folder here, and no Hub id like org/name, org/name:config or org/name@revision")
    repo, config, revision = found["repo"], found["config"] or task, found["revision"]
    with hub_errors(f"{at} is not a folder here"):
        try:
            return download_set(repo, config, revision=revision, where=at)
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as error:
            files = HfApi().list_repo_files(repo, repo_type="dataset", revision=revision)
            there = sorted(Path(path).stem for path in files if re.fullmatch(r"provenance/\w+\.json", path))
            remedy = f"there are {', '.join(there)}; name one as {repo}:{there[0]}" if there else "there are none"
            raise InputError(f"{at}: {repo} has no embedding set {config}; {remedy}") from error


def download_set(repo: str, config: str, *, revision: str | None, where: str) -> tuple[Dataset, dict[str, Any]]:
    """A published set and its provenance; raises what huggingface_hub does."""
    path = Path(hf_hub_download(repo, f"provenance/{config}.json", repo_type="dataset", revision=revision))
    provenance = parse_provenance(path, where=where)
    shards = published_shards(config, provenance)
    commit = path.parent.parent.name  # the cache has a folder for each
    folder = snapshot_download(repo, repo_type="dataset", revision=commit, allow_patterns=shards)
    # by the content of the shards: load_dataset(repo) would make all Arrow files anew at each commit to the repository
    files = [str(shard.resolve()) for shard in sorted(Path(folder).glob(shards))]
    if not files:
        raise InputError(f"{where}: nothing at {shards}, as its provenance wants; push the set again")
    data = load_dataset("parquet", data_files=files, split="train")
    if is_first_here():
        check_columns(data, where=where)
    return Dataset(data.data, info=data.info, split=data.split, fingerprint=provenance["record"]["set"]), provenance


def published_shards(config: str, provenance: Mapping[str, Any]) -> str:
    """The pattern of a published set's Parquet files: they bear a digest of its provenance."""
    return f"data/{config}/train-*-{fingerprint(provenance)[:12]}.parquet"
