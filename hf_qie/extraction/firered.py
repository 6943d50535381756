"""Prompt states that FireRed-Image-Edit's extraction left: one `.pt` file a text, named by the rows of a JSONL file.

A row has a column for each of its texts, `embeddings_tensor_en`, `_cn` and `_droptext`, and the same with `_inv` for
the way back. It holds the path of a tensor `[L, D]`: states of pictures, then text, as of the pipeline's
`encode_prompt`. How they were computed is not in the files.

Letters: L tokens, D width of the encoder.
"""

import os
import pickle
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Value
from datasets.arrow_writer import ArrowWriter
from torch import Tensor

from hf_qie.data.fetch import is_url
from hf_qie.data.readers import open_data
from hf_qie.data.samples import BadRow, images_of, refuse_bad
from hf_qie.data.schema import SOURCES
from hf_qie.data.text_files import clip
from hf_qie.errors import InputError
from hf_qie.extraction.batching import fits_float16, to_float16
from hf_qie.extraction.plan import Plan
from hf_qie.extraction.preprocess import ImageCache, text_columns

TENSOR = "embeddings_tensor_"
KINDS = ("en", "cn", "droptext")
KEYS = tuple(f"{TENSOR}{kind}{way}" for way in ("", "_inv") for kind in KINDS)
# Of two passes over the same tokens in bfloat16, relative to the norm of a state: its steps are 2^-8 apart, and 28
# layers add some up. States of different tokens are further apart than that by an order of magnitude.
SAME = 2.0**-6
# what torch's reader raises on files that are damaged, or hold more than tensors
UNREADABLE = (
    *(OSError, EOFError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, OverflowError),
    *(MemoryError, struct.error, pickle.UnpicklingError),
)


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """The states of a task's rows, in files of another trainer; `table` has for each row `where` and a path a key."""

    plan: Plan
    table: Dataset
    width: int  # D of the checkpoint's encoder
    empty_text: Path | None  # the states of the empty text without pictures

    def columns(self, row: Mapping[str, Any]) -> dict[str, Any] | BadRow:
        """All columns of a row but latents, or why there are none. Runs in many threads."""
        try:
            return self.read(row)
        except BadRow as error:
            return error

    def read(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """All columns of a row but latents; raises BadRow."""
        refuse_bad(row)
        names, files = self.plan.task.columns, self.table[row["row"]]
        for column, path in images_of(row, names):
            if is_url(path):
                raise BadRow("a URL; training without latents reads pictures from files", column=column, path=path)
        images = ImageCache([row], self.plan).read(row)
        columns = text_columns(row, self.plan)
        for prefix, shown, captions in self.plan.ways(row):
            way = "_inv" if prefix else ""
            if prefix and not any(files[f"{TENSOR}{kind}{way}"] for kind in KINDS):
                continue  # their --disable_inverse
            sized = self.plan.sizes(shown, images)
            keys = {caption: key_of(caption, way) for caption in captions if row["texts"][caption]}
            keys["drop"] = f"{TENSOR}droptext{way}"
            states = {text: self.states(key, files, alone=not shown[SOURCES]) for text, key in keys.items()}
            num_embeds = {keys[text]: len(value) for text, value in states.items()}
            self.plan.check_length(num_embeds, self.plan.grids(sized))
            columns |= self.state_columns(prefix, states, keys, files, num_sources=len(shown[SOURCES]))
            columns |= self.plan.shape_columns(prefix, sized, images)
        return columns

    def state_columns(
        self,
        prefix: str,
        states: Mapping[str, Tensor],
        keys: Mapping[str, str],
        files: Mapping[str, str | None],
        *,
        num_sources: int,
    ) -> dict[str, Any]:
        """The columns of states of one direction; raises BadRow for numbers that cannot be stored."""
        stored = {text: to_float16(value) for text, value in states.items()}
        for text, value in stored.items():
            if not fits_float16(value):
                reason = "values beyond float16 (65504) or not finite"
                raise BadRow(reason, column=keys[text], path=files[keys[text]])
        cut = shared_length(list(states.values())) if num_sources else 0
        columns = {f"{prefix}text_embeds_{text}": value[cut:] for text, value in stored.items()}
        return columns | {f"{prefix}image_embeds": next(iter(stored.values()))[:cut]}

    def states(self, key: str, files: Mapping[str, str | None], *, alone: bool) -> Tensor:
        """The states `[L, D]` under `key` of a row, `alone` if it has no pictures; raises BadRow."""
        path = files[key]
        if path is None and alone and key == f"{TENSOR}droptext":  # which their --t2i_mode does not write
            if self.empty_text is None:
                raise BadRow("missing; give --empty_text the file of the empty text's states", column=key)
            path = str(self.empty_text)
        if path is None:
            raise BadRow("missing, or null", column=key)
        try:
            states = matrix_in(read_tensors(path), key)
        except ValueError as error:
            raise BadRow(str(error), column=key, path=path) from error
        if states.shape[1] != self.width:
            reason = f"states {states.shape[1]} wide, those of this checkpoint are {self.width}"
            raise BadRow(reason, column=key, path=path)
        return states


def open_foreign(plan: Plan, folder: Path, *, width: int, empty_text: Path | None) -> Foreign:
    """The files that the data of `plan` names; the table lies memory-mapped in `folder`.

    Raises InputError where no row names one, or the caption columns do not tell which is which.
    """
    task = plan.task
    for captions in (task.columns.captions, task.columns.inverse_captions):
        if len({key_of(caption) for caption in captions}) < len(captions):
            raise InputError(
                f"tasks.{task.name}.columns: {', '.join(captions)}: such rows have one text, and one in Chinese; name "
                "one caption column whose name ends in _cn, and one whose name does not"
            )
    lines, stored = open_data(task, sha256())
    if stored is not None:
        raise InputError(f"tasks.{task.name}.data: {', '.join(task.data)} is no JSONL, which names the .pt files")
    text, found, path = Value("string"), False, folder / f"{task.name}-files.arrow"
    features = Features({"where": text, **dict.fromkeys(KEYS, text)})
    with ArrowWriter(features=features, path=str(path), writer_batch_size=1000) as writer:
        for where, _, line in lines:
            files = {key: file_of(line, key, where=where) for key in KEYS}
            writer.write({"where": where, **files})
            found = found or any(files.values())
        writer.finalize()
    if not found:
        raise InputError(
            f"tasks.{task.name}.data: no row of {', '.join(task.data)} names a file under {TENSOR}en, _cn or "
            "_droptext; give the JSONL files that the extraction wrote, not those that it read"
        )
    return Foreign(plan=plan, table=Dataset.from_file(str(path)), width=width, empty_text=empty_text)


def has_inverse_files(foreign: Foreign) -> bool:
    """Whether some row names a file for the way back."""
    return any(foreign.table.data.column(key).null_count < len(foreign.table) for key in KEYS if key.endswith("_inv"))


def key_of(caption: str, way: str = "") -> str:
    """The key of a caption column's states: `_cn` for one whose name ends so."""
    return f"{TENSOR}{'cn' if caption.endswith('_cn') else 'en'}{way}"


def file_of(line: Mapping[str, Any], key: str, *, where: str) -> str | None:
    """The file with the states under `key`, from the folder of the JSONL file or, as it was written, from here.

    A row that names no key and one `.pt` file in all has its states in there, under these keys.
    """
    value = line.get(key)
    if value is None and not any(line.get(other) for other in KEYS):
        files = [one for one in line.values() if isinstance(one, str) and one.endswith(".pt")]
        value = files[0] if len(files) == 1 else None
    if value is None:
        return None
    if not isinstance(value, str) or not value:
        raise InputError(f"{where}: {key}: {clip(value)} is no path of a .pt file")
    beside = os.path.join(os.path.dirname(where), value)
    return value if not os.path.isfile(beside) and os.path.isfile(value) else beside


def read_tensors(path: str) -> Any:
    """What a `.pt` file holds, as far as it is tensors: nothing in it is run. Raises ValueError."""
    if not os.path.isfile(path):  # nor a device, which may have no end
        raise ValueError("no such file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:  # whose text advises to run what is in the file
        raise ValueError(f"damaged, or holds more than tensors, and is not opened ({type(error).__name__})") from error


def matrix_in(loaded: Any, key: str) -> Tensor:
    """The states `[L, D]` in what a file holds: a tensor `[L, D]` or `[1, L, D]`, or a mapping with it under `key`.

    Raises ValueError.
    """
    if isinstance(loaded, Mapping):
        if key not in loaded:
            raise ValueError(f"has no {key}; there are {', '.join(map(str, loaded))[:200]}")
        loaded = loaded[key]
    if not (isinstance(loaded, Tensor) and loaded.layout == torch.strided and loaded.is_floating_point()):
        raise ValueError(f"holds {type(loaded).__name__}, wanted a tensor of floating point numbers")
    states = loaded[0] if loaded.dim() == 3 and len(loaded) == 1 else loaded
    if states.dim() != 2 or not len(states):
        raise ValueError(f"holds a tensor of {list(loaded.shape)}, wanted [tokens, width]")
    return states.detach()


def shared_length(variants: Sequence[Tensor]) -> int:
    """How many states at the start of `variants[L, D]` are the same in all, up to rounding; 0 for a single one.

    The pictures come before the text in a causal model, so their states are, and the first token of the text ends it.
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


def dtype_in(foreign: Foreign) -> str:
    """The dtype of the first states that can be read."""
    for key in KEYS:
        for row in foreign.table:
            try:
                return str(matrix_in(read_tensors(row[key] or ""), key).dtype).removeprefix("torch.")
            except ValueError:
                continue
    return "unknown"
