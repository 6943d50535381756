"""A LoRA file in any layout that is in use, by diffusers' keys; what a loader would leave out of it is an error."""

import json
import re
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import _fetch_state_dict
from diffusers.loaders.lora_pipeline import QwenImageLoraLoaderMixin
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from torch import Tensor

from hf_qie.errors import InputError

PEFT_CONFIG = "adapter_config.json"
PEFT = "base_model.model."
# Before a layer's name: of peft, of peft around a pipeline's part, of ComfyUI, of diffusers and OneTrainer
PREFIXES = (f"{PEFT}transformer.", PEFT, "model.diffusion_model.", "diffusion_model.", "transformer.")
FLAT = ("lora_unet_", "lora_transformer_", "lycoris_")  # the layer's name has _ for its dots: kohya, OneTrainer
ADAPTER = re.compile(r".+\.(lora_A|lora_B|lora_down|lora_up)(\.default)?\.weight")
DIFFUSERS = re.compile(r"transformer\..+\.lora_[AB]\.weight")  # what it saves
ALPHA = ".alpha"
OTHER_KINDS = {  # by a part of their keys
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "oft_": "OFT",
    "ia3_": "IA3",
}
WHOLE = (".diff", ".diff_b")  # ends of the keys of whole differences
# Where metadata says so, alpha / rank is not the factor of every layer.
UNEVEN = ("use_rslora", "alpha_pattern")


def read_lora(source: str | Path, *, where: str) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors of a file, a folder with one, or a Hub id, as `transformer.<layer>.lora_A.weight` and `lora_B`.

    Beside them the metadata as diffusers has it; None: alpha is the rank. An alpha of each layer is multiplied in.
    Raises InputError, which begins with `where`, for a file that holds anything else, naming it.
    """
    options = dict.fromkeys(("weight_name", "local_files_only", "cache_dir", "force_download", "proxies", "token"))
    options |= {"revision": None, "subfolder": None, "use_safetensors": True, "allow_pickle": False}
    user_agent = {"file_type": "attn_procs_weights", "framework": "pytorch"}
    try:
        tensors, metadata = _fetch_state_dict(str(source), user_agent=user_agent, **options)
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"{where} does not load as a LoRA: {error}") from error
    _check_keys(tensors, where)
    if all(DIFFUSERS.fullmatch(key) for key in tensors):
        return tensors, metadata
    num_adapters = sum(not key.endswith(ALPHA) for key in tensors)
    if num_adapters < len(tensors):
        metadata = None
    elif any(key.startswith(PEFT) for key in tensors):
        metadata = _peft_metadata(Path(source), tensors, where)
    named = {_named(key): tensor for key, tensor in tensors.items()}
    try:
        converted = QwenImageLoraLoaderMixin.lora_state_dict(named)
    except (ValueError, KeyError) as error:
        raise InputError(f"{where}: half of an adapter is missing: {error}") from error
    if len(converted) != num_adapters:
        raise InputError(f"{where}: of its {num_adapters} tensors diffusers takes {len(converted)}; take another file")
    return converted, metadata


def _check_keys(tensors: dict[str, Tensor], where: str) -> None:
    """Every key is one half of an adapter, or its alpha."""
    kinds = [(kind, [key for key in tensors if part in key]) for part, kind in OTHER_KINDS.items()]
    kinds.append(("file of whole differences", [key for key in tensors if key.endswith(WHOLE)]))
    for kind, of_kind in kinds:
        if of_kind:
            raise InputError(
                f"{where} is a {kind}: {len(of_kind)} of its {len(tensors)} keys, as {of_kind[0]}, are none of a "
                "plain LoRA and would be left out; merge it into the checkpoint with the tool that made it, and name "
                "that as model"
            )
    foreign = [key for key in tensors if not ADAPTER.fullmatch(key) and not key.endswith(ALPHA)]
    if foreign or not tensors:
        some = f": {', '.join(sorted(foreign)[:3])}" if foreign else ""
        raise InputError(
            f"{where} is no LoRA: {len(foreign)} of its {len(tensors)} keys would be left out{some}; wanted those of "
            "lora_A and lora_B, or lora_down and lora_up"
        )


def _named(key: str) -> str:
    """The key with a prefix that diffusers converts, whatever its own."""
    for prefix in FLAT:
        if key.startswith(prefix):
            return f"lora_unet_{key.removeprefix(prefix)}"
    bare = next((key.removeprefix(prefix) for prefix in PREFIXES if key.startswith(prefix)), key)
    return f"diffusion_model.{bare.replace('.default.', '.')}"


def _peft_metadata(source: Path, tensors: dict[str, Tensor], where: str) -> dict[str, Any]:
    """Rank and alpha, which peft writes into a file of their own."""
    path = (source if source.is_dir() else source.parent) / PEFT_CONFIG
    try:
        if not source.exists():  # a Hub id
            path = Path(hf_hub_download(str(source), PEFT_CONFIG))
        config = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha = config["r"], config["lora_alpha"]
        uneven = [key for key in UNEVEN if config.get(key)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{where} has peft's layout, whose alpha stands beside it in {PEFT_CONFIG}; {path} cannot be read: {error}"
        ) from error
    layers = sorted({_named(key).removeprefix("diffusion_model.").partition(".lora_")[0] for key in tensors})
    metadata = {"r": rank, "lora_alpha": alpha, "target_modules": layers} | {key: config[key] for key in uneven}
    return {f"transformer.{key}": value for key, value in metadata.items()}
