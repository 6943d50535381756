"""Tables as a task's data: Parquet files, a folder of `save_to_disk`, a dataset of the Hub.

Only the columns that the recipe names are read, so that the others may be of any type. Images may lie in them.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import (
    Dataset,
    DatasetBuilder,
    Features,
    concatenate_datasets,
    config,
    load_dataset_builder,
    load_from_disk,
)
from datasets.exceptions import DatasetsError
from pyarrow import parquet

from hf_qie.config.recipe import Columns, Task
from hf_qie.data.schema import columns_of
from hf_qie.errors import InputError
from hf_qie.runtime.files import disk_trouble, samples

Line = tuple[str, str, dict[str, Any]]  # where it stands, the folder of its relative paths, its values by column

HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<revision>\S+))?")
EMBEDDED = re.compile(r"row-(?P<row>\d+)-(?P<column>\w+?)(-(?P<place>\d+))?")
BATCH_ROWS = 1000  # of a table at a time
WHOLE_BYTES = 1 << 30  # beyond it files are told by size and samples: terabytes of images take seconds, not hours
SAMPLES, SAMPLE_BYTES = 16, 1 << 16


class Embedded(str):
    """The name of a picture that lies in the data itself: `row-7-target`, `row-7-source-0`."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A dataset whose rows are lines; memory-mapped, so that it takes no memory however large it is."""

    dataset: Dataset  # in Arrow format, which decodes nothing; the columns that the task needs
    names: Sequence[str]  # of all columns of the data
    parts: list[tuple[str, str, int]]  # of each of its files the name, the folder of relative paths, the rows
    columns: Columns

    def lines(self, digest: Any) -> Iterator[Line]:
        """Its lines, by file and 0-based row; `digest` takes in what they hold."""
        places = ((f"{name}, row {row}", root) for name, root, num_rows in self.parts for row in range(num_rows))
        images = {column: role for role, column in self.image_columns().items()}
        texts = {*self.columns.captions, *self.columns.inverse_captions}
        for start in range(0, len(self.dataset), BATCH_ROWS):
            batch = self.dataset[start : start + BATCH_ROWS]
            values = {name: [None] * len(batch) for name in (*self.names, *batch.column_names)}
            values |= {name: [plain(value) for value in batch[name]] for name in texts & set(batch.column_names)}
            for name in images.keys() & set(batch.column_names):
                numbered = enumerate(batch[name], start)
                values[name] = [without_pixels(value, f"row-{row}-{images[name]}") for row, value in numbered]
            for row in zip(*values.values(), strict=True):
                digest.update(repr(row).encode())
                yield *next(places), dict(zip(values, row, strict=True))

    def image_columns(self) -> dict[str, str]:
        """The columns that hold images, by what their `Embedded` names say after the row: source, source-0, target."""
        roles = {}
        for image in columns_of("image"):
            role, columns = image.name.removesuffix("_image"), image.data_columns(self.columns)
            roles |= {f"{role}-{i}" if len(columns) > 1 else role: column for i, column in enumerate(columns)}
        return roles

    def read(self, name: str) -> bytes | None:
        """The image of an `Embedded` name; None for any other name."""
        if (found := EMBEDDED.fullmatch(name)) is None:
            return None
        columns, role, place = self.image_columns(), found["column"], found["place"]
        if f"{role}-{place}" in columns:
            role, place = f"{role}-{place}", None
        if role not in columns:
            return None
        value = self.dataset[int(found["row"])][columns[role]][0]
        stored = bytes_of(value if place is None else value[int(place)])
        return None if stored is None else stored.as_py()


def without_pixels(value: pa.Scalar, name: str) -> Any:
    """A path as it is, `Embedded(name)` for a picture, null for none; of a list each."""
    if isinstance(value, pa.ListScalar) and value.is_valid:
        return [without_pixels(item, f"{name}-{place}") for place, item in enumerate(value.values)]
    if bytes_of(value) is not None:
        return Embedded(name)
    if isinstance(value, pa.StructScalar) and "path" in value:
        return plain(value["path"])
    return plain(value)


def plain(value: pa.Scalar) -> Any:
    """A value of Python; half a character, which no row may hold, for text that is not UTF-8: Arrow does not look."""
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return "\ud800"


def bytes_of(value: pa.Scalar) -> pa.Scalar | None:
    """The bytes of a picture, not copied yet: bare, or in a struct as of datasets.Image; None where there are none."""
    if isinstance(value, pa.StructScalar) and "bytes" in value:
        value = value["bytes"]
    is_binary = pa.types.is_binary(value.type) or pa.types.is_large_binary(value.type)
    return value if is_binary and value.is_valid else None


def parquet_table(task: Task, files: list[Path], digest: Any) -> Table:
    """Parquet files as one table, by way of the cache of datasets; raises InputError."""
    footers = {}
    for file in files:
        try:
            footers[file] = parquet.read_metadata(file)
        except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
            raise InputError(f"{file}: no Parquet ({error})") from error
    footers = {file: footer for file, footer in footers.items() if footer.num_rows}  # datasets cannot read others
    if not footers:
        raise InputError(no_rows(task))
    take_in(list(footers), digest)
    schemas = {file: footer.schema.to_arrow_schema() for file, footer in footers.items()}
    fields = common_fields(task, schemas)
    wanted = [name for name in named_columns(task) if name in fields]
    names = list(dict.fromkeys(name for schema in schemas.values() for name in schema.names))
    found = []
    # of a column that a file lacks the rows are null
    for there, some in groupby(footers, lambda file: [n for n in wanted if n in schemas[file].names]):
        some = list(some)
        if not there:
            has, named = ", ".join(schemas[some[0]].names), ", ".join(wanted or named_columns(task))
            what = f"{some[0]}: has {has}, and none of {named}; name its columns, or leave it out"
            raise InputError(f"tasks.{task.name}.data: {what}")
        builder = load_dataset_builder(
            "parquet",
            data_files={"train": [escape(str(file)) for file in some]},
            columns=there,
            features=Features.from_arrow_schema(pa.schema([fields[name] for name in there])),
        )
        if not any(os.path.isdir(builder.cache_dir + ending) for ending in ("", ".incomplete")):  # or it is being made
            check_cache(task, sum(copied_bytes(footers[file], there) for file in some))
        found.append(prepared(task, builder, "train", lambda error, some=some, there=there: unreadable(some, there)))
    parts = [(str(file), task.image_root or str(file.parent), footer.num_rows) for file, footer in footers.items()]
    return table_of(task, concatenate_datasets(found), parts, names=names)


def common_fields(task: Task, schemas: Mapping[Path, pa.Schema]) -> dict[str, pa.Field]:
    """The columns that the task needs, of a type that holds those of all files; raises InputError for the first file
    where there is none.
    """
    fields: dict[str, pa.Field] = {}
    before: dict[str, Path] = {}  # the file that has given a column its type
    for file, schema in schemas.items():
        for name in (name for name in named_columns(task) if name in schema.names):
            kind = schema.field(name).type
            field = pa.field(name, kind.value_type if pa.types.is_dictionary(kind) else kind)
            known = fields.get(name, field)
            try:
                both = pa.unify_schemas([pa.schema([known]), pa.schema([field])], promote_options="permissive")
            except pa.ArrowException as error:
                raise InputError(
                    f"tasks.{task.name}.data: {file}: column {name} is {kind}, in {before[name]} it is {known.type}; "
                    "write both as one type"
                ) from error
            fields[name] = both.field(name)
            if name not in before or fields[name] != known:
                before[name] = file
    return fields


def copied_bytes(footer: parquet.FileMetaData, names: Sequence[str]) -> int:
    """About what the columns `names` of a Parquet file take in the cache."""
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    columns = (group.column(i) for group in groups for i in range(footer.num_columns))
    starts = tuple(f"{name}." for name in names)
    return sum(column.total_uncompressed_size for column in columns if f"{column.path_in_schema}.".startswith(starts))


def check_cache(task: Task, num_bytes: int) -> None:
    """Raise InputError where the cache of datasets has no room for `num_bytes`."""
    cache = Path(config.HF_DATASETS_CACHE)
    free = shutil.disk_usage(next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())).free
    if num_bytes > free:
        raise InputError(
            f"tasks.{task.name}.data: its copy in the cache of datasets, {cache}: about {num_bytes:,} bytes to write, "
            f"{free:,} free; make room, or let HF_DATASETS_CACHE name a folder on a larger disk"
        )


def prepared(task: Task, builder: DatasetBuilder, split: str, words: Callable[[Exception], str]) -> Dataset:
    """The dataset of a builder, from the cache or copied there; raises InputError, with `words` for what it reads."""
    try:
        builder.download_and_prepare()
        return builder.as_dataset(split)
    except (DatasetsError, OSError, ValueError) as error:
        if trouble := disk_trouble(error) or ("Not enough disk space" in str(error) and str(error)):
            raise InputError(
                f"tasks.{task.name}.data: its copy in the cache of datasets, {config.HF_DATASETS_CACHE}: {trouble}; "
                "or let HF_DATASETS_CACHE name a folder on another disk"
            ) from error
        raise InputError(f"tasks.{task.name}.data: {words(error)}") from error


def unreadable(files: Sequence[Path], names: Sequence[str]) -> str:
    """The first Parquet file that cannot be read, and why: datasets does not say which."""
    for file in files:
        try:
            for _ in parquet.ParquetFile(file).iter_batches(columns=names):
                pass
        except (OSError, ValueError) as error:
            return f"{file} is damaged ({error}); fetch or write it again"
    return f"cannot read {files[0]} ... "


def saved_table(task: Task, digest: Any) -> Table:
    """A folder of `save_to_disk` as a table; of several splits the task's. Raises InputError."""
    folder = Path(task.data[0])
    try:
        data = load_from_disk(str(folder))
    except IndexError as error:  # what datasets makes of one without rows
        raise InputError(no_rows(task)) from error
    except (OSError, ValueError) as error:
        raise InputError(f"tasks.{task.name}.data: {folder} is no folder of save_to_disk ({error})") from error
    if isinstance(data, dict):
        if task.split not in data:
            raise InputError(f"tasks.{task.name}.split: {folder} has no {task.split}; there are {', '.join(data)}")
        data = data[task.split]
    else:
        refuse_split(task, f"{folder} holds one dataset without splits")
    take_in([Path(file["filename"]) for file in data.cache_files], digest)
    return table_of(task, data, [(str(folder), task.image_root or str(folder.parent), len(data))])


def hub_table(task: Task, digest: Any) -> Table:
    """A dataset of the Hub, at its present commit unless one is named, as a table; raises InputError."""
    found = HUB_ID.fullmatch(task.data[0])

    def words(error: Exception) -> str:
        return (
            f"{task.data[0]} is no file or folder here, and as a dataset of the Hub it cannot be loaded: "
            f"{error.__cause__ or error}"
        )

    where = {"path": found["repo"], "name": found["config"], "revision": found["revision"]}
    try:
        builder = load_dataset_builder(**where)
        names = list(builder.info.features or ())
        if hasattr(builder.config, "columns") and (wanted := [name for name in named_columns(task) if name in names]):
            builder = load_dataset_builder(**where, columns=wanted)
    except (DatasetsError, OSError, ValueError) as error:
        raise InputError(f"tasks.{task.name}.data: {words(error)}") from error
    data = prepared(task, builder, task.split, words)
    if digest:
        digest.update(builder.hash.encode())  # the commit
    return table_of(task, data, [(task.data[0], task.image_root or ".", len(data))], names=names)


def table_of(task: Task, data: Dataset, parts: list[tuple[str, str, int]], *, names: Sequence[str] = ()) -> Table:
    """The columns of `data` that the task needs; `names` are those that the data has. Raises InputError for none."""
    names = names or data.column_names
    if task.columns.target not in names:
        raise InputError(
            f"tasks.{task.name}.columns.target: no row has {task.columns.target}; there are "
            f"{', '.join(sorted(names))}: name the column"
        )
    data = data.select_columns([name for name in named_columns(task) if name in data.column_names])
    return Table(dataset=data.with_format("arrow"), names=names, parts=parts, columns=task.columns)


def named_columns(task: Task) -> list[str]:
    """The columns of its data that a task needs, as far as it has them."""
    columns = task.columns
    images = [
        name for image in columns_of("image") if not (task.t2i and image.many) for name in image.data_columns(columns)
    ]
    return list(dict.fromkeys((*images, *columns.captions, *columns.inverse_captions)))


def refuse_split(task: Task, why: str) -> None:
    """Raise InputError for a split that would be passed over in silence."""
    if task.split != Task.model_fields["split"].default:
        raise InputError(f"tasks.{task.name}.split: {task.split}: {why}, and leave split out")


def take_in(files: Sequence[Path], digest: Any) -> None:
    """Let `digest`, unless None, tell files from others: whole up to 1 GB in all, beyond it by size and samples."""
    if digest is None:
        return
    sizes = [file.stat().st_size for file in files]
    for file, size in zip(files, sizes, strict=True):
        digest.update(str(size).encode())
        with file.open("rb") as binary:
            if sum(sizes) <= WHOLE_BYTES:
                parts = iter(lambda binary=binary: binary.read(SAMPLE_BYTES), b"")
            else:
                parts = samples(binary, count=SAMPLES, num_bytes=SAMPLE_BYTES)
            for part in parts:
                digest.update(part)


def no_rows(task: Task) -> str:
    """What to say where there is no line at all."""
    return f"tasks.{task.name}.data: {', '.join(task.data)} holds no rows"
