"""The official pipeline: with what was trained and our embeddings, to sample; without a transformer, to compare with.

Letters: L prompt tokens, D width of the encoder, S latent tokens, C width of a latent.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import QwenImage21Pipeline
from diffusers.pipelines.qwenimage21 import pipeline_qwenimage21
from PIL import Image
from torch import Tensor

from hf_qie.models.base import Family, Size
from hf_qie.models.official import OfficialPipeline
from hf_qie.models.prompts import PromptEmbeddings
from hf_qie.models.qwen_image_21.templates import LATENTS_PER_SLOT


def generate(
    family: Family,
    pipeline: QwenImage21Pipeline,
    embeddings: PromptEmbeddings,
    images: Sequence[Image.Image],
    *,
    size: Size,
    true_cfg_scale: float,
    **options: Any,
) -> Image.Image:
    """What the pipeline makes of `images`, or of none, by embeddings of the instruction and of the negative prompt."""
    sizes = [family.fit(image.size, family.vae_area_px) for image in images]
    num_slots = [math.prod(family.grid_of(one)) // LATENTS_PER_SLOT for one in sizes]
    width, height = size
    options |= {"width": width, "height": height, "true_cfg_scale": true_cfg_scale}
    options |= {"image": list(images) or None, "output_resolution": math.isqrt(family.vae_area_px)}
    masks = []
    for name, text in zip(("prompt_embeds", "negative_prompt_embeds"), embeddings.texts, strict=True):
        if true_cfg_scale > 1 or name == "prompt_embeds":  # it would warn of a negative prompt that it does not use
            embeds, mask = with_slots(embeddings, text, num_slots)
            options[name] = embeds[None].to(pipeline.device, pipeline.dtype)
            masks.append(mask[None].to(pipeline.device))
    with image_slots(pipeline, masks):
        return pipeline(**options).images[0]


def with_slots(embeddings: PromptEmbeddings, text: Tensor, num_slots: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Embeddings `[L, D]` as the pipeline has them, and which of them are places of an image.

    These places, `num_slots` a source, hold zeros: the transformer puts the latents there.
    """
    places = torch.ones(len(embeddings.shared) + len(text) + sum(num_slots), dtype=torch.bool)
    before = 0
    for place, number in zip(embeddings.slots, num_slots, strict=True):
        places[place + before : place + before + number] = False
        before += number
    embeds = text.new_zeros(len(places), text.shape[1])
    embeds[places.to(embeds.device)] = torch.cat([embeddings.shared, text])
    return embeds, ~places


@contextmanager
def image_slots(pipeline: QwenImage21Pipeline, masks: Sequence[Tensor]) -> Iterator[None]:
    """Let `encode_prompt` have `masks[1, L]`, one a call, which the pipeline's own call does not hand through."""
    left, stock = iter(masks), pipeline.encode_prompt
    pipeline.encode_prompt = lambda **given: stock(**given, image_pad_mask=next(left))
    try:
        yield
    finally:
        del pipeline.encode_prompt


class Official(OfficialPipeline):
    """What the pipeline itself makes of captions and images, to compare our prompt embeddings and latents with."""

    @torch.no_grad()
    def encode(self, caption: str, sources: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Embeddings `[L, D]` of one caption over images of any size, and which of them are places of an image."""
        resized = [self.resize(one, self.sides(one, self.family.vlm_area_px)) for one in sources]
        embeds, _, places = self.pipeline._get_qwen_prompt_embeds(caption, resized or None, device=self.device)
        return embeds[0], places[0]

    def embeddings(self, caption: str, sources: Sequence[Image.Image]) -> Tensor:
        """Embeddings of one caption over images of any size, without those that latents take the places of."""
        embeds, places = self.encode(caption, sources)
        return embeds[~places]

    def slots(self, sources: Sequence[Image.Image]) -> list[int]:
        """For each image, how many embeddings stand in front of its places."""
        _, places = self.encode(" ", sources)
        starts = places & ~torch.cat([places.new_zeros(1), places[:-1]])
        return (~places).cumsum(0)[starts].tolist()

    def resize(self, image: Image.Image, sides: tuple[int, int]) -> Image.Image:
        """An image with alpha at that height and width, as the pipeline resizes it."""
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        return self.pipeline.image_processor.resize(image, *sides)

    @torch.no_grad()
    def latents(self, image: Image.Image, sides: tuple[int, int]) -> Tensor:
        """Latents `[S, C]` of an image of any size, resized to `sides`, height and width in pixels."""
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        pixels = self.pipeline.image_processor.preprocess(image, *sides)[:, :, None]
        latents = self.pipeline._encode_vae_image(pixels.to(self.device, self.pipeline.vae.dtype), generator=None)
        batch, channels, _, height, width = latents.shape
        return self.pipeline._pack_latents(latents, batch, channels, height, width)[0]

    def sides(self, image: Image.Image, area_px: int) -> tuple[int, int]:
        """Height and width in pixels to which the pipeline resizes an image."""
        width, height, _ = pipeline_qwenimage21.calculate_dimensions(area_px, image.width / image.height)
        return height, width

    def grid(self, sides: tuple[int, int]) -> Tensor:
        """Height and width in tokens of an image of that height and width in pixels."""
        return torch.tensor(sides) // self.pipeline.vae_scale_factor
