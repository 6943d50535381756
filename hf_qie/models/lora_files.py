"""LoRA files: written as diffusers does, read in any layout in use; keys that a loader would skip are errors."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LoraBaseMixin
from huggingface_hub import hf_hub_download, list_repo_files
from huggingface_hub.errors import HFValidationError
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_qie.errors import InputError

LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name for it
PREFIX = "transformer."  # of diffusers' keys
COMFYUI = "diffusion_model."
PEFT = "base_model.model."
# Before a layer's name: of peft around a model or a pipeline's part, of ComfyUI, of diffusers and OneTrainer
BEFORE = re.compile(r"(base_model\.model\.)?((model\.)?diffusion_model\.)?(transformer\.)?")
FLAT = re.compile(r"lora_unet_|lora_transformer_|lycoris_")  # the layer's name has _ for its dots: kohya, OneTrainer
ADAPTER = re.compile(r"(.+\.(?:lora_A|lora_B|lora_down|lora_up))(?:\.default)?(?:\.weight)?|(.+\.alpha)")
DIFFUSERS = re.compile(r"transformer\..+\.lora_[AB]\.weight")
UP = (".lora_B.weight", ".lora_up.weight")
UNEVEN = ("use_rslora", "alpha_pattern")  # where metadata says so, alpha / rank is not the factor of every layer
Tensors = dict[str, Tensor]


def presets(*, attention: Sequence[str], mlp: Sequence[str], others: Sequence[str]) -> dict[str, list[str]]:
    """The layers that `trainable.lora.target_modules` stands for, by its names; all are ends of names of layers."""
    return {
        "attention": [*attention],
        "attention+mlp": [*attention, *mlp],
        "all-linear": [*attention, *mlp, *others],
    }


def write_lora(folder: str | Path, layers: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """`<folder>/pytorch_lora_weights.safetensors` of `<layer>.lora_A.weight` and `lora_B`, with rank and alpha."""
    LoraBaseMixin.write_lora_layers(
        state_dict={PREFIX + name: tensor for name, tensor in layers.items()},
        save_directory=str(folder),
        is_main_process=True,
        weight_name=LORA_FILE,
        save_function=None,
        safe_serialization=True,
        lora_adapter_metadata={PREFIX + key: value for key, value in settings.items()},
    )


def read_lora(
    source: str | Path, *, where: str, convert: Callable[[Tensors], Tensors]
) -> tuple[Tensors, dict[str, Any] | None]:
    """The tensors of a file, a folder with one, or a Hub id, as `transformer.<layer>.lora_A.weight` and `lora_B`.

    Beside them the metadata as diffusers has it; None: alpha is the rank. An alpha of each layer is multiplied in.
    `convert` takes ComfyUI's and kohya's keys to diffusers'. Raises InputError, which begins with `where`, for a file
    that holds anything else, naming it.
    """
    try:
        with safe_open(_find(str(source)), framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is not a dict
            metadata = json.loads((file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "null"))
        if not isinstance(metadata, dict | None):
            raise ValueError(f"{LORA_ADAPTER_METADATA_KEY} in its header is not a mapping")
    except HFValidationError as error:
        raise InputError(f"{where} is neither a file or folder here nor the id of a repository on the Hub") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"{where} does not load as a LoRA: {error}") from error
    _check_keys(tensors, where)
    if any(key.endswith(".alpha") for key in tensors):
        metadata = None
    elif any(key.startswith(PEFT) for key in tensors):
        metadata = _peft_metadata(Path(source), where)
    named = tensors
    if not all(DIFFUSERS.fullmatch(key) for key in tensors):
        named = {_named(key): tensor for key, tensor in tensors.items()}
    alphas = {key.removesuffix(".alpha") for key in named if key.endswith(".alpha")}
    if lone := sorted(alphas - {key.partition(".lora_")[0] for key in named}):
        raise InputError(f"{where}: there is an alpha of {lone[0]}, but no adapter; take another file")
    try:
        converted = convert(named)
    except (ValueError, KeyError) as error:
        raise InputError(f"{where}: half of an adapter is missing: {error}") from error
    if len(named) < len(tensors) or _num_outputs(converted) != _num_outputs(named):
        raise InputError(f"{where}: two of its names are of one layer, or a layer is unknown; take another file")
    if metadata is not None:
        layers = sorted({key.removeprefix(PREFIX).partition(".lora_")[0] for key in converted})
        metadata |= {f"{PREFIX}target_modules": layers}
    return converted, metadata


def _find(source: str) -> str:
    """The file that `source` names: its own, diffusers' in a folder or repository, or the one that is there."""
    path = Path(source)
    if path.is_file():
        return source
    names = [file.name for file in path.iterdir()] if path.is_dir() else list_repo_files(source)
    names = [name for name in names if name.endswith(".safetensors")]
    name = LORA_FILE if LORA_FILE in names else names[0] if len(names) == 1 else None
    if name is None:
        raise ValueError(f"expected {LORA_FILE} or one .safetensors file, found {sorted(names)}; name the file")
    return str(path / name) if path.is_dir() else hf_hub_download(source, name)


def _check_keys(tensors: Tensors, where: str) -> None:
    """Every key is one half of an adapter, or its alpha."""
    foreign = sorted(key for key in tensors if not ADAPTER.fullmatch(key))
    if foreign or not tensors:
        some = f": {', '.join(foreign[:3])}" if foreign else ""
        raise InputError(
            f"{where} is not a plain LoRA: {len(foreign)} of its {len(tensors)} keys would be left out{some}; "
            "expected those of lora_A and lora_B, or lora_down and lora_up. Merge another kind (DoRA, LoKr, LoHa) "
            "into the checkpoint with the tool that made it, and name that as model"
        )


def _named(key: str) -> str:
    """The key with a prefix that diffusers converts, whatever its own."""
    half, alpha = ADAPTER.fullmatch(key).groups()
    key = f"{half}.weight" if half else alpha
    if flat := FLAT.match(key):
        return f"lora_unet_{key[flat.end() :]}"
    return COMFYUI + key[BEFORE.match(key).end() :]


def _num_outputs(tensors: Tensors) -> int:
    """Outputs of all layers; a layer that is taken apart leaves them as many, one that is lost does not."""
    return sum(tensor.shape[:1].numel() for key, tensor in tensors.items() if key.endswith(UP))


def _peft_metadata(source: Path, where: str) -> dict[str, Any]:
    """Rank and alpha, which peft writes into a file of their own."""
    try:
        config = LoraConfig.from_pretrained(str(source.parent if source.is_file() else source))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{where} has peft's layout, which keeps alpha in adapter_config.json beside it; cannot read it: {error}"
        ) from error
    return {PREFIX + key: getattr(config, key) for key in ("r", "lora_alpha", *UNEVEN)}
