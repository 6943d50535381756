"""Qwen-Image-2.1's transformer: its velocity for a batch, the layers that take LoRA adapters, and sampling.

Letters: B rows, K noised targets of each, S target tokens, R source tokens, L prompt tokens, C width of a latent.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_qie.models.base import Grid
from hf_qie.models.denoising import denoise as from_noise
from hf_qie.models.lora_files import presets
from hf_qie.models.qwen_image_21.packed import RowLayout

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
MLP = ["img_mlp.proj", "img_mlp.gate_layer", "img_mlp.out"]
OTHERS = ["modulation.1", "img_in", "txt_in.in_layer", "txt_in.out_layer", "norm_out.linear", "proj_out"]
TIMESTEP = ["timestep_embedder.linear_1", "timestep_embedder.linear_2"]
LORA_PRESETS = presets(attention=ATTENTION, mlp=MLP, others=OTHERS + TIMESTEP)


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
    of the prompt, then the target. Inputs are float32: where precision is given up is for the model to decide.
    """
    return model(
        hidden_states=noised.float(),
        source_latents=batch["source_latents"].float(),
        encoder_hidden_states=batch["prompt_embeds"].float(),
        timestep=sigma.float(),
        rows=layouts(batch["grids"], batch["prompt_lengths"], batch["image_slots"]),
    )


def denoise(
    model: nn.Module,
    batch: Mapping[str, Any],
    negative: Mapping[str, Any],
    *,
    true_cfg_scale: float,
    seed: int,
    **schedule: Any,
) -> Tensor:
    """Latents `[1, S, C]` that the pipeline would make of a batch of one row, from the noise of a CPU's `seed`.

    `negative` is `batch` with the negative prompt. The pipeline itself takes no latents of sources, nor a sharded
    model (diffusers/pipelines/qwenimage21/pipeline_qwenimage21.py:655-715).
    """
    (height, width), channels = batch["grids"][0], batch["source_latents"].shape[-1]
    noise = torch.randn((1, channels, height * width), generator=torch.Generator().manual_seed(seed))

    def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
        found = predict(model, batch, latents, sigma).float()
        if true_cfg_scale <= 1:
            return found
        without = predict(model, negative, latents, sigma).float()
        return without + true_cfg_scale * (found - without)

    return from_noise(velocity, noise.transpose(1, 2).to(batch["prompt_embeds"].device), **schedule)
