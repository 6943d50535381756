"""Latents of Qwen-Image-2.1, which are not packed: 64 channels, one token for 16 x 16 pixels, alpha among them.

Letters: B images, C latent channels, S tokens. A grid is (height, width) in tokens.
"""

from diffusers import AutoencoderKLQwenImage21
from torch import Tensor

from hf_qie.models.base import Grid
from hf_qie.models.image_latents import VaeLatents


class LatentEncoder(VaeLatents):
    """Between pixels in RGBA and latents."""

    vae_class = AutoencoderKLQwenImage21
    pixels_per_token = 16

    @staticmethod
    def pack(latents: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, H x W, C]` (diffusers/pipelines/qwenimage21/pipeline_qwenimage21.py:425)."""
        return latents.flatten(2).transpose(1, 2)

    @staticmethod
    def unpack(latents: Tensor, grid: Grid) -> Tensor:
        """The other way."""
        return latents.transpose(1, 2).unflatten(2, grid)
