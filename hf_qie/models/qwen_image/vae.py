"""Images to latents as the pipelines make them: VAE mode, normalised, packed in patches of 2 x 2.

Letters: B images, C latent channels (16), S packed tokens (H/16 x W/16). A grid is (packed height, packed width).
"""

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKLQwenImage
from PIL import Image
from torch import Tensor

from hf_qie.models.base import Grid


def unpack_latents(latents: Tensor, grid: Grid) -> Tensor:
    """`[B, S, 4C]` of a packed `grid` back to `[B, C, H, W]`."""
    (h, w), (b, _, c) = grid, latents.shape
    return latents.view(b, h, w, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, 2 * h, 2 * w)


def pack_latents(latents: Tensor) -> Tensor:
    """`[B, C, H, W]` to `[B, H/2 x W/2, 4C]` (diffusers/pipelines/qwenimage/pipeline_qwenimage_edit_plus.py:388)."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, (h // 2) * (w // 2), 4 * c)


class LatentEncoder:
    """The checkpoint's VAE, between pixels and packed, normalised latents; an `empty` one has random weights."""

    def __init__(
        self, model: str, *, revision: str | None, dtype: torch.dtype, device: torch.device, empty: bool = False
    ):
        where = {"subfolder": "vae", "revision": revision}
        if empty:
            before = torch.get_default_dtype()
            torch.set_default_dtype(dtype)  # fake tensors cannot be cast once they are parameters
            self.vae = AutoencoderKLQwenImage.from_config(AutoencoderKLQwenImage.load_config(model, **where))
            torch.set_default_dtype(before)
        else:
            self.vae = AutoencoderKLQwenImage.from_pretrained(model, dtype=dtype, use_safetensors=True, **where)
            self.vae.to(device)
        self.vae.eval().requires_grad_(False)
        channels = (1, -1, 1, 1, 1)
        self.mean = torch.tensor(self.vae.config.latents_mean, dtype=dtype, device=device).view(channels)
        self.std = torch.tensor(self.vae.config.latents_std, dtype=dtype, device=device).view(channels)

    @torch.inference_mode()
    def __call__(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        """Packed latents `[S, 4C]` of images `[3, H, W]` in [-1, 1], all of one size.

        The mode of the posterior, as the pipelines take it for sources: a stored sample would be one noise for ever.
        """
        batch = torch.stack(list(pixels)).to(self.mean.device, self.mean.dtype)[:, :, None]
        latents = (self.vae.encode(batch).latent_dist.mode() - self.mean) / self.std
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
