"""From captions to the tokens that the encoder runs: one shared part and a branch per caption.

The encoder is causal and the images come before the caption, so system text and images have the same embeddings
whatever caption follows: they are run once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, takewhile
from threading import Lock
from typing import Any, ClassVar

from PIL import Image

from hf_qie.models.base import Size
from hf_qie.models.prompts import BadPrompt, Prompt, PromptLengths

IMAGE_TOKEN, VIDEO_TOKEN = "<|image_pad|>", "<|video_pad|>"  # stand for what is seen; only templates may hold them
TOKENIZING = Lock()  # a fast tokenizer refuses a call while another thread changes its padding


@dataclass(frozen=True, kw_only=True)
class Template:
    """The chat text around a caption: `before`, one `picture` a source, the caption, `after`."""

    separator: ClassVar[str] = ""  # between two images
    keeps_images: ClassVar[bool] = True  # False: the embeddings of an image's own tokens are left out

    before: str
    picture: str  # may hold {number}, which counts from 1
    after: str
    drop: int  # tokens of `before`, whose embeddings the pipelines cut off

    def shared(self, num_sources: int) -> str:
        """The part that stands before every caption of the same sources."""
        return self.before + self.separator.join(self.picture.format(number=i + 1) for i in range(num_sources))


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of the checkpoint's processor, or itself where there is no more than that."""
    return getattr(processor, "tokenizer", processor)


def make_prompt(processor: Any, template: Template, images: Sequence[Image.Image], captions: Sequence[str]) -> Prompt:
    """Tokens and pixels for `captions` over the same `images`, which already have the encoder's size.

    The text is tokenized whole, as the pipelines do: a caption may merge with what stands before it.
    Raises BadPrompt for a caption with a token that stands for an image.
    """
    if bad := _bad_caption(captions):
        raise bad
    shared_text, vision = template.shared(len(images)), {}
    if images:
        vision = dict(processor.image_processor(images=list(images), return_tensors="pt"))
        num_patches = vision["image_grid_thw"].prod(dim=-1) // processor.image_processor.merge_size**2
        first, *pieces = shared_text.split(IMAGE_TOKEN)
        shared_text = first + "".join(
            IMAGE_TOKEN * n + piece for n, piece in zip(num_patches.tolist(), pieces, strict=True)
        )
    with TOKENIZING:
        *tokens, through_images = tokenizer_of(processor)(
            [*(shared_text + caption + template.after for caption in captions), shared_text]
        )["input_ids"]
    split = len(through_images) if images else template.drop
    # text without images has no hard border: a caption that starts with a line break merges with the one before
    same = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*tokens, strict=False)))
    cut = min(same, split)
    image_token = None if template.keeps_images else tokenizer_of(processor).convert_tokens_to_ids(IMAGE_TOKEN)
    return Prompt(
        shared=tokens[0][:cut],
        branches=[sequence[cut:] for sequence in tokens],
        drop=template.drop,
        split=split,
        vision=vision,
        image_token=image_token,
        slots=() if template.keeps_images else _slots(tokens[0][template.drop : split], image_token),
    )


def _slots(tokens: Sequence[int], image_token: int) -> tuple[int, ...]:
    """For each run of `image_token`, how many other tokens stand in front of it."""
    runs = [(is_image, len(list(run))) for is_image, run in groupby(tokens, key=image_token.__eq__)]
    before = accumulate(0 if is_image else length for is_image, length in runs)
    return tuple(number for (is_image, _), number in zip(runs, before, strict=True) if is_image)


def prompt_lengths(
    processor: Any, template_of: Callable[[int], Template], prompts: Sequence[tuple[Sequence[Size], Sequence[str]]]
) -> list[PromptLengths | BadPrompt]:
    """Lengths for (sizes of images that the encoder sees, captions); the tokenizer is called once."""
    parts, texts = [], set()
    for sizes, captions in prompts:
        template = template_of(len(sizes))
        shared = template.shared(len(sizes))
        lead = shared.rpartition("|>")[2]  # no token reaches over a special one
        parts.append((template, shared, lead))
        texts |= {shared, lead, template.after, *(lead + caption for caption in captions)}
    count = dict(zip(texts, map(len, tokenizer_of(processor)(list(texts))["input_ids"]), strict=True))
    found = []
    for (sizes, captions), (template, shared, lead) in zip(prompts, parts, strict=True):
        text = count[shared] - template.drop - len(sizes)  # which has one token an image
        num_image_tokens = sum(num_patches(processor, size) for size in sizes)
        of_captions = [count[lead + caption] - count[lead] for caption in captions]
        before, suffix = (text, count[template.after]) if sizes else (0, text + count[template.after])
        lengths = PromptLengths(
            shared=before + (num_image_tokens if template.keeps_images else 0),
            captions=of_captions,
            suffix=suffix,
            encoded=template.drop + before + num_image_tokens + sum(of_captions) + len(captions) * suffix,
            num_image_tokens=num_image_tokens,
        )
        found.append(_bad_caption(captions) or lengths)
    return found


def num_patches(processor: Any, size: Size) -> int:
    """Tokens of an image that the encoder sees at that size."""
    images = processor.image_processor
    return images.get_number_of_image_patches(size[1], size[0]) // images.merge_size**2


def _bad_caption(captions: Sequence[str]) -> BadPrompt | None:
    for place, caption in enumerate(captions):
        for token in (IMAGE_TOKEN, VIDEO_TOKEN):
            if token in caption:
                return BadPrompt(f"the caption holds {token}, which stands for an image", place=place)
    return None
