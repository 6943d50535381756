"""Plan + rank -> micro-batches of draws, and the row of each draw.

Letters: S target latent tokens, R latent tokens of all sources, L prompt tokens, D width of the prompt encoder.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset

from hf_qie.config.recipe import Mix, Recipe
from hf_qie.data.captions import weighed_as
from hf_qie.data.images import BadImage
from hf_qie.data.online_latents import has_latents, read_pixels
from hf_qie.data.schema import INVERSE, SOURCES, TARGET, Column, columns_of, swapped
from hf_qie.data.seeding import draw_rng
from hf_qie.errors import InputError
from hf_qie.models.qwen_image.vae import Grid
from hf_qie.runtime.rules import unknown

TEXT = "text_embeds_"


class Rows:
    """The rows of a data set as Arrow has them: views of its files, without the time that `datasets` takes for a row.

    A worker that is spawned opens the files again.
    """

    def __init__(self, data: datasets.Dataset):
        self.data = data
        self.columns = {name: data.data.column(name) for name in data.column_names}
        self.places = None if data._indices is None else data._indices.column(0)  # where rows were reordered

    def __reduce__(self) -> tuple[type, tuple[datasets.Dataset]]:
        return Rows, (self.data,)

    def __getitem__(self, index: int) -> "Row":
        return Row(self.columns, index if self.places is None else self.places[index].as_py())


class Row(NamedTuple):
    """One row."""

    columns: Mapping[str, pa.ChunkedArray]
    place: int

    def value(self, name: str) -> pa.Scalar:
        """What it has in a column."""
        return self.columns[name][self.place]


class TaskRows:
    """The rows of one task's set, read without a copy, as float16 views of its Arrow files.

    Of a set without latents the pictures are read. Raises InputError where `mix.caption_weights` does not fit the
    set's captions.
    """

    def __init__(self, task: str, data: datasets.Dataset, *, caption_weights: Mapping[str, float] | None):
        self.task, self.has_latents = task, has_latents(data)
        self.rows = Rows(data)
        grids = {column.of: column for column in columns_of("grid")}
        arrays = columns_of("latents", "values") if self.has_latents else columns_of("values")
        self.grids = [(grids[image], swapped(grids[image])) for image in (TARGET, SOURCES)]
        self.arrays = [(column, swapped(column)) for column in arrays]
        self.weights = text_weights(data.column_names, caption_weights, task)

    def read(self, index: int, *, inverse: bool, caption: float | None) -> dict[str, Any]:
        """The row at `index` of the set.

        `caption` in [0, 1) picks one of its captions by weight, None the drop caption, which is also that of a row
        without a caption that weighs anything.

        target_latents [S, 64], source_latents [R, 64], prompt_parts, whose lengths sum to L, [length, D]: float16
        arrays, not to be written to; grids: packed (height, width), the target's, then each source's; task; row, its
        position in the task's data; caption, the name of its column, or "drop". Without latents, in their place
        pictures: [H, W, 3] uint8, in the order of grids.
        """
        row = self.rows[index]
        prefix = INVERSE if inverse else ""
        text = self._text(row, self.weights[inverse], caption) or prefix + TEXT + "drop"
        found = (_stored(row, *pair, inverse=inverse) for pair in self.grids)
        grids = [tuple(grid) for column, value in found for grid in column.each(value.as_py())]
        arrays = {pair[0].name: _matrix(_stored(row, *pair, inverse=inverse)[1]) for pair in self.arrays}
        if not self.has_latents:
            arrays["images"] = self._images(row, grids, inverse=inverse)
        return arrays | {
            "prompt_parts": [_matrix(row.value(prefix + "image_embeds")), _matrix(row.value(text))],
            "grids": grids,
            "task": self.task,
            "row": row.value("row").as_py(),
            "caption": text.removeprefix(prefix + TEXT),
        }

    def _images(self, row: Row, grids: Sequence[Grid], *, inverse: bool) -> list[np.ndarray]:
        """What extraction would have encoded, in the order of the columns of latents."""
        files = {image.name: image.each(row.value(image.name).as_py()) for image in columns_of("image")}
        if inverse:
            files |= {SOURCES: files[TARGET], TARGET: files[SOURCES]}
        try:
            return [
                read_pixels(file, grid)
                for column in columns_of("latents")
                for file, grid in zip(files[column.of], grids[1:] if column.of == SOURCES else grids[:1], strict=True)
            ]
        except BadImage as error:
            raise InputError(
                f"tasks.{self.task}: row {row.value('row')}: {error}; it was whole at extraction"
            ) from error

    @staticmethod
    def _text(row: Row, weights: Mapping[str, float], caption: float | None) -> str | None:
        """The text column that `caption` picks; None for the drop caption."""
        present = [name for name in weights if row.value(name).is_valid]
        if caption is None or not present:
            return None
        *edges, total = accumulate(weights[name] for name in present)
        return present[bisect_right(edges, caption * total)]


class Draws(Dataset):
    """Draw number -> row: which row the plan says, which caption and whether it is dropped (seed, number) say.

    Raises InputError where a set does not fit, as `TaskRows`.
    """

    def __init__(self, sets: Mapping[str, datasets.Dataset], plan: datasets.Dataset, *, seed: int, mix: Mix):
        self.tasks = {task: TaskRows(task, data, caption_weights=mix.caption_weights) for task, data in sets.items()}
        self.plan = Rows(plan)
        self.same_shape = plan.features["rows"].length
        self.seed = seed
        self.caption_dropout = mix.caption_dropout

    def __len__(self) -> int:
        return len(self.plan.data) * self.same_shape

    def __getitem__(self, draw: int) -> dict[str, Any]:
        """A row as `TaskRows.read` gives it, and its draw."""
        cell = self.plan[draw // self.same_shape]
        dropped = draw_rng(self.seed, "drop", draw).random() < self.caption_dropout
        caption = None if dropped else draw_rng(self.seed, "caption", draw).random()
        index = cell.value("rows")[draw % self.same_shape].as_py()
        task, inverse = cell.value("task").as_py(), cell.value("inverse").as_py()
        return self.tasks[task].read(index, inverse=inverse, caption=caption) | {"draw": draw}


def check_caption_weights(recipe: Recipe, sets: Mapping[str, datasets.Dataset]) -> None:
    """Raise InputError where `mix.caption_weights` names what no set and no task with data has as a caption."""
    columns = {name: None for data in sets.values() for name in data.column_names}
    captions = {name.removeprefix(TEXT): None for name in columns if name.startswith(TEXT) and name != TEXT + "drop"}
    for task in recipe.tasks.values():
        captions |= dict.fromkeys(() if task.embeddings else task.columns.captions)
    for caption in recipe.mix.caption_weights or ():
        if caption not in captions:
            raise InputError(f"mix.caption_weights.{caption}: {unknown(caption, captions)}")


def text_weights(
    columns: Sequence[str], caption_weights: Mapping[str, float] | None, task: str
) -> tuple[dict[str, float], dict[str, float]]:
    """The text columns of a set by weight, (forward, inverse), those of weight 0 left out.

    The i-th inverse caption is the inverse of the i-th caption and has its weight. Each text of a list of captions has
    the weight of its column, unless `caption_weights` names it itself. Raises InputError where a caption
    of the set is not in `caption_weights`, or none has a weight.
    """
    forward = [name for name in columns if name.startswith(TEXT) and name != TEXT + "drop"]
    inverse = [name for name in columns if name.startswith("inverse_" + TEXT) and not name.endswith(TEXT + "drop")]
    captions = [name.removeprefix(TEXT) for name in forward]
    given = dict.fromkeys(captions, 1.0) if caption_weights is None else caption_weights
    weights = {caption: given[name] for caption in captions if (name := weighed_as(caption, given)) in given}
    if missing := [caption for caption in captions if caption not in weights]:
        raise InputError(
            f"mix.caption_weights: names {sorted(given)}, but task {task!r} has the captions {missing} too; "
            "name these, with weight 0 to leave them out"
        )
    if captions and not any(weights[caption] for caption in captions):
        raise InputError(f"mix.caption_weights: every caption of task {task!r}, {captions}, has weight 0; weigh one")
    return tuple(
        {name: float(weights[caption]) for name, caption in zip(names, captions, strict=False) if weights[caption]}
        for names in (forward, inverse)
    )


def _stored(row: Row, column: Column, other: Column, *, inverse: bool) -> tuple[Column, pa.Scalar]:
    """What one direction of a row has in a column: an inverse its own, or what the forward row has in the `other`."""
    if not inverse:
        return column, row.value(column.name)
    own = INVERSE + column.name
    if own in row.columns and (value := row.value(own)).is_valid:
        return column, value
    return other, row.value(other.name)


def _matrix(value: pa.ListScalar) -> np.ndarray:
    """The view [length, width] of a list of vectors."""
    vectors = value.values  # a slice of the file's, whose numbers are still all of the file's
    width = vectors.type.list_size
    first, end = width * vectors.offset, width * (vectors.offset + len(vectors))
    return vectors.values.to_numpy(zero_copy_only=True)[first:end].reshape(-1, width)


class RankBatches:
    """The micro-batches of one rank, as ranges of draw numbers: a batch sampler that knows its place by arithmetic.

    Step k is the draws k * G onward, however ranks and accumulation cut it.
    """

    def __init__(
        self,
        *,
        first_step: int,
        num_steps: int,
        global_batch_size: int,
        per_device_batch_size: int,
        rank: int,
        world_size: int,
    ):
        at_once = per_device_batch_size * world_size
        assert global_batch_size % at_once == 0, "a global batch is ranks x micro-batch x accumulation"
        self.batch_size, first = per_device_batch_size, first_step * global_batch_size + rank * per_device_batch_size
        self.starts = range(first, num_steps * global_batch_size, at_once)

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[range]:
        stops = range(self.starts.start + self.batch_size, self.starts.stop + self.batch_size, self.starts.step)
        return map(range, self.starts, stops)  # no line of Python a batch: a resumed run steps over millions of them


def open_loader(
    rows: Dataset,
    batches: Iterable[Sequence[int]],
    *,
    collate: Callable[[list[dict[str, Any]]], Any],
    num_workers: int = 0,
    pin_memory: bool = False,
    prefetch_factor: int | None = None,
) -> DataLoader:
    """A plain DataLoader over `batches` of row numbers; it takes nothing from the global generators."""
    return DataLoader(
        rows,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=prefetch_factor,
        persistent_workers=num_workers > 0,
        generator=torch.Generator().manual_seed(0),  # for the workers' base seed, which nothing here uses
    )
