"""Qwen-Image's transformer: what it is asked, which of its layers take adapters, and how it denoises.

Letters: B rows, S target tokens, R source tokens, L prompt tokens.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from torch import Tensor, nn

from hf_qie.models.checkpoint import load_transformer as load
from hf_qie.models.qwen_image.vae import pack_latents

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
MLP = ["img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"]
OTHERS = ["img_mod.1", "txt_mod.1", "img_in", "txt_in", "norm_out.linear", "proj_out"]
OTHERS += ["timestep_embedder.linear_1", "timestep_embedder.linear_2"]
LORA_PRESETS = {
    "attention": ATTENTION,
    "attention+mlp": ATTENTION + MLP,
    "all-linear": ATTENTION + MLP + OTHERS,
}


def load_transformer(
    model: str, *, revision: str | None, dtype: torch.dtype, empty: bool = False
) -> QwenImageTransformer2DModel:
    """See `models.checkpoint.load_transformer`."""
    return load(QwenImageTransformer2DModel, model, revision=revision, dtype=dtype, empty=empty)


def without_gradient(transformer: nn.Module) -> tuple[str, ...]:
    """The parts of the last block that no gradient reaches, six tensors.

    The text stream ends there: nothing reads what its last output projection and its last MLP make
    (diffusers/models/transformers/transformer_qwenimage.py:980).
    """
    last = f"transformer_blocks.{transformer.config.num_layers - 1}"
    return f"{last}.attn.to_add_out", f"{last}.txt_mlp"


def predict(model: nn.Module, batch: Mapping[str, Any], noised: Tensor, sigma: Tensor) -> Tensor:
    """The velocity `[B, S, C]` that the model sees in `noised[B, S, C]` at `sigma[B]`, 0 (clean) to 1.

    As the pipeline does (diffusers/pipelines/qwenimage/pipeline_qwenimage_edit_plus.py:800-825): sources follow the
    target, positions come from the grids, no guidance, and of the output only the target's part counts. Inputs are
    float32, so that autocast and the model alone decide where precision is given up.
    """
    mask = batch["prompt_mask"] if len(set(batch["prompt_lengths"])) > 1 else None  # without, attention is faster
    shapes = [(1, height, width) for height, width in batch["grids"]]
    (output,) = model(
        hidden_states=torch.cat([noised.float(), batch["source_latents"].float()], dim=1),
        encoder_hidden_states=batch["prompt_embeds"].float(),
        encoder_hidden_states_mask=mask,
        timestep=sigma.float(),
        img_shapes=[shapes] * len(noised),
        guidance=None,
        return_dict=False,
    )
    return output[:, : noised.shape[1]]


def shift_mu(num_target_tokens: int, scheduler_config: Mapping[str, Any]) -> float:
    """The scheduler's own mu at `num_target_tokens`; a scheduler without dynamic shifting has log(shift) everywhere.

    diffusers/pipelines/qwenimage/pipeline_qwenimage_edit_plus.py, calculate_shift, and
    schedulers/scheduling_flow_match_euler_discrete.py, time_shift.
    """
    config = scheduler_config
    if not config["use_dynamic_shifting"]:
        return math.log(config["shift"])
    slope = (config["max_shift"] - config["base_shift"]) / (config["max_image_seq_len"] - config["base_image_seq_len"])
    return config["base_shift"] + slope * (num_target_tokens - config["base_image_seq_len"])


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
    """Latents `[1, S, C]` that the pipelines would make of a batch of one row, from the noise of a CPU's `seed`.

    `negative` is `batch` with the negative prompt. The pipelines themselves take no latents of sources, nor a sharded
    model (diffusers/pipelines/qwenimage/pipeline_qwenimage_edit_plus.py:764-858).
    """
    height, width = batch["grids"][0]
    device, channels = batch["prompt_embeds"].device, batch["source_latents"].shape[-1] // 4
    noise = torch.randn((1, channels, 2 * height, 2 * width), generator=torch.Generator().manual_seed(seed))
    latents = pack_latents(noise).to(device)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler_config)
    scheduler.set_timesteps(sigmas=sigmas, mu=shift_mu(height * width, scheduler_config), device=device)
    for timestep in scheduler.timesteps:
        sigma = timestep[None] / 1000
        velocity = predict(model, batch, latents, sigma).float()
        if true_cfg_scale > 1:
            without = predict(model, negative, latents, sigma).float()
            guided = without + true_cfg_scale * (velocity - without)
            velocity = guided * (velocity.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents
