"""Tensors -> one loss a row. Letters: B rows, S latent tokens, C latent channels."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

SMALLEST_SIGMA = 1e-3  # below it the weight 1 / sigma^2 of a single row would exceed that of a step


def velocity_mse(prediction: Tensor, latents: Tensor, noise: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean squared error against the velocity `noise - latents`: `[B, S, C]` each, `weight[B]` -> `[B]`.

    In float32, whatever comes in.
    """
    velocity = noise.float() - latents.float()
    return weight.float() * (prediction.float() - velocity).square().mean(dim=(1, 2))


def sigma_sqrt(sigma: Tensor) -> Tensor:
    """1 / sigma^2, by its name in SD3: diffusers/training_utils.py, compute_loss_weighting_for_sd3."""
    return sigma.float().clamp_min(SMALLEST_SIGMA) ** -2.0


def cosmap(sigma: Tensor) -> Tensor:
    """2 / (pi (1 - 2 sigma + 2 sigma^2)): diffusers/training_utils.py, compute_loss_weighting_for_sd3."""
    sigma = sigma.float().clamp_min(SMALLEST_SIGMA)
    return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))


WEIGHTINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": torch.ones_like,
    "sigma_sqrt": sigma_sqrt,
    "cosmap": cosmap,
}
