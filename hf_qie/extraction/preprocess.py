"""One row made ready for the models: pictures read and resized, captions tokenized, lengths checked.

Needs no model, so threads do it ahead of the device.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any

from datasets import Features
from PIL import Image

from hf_qie.config.recipe import Columns, Extract, Task
from hf_qie.data.fetch import BadUrl, fetch, is_url
from hf_qie.data.images import BadImage, area_size, read_image, resize
from hf_qie.data.samples import BadRow, Rows, has_inverse, images_of, refuse_bad
from hf_qie.data.schema import INVERSE, SOURCES, TARGET, Column, columns_of, set_features
from hf_qie.models.base import Family
from hf_qie.models.qwen_image.prompts import BadPrompt, Prompt, make_prompt
from hf_qie.models.qwen_image.vae import MAX_POSITIONS, Grid, grid_of
from hf_qie.runtime.alive import at_any_length

MAX_TEXT_TO_IMAGE_TOKENS = 1024  # QwenImagePipeline cuts there

File = tuple[str, str]  # folder that relative paths start from, and path, URL or name of a picture as given
Picture = tuple[File, tuple[int, int]]  # and (width, height) that the VAE sees


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that decides what the rows of a task become."""

    task: Task
    family: Family
    extract: Extract
    rows: Rows
    source_area_px: int

    @property
    def target_area_px(self) -> int:
        """Area of a target, by `image_sample_size`."""
        return self.extract.image_sample_size**2

    @property
    def inverse_captions(self) -> tuple[str, ...]:
        """Inverse captions that become columns of the set: those of the recipe, if any row has an inverse."""
        return self.task.columns.inverse_captions if self.extract.inverse and self.rows.has_inverse else ()

    @property
    def inverse_latents(self) -> bool:
        """True where an inverse needs latents of its own, as sources and targets differ in area."""
        return self.source_area_px != self.target_area_px

    def stored(self, kind: str, prefix: str) -> list[Column]:
        """The columns of a kind that the set stores of a direction, by the prefix of its columns."""
        return [one for one in columns_of(kind) if one.is_stored(prefix, other_area=self.inverse_latents)]

    def features(self, width: int) -> Features:
        """Columns of the set for an encoder of that `width`."""
        return set_features(
            width=width,
            captions=self.task.columns.captions,
            inverse_captions=self.inverse_captions,
            inverse_latents=self.inverse_latents,
        )


@dataclass(frozen=True, kw_only=True)
class Direction:
    """One way to go through a row: forward, or from target to source."""

    prefix: str  # of its columns
    captions: tuple[str, ...]  # caption columns that the row has
    prompt: Prompt
    images: dict[str, list[Picture]]  # by image column

    @property
    def sources(self) -> list[Picture]:
        """The sources, in order."""
        return self.images[SOURCES]

    @property
    def num_states(self) -> dict[str, int]:
        """States of pictures and text together, by caption, "drop" among them."""
        shared = len(self.prompt.shared) - self.prompt.drop
        captions = (*self.captions, "drop")
        return {caption: shared + len(branch) for caption, branch in zip(captions, self.prompt.branches, strict=True)}


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A row whose pictures are read."""

    columns: dict[str, Any]  # of the set, as far as they need no model
    directions: list[Direction]
    resized: dict[Picture, Image.Image]  # what the VAE sees; none without `extract.latents`


class Pictures:
    """The pictures of some rows: each is read once, however many rows use it, and let go after the last of them."""

    def __init__(self, rows: Iterable[Mapping[str, Any]], plan: Plan):
        self.plan = plan
        self.rows_left = Counter(file for row in rows for file in set(files_of(row)))
        self.shared = {file for file, count in self.rows_left.items() if count > 1}
        self.images: dict[File, Future[Image.Image]] = {}
        self.lock = Lock()

    def read(self, file: File) -> Image.Image:
        """The image in `file`, until the last row that uses it is done; raises BadImage or BadUrl. Thread-safe."""
        with self.lock:
            image = self.images.get(file)
            if first := image is None:
                image = self.images[file] = Future()
        if first:
            try:
                image.set_result(read_file(file, plan=self.plan))
            except BaseException as error:
                image.set_exception(error)
        return image.result()

    def let_go(self, row: Mapping[str, Any]) -> None:
        """A row is done with its images, those too that it did not come to as one before them is bad."""
        with self.lock:
            for file in set(files_of(row)):
                self.rows_left[file] -= 1
                if self.rows_left[file] == 0:
                    self.images.pop(file, None)


def files_of(row: Mapping[str, Any]) -> list[File]:
    """The pictures of a row, in the order of the columns."""
    return [file for files in image_files(row).values() for file in files]


def image_files(row: Mapping[str, Any]) -> dict[str, list[File]]:
    """The pictures of a row by image column."""
    return {image.name: [(row["root"], path) for path in image.paths(row)] for image in columns_of("image")}


def prepare(row: Mapping[str, Any], pictures: Pictures, *, plan: Plan, processor: Any) -> Prepared:
    """Read, resize and tokenize one row; raises BadRow."""
    refuse_bad(row)
    names = plan.task.columns
    images = read_pictures(row, pictures, names)
    columns, directions, resized = words_of(row, names), [], {}
    for prefix, files, captions in ways(row, plan):
        texts = {caption: row["texts"][caption] for caption in captions if row["texts"][caption]}
        prompt = prompt_of(texts, [images[file] for file in files[SOURCES]], plan, processor)
        sized = sizes_of(files, images, plan)
        direction = Direction(prefix=prefix, captions=tuple(texts), prompt=prompt, images=sized)
        check_length(direction.num_states, grids_of(sized))
        directions.append(direction)
        columns |= shape_columns(prefix, sized, images, plan)
        if plan.extract.latents:
            encoded = {column.of for column in plan.stored("latents", prefix)}
            shown = [picture for name, some in sized.items() if name in encoded for picture in some]
            resized |= {(file, size): resize(images[file], size) for file, size in shown}
    return Prepared(columns=columns, directions=directions, resized=resized)


def ways(row: Mapping[str, Any], plan: Plan) -> list[tuple[str, dict[str, list[File]], tuple[str, ...]]]:
    """Prefix of columns, images by column, and caption columns of each direction in which a row goes."""
    files = image_files(row)
    found = [("", files, plan.task.columns.captions)]
    if plan.extract.inverse and has_inverse(row, plan.task):
        swapped = files | {SOURCES: files[TARGET], TARGET: files[SOURCES]}
        found.append((INVERSE, swapped, plan.task.columns.inverse_captions))
    return found


def sizes_of(
    files: Mapping[str, list[File]], images: Mapping[File, Image.Image], plan: Plan
) -> dict[str, list[Picture]]:
    """The pictures of a direction with the sizes that the VAE sees: all but sources have the target's."""
    target = area_size(images[files[TARGET][0]].size, plan.target_area_px)
    sizes = {name: [(file, target) for file in some] for name, some in files.items()}
    return sizes | {SOURCES: [(file, area_size(images[file].size, plan.source_area_px)) for file in files[SOURCES]]}


def grids_of(sized: Mapping[str, list[Picture]]) -> dict[str, list[Grid]]:
    """Packed grids of pictures, by image column."""
    return {name: [grid_of(size) for _, size in some] for name, some in sized.items()}


def shape_columns(
    prefix: str, sized: Mapping[str, list[Picture]], images: Mapping[File, Image.Image], plan: Plan
) -> dict[str, Any]:
    """The columns of a direction that need its pictures, but no model."""
    grids = grids_of(sized)
    columns = {
        prefix + column.name: grids[column.of] if column.many else grids[column.of][0]
        for column in plan.stored("grid", prefix)
    }
    for column in plan.stored("values", prefix):
        shown = [images[file] for file, _ in sized[column.of]]
        columns[prefix + column.name] = column.compute(shown, grids[TARGET][0])
    return columns


def words_of(row: Mapping[str, Any], names: Columns) -> dict[str, Any]:
    """The columns of a set that need neither picture nor model."""
    columns = {"row": row["row"], "num_sources": len(row["sources"])}
    columns |= {image.name: row[image.row_key] for image in columns_of("image")}
    return columns | {caption: row["texts"][caption] for caption in names.captions}


def read_pictures(row: Mapping[str, Any], pictures: Pictures, names: Columns) -> dict[File, Image.Image]:
    """The pictures of a row; raises BadRow naming the column and path of the first that cannot be used."""
    images: dict[File, Image.Image] = {}
    try:
        for column, path in images_of(row, names):
            file = (row["root"], path)
            images[file] = images.get(file) or read_picture(file, column=column, read=pictures.read)
    finally:
        pictures.let_go(row)
    return images


def read_picture(file: File, *, column: str, read: Callable[[File], Image.Image]) -> Image.Image:
    """What `read` gives of a picture; raises BadRow naming its column and path."""
    try:
        return read(file)
    except (BadImage, BadUrl) as error:
        raise BadRow(str(error), column=column, path=file[1]) from error


def read_file(file: File, *, plan: Plan) -> Image.Image:
    """One picture; raises BadImage or BadUrl."""
    return read_image(open_picture(file, plan=plan))


def open_picture(file: File, *, plan: Plan) -> Path | BytesIO:
    """The file of a picture, or its bytes where it comes by a URL or lies in the data itself; raises BadUrl."""
    root, path = file
    if is_url(path):
        with at_any_length("the fetch of a picture"):
            return BytesIO(fetch(path, allow_private=plan.extract.allow_private_urls))
    stored = plan.rows.stored and plan.rows.stored.read(path)
    return Path(root, path) if stored is None else BytesIO(stored)


def prompt_of(texts: Mapping[str, str], sources: Sequence[Image.Image], plan: Plan, processor: Any) -> Prompt:
    """The prompt for `texts`, by caption column, over `sources`; the drop caption comes last."""
    template = plan.family.template(len(sources))
    seen = [resize(image, area_size(image.size, plan.family.vlm_area_px)) for image in sources]
    texts = {**texts, "drop": plan.extract.drop_caption}
    try:
        return make_prompt(processor, template, seen, list(texts.values()))
    except BadPrompt as error:
        raise BadRow(str(error), column=list(texts)[error.place]) from error


def check_length(num_states: Mapping[str, int], grids: Mapping[str, Sequence[Grid]]) -> None:
    """Raise BadRow where the states of a caption are more than the transformer can place; nothing is ever cut.

    `num_states`: by caption, those of pictures and text together. `grids`: by image column.
    """
    sides = [side for name in (SOURCES, TARGET) for grid in grids[name] for side in grid]
    most = MAX_POSITIONS - max(sides) // 2 if grids[SOURCES] else MAX_TEXT_TO_IMAGE_TOKENS
    for caption, number in num_states.items():
        if number > most:
            raise BadRow(f"{number} tokens of pictures and text, at most {most} can be placed", column=caption)
