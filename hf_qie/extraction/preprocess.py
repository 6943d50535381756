"""One row made ready for the models: images read and resized, captions tokenized, lengths checked.

Needs no model, so that threads do it ahead of the device.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from PIL import Image

from hf_qie.data.fetch import BadUrl
from hf_qie.data.images import BadImage
from hf_qie.data.samples import BadRow, images_of, refuse_bad
from hf_qie.data.schema import SOURCES, columns_of
from hf_qie.extraction.plan import File, Plan, SizedFile, files_of
from hf_qie.models.prompts import BadPrompt, Prompt


@dataclass(frozen=True, kw_only=True)
class Direction:
    """One way to go through a row: forward, or from target to source."""

    prefix: str  # of its columns
    captions: tuple[str, ...]  # caption columns that the row has
    prompt: Prompt  # of these captions, and of the drop caption last
    images: dict[str, list[SizedFile]]  # by image column
    columns: dict[str, Any] = field(default_factory=dict)  # those of its row


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A row whose images are read."""

    columns: dict[str, Any]  # of the set, first those that need no model
    directions: list[Direction]
    resized: dict[SizedFile, Image.Image]  # what the VAE sees; none without `extract.latents`
    is_reused: bool = False  # from a previous set, with all columns


class ImageCache:
    """The images of some rows: each is read once, however many rows use it, and freed after the last of them."""

    def __init__(self, rows: Iterable[Mapping[str, Any]], plan: Plan):
        self.plan = plan
        self.rows_left = Counter(file for row in rows for file in set(files_of(row)))
        self.shared = {file for file, count in self.rows_left.items() if count > 1}
        self.images: dict[File, Future[Image.Image]] = {}
        self.lock = Lock()

    def read(self, row: Mapping[str, Any]) -> dict[File, Image.Image]:
        """The images of a row, once a row; raises BadRow for the first that cannot be used. Thread-safe."""
        try:
            images = {}
            for column, path in images_of(row, self.plan.task.columns):
                try:
                    images[row["root"], path] = self._read((row["root"], path))
                except (BadImage, BadUrl) as error:
                    raise BadRow(str(error), column=column, path=path) from error
            return images
        finally:
            with self.lock:  # images behind a bad one are freed too
                for file in set(files_of(row)):
                    self.rows_left[file] -= 1
                    if self.rows_left[file] == 0:
                        self.images.pop(file, None)

    def _read(self, file: File) -> Image.Image:
        with self.lock:
            if is_first := file not in self.images:
                self.images[file] = Future()
            image = self.images[file]
        if is_first:
            try:
                image.set_result(self.plan.read(file))
            except BaseException as error:
                image.set_exception(error)
        return image.result()


def prepare(row: Mapping[str, Any], cache: ImageCache, *, plan: Plan, processor: Any) -> Prepared:
    """Read, resize and tokenize one row; raises BadRow."""
    refuse_bad(row)
    images = cache.read(row)
    columns, directions, resized = plain_columns(row, plan), [], {}
    for prefix, files, texts in plan.ways(row):
        try:
            sources = [images[file] for file in files[SOURCES]]
            prompt = plan.family.make_prompt(processor, sources, list(texts.values()))
        except BadPrompt as error:
            raise BadRow(str(error), column=list(texts)[error.place]) from error
        sized = plan.sizes(files, images)
        plan.check_length(dict(zip(texts, prompt.num_embeddings, strict=True)), plan.grids(sized))
        captions = tuple(texts)[:-1]  # without the drop caption
        directions.append(Direction(prefix=prefix, captions=captions, prompt=prompt, images=sized, columns=columns))
        columns |= plan.shape_columns(prefix, sized, images)
        encoded = {column.of for column in plan.stored("latents", prefix)}
        for file, size in (one for name, some in sized.items() if name in encoded for one in some):
            resized[file, size] = plan.family.resize(images[file], size)
    return Prepared(columns=columns, directions=directions, resized=resized)


def plain_columns(row: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """The columns of a set that need neither image nor model."""
    columns = {"row": row["row"], "num_sources": len(row["sources"])}
    columns |= {image.name: row[image.row_key] for image in columns_of("image")}
    return columns | {caption: row["texts"][caption] for caption in plan.task.columns.captions}
