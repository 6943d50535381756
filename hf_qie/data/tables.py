"""Tables as a task's data: Parquet files, a folder of `save_to_disk`, a dataset of the Hub.

Only the columns that the recipe names are read, so the others may be of any type. Images may be embedded.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from glob import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetsError
from pyarrow import parquet

from hf_qie.config.recipe import Task
from hf_qie.data.schema import columns_of
from hf_qie.errors import InputError
from hf_qie.runtime.files import disk_trouble, samples

DataRow = tuple[str, str, dict[str, Any]]  # where it stands, the folder of its relative paths, its values by column

HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<revision>\S+))?")
EMBEDDED = re.compile(r"row-(\d+)-(\w+)(?:-(\d+))?")
BATCH_ROWS = 1000
WHOLE_BYTES = 1 << 30  # beyond it only size and samples of a file are hashed: terabytes of images take seconds
SAMPLES, SAMPLE_BYTES = 16, 1 << 16


class Embedded(str):
    """The name, in place of a path, of an image embedded in the data: `row-7-target`, `row-7-source-0`."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A dataset as the data of a task, memory-mapped."""

    dataset: datasets.Dataset  # in Arrow format, which decodes nothing; the columns that the task needs
    names: Sequence[str]  # of all columns of the data
    parts: list[tuple[str, str, int]]  # of each of its files the name, the folder of relative paths, the rows
    labels: dict[str, str]  # columns of images by their part of an `Embedded` name: target, source, or source-0, ...

    def rows(self, digest: Any) -> Iterator[DataRow]:
        """Its rows, placed by file and 0-based row; `digest`, of hashlib, is updated with what they hold."""
        places = ((f"{name}, row {row}", root) for name, root, num_rows in self.parts for row in range(num_rows))
        labels = {name: label for label, name in self.labels.items()}
        for start in range(0, len(self.dataset), BATCH_ROWS):
            batch = self.dataset[start : start + BATCH_ROWS]
            values = {name: [None] * len(batch) for name in (*self.names, *batch.column_names)}
            for name in batch.column_names:
                numbered, label = enumerate(batch[name], start), labels.get(name)
                values[name] = [_value_of(value, label and f"row-{row}-{label}") for row, value in numbered]
            for row in zip(*values.values(), strict=True):
                digest.update(repr(row).encode())
                yield *next(places), dict(zip(values, row, strict=True))

    def read(self, name: str) -> bytes | None:
        """The content of the image with an `Embedded` name; None for any other path."""
        if not (found := EMBEDDED.fullmatch(name)):
            return None
        row, label, place = found.groups()
        column = self.labels.get(f"{label}-{place}")  # one of several columns, else a place in a list
        column, place = (column, None) if column else (self.labels.get(label), place)
        if column not in self.dataset.column_names:
            return None
        value = self.dataset[int(row)][column][0]
        content = _bytes_of(value[int(place)] if place else value)
        return None if content is None else content.as_py()


def _value_of(value: pa.Scalar, name: str | None) -> Any:
    """A value of Python, `Embedded(name)` for the bytes of an image; of a list each. No name: not of an image column.

    Text that is not UTF-8, which Arrow does not check, becomes a surrogate, which no row may hold.
    """
    if name and isinstance(value, pa.ListScalar) and value.is_valid:
        return [_value_of(item, f"{name}-{place}") for place, item in enumerate(value.values)]
    if name and _bytes_of(value) is not None:
        return Embedded(name)
    if name and isinstance(value, pa.StructScalar) and "path" in value:
        value = value["path"]
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return "\ud800"


def _bytes_of(value: pa.Scalar) -> pa.Scalar | None:
    """The bytes of an image, not copied yet: bare, or in a struct as of datasets.Image; None where there are none."""
    if isinstance(value, pa.StructScalar) and "bytes" in value:
        value = value["bytes"]
    is_binary = pa.types.is_binary(value.type) or pa.types.is_large_binary(value.type)
    return value if is_binary and value.is_valid else None


def parquet_table(task: Task, files: list[Path], digest: Any) -> Table:
    """Parquet files as one table, copied into the cache of datasets; raises InputError."""
    footers = {}
    for file in files:
        try:
            footer = parquet.read_metadata(file)
        except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
            raise InputError(f"{file}: invalid Parquet ({error})") from error
        if footer.num_rows:  # datasets cannot read a file without
            footers[file] = footer
    if not footers:
        raise InputError(no_rows(task))
    _update(digest, list(footers))
    schemas = {file: footer.schema.to_arrow_schema() for file, footer in footers.items()}
    schema, found = _common_schema(task, schemas), []
    # a column that a file lacks is null in its rows
    for names, some in groupby(footers, lambda file: [name for name in schema.names if name in schemas[file].names]):
        some = list(some)
        builder = datasets.load_dataset_builder(
            "parquet",
            data_files={"train": [escape(str(file)) for file in some]},
            columns=names,
            features=datasets.Features.from_arrow_schema(pa.schema([schema.field(name) for name in names])),
        )
        with _data_errors(task, partial(_damaged, some, names)):
            builder.download_and_prepare()
            found.append(builder.as_dataset("train"))
    parts = [(str(file), task.image_root or str(file.parent), footer.num_rows) for file, footer in footers.items()]
    all_names = list(dict.fromkeys(name for one in schemas.values() for name in one.names))
    return _table_of(task, datasets.concatenate_datasets(found), parts, all_names)


def _common_schema(task: Task, schemas: Mapping[Path, pa.Schema]) -> pa.Schema:
    """The columns that the task needs, of types that hold those of all files; raises InputError."""
    common = pa.schema([])
    for file, schema in schemas.items():
        at, named = f"tasks.{task.name}.data: {file}", _named_columns(task)
        fields = [schema.field(name) for name in named if name in schema.names]
        if not fields:
            there, named = ", ".join(schema.names), ", ".join(named)
            raise InputError(f"{at}: has {there}, and none of {named}; name its columns, or leave it out")
        fields = [one.with_type(one.type.value_type) if pa.types.is_dictionary(one.type) else one for one in fields]
        try:
            common = pa.unify_schemas([common, pa.schema(fields)], promote_options="permissive")
        except pa.ArrowException as error:
            raise InputError(f"{at}: {error}; write a column with the same type in all files") from error
    return common


@contextmanager
def _data_errors(task: Task, explain: Callable[[Exception], str]) -> Iterator[None]:
    """What datasets raises as InputError: of the cache's disk, or as `explain` says it of the data."""
    try:
        yield
    except (DatasetsError, OSError, ValueError) as error:
        at, cache = f"tasks.{task.name}.data", datasets.config.HF_DATASETS_CACHE
        if trouble := disk_trouble(error) or ("Not enough disk space" in str(error) and str(error)):
            remedy = "or let HF_DATASETS_CACHE name a folder on another disk"
            raise InputError(f"{at}: its copy in the cache of datasets, {cache}: {trouble}; {remedy}") from error
        raise InputError(f"{at}: {explain(error)}") from error


def _damaged(files: Sequence[Path], names: Sequence[str], error: Exception) -> str:
    """The first Parquet file that cannot be read, and why: datasets does not say which."""
    for file in files:
        try:
            for _ in parquet.ParquetFile(file).iter_batches(columns=names):
                pass
        except (OSError, ValueError) as why:
            return f"{file} is damaged ({why}); download or write it again"
    return f"cannot read {', '.join(map(str, files))} ({error})"


def saved_table(task: Task, digest: Any) -> Table:
    """A folder of `save_to_disk` as a table, of several splits the task's; raises InputError."""
    folder = Path(task.data[0])
    try:
        data = datasets.load_from_disk(str(folder))
    except IndexError as error:  # what datasets makes of one without rows
        raise InputError(no_rows(task)) from error
    except (OSError, ValueError) as error:
        raise InputError(f"tasks.{task.name}.data: {folder}: invalid folder of save_to_disk ({error})") from error
    if not isinstance(data, dict):
        refuse_split(task, f"{folder} holds one dataset without splits")
    elif task.split not in data:
        raise InputError(f"tasks.{task.name}.split: {folder} has no {task.split}; there are {', '.join(data)}")
    else:
        data = data[task.split]
    _update(digest, [Path(file["filename"]) for file in data.cache_files])
    return _table_of(task, data, [(str(folder), task.image_root or str(folder.parent), len(data))], data.column_names)


def hub_table(task: Task, digest: Any) -> Table:
    """A dataset of the Hub, at its present commit unless one is named, as a table; raises InputError."""
    found = HUB_ID.fullmatch(task.data[0])
    where = {"path": found["repo"], "name": found["config"], "revision": found["revision"]}
    what = f"{task.data[0]} is not a file or folder here, and cannot be loaded as a dataset of the Hub"
    with _data_errors(task, lambda error: f"{what}: {error.__cause__ or error}"):
        builder = datasets.load_dataset_builder(**where)
        names = list(builder.info.features or ())
        if hasattr(builder.config, "columns") and (wanted := [name for name in _named_columns(task) if name in names]):
            builder = datasets.load_dataset_builder(**where, columns=wanted)
        builder.download_and_prepare()
        data = builder.as_dataset(task.split)
    if digest:
        digest.update(builder.hash.encode())  # the commit
    return _table_of(task, data, [(task.data[0], task.image_root or ".", len(data))], names or data.column_names)


def _table_of(task: Task, data: datasets.Dataset, parts: list[tuple[str, str, int]], names: Sequence[str]) -> Table:
    """The columns of `data` that the task needs; `names` are those that the data has. Raises InputError."""
    if task.columns.target not in names:
        target, there = task.columns.target, ", ".join(sorted(names))
        raise InputError(f"tasks.{task.name}.columns.target: no row has {target}; there are {there}: name the column")
    data = data.select_columns([name for name in _named_columns(task) if name in data.column_names])
    labels = {}
    for image in columns_of("image"):
        role, some = image.name.removesuffix("_image"), image.data_columns(task.columns)
        labels |= {f"{role}-{i}" if len(some) > 1 else role: name for i, name in enumerate(some)}
    return Table(dataset=data.with_format("arrow"), names=names, parts=parts, labels=labels)


def _named_columns(task: Task) -> list[str]:
    images = [image for image in columns_of("image") if not (task.t2i and image.many)]
    names = [name for image in images for name in image.data_columns(task.columns)]
    return list(dict.fromkeys((*names, *task.columns.captions, *task.columns.inverse_captions)))


def refuse_split(task: Task, why: str) -> None:
    """Raise InputError for a split that would have no effect."""
    if task.split != Task.model_fields["split"].default:
        raise InputError(f"tasks.{task.name}.split: {task.split}: {why}, and leave split out")


def _update(digest: Any, files: Sequence[Path]) -> None:
    """Update `digest`, unless None, with files: with all bytes up to 1 GB in all, beyond it with sizes and samples."""
    if digest is None:
        return
    sizes = [file.stat().st_size for file in files]
    for file, size in zip(files, sizes, strict=True):
        digest.update(str(size).encode())
        with file.open("rb") as binary:
            parts = iter(partial(binary.read, SAMPLE_BYTES), b"")
            if sum(sizes) > WHOLE_BYTES:
                parts = samples(binary, count=SAMPLES, num_bytes=SAMPLE_BYTES)
            for part in parts:
                digest.update(part)


def no_rows(task: Task) -> str:
    """The message for data without any row."""
    return f"tasks.{task.name}.data: {', '.join(task.data)} holds no rows"
