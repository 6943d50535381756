"""All that is particular to one generation of Qwen-Image, read from the checkpoint's configs, never from a switch."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from hf_qie.config.recipe import Recipe
from hf_qie.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Template:
    """The chat text around a caption: `before`, one `picture` a source, the caption, `after`."""

    before: str
    picture: str  # may hold {number}, which counts from 1
    after: str
    drop: int  # tokens of `before`, whose states the pipelines cut off

    def shared(self, num_sources: int) -> str:
        """The part that stands before every caption of the same sources."""
        return self.before + "".join(self.picture.format(number=i + 1) for i in range(num_sources))


@dataclass(frozen=True, kw_only=True)
class Family:
    """What a checkpoint's pipeline does to its inputs; areas are those of `calculate_dimensions`."""

    pipeline: str
    edit: Template | None  # None: the checkpoint takes no sources
    text_to_image: Template
    vlm_area_px: int  # what the prompt encoder sees of a source
    vae_area_px: int  # what the VAE sees of a source
    max_sources: int | None  # None: any number

    @property
    def one_resize(self) -> bool:
        """True where the pipeline hands one resized picture to both encoder and VAE (Edit v1)."""
        return self.vlm_area_px == self.vae_area_px

    def template(self, num_sources: int) -> Template:
        """The template for a row with that many sources."""
        if num_sources == 0:
            return self.text_to_image
        assert self.edit is not None, "rows with sources are refused before a text-to-image checkpoint sees them"
        return self.edit


CHAT = "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"
AFTER = "<|im_end|>\n<|im_start|>assistant\n"
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
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
TEXT_TO_IMAGE = Template(before=CHAT.format(system=DESCRIBE), picture="", after=AFTER, drop=34)
EDIT = Template(before=CHAT.format(system=ALTER), picture=PICTURE, after=AFTER, drop=64)
EDIT_PLUS = Template(before=CHAT.format(system=ALTER), picture="Picture {number}: " + PICTURE, after=AFTER, drop=64)

FAMILIES = {
    family.pipeline: family
    for family in (
        Family(
            pipeline="QwenImageEditPlusPipeline",
            edit=EDIT_PLUS,
            text_to_image=TEXT_TO_IMAGE,
            vlm_area_px=384 * 384,
            vae_area_px=1024 * 1024,
            max_sources=None,
        ),
        Family(
            pipeline="QwenImageEditPipeline",
            edit=EDIT,
            text_to_image=TEXT_TO_IMAGE,
            vlm_area_px=1024 * 1024,
            vae_area_px=1024 * 1024,
            max_sources=1,
        ),
        Family(
            pipeline="QwenImagePipeline",
            edit=None,
            text_to_image=TEXT_TO_IMAGE,
            vlm_area_px=1024 * 1024,
            vae_area_px=1024 * 1024,
            max_sources=0,
        ),
    )
}


@contextmanager
def from_hub(model: str) -> Iterator[None]:
    """Raise what goes wrong with the Hub's repository `model` as InputError."""
    try:
        yield
    except HFValidationError as error:
        raise InputError(
            f"model: {model!r} is neither a folder here nor a Hub id like Qwen/Qwen-Image-Edit-2509"
        ) from error
    except LocalEntryNotFoundError as error:
        raise InputError(
            f"model: {model!r} is no folder here, as a Hub id not in the local cache, and the Hub is out of reach"
        ) from error
    except EntryNotFoundError as error:
        raise InputError(f"model: the Hub's {model} is not in diffusers layout ({error})") from error
    except HfHubHTTPError as error:
        raise InputError(f"model: {model!r} is no folder here, and the Hub refuses it ({error})") from error


def checkpoint_file(model: str, name: str, *, revision: str | None = None) -> Path:
    """A file of the checkpoint, from the folder `model` or the Hub (cached); raises InputError where there is none."""
    if not Path(model).is_dir():
        with from_hub(model):
            return Path(hf_hub_download(model, name, revision=revision))
    path = Path(model, name)
    if not path.is_file():
        raise InputError(f"model: {path} does not exist; {model} has to be a folder in diffusers layout")
    return path


def read_config(model: str, name: str, *, revision: str | None = None) -> dict[str, Any]:
    """One JSON config of the checkpoint, as `transformer/config.json`."""
    path = checkpoint_file(model, name, revision=revision)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"model: {path} is no JSON ({error})") from error
    if not isinstance(config, dict):
        raise InputError(f"model: {path} holds no names and values")
    return config


def check_steps(num_inference_steps: int, recipe: Recipe, at: str) -> None:
    """Raise InputError where the scheduler of the recipe's model cannot sample in so many steps.

    With `shift_terminal` it divides by the distance of the last step from the first, which is 0 where they are one:
    diffusers/schedulers/scheduling_flow_match_euler_discrete.py, stretch_shift_to_terminal.
    """
    scheduler = read_config(recipe.model, "scheduler/scheduler_config.json", revision=recipe.revision)
    if num_inference_steps < 2 and scheduler.get("shift_terminal"):
        raise InputError(
            f"{at}: got {num_inference_steps}, wanted at least 2: the scheduler of {recipe.model} has a "
            "shift_terminal, and so no schedule of one step"
        )


def read_family(model: str, *, revision: str | None = None) -> Family:
    """The family of a checkpoint, by the pipeline class in its `model_index.json`.

    Raises InputError for a pipeline, or a transformer, that we do not train.
    """
    pipeline = read_config(model, "model_index.json", revision=revision).get("_class_name")
    if pipeline not in FAMILIES:
        raise InputError(f"model: {model} is a {pipeline}; hf_qie trains {', '.join(FAMILIES)}")
    transformer = read_config(model, "transformer/config.json", revision=revision)
    for flag in ("use_layer3d_rope", "use_additional_t_cond", "guidance_embeds"):
        if transformer.get(flag):
            raise InputError(f"model: the transformer of {model} has {flag}, which hf_qie does not train")
    return FAMILIES[pipeline]
