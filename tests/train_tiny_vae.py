"""Training of the VAE of the tiny checkpoints, done once: with it an image shows what a tiny model has learned.

    python tests/train_tiny_vae.py --steps 9000 [--batch_size 8] [--learning_rate 2e-3] [--seed 0]

makes hf_qie/models/qwen_image/tiny_vae.safetensors anew, in about an hour on one core. The file holds of every causal
3-D convolution the slice that a single image meets, as float16, with the mean and std of the latents, and the command
that made it.
"""

import json
import logging
import random
from dataclasses import replace

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage
from safetensors.torch import save_file
from synthetic_edits import random_scene
from torch import Tensor, nn
from tqdm import trange

from hf_qie.demo.shapes import draw
from hf_qie.models.qwen_image.tiny import VAE_CONFIG, VAE_FILE, tiny_vae
from hf_qie.runtime.cli import Options, checked, run_script
from hf_qie.runtime.rules import Count, Positive, Seed

logger = logging.getLogger("train_tiny_vae")

CROP_PX = 64
HELD_OUT = "held out"  # begins the seed of images that training never draws
LATENT_NOISE = 0.05  # a tiny transformer's latents are never exact
LATENT_PENALTY = 1e-4  # keeps latents near 1, or they would outgrow the noise


def image(seed: str) -> Tensor:
    """A square crop `[3, 64, 64]` in [-1, 1] of a random scene: up to three shapes, colours turned about."""
    rng = random.Random(seed)
    scene = random_scene(rng, rng.randrange(4), rng.randint(CROP_PX, 2 * CROP_PX))
    things = tuple(replace(thing, radius=rng.uniform(0.12, 0.36)) for thing in scene.things)
    side_px = max(CROP_PX, min(scene.size_px))
    pixels = np.array(draw(replace(scene, things=things, size_px=(side_px, side_px))), dtype=np.float32)
    left, top = (rng.randint(0, side_px - CROP_PX) for _ in "xy")
    crop = torch.from_numpy(pixels[top : top + CROP_PX, left : left + CROP_PX]).permute(2, 0, 1) / 127.5 - 1
    # any palette: channels in any order, each as it is or inverted, and darker
    signs = torch.tensor([rng.choice((-1.0, 1.0)) for _ in range(3)])
    crop = crop[rng.sample(range(3), 3)] * signs[:, None, None]
    return (crop + 1) * rng.uniform(0.6, 1.0) - 1


def images(prefix: str, numbers: range) -> Tensor:
    """`[B, 3, 1, 64, 64]`, one frame each, as the VAE takes them."""
    return torch.stack([image(f"{prefix} {i}") for i in numbers])[:, :, None]


class FlatConvolutions(nn.Module):
    """The VAE with 2-D convolutions for causal 3-D ones: the same numbers for one frame, at a third of the cost.

    Before the first frame stand zeros, so of a kernel only its last slice in time meets the image.
    """

    def __init__(self, vae: AutoencoderKLQwenImage) -> None:
        super().__init__()
        self.vae = vae
        for module in vae.modules():
            if isinstance(module, nn.Conv3d):
                padding = (module._padding[2], module._padding[0])
                module.forward = lambda x, cache_x=None, module=module, padding=padding: nn.functional.conv2d(
                    x[:, :, 0], module.weight[:, :, -1], module.bias, module.stride[1:], padding
                )[:, :, None]

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Latents `[B, 16, 1, h, w]` of pixels, and what becomes of them with `noise` on top."""
        latents = self.vae.encode(pixels).latent_dist.mode()
        return latents, self.vae.decode(latents + noise).sample


def psnr_db(pixels: Tensor, wanted: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of values in [-1, 1], mean over the images `[B, ...]`."""
    mse = (pixels.clamp(-1, 1) - wanted).square().flatten(1).mean(dim=1) / 4
    return float((-10 * mse.log10()).mean())


def train(*, steps: int, batch_size: int, learning_rate: float, seed: int) -> AutoencoderKLQwenImage:
    """Train from random weights on as many new images as there are steps x rows."""
    torch.manual_seed(seed)
    model = FlatConvolutions(AutoencoderKLQwenImage(**VAE_CONFIG))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.05)
    held_out = images(HELD_OUT, range(64))
    bar = trange(steps, desc="tiny VAE", unit="step")
    for step in bar:
        pixels = images(str(seed), range(step * batch_size, (step + 1) * batch_size))
        noise = LATENT_NOISE * torch.randn(batch_size, 16, 1, CROP_PX // 8, CROP_PX // 8)
        latents, decoded = model(pixels, noise)
        loss = nn.functional.mse_loss(decoded, pixels) + LATENT_PENALTY * latents.square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 500 == 0 or step + 1 == steps:
            with torch.no_grad():
                bar.set_postfix(held_out_db=f"{psnr_db(model(held_out, torch.zeros(()))[1], held_out):.2f}")
    return model.vae


@torch.no_grad()
def save(vae: AutoencoderKLQwenImage, *, made_by: dict[str, str]) -> None:
    """Write `VAE_FILE`: what one frame meets, as float16, and mean and std of the latents of held-out images."""
    tensors = {}
    for name, tensor in vae.state_dict().items():
        tensors[name] = (tensor[:, :, -1:] if tensor.ndim == 5 else tensor).to(torch.float16).contiguous()
    latents = vae.encode(images(HELD_OUT, range(64))).latent_dist.mode()
    tensors["latents_mean"], tensors["latents_std"] = latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4))
    save_file(tensors, VAE_FILE, metadata=made_by)


def main(argv: list[str]) -> None:
    """Train, save, and log the PSNR of held-out images as the file gives it."""
    parser = Options()
    parser.add_argument("--steps", type=checked(Count), default=9000)
    parser.add_argument("--batch_size", type=checked(Count), default=8)
    parser.add_argument("--learning_rate", type=checked(Positive), default=2e-3)
    parser.add_argument("--seed", type=checked(Seed), default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    vae = train(**vars(args))
    command = " ".join(f"--{key} {value}" for key, value in vars(args).items())
    save(vae, made_by={"command": f"python tests/train_tiny_vae.py {command}", "torch": torch.__version__})
    vae, held_out = tiny_vae(), images(HELD_OUT, range(64))
    with torch.no_grad():
        quality_db = psnr_db(vae.decode(vae.encode(held_out).latent_dist.mode()).sample, held_out)
    logger.info("%s: %.2f dB on held-out images, %s", VAE_FILE, quality_db, json.dumps(vars(args)))


if __name__ == "__main__":
    run_script(main)
