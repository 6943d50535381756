"""Latents of Qwen-Image, packed in patches of 2 x 2.

Letters: B images, C latent channels (16), S packed tokens (H/16 x W/16). A grid is (packed height, packed width).
"""

from diffusers import AutoencoderKLQwenImage
from torch import Tensor

from hf_qie.models.base import Grid
from hf_qie.models.image_latents import VaeLatents


def unpack_latents(latents: Tensor, grid: Grid) -> Tensor:
    """`[B, S, 4C]` of a packed `grid` back to `[B, C, H, W]`."""
    (h, w), (b, _, c) = grid, latents.shape
    return latents.view(b, h, w, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, 2 * h, 2 * w)


def pack_latents(latents: Tensor) -> Tensor:
    """`[B, C, H, W]` to `[B, H/2 x W/2, 4C]` (diffusers/pipelines/qwenimage/pipeline_qwenimage_edit_plus.py:388)."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, (h // 2) * (w // 2), 4 * c)


class LatentEncoder(VaeLatents):
    """Between pixels, 16 a token and side, and packed latents."""

    vae_class = AutoencoderKLQwenImage
    pixels_per_token = 16
    pack, unpack = staticmethod(pack_latents), staticmethod(unpack_latents)
