"""Plan + rank -> micro-batches of draws, and the row of each draw.

Letters: S target latent tokens, R latent tokens of all sources, L prompt tokens, D width of the prompt encoder.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset

from hf_qie.mix import draw_rng
from hf_qie.recipe import InputError, Mix

TEXT = "text_embeds_"


class TaskRows:
    """The rows of one task's set, read without a copy, as float16 views of its Arrow files.

    A worker that is spawned opens the files again. Raises InputError where the set has no latents, or where
    `mix.caption_weights` does not fit its captions.
    """

    def __init__(self, task: str, data: datasets.Dataset, *, caption_weights: Mapping[str, float] | None):
        if data.data.column("target_latents").null_count:
            raise InputError(f"tasks.{task}: its embedding set has no latents; extract with extract.latents: true")
        self.task = task
        # Integer keys on the arrow format: the torch format copies, and makes float32 of float16.
        self.data = data.with_format("arrow")
        self.weights = text_weights(data.column_names, caption_weights, task)

    def read(self, index: int, *, inverse: bool, caption: float | None) -> dict[str, Any]:
        """The row at `index` of the set.

        `caption` in [0, 1) picks one of its captions by weight, None the drop caption, which is also that of a row
        without a caption that weighs anything.

        target_latents [S, 64], source_latents [R, 64], prompt_parts, whose lengths sum to L, [length, D]: float16
        arrays, not to be written to; grids: packed (height, width), the target's, then each source's; task; row, its
        position in the task's data.
        """
        row = self.data[index]
        prefix = "inverse_" if inverse else ""
        text = self._text(row, self.weights[inverse], caption) or prefix + TEXT + "drop"
        target_latents, target_grid, source_latents, source_grids = _pictures(row, inverse=inverse)
        return {
            "target_latents": _matrix(target_latents),
            "source_latents": _matrix(source_latents),
            "prompt_parts": [_matrix(row[prefix + "image_embeds"][0]), _matrix(row[text][0])],
            "grids": [tuple(grid) for grid in [target_grid, *source_grids]],
            "task": self.task,
            "row": row["row"][0].as_py(),
        }

    @staticmethod
    def _text(row: pa.Table, weights: Mapping[str, float], caption: float | None) -> str | None:
        """The text column that `caption` picks; None for the drop caption."""
        present = [name for name in weights if row[name][0].is_valid]
        if caption is None or not present:
            return None
        edges = np.cumsum([weights[name] for name in present])
        return present[np.searchsorted(edges[:-1], caption * edges[-1], side="right")]


class Draws(Dataset):
    """Draw number -> row: which row the plan says, which caption and whether it is dropped (seed, number) say.

    Raises InputError where a set does not fit, as `TaskRows`.
    """

    def __init__(self, sets: Mapping[str, datasets.Dataset], plan: datasets.Dataset, *, seed: int, mix: Mix):
        self.tasks = {task: TaskRows(task, data, caption_weights=mix.caption_weights) for task, data in sets.items()}
        self.plan = plan
        self.same_shape = plan.features["rows"].length
        self.seed = seed
        self.caption_dropout = mix.caption_dropout

    def __len__(self) -> int:
        return len(self.plan) * self.same_shape

    def __getitem__(self, draw: int) -> dict[str, Any]:
        """A row as `TaskRows.read` gives it, and its draw."""
        cell = self.plan[draw // self.same_shape]
        dropped = draw_rng(self.seed, "drop", draw).random() < self.caption_dropout
        caption = None if dropped else draw_rng(self.seed, "caption", draw).random()
        index = cell["rows"][draw % self.same_shape]
        return self.tasks[cell["task"]].read(index, inverse=cell["inverse"], caption=caption) | {"draw": draw}


def text_weights(
    columns: Sequence[str], caption_weights: Mapping[str, float] | None, task: str
) -> tuple[dict[str, float], dict[str, float]]:
    """The text columns of a set by weight, (forward, inverse), those of weight 0 left out.

    The i-th inverse caption is the inverse of the i-th caption and has its weight. Raises InputError where a caption
    of the set is not in `caption_weights`, or none has a weight.
    """
    forward = [name for name in columns if name.startswith(TEXT) and name != TEXT + "drop"]
    inverse = [name for name in columns if name.startswith("inverse_" + TEXT) and not name.endswith(TEXT + "drop")]
    captions = [name.removeprefix(TEXT) for name in forward]
    weights = dict.fromkeys(captions, 1.0) if caption_weights is None else caption_weights
    if missing := [caption for caption in captions if caption not in weights]:
        raise InputError(
            f"mix.caption_weights: names {sorted(weights)}, but task {task!r} has the captions {missing} too; "
            "name these, with weight 0 to leave them out"
        )
    if captions and not any(weights[caption] for caption in captions):
        raise InputError(f"mix.caption_weights: every caption of task {task!r}, {captions}, has weight 0; weigh one")
    return tuple(
        {name: float(weights[caption]) for name, caption in zip(names, captions, strict=False) if weights[caption]}
        for names in (forward, inverse)
    )


def _pictures(row: pa.Table, *, inverse: bool) -> tuple[pa.Scalar, list[int], pa.Scalar, list[list[int]]]:
    """Target latents, target grid, source latents and source grids.

    An inverse has the two swapped, but for what the set stores because the areas differ.
    """
    target, source = row["target_latents"][0], row["source_latents"][0]
    target_grid, source_grids = row["target_grid"][0], row["source_grids"][0]
    if not inverse:
        return target, target_grid.as_py(), source, source_grids.as_py()

    def stored(name: str) -> pa.Scalar | None:
        return row[name][0] if name in row.column_names and row[name][0].is_valid else None

    own_target, own_source = stored("inverse_target_latents"), stored("inverse_source_latents")
    own_grid, own_grids = stored("inverse_target_grid"), stored("inverse_source_grids")
    return (
        source if own_target is None else own_target,
        source_grids.as_py()[0] if own_grid is None else own_grid.as_py(),
        target if own_source is None else own_source,
        [target_grid.as_py()] if own_grids is None else own_grids.as_py(),
    )


def _matrix(value: pa.ListScalar) -> np.ndarray:
    """The view [length, width] of a list of vectors."""
    vectors = value.values  # a slice of the file's; `flatten` keeps to it, and copies nothing
    return vectors.flatten().to_numpy(zero_copy_only=True).reshape(-1, vectors.type.list_size)


class RankBatches:
    """The micro-batches of one rank, as lists of draw numbers: a batch sampler that knows its place by arithmetic.

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
        self.steps = range(first_step, num_steps)
        self.global_batch_size, self.batch_size = global_batch_size, per_device_batch_size
        self.rank, self.world_size = rank, world_size
        self.accumulation, rest = divmod(global_batch_size, per_device_batch_size * world_size)
        assert rest == 0, "a global batch is ranks x micro-batch x accumulation"

    def __len__(self) -> int:
        return len(self.steps) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            for turn in range(self.accumulation):
                first = step * self.global_batch_size + (turn * self.world_size + self.rank) * self.batch_size
                yield list(range(first, first + self.batch_size))


def open_loader(
    rows: Dataset,
    batches: Iterable[list[int]],
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
