"""Losses by row, and weightings as diffusers has them."""

import math

import pytest
import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3

from hf_qie.training.losses import loss_weight, velocity_mse


def test_the_loss_of_a_row_is_its_weighted_mean_square_distance_to_the_velocity():
    latents, noise, prediction = torch.randn(3, 3, 5, 64, generator=torch.Generator().manual_seed(0))
    weight = torch.tensor([1.0, 0.5, 2.0])
    loss = velocity_mse(prediction, latents, noise, weight)
    by_hand = [
        w * torch.nn.functional.mse_loss(p, n - x)
        for w, p, n, x in zip(weight, prediction, noise, latents, strict=True)
    ]
    torch.testing.assert_close(loss, torch.stack(by_hand))  # float32's default tolerance: the sums differ in order


def test_the_velocity_itself_has_no_loss():
    latents, noise = torch.randn(2, 2, 5, 64)
    assert velocity_mse(noise - latents, latents, noise, torch.ones(2)).tolist() == [0.0, 0.0]


def test_the_loss_is_float32_and_does_not_mix_rows():
    latents, noise, prediction = torch.randn(3, 2, 5, 64).to(torch.bfloat16)
    together = velocity_mse(prediction, latents, noise, torch.ones(2))
    assert together.dtype == torch.float32
    assert velocity_mse(prediction[1:], latents[1:], noise[1:], torch.ones(1))[0] == together[1]


@pytest.mark.parametrize("name", ["none", "sigma_sqrt", "cosmap"])
def test_a_weighting_equals_diffusers_and_is_clamped_below_a_thousandth(name):
    sigma = torch.tensor([1e-3, 0.01, 0.3, 0.5, 0.77, 1.0])
    torch.testing.assert_close(loss_weight(name, sigma), compute_loss_weighting_for_sd3(name, sigma), rtol=0, atol=0)
    below = loss_weight(name, torch.tensor([0.0, 1e-6, 9.9e-4, 1e-3]))
    assert (below == below[-1]).all()
    half = {"none": 1.0, "sigma_sqrt": 4.0, "cosmap": 4 / math.pi}[name]
    assert loss_weight(name, torch.tensor([0.5])).item() == pytest.approx(half)
