"""The text around a caption as QwenImage21Pipeline writes it, and how many of its tokens the pipeline cuts off.

diffusers/pipelines/qwenimage21/pipeline_qwenimage21.py:207-232 and 263-275.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

from hf_qie.models.templates import Template

# of the encoder's image tokens, which see 32 x 32 pixels (transformer_qwenimage21.py, _IMG_TOKENS_PER_SLOT)
LATENTS_PER_SLOT = 4
SYSTEM = "Comprehend and analyze the provided prompt."


@dataclass(frozen=True, kw_only=True)
class Template21(Template):
    """A blank stands between two images, and latents take the places of an image's embeddings."""

    separator: ClassVar[str] = " "
    keeps_images: ClassVar[bool] = False

    drop: int = 0  # known when there is a tokenizer


TEMPLATE = Template21(
    before=f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n",
    picture="<image{number}><|vision_start|><|image_pad|><|vision_end|>",
    after="<|im_end|>\n<|im_start|>assistant\n",
)


@lru_cache(maxsize=4)
def num_dropped(processor: Any) -> int:
    """Tokens of the system message in the processor's own chat template, which is what the pipeline cuts off."""
    message = [{"role": "system", "content": [{"type": "text", "text": SYSTEM}]}]
    return len(processor.apply_chat_template(message, tokenize=True, return_dict=False)[0])


def template_of(processor: Any) -> Callable[[int], Template]:
    """The template for a number of sources, any of them."""
    template = replace(TEMPLATE, drop=num_dropped(processor))
    return lambda num_sources: template


def as_read(caption: str) -> str:
    """What stands for a caption: an empty one is a blank."""
    return caption or " "
