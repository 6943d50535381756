"""Qwen-Image's transformer: its velocity for a batch, the layers that take LoRA adapters, and sampling.

Letters: B rows, S target tokens, R source tokens, L prompt tokens.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn

from hf_qie.models.checkpoint import load_transformer as load
from hf_qie.models.denoising import denoise as from_noise
from hf_qie.models.lora_files import presets
from hf_qie.models.qwen_image.attention import PromptRows, RowAttention
from hf_qie.models.qwen_image.vae import pack_latents

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
MLP = ["img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"]
OTHERS = ["img_mod.1", "txt_mod.1", "img_in", "txt_in", "norm_out.linear", "proj_out"]
OTHERS += ["timestep_embedder.linear_1", "timestep_embedder.linear_2"]
LORA_PRESETS = presets(attention=ATTENTION, mlp=MLP, others=OTHERS)


def load_transformer(model: str, **options: Any) -> nn.Module:
    """See `Family`: diffusers' own with our attention, which is no part of what is saved."""
    transformer = load(QwenImageTransformer2DModel, model, **options)
    transformer.set_attn_processor(RowAttention())
    return transformer


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
    float32: where precision is given up is for the model to decide. A `model` that is given unequal prompts has
    `RowAttention`.
    """
    lengths = batch["prompt_lengths"]
    shapes = [(1, height, width) for height, width in batch["grids"]]
    (output,) = model(
        hidden_states=torch.cat([noised.float(), batch["source_latents"].float()], dim=1),
        encoder_hidden_states=batch["prompt_embeds"].float(),
        attention_kwargs={"rows": PromptRows(lengths)} if len(set(lengths)) > 1 else None,
        timestep=sigma.float(),
        img_shapes=[shapes] * len(noised),
        guidance=None,
        return_dict=False,
    )
    return output[:, : noised.shape[1]]


def denoise(
    model: nn.Module,
    batch: Mapping[str, Any],
    negative: Mapping[str, Any],
    *,
    true_cfg_scale: float,
    seed: int,
    **schedule: Any,
) -> Tensor:
    """Latents `[1, S, C]` that the pipelines would make of a batch of one row, from the noise of a CPU's `seed`.

    `negative` is `batch` with the negative prompt. The pipelines themselves take no latents of sources, nor a sharded
    model (diffusers/pipelines/qwenimage/pipeline_qwenimage_edit_plus.py:764-858).
    """
    (height, width), channels = batch["grids"][0], batch["source_latents"].shape[-1] // 4
    noise = torch.randn((1, channels, 2 * height, 2 * width), generator=torch.Generator().manual_seed(seed))

    def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
        found = predict(model, batch, latents, sigma).float()
        if true_cfg_scale <= 1:
            return found
        without = predict(model, negative, latents, sigma).float()
        guided = without + true_cfg_scale * (found - without)
        return guided * (found.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    return from_noise(velocity, pack_latents(noise).to(batch["prompt_embeds"].device), **schedule)
