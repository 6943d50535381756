"""Qwen-Image, Qwen-Image-Edit and Qwen-Image-Edit-Plus behind the protocol of `models/base.py`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from diffusers.loaders.lora_pipeline import QwenImageLoraLoaderMixin
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2VLProcessor

from hf_qie.errors import InputError
from hf_qie.models.base import Family, Grid, Size
from hf_qie.models.denoising import shift_mu
from hf_qie.models.image_latents import vae_memory
from hf_qie.models.official import load_pipeline
from hf_qie.models.prompt_encoder import encoder_memory
from hf_qie.models.prompts import BadPrompt, Prompt, PromptLengths
from hf_qie.models.qwen_image.pipeline import Official, generate
from hf_qie.models.qwen_image.text_encoder import Encoder
from hf_qie.models.qwen_image.tiny import save_tiny
from hf_qie.models.qwen_image.transformer import (
    LORA_PRESETS,
    denoise,
    load_transformer,
    predict,
    without_gradient,
)
from hf_qie.models.qwen_image.vae import LatentEncoder
from hf_qie.models.templates import Template, make_prompt, prompt_lengths, tokenizer_of

MAX_POSITIONS = 4096  # of the transformer's RoPE table (diffusers/models/transformers/transformer_qwenimage.py:244)
MAX_TEXT_TO_IMAGE_TOKENS = 1024  # QwenImagePipeline cuts there

CHAT = "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"
AFTER = "<|im_end|>\n<|im_start|>assistant\n"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
# diffusers/pipelines/qwenimage/pipeline_qwenimage.py:175
DESCRIBE = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:"
)
# diffusers/pipelines/qwenimage/pipeline_qwenimage_edit.py:212, and the same in pipeline_qwenimage_edit_plus.py
ALTER = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain "
    "how the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate."
)
TEXT_TO_IMAGE_TEMPLATE = Template(before=CHAT.format(system=DESCRIBE), picture="", after=AFTER, drop=34)
EDIT_TEMPLATE = Template(before=CHAT.format(system=ALTER), picture=IMAGE, after=AFTER, drop=64)
EDIT_PLUS_TEMPLATE = Template(
    before=CHAT.format(system=ALTER), picture="Picture {number}: " + IMAGE, after=AFTER, drop=64
)


def check_drop(tokenizer: Any, template: Template) -> None:
    """Raise InputError unless `tokenizer` gives the start of `template` as many tokens as the pipelines cut off."""
    num_tokens = len(tokenizer(template.before)["input_ids"])
    if num_tokens != template.drop:
        raise InputError(
            f"model: its tokenizer gives {num_tokens} tokens for the system text, the pipelines cut off "
            f"{template.drop}; this is not the vocabulary of Qwen2.5-VL"
        )


@dataclass(frozen=True, kw_only=True)
class QwenImage(Family):
    """One generation of Qwen-Image."""

    edit: Template | None  # None: the checkpoint takes no sources
    text_to_image: Template = TEXT_TO_IMAGE_TEMPLATE
    text_to_image_pipeline: str = "QwenImagePipeline"
    transformer_class: str = "QwenImageTransformer2DModel"
    side_multiple_px: int = 32
    pixels_per_token: int = 16  # 8 by the VAE, 2 by packing
    latent_width: int = 64
    unsupported: tuple[str, ...] = ("use_layer3d_rope", "use_additional_t_cond", "guidance_embeds")
    lora_presets: Mapping[str, Sequence[str]] = field(default_factory=lambda: LORA_PRESETS)
    unquantized: tuple[str, ...] = ("img_in", "txt_in", "time_text_embed", "norm_out", "proj_out")
    modulation: tuple[str, ...] = ("img_mod", "txt_mod")
    card_name: str = "Qwen-Image-Edit"
    card_tags: tuple[str, ...] = ("qwen-image-edit",)

    # Defined in other modules. Plain functions are bound as methods are, and given the family as their first argument;
    # classes and static methods are not given it.
    generate = generate
    save_tiny = save_tiny
    load_vae = LatentEncoder
    load_encoder = Encoder
    load_transformer = staticmethod(load_transformer)
    vae_memory = staticmethod(partial(vae_memory, LatentEncoder))
    unpack = staticmethod(LatentEncoder.unpack)
    encoder_memory = staticmethod(partial(encoder_memory, Encoder))
    without_gradient = staticmethod(without_gradient)
    predict = staticmethod(predict)
    shift_mu = staticmethod(shift_mu)
    denoise = staticmethod(denoise)
    convert_lora = staticmethod(QwenImageLoraLoaderMixin.lora_state_dict)

    def template(self, num_sources: int) -> Template:
        """The template for a row with that many sources."""
        if num_sources == 0:
            return self.text_to_image
        assert self.edit is not None, "rows with sources are refused before a text-to-image checkpoint sees them"
        return self.edit

    def load_processor(self, model: str, *, revision: str | None) -> Any:
        """The checkpoint's Qwen2VLProcessor, or its tokenizer where the family takes no images."""
        if self.edit is None:
            processor = AutoTokenizer.from_pretrained(model, subfolder="tokenizer", revision=revision)
        else:  # by class: AutoProcessor needs a config.json at the root, which diffusers layout lacks
            processor = Qwen2VLProcessor.from_pretrained(model, subfolder="processor", revision=revision)
        for template in filter(None, (self.edit, self.text_to_image)):
            check_drop(tokenizer_of(processor), template)
        return processor

    def make_prompt(self, processor: Any, sources: Sequence[Image.Image], captions: Sequence[str]) -> Prompt:
        """See `Family`."""
        images = [self.resize(image, self.fit(image.size, self.vlm_area_px)) for image in sources]
        return make_prompt(processor, self.template(len(images)), images, captions)

    def prompt_lengths(
        self, processor: Any, prompts: Sequence[tuple[Sequence[Size], Sequence[str]]]
    ) -> list[PromptLengths | BadPrompt]:
        """See `Family`."""
        resized = [([self.fit(size, self.vlm_area_px) for size in sizes], captions) for sizes, captions in prompts]
        return prompt_lengths(processor, self.template, resized)

    def most_tokens(self, source_grids: Sequence[Grid], target_grid: Grid) -> int:
        """The text's positions begin behind half of the longest side (transformer_qwenimage.py, QwenEmbedRope)."""
        longest = max(side for grid in (*source_grids, target_grid) for side in grid)
        return MAX_POSITIONS - longest // 2 if source_grids else MAX_TEXT_TO_IMAGE_TOKENS

    def encoder_width(self, model: str, *, revision: str | None) -> int:
        """See `Family`."""
        config = Qwen2_5_VLConfig.from_pretrained(model, subfolder="text_encoder", revision=revision)
        return config.text_config.hidden_size

    def widths(self, transformer_config: Mapping[str, Any]) -> tuple[int, int]:
        """See `Family`."""
        return transformer_config.get("in_channels"), transformer_config.get("joint_attention_dim")

    def load_pipeline(self, model: str, **where: Any) -> Any:
        """See `Family`."""
        processor = () if self.max_sources == 0 else ("processor",)
        return load_pipeline(self, model, without=("text_encoder", "tokenizer", *processor), **where)

    def load_official(self, model: str, **where: Any) -> Any:
        """See `Family`."""
        return Official(self, model, **where)

    @property
    def compat(self) -> dict[str, Any]:
        """Templates, and what the encoder sees of a source."""
        templates = {"edit": self.edit, "text_to_image": self.text_to_image}
        return {
            "templates": {name: asdict(template) for name, template in templates.items() if template},
            "vlm_area_px": self.vlm_area_px,
            "resampling": "lanczos",
            "positions": "m-rope by token type",
        }

    @property
    def compat_folders(self) -> dict[str, tuple[str, ...]]:
        """See `Family`."""
        processor = ("processor", "tokenizer") if self.edit else ("tokenizer",)
        return {"encoder": ("text_encoder",), "processor": processor, "vae": ("vae",)}


EDIT_PLUS = QwenImage(
    pipeline="QwenImageEditPlusPipeline",
    edit=EDIT_PLUS_TEMPLATE,
    vlm_area_px=384 * 384,
    vae_area_px=1024 * 1024,
    max_sources=None,
)
EDIT = QwenImage(
    pipeline="QwenImageEditPipeline",
    edit=EDIT_TEMPLATE,
    vlm_area_px=1024 * 1024,
    vae_area_px=1024 * 1024,
    max_sources=1,
)
TEXT_TO_IMAGE = QwenImage(
    pipeline="QwenImagePipeline",
    edit=None,
    vlm_area_px=1024 * 1024,
    vae_area_px=1024 * 1024,
    max_sources=0,
)
