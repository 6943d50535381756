"""Denoising as the pipelines do it: the shift of the scheduler, and its steps from noise to latents.

Letters: S target tokens, C width of a packed latent.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor


def shift_mu(num_target_tokens: int, scheduler_config: Mapping[str, Any]) -> float:
    """The scheduler's own mu at `num_target_tokens`; a scheduler without dynamic shifting has log(shift) everywhere.

    diffusers/pipelines/qwenimage/pipeline_qwenimage_edit_plus.py, calculate_shift and its call, with the values that
    stand there for keys that a config lacks; schedulers/scheduling_flow_match_euler_discrete.py, time_shift.
    """
    get = scheduler_config.get
    if not get("use_dynamic_shifting"):
        return math.log(get("shift", 1.0))
    fewest, most = get("base_image_seq_len", 256), get("max_image_seq_len", 4096)
    least, largest = get("base_shift", 0.5), get("max_shift", 1.15)
    return least + (largest - least) / (most - fewest) * (num_target_tokens - fewest)


def denoise(
    velocity: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    *,
    scheduler_config: Mapping[str, Any],
    sigmas: np.ndarray,
) -> Tensor:
    """Latents `[1, S, C]` from `noise[1, S, C]`; `velocity` is that in latents at `sigma[1]`, in float32.

    diffusers/pipelines/qwenimage/pipeline_qwenimage_edit_plus.py:764-858; pipeline_qwenimage21.py has the same.
    """
    latents, scheduler = noise, FlowMatchEulerDiscreteScheduler.from_config(scheduler_config)
    scheduler.set_timesteps(sigmas=sigmas, mu=shift_mu(noise.shape[1], scheduler_config), device=noise.device)
    for timestep in scheduler.timesteps:
        latents = scheduler.step(velocity(latents, timestep[None] / 1000), timestep, latents, return_dict=False)[0]
    return latents
