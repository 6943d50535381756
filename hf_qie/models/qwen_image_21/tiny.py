"""A tiny checkpoint of Qwen-Image-2.1 for tests and the demo: real classes and layout, random weights."""

from collections.abc import Iterable
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKLQwenImage21, FlowMatchEulerDiscreteScheduler, QwenImage21Transformer2DModel
from torch import Tensor, nn
from transformers import (
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from hf_qie.models.base import Family
from hf_qie.models.qwen_image_21.templates import TEMPLATE
from hf_qie.models.tiny_parts import (
    CHAT_TEMPLATE,
    SCHEDULER,
    TEXT,
    randomise,
    tiny_tokenizer,
    tiny_transformer,
    token_ids,
)

VAE_CONFIG = {"base_dim": 8, "decoder_base_dim": 8, "num_res_blocks": 1}


def _processor(tokenizer: Qwen2Tokenizer) -> Qwen3VLProcessor:
    """Qwen3-VL's, with the least image of one token, so that sources may be small."""
    pixels = {"patch_size": 16, "min_pixels": 32 * 32, "max_pixels": 4096 * 4096}
    pixels |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    images, videos = Qwen2VLImageProcessor(**pixels), Qwen3VLVideoProcessor()
    return Qwen3VLProcessor(images, tokenizer, videos, chat_template=CHAT_TEMPLATE)


@torch.no_grad()
def _text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen3VLForConditionalGeneration:
    """Qwen3-VL with DeepStack and interleaved positions, which count for much, as large queries and keys see to."""
    of_text, of_images = token_ids(tokenizer)
    text = TEXT | of_text
    text |= {
        "head_dim": 16,
        "max_position_embeddings": 262144,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
    }
    vision = {
        "depth": 3,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "out_hidden_size": 96,
        "num_position_embeddings": 256,
        "deepstack_visual_indexes": [0, 1],
    }
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **of_images)
    model = Qwen3VLForConditionalGeneration(config)
    randomise(model)
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            parameter *= 1.5
    return model.eval()


def _images() -> Tensor:
    """Sixteen images `[16, 4, 1, 128, 128]` of smooth colours with a box of one colour, a quarter of them see-through.

    In [-1, 1].
    """
    images = nn.functional.interpolate(torch.rand(16, 4, 4, 4), size=(128, 128), mode="bicubic") * 2 - 1
    images[:, 3] = 1.0
    for i, image in enumerate(images):
        left, top = 8 * (i % 8), 8 * (i // 2)
        image[:3, top : top + 48, left : left + 48] = (torch.rand(3) * 2 - 1)[:, None, None]
        if i % 4 == 0:
            image[3, :, : 16 + 4 * i] = -1.0
    return images.clamp(-1, 1)[:, :, None]


@torch.no_grad()
def tiny_vae() -> AutoencoderKLQwenImage21:
    """Random weights; its normalised latents have mean 0 and std 1 over synthetic images, by channel."""
    vae = AutoencoderKLQwenImage21(**VAE_CONFIG)
    randomise(vae)
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):  # the scale of a norm
            nn.init.normal_(parameter, mean=1.0, std=0.1)
    modes = vae.eval().encode(_images()).latent_dist.mode()
    mean, std = modes.mean(dim=(0, 2, 3, 4)), modes.std(dim=(0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    return vae


def save_tiny(family: Family, folder: Path, *, texts: Iterable[str], variant: str = "", seed: int = 0) -> None:
    """Write a checkpoint of `family` in diffusers layout, all random but the vocabulary, which has all of `texts`.

    Prompt embeddings are 96 wide, latents have 64 channels at 1/16 of the side. The same seed gives the same bytes.
    `variant`: "learner" has initial weights and can learn in minutes; "no_causal_condition" lacks that flag.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer([TEMPLATE.shared(9), TEMPLATE.after, *texts])
        parts = {
            "scheduler": FlowMatchEulerDiscreteScheduler(**SCHEDULER),
            "vae": tiny_vae(),
            "text_encoder": _text_encoder(tokenizer),
            "processor": _processor(tokenizer),
            "transformer": tiny_transformer(
                QwenImage21Transformer2DModel,
                learner=variant == "learner",
                context_in_dim=96,
                causal_condition=variant != "no_causal_condition",
            ),
        }
    getattr(diffusers, family.pipeline)(**parts).save_pretrained(folder)
