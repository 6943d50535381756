"""Finished embedding sets to a dataset repository on the Hub: one config a task, as Parquet, with a card.

A shard is prepared on disk, sent while the next one is prepared, and deleted once it is committed. Its name holds a
digest of the set's provenance, so that what the Hub has of a set shows by name alone: started again, a push goes on
where it stopped. The card, which is what readers go by, comes last, in one commit with the provenance.
"""

import json
import logging
import math
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset, DatasetInfo, Features, SplitInfo
from datasets.splits import SplitDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, DatasetCard, HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.hf_api import RepoFile

from hf_qie.config.recipe import Extract, Recipe, Task
from hf_qie.data.embedding_sets import open_set, published_shards
from hf_qie.data.provenance import parse_provenance, read_provenance, request_differences
from hf_qie.data.schema import matrix_width
from hf_qie.errors import InputError
from hf_qie.hub.dataset_card import dataset_card
from hf_qie.hub.redact import image_roots, public, public_rows, reason_of
from hf_qie.runtime.files import move_durably

logger = logging.getLogger("hf_qie.hub.publish")

SHARD_BYTES = 750_000_000  # of Arrow; as Parquet about 500 MB
ROW_GROUP_ROWS = 64  # what a reader holds at once
SHARDS_PER_COMMIT = 16  # the Hub counts commits by the hour, and what is prepared takes up disk until it is committed


def open_repo(extract: Extract) -> None:
    """Make the repository `push_to_hub` where there is none: a push that cannot succeed fails before days of work.

    Raises InputError where the Hub, the token, `private` or `license` stands against it.
    """
    repo, api = extract.push_to_hub, HfApi()
    with hub_errors(repo):
        if extract.license:
            check_license(extract.license)
        api.create_repo(repo, repo_type="dataset", private=extract.private, exist_ok=True)
        private = api.dataset_info(repo).private
    if private != extract.private:
        raise InputError(
            f"extract.private: got {json.dumps(extract.private)}, but {repo} is there and "
            f"{'private' if private else 'public'}; set extract.private to {json.dumps(private)}, or push elsewhere"
        )


def check_license(name: str, *, at: str = "extract.license") -> None:
    """Raise InputError for a licence that the Hub does not know."""
    try:
        DatasetCard(f"---\nlicense: {name}\n---\n").validate()
    except ValueError as error:
        raise InputError(
            f"{at}: the Hub does not take {name!r}; give an identifier of "
            "https://hf.co/docs/hub/repositories-licenses, `other` for one of your own"
        ) from error


@contextmanager
def hub_errors(
    repo: str, *, at: str = "extract.push_to_hub", remedy: str = "start again: a push goes on where it stopped"
) -> Iterator[None]:
    """Raise what goes wrong between this machine and the Hub as InputError, at an address and with a remedy."""
    try:
        yield
    except HFValidationError as error:
        raise InputError(f"{at}: {error}") from error
    except (HTTPError, ConnectionError, RuntimeError) as error:
        cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error  # of an upload
        denied = isinstance(cause, HfHubHTTPError) and cause.response.status_code in (401, 403, 404)
        login = "log in with `hf auth login`, or set HF_TOKEN to a token that may write there"
        text = re.sub(r"(https?://[^\s?]+)\?\S*", r"\1", str(cause))  # addresses of uploads are signed in their query
        raise InputError(f"{at}: {repo}: {text}\n{login if denied else remedy}") from error


def push_sets(folders: Mapping[str, Path], *, tasks: Mapping[str, Task], extract: Extract) -> str:
    """Publish the finished sets in `folders`, by task, as `extract` says; returns the address.

    Configs that the repository has of other tasks stay. Raises InputError where it has another set under the name of
    one of these, unless `overwrite` is set, and where the Hub cannot be reached or refuses.
    """
    repo = Repo(extract.push_to_hub)
    open_repo(extract)
    sets = [Publication(name=name, folder=folder, task=tasks[name]) for name, folder in folders.items()]
    if not extract.overwrite:
        repo.refuse_others(sets)
    for one in sets:
        repo.upload(one)
    repo.describe(sets, license=extract.license)
    return f"{repo.api.endpoint}/datasets/{repo.name}"


def push_unless_bad(recipe: Recipe, code: int) -> None:
    """Publish the sets that extraction has finished, unless its exit `code` says that too many rows are bad."""
    if code:
        logger.error("extract.push_to_hub: nothing is pushed; fix the bad rows, or raise extract.max_bad_share")
        return
    names = [name for name, task in recipe.tasks.items() if task.embeddings is None]
    folders = {name: Path(recipe.extract.output_dir, name) for name in names}
    logger.info("pushed %s to %s", ", ".join(names), push_sets(folders, tasks=recipe.tasks, extract=recipe.extract))


@dataclass(frozen=True, kw_only=True)
class Publication:
    """One set as others may have it."""

    name: str
    folder: Path
    task: Task

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """As recorded, without what is of this machine alone, with the rows skipped by reason and the set's own id."""
        provenance = read_provenance(self.folder)
        lines = (self.folder / "bad_rows.jsonl").read_text(encoding="utf-8").splitlines()
        skipped = Counter(reason_of(json.loads(line)) for line in lines)
        more = {"skipped": dict(skipped.most_common()), "set": self.data._fingerprint}
        record = {key: value for key, value in provenance["record"].items() if key != "files"}  # of this folder alone
        return provenance | {"record": public(record) | more}

    @cached_property
    def pattern(self) -> str:
        """Of the shards' paths."""
        return published_shards(self.name, self.provenance)

    @cached_property
    def data(self) -> Dataset:
        """The rows."""
        return open_set(self.folder)

    @property
    def num_bytes(self) -> int:
        """Of the set's Arrow files."""
        return self.provenance["record"]["counts"]["num_bytes"]

    @cached_property
    def shards(self) -> dict[str, range]:
        """Paths in the repository, and the rows that each holds."""
        num_rows, count = len(self.data), max(1, math.ceil(self.num_bytes / SHARD_BYTES))
        edges = [num_rows * i // count for i in range(count + 1)]
        return {
            self.pattern.replace("*", f"{i:05d}-of-{count:05d}"): range(edges[i], edges[i + 1]) for i in range(count)
        }

    def prepare(self, shard: str) -> Path:
        """The file of a shard, written if it is not there yet."""
        path = self.folder / "parquet" / Path(shard).name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            started, rows = time.monotonic(), self.shards[shard]
            write_shard(self.data, rows, path, roots=image_roots(self.task))
            logger.debug("%s: %d rows in %.1f s", path, len(rows), time.monotonic() - started)
        return path


class Repo:
    """A dataset repository as it is on the Hub."""

    def __init__(self, name: str):
        self.name, self.api = name, HfApi()

    def files(self) -> dict[str, int]:
        """Size in bytes of each file by path."""
        with hub_errors(self.name):
            tree = self.api.list_repo_tree(self.name, recursive=True, repo_type="dataset")
            return {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}

    def read(self, path: str, *, revision: str | None = None) -> str:
        """The text of a file."""
        return self.download(path, revision=revision).read_text(encoding="utf-8")

    def download(self, path: str, *, revision: str | None) -> Path:
        """A file, in the local cache."""
        with hub_errors(self.name):
            return Path(hf_hub_download(self.name, path, repo_type="dataset", revision=revision))

    def card(self, files: Mapping[str, int], *, revision: str | None = None) -> DatasetCard | None:
        """The card, if there is one."""
        return DatasetCard(self.read("README.md", revision=revision)) if "README.md" in files else None

    def provenances(self, files: Mapping[str, int], *, revision: str | None = None) -> dict[str, dict[str, Any]]:
        """What every embedding set in the repository was made from, by config."""
        paths = [Path(path) for path in files if re.fullmatch(r"provenance/\w+\.json", path)]
        found = {path.stem: self.download(str(path), revision=revision) for path in paths}
        return {name: parse_provenance(path, where=f"{self.name}: {name}") for name, path in found.items()}

    def refuse_others(self, sets: Sequence[Publication]) -> None:
        """Raise InputError where the repository has another set under the name of one of these."""
        files = self.files()
        there, card = self.provenances(files), self.card(files)
        configs = MetadataConfigs.from_dataset_card_data(card.data) if card else {}
        for one in sets:
            if one.name in there:
                fields = request_differences(there[one.name]["record"]["request"], one.provenance["record"]["request"])
                what = f"made with another {', '.join(fields)}" if fields else None
            else:
                what = "no embedding set" if one.name in configs else None
            if what:
                raise InputError(
                    f"extract.push_to_hub: {self.name} has a config {one.name} that is {what}; push elsewhere, "
                    "rename the task, or set extract.overwrite: true to replace it"
                )

    def upload(self, one: Publication) -> None:
        """Send the shards of a set that the repository does not have."""
        files = self.files()
        missing = [shard for shard in one.shards if shard not in files]
        logger.info("%s: %d of %d shards to send to %s", one.name, len(missing), len(one.shards), self.name)
        for start in range(0, len(missing), SHARDS_PER_COMMIT):
            additions, sent = [], None
            with ThreadPoolExecutor(1) as sender:
                for shard in missing[start : start + SHARDS_PER_COMMIT]:
                    additions.append(CommitOperationAdd(shard, one.prepare(shard)))
                    if sent:
                        sent.result()
                    sent = sender.submit(self.send, additions[-1])
                sent.result()
            with hub_errors(self.name):
                message = f"Add {len(additions)} shards of {one.name}"
                self.api.create_commit(self.name, additions, commit_message=message, repo_type="dataset")
            for addition in additions:
                Path(addition.path_or_fileobj).unlink()

    def send(self, addition: CommitOperationAdd) -> None:
        """Send one large file, if the Hub does not have its content; a later commit gives it its name."""
        with hub_errors(self.name):
            self.api.preupload_lfs_files(self.name, [addition], repo_type="dataset", free_memory=False)

    def describe(self, sets: Sequence[Publication], *, license: str | None) -> None:
        """Put card and provenance of these sets in place, and take away shards that no config names any more."""
        with hub_errors(self.name):
            head = self.api.dataset_info(self.name).sha
        files = self.files()
        provenances = self.provenances(files, revision=head) | {one.name: one.provenance for one in sets}
        card = dataset_card(
            self.card(files, revision=head),
            repo=self.name,
            infos={one.name: info_of(one, files) for one in sets},
            data_files={one.name: one.pattern for one in sets},
            provenances=provenances,
            license=license,
        )
        texts = {"README.md": str(card)} | {
            f"provenance/{one.name}.json": json.dumps(one.provenance, indent=2, ensure_ascii=False) for one in sets
        }
        additions = [CommitOperationAdd(path, text.encode()) for path, text in texts.items()]
        wanted = {shard for one in sets for shard in one.shards}
        stale = [
            path
            for path in files
            if path not in wanted and path.startswith(tuple(f"data/{one.name}/" for one in sets))
        ]
        with hub_errors(self.name):
            self.api.create_commit(
                self.name,
                [*additions, *map(CommitOperationDelete, stale)],
                commit_message=f"Describe {', '.join(one.name for one in sets)}",
                repo_type="dataset",
                parent_commit=head,  # nobody else's change to the card is lost
            )


def info_of(one: Publication, files: Mapping[str, int]) -> DatasetInfo:
    """What the card tells `load_dataset` of a set: types, rows and sizes."""
    split = SplitInfo("train", num_bytes=one.num_bytes, num_examples=len(one.data))
    return DatasetInfo(
        features=one.data.features,
        splits=SplitDict({"train": split}),
        download_size=sum(files[shard] for shard in one.shards),
        dataset_size=one.num_bytes,
    )


def write_shard(data: Dataset, rows: range, path: Path, *, roots: Sequence[Path]) -> None:
    """Write `rows` of a set to the Parquet file `path`, which appears when it is whole."""
    aside, tables = path.with_suffix(".new"), data.with_format("arrow")
    with pq.ParquetWriter(aside, data.features.arrow_schema, **parquet_settings(data.features)) as writer:
        for start in range(rows.start, rows.stop, ROW_GROUP_ROWS):
            table = tables[start : min(start + ROW_GROUP_ROWS, rows.stop)]
            writer.write_table(public_rows(table, roots), row_group_size=ROW_GROUP_ROWS)
    move_durably(aside, path)


def parquet_settings(features: Features) -> dict[str, Any]:
    """Float16 with the bytes of a kind side by side, which compresses to two thirds, and fast.

    Dictionaries and statistics of such numbers are of no use and cost half of the time.
    """
    matrices = [name for name, feature in features.items() if matrix_width(feature)]
    return {
        "compression": "zstd",
        "use_dictionary": False,
        "write_statistics": False,
        "use_byte_stream_split": [f"{name}.list.element.list.element" for name in matrices],
    }
