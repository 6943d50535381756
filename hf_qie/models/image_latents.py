"""Images to latents as the pipelines make them: the mode of the VAE, normalised, packed.

Letters: B images, C channels of a packed latent, S packed tokens. A grid is (packed height, packed width).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from hf_qie.models.base import ForwardMemory, Grid, Size
from hf_qie.models.checkpoint import read_config
from hf_qie.runtime.memory_tracker import fake, forward_peak, num_bytes


class VaeLatents(ABC):
    """A checkpoint's VAE, between pixels and packed, normalised latents."""

    vae_class: ClassVar[Any]
    pixels_per_token: ClassVar[int]

    @staticmethod
    @abstractmethod
    def pack(latents: Tensor) -> Tensor:
        """Latents `[B, channels, height, width]` of the VAE to `[B, S, C]`."""

    @staticmethod
    @abstractmethod
    def unpack(latents: Tensor, grid: Grid) -> Tensor:
        """The other way."""

    def __init__(self, model: str, *, revision: str | None, dtype: torch.dtype, device: torch.device):
        self.vae = self.load(model, revision=revision, dtype=dtype, device=device)
        channels = (1, -1, 1, 1, 1)
        self.mean = torch.tensor(self.vae.config.latents_mean, dtype=dtype, device=device).view(channels)
        self.std = torch.tensor(self.vae.config.latents_std, dtype=dtype, device=device).view(channels)

    def load(self, model: str, *, revision: str | None, dtype: torch.dtype, device: torch.device) -> Any:
        """The weights of the checkpoint."""
        vae = self.vae_class.from_pretrained(
            model, subfolder="vae", revision=revision, dtype=dtype, use_safetensors=True
        )
        return vae.to(device).eval().requires_grad_(False)

    @torch.inference_mode()
    def __call__(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        """Packed latents `[S, C]` of images `[channels, H, W]` in [-1, 1], all of one size.

        The mode of the posterior, as the pipelines take it for sources: a stored sample would be one noise for ever.
        """
        batch = torch.stack(list(pixels)).to(self.mean.device, self.mean.dtype)[:, :, None]
        # `vae.encode` also keeps the input of every layer for a next frame: 0.8 GB at 1024 x 1024
        mode, _ = self.vae.quant_conv(self.vae.encoder(batch)).chunk(2, dim=1)
        latents = (mode - self.mean) / self.std
        return list(self.pack(latents[:, :, 0]))

    def decode(self, latents: Tensor, grid: Grid) -> Image.Image:
        """The image of packed latents `[S, C]`, as the pipelines decode it."""
        return Image.fromarray(self.pixels(latents, grid).cpu().numpy())

    @torch.inference_mode()
    def pixels(self, latents: Tensor, grid: Grid) -> Tensor:
        """The same on the device, `[H, W, channels]` uint8."""
        unpacked = self.unpack(latents[None], grid)[:, :, None].to(self.mean.device, self.mean.dtype)
        pixels = self.vae.decode(unpacked * self.std + self.mean, return_dict=False)[0][0, :, 0]
        values = (pixels.float() / 2 + 0.5).clamp(0, 1).permute(1, 2, 0) * 255
        return values.round().to(torch.uint8)


def vae_memory(
    kind: type[VaeLatents],
    model: str,
    *,
    revision: str | None,
    dtype: torch.dtype,
    size: Size,
    batch_size: int,
    decodes: bool = False,
) -> ForwardMemory:
    """What encoding `batch_size` images of one size takes on its device, or decoding one; no weight is read."""

    class FakeVae(kind):
        """Of the checkpoint's config, with fake weights on the CPU."""

        def load(self, model: str, *, revision: str | None, dtype: torch.dtype, device: torch.device) -> Any:
            with torch.device("meta"):
                vae = self.vae_class.from_config(read_config(model, "vae/config.json", revision=revision))
                return fake(nn.Module.to(vae, dtype))  # diffusers' own `to` warns

    vae = FakeVae(model, revision=revision, dtype=dtype, device=torch.device("cpu"))
    weights, (width, height) = num_bytes(vae.vae), size
    images = [torch.empty(vae.vae.config.get("in_channels", 3), height, width)] * batch_size
    activations = forward_peak(vae, images) if batch_size else 0
    if decodes:
        grid = height // vae.pixels_per_token, width // vae.pixels_per_token
        one_token = vae.pack(torch.empty(1, vae.vae.config.z_dim, 2, 2)).shape[-1]
        latents = torch.empty(grid[0] * grid[1], one_token)
        activations = max(activations, forward_peak(lambda one: vae.pixels(one, grid), latents))
    return ForwardMemory(weights=weights, least_weights=weights, activations=activations)
