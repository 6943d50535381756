"""Prompt embeddings of FireRed-Image-Edit's extraction as embedding sets: it leaves one `.pt` file a text.

A row of its JSONL files has a column for each of its texts, `embeddings_tensor_en`, `_cn` and `_droptext`, and the
same with `_inv` for the inverse. Each holds the path of a tensor `[L, D]`: embeddings of images, then text, as of the
pipeline's `encode_prompt`. How they were computed is not in the files.

Letters: L tokens, D width of the encoder.
"""

import os
import pickle
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset, Features, Value
from datasets.arrow_writer import ArrowWriter
from torch import Tensor

from hf_qie.data.fetch import is_url
from hf_qie.data.provenance import FORMAT_VERSION, UNKNOWN
from hf_qie.data.readers import open_data
from hf_qie.data.samples import BadRow, images_of, refuse_bad
from hf_qie.data.schema import SOURCES, TEXT_EMBEDS
from hf_qie.errors import InputError
from hf_qie.extraction.batching import fits_float16, to_float16
from hf_qie.extraction.chunk_writer import Chunk, ChunkWriter, Models
from hf_qie.extraction.plan import Plan
from hf_qie.extraction.preprocess import ImageCache, Prepared, plain_columns
from hf_qie.extraction.run import log_set, write_set
from hf_qie.extraction.set_writer import SetWriter, request_of
from hf_qie.runtime.rules import show

TENSOR, IMAGE_EMBEDS = "embeddings_tensor_", "image_embeds"
KINDS = ("en", "cn", "droptext")
KEYS = tuple(f"{TENSOR}{kind}{way}" for way in ("", "_inv") for kind in KINDS)
# Of two passes over the same tokens in bfloat16, relative to the norm of an embedding: its steps are 2^-8 apart, and
# 28 layers add some up. Embeddings of different tokens are further apart than that by an order of magnitude.
SAME = 2.0**-6
# what torch's reader raises on files that are damaged, or hold more than tensors
UNREADABLE = (
    *(OSError, EOFError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, OverflowError),
    *(MemoryError, struct.error, pickle.UnpicklingError),
)
# of how the embeddings were computed nothing is known; latents there are none
NOT_KNOWN = ("encoder", "processor", "templates", "vlm_area_px", "resampling", "positions", "drop_caption")
RECORD = dict.fromkeys(("model", "processor", "device", "threads"), UNKNOWN)
RECORD |= {"revision": None, "converted_from": ".pt files of another trainer"}
COMPAT = {"format": FORMAT_VERSION, "vae": {}} | dict.fromkeys(NOT_KNOWN, UNKNOWN)


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """Embeddings of a task's rows in files of another trainer; `table` has for each row `where` and a path a key."""

    plan: Plan
    table: Dataset
    empty_text: Path | None  # the embeddings of the empty text without images

    def columns(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """All columns of a row but latents; raises BadRow. Runs in many threads."""
        refuse_bad(row)
        plan, files = self.plan, self.table[row["row"]]
        for column, path in images_of(row, plan.task.columns):
            if is_url(path):
                raise BadRow("a URL; training without latents reads images from files", column=column, path=path)
        images = ImageCache([row], plan).read(row)
        columns = plain_columns(row, plan)
        for prefix, shown, texts in plan.ways(row):
            way = "_inv" if prefix else ""
            if prefix and not any(files[f"{TENSOR}{kind}{way}"] for kind in KINDS):
                continue  # their --disable_inverse
            keys = {text: _key_of(text) + way for text in texts}
            has_images = bool(shown[SOURCES])
            embeds = {text: self._embeddings(key, files, has_images=has_images) for text, key in keys.items()}
            sized = plan.sizes(shown, images)
            plan.check_length({keys[text]: len(value) for text, value in embeds.items()}, plan.grids(sized))
            cut = shared_length(list(embeds.values())) if has_images else 0
            for text, value in embeds.items():
                stored = to_float16(value)
                if not fits_float16(stored):
                    reason = "values beyond float16 (65504) or not finite"
                    raise BadRow(reason, column=keys[text], path=files[keys[text]])
                columns[f"{prefix}{TEXT_EMBEDS}{text}"] = stored[cut:]
                columns.setdefault(prefix + IMAGE_EMBEDS, stored[:cut])
            columns |= plan.shape_columns(prefix, sized, images)
        return columns

    def _embeddings(self, key: str, files: Mapping[str, str | None], *, has_images: bool) -> Tensor:
        """The tensor `[L, D]` under `key` of a row; raises BadRow."""
        path = files[key]
        if path is None and not has_images and key == f"{TENSOR}droptext":  # which their --t2i_mode does not write
            if self.empty_text is None:
                raise BadRow("missing; give --empty_text the file of the empty text's embeddings", column=key)
            path = str(self.empty_text)
        if path is None:
            raise BadRow("missing, or null", column=key)
        try:
            embeds = read_embeddings(path, key)
        except ValueError as error:
            raise BadRow(str(error), column=key, path=path) from error
        if embeds.shape[1] != self.plan.width:
            reason = f"embeddings are {embeds.shape[1]} wide, those of this checkpoint {self.plan.width}"
            raise BadRow(reason, column=key, path=path)
        return embeds

    def dtype(self) -> str:
        """The dtype of the first embeddings that can be read."""
        for key in KEYS:
            for row in self.table:
                with suppress(ValueError):
                    return str(read_embeddings(row[key] or "", key).dtype).removeprefix("torch.")
        return UNKNOWN


def open_foreign(plan: Plan, folder: Path, *, empty_text: Path | None) -> Foreign:
    """The files that the data of `plan` names; the table lies memory-mapped in `folder`.

    Raises InputError where no row names one, or the caption columns do not tell which is which.
    """
    task, names, family = plan.task, plan.task.columns, plan.family
    if IMAGE_EMBEDS not in family.prompt_columns:
        raise InputError(
            f"model: {plan.recipe.model} is {family.card_name}, whose embeddings that trainer does not make"
        )
    for captions in (names.captions, names.inverse_captions):
        if len({_key_of(caption) for caption in captions}) < len(captions):
            raise InputError(
                f"tasks.{task.name}.columns: {', '.join(captions)}: their {TENSOR}en and {TENSOR}cn need at most "
                "one caption column whose name ends in _cn, and one whose name does not"
            )
    lines, stored = open_data(task, sha256())
    if stored is not None:
        raise InputError(f"tasks.{task.name}.data: {', '.join(task.data)} is not JSONL, which names the .pt files")
    text, path = Value("string"), folder / f"{task.name}-files.arrow"
    features = Features({"where": text, **dict.fromkeys(KEYS, text)})
    with ArrowWriter(features=features, path=str(path), writer_batch_size=1000) as writer:
        for where, _, line in lines:
            writer.write({"where": where, **{key: _file_of(line, key, where=where) for key in KEYS}})
        writer.finalize()
    table = Dataset.from_file(str(path))
    named = [key for key in KEYS if table.data.column(key).null_count < len(table)]
    if not named:
        raise InputError(
            f"tasks.{task.name}.data: no row of {', '.join(task.data)} names a file under {TENSOR}en, _cn or "
            "_droptext; give the JSONL files that the extraction wrote, not those that it read"
        )
    if not any(key.endswith("_inv") for key in named):  # rows may have inverse captions all the same
        plan = plan.changed(inverse=False)
    return Foreign(plan=plan, table=table, empty_text=empty_text)


class Converter(ChunkWriter):
    """Takes the embeddings of rows from files: of its models there is the processor alone, a `Foreign`."""

    window_rows = 4  # with `TABLES` windows under way, and the next chunk begun, 20 are held: a row has megabytes

    def prepare(self, row: dict[str, Any], chunk: Chunk) -> Prepared:
        """A row with all its columns; raises BadRow."""
        return Prepared(columns=self.models.processor.columns(row), directions=[], resized={})

    def where(self, row: Mapping[str, Any]) -> str:
        """File and line of a row."""
        return self.models.processor.table[row["row"]]["where"]


def convert_task(foreign: Foreign) -> None:
    """Write the set of a task, as far as no other launch does."""
    plan = foreign.plan
    writer = SetWriter(plan, request_of(plan, COMPAT, dtype=foreign.dtype()), can_reuse=False)
    writer.open()
    if writer.is_finished:
        log_set(plan.recipe, plan.folder)
    else:
        datasets.disable_progress_bars()
        models = Models(processor=foreign, encoder=None, latents=None)
        write_set(writer, lambda _: models, torch.device("cpu"), kind=Converter, known=RECORD)


def _key_of(caption: str) -> str:
    """The key of a caption column's embeddings: `_cn` for one whose name ends so, or of the drop caption's."""
    return f"{TENSOR}{'droptext' if caption == 'drop' else 'cn' if caption.endswith('_cn') else 'en'}"


def _file_of(line: Mapping[str, Any], key: str, *, where: str) -> str | None:
    """The file with the embeddings under `key`, from the folder of the JSONL file or, as it was written, from here.

    A row that names no key and one `.pt` file in all has its embeddings in there, under these keys.
    """
    value = line.get(key)
    if value is None and not any(line.get(other) for other in KEYS):
        files = [one for one in line.values() if isinstance(one, str) and one.endswith(".pt")]
        value = files[0] if len(files) == 1 else None
    if value is None:
        return None
    if not isinstance(value, str) or not value:
        raise InputError(f"{where}: {key}: {show(value)} is not the path of a .pt file")
    beside = os.path.join(os.path.dirname(where), value)
    return value if not os.path.isfile(beside) and os.path.isfile(value) else beside


def read_embeddings(path: str, key: str) -> Tensor:
    """The embeddings `[L, D]` in a `.pt` file: a tensor `[L, D]` or `[1, L, D]`, or a mapping to it by `key`.

    Nothing in the file is run. Raises ValueError.
    """
    if not os.path.isfile(path):  # nor a device, which may have no end
        raise ValueError("not found")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:  # whose text advises to run what is in the file
        raise ValueError(f"damaged, or holds more than tensors, and is not opened ({type(error).__name__})") from error
    if isinstance(loaded, Mapping):
        if key not in loaded:
            raise ValueError(f"has no {key}; there are {', '.join(map(str, loaded))[:200]}")
        loaded = loaded[key]
    if not (isinstance(loaded, Tensor) and loaded.layout == torch.strided and loaded.is_floating_point()):
        raise ValueError(f"holds {type(loaded).__name__}, expected a tensor of floating point numbers")
    embeds = loaded[0] if loaded.dim() == 3 and len(loaded) == 1 else loaded
    if embeds.dim() != 2 or not len(embeds):
        raise ValueError(f"holds a tensor of {list(loaded.shape)}, expected [tokens, width]")
    return embeds.detach()


def shared_length(variants: Sequence[Tensor]) -> int:
    """How many embeddings at the start of `variants[L, D]` are the same in all, up to rounding; 0 for a single one.

    The images come before the text in a causal model, so theirs are, and the first token of the text ends them.
    """
    if len(variants) == 1:
        return 0
    length = min(map(len, variants))
    first, *others = (variant[:length] for variant in variants)
    same = torch.ones(length, dtype=torch.bool)
    for other in others:
        apart = (first != other).any(dim=1)  # few, where one batch was computed by one kernel
        one, two = first[apart].float(), other[apart].float()
        same[apart] &= (one - two).norm(dim=1) <= SAME * one.norm(dim=1)
    return int(same.long().cumprod(dim=0).sum())
