"""The tiny VAE: it reconstructs, and its file is what its command makes."""

import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from safetensors import safe_open
from safetensors.torch import load_file
from train_tiny_vae import HELD_OUT, FlatConvolutions, images, psnr_db

from hf_qie.models.qwen_image.tiny import VAE_CONFIG, VAE_FILE, tiny_vae


@pytest.fixture(scope="module")
def held_out():
    return images(HELD_OUT, range(64))


@torch.no_grad()
def test_images_that_it_never_saw_come_back_at_26_db(held_out):
    vae = tiny_vae()
    assert psnr_db(vae.decode(vae.encode(held_out).latent_dist.mode()).sample, held_out) >= 26


@torch.no_grad()
def test_normalised_latents_have_mean_0_and_std_1(held_out):
    vae = tiny_vae()
    modes = vae.encode(held_out).latent_dist.mode()
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    normalised = (modes - mean) / std
    torch.testing.assert_close(normalised.mean(dim=(0, 2, 3, 4)), torch.zeros(16), atol=0.01, rtol=0)
    torch.testing.assert_close(normalised.std(dim=(0, 2, 3, 4)), torch.ones(16), atol=0.01, rtol=0)


def test_the_file_is_small_and_says_how_it_was_made():
    assert VAE_FILE.stat().st_size <= 6e6
    with safe_open(VAE_FILE, framework="pt") as file:
        assert "--steps" in file.metadata()["command"] and "--seed" in file.metadata()["command"]
    assert {tensor.dtype for name, tensor in load_file(VAE_FILE).items() if "latents" not in name} == {torch.float16}


@torch.no_grad()
def test_training_sees_the_numbers_that_the_real_convolutions_give(held_out):
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(**VAE_CONFIG)
    latents = vae.encode(held_out[:2]).latent_dist.mode()
    decoded = vae.decode(latents).sample
    flat_latents, flat_decoded = FlatConvolutions(vae)(held_out[:2], torch.zeros(()))
    torch.testing.assert_close(flat_latents, latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(flat_decoded, decoded, atol=1e-5, rtol=1e-5)
