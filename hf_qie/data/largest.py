"""The rows that take the most memory to train on, as far as an embedding set tells without reading an embedding."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset

from hf_qie.config.recipe import Mix, Recipe
from hf_qie.data.embedding_sets import lengths, open_embeddings
from hf_qie.data.loader import TaskRows
from hf_qie.data.mixture import read_groups
from hf_qie.data.provenance import PROVENANCE
from hf_qie.data.schema import DROP_EMBEDS, INVERSE, shared_embeds
from hf_qie.models.base import Grid


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of a micro-batch."""

    grids: tuple[Grid, ...]  # the target's, then each source's
    num_tokens: int  # of the longest prompt
    rows: int = 1
    draws_per_row: int = 1

    @property
    def size(self) -> int:
        """Tokens that the transformer sees of a row."""
        target, *sources = map(math.prod, self.grids)
        return self.num_tokens + sum(sources) + self.draws_per_row * target


def largest(shapes: Iterable[Shape]) -> Shape:
    """The one with the most tokens."""
    return max(shapes, key=lambda shape: shape.size)


def largest_in(sets: Mapping[str, Dataset], weights: Mapping[str, float], mix: Mix) -> Shape:
    """Of the rows that training draws from whole sets, in the directions and with the captions that it draws."""
    found = []
    for group in read_groups(sets, weights, mix):
        data, rows = sets[group.task], TaskRows(group.task, sets[group.task], mix=mix)
        ways = ["", INVERSE] if group.inverse.any() else [""]
        num_tokens = np.stack([_num_tokens(data, prefix, rows.weights[way]) for way, prefix in enumerate(ways)])
        num_tokens = num_tokens[group.inverse.astype(int), group.rows]
        order = np.lexsort([-num_tokens, group.bucket])  # the longest prompt of a bucket first
        for entry in order[np.unique(group.bucket[order], return_index=True)[1]]:
            grids = rows.grids_of(int(group.rows[entry]), inverse=bool(group.inverse[entry]))
            size = {"num_tokens": int(num_tokens[entry]), "draws_per_row": mix.draws_per_row}
            found.append(Shape(grids=tuple(grids), **size))
    return largest(found)


def ready_sets(recipe: Recipe) -> dict[str, Dataset]:
    """The sets to train on that are given, or that extraction has finished."""
    sets = {}
    for name, task in recipe.tasks.items():
        folder = Path(recipe.extract.output_dir, name)
        if task.weight > 0 and (task.embeddings or (folder / PROVENANCE).is_file()):
            sets[name], _ = open_embeddings(task.embeddings or folder, task=name)
    return sets


def _num_tokens(data: Dataset, prefix: str, captions: Iterable[str]) -> np.ndarray:
    """Of the longest prompt of each row of a set in one direction."""
    table = data.data.table
    texts = [lengths(table, name) for name in (*captions, prefix + DROP_EMBEDS)]
    return lengths(table, prefix + shared_embeds(table.column_names)) + np.maximum.reduce(texts)
