"""Embedding sets to a dataset repository on the Hub, one config a task, as Parquet; exported models to one of models.

A shard of a set is written to disk, uploaded while the next one is written, and deleted once it is committed. Its name
holds a digest of the set's provenance, so that the names on the Hub tell which shards are missing: a push that was
interrupted resumes there. The card, which readers go by, comes last, in one commit with the provenance.
"""

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset, DatasetInfo, SplitInfo
from datasets.splits import SplitDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, DatasetCard, HfApi, ModelCard, hf_hub_download
from huggingface_hub.hf_api import RepoFile

from hf_qie.config.recipe import Extract, Recipe, Task
from hf_qie.data.embedding_sets import open_set, published_shards
from hf_qie.data.provenance import parse_provenance, read_provenance, request_differences
from hf_qie.data.schema import matrix_width
from hf_qie.errors import InputError
from hf_qie.hub.dataset_card import dataset_card, makers_of, notice_of
from hf_qie.hub.redact import image_roots, public, public_rows, reason_of
from hf_qie.models.base import NOTICE
from hf_qie.runtime.files import move_durably
from hf_qie.runtime.hub_errors import hub_errors

logger = logging.getLogger("hf_qie.hub.publish")

CARD = "README.md"
SHARD_BYTES = 750_000_000  # of Arrow; as Parquet about 500 MB
ROW_GROUP_ROWS = 64  # what a reader holds at once
SHARDS_PER_COMMIT = 8  # the Hub limits commits per hour, and two batches of files are on the disk at a time


def open_repo(extract: Extract) -> None:
    """Create the repository `push_to_hub` if it does not exist: a push that cannot succeed fails before days of work.

    Raises InputError if the Hub, the token, `private` or `license` stands against it.
    """
    _open(extract.push_to_hub, "dataset", private=extract.private, license=extract.license)


def open_model_repo(repo: str, *, private: bool, license: str | None) -> ModelCard | None:
    """The same for the options of export.py; returns the card of the repository."""
    found = _open(repo, "model", private=private, license=license)
    return ModelCard.load(repo) if CARD in {file.rfilename for file in found.siblings} else None


def _open(repo: str, repo_type: str, *, private: bool, license: str | None) -> Any:
    at, visibility = ("extract.", "extract.private") if repo_type == "dataset" else ("--", "--public")
    with hub_errors(f"{at}push_to_hub: {repo}", remedy="try again; nothing was written yet"):
        if license:
            try:
                DatasetCard(f"---\nlicense: {license}\n---\n").validate()
            except ValueError as error:
                raise InputError(
                    f"{at}license: the Hub does not take {license!r}; give an identifier of "
                    "https://hf.co/docs/hub/repositories-licenses, `other` for one of your own"
                ) from error
        HfApi().create_repo(repo, repo_type=repo_type, private=private, exist_ok=True)
        found = HfApi().repo_info(repo, repo_type=repo_type)
    if found.private != private:
        is_now = "private" if found.private else "public"
        raise InputError(
            f"{at}push_to_hub: {repo} exists and is {is_now}; change {visibility} to match, or push elsewhere"
        )
    return found


def push_model(folder: Path, repo: str, *, message: str) -> str:
    """Upload an exported folder in one commit; returns the address."""
    remedy = f"the export is in {folder}; upload it with: hf upload {repo} {folder}"
    with hub_errors(f"--push_to_hub: {repo}", remedy=remedy):
        # shards that an earlier export left would be loaded in place of these
        stale = [f"{part}diffusion_pytorch_model*" for part in ("", "transformer/")]
        HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message=message, delete_patterns=stale)
    return f"{HfApi().endpoint}/{repo}"


def push_sets(folders: Mapping[str, Path], *, tasks: Mapping[str, Task], extract: Extract) -> str:
    """Publish the finished sets in `folders`, by task, as `extract` says; returns the address.

    Configs that the repository has of other tasks stay. Raises InputError if it has another set under the name of one
    of these, unless `overwrite` is set, and if the Hub cannot be reached or refuses.
    """
    repo = _Repo(extract.push_to_hub)
    open_repo(extract)
    sets = [_Publication(name, folder, tasks[name]) for name, folder in folders.items()]
    with hub_errors(f"extract.push_to_hub: {repo.name}", remedy="start again: the push resumes where it stopped"):
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


class _Publication:
    """One set as others may have it."""

    def __init__(self, name: str, folder: Path, task: Task):
        self.name, self.folder, self.roots, self.data = name, folder, image_roots(task), open_set(folder)
        provenance = read_provenance(folder)
        lines = (folder / "bad_rows.jsonl").read_text(encoding="utf-8").splitlines()
        skipped = Counter(reason_of(json.loads(line)) for line in lines)
        more = {"skipped": dict(skipped.most_common()), "set": self.data._fingerprint}
        record = {key: value for key, value in provenance["record"].items() if key != "files"}  # of this folder alone
        self.provenance = provenance | {"record": public(record) | more}
        self.num_bytes = record["counts"]["num_bytes"]  # of Arrow files
        self.pattern = published_shards(name, self.provenance)
        num_rows, count = len(self.data), max(1, math.ceil(self.num_bytes / SHARD_BYTES))
        edges = [num_rows * i // count for i in range(count + 1)]
        names = [self.pattern.replace("*", f"{i:05d}-of-{count:05d}") for i in range(count)]
        self.shards = dict(zip(names, map(range, edges, edges[1:]), strict=True))  # rows by path in the repository

    def prepare(self, shard: str) -> Path:
        """The file of a shard, written unless an interrupted push left it."""
        path = self.folder / "parquet" / Path(shard).name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_shard(self.data, self.shards[shard], path, roots=self.roots)
        return path

    def info(self, files: Mapping[str, int]) -> DatasetInfo:
        """What the card tells `load_dataset`: types, rows and sizes."""
        split = SplitInfo("train", num_bytes=self.num_bytes, num_examples=len(self.data))
        return DatasetInfo(
            features=self.data.features,
            splits=SplitDict({"train": split}),
            download_size=sum(files[shard] for shard in self.shards),
            dataset_size=self.num_bytes,
        )


class _Repo:
    """A dataset repository as it is on the Hub."""

    def __init__(self, name: str):
        self.name, self.api = name, HfApi()

    def files(self) -> dict[str, int]:
        """Size in bytes of each file by path."""
        tree = self.api.list_repo_tree(self.name, recursive=True, repo_type="dataset")
        return {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}

    def recorded(self, files: Mapping[str, int]) -> tuple[DatasetCard | None, dict[str, dict[str, Any]]]:
        """The card, and what every embedding set in the repository was made from, by config."""
        provenances = {}
        for path in files:
            if match := re.fullmatch(r"provenance/(\w+)\.json", path):
                local = Path(hf_hub_download(self.name, path, repo_type="dataset"))
                provenances[match[1]] = parse_provenance(local, where=f"{self.name}: {match[1]}")
        return DatasetCard.load(self.name) if CARD in files else None, provenances

    def refuse_others(self, sets: Sequence[_Publication]) -> None:
        """Raise InputError if the repository has another set under the name of one of these."""
        card, present = self.recorded(self.files())
        configs = MetadataConfigs.from_dataset_card_data(card.data) if card else {}
        for one in sets:
            what = "not an embedding set" if one.name in configs and one.name not in present else None
            if one.name in present:
                requests = (provenance["record"]["request"] for provenance in (present[one.name], one.provenance))
                fields = request_differences(*requests)
                what = f"made with another {', '.join(fields)}" if fields else None
            if what:
                raise InputError(
                    f"extract.push_to_hub: {self.name} has a config {one.name} that is {what}; push elsewhere, "
                    "rename the task, or set extract.overwrite: true to replace it"
                )

    def upload(self, one: _Publication) -> None:
        """Upload the shards of a set that the repository does not have; one batch is written while another is sent."""
        files = self.files()
        missing = [shard for shard in one.shards if shard not in files]
        logger.info("%s: %d of %d shards to upload to %s", one.name, len(missing), len(one.shards), self.name)
        batches = [missing[i : i + SHARDS_PER_COMMIT] for i in range(0, len(missing), SHARDS_PER_COMMIT)]
        sending, sent = None, []
        for shards in [*batches, []]:
            additions = [CommitOperationAdd(shard, one.prepare(shard)) for shard in shards]
            if sending:
                sending.result()
                for addition in sent:
                    Path(addition.path_or_fileobj).unlink()
            if shards:
                message = f"Add {len(shards)} shards of {one.name}"
                sending, sent = self.commit(additions, message, run_as_future=True), additions

    def describe(self, sets: Sequence[_Publication], *, license: str | None) -> None:
        """Commit card and provenance of these sets, and delete their shards that no config names any more."""
        head = self.api.dataset_info(self.name).sha  # a later commit by others makes ours fail, so none is lost
        files = self.files()
        present, provenances = self.recorded(files)
        provenances |= {one.name: one.provenance for one in sets}
        card = dataset_card(
            present,
            repo=self.name,
            infos={one.name: one.info(files) for one in sets},
            data_files={one.name: one.pattern for one in sets},
            provenances=provenances,
            license=license,
        )
        texts = {
            f"provenance/{one.name}.json": json.dumps(one.provenance, indent=2, ensure_ascii=False) for one in sets
        } | {CARD: str(card)}
        if notice := notice_of(makers_of(provenances)):
            texts[NOTICE] = f"{notice}\n"
        additions = [CommitOperationAdd(path, text.encode()) for path, text in texts.items()]
        stale = [
            path for one in sets for path in files if path.startswith(f"data/{one.name}/") and path not in one.shards
        ]
        message = f"Describe {', '.join(one.name for one in sets)}"
        self.commit([*additions, *map(CommitOperationDelete, stale)], message, parent_commit=head)

    def commit(self, operations: Sequence[Any], message: str, **options: Any) -> Any:
        return self.api.create_commit(self.name, operations, commit_message=message, repo_type="dataset", **options)


def write_shard(data: Dataset, rows: range, path: Path, *, roots: Sequence[Path]) -> None:
    """Write `rows` of a set to the Parquet file `path`, which appears when it is complete."""
    staged, tables = path.with_suffix(".new"), data.with_format("arrow")
    matrices = [name for name, feature in data.features.items() if matrix_width(feature)]
    settings = {  # float16 with its bytes apart compresses to two thirds; statistics cost half of the time
        "compression": "zstd",
        "use_dictionary": False,
        "write_statistics": False,
        "use_byte_stream_split": [f"{name}.list.element.list.element" for name in matrices],
    }
    with pq.ParquetWriter(staged, data.features.arrow_schema, **settings) as writer:
        for start in range(rows.start, rows.stop, ROW_GROUP_ROWS):
            table = tables[start : min(start + ROW_GROUP_ROWS, rows.stop)]
            writer.write_table(public_rows(table, roots), row_group_size=ROW_GROUP_ROWS)
    move_durably(staged, path)
