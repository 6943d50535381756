"""Flow matching: noise levels, noise and loss of rows, each a function of the draw number or of the held-out row.

Letters: B rows, K draws of each, S latent tokens, C latent channels. `sigma` is the noise level, 0 (clean) to 1 (noise
only).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from hf_qie.config.recipe import Loss, Recipe
from hf_qie.data.collate import Batch, collate
from hf_qie.data.seeding import draw_rng
from hf_qie.models.base import Grid, read_family
from hf_qie.models.checkpoint import read_config
from hf_qie.training.losses import edit_weights, latent_change, loss_weight, velocity_mse

SMALLEST_U = 2**-24  # the nearest to 0, and as 1 - 2^-24 to 1, that float32 keeps apart from them


def shifted(u: Tensor, mu: float | None) -> Tensor:
    """Noise level e^mu / (e^mu + 1/u - 1) for `u` in (0, 1), float32; u itself where mu is None.

    Without the stretch to the terminal sigma, which belongs to sampling.
    """
    u = u.float()
    return u if mu is None else math.exp(mu) / (math.exp(mu) + 1 / u - 1)


def time_fraction(base: Tensor, loss: Loss) -> Tensor:
    """Values u in (0, 1) by `loss.timestep_sampling`, float32, from `base`.

    `base` is normal for logit_normal, else uniform.
    diffusers/training_utils.py, compute_density_for_timestep_sampling.
    """
    if loss.timestep_sampling == "logit_normal":
        u = torch.sigmoid(loss.logit_mean + loss.logit_std * base)
    elif loss.timestep_sampling == "mode":
        u = 1 - base - loss.mode_scale * (torch.cos(math.pi * base / 2) ** 2 - 1 + base)
    else:
        u = base
    return u.float().clamp(SMALLEST_U, 1 - SMALLEST_U)


def sigmas_for(draws: Sequence[int], *, loss: Loss, seed: int, global_batch_size: int, mu: float | None) -> Tensor:
    """The noise levels of training draws, float32 [B] on the CPU, each a function of (seed, draw) alone."""
    base = [_base_number(draw, loss, seed, global_batch_size) for draw in draws]
    return shifted(time_fraction(torch.tensor(base, dtype=torch.float64), loss), mu)


def eval_fractions(rows: Sequence[int], *, loss: Loss, seed: int) -> Tensor:
    """Values u for all N held-out rows of a task, float32 [N] on the CPU: of the density that training draws from.

    One in each of N strata of equal probability, so that few rows meet high and low noise alike.
    """
    jitter = np.array([draw_rng(seed, "eval", row).random() for row in rows])
    strata = draw_rng(seed, "eval strata", len(rows)).permutation(len(rows))
    base = torch.from_numpy((strata + jitter) / len(rows))
    return time_fraction(torch.special.ndtri(base) if loss.timestep_sampling == "logit_normal" else base, loss)


def _base_number(draw: int, loss: Loss, seed: int, global_batch_size: int) -> float:
    rng = draw_rng(seed, "sigma", draw)
    if loss.timestep_sampling == "logit_normal":
        return rng.standard_normal()
    if loss.timestep_sampling == "stratified":
        step, place = divmod(draw, global_batch_size)
        stratum = draw_rng(seed, "strata", step).permutation(global_batch_size)[place]
        return (stratum + rng.random()) / global_batch_size
    return rng.random()


def noise_for(numbers: Sequence[int], shape: tuple[int, ...], *, seed: int, purpose: str = "noise") -> Tensor:
    """Normal noise, float32 [B, *shape] on the CPU, each row a function of (seed, purpose, its number) alone.

    The number is the draw's while training, and the row's with the purpose "eval noise".
    """
    return torch.from_numpy(
        np.stack([draw_rng(seed, purpose, number).standard_normal(shape, np.float32) for number in numbers])
    )


def add_noise(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """(1 - sigma) latents + sigma noise in float32: `[B, S, C]` each, `sigma[B]`."""
    sigma = sigma.float()[:, None, None]
    return (1 - sigma) * latents.float() + sigma * noise.float()


def may_share_aspect(one: Grid, other: Grid, *, rounding: float) -> bool:
    """Whether images of one aspect may have these grids, each side rounded by up to `rounding` tokens."""
    (least, most), (other_least, other_most) = (
        ((width - rounding) / (height + rounding), (width + rounding) / (height - rounding))
        for height, width in (one, other)
    )
    return least <= other_most and other_least <= most


class Objective:
    """The recipe's loss, for draws and for held-out rows.

    Noise is made where rows are collated, by the workers of the loader if there are any: it reaches the device with
    the rest of the batch.
    """

    def __init__(self, recipe: Recipe, *, global_batch_size: int):
        self.loss, self.seed = recipe.loss, recipe.seed
        self.family = read_family(recipe.model, revision=recipe.revision)
        self.global_batch_size = global_batch_size
        self.pipeline_config = read_config(recipe.model, "model_index.json", revision=recipe.revision)
        self.scheduler_config = read_config(recipe.model, "scheduler/scheduler_config.json", revision=recipe.revision)

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """A batch of draws, with the noise that their numbers seed."""
        batch = collate(rows)
        draws, shape = batch["draw"], self._target_shape(batch)
        noise = noise_for(draws, shape, seed=self.seed)
        of_step, mu = self.global_batch_size, self.mu(shape[0])
        sigma = sigmas_for(draws, loss=self.loss, seed=self.seed, global_batch_size=of_step, mu=mu)
        return batch | {"noise": noise, "sigma": sigma}

    def collate_held_out(self, rows: Sequence[Mapping[str, Any]], *, fractions: Tensor) -> Batch:
        """A batch of held-out rows with u = `fractions` of all of them, by number; the same at every call."""
        batch = collate(rows)
        shape = self._target_shape(batch)
        noise = noise_for(batch["row"], shape, seed=self.seed, purpose="eval noise")
        return batch | {"noise": noise, "sigma": shifted(fractions[batch["draw"]], self.mu(shape[0]))}

    def _target_shape(self, batch: Batch) -> tuple[int, int]:
        """(S, C) of the target, which may not be encoded yet."""
        return math.prod(batch["grids"][0]), self.family.latent_width

    def losses(self, model: nn.Module, batch: Batch, *, held_out: bool = False) -> Tensor:
        """Losses `[B x K]`, those of a row one after the other; `batch` has noise and lies on the model's device.

        Those of `held_out` rows are without `loss.edit_weight`, so that runs with and without it can be compared.
        """
        latents, sigma = batch["target_latents"].float(), batch["sigma"]
        latents = latents.repeat_interleave(len(sigma) // len(latents), dim=0)
        prediction = self.family.predict(model, batch, add_noise(latents, batch["noise"], sigma), sigma)
        weight, of_positions = loss_weight(self.loss.weighting, sigma), None if held_out else self.edit_weights(batch)
        return velocity_mse(prediction, latents, batch["noise"], weight, of_positions=of_positions)

    def edit_weights(self, batch: Batch) -> Tensor | None:
        """Weights `[B x K, S]` of positions by `loss.edit_weight`; None where all are 1.

        A source counts if its aspect is the target's, as far as grids tell: no image is cropped, so both then show the
        same view, whatever their sizes.
        """
        if not self.loss.edit_weight:
            return None
        family, (grid, *grids) = self.family, batch["grids"]
        rounding = family.side_multiple_px / family.pixels_per_token / 2
        target = family.unpack(batch["target_latents"].float(), grid)
        sources = batch["source_latents"].float().split([math.prod(one) for one in grids], dim=1)
        changes = [
            latent_change(target, family.unpack(source, of_source), grid=grid)
            for source, of_source in zip(sources, grids, strict=True)
            if may_share_aspect(grid, of_source, rounding=rounding)
        ]
        if not changes:
            return None
        weights = edit_weights(changes, self.loss.edit_weight)
        return weights.repeat_interleave(len(batch["sigma"]) // len(weights), dim=0)

    def mu(self, num_target_tokens: int) -> float | None:
        """The shift of sigma that `loss.shift` asks for at that size; None for none."""
        if self.loss.shift == "auto":
            return self.family.shift_mu(num_target_tokens, self.scheduler_config)
        return None if self.loss.shift == "none" else self.loss.shift

    def sampling_sigmas(self, num_inference_steps: int) -> np.ndarray:
        """The noise levels at which the pipeline calls the model, before the scheduler shifts them."""
        return self.family.sampling_sigmas(num_inference_steps, self.pipeline_config)


def noise_levels(recipe: Recipe) -> dict[str, Any]:
    """What `plots.noise_chart` shows of a recipe, for targets of its own size: training's draws and sampling's steps.

    `shares` of the draws and `weights` of the loss for each of 50 equal parts of sigma, `sampled`: the levels at which
    the pipeline calls the model, from high to low, and a `title`.
    """
    num_parts, objective = 50, Objective(recipe, global_batch_size=100)
    loss, family, num_steps = recipe.loss, objective.family, recipe.sampling.num_inference_steps
    num_tokens = math.prod(family.grid_of(family.fit((1, 1), recipe.extract.image_sample_size**2)))
    sigma = sigmas_for(range(10_000), loss=loss, seed=recipe.seed, global_batch_size=100, mu=objective.mu(num_tokens))
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(objective.scheduler_config)
    steps = objective.sampling_sigmas(num_steps)
    scheduler.set_timesteps(sigmas=steps, mu=family.shift_mu(num_tokens, objective.scheduler_config))
    how = f"timestep_sampling {loss.timestep_sampling}, weighting {loss.weighting}, shift {loss.shift}"
    return {
        "shares": torch.histc(sigma, num_parts, 0, 1).double().numpy() / len(sigma),
        "weights": loss_weight(loss.weighting, (torch.arange(num_parts) + 0.5) / num_parts).double().numpy(),
        "sampled": scheduler.sigmas[:-1].double().numpy(),
        "title": f"{how}; {num_tokens:,} target tokens",
    }
