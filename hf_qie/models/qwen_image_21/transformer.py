"""Qwen-Image-2.1's transformer: what it is asked, which of its layers take adapters, and how it denoises.

Letters: B rows, K noised targets of each, S target tokens, R source tokens, L prompt tokens, C width of a latent.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from hf_qie.models.base import Grid
from hf_qie.models.checkpoint import load_transformer as load
from hf_qie.models.qwen_image_21.packed import QwenImage21Transformer2DModel, RowLayout

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
MLP = ["img_mlp.proj", "img_mlp.gate_layer", "img_mlp.out"]
OTHERS = ["modulation.1", "img_in", "txt_in.in_layer", "txt_in.out_layer", "norm_out.linear", "proj_out"]
OTHERS += ["timestep_embedder.linear_1", "timestep_embedder.linear_2"]
LORA_PRESETS = {
    "attention": ATTENTION,
    "attention+mlp": ATTENTION + MLP,
    "all-linear": ATTENTION + MLP + OTHERS,
}


def load_transformer(
    model: str, *, revision: str | None, dtype: torch.dtype, empty: bool = False
) -> QwenImage21Transformer2DModel:
    """See `models.checkpoint.load_transformer`."""
    return load(QwenImage21Transformer2DModel, model, revision=revision, dtype=dtype, empty=empty)


def without_gradient(transformer: nn.Module) -> tuple[str, ...]:
    """None: the target passes through all of them."""
    return ()


def shares_prefix(transformer_config: Mapping[str, Any]) -> bool:
    """With `causal_condition` prompt and sources are modulated at noise level 0 and see no target."""
    return transformer_config.get("causal_condition", True)


def layouts(
    grids: Sequence[Grid], prompt_lengths: Sequence[int], image_slots: Sequence[Sequence[int]]
) -> list[RowLayout]:
    """How the rows of a batch lie in the sequence; `grids` are the target's, then each source's."""
    target, *sources = grids
    return [
        RowLayout(target=target, sources=tuple(sources), num_text=length, slots=tuple(slots))
        for length, slots in zip(prompt_lengths, image_slots, strict=True)
    ]


def attention_pairs(
    grids: Sequence[Grid], prompt_lengths: Sequence[int], image_slots: Sequence[Sequence[int]], num_targets: int
) -> int:
    """Pairs of a query and a key of all rows of a batch, with `num_targets` targets each, masked ones included."""
    return sum(row.num_pairs(num_targets) for row in layouts(grids, prompt_lengths, image_slots))


def predict(model: nn.Module, batch: Mapping[str, Any], noised: Tensor, sigma: Tensor) -> Tensor:
    """The velocity `[B x K, S, C]` that the model sees in `noised[B x K, S, C]` at `sigma[B x K]`, 0 (clean) to 1.

    As the pipeline does (diffusers/pipelines/qwenimage21/pipeline_qwenimage21.py:660): text and sources in the order
    of the prompt, then the target. Inputs are float32, so that autocast and the model alone decide where precision is
    given up.
    """
    return model(
        hidden_states=noised.float(),
        source_latents=batch["source_latents"].float(),
        encoder_hidden_states=batch["prompt_embeds"].float(),
        timestep=sigma.float(),
        rows=layouts(batch["grids"], batch["prompt_lengths"], batch["image_slots"]),
    )


def shift_mu(num_target_tokens: int, scheduler_config: Mapping[str, Any]) -> float:
    """The scheduler's own mu at `num_target_tokens`; a scheduler without dynamic shifting has log(shift) everywhere.

    diffusers/pipelines/qwenimage21/pipeline_qwenimage21.py, calculate_shift and its call.
    """
    get = scheduler_config.get
    if not get("use_dynamic_shifting"):
        return math.log(get("shift", 1.0))
    fewest, most = get("base_image_seq_len", 256), get("max_image_seq_len", 4096)
    least, largest = get("base_shift", 0.5), get("max_shift", 1.15)
    return least + (largest - least) / (most - fewest) * (num_target_tokens - fewest)


def denoise(
    model: nn.Module,
    batch: Mapping[str, Any],
    negative: Mapping[str, Any],
    *,
    scheduler_config: Mapping[str, Any],
    sigmas: np.ndarray,
    true_cfg_scale: float,
    seed: int,
) -> Tensor:
    """Latents `[1, S, C]` that the pipeline would make of a batch of one row, from the noise of a CPU's `seed`.

    `negative` is `batch` with the negative prompt. The pipeline itself takes no latents of sources, nor a sharded
    model (diffusers/pipelines/qwenimage21/pipeline_qwenimage21.py:655-715).
    """
    (height, width), device = batch["grids"][0], batch["prompt_embeds"].device
    shape = (1, batch["source_latents"].shape[-1], height * width)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).transpose(1, 2).to(device)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler_config)
    scheduler.set_timesteps(sigmas=sigmas, mu=shift_mu(height * width, scheduler_config), device=device)
    for timestep in scheduler.timesteps:
        sigma = timestep[None] / 1000
        velocity = predict(model, batch, latents, sigma).float()
        if true_cfg_scale > 1:
            without = predict(model, negative, latents, sigma).float()
            velocity = without + true_cfg_scale * (velocity - without)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents
