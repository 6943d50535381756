"""The captions of a row: a text a column, or a list of texts of which one is drawn at a time.

A column whose lists hold up to K texts becomes the columns `instruction`, `instruction_2` to `instruction_K` of the
set; a column and its inverse get the same number, as the i-th inverse belongs to the i-th caption.
"""

import re
from collections.abc import Container, Mapping
from functools import partial
from itertools import zip_longest
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset

from hf_qie.config.recipe import SET_COLUMNS, Columns, Task
from hf_qie.data.schema import columns_of
from hf_qie.errors import InputError

MOST_TEXTS = 16  # of a list; a row with more is bad


def by_column(table: Dataset, task: Task) -> tuple[Dataset, Columns]:
    """Rows whose `texts` are a list by caption column, with one text or null by each of the columns that they become.

    Returns also the columns of the task with these. Raises InputError for a name that is another column's.
    """
    columns, longest = task.columns, dict.fromkeys(text_columns(task.columns), 1)
    for texts in table.data.column("texts").chunks:
        for name in longest:
            longest[name] = max(longest[name], pc.max(pc.list_value_length(texts.field(name))).as_py())
    for name, inverse in zip_longest(columns.captions, columns.inverse_captions):
        if inverse:
            longest[name] = longest[inverse] = max(longest[name], longest[inverse])
    become = {name: [name, *(f"{name}_{i}" for i in range(2, count + 1))] for name, count in longest.items()}

    def all_of(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(column for name in names for column in become.get(name, [name]))

    new = [column for name in become for column in become[name][1:]]
    taken = {*text_columns(columns), *(column.name for column in columns_of())} | SET_COLUMNS
    if clash := sorted(taken.intersection(new)):
        raise InputError(
            f"tasks.{task.name}.columns: the captions in the lists become columns, and {clash[0]} is one already; "
            "rename the column"
        )
    lists = {"captions": all_of(columns.captions), "inverse_captions": all_of(columns.inverse_captions)}
    if new:  # what the set is made from names them
        columns = columns.model_copy(update=lists)
    return table.with_transform(partial(with_texts, become=become)), columns


def weighed_as(caption: str, weights: Container[str]) -> str:
    """Under which name `weights` weighs a caption column of a set: its own, or that of the list it is a text of."""
    return caption if caption in weights else re.sub(r"_[0-9]+$", "", caption)


def text_columns(columns: Columns) -> tuple[str, ...]:
    """All columns of texts."""
    return (*columns.captions, *columns.inverse_captions)


def with_texts(batch: dict[str, list[Any]], become: Mapping[str, list[str]]) -> dict[str, list[Any]]:
    """A batch of rows with a text, or null, by column."""
    if "texts" in batch:
        batch["texts"] = [
            {column: text for name, columns in become.items() for column, text in zip_longest(columns, lists[name])}
            for lists in batch["texts"]
        ]
    return batch
