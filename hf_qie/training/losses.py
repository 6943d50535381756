"""Losses of rows, and how noise levels and positions weigh in them: functions of tensors alone.

Letters: B rows or draws of them, S latent tokens, C width of a packed latent. `sigma` is the noise level, 0 (clean) to
1 (noise only).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.training_utils import compute_loss_weighting_for_sd3
from torch import Tensor

from hf_qie.models.base import Grid

SMALLEST_SIGMA = 1e-3  # below it the weight 1 / sigma^2 of a single row would exceed that of a step


def velocity_mse(
    prediction: Tensor, latents: Tensor, noise: Tensor, weight: Tensor, *, of_positions: Tensor | None = None
) -> Tensor:
    """Weighted mean squared error against the velocity `noise - latents`: `[B, S, C]` each, `weight[B]` -> `[B]`.

    `of_positions[B, S]` has mean 1 in each row. In float32, whatever comes in.
    """
    error = (prediction.float() - (noise.float() - latents.float())).square()
    if of_positions is not None:
        error = error * of_positions[:, :, None]
    return weight.float() * error.mean(dim=(1, 2))


def loss_weight(weighting: str, sigma: Tensor) -> Tensor:
    """The weight of a row at `sigma`, by SD3's names."""
    return compute_loss_weighting_for_sd3(weighting, sigma.float().clamp_min(SMALLEST_SIGMA))


def latent_change(target: Tensor, source: Tensor, *, grid: Grid) -> Tensor:
    """|target - source| `[B, S]` of unpacked latents, its mean over channels and over what a token of `grid` packs.

    A source of another size is brought to the target's. Its latents are then those of an image with other fine detail,
    which is no edit: the mean over a token and its neighbours is taken before the absolute value, in which most of
    that is lost.
    """
    side = target.shape[-1] // grid[1]
    if source.shape == target.shape:
        return F.avg_pool2d((target - source).abs().mean(dim=1), side).flatten(1)
    source = F.interpolate(source, target.shape[2:], mode="bilinear", antialias=True)
    around = F.avg_pool2d(target - source, 3 * side, stride=side, padding=side, count_include_pad=False)
    return around.abs().mean(dim=1).flatten(1)


def edit_weights(changes: Sequence[Tensor], edit_weight: float) -> Tensor:
    """Weights `[B, S]` of positions by what changes there: (1 + k d / mean(d)) / (1 + k).

    k is `edit_weight`, d the least of `changes[B, S]`, one for each source, at a position, and mean(d) that of the
    row: one part of the row's weight is spread evenly, k parts in proportion to the change. So the mean is 1, and loss
    and learning rate keep their scale. Weights are between 1 / (1 + k) and (1 + k S) / (1 + k); all are 1 for k = 0
    and in a row without change; they tend to d / mean(d) for large k.
    """
    change = torch.stack(list(changes)).amin(dim=0)
    mean = change.mean(dim=1, keepdim=True)
    return (1 + edit_weight * torch.where(mean > 0, change / mean, 1)) / (1 + edit_weight)
