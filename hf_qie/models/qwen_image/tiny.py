"""A tiny checkpoint for tests and the demo: real classes and layout, random weights, nothing downloaded."""

import math
from collections.abc import Iterable
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from diffusers.modular_pipelines.qwenimage import prompt_templates
from safetensors.torch import load_file
from torch import nn
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from hf_qie.models.base import Family
from hf_qie.models.tiny_parts import (
    CHAT_TEMPLATE,
    SCHEDULER,
    TEXT,
    randomise,
    tiny_tokenizer,
    tiny_transformer,
    token_ids,
)

TEMPLATES = (
    prompt_templates.QWENIMAGE_PROMPT_TEMPLATE,
    prompt_templates.QWENIMAGE_EDIT_PLUS_PROMPT_TEMPLATE,
    prompt_templates.QWENIMAGE_EDIT_PLUS_IMG_TEMPLATE,
)
# of each causal 3-D convolution the slice that a single image meets, as float16; latents_mean and latents_std
VAE_FILE = Path(__file__).with_name("tiny_vae.safetensors")
VAE_CONFIG = {"base_dim": 16, "dim_mult": [1, 2, 4, 8], "num_res_blocks": 1}
VAE_LOGVAR = 2 * math.log(0.05)  # of the posterior: the noise on latents that its training had


def _text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL with its own spatial settings; positions count for much, as large biases on query and key see to."""
    of_text, of_images = token_ids(tokenizer)
    text = TEXT | of_text
    text |= {
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "out_hidden_size": 96,
        "tokens_per_second": 2,
        "fullatt_block_indexes": [1],  # block 0 sees windows of 112 px, block 1 all; of 7B every eighth sees all
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **of_images)
    model = Qwen2_5_VLForConditionalGeneration(config)
    randomise(model)
    for name, parameter in model.model.language_model.named_parameters():
        if name.endswith(("q_proj.bias", "k_proj.bias")):
            nn.init.normal_(parameter, std=1.0)
    return model.eval()


@torch.no_grad()
def tiny_vae() -> AutoencoderKLQwenImage:
    """The VAE of tests/train_tiny_vae.py; its normalised latents have mean 0 and std 1 over synthetic images."""
    tensors = load_file(VAE_FILE)
    scale = {name: tensors.pop(name).tolist() for name in ("latents_mean", "latents_std")}
    vae = AutoencoderKLQwenImage(**VAE_CONFIG, **scale).eval()
    for name, parameter in vae.state_dict().items():
        parameter.zero_()
        (parameter[:, :, -1:] if parameter.ndim == 5 else parameter).copy_(tensors[name])
    channels = vae.config.z_dim
    vae.quant_conv.weight[channels:] = 0
    vae.quant_conv.bias[channels:] = VAE_LOGVAR
    return vae


def save_tiny(family: Family, folder: Path, *, texts: Iterable[str], variant: str = "", seed: int = 0) -> None:
    """Write a checkpoint of `family` in diffusers layout, all random but VAE and vocabulary, which has all of `texts`.

    Prompt embeddings are 96 wide, latents have 16 channels at 1/8 of the side. The same seed gives the same bytes.
    `variant`: "2511" has zero_cond_t; "learner" can learn in minutes, with few image tokens and initial weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer([*TEMPLATES, *texts])
        parts = {
            "scheduler": FlowMatchEulerDiscreteScheduler(**SCHEDULER),
            "vae": tiny_vae(),
            "text_encoder": _text_encoder(tokenizer),
            "tokenizer": tokenizer,
            "transformer": tiny_transformer(
                QwenImageTransformer2DModel,
                learner=variant == "learner",
                joint_attention_dim=96,
                zero_cond_t=variant == "2511",
            ),
        }
    if family.max_sources != 0:
        pixels = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * (16 if variant == "learner" else 128 * 128)}
        images, videos = Qwen2VLImageProcessor(**pixels), Qwen2VLVideoProcessor(**pixels)
        parts["processor"] = Qwen2VLProcessor(images, tokenizer, videos, chat_template=CHAT_TEMPLATE)
    getattr(diffusers, family.pipeline)(**parts).save_pretrained(folder)
