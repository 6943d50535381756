"""Mixture plan + rank -> micro-batches of draws, and the row of each draw.

Letters: S target latent tokens, R latent tokens of all sources, C width of a packed latent, L prompt tokens, D width
of the prompt encoder.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset

from hf_qie.config.recipe import Mix, Recipe
from hf_qie.data.images import BadImage
from hf_qie.data.online_latents import has_latents, read_pixels
from hf_qie.data.schema import (
    DROP_EMBEDS,
    INVERSE,
    SOURCES,
    TARGET,
    TEXT_EMBEDS,
    Column,
    columns_of,
    prompt_columns_in,
    swapped,
    texts_in,
)
from hf_qie.data.seeding import draw_rng
from hf_qie.errors import InputError
from hf_qie.models.base import Family, Grid
from hf_qie.runtime.rules import unknown


class Rows:
    """The rows of a data set as views of its Arrow files, without the time that `datasets` takes for a row.

    A spawned worker opens the files again.
    """

    def __init__(self, data: datasets.Dataset):
        self.data = data
        self.columns = {name: data.data.column(name) for name in data.column_names}
        self.places = None if data._indices is None else data._indices.column(0)  # where rows were reordered

    def __reduce__(self) -> tuple[type, tuple[datasets.Dataset]]:
        return type(self), (self.data,)

    def value(self, index: int, name: str) -> pa.Scalar:
        """What a row has in a column."""
        return self.columns[name][index if self.places is None else self.places[index].as_py()]


class TaskRows:
    """The rows of one task's set, read without a copy, as float16 views of its Arrow files.

    Of a set without latents the images are read, in the sizes of `family`. Raises InputError where
    `mix.caption_weights` does not fit the set's captions.
    """

    def __init__(self, task: str, data: datasets.Dataset, *, mix: Mix, family: Family | None = None):
        self.task, self.has_latents, self.family = task, has_latents(data), family
        self.rows = Rows(data)
        self.weights = text_weights(data.column_names, mix.caption_weights, task)
        self.shared, *self.slots = prompt_columns_in(data.column_names)
        grids = {column.of: column for column in columns_of("grid")}
        arrays = columns_of("latents", "values") if self.has_latents else columns_of("values")
        # with what an inverse has of the forward row where the set stores nothing of its own for it
        self.grids = [(grids[image], swapped(grids[image])) for image in (TARGET, SOURCES)]
        self.arrays = [(column, swapped(column)) for column in arrays]

    def read(self, index: int, *, inverse: bool, caption: float | None) -> dict[str, Any]:
        """The row at `index` of the set.

        `caption` in [0, 1) picks one of its captions by weight, None the drop caption, which is also that of a row
        without a caption that weighs anything.

        target_latents [S, C], source_latents [R, C] and other arrays of the set, prompt_parts, whose lengths sum to L,
        [length, D]: not to be written to; image_slots: of each source, how many of these embeddings stand in front of
        its latents, [] where images have embeddings of their own; grids: packed (height, width), the target's, then
        each source's; task; row, its position in the task's data; caption, the name of its column, or "drop". In place
        of latents a set without them has images, [H, W, channels] uint8.
        """
        prefix = INVERSE if inverse else ""
        text = self._text(index, self.weights[inverse], caption) or prefix + DROP_EMBEDS
        grids = self.grids_of(index, inverse=inverse)
        row = {pair[0].name: _matrix(self._stored(index, *pair, inverse=inverse)[1]) for pair in self.arrays}
        if not self.has_latents:
            row["images"] = self._images(index, grids, inverse=inverse)
        return row | {
            "prompt_parts": [_matrix(self.rows.value(index, name)) for name in (prefix + self.shared, text)],
            "image_slots": [place for name in self.slots for place in self.rows.value(index, prefix + name).as_py()],
            "grids": grids,
            "task": self.task,
            "row": self.rows.value(index, "row").as_py(),
            "caption": text.removeprefix(prefix + TEXT_EMBEDS),
        }

    def grids_of(self, index: int, *, inverse: bool) -> list[Grid]:
        """Latent grids, the target's, then each source's."""
        found = (self._stored(index, *pair, inverse=inverse) for pair in self.grids)
        return [tuple(grid) for column, value in found for grid in column.each(value.as_py())]

    def _stored(self, index: int, column: Column, other: Column, *, inverse: bool) -> tuple[Column, pa.Scalar]:
        if inverse:
            own = INVERSE + column.name
            if own in self.rows.columns and (value := self.rows.value(index, own)).is_valid:
                return column, value
            column = other
        return column, self.rows.value(index, column.name)

    def _images(self, index: int, grids: Sequence[Grid], *, inverse: bool) -> list[np.ndarray]:
        """What extraction would have encoded, in the order of the columns of latents."""
        images = columns_of("image")
        files = {image.name: image.each(self.rows.value(index, image.name).as_py()) for image in images}
        if inverse:
            files |= {SOURCES: files[TARGET], TARGET: files[SOURCES]}
        shown = [(files[one.of], grids[1:] if one.of == SOURCES else grids[:1]) for one in columns_of("latents")]
        try:
            return [read_pixels(*pair, self.family) for pairs in shown for pair in zip(*pairs, strict=True)]
        except BadImage as error:
            at = f"tasks.{self.task}: row {self.rows.value(index, 'row')}"
            raise InputError(f"{at}: {error}; extraction could read it") from error

    def _text(self, index: int, weights: Mapping[str, float], caption: float | None) -> str | None:
        """The text column that `caption` picks; None for the drop caption."""
        present = [name for name in weights if self.rows.value(index, name).is_valid]
        if caption is None or not present:
            return None
        *edges, total = accumulate(weights[name] for name in present)
        return present[bisect_right(edges, caption * total)]


class Draws(Dataset):
    """Draw number -> row: which row the mixture plan says; which caption, and whether it is dropped, (seed, number).

    With K draws per row, K consecutive numbers are draws of one row with one caption: those that the number divided by
    K decides. Raises InputError where a set does not fit, as `TaskRows`.
    """

    def __init__(self, sets: Mapping[str, datasets.Dataset], plan: datasets.Dataset, *, seed: int, **settings: Any):
        self.tasks = {task: TaskRows(task, data, **settings) for task, data in sets.items()}
        self.plan, self.same_shape = Rows(plan), plan.features["rows"].length
        self.seed, self.caption_dropout = seed, settings["mix"].caption_dropout
        self.draws_per_row = settings["mix"].draws_per_row

    def __len__(self) -> int:
        return len(self.plan.data) * self.same_shape * self.draws_per_row

    def __getitem__(self, draw: int) -> dict[str, Any]:
        """A row as `TaskRows.read` gives it, and its draw, alone in `draws`."""
        number = draw // self.draws_per_row
        batch, place = divmod(number, self.same_shape)
        dropped = draw_rng(self.seed, "drop", number).random() < self.caption_dropout
        caption = None if dropped else draw_rng(self.seed, "caption", number).random()
        index = self.plan.value(batch, "rows")[place].as_py()
        task, inverse = (self.plan.value(batch, name).as_py() for name in ("task", "inverse"))
        return self.tasks[task].read(index, inverse=inverse, caption=caption) | {"draws": [draw]}

    def __getitems__(self, draws: Sequence[int]) -> list[dict[str, Any]]:
        """The rows of `draws`, each row once, with all its draws, which follow each other."""
        count = self.draws_per_row
        of_rows = [list(draws[start : start + count]) for start in range(0, len(draws), count)]
        for of_row in of_rows:
            first = of_row[0] - of_row[0] % count
            assert of_row == list(range(first, first + count)), "a batch has all draws of a row, in their order"
        return [self[of_row[0]] | {"draws": of_row} for of_row in of_rows]


def check_caption_weights(recipe: Recipe, sets: Mapping[str, datasets.Dataset]) -> None:
    """Raise InputError where `mix.caption_weights` names what no set and no task with data has as a caption."""
    captions = [caption for data in sets.values() for caption in texts_in(data.column_names)]
    captions += [name for task in recipe.tasks.values() if not task.embeddings for name in task.columns.captions]
    for caption in recipe.mix.caption_weights or ():
        if caption not in captions:
            raise InputError(f"mix.caption_weights.{caption}: {unknown(caption, dict.fromkeys(captions))}")


def text_weights(
    columns: Sequence[str], caption_weights: Mapping[str, float] | None, task: str
) -> tuple[dict[str, float], ...]:
    """The text columns of a set by weight, (forward, inverse), those of weight 0 left out.

    The i-th inverse caption is the inverse of the i-th caption and has its weight. Each text of a list of captions has
    the weight of its column, unless `caption_weights` names it itself. Raises InputError where a caption
    of the set is not in `caption_weights`, or none has a weight.
    """
    captions = texts_in(columns)
    given = dict.fromkeys(captions, 1.0) if caption_weights is None else caption_weights
    weights = [given.get(caption, given.get(re.sub(r"_[0-9]+$", "", caption))) for caption in captions]
    if missing := [caption for caption, weight in zip(captions, weights, strict=True) if weight is None]:
        raise InputError(
            f"mix.caption_weights: names {sorted(given)}, but task {task!r} has the captions {missing} too; "
            "name these, with weight 0 to leave them out"
        )
    if captions and not any(weights):
        raise InputError(f"mix.caption_weights: every caption of task {task!r}, {captions}, has weight 0; weigh one")
    return tuple(
        {f"{prefix}{TEXT_EMBEDS}{name}": float(weight) for name, weight in zip(names, weights, strict=False) if weight}
        for prefix, names in (("", captions), (INVERSE, texts_in(columns, INVERSE)))
    )


def _matrix(value: pa.ListScalar) -> np.ndarray:
    """The view [length, width] of a list of vectors."""
    vectors = value.values  # a slice of the file's, whose numbers are still all of the file's
    width = vectors.type.list_size
    first, end = width * vectors.offset, width * (vectors.offset + len(vectors))
    return vectors.values.to_numpy(zero_copy_only=True)[first:end].reshape(-1, width)


class RankBatches:
    """A batch sampler: the micro-batches of one rank as ranges of draw numbers.

    Step k is the draws k * G onward, however ranks and accumulation cut it.
    """

    def __init__(self, *, num_draws: int, batch_size: int, rank: int, world_size: int):
        self.batch_size = batch_size
        self.starts = range(rank * batch_size, num_draws, world_size * batch_size)

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[range]:
        stops = range(self.starts.start + self.batch_size, self.starts.stop + self.batch_size, self.starts.step)
        return map(range, self.starts, stops)  # no line of Python a batch: a resumed run steps over millions of them


def open_loader(
    rows: Dataset, batches: Iterable[Sequence[int]], *, collate: Callable[[list[dict[str, Any]]], Any], **settings: Any
) -> DataLoader:
    """A plain DataLoader over `batches` of row numbers; it takes nothing from the global generators."""
    return DataLoader(
        rows,
        batch_sampler=batches,
        collate_fn=collate,
        persistent_workers=settings.get("num_workers", 0) > 0,
        generator=torch.Generator().manual_seed(0),  # for the workers' base seed, which nothing here uses
        **settings,
    )
