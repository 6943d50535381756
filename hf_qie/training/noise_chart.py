"""A picture of the noise that a recipe trains on: how often each level, with which weight, and where sampling is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image, ImageDraw

from hf_qie.config.recipe import Recipe
from hf_qie.models.qwen_image.vae import PIXELS_PER_TOKEN
from hf_qie.training.losses import WEIGHTINGS
from hf_qie.training.noise import mu_of, shift_mu, sigmas_for

DRAWS = 10_000  # a second; a bar of average height is off by 7 %
BARS = 50
# px
WIDTH, HEIGHT, MARGIN = 760, 420, 60
BAR, LINE, TICK, INK = "#7aa6d8", "#c0392b", "#222222", "#444444"


@dataclass(frozen=True, kw_only=True)
class Noise:
    """By level of noise, sigma from 0 to 1 in `BARS` equal parts."""

    shares: np.ndarray  # of the draws
    weights: np.ndarray  # of the loss, in the middle of each part
    inference: np.ndarray  # the levels at which the pipeline calls the model, from high to low
    loss: str  # in words
    num_target_tokens: int


def noise_of(recipe: Recipe, scheduler_config: Mapping[str, Any]) -> Noise:
    """What `recipe` draws for targets of its own size, and the schedule of its pipeline at that size."""
    loss, num_steps = recipe.loss, recipe.sampling.num_inference_steps
    num_tokens = (recipe.extract.image_sample_size // PIXELS_PER_TOKEN) ** 2
    mu = mu_of(loss, num_tokens, scheduler_config)
    sigma = sigmas_for(range(DRAWS), loss=loss, seed=recipe.seed, global_batch_size=100, mu=mu)
    middles = torch.arange(BARS) / BARS + 0.5 / BARS
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler_config)
    # diffusers/pipelines/qwenimage/pipeline_qwenimage_edit_plus.py:750-770
    scheduler.set_timesteps(
        sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=shift_mu(num_tokens, scheduler_config)
    )
    return Noise(
        shares=torch.histc(sigma, BARS, 0, 1).double().numpy() / DRAWS,
        weights=WEIGHTINGS[loss.weighting](middles).double().numpy(),
        inference=scheduler.sigmas[:-1].double().numpy(),
        loss=f"timestep_sampling {loss.timestep_sampling}, weighting {loss.weighting}, shift {loss.shift}",
        num_target_tokens=num_tokens,
    )


def noise_chart(noise: Noise) -> Image.Image:
    """Bars of the shares, a line of the weights, each as high as its highest, and a tick for each step of sampling."""
    chart = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(chart)
    left, right, top, bottom = MARGIN, WIDTH - MARGIN, MARGIN, HEIGHT - 2 * MARGIN

    def x(sigma: float) -> float:
        return left + sigma * (right - left)

    def y(part: float) -> float:
        return bottom - part * (bottom - top)

    for place, share in enumerate(noise.shares):
        box = (x(place / BARS) + 1, y(share / noise.shares.max()), x((place + 1) / BARS) - 1, bottom)
        pen.rectangle(box, fill=BAR)
    heights = noise.weights / noise.weights.max()
    pen.line([(x((place + 0.5) / BARS), y(height)) for place, height in enumerate(heights)], fill=LINE, width=2)
    pen.line([(left, bottom), (right, bottom)], fill=INK)
    for tenth in range(0, 11, 2):
        pen.text((x(tenth / 10), bottom + 4), f"{tenth / 10:.1f}", fill=INK, anchor="ma")
    for sigma in noise.inference:
        pen.line([(x(sigma), bottom + 30), (x(sigma), bottom + 46)], fill=TICK)
    pen.text((left, 10), f"{noise.loss}; {noise.num_target_tokens:,} target tokens", fill=INK)
    pen.text((left, 26), f"share of draws by noise level sigma; the highest bar is {noise.shares.max():.1%}", fill=BAR)
    pen.text((left, 42), f"weight in the loss; the highest is {noise.weights.max():,.3g}", fill=LINE)
    pen.text((left, bottom + 52), f"the {len(noise.inference)} steps that the pipeline samples at", fill=TICK)
    pen.text((left, bottom + 72), "sigma 0 is a clean picture, 1 is noise alone", fill=INK)
    return chart
