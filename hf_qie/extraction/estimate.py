"""What a row becomes, told from picture headers and captions alone: sizes, tokens, grids and bytes.

No pixel is decoded and no model is there, so it is known before anything takes time.
"""

import functools
import hashlib
import shutil
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import Qwen2_5_VLConfig

from hf_qie.data.fetch import BadUrl, is_url
from hf_qie.data.images import BadImage, area_size, header_size
from hf_qie.data.provenance import PROVENANCE
from hf_qie.data.samples import BadRow, has_inverse, images_of, refuse_bad
from hf_qie.data.schema import INVERSE, LATENT_CHANNELS, SOURCES, TARGET, columns_of, matrix_width
from hf_qie.errors import InputError
from hf_qie.extraction.preprocess import Plan, check_length, files_of, open_picture
from hf_qie.models.qwen_image.prompts import IMAGE_TOKEN, VIDEO_TOKEN
from hf_qie.models.qwen_image.vae import Grid, grid_of

SAMPLE_ROWS = 512  # whose headers tell the size of a set: a second on a disk, a few over a network
FLOAT16_BYTES = 2
ROW_BYTES = 128  # of a row beside states, latents and strings: numbers, grids, offsets

Size = tuple[int, int]  # (width, height) in pixels
Row = Mapping[str, Any]  # of `Rows.table`


@dataclass(frozen=True, kw_only=True)
class Header:
    """A picture as far as it is known without decoding."""

    size: Size  # as read: upright, before any resize
    file: Path | None  # None: it came by a URL or lies in the data itself
    content: str  # tells it from others: the file's path, or a digest of its bytes


@dataclass(frozen=True, kw_only=True)
class Way:
    """A row in one direction, forward or inverse."""

    grids: dict[str, tuple[Grid, ...]]  # by image column
    num_image_states: int
    num_text_states: dict[str, int]  # by caption column that the row has, and "drop"

    @property
    def num_states(self) -> dict[str, int]:
        """States of pictures and text together, by caption."""
        return {caption: self.num_image_states + number for caption, number in self.num_text_states.items()}

    @property
    def num_stored(self) -> int:
        """Vectors that the set stores of the encoder."""
        return self.num_image_states + sum(self.num_text_states.values())

    @property
    def target_grid(self) -> Grid:
        """Of the target."""
        return self.grids[TARGET][0]

    def num_vectors(self, image: str) -> int:
        """Vectors that the VAE makes of the pictures of a column."""
        return sum(height * width for height, width in self.grids[image])


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What one row becomes."""

    sources: list[Header]
    target: Header
    num_tokens: dict[str, int]  # of each caption that the row has, alone
    forward: Way
    inverse: Way | None
    num_bytes: int  # in the set


class Estimator:
    """Turns rows of a plan into outlooks, a batch at a time; `width` is the encoder's.

    Without `fetch` a picture behind a URL counts as a square: its shape hardly moves the size of a set.
    """

    def __init__(self, plan: Plan, processor: Any, *, width: int, fetch: bool):
        self.plan, self.processor, self.width, self.fetch = plan, processor, width, fetch
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.count = functools.cache(lambda text: len(self.tokenizer(text)["input_ids"]))

    def __call__(self, rows: Sequence[Row]) -> list[Outlook | BadRow]:
        """The outlook of each row, or why extraction will list it as bad."""
        pictures = {file for row in rows if not row["bad"] for file in files_of(row)}
        with ThreadPoolExecutor(self.plan.extract.num_workers, "headers") as readers:
            headers = dict(zip(pictures, readers.map(self.read_header, pictures), strict=True))
        tokens = self.caption_tokens(rows)
        outlooks: list[Outlook | BadRow] = []
        for row in rows:
            try:
                outlooks.append(self.look(row, headers, tokens))
            except BadRow as error:
                outlooks.append(error)
        return outlooks

    def read_header(self, picture: tuple[str, str]) -> Header | BadImage | BadUrl:
        """The header of the picture at (root, path), or why there is none. Runs in many threads."""
        if is_url(picture[1]) and not self.fetch:
            return Header(size=(1, 1), file=None, content=picture[1])
        try:
            file = open_picture(picture, plan=self.plan)
            size = header_size(file)
        except (BadImage, BadUrl) as error:
            return error
        if isinstance(file, Path):
            return Header(size=size, file=file, content=str(file))
        return Header(size=size, file=None, content=hashlib.sha256(file.getbuffer()).hexdigest())

    def caption_tokens(self, rows: Sequence[Row]) -> dict[str, int]:
        """Tokens of all captions of `rows`, by `lead` and caption; the tokenizer is called once."""
        texts = set()
        for row in rows:
            captions = [self.plan.extract.drop_caption, *filter(None, row["texts"].values())]
            texts |= {self.lead(len(row["sources"])) + caption for caption in captions}
        return dict(zip(texts, map(len, self.tokenizer(list(texts))["input_ids"]), strict=True))

    def lead(self, num_sources: int) -> str:
        """The text between the last special token and the caption: no token reaches over a special one."""
        return self.plan.family.template(num_sources).shared(num_sources).rpartition("|>")[2]

    def look(self, row: Row, headers: Mapping[Any, Header | Exception], tokens: Mapping[str, int]) -> Outlook:
        """The outlook of one row, in the steps of `prepare`; raises BadRow."""
        refuse_bad(row)
        plan, columns = self.plan, self.plan.task.columns
        for column, path in images_of(row, columns):
            if isinstance(error := headers[row["root"], path], Exception):
                raise BadRow(str(error), column=column, path=path)
        sources, target = [headers[row["root"], path] for path in row["sources"]], headers[row["root"], row["target"]]
        captions = {name: row["texts"][name] for name in columns.captions if row["texts"][name]}
        sizes = [source.size for source in sources]
        forward, inverse = self.way(sizes, target.size, captions, tokens), None
        if plan.extract.inverse and has_inverse(row, plan.task):
            undo = {name: row["texts"][name] for name in columns.inverse_captions if row["texts"][name]}
            inverse = self.way([target.size], sizes[0], undo, tokens)
            captions |= undo
        texts = [path for _, path in images_of(row, columns)]
        texts += [row["texts"][name] or "" for name in columns.captions]
        vectors_bytes = self.vectors_bytes(forward, "") + (self.vectors_bytes(inverse, INVERSE) if inverse else 0)
        lead = self.lead(len(sources))
        return Outlook(
            sources=sources,
            target=target,
            num_tokens={name: tokens[lead + text] - self.count(lead) for name, text in captions.items()},
            forward=forward,
            inverse=inverse,
            num_bytes=vectors_bytes + sum(len(text.encode()) for text in texts) + ROW_BYTES,
        )

    def vectors_bytes(self, way: Way, prefix: str) -> int:
        """What the set stores of a direction as vectors; `values` are taken for one a token of the target."""
        numbers = way.num_stored * self.width
        if self.plan.extract.latents:
            latents = self.plan.stored("latents", prefix)
            numbers += LATENT_CHANNELS * sum(way.num_vectors(column.of) for column in latents)
        values = self.plan.stored("values", prefix)
        numbers += way.num_vectors(TARGET) * sum(matrix_width(column.type) or 0 for column in values)
        return FLOAT16_BYTES * numbers

    def way(self, sources: list[Size], target: Size, captions: Mapping[str, str], tokens: Mapping[str, int]) -> Way:
        """One direction of a row; raises BadRow for a caption that extraction refuses."""
        plan, template = self.plan, self.plan.family.template(len(sources))
        texts = {**captions, "drop": plan.extract.drop_caption}
        for name, text in texts.items():
            if found := [token for token in (IMAGE_TOKEN, VIDEO_TOKEN) if token in text]:
                raise BadRow(f"the caption holds {found[0]}, which stands for a picture", column=name)
        lead, after = self.lead(len(sources)), self.count(template.after)
        seen = [area_size(size, plan.family.vlm_area_px) for size in sources]
        # each picture's own token is counted in the template
        shared = self.count(template.shared(len(sources))) + sum(self.picture_tokens(size) - 1 for size in seen)
        grids = {image.name: (grid_of(area_size(target, plan.target_area_px)),) for image in columns_of("image")}
        grids[SOURCES] = tuple(grid_of(area_size(size, plan.source_area_px)) for size in sources)
        way = Way(
            grids=grids,
            num_image_states=shared - template.drop if sources else 0,
            num_text_states={name: tokens[lead + text] - self.count(lead) + after for name, text in texts.items()},
        )
        check_length(way.num_states, way.grids)
        return way

    def picture_tokens(self, size: Size) -> int:
        """Tokens of a picture that the encoder sees at `size`."""
        images = self.processor.image_processor
        return images.get_number_of_image_patches(size[1], size[0]) // images.merge_size**2


def encoder_width(model: str, *, revision: str | None) -> int:
    """Width of the prompt encoder's states, by its config."""
    config = Qwen2_5_VLConfig.from_pretrained(model, subfolder="text_encoder", revision=revision)
    return config.text_config.hidden_size


def estimate_bytes(plan: Plan, processor: Any, *, width: int) -> int:
    """Bytes that the set of `plan` will take, from rows spread evenly over its data."""
    table = plan.rows.table
    sample = np.linspace(0, len(table) - 1, min(SAMPLE_ROWS, len(table))).round().astype(int)
    outlooks = Estimator(plan, processor, width=width, fetch=False)([table[int(row)] for row in sample])
    return round(len(table) * np.mean([look.num_bytes if isinstance(look, Outlook) else 0 for look in outlooks]))


def check_space(num_bytes: Mapping[str, int], output_dir: Path, *, remade: Collection[str] = ()) -> str:
    """What is still to be written under `output_dir`, and what is free, in words; `num_bytes`: each task's whole set.

    Of tasks that are `remade`, what is there stays until they are whole again.
    Raises InputError where it does not fit. What is there already is kept, or deleted to make room for as much.
    """
    wanted = 0
    for name, size in num_bytes.items():
        if name in remade:
            wanted += size
        elif not (output_dir / name / PROVENANCE).exists():
            wanted += max(0, size - sum(chunk.stat().st_size for chunk in (output_dir / name).glob("*.arrow")))
    folder = next(folder for folder in (output_dir, *output_dir.absolute().parents) if folder.exists())
    free = shutil.disk_usage(folder).free
    words = f"{output_dir}: about {wanted:,} bytes to write ({rounded(wanted)}), {free:,} free ({rounded(free)})"
    if wanted > free:
        raise InputError(f"extract.output_dir: {words}; make room, or name a folder on a larger disk")
    return words


def rounded(num_bytes: int) -> str:
    """Bytes as GB, or as MB where GB would round to nothing."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"
