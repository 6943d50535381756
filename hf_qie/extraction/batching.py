"""Which prompts and pictures run together: rows with the same sources share a pass, passes of like length a batch."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from torch import Tensor

from hf_qie.extraction.preprocess import Direction, Picture, Prepared
from hf_qie.models.qwen_image.prompts import Prompt
from hf_qie.models.qwen_image.text_encoder import PromptStates


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One prompt for all captions of rows that follow each other with the same sources."""

    prompt: Prompt
    directions: list[Direction]

    def split(self, states: PromptStates) -> Iterator[tuple[Direction, list[Tensor]]]:
        """Each direction with the states of its captions, the drop caption last."""
        *texts, drop = states.texts
        for direction in self.directions:
            yield direction, [*(texts.pop(0) for _ in direction.captions), drop]


def shared_passes(rows: Sequence[Prepared], *, batch_size: int) -> list[Pass]:
    """Passes for all directions of `rows`, of at most `batch_size` rows: many instructions on one photo run it once.

    Prompts over the same sources differ in their branches alone; the last branch of each is the drop caption.
    """
    passes = []
    inverses = [direction for row in rows for direction in row.directions[1:]]
    for directions in ([row.directions[0] for row in rows], inverses):
        for sources, alike in groupby(directions, key=lambda direction: [file for file, _ in direction.sources]):
            run = list(alike)
            step = batch_size if sources else 1  # without pictures there is next to nothing to share
            passes += [merge(run[start : start + step]) for start in range(0, len(run), step)]
    return passes


def merge(directions: list[Direction]) -> Pass:
    """One pass for directions over the same sources."""
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


def same_size(pictures: Sequence[Picture], *, batch_size: int) -> list[list[Picture]]:
    """Batches of at most `batch_size` pictures of one size, each picture once, in their order."""
    by_size: dict[tuple[int, int], list[Picture]] = defaultdict(list)
    for picture in dict.fromkeys(pictures):
        by_size[picture[1]].append(picture)
    return [alike[i : i + batch_size] for alike in by_size.values() for i in range(0, len(alike), batch_size)]
