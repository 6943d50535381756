"""From captions to the tokens that the encoder runs: one shared part and a branch per caption.

The encoder is causal and the pictures come before the caption, so system text and pictures have the same states
whatever caption follows: they are run once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from threading import Lock
from typing import Any

import torch
from PIL import Image

from hf_qie.models.qwen_image.family import Template

IMAGE_TOKEN, VIDEO_TOKEN = "<|image_pad|>", "<|video_pad|>"  # stand for what is seen; only templates may hold them
TOKENIZING = Lock()  # a fast tokenizer refuses a call while another thread changes its padding


class BadPrompt(ValueError):
    """A caption that cannot be encoded: why, and its `place` among the captions given."""

    def __init__(self, reason: str, *, place: int):
        super().__init__(reason)
        self.place = place


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One set of sources with its captions, ready for the encoder."""

    shared: list[int]  # tokens that every caption starts with
    branches: list[list[int]]  # the tokens of each caption from there on
    drop: int  # tokens at the start whose states the pipelines cut off
    split: int  # tokens through the last picture: states in drop:split belong to the pictures
    pixel_values: torch.Tensor | None  # as the image processor gives them, all pictures in order
    image_grid_thw: torch.Tensor | None  # [N, 3]

    @property
    def num_tokens(self) -> int:
        """Tokens that the encoder runs."""
        return len(self.shared) + sum(map(len, self.branches))

    @property
    def num_tokens_apart(self) -> int:
        """Tokens of one pass per caption."""
        return len(self.shared) * len(self.branches) + sum(map(len, self.branches))


def make_prompt(processor: Any, template: Template, images: Sequence[Image.Image], captions: Sequence[str]) -> Prompt:
    """Tokens and pixels for `captions` over the same `images`, which already have the encoder's size.

    `processor` is the checkpoint's Qwen2VLProcessor, or a bare tokenizer where there are no images.
    The text is tokenized whole, as the pipelines do: a caption may merge with what stands before it.

    Raises:
        BadPrompt: a caption holds a token that stands for a picture.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    shared_text, vision = template.shared(len(images)), {}
    for place, caption in enumerate(captions):
        if found := [token for token in (IMAGE_TOKEN, VIDEO_TOKEN) if token in caption]:
            raise BadPrompt(f"the caption holds {found[0]}, which stands for a picture", place=place)
    if images:
        vision = processor.image_processor(images=list(images), return_tensors="pt")
        tokens_per_image = vision["image_grid_thw"].prod(dim=-1) // processor.image_processor.merge_size**2
        pieces = shared_text.split(IMAGE_TOKEN)
        pads = [IMAGE_TOKEN * n for n in tokens_per_image.tolist()]
        shared_text = pieces[0] + "".join(pad + piece for pad, piece in zip(pads, pieces[1:], strict=True))
    texts = [shared_text + caption + template.after for caption in captions]
    with TOKENIZING:
        *tokens, through_pictures = tokenizer([*texts, shared_text])["input_ids"]
    split = len(through_pictures) if images else template.drop
    # text without pictures has no hard border: a caption that starts with a line break merges with the one before
    same = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*tokens, strict=False)))
    cut = min(same, split)
    return Prompt(
        shared=tokens[0][:cut],
        branches=[sequence[cut:] for sequence in tokens],
        drop=template.drop,
        split=split,
        pixel_values=vision.get("pixel_values"),
        image_grid_thw=vision.get("image_grid_thw"),
    )
