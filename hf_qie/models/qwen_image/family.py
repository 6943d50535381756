"""Qwen-Image, Qwen-Image-Edit and Qwen-Image-Edit-Plus: templates and sizes, as their pipelines have them."""

from dataclasses import dataclass

from hf_qie.models.base import Family


@dataclass(frozen=True, kw_only=True)
class Template:
    """The chat text around a caption: `before`, one `picture` a source, the caption, `after`."""

    before: str
    picture: str  # may hold {number}, which counts from 1
    after: str
    drop: int  # tokens of `before`, whose embeddings the pipelines cut off

    def shared(self, num_sources: int) -> str:
        """The part that stands before every caption of the same sources."""
        return self.before + "".join(self.picture.format(number=i + 1) for i in range(num_sources))


@dataclass(frozen=True, kw_only=True)
class QwenImage(Family):
    """One generation of Qwen-Image."""

    edit: Template | None  # None: the checkpoint takes no sources
    text_to_image: Template
    unsupported: tuple[str, ...] = ("use_layer3d_rope", "use_additional_t_cond", "guidance_embeds")

    def template(self, num_sources: int) -> Template:
        """The template for a row with that many sources."""
        if num_sources == 0:
            return self.text_to_image
        assert self.edit is not None, "rows with sources are refused before a text-to-image checkpoint sees them"
        return self.edit


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

EDIT_PLUS = QwenImage(
    pipeline="QwenImageEditPlusPipeline",
    edit=EDIT_PLUS_TEMPLATE,
    text_to_image=TEXT_TO_IMAGE_TEMPLATE,
    vlm_area_px=384 * 384,
    vae_area_px=1024 * 1024,
    max_sources=None,
)
EDIT = QwenImage(
    pipeline="QwenImageEditPipeline",
    edit=EDIT_TEMPLATE,
    text_to_image=TEXT_TO_IMAGE_TEMPLATE,
    vlm_area_px=1024 * 1024,
    vae_area_px=1024 * 1024,
    max_sources=1,
)
TEXT_TO_IMAGE = QwenImage(
    pipeline="QwenImagePipeline",
    edit=None,
    text_to_image=TEXT_TO_IMAGE_TEMPLATE,
    vlm_area_px=1024 * 1024,
    vae_area_px=1024 * 1024,
    max_sources=0,
)
