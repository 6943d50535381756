"""Complete embedding sets, opened from a folder or from the Hub, once they are what their format promises.

Of a set columns, types and offsets are checked before training reads a row: a second for a million rows once they are
in memory. No embedding or latent is read.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, load_dataset, load_from_disk
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import RemoteEntryNotFoundError

from hf_qie.data.provenance import PROVENANCE, files_of, fingerprint, parse_provenance, read_provenance
from hf_qie.data.schema import (
    DROP_EMBEDS,
    HAS_INVERSE,
    INVERSE,
    TARGET,
    column_of,
    columns_of,
    grids_in,
    matrix_width,
    prompt_columns_in,
    set_features,
    shared_embeds,
    texts_in,
)
from hf_qie.data.tables import HUB_ID
from hf_qie.errors import InputError
from hf_qie.runtime.files import check_sizes
from hf_qie.runtime.hub_errors import hub_errors

MOST_SIDE = 4096  # tokens of a grid's side: no transformer places more
DAMAGED = "the set is damaged, or not what extract.py makes: extract it again, or fetch it from where you trust it"


def open_set(folder: Path) -> Dataset:
    """The embedding set in `folder`; raises InputError where there is none, or it is incomplete or damaged.

    Sizes, footers and columns are checked; `check.py --verify` reads every byte.
    """
    if not (folder / PROVENANCE).is_file():
        raise InputError(f"{folder}: no finished embedding set; run hf_qie/extract.py with this recipe first")
    check_sizes(folder, files_of(read_provenance(folder)))
    try:
        data = load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise InputError(f"{folder}: does not open as a dataset ({reason}); {DAMAGED}") from error
    check_columns(data, where=str(folder))
    return data


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
        except RemoteEntryNotFoundError as error:
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
        raise InputError(f"{at}: its provenance names {shards}, and {repo} has no such file; push the set again")
    data = load_dataset("parquet", data_files=files, split="train")
    check_columns(data, where=at)
    return Dataset(data.data, info=data.info, split=data.split, fingerprint=provenance["record"]["set"]), provenance


def published_shards(config: str, provenance: Mapping[str, Any]) -> str:
    """The pattern of a published set's Parquet files, which bear a digest of its provenance."""
    return f"data/{config}/train-*-{fingerprint(provenance)[:12]}.parquet"


def check_columns(data: Dataset, *, where: str) -> None:
    """Raise InputError, at `where`, unless `data` has the columns of a set, with embeddings of one width."""
    if problem := _wrong_type(data.features) or next(_wrong_values(data), None):
        raise InputError(f"{where}: {problem}; {DAMAGED}")


def _wrong_type(features: Features) -> str | None:
    expected = set_features(
        width=matrix_width(features.get(shared_embeds(features))) or 0,
        latent_width=matrix_width(features.get("target_latents")) or 0,
        captions=texts_in(features),
        inverse_captions=texts_in(features, INVERSE),
        inverse_latents=f"{INVERSE}target_grid" in features,
        prompt_columns=prompt_columns_in(features),
    )
    for name in expected | features:
        got, feature = features.get(name), expected.get(name)
        if got != feature and column_of(name)[0].kind != "caption":
            return f"column {name}: got {got}, expected {feature}" if got else f"has no column {name}"
    return None


def _wrong_values(data: Dataset) -> Iterator[str]:
    """What is wrong, by the first row of each kind; the types are right."""
    table = data.data.table
    for name in table.column_names:
        for chunk in table.column(name).chunks:
            try:
                chunk.validate(full=True)  # offsets may lead anywhere in a file that was made by hand
            except pa.ArrowInvalid as error:
                yield f"column {name}: {error}"
                return
            is_nested = pa.types.is_list(chunk.type) and pa.types.is_nested(chunk.type.value_type)
            if is_nested and (chunk.values.null_count or chunk.values.values.null_count):
                yield f"column {name}: has null vectors or numbers"
    rows, counts = (table.column(name).fill_null(-1).to_numpy() for name in ("row", "num_sources"))
    yield from _found("row", rows < 0, "is null or negative")
    yield from _found("num_sources", counts != lengths(table, "source_grids"), "is not the number of source_grids")
    shared = shared_embeds(table.column_names)
    yield from _wrong_direction(table, "", np.ones(len(table), bool), counts)
    if HAS_INVERSE in table.column_names:
        there = np.maximum(lengths(table, HAS_INVERSE), lengths(table, INVERSE + shared)) >= 0
        yield from _wrong_direction(table, INVERSE, there, np.ones(len(table), int))


def _wrong_direction(table: pa.Table, prefix: str, there: np.ndarray, counts: np.ndarray) -> Iterator[str]:
    """What is wrong with one direction, in the rows `there`, which have `counts` sources."""
    shared, *slots = prompt_columns_in(table.column_names)
    for name, least in ((shared, 0), (DROP_EMBEDS, 1)):
        yield from _found(prefix + name, there & (lengths(table, prefix + name) < least), "has no embeddings")
    for name in slots:
        yield from _wrong_slots(table, prefix + name, lengths(table, prefix + shared), there, counts)
    if f"{prefix}target_grid" not in table.column_names:
        return  # the inverse has the forward row's
    if prefix:
        there = there & (lengths(table, f"{prefix}target_grid") >= 0)
    areas = {}
    for column in columns_of("grid"):
        name, sides = prefix + column.name, grids_in(table.column(prefix + column.name))
        yield from _found(name, there & (lengths(table, name) < (0 if column.many else 2)), "is null")
        if sides.size and not 1 <= sides.min() <= sides.max() <= MOST_SIDE:
            yield f"column {name}: sides from {sides.min():,} to {sides.max():,}, expected 1 to {MOST_SIDE:,}"
        counts = np.maximum(lengths(table, name), 0) // (1 if column.many else 2)
        areas[column.of] = np.bincount(np.repeat(np.arange(len(table)), counts), sides.prod(axis=1), len(table))
    latents = {column: lengths(table, prefix + column.name) for column in columns_of("latents")}
    if any((length >= 0).any() for length in latents.values()):  # else a set without latents
        for column, length in latents.items():
            wrong = there & (length != areas.get(column.of, areas[TARGET]))
            yield from _found(prefix + column.name, wrong, "has not the vectors that its grids say")


def _wrong_slots(table: pa.Table, name: str, most: np.ndarray, there: np.ndarray, counts: np.ndarray) -> Iterator[str]:
    """What is wrong with the places of `counts` images among `most` embeddings, in the rows `there`."""
    found = lengths(table, name)
    yield from _found(name, there & (found != counts), "has not a place for each source")
    row = np.repeat(np.arange(len(table)), np.maximum(found, 0))
    places = pc.list_flatten(table.column(name)).fill_null(-1).to_numpy()
    beyond = (places < 0) | (places > most[row])
    beyond[1:] |= (np.diff(row) == 0) & (np.diff(places) < 0)
    wrong = np.zeros(len(table), bool)
    wrong[row[beyond]] = True
    yield from _found(name, there & wrong, "has places out of order, or beyond the embeddings")


def _found(column: str, wrong: np.ndarray, words: str) -> Iterator[str]:
    if wrong.any():
        yield f"place {int(wrong.argmax()):,}, column {column}: {words} ({int(wrong.sum()):,} such rows)"


def lengths(table: pa.Table, name: str) -> np.ndarray:
    """Items of each row's list in a column; -1 where it is null."""
    return pc.list_value_length(table.column(name)).fill_null(-1).to_numpy()
