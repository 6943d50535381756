"""Qwen-Image-2.1 behind the protocol of `models/base.py`: text-to-image and edits of one image or several."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Self

import numpy as np
from PIL import Image
from transformers import Qwen3VLConfig, Qwen3VLProcessor

from hf_qie.errors import InputError
from hf_qie.models.base import Family, Grid, Size
from hf_qie.models.checkpoint import load_transformer
from hf_qie.models.denoising import shift_mu
from hf_qie.models.image_latents import vae_memory
from hf_qie.models.official import load_pipeline
from hf_qie.models.prompt_encoder import encoder_memory
from hf_qie.models.prompts import BadPrompt, Prompt, PromptLengths
from hf_qie.models.qwen_image_21.lora_keys import convert_lora
from hf_qie.models.qwen_image_21.packed import QwenImage21Transformer2DModel
from hf_qie.models.qwen_image_21.pipeline import Official, generate
from hf_qie.models.qwen_image_21.templates import LATENTS_PER_SLOT, TEMPLATE, as_read, num_dropped, template_of
from hf_qie.models.qwen_image_21.text_encoder import Encoder
from hf_qie.models.qwen_image_21.tiny import save_tiny
from hf_qie.models.qwen_image_21.transformer import (
    LORA_PRESETS,
    attention_pairs,
    denoise,
    predict,
    shares_prefix,
    without_gradient,
)
from hf_qie.models.qwen_image_21.vae import LatentEncoder
from hf_qie.models.templates import IMAGE_TOKEN, make_prompt, num_patches, prompt_lengths

MAX_POSITIONS = 8192  # of the transformer's table (diffusers/models/transformers/transformer_qwenimage21.py, Rope)
ASPECTS = np.geomspace(1 / 8, 8, 129)  # of images that we read
# the notice that clause 3.c of the licence asks for, and the words of 4.b, behind what 2 allows
LICENSE_NOTICE = (
    "For non-commercial purposes only, that is research or evaluation: commercial use needs a separate licence of the "
    "licensor. Built with Qwen. Qwen is licensed under the Qwen RESEARCH LICENSE AGREEMENT, Copyright (c) 2026 "
    "Hangzhou Tongyi Laboratory Technology Co., Ltd. All Rights Reserved."
)


@dataclass(frozen=True, kw_only=True)
class QwenImage21(Family):
    """One checkpoint for rows with and without sources."""

    pipeline: str = "QwenImage21Pipeline"
    text_to_image_pipeline: str = "QwenImage21Pipeline"
    transformer_class: str = "QwenImage21Transformer2DModel"
    max_sources: int | None = None
    vlm_area_px: int = 1024 * 1024
    vae_area_px: int = 1024 * 1024
    side_multiple_px: int = 32
    pixels_per_token: int = 16
    latent_width: int = 64
    unsupported: tuple[str, ...] = ()
    lora_presets: Mapping[str, Sequence[str]] = field(default_factory=lambda: LORA_PRESETS)
    unquantized: tuple[str, ...] = ("img_in", "txt_in", "time_text_embed", "norm_out", "proj_out")
    modulation: tuple[str, ...] = ("modulation",)
    card_name: str = "Qwen-Image-2.1"
    card_tags: tuple[str, ...] = ("qwen-image-2.1",)
    license_notice: str = LICENSE_NOTICE
    license_name: str = "qwen-research"
    license_link: str = "https://huggingface.co/Qwen/Qwen-Image-2.1/blob/main/LICENSE"
    # ComfyUI's model joins two layers of each block; its loader knows the halves by the names of diffusers, and not
    # with "diffusion_model." before them (comfy/lora.py, model_lora_keys_unet)
    comfyui_prefix: str = ""
    call_multiple_px: int = 32
    source_size_argument: str = "output_resolution"
    image_mode: str = "RGBA"
    prompt_columns: tuple[str, ...] = ("prefix_embeds", "image_slots")
    true_cfg_scale: float = 1.0

    # Defined in other modules. Plain functions are bound as methods are, and given the family as their first argument;
    # classes and static methods are not given it.
    generate = generate
    save_tiny = save_tiny
    load_vae = LatentEncoder
    load_encoder = Encoder
    load_transformer = staticmethod(partial(load_transformer, QwenImage21Transformer2DModel))
    vae_memory = staticmethod(partial(vae_memory, LatentEncoder))
    unpack = staticmethod(LatentEncoder.unpack)
    encoder_memory = staticmethod(partial(encoder_memory, Encoder))
    without_gradient = staticmethod(without_gradient)
    shares_prefix = staticmethod(shares_prefix)
    attention_pairs = staticmethod(attention_pairs)
    predict = staticmethod(predict)
    shift_mu = staticmethod(shift_mu)
    denoise = staticmethod(denoise)
    convert_lora = staticmethod(convert_lora)

    def with_source_size(self, side: int | None) -> Self:
        """See `Family`: the pipeline's `output_resolution`, at which encoder and VAE see one resized image."""
        return self if side is None else replace(self, vlm_area_px=side**2, vae_area_px=side**2)

    def load_processor(self, model: str, *, revision: str | None) -> Any:
        """The checkpoint's Qwen3VLProcessor; raises InputError where it would resize a source once more."""
        # by class: AutoProcessor needs a config.json at the root, which diffusers layout lacks
        processor = Qwen3VLProcessor.from_pretrained(model, subfolder="processor", revision=revision)
        num_dropped(processor)  # before threads ask for it
        config = Qwen3VLConfig.from_pretrained(model, subfolder="text_encoder", revision=revision)
        token = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if token != config.image_token_id:
            raise InputError(
                f"model: {IMAGE_TOKEN} is token {token} of the processor of {model}, {config.image_token_id} of its "
                "prompt encoder; fetch both folders again"
            )
        for aspect in ASPECTS:
            size = self.fit((aspect, 1), self.vlm_area_px)
            if num_patches(processor, size) * LATENTS_PER_SLOT != math.prod(self.grid_of(size)):
                raise InputError(
                    f"extract.source_sample_size: {math.isqrt(self.vlm_area_px)}: the processor of {model} resizes a "
                    f"source of {size[0]} x {size[1]} pixels once more, so that encoder and VAE would see images of "
                    "two sizes; its size has to be well between the processor's own least and largest, as sides are "
                    "rounded, and the processor that of the checkpoint"
                )
        return processor

    def make_prompt(self, processor: Any, sources: Sequence[Image.Image], captions: Sequence[str]) -> Prompt:
        """See `Family`."""
        images = [self.encoder_view(image) for image in sources]
        return make_prompt(processor, template_of(processor)(len(images)), images, list(map(as_read, captions)))

    def encoder_view(self, image: Image.Image) -> Image.Image:
        """An image as the encoder sees it: resized like the VAE's, with alpha if it has any, and then on white.

        diffusers/pipelines/qwenimage21/pipeline_qwenimage21.py:283-289 and 660-670.
        """
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        image = self.resize(image, self.fit(image.size, self.vlm_area_px))
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white

    def prompt_lengths(
        self, processor: Any, prompts: Sequence[tuple[Sequence[Size], Sequence[str]]]
    ) -> list[PromptLengths | BadPrompt]:
        """See `Family`."""
        resized = [
            ([self.fit(size, self.vlm_area_px) for size in sizes], list(map(as_read, captions)))
            for sizes, captions in prompts
        ]
        return prompt_lengths(processor, template_of(processor), resized)

    def most_tokens(self, source_grids: Sequence[Grid], target_grid: Grid) -> int:
        """Text and sources stand in front of the target: one position a token, one longest side a source."""
        return MAX_POSITIONS - 1 - sum(map(max, source_grids))

    def encoder_width(self, model: str, *, revision: str | None) -> int:
        """See `Family`."""
        config = Qwen3VLConfig.from_pretrained(model, subfolder="text_encoder", revision=revision)
        return config.text_config.hidden_size

    def widths(self, transformer_config: Mapping[str, Any]) -> tuple[int, int]:
        """See `Family`."""
        return transformer_config.get("in_channels"), transformer_config.get("context_in_dim")

    def sampling_sigmas(self, num_inference_steps: int, pipeline_config: Mapping[str, Any]) -> np.ndarray:
        """See `Family`; a distilled checkpoint names its own, however many steps are asked for."""
        own = pipeline_config.get("sample_sigmas")
        return super().sampling_sigmas(num_inference_steps, pipeline_config) if own is None else np.array(own)

    def load_pipeline(self, model: str, **where: Any) -> Any:
        """See `Family`; the processor stays, as the pipeline counts tokens when it is made."""
        return load_pipeline(self, model, without=("text_encoder",), **where)

    def load_official(self, model: str, **where: Any) -> Any:
        """See `Family`."""
        return Official(self, model, **where)

    @property
    def compat(self) -> dict[str, Any]:
        """Templates, what the encoder sees of a source, and what is stored of its embeddings.

        The encoder's area is that of the VAE, which a set names by itself.
        """
        template = asdict(TEMPLATE) | {"separator": TEMPLATE.separator, "drop": "its system message"}
        return {
            "family": "Qwen-Image-2.1",
            "templates": {"edit": template, "text_to_image": template | {"picture": ""}},
            "resampling": "lanczos",
            "alpha": "on white for the encoder, a channel for the VAE",
            "positions": "interleaved m-rope by token type",
            "embeddings": "before the final norm, without those of images",
        }

    @property
    def compat_folders(self) -> dict[str, tuple[str, ...]]:
        """See `Family`."""
        return {"encoder": ("text_encoder",), "processor": ("processor",), "vae": ("vae",)}


QWEN_IMAGE_21 = QwenImage21()
