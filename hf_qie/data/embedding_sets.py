"""Complete embedding sets, opened from a folder or from the Hub, once they are what their format promises."""

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
    """The embedding set in `folder`; raises InputError where there is none, or it is incomplete or damaged.

    Sizes, footers and columns are checked; `check.py --verify` reads every byte.
    """
    if not (folder / PROVENANCE).is_file():
        raise InputError(f"{folder}: no finished embedding set; run hf_qie/extract.py with this recipe first")
    if _checks_sets():
        check_sizes(folder, files_of(read_provenance(folder)))
    try:
        data = load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise InputError(f"{folder}: does not open as a dataset ({reason}); {DAMAGED}") from error
    if _checks_sets():
        check_columns(data, where=str(folder))
    return data


def _checks_sets() -> bool:
    """Of the ranks of a machine the first checks its sets."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


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
    repo, config = found["repo"], found["config"] or task
    where = {"repo_type": "dataset", "revision": found["revision"]}
    with hub_errors(f"{at} is not a folder here"):
        try:
            path = Path(hf_hub_download(repo, f"provenance/{config}.json", **where))
        except LocalEntryNotFoundError:  # which is an EntryNotFoundError
            raise
        except EntryNotFoundError as error:
            files = HfApi().list_repo_files(repo, **where)
            there = sorted(Path(path).stem for path in files if re.fullmatch(r"provenance/\w+\.json", path))
            remedy = f"there are {', '.join(there)}; name one as {repo}:{there[0]}" if there else "there are none"
            raise InputError(f"{at}: {repo} has no embedding set {config}; {remedy}") from error
        provenance = parse_provenance(path, where=at)
        shards = published_shards(config, provenance)
        where["revision"] = path.parent.parent.name  # the commit: the cache has a folder for each
        folder = Path(snapshot_download(repo, allow_patterns=shards, **where))
    # by the content of the shards: load_dataset(repo) would make all Arrow files anew at each commit to the repository
    files = [str(shard.resolve()) for shard in sorted(folder.glob(shards))]
    if not files:
        raise InputError(f"{at}: nothing at {shards}, as its provenance wants; push the set again")
    data = load_dataset("parquet", data_files=files, split="train")
    if _checks_sets():
        check_columns(data, where=at)
    return Dataset(data.data, info=data.info, split=data.split, fingerprint=provenance["record"]["set"]), provenance


def published_shards(config: str, provenance: Mapping[str, Any]) -> str:
    """The pattern of a published set's Parquet files, which bear a digest of its provenance."""
    return f"data/{config}/train-*-{fingerprint(provenance)[:12]}.parquet"
