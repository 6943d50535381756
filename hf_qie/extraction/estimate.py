"""What rows become, from image headers and captions alone: sizes, tokens, latent grids and bytes.

No pixel is decoded and no model is loaded, so that it is known before anything takes time.
"""

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hf_qie.data.fetch import BadUrl, is_url
from hf_qie.data.images import BadImage, header_size
from hf_qie.data.provenance import PROVENANCE
from hf_qie.data.samples import BadRow, images_of
from hf_qie.data.schema import SOURCES, TARGET, TEXT_EMBEDS, columns_of, matrix_width, shared_embeds
from hf_qie.errors import InputError
from hf_qie.extraction.plan import File, Plan, files_of, image_files
from hf_qie.extraction.reuse import is_remade
from hf_qie.models.prompts import BadPrompt, PromptLengths

SAMPLE_ROWS = 512  # whose headers tell the size of a set: a second on a disk, a few over a network
ROW_BYTES = 128  # of a row beside embeddings, latents and strings: numbers, grids, offsets

Row = Mapping[str, Any]  # of `Rows.table`


@dataclass(frozen=True, kw_only=True)
class Header:
    """An image as far as it is known without decoding."""

    size: tuple[int, int]  # (width, height) in pixels as read: upright, before any resize
    content: Path | str  # tells it from others: its file, or a digest of bytes from a URL or from the data itself


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What one row becomes."""

    headers: dict[str, list[Header]]  # by image column
    num_tokens: dict[str, int]  # of each caption that the row has, alone
    num_embeds: dict[str, int]  # by column of the set
    grids: dict[str, Any]  # the same
    num_bytes: int  # in the set
    num_encoded: int  # tokens that the prompt encoder runs, in the direction with more
    num_image_tokens: int  # of them those of images, in the direction with more


def outlooks(rows: Sequence[Row], plan: Plan, processor: Any, *, fetch: bool = True) -> list[Outlook | BadRow]:
    """What each row becomes, or why extraction will list it as bad.

    Without `fetch` an image behind a URL counts as a square: its shape hardly moves the size of a set.
    """
    files = {file for row in rows if not row["bad"] for file in files_of(row)}
    with ThreadPoolExecutor(plan.extract.num_workers, "headers") as readers:
        headers = dict(zip(files, readers.map(partial(_header, plan=plan, fetch=fetch), files), strict=True))
    bad = [_bad(row, headers, plan) for row in rows]
    good = [row for row, reason in zip(rows, bad, strict=True) if not reason]
    prompts = [
        ([headers[file].size for file in images[SOURCES]], list(texts.values()))
        for row in good
        for _, images, texts in plan.ways(row)
    ]
    lengths = iter(plan.family.prompt_lengths(processor, prompts))
    return [reason or _outlook(row, headers, plan, lengths) for row, reason in zip(rows, bad, strict=True)]


def _header(file: File, *, plan: Plan, fetch: bool) -> Header | BadImage | BadUrl:
    """The header of an image, or why there is none. Runs in many threads."""
    if is_url(file[1]) and not fetch:
        return Header(size=(1, 1), content=file[1])
    try:
        opened = plan.open(file)
        size = header_size(opened)
    except (BadImage, BadUrl) as error:
        return error
    is_file = isinstance(opened, Path)
    return Header(size=size, content=opened if is_file else hashlib.sha256(opened.getbuffer()).hexdigest())


def _bad(row: Row, headers: Mapping[File, Header | Exception], plan: Plan) -> BadRow | None:
    """Why a row is bad, as far as its values and headers say."""
    if row["bad"]:
        return BadRow(**row["bad"])
    for column, path in images_of(row, plan.task.columns):
        if isinstance(error := headers[row["root"], path], Exception):
            return BadRow(str(error), column=column, path=path)
    return None


def _outlook(
    row: Row, headers: Mapping[File, Header], plan: Plan, lengths: Iterator[PromptLengths | BadPrompt]
) -> Outlook | BadRow:
    """What a row becomes, in the steps of `prepare`; takes the lengths of its prompts from `lengths`."""
    num_tokens, num_embeds, grid_columns, num_latents, ways = {}, {}, {}, 0, []
    for (prefix, images, captions), length in [(way, next(lengths)) for way in plan.ways(row)]:
        if isinstance(length, BadPrompt):
            return BadRow(str(length), column=list(captions)[length.place])
        ways.append(length)
        num_tokens |= dict(zip(captions, length.captions, strict=True))
        grids = plan.grids(plan.sizes(images, headers))
        try:
            plan.check_length({name: length.shared + num_tokens[name] + length.suffix for name in captions}, grids)
        except BadRow as error:
            return error
        num_embeds[prefix + shared_embeds(plan.family.prompt_columns)] = length.shared
        num_embeds |= {f"{prefix}{TEXT_EMBEDS}{name}": num_tokens[name] + length.suffix for name in captions}
        for column in columns_of("grid"):
            grid_columns[prefix + column.name] = grids[column.of] if column.many else grids[column.of][0]
        areas = {name: sum(height * width for height, width in some) for name, some in grids.items()}
        num_latents += plan.family.latent_width * sum(areas[one.of] for one in plan.stored("latents", prefix))
        # values are taken for one vector a token of the target
        num_latents += sum(areas[TARGET] * (matrix_width(one.type) or 0) for one in plan.stored("values", prefix))
    del num_tokens["drop"]
    texts = [path for _, path in images_of(row, plan.task.columns)]
    texts += [row["texts"][name] or "" for name in plan.task.columns.captions]
    return Outlook(
        headers={name: [headers[file] for file in some] for name, some in image_files(row).items()},
        num_tokens=num_tokens,
        num_embeds=num_embeds,
        grids=grid_columns,
        num_encoded=max(length.encoded for length in ways),
        num_image_tokens=max(length.num_image_tokens for length in ways),
        num_bytes=ROW_BYTES + len("".join(texts).encode()) + 2 * (plan.width * sum(num_embeds.values()) + num_latents),
    )


def sample(plan: Plan, processor: Any) -> list[tuple[Row, Outlook | BadRow]]:
    """Rows spread evenly over the data, and what each becomes."""
    table = plan.rows.table
    numbers = np.linspace(0, len(table) - 1, min(SAMPLE_ROWS, len(table))).round().astype(int)
    rows = [table[int(number)] for number in numbers]
    return list(zip(rows, outlooks(rows, plan, processor, fetch=False), strict=True))


def estimate_bytes(plan: Plan, processor: Any) -> int:
    """Bytes that the set of `plan` will take, by a sample of its rows."""
    looks = [look for _, look in sample(plan, processor)]
    mean = np.mean([look.num_bytes if isinstance(look, Outlook) else 0 for look in looks])
    return round(len(plan.rows.table) * mean)


def check_space(num_bytes: Mapping[str, int], plans: Mapping[str, Plan]) -> str:
    """What is still to be written for sets of `num_bytes`, by task, and what is free.

    What is there already is kept, or deleted to make room for as much; but a set whose data changed stays until it is
    complete again. Raises InputError where it does not fit.
    """
    wanted, output_dir = 0, next(iter(plans.values())).folder.parent
    for name, plan in plans.items():
        if is_remade(plan):
            wanted += num_bytes[name]
        elif not (plan.folder / PROVENANCE).exists():
            wanted += max(0, num_bytes[name] - sum(chunk.stat().st_size for chunk in plan.folder.glob("*.arrow")))
    folder = next(folder for folder in (output_dir, *output_dir.absolute().parents) if folder.exists())
    free = shutil.disk_usage(folder).free
    words = f"{output_dir}: about {wanted:,} bytes to write ({wanted / 1e9:,.2f} GB)"
    words += f", {free:,} free ({free / 1e9:,.2f} GB)"
    if wanted > free:
        raise InputError(f"extract.output_dir: {words}; make room, or name a folder on a larger disk")
    return words
