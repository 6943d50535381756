"""What hf_qie asks of a family of models. A family is one folder beside this module and its lines in `FAMILIES`.

Letters: B rows, L prompt tokens, D width of the encoder, S tokens of the target, C width of a packed latent.
A grid is (height, width) in tokens, a size (width, height) in pixels.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from hf_qie.errors import InputError
from hf_qie.models.checkpoint import read_config
from hf_qie.models.prompts import BadPrompt, Prompt, PromptEmbeddings, PromptLengths

# By the pipeline class that a checkpoint's model_index.json names; imported when a checkpoint needs it.
FAMILIES = {
    "QwenImageEditPlusPipeline": "hf_qie.models.qwen_image.family:EDIT_PLUS",
    "QwenImageEditPipeline": "hf_qie.models.qwen_image.family:EDIT",
    "QwenImagePipeline": "hf_qie.models.qwen_image.family:TEXT_TO_IMAGE",
    "QwenImage21Pipeline": "hf_qie.models.qwen_image_21.family:QWEN_IMAGE_21",
}
NOTICE = "NOTICE"  # the file with `license_notice`, beside what was made of the model
FIRST = "Qwen-Image-Edit"  # the family of sets from before `compat` named it
Grid = tuple[int, int]
Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class ForwardMemory:
    """Bytes that a model takes on its device when it runs without gradients."""

    weights: int
    least_weights: int  # of them, with all that can wait in CPU memory there
    activations: int  # at the peak of a pass


@dataclass(frozen=True, kw_only=True)
class Family(ABC):
    """One generation of models: its facts, and what its pipeline does to prompts, images and latents."""

    pipeline: str  # name of its class in diffusers
    text_to_image_pipeline: str  # the same, of the one that needs no source
    transformer_class: str  # the same
    max_sources: int | None  # None: any number; 0: text-to-image alone
    vlm_area_px: int  # what the prompt encoder sees of a source
    vae_area_px: int  # what the VAE sees of a source
    side_multiple_px: int  # of an image that the VAE sees
    pixels_per_token: int  # a side of the image behind one latent token
    latent_width: int  # C
    unsupported: tuple[str, ...]  # flags of a transformer's config that we do not train
    lora_presets: Mapping[str, Sequence[str]]  # ends of names of linear layers, by `trainable.lora.target_modules`
    unquantized: tuple[str, ...]  # parts of names of layers that stay as they are when a base is quantised
    modulation: tuple[str, ...]  # the same, of layers that are quantised with the least error
    card_name: str  # in cards
    card_tags: tuple[str, ...]
    license_notice: str = ""  # of a model with a restricted licence; goes with what is made of it
    license_name: str = ""  # of that licence, as the Hub's cards have it beside `license: other`
    license_link: str = ""  # the same
    comfyui_prefix: str = "diffusion_model."  # of the names of layers in ComfyUI's LoRA files
    call_multiple_px: int = 16  # to which the pipeline's call cuts height and width
    source_size_argument: str = ""  # of the pipeline's call, by the side of sources; "": it has none
    image_mode: str = "RGB"  # of images as the VAE sees them, in Pillow's words
    prompt_columns: tuple[str, ...] = ("image_embeds",)  # of a set, beside those that all families have
    true_cfg_scale: float = 4.0  # the pipeline's own

    # --- images and sizes ---

    @property
    def one_resize(self) -> bool:
        """True where the pipeline hands one resized image to both encoder and VAE."""
        return self.vlm_area_px == self.vae_area_px

    def with_source_size(self, side: int | None) -> Self:
        """The family with sources of `side` squared pixels, by `extract.source_sample_size`; None: its own.

        Raises InputError where the pipeline allows no other.
        """
        if side is None or side**2 == self.vae_area_px:
            return self
        if self.one_resize:
            hands = f"hands one image of {self.vae_area_px:,} pixels to encoder and VAE"
            raise InputError(
                f"extract.source_sample_size: {side}: {self.pipeline} "
                f"{'takes no sources' if self.max_sources == 0 else hands}; leave it null"
            )
        return replace(self, vae_area_px=side**2)

    def fit(self, size: Size, area_px: int) -> Size:
        """The size with the aspect of `size`, about `area_px` in area, sides multiples of `side_multiple_px`.

        The pipelines' `calculate_dimensions` (diffusers/pipelines/qwenimage/pipeline_qwenimage_edit_plus.py:158).
        """
        ratio, step = size[0] / size[1], self.side_multiple_px
        width = math.sqrt(area_px * ratio)
        return round(width / step) * step, round(width / ratio / step) * step

    def resize(self, image: Image.Image, size: Size) -> Image.Image:
        """As the pipelines' `VaeImageProcessor.resize`: LANCZOS, no crop."""
        return image.resize(size, Image.Resampling.LANCZOS)

    def grid_of(self, size: Size) -> Grid:
        """The latent grid of an image of that size."""
        return size[1] // self.pixels_per_token, size[0] // self.pixels_per_token

    @abstractmethod
    def load_vae(self, model: str, *, revision: str | None, dtype: torch.dtype, device: torch.device) -> Any:
        """Callable: images `[channels, H, W]` in [-1, 1] of one size -> packed latents `[S, C]` of each.

        `.decode(latents, grid)` gives the image of one.
        """

    @abstractmethod
    def vae_memory(
        self,
        model: str,
        *,
        revision: str | None,
        dtype: torch.dtype,
        size: Size,
        batch_size: int,
        decodes: bool = False,
    ) -> ForwardMemory:
        """What encoding `batch_size` images of `size`, which may be 0, or decoding one takes, by the VAE's config."""

    @abstractmethod
    def unpack(self, latents: Tensor, grid: Grid) -> Tensor:
        """Packed latents `[B, S, C]` as the VAE has them, `[B, channels, height, width]`."""

    # --- prompts ---

    @abstractmethod
    def load_processor(self, model: str, *, revision: str | None) -> Any:
        """What makes tokens and the encoder's view of images; raises InputError where it is not the family's."""

    @abstractmethod
    def make_prompt(self, processor: Any, sources: Sequence[Image.Image], captions: Sequence[str]) -> Prompt:
        """Tokens and images for `captions` over `sources` of any size; raises BadPrompt. Thread-safe."""

    @abstractmethod
    def prompt_lengths(
        self, processor: Any, prompts: Sequence[tuple[Sequence[Size], Sequence[str]]]
    ) -> list[PromptLengths | BadPrompt]:
        """What `make_prompt` would give for (sizes of sources, captions), without an image."""

    @abstractmethod
    def most_tokens(self, source_grids: Sequence[Grid], target_grid: Grid) -> int:
        """Prompt embeddings that the transformer can place beside latents of these grids; none is cut."""

    @abstractmethod
    def encoder_width(self, model: str, *, revision: str | None) -> int:
        """D, by the config of the encoder."""

    @abstractmethod
    def load_encoder(
        self,
        model: str,
        *,
        revision: str | None,
        dtype: torch.dtype,
        device: torch.device,
        room_bytes: float = math.inf,
    ) -> Any:
        """Callable: prompts -> their PromptEmbeddings; `.width` is D, `.device` where it lies.

        Of its weights at most `room_bytes` are on the device, and at least `encoder_memory(...).least_weights`.
        """

    @abstractmethod
    def encoder_memory(
        self, model: str, *, revision: str | None, dtype: torch.dtype, prompts: Sequence[Prompt]
    ) -> ForwardMemory:
        """What a pass over `prompts` takes, by the config of the encoder."""

    # --- the transformer ---

    @abstractmethod
    def widths(self, transformer_config: Mapping[str, Any]) -> tuple[int, int]:
        """Widths of the latents and of the embeddings that a transformer of that config takes."""

    @abstractmethod
    def load_transformer(self, model: str, *, revision: str | None, dtype: torch.dtype, empty: bool = False) -> Any:
        """On the CPU; an `empty` one is its shapes on the meta device. Raises InputError where it cannot be loaded."""

    @abstractmethod
    def without_gradient(self, transformer: nn.Module) -> Sequence[str]:
        """Parts of names of the parameters that no gradient reaches; left to train, they would stall DDP."""

    def shares_prefix(self, transformer_config: Mapping[str, Any]) -> bool:
        """Whether what the transformer makes of prompt and sources depends on neither noise level nor target."""
        return False

    def attention_pairs(
        self,
        grids: Sequence[Grid],
        prompt_lengths: Sequence[int],
        image_slots: Sequence[Sequence[int]],
        num_targets: int,
    ) -> int:
        """Pairs of a query and a key that attention takes in a batch with K = `num_targets`; none of padding.

        By default each token of a row sees all of it.
        """
        num_latents = sum(map(math.prod, grids))
        return num_targets * sum((num_latents + length) ** 2 for length in prompt_lengths)

    @abstractmethod
    def predict(self, model: nn.Module, batch: Mapping[str, Any], noised: Tensor, sigma: Tensor) -> Tensor:
        """The velocity `[B x K, S, C]` in `noised[B x K, S, C]` at `sigma[B x K]`; `batch` is data/collate.py's.

        The K noised targets of a row follow each other; K is 1 unless the family shares the prefix among them.
        """

    @abstractmethod
    def shift_mu(self, num_target_tokens: int, scheduler_config: Mapping[str, Any]) -> float:
        """The shift of the scheduler at that size."""

    def sampling_sigmas(self, num_inference_steps: int, pipeline_config: Mapping[str, Any]) -> np.ndarray:
        """The noise levels at which the pipeline calls the model, before the scheduler shifts them.

        `pipeline_config`: `model_index.json`. diffusers/pipelines/qwenimage/pipeline_qwenimage_edit_plus.py:750.
        """
        return np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)

    @abstractmethod
    def denoise(
        self, model: nn.Module, batch: Mapping[str, Any], negative: Mapping[str, Any], **options: Any
    ) -> Tensor:
        """Latents `[1, S, C]` that the pipeline would make of a batch of one row; `negative`: with its other prompt.

        `options`: scheduler_config, sigmas (`sampling_sigmas`), true_cfg_scale, seed.
        """

    @abstractmethod
    def convert_lora(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Diffusers' keys for those of ComfyUI (`diffusion_model.`) and kohya (`lora_unet_`), alpha multiplied in."""

    # --- the official pipeline ---

    @abstractmethod
    def load_pipeline(self, model: str, *, revision: str | None, transformer: Path | None, dtype: torch.dtype) -> Any:
        """Without its prompt encoder; `transformer`: the folder of another one than the model's."""

    @abstractmethod
    def generate(
        self, pipeline: Any, embeddings: PromptEmbeddings, images: Sequence[Image.Image], **options: Any
    ) -> Image.Image:
        """What the pipeline makes of `images` by embeddings of the instruction and of the negative prompt.

        `options`: size, true_cfg_scale, generator and, if not its own number, num_inference_steps.
        """

    @abstractmethod
    def load_official(
        self, model: str, *, revision: str | None, dtype: torch.dtype, device: torch.device, offload: bool = False
    ) -> Any:
        """With no code of ours: `.embeddings(caption, sources)`, `.sides(image, area_px)`, `.latents`, `.grid`.

        With `offload` the encoder's weights are in CPU memory and copied in for each pass.
        """

    # --- what a set depends on ---

    @property
    @abstractmethod
    def compat(self) -> dict[str, Any]:
        """What of the family decides the numbers of an embedding set, as JSON holds it."""

    @property
    @abstractmethod
    def compat_folders(self) -> dict[str, tuple[str, ...]]:
        """Folders of a checkpoint whose files decide them: of the encoder, the processor and the VAE."""

    @abstractmethod
    def save_tiny(self, folder: Path, *, texts: Iterable[str], variant: str = "", seed: int = 0) -> None:
        """Write a tiny checkpoint for tests and the demo, with random weights and a vocabulary of `texts`."""


def families() -> Iterator[Family]:
    """All that are registered."""
    return map(family_of, FAMILIES)


def family_of(pipeline: str) -> Family:
    """The family of a pipeline class of diffusers, one of `FAMILIES`."""
    return resolve_name(FAMILIES[pipeline])


def family_name(compat: Mapping[str, Any]) -> str:
    """The `card_name` of the family that a set was made for, by its `compat`."""
    return compat.get("family", FIRST)


def read_family(model: str, *, revision: str | None = None) -> Family:
    """The family of a checkpoint, by the pipeline class in its `model_index.json`.

    Raises InputError for a pipeline, or a transformer, that we do not train.
    """
    pipeline = read_config(model, "model_index.json", revision=revision).get("_class_name")
    if pipeline not in FAMILIES:
        raise InputError(f"model: {model} is a {pipeline}; hf_qie trains {', '.join(FAMILIES)}")
    family = family_of(pipeline)
    transformer = read_config(model, "transformer/config.json", revision=revision)
    for flag in family.unsupported:
        if transformer.get(flag):
            raise InputError(f"model: the transformer of {model} has {flag}, which hf_qie does not train")
    return family
