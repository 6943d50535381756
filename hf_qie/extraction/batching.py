"""What runs together: rows of the same sources share a pass, passes of like length and images of one size a batch."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch

from hf_qie.data.schema import DROP_EMBEDS, SOURCES, TEXT_EMBEDS
from hf_qie.extraction.plan import SizedFile
from hf_qie.extraction.preprocess import Direction, Prepared
from hf_qie.models.base import Size
from hf_qie.models.prompts import Prompt, PromptEmbeddings


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One prompt for all captions of rows that follow each other with the same sources."""

    prompt: Prompt
    directions: list[Direction]

    def keep(self, made: PromptEmbeddings, *, prompt_columns: Sequence[str]) -> None:
        """Put the embeddings among the columns of the rows; `prompt_columns` are the family's."""
        shared, (*texts, drop) = to_float16(made.shared), map(to_float16, made.texts)
        own = dict(zip(prompt_columns, (shared, list(made.slots)), strict=False))
        for one in self.directions:
            found = {TEXT_EMBEDS + caption: texts.pop(0) for caption in one.captions} | own | {DROP_EMBEDS: drop}
            one.columns.update({one.prefix + name: value for name, value in found.items()})


def shared_passes(rows: Sequence[Prepared], *, batch_size: int) -> list[Pass]:
    """Passes for all directions of `rows`, of at most `batch_size` rows: many captions on one photo run it once.

    Prompts over the same sources differ in their branches alone; the last branch of each is the drop caption.
    """
    passes = []
    inverses = [direction for row in rows for direction in row.directions[1:]]
    for directions in ([row.directions[0] for row in rows], inverses):
        for sources, alike in groupby(directions, key=lambda one: [file for file, _ in one.images[SOURCES]]):
            run = list(alike)
            step = batch_size if sources else 1  # without images there is next to nothing to share
            passes += [_merged(run[start : start + step]) for start in range(0, len(run), step)]
    return passes


def _merged(directions: list[Direction]) -> Pass:
    first = directions[0].prompt
    branches = [branch for direction in directions for branch in direction.prompt.branches[:-1]]
    return Pass(prompt=replace(first, branches=[*branches, first.branches[-1]]), directions=directions)


def like_length(passes: Sequence[Pass], *, batch_size: int) -> list[list[Pass]]:
    """Batches of at most `batch_size` rows, longest first, so that little of a batch is padding."""
    batches: list[list[Pass]] = []
    room = 0
    for one in sorted(passes, key=lambda one: -one.prompt.num_tokens):
        if len(one.directions) > room:
            batches.append([])
            room = batch_size
        batches[-1].append(one)
        room -= len(one.directions)
    return batches


def same_size(images: Sequence[SizedFile], *, batch_size: int) -> list[list[SizedFile]]:
    """Batches of at most `batch_size` images of one size, each image once, in their order."""
    by_size: dict[Size, list[SizedFile]] = defaultdict(list)
    for image in dict.fromkeys(images):
        by_size[image[1]].append(image)
    return [alike[i : i + batch_size] for alike in by_size.values() for i in range(0, len(alike), batch_size)]


def to_float16(values: torch.Tensor) -> np.ndarray:
    """As stored: exact for bfloat16 from 2^-17 to 65504, at most 2^-25 off below."""
    return values.to(torch.float16).cpu().numpy()


def fits_float16(values: np.ndarray) -> bool:
    """False where a value is beyond float16, or not finite in the first place."""
    return bool(np.isfinite(values).all())
