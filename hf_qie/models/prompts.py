"""Captions over the same sources: as tokens, as lengths and as embeddings.

Letters: L prompt tokens, D width of the encoder.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


class BadPrompt(ValueError):
    """A caption that cannot be encoded: why, and its `place` among the captions given."""

    def __init__(self, reason: str, *, place: int):
        super().__init__(reason)
        self.place = place


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Captions over the same sources, ready for the encoder; what they share is encoded once."""

    shared: list[int]  # tokens that every caption starts with
    branches: list[list[int]]  # the tokens of each caption from there on
    drop: int  # tokens at the start whose embeddings the pipelines cut off
    split: int  # tokens through the last image: embeddings in drop:split are shared by all captions
    vision: Mapping[str, Tensor]  # what the encoder is given of the images; empty without any
    image_token: int | None = None  # the token of an image whose embeddings are left out; None: all are kept
    slots: tuple[int, ...] = ()  # see `PromptEmbeddings`

    @property
    def num_tokens(self) -> int:
        """Tokens that the encoder runs."""
        return len(self.shared) + sum(map(len, self.branches))

    @property
    def num_tokens_apart(self) -> int:
        """Tokens of one pass per caption."""
        return len(self.shared) * len(self.branches) + sum(map(len, self.branches))

    @property
    def num_embeddings(self) -> list[int]:
        """That a set stores, the shared ones and the text's together, by caption."""
        num_slots = 0 if self.image_token is None else self.shared.count(self.image_token)
        return [len(self.shared) - self.drop - num_slots + len(branch) for branch in self.branches]


@dataclass(frozen=True, kw_only=True)
class PromptLengths:
    """What a prompt will have, known from sizes and captions alone."""

    shared: int  # embeddings that all captions share
    captions: list[int]  # tokens of each caption
    suffix: int  # tokens of the template that count as a caption's embeddings: those behind it, mostly
    encoded: int  # tokens that the encoder runs, of text and images
    num_image_tokens: int  # of them, those of images


@dataclass(frozen=True, kw_only=True)
class PromptEmbeddings:
    """Of one prompt, in the encoder's dtype; the shared ones, then a text's, equal the pipeline's `encode_prompt`."""

    shared: Tensor  # [I, D], of what stands before every caption; I = 0 for text-to-image
    texts: list[Tensor]  # one [T, D] a caption
    # where images have no embeddings of their own: of each, how many of `shared` stand in front of it
    slots: tuple[int, ...] = ()
