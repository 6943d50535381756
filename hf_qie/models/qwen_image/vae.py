"""Images to latents as the pipelines make them: VAE mode, normalised, packed in patches of 2 x 2.

Letters: B images, C latent channels (16), S packed tokens (H/16 x W/16). A grid is (packed height, packed width).
"""

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKLQwenImage
from PIL import Image
from torch import Tensor, nn

from hf_qie.models.base import ForwardMemory, Grid, Size
from hf_qie.models.checkpoint import read_config
from hf_qie.runtime.memory_tracker import fake, forward_peak, num_bytes


def unpack_latents(latents: Tensor, grid: Grid) -> Tensor:
    """`[B, S, 4C]` of a packed `grid` back to `[B, C, H, W]`."""
    (h, w), (b, _, c) = grid, latents.shape
    return latents.view(b, h, w, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, 2 * h, 2 * w)


def pack_latents(latents: Tensor) -> Tensor:
    """`[B, C, H, W]` to `[B, H/2 x W/2, 4C]` (diffusers/pipelines/qwenimage/pipeline_qwenimage_edit_plus.py:388)."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, (h // 2) * (w // 2), 4 * c)


class LatentEncoder:
    """The checkpoint's VAE, between pixels and packed, normalised latents."""

    def __init__(self, model: str, *, revision: str | None, dtype: torch.dtype, device: torch.device):
        self.vae = self.load(model, revision=revision, dtype=dtype, device=device)
        channels = (1, -1, 1, 1, 1)
        self.mean = torch.tensor(self.vae.config.latents_mean, dtype=dtype, device=device).view(channels)
        self.std = torch.tensor(self.vae.config.latents_std, dtype=dtype, device=device).view(channels)

    def load(
        self, model: str, *, revision: str | None, dtype: torch.dtype, device: torch.device
    ) -> AutoencoderKLQwenImage:
        """The weights of the checkpoint."""
        vae = AutoencoderKLQwenImage.from_pretrained(
            model, subfolder="vae", revision=revision, dtype=dtype, use_safetensors=True
        )
        return vae.to(device).eval().requires_grad_(False)

    @torch.inference_mode()
    def __call__(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        """Packed latents `[S, 4C]` of images `[3, H, W]` in [-1, 1], all of one size.

        The mode of the posterior, as the pipelines take it for sources: a stored sample would be one noise for ever.
        """
        batch = torch.stack(list(pixels)).to(self.mean.device, self.mean.dtype)[:, :, None]
        # `vae.encode` also keeps the input of every layer for a next frame: 0.8 GB at 1024 x 1024
        mode, _ = self.vae.quant_conv(self.vae.encoder(batch)).chunk(2, dim=1)
        latents = (mode - self.mean) / self.std
        return list(pack_latents(latents[:, :, 0]))

    def decode(self, latents: Tensor, grid: Grid) -> Image.Image:
        """The image of packed latents `[S, 4C]`, as the pipelines decode it."""
        return Image.fromarray(self.pixels(latents, grid).cpu().numpy())

    @torch.inference_mode()
    def pixels(self, latents: Tensor, grid: Grid) -> Tensor:
        """The same on the device, `[H, W, 3]` uint8."""
        unpacked = unpack_latents(latents[None], grid)[:, :, None].to(self.mean.device, self.mean.dtype)
        pixels = self.vae.decode(unpacked * self.std + self.mean, return_dict=False)[0][0, :, 0]
        values = (pixels.float() / 2 + 0.5).clamp(0, 1).permute(1, 2, 0) * 255
        return values.round().to(torch.uint8)


class FakeLatentEncoder(LatentEncoder):
    """Of the checkpoint's config, with fake weights."""

    def load(
        self, model: str, *, revision: str | None, dtype: torch.dtype, device: torch.device
    ) -> AutoencoderKLQwenImage:
        """See `LatentEncoder`; on the CPU."""
        with torch.device("meta"):
            vae = AutoencoderKLQwenImage.from_config(read_config(model, "vae/config.json", revision=revision))
            return fake(nn.Module.to(vae, dtype))  # diffusers' own `to` warns


def vae_memory(
    model: str, *, revision: str | None, dtype: torch.dtype, size: Size, batch_size: int, decodes: bool = False
) -> ForwardMemory:
    """What encoding `batch_size` images of one size takes on its device, or decoding one; no weight is read."""
    vae = FakeLatentEncoder(model, revision=revision, dtype=dtype, device=torch.device("cpu"))
    weights, (width, height) = num_bytes(vae.vae), size
    activations = forward_peak(vae, [torch.empty(3, height, width)] * batch_size) if batch_size else 0
    if decodes:
        grid = height // 16, width // 16
        latents = torch.empty(grid[0] * grid[1], 4 * vae.vae.config.z_dim)
        activations = max(activations, forward_peak(lambda one: vae.pixels(one, grid), latents))
    return ForwardMemory(weights=weights, least_weights=weights, activations=activations)
