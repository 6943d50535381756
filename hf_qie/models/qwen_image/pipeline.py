"""The official pipelines: with what was trained and our embeddings, to sample; without a transformer, to compare with.

Letters: L prompt tokens, D width of the encoder, S latent tokens, C width of a packed latent.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import QwenImageEditPlusPipeline, QwenImagePipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from PIL import Image
from torch import Tensor

from hf_qie.models.base import Family, Size
from hf_qie.models.official import OfficialPipeline
from hf_qie.models.prompts import PromptEmbeddings

PARTS = ("scheduler", "vae", "text_encoder", "tokenizer", "transformer")  # of QwenImagePipeline


def text_to_image(pipeline: Any) -> QwenImagePipeline:
    """The same weights in the pipeline that needs no image."""
    if isinstance(pipeline, QwenImagePipeline):
        return pipeline
    other = QwenImagePipeline(**{name: pipeline.components[name] for name in PARTS})
    other.set_progress_bar_config(disable=None)
    return other


def generate(
    family: Family,
    pipeline: Any,
    embeddings: PromptEmbeddings,
    images: Sequence[Image.Image],
    *,
    size: Size,
    true_cfg_scale: float,
    **options: Any,
) -> Image.Image:
    """What the pipeline makes of `images`, or of none, by embeddings of the instruction and of the negative prompt."""
    options |= {"width": size[0], "height": size[1], "true_cfg_scale": true_cfg_scale}
    for name, text in zip(("prompt_embeds", "negative_prompt_embeds"), embeddings.texts, strict=True):
        embeds = torch.cat([embeddings.shared, text])[None].to(pipeline.device, pipeline.dtype)
        if true_cfg_scale > 1 or name == "prompt_embeds":  # it would warn of a negative prompt that it does not use
            options |= {name: embeds, f"{name}_mask": torch.ones(embeds.shape[:2], device=embeds.device).long()}
    if not images:  # else it cuts at 512, and training does not
        return text_to_image(pipeline)(max_sequence_length=1024, **options).images[0]
    with sources_at(family.vae_area_px):
        return pipeline(image=images[0] if family.max_sources == 1 else list(images), **options).images[0]


@contextmanager
def sources_at(area_px: int) -> Iterator[None]:
    """Let QwenImageEditPlusPipeline show its VAE sources of that area; the constant of its module decides."""
    module = pipeline_qwenimage_edit_plus
    stock, module.VAE_IMAGE_SIZE = module.VAE_IMAGE_SIZE, area_px
    try:
        yield
    finally:
        module.VAE_IMAGE_SIZE = stock


class Official(OfficialPipeline):
    """What the pipelines themselves make of captions and images, to compare our prompt embeddings and latents with.

    A text-to-image checkpoint has no edit pipeline; its VAE is put into one, which encodes images.
    """

    def __init__(self, family: Family, model: str, **where: Any):
        super().__init__(family, model, **where)
        parts = {name: getattr(self.pipeline, name) for name in PARTS}
        self.text_to_image = QwenImagePipeline(**parts)
        if family.max_sources == 0:  # a text-to-image checkpoint has no pipeline that encodes images, but the same VAE
            self.edit = QwenImageEditPlusPipeline(**parts, processor=None)
        else:
            self.edit = self.pipeline
            hand_token_types_through(self.edit, self.device)

    @torch.no_grad()
    def embeddings(self, caption: str, sources: Sequence[Image.Image]) -> Tensor:
        """Embeddings `[L, D]` of one caption over images of any size."""
        if not sources:
            return self.text_to_image._get_qwen_prompt_embeds(caption, device=self.device)[0][0]
        resized = [self.edit.image_processor.resize(one, *self.sides(one, self.family.vlm_area_px)) for one in sources]
        images = resized[0] if self.family.max_sources == 1 else resized
        return self.edit._get_qwen_prompt_embeds(caption, images, device=self.device)[0][0]

    @torch.no_grad()
    def latents(self, image: Image.Image, sides: tuple[int, int]) -> Tensor:
        """Packed latents `[S, C]` of an image of any size, resized to `sides`, height and width in pixels."""
        pixels = self.edit.image_processor.preprocess(image, *sides)[:, :, None]
        latents = self.edit._encode_vae_image(pixels.to(self.device, self.edit.vae.dtype), generator=None)
        return self.edit._pack_latents(latents[:, :, 0], *latents[:, :, 0].shape)[0]

    def sides(self, image: Image.Image, area_px: int) -> tuple[int, int]:
        """Height and width in pixels to which the pipeline resizes an image."""
        width, height = pipeline_qwenimage_edit_plus.calculate_dimensions(area_px, image.width / image.height)
        return height, width

    def grid(self, sides: tuple[int, int]) -> Tensor:
        """Height and width in tokens of an image of that height and width in pixels."""
        return torch.tensor(sides) // (2 * self.edit.vae_scale_factor)


def hand_token_types_through(pipeline: Any, device: torch.device) -> None:
    """Hand the processor's `mm_token_type_ids` to the encoder: diffusers 0.42 loses them, and with them 3-D positions.

    https://github.com/huggingface/diffusers/issues/14194
    """
    processor, forward, types = pipeline.processor, pipeline.text_encoder.forward, {}

    def process(*args: Any, **kwargs: Any) -> Any:
        outputs = processor(*args, **kwargs)
        types["mm_token_type_ids"] = outputs["mm_token_type_ids"].to(device)
        return outputs

    pipeline.processor = process
    pipeline.text_encoder.forward = lambda **kwargs: forward(**types | kwargs)
