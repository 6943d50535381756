"""The extraction plan of a task: its rows, and all that decides what they become."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

from datasets import Features
from PIL import Image

from hf_qie.config.recipe import Extract, Recipe, Task
from hf_qie.data.fetch import fetch, is_url
from hf_qie.data.images import read_image
from hf_qie.data.provenance import check_transformer
from hf_qie.data.samples import BadRow, Rows, has_inverse, read_rows
from hf_qie.data.schema import INVERSE, SOURCES, TARGET, Column, columns_of, set_features
from hf_qie.errors import InputError
from hf_qie.models.base import Family, Grid, Size, read_family

File = tuple[str, str]  # folder that relative paths start from, and path, URL or name of an image as given
SizedFile = tuple[File, Size]  # and the size that the VAE sees


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that decides what the rows of a task become."""

    recipe: Recipe
    task: Task  # as in the recipe, with a caption column for each caption of a list
    family: Family
    rows: Rows

    @property
    def extract(self) -> Extract:
        """The section of the recipe."""
        return self.recipe.extract

    @property
    def folder(self) -> Path:
        """Where the set of the task lies."""
        return Path(self.extract.output_dir, self.task.name)

    def changed(self, **settings: Any) -> "Plan":
        """The plan with other values of keys of `extract`."""
        extract = self.extract.model_copy(update=settings)
        return replace(self, recipe=self.recipe.model_copy(update={"extract": extract}))

    @property
    def target_area_px(self) -> int:
        """Area of a target, by `image_sample_size`."""
        return self.extract.image_sample_size**2

    @property
    def source_area_px(self) -> int:
        """Area of a source, by `source_sample_size`."""
        return self.family.vae_area_px

    @property
    def inverse_latents(self) -> bool:
        """True where an inverse needs latents of its own, as sources and targets differ in area."""
        return self.source_area_px != self.target_area_px

    def stored(self, kind: str, prefix: str) -> list[Column]:
        """The columns of a kind that are computed of a direction, by the prefix of its columns."""
        if kind == "latents" and not self.extract.latents:
            return []
        return [one for one in columns_of(kind) if one.is_stored(prefix, other_area=self.inverse_latents)]

    @cached_property
    def width(self) -> int:
        """D of the prompt encoder."""
        return self.family.encoder_width(self.recipe.model, revision=self.recipe.revision)

    @cached_property
    def features(self) -> Features:
        """Columns of the set; those of inverse captions only if any row has an inverse."""
        has_inverse = self.extract.inverse and self.rows.has_inverse
        return set_features(
            width=self.width,
            latent_width=self.family.latent_width,
            captions=self.task.columns.captions,
            inverse_captions=self.task.columns.inverse_captions if has_inverse else (),
            inverse_latents=self.inverse_latents,
            prompt_columns=self.family.prompt_columns,
        )

    def ways(self, row: Mapping[str, Any]) -> list[tuple[str, dict[str, list[File]], dict[str, str]]]:
        """Prefix of columns, images and captions by column of each direction in which a row goes.

        Of captions those that the row has, and the drop caption last, as `drop`.
        """
        files, names = image_files(row), self.task.columns
        found = [("", files, names.captions)]
        if self.extract.inverse and has_inverse(row, self.task):
            found.append((INVERSE, files | {SOURCES: files[TARGET], TARGET: files[SOURCES]}, names.inverse_captions))
        texts, drop = row["texts"], {"drop": self.extract.drop_caption}
        return [(*way, {name: texts[name] for name in captions if texts[name]} | drop) for *way, captions in found]

    def sizes(self, files: Mapping[str, list[File]], images: Mapping[File, Any]) -> dict[str, list[SizedFile]]:
        """The images of a direction with the sizes that the VAE sees: all but sources have the target's."""
        target = self.family.fit(images[files[TARGET][0]].size, self.target_area_px)
        sized = {name: [(file, target) for file in some] for name, some in files.items()}
        area = self.source_area_px
        return sized | {SOURCES: [(file, self.family.fit(images[file].size, area)) for file in files[SOURCES]]}

    def grids(self, sized: Mapping[str, list[SizedFile]]) -> dict[str, list[Grid]]:
        """Latent grids of the images of a direction, by image column."""
        return {name: [self.family.grid_of(size) for _, size in some] for name, some in sized.items()}

    def check_length(self, num_embeds: Mapping[str, int], grids: Mapping[str, Sequence[Grid]]) -> None:
        """Raise BadRow where the embeddings of a caption, by column, images included, are more than can be placed."""
        most = self.family.most_tokens(grids[SOURCES], grids[TARGET][0])
        for caption, number in num_embeds.items():
            if number > most:
                raise BadRow(f"{number} tokens of images and text, at most {most} can be placed", column=caption)

    def shape_columns(
        self, prefix: str, sized: Mapping[str, list[SizedFile]], images: Mapping[File, Image.Image]
    ) -> dict[str, Any]:
        """The columns of a direction that need its images, but no model."""
        grids, columns = self.grids(sized), {}
        for column in self.stored("grid", prefix):
            columns[prefix + column.name] = grids[column.of] if column.many else grids[column.of][0]
        for column in self.stored("values", prefix):
            shown = [images[file] for file, _ in sized[column.of]]
            columns[prefix + column.name] = column.compute(shown, grids[TARGET][0])
        return columns

    def open(self, file: File) -> Path | BytesIO:
        """The file of an image, or its bytes where it comes by a URL or lies in the data itself; raises BadUrl."""
        root, path = file
        if is_url(path):
            return BytesIO(fetch(path, allow_private=self.extract.allow_private_urls))
        stored = self.rows.stored and self.rows.stored.read(path)
        return Path(root, path) if stored is None else BytesIO(stored)

    def read(self, file: File) -> Image.Image:
        """An image; raises BadImage or BadUrl."""
        return read_image(self.open(file), self.family.image_mode)


def image_files(row: Mapping[str, Any]) -> dict[str, list[File]]:
    """The images of a row by image column."""
    return {image.name: [(row["root"], path) for path in image.paths(row)] for image in columns_of("image")}


def files_of(row: Mapping[str, Any]) -> list[File]:
    """The images of a row, in the order of the columns."""
    return [file for files in image_files(row).values() for file in files]


def own_tasks(recipe: Recipe) -> dict[str, Task]:
    """The tasks to extract: those without a ready set. Raises InputError if there are none."""
    tasks = {name: task for name, task in recipe.tasks.items() if task.embeddings is None}
    if not tasks:
        raise InputError(f"{recipe.path}: every task has embeddings already; there is nothing to extract")
    return tasks


def family_of_recipe(recipe: Recipe) -> Family:
    """The family of a recipe's model, with sources of the recipe's size, as plans have it; raises InputError."""
    return read_family(recipe.model, revision=recipe.revision).with_source_size(recipe.extract.source_sample_size)


def open_processor(recipe: Recipe, family: Family) -> Any:
    """The processor of a recipe's model, whose prompt encoder has the width that its transformer takes.

    Raises InputError where it has another one, or a part cannot be read.
    """
    where = {"revision": recipe.revision}
    _, wanted = check_transformer(recipe.model, **where, family=family)
    try:
        width, processor = (read(recipe.model, **where) for read in (family.encoder_width, family.load_processor))
    except InputError:
        raise
    except (OSError, ValueError, TypeError, LookupError) as error:
        found = f"cannot load the processor of {recipe.model!r}, or the config of its prompt encoder"
        raise InputError(f"model: {found}: {error}") from error
    if width != wanted:
        raise InputError(
            f"model: the prompt encoder of {recipe.model} makes embeddings of width {width}, its transformer takes "
            f"{wanted}; take both from one checkpoint"
        )
    return processor


def make_plan(recipe: Recipe, task: Task, family: Family, folder: Path, *, refuse: bool = False) -> Plan:
    """Read the data of a task, whose table goes to `folder`; with `refuse`, too many bad rows are an error.

    Raises InputError.
    """
    extract = recipe.extract if refuse else None
    rows = read_rows(task, folder=folder, max_sources=family.max_sources, extract=extract)
    return plan_of(recipe, task, family, rows)


def plan_of(recipe: Recipe, task: Task, family: Family, rows: Rows) -> Plan:
    """The plan of a task whose data is read."""
    return Plan(recipe=recipe, task=task.model_copy(update={"columns": rows.columns}), family=family, rows=rows)
