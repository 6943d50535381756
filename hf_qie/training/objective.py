"""The training objective: the loss of each row of a batch, at the noise of its draw or its held-out row.

Letters: B rows, S target tokens, C width of a latent.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hf_qie.config.recipe import Recipe
from hf_qie.data.collate import Batch
from hf_qie.models.base import read_family
from hf_qie.training.losses import WEIGHTINGS, velocity_mse
from hf_qie.training.noise import add_noise, mu_of, noise_for, shifted, sigmas_for


class Objective:
    """The recipe's loss, for draws and for held-out rows."""

    def __init__(self, recipe: Recipe, scheduler_config: Mapping[str, Any], *, global_batch_size: int):
        self.loss, self.seed = recipe.loss, recipe.seed
        self.family = read_family(recipe.model, revision=recipe.revision)
        self.scheduler_config, self.global_batch_size = scheduler_config, global_batch_size

    def of_draws(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Losses `[B]` and predicted velocities `[B, S, C]`; the draw numbers seed the noise."""
        draws, of_step = batch["draw"], self.global_batch_size
        noise = noise_for(draws, batch["target_latents"].shape[1:], seed=self.seed)
        sigma = sigmas_for(draws, loss=self.loss, seed=self.seed, global_batch_size=of_step, mu=self._mu(batch))
        return self._losses(model, batch, noise, sigma)

    def of_held_out(self, model: nn.Module, batch: Batch, fractions: Tensor) -> tuple[Tensor, Tensor]:
        """Losses `[B]` and noise levels `[B]` of held-out rows with u = `fractions[B]`; the same at every call."""
        noise = noise_for(batch["row"], batch["target_latents"].shape[1:], seed=self.seed, purpose="eval noise")
        sigma = shifted(fractions, self._mu(batch))
        losses, _ = self._losses(model, batch, noise, sigma)
        return losses, sigma.to(losses.device)

    def _mu(self, batch: Batch) -> float | None:
        return mu_of(self.loss, batch["target_latents"].shape[1], self.family, self.scheduler_config)

    def _losses(self, model: nn.Module, batch: Batch, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        latents = batch["target_latents"].float()
        noise, sigma = noise.to(latents.device), sigma.to(latents.device)
        prediction = self.family.predict(model, batch, add_noise(latents, noise, sigma), sigma)
        return velocity_mse(prediction, latents, noise, WEIGHTINGS[self.loss.weighting](sigma)), prediction
