"""Rows of any data for score.py --regression: a few of them, as an embedding set of their own.

The data needs no targets. A row without one has its last source in place of it, which decides the size as in the
pipeline; a row without sources a blank image.
"""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache
from PIL import Image

from hf_qie.config.data import Columns
from hf_qie.config.recipe import Mix, Recipe, Task
from hf_qie.data.embedding_sets import open_embeddings
from hf_qie.data.fetch import BadUrl, fetch, is_url
from hf_qie.data.readers import open_data
from hf_qie.data.schema import SOURCES, TARGET
from hf_qie.data.tables import DataRow, Table
from hf_qie.errors import InputError
from hf_qie.extraction.run import TOO_MANY_BAD, extract
from hf_qie.models.base import read_family
from hf_qie.runtime.files import write_durably
from hf_qie.runtime.rules import show

logger = logging.getLogger("hf_qie.score")

AT = "evaluation.regression"  # in the recipe
TASK = "regression"  # the name of the rows as a task
ROWS, IMAGES, EMBEDDINGS = "rows.jsonl", "images", "embeddings"  # in the folder of the data
BLANK = "blank.png"
CAPTION = "instruction"
Usable = tuple[int, str, str, list[Any], Any]  # number, folder of relative paths, caption, sources, target or None


def embedded(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with `evaluation.rows` rows of `evaluation.regression` as its only task, all held out, and extracted.

    Ranks share the work of the prompt encoder, which is gone afterwards. Raises InputError where there are no rows.
    """
    state = PartialState()
    if state.is_main_process:
        gather(recipe, folder)
    captions = Columns(captions=(CAPTION,), inverse_captions=())
    task = Task(name=TASK, data=(str(folder / ROWS),), columns=captions, weight=0)
    settings = {"output_dir": str(folder / EMBEDDINGS), "latents": True, "inverse": False, "overwrite": True}
    settings |= {"push_to_hub": None, "shard": None}
    update = {"tasks": MappingProxyType({TASK: task}), "mix": Mix()}
    recipe = recipe.model_copy(update=update | {"extract": recipe.extract.model_copy(update=settings)})
    code, _ = extract(recipe)
    clear_device_cache(garbage_collection=True)
    state.wait_for_everyone()
    if code == TOO_MANY_BAD:
        raise InputError(f"{AT}: too many bad rows; see {folder / EMBEDDINGS / TASK / 'bad_rows.jsonl'}")
    num_rows = len(open_embeddings(folder / EMBEDDINGS / TASK, task=TASK)[0])
    held_out = task.model_copy(update={"eval_rows": num_rows})
    return recipe.model_copy(update={"tasks": MappingProxyType({TASK: held_out})})


def gather(recipe: Recipe, folder: Path) -> None:
    """Write `evaluation.rows` rows, evenly spaced in the data, and those images that are no files, to `folder`.

    Raises InputError where the data cannot be read, or has no row with an instruction.
    """
    data = recipe.evaluation.regression
    columns = data.columns.model_copy(update={"inverse_captions": ()})
    if not (has_target := "target" in columns.model_fields_set):
        first = columns.sources if isinstance(columns.sources, str) else columns.sources[0]
        columns = columns.model_copy(update={"target": first})  # one that there is
    given = {key: getattr(data, key) for key in ("data", "split", "image_root")}
    try:
        rows, table = open_data(Task(name=TASK, columns=columns, **given), sha256())
        rows = list(rows)
    except InputError as error:
        told = str(error).replace(f"tasks.{TASK}.", f"{AT}.")
        raise InputError(
            told if has_target else told.replace(f"{AT}.columns.target", f"{AT}.columns.sources")
        ) from None
    _check_columns(rows, columns, needs_sources=read_family(recipe.model, revision=recipe.revision).max_sources != 0)
    usable = list(_usable(rows, columns, has_target=has_target))
    if not usable:
        raise InputError(f"{AT}.columns.captions: no row has a text in {', '.join(columns.captions)}")
    if len(usable) < len(rows):
        logger.warning("%s: %d of %d rows have no instruction", AT, len(rows) - len(usable), len(rows))
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    places = np.linspace(0, len(usable) - 1, min(len(usable), recipe.evaluation.rows)).round().astype(int)
    lines = [_line(recipe, usable[place], table, folder) for place in places]
    write_durably(folder / ROWS, "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines))


def _check_columns(rows: Sequence[DataRow], columns: Columns, *, needs_sources: bool) -> None:
    """Raise InputError where no row has a column that is needed."""
    names = {name for *_, values in rows for name in values}
    sources = [columns.sources] if isinstance(columns.sources, str) else columns.sources
    needed = {"captions": columns.captions, "target": [columns.target], "sources": sources if needs_sources else ()}
    for key, wanted in needed.items():
        if wanted and names.isdisjoint(wanted) and (key != "target" or columns.target not in sources):
            there = ", ".join(sorted(names))
            without = ", or give it as null in rows that have no source" * (key == "sources")
            raise InputError(
                f"{AT}.columns.{key}: no row has {' or '.join(wanted)}; there are {there}: name the column{without}"
            )


def _usable(rows: Sequence[DataRow], columns: Columns, *, has_target: bool) -> Iterator[Usable]:
    """The rows that have a caption."""
    label = columns.sources if isinstance(columns.sources, str) else ", ".join(columns.sources)
    for number, (_, root, values) in enumerate(rows):
        captions = (values.get(name) for name in columns.captions)
        texts = [text[0] if isinstance(text, list) and text else text for text in captions]
        texts = [text for text in texts if isinstance(text, str) and text.strip()]
        if texts:
            yield number, root, texts[0], values.get(label) or [], values.get(columns.target) if has_target else None


def _line(recipe: Recipe, row: Usable, table: Table | None, folder: Path) -> dict[str, Any]:
    """A row of `ROWS`; images that are no files become some."""
    number, root, caption, sources, target = row

    def file(path: Any, name: str) -> str:
        if not isinstance(path, str):
            raise InputError(f"{AT}: row {number}: got {show(path)}, expected the path or URL of an image")
        content = table.read(path) if table else None
        if content is None and is_url(path):
            try:
                content = fetch(path, allow_private=recipe.extract.allow_private_urls)
            except BadUrl as error:
                raise InputError(f"{AT}: row {number}: {path}: {error}") from error
        if content is None:
            return os.path.abspath(os.path.join(root, path))
        return _kept(folder / IMAGES / name, content)

    sources = [file(path, f"{number}-source-{place}") for place, path in enumerate(sources, 1)]
    if target is not None:
        target = file(target, f"{number}-target")
    elif sources:
        target = sources[-1]
    else:
        side, png = recipe.extract.image_sample_size, BytesIO()
        Image.new("RGB", (side, side)).save(png, "png")
        target = _kept(folder / IMAGES / BLANK, png.getvalue())
    return {SOURCES: sources, TARGET: target, CAPTION: caption}


def _kept(path: Path, content: bytes) -> str:
    """`path`, absolute, with `content` in it; where it is there it stays, else its row would be extracted again."""
    if not path.is_file() or path.read_bytes() != content:
        path.write_bytes(content)
    return str(path.absolute())
