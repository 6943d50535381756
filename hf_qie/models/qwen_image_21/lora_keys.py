"""LoRA files of other tools for Qwen-Image-2.1: their names of layers, for those of diffusers."""

import re

from diffusers.loaders.lora_pipeline import QwenImageLoraLoaderMixin
from torch import Tensor

from hf_qie.models.lora_files import COMFYUI
from hf_qie.models.qwen_image_21.transformer import ATTENTION, MLP, OTHERS, TIMESTEP

JOINED = ".img_mlp.gate_up."  # of ComfyUI and what trains its checkpoints: two layers in one, in this order
PARTS = (".img_mlp.gate_layer.", ".img_mlp.proj.")
# full names, within a block where they are in one; the lists in transformer.py hold the ends that peft matches
LAYERS = [f"attn.{name}" for name in ATTENTION] + [*MLP, JOINED.strip(".")]
LAYERS += [*OTHERS, *(f"time_text_embed.{name}" for name in TIMESTEP)]
DOTTED = {name.replace(".", "_"): name for name in LAYERS}
FLAT = re.compile(r"lora_unet_(?:transformer_blocks_(\d+)_)?([^.]+)(\..+)")


def convert_lora(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """See `Family`: diffusers knows neither this model's names with _ for their dots, nor its joined layer."""
    converted = {}
    for key, tensor in QwenImageLoraLoaderMixin.lora_state_dict(
        {_dotted(key): tensor for key, tensor in tensors.items()}
    ).items():
        if JOINED in key:  # both have its lora_A, and each its rows of lora_B
            halves = tensor.chunk(2) if ".lora_B." in key else (tensor, tensor)
            converted |= {key.replace(JOINED, part): half for part, half in zip(PARTS, halves, strict=True)}
        else:
            converted[key] = tensor
    return converted


def _dotted(key: str) -> str:
    """ComfyUI's key for kohya's; a layer that is not the model's keeps its name, by which it is refused."""
    if not (flat := FLAT.fullmatch(key)):
        return key
    block, layer, rest = flat.groups()
    return COMFYUI + (f"transformer_blocks.{block}." if block else "") + DOTTED.get(layer, layer) + rest
