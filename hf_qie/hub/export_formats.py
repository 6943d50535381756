"""The formats of an export: each is written, read back, and compared with the weights of the run.

Letters: I width of a layer's input, O of its output.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import QwenImageTransformer2DModel
from diffusers.loaders.lora_pipeline import QwenImageLoraLoaderMixin
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_qie.errors import InputError
from hf_qie.hub.trained_run import (
    PLAIN,
    WEIGHTS_FILE,
    Adapters,
    Tensors,
    Trained,
    base_folder,
    read_adapters,
    saved_tensors,
)
from hf_qie.models.checkpoint import read_config
from hf_qie.training.model import LORA_FILE, TRANSFORMER_FOLDER

logger = logging.getLogger("hf_qie.export")

SHARD_BYTES = 5_000_000_000  # of a weight file, and about what is held in memory at once
LINKED_BYTES = 1 << 20  # larger weight files of the base are linked, smaller files copied: people may edit those
PROBES = 16  # inputs on which a merged layer is compared with the layer and its adapter
# of a merged layer's outputs, relative: float32 sums in another order; bfloat16 keeps 8 bits of a weight
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-8}


def export_lora(trained: Trained, folder: Path, *, dtype: torch.dtype) -> str:
    """`pytorch_lora_weights.safetensors` for diffusers' `load_lora_weights`; returns what was checked."""
    adapters = trained.adapters.to(dtype)
    halves = {
        f"{name}.lora_{half}.weight": tensor.contiguous()
        for name, pair in adapters.layers.items()
        for half, tensor in zip("AB", pair, strict=True)
    }
    QwenImageLoraLoaderMixin.save_lora_weights(
        folder, transformer_lora_layers=halves, transformer_lora_adapter_metadata=dict(adapters.settings)
    )
    back = read_adapters(folder / LORA_FILE)
    assert back.settings == adapters.settings, "diffusers reads the scale from these"
    assert back.layers.keys() == adapters.layers.keys()
    for name, pair in adapters.layers.items():
        for one, other in zip(pair, back.layers[name], strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other), f"{name} is not what was written"
    return f"{len(back.layers)} adapters equal those of the run in {_named(dtype)}"


def export_comfyui(trained: Trained, folder: Path, *, dtype: torch.dtype) -> str:
    """One file for ComfyUI's LoRA loader; returns what was checked.

    Its loader (comfy/lora.py, comfy/weight_adapter/lora.py) reads `diffusion_model.<layer>.lora_up.weight`,
    `.lora_down.weight` and `.alpha`, and adds up @ down * alpha / r to the weight of that layer; its Qwen-Image has
    the layers of diffusers by the same names.
    """
    adapters, tensors = trained.adapters.to(dtype), {}
    for name, (down, up) in adapters.layers.items():
        tensors[f"diffusion_model.{name}.lora_down.weight"] = down.contiguous()
        tensors[f"diffusion_model.{name}.lora_up.weight"] = up.contiguous()
        tensors[f"diffusion_model.{name}.alpha"] = torch.tensor(adapters.alpha)
    path = folder / f"{trained.name}.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    back = load_file(path)
    for name in adapters.layers:
        down, up, alpha = (
            back.pop(f"diffusion_model.{name}.{part}") for part in ("lora_down.weight", "lora_up.weight", "alpha")
        )
        delta = up.float() @ down.float() * (alpha.item() / down.shape[0])
        assert torch.equal(delta, adapters.delta(name)), f"{name} is not what was written"
    assert not back, "ComfyUI would report these as not loaded"
    return f"{len(adapters.layers)} layers get what the run's adapters add, in {_named(dtype)}"


def export_merged(trained: Trained, folder: Path, *, dtype: torch.dtype) -> str:
    """A folder for `QwenImageTransformer2DModel.from_pretrained`; returns what was checked.

    A LoRA is added to the base in float32 and rounded once. One tensor is read at a time, one file is in memory.
    """
    source = trained.tensors()
    layers = trained.adapters.layers if trained.adapters else {}
    if unknown := sorted(layer for layer in layers if f"{layer}.weight" not in source):
        raise InputError(f"{trained.folder}: has adapters on {unknown[0]}, which {trained.recipe.model!r} lacks")
    if not layers and dtype == torch.float32:
        kept = {read().dtype for name, read in source.items() if name.endswith(".bias")}  # the frozen may be bfloat16
        if torch.float32 not in kept:
            found = "/".join(sorted(map(_named, kept)))
            logger.warning("%s holds %s values; checkpoints of the run may hold float32 ones", trained.folder, found)
    _write_transformer(trained, source, folder, dtype=dtype)
    back = saved_tensors(folder)
    assert back.keys() == source.keys()
    worst = 0.0
    for name, read in back.items():
        if (layer := name.removesuffix(".weight")) in layers:
            worst = max(worst, _difference(read(), source[name](), trained.adapters, layer))
        else:
            assert torch.equal(read(), source[name]().to(dtype)), f"{name} is not what was written"
    if worst > TOLERANCES[dtype]:
        raise InputError(
            f"{trained.folder}: merged in {_named(dtype)}, a layer differs by {worst:.1e} from base and LoRA; "
            "use --dtype float32"
        )
    merged = f"; {len(layers)} merged layers give the output of base and LoRA to {worst:.1e}" if layers else ""
    return f"{len(back)} tensors in {_named(dtype)}{merged}"


def _write_transformer(trained: Trained, source: Tensors, folder: Path, *, dtype: torch.dtype) -> None:
    """Config and weights in the layout of `save_pretrained`, a file at a time."""
    with init_empty_weights():  # torch's own `to`: diffusers' warns of it, whatever the model
        shapes = nn.Module.to(QwenImageTransformer2DModel.from_config(trained.base_config), dtype).state_dict()
    if misfits := sorted(shapes.keys() ^ source.keys()):
        raise InputError(f"{trained.folder}: {misfits[0]} and {len(misfits) - 1} more tensors are not the model's own")
    folder.mkdir(parents=True, exist_ok=True)
    pattern = WEIGHTS_FILE.replace(".", "{suffix}.")
    split = split_torch_state_dict_into_shards(shapes, filename_pattern=pattern, max_shard_size=SHARD_BYTES)
    for name, keys in split.filename_to_tensors.items():
        tensors = {key: _with_adapter(trained, key, source[key]()).to(dtype).contiguous() for key in keys}
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if split.is_sharded:
        _write_json(
            folder / f"{WEIGHTS_FILE}.index.json",
            {"metadata": split.metadata, "weight_map": split.tensor_to_filename},
        )
    _write_json(folder / "config.json", trained.base_config)


def _with_adapter(trained: Trained, name: str, tensor: Tensor) -> Tensor:
    """A tensor of the base with what the LoRA adds to it, then in float32; any other unchanged."""
    layer = name.removesuffix(".weight")
    if trained.adapters is None or layer not in trained.adapters.layers:
        return tensor
    return tensor.float() + trained.adapters.delta(layer)


def _difference(merged: Tensor, base: Tensor, adapters: Adapters, layer: str) -> float:
    """How far a merged layer `[O, I]` is from the base with its adapter beside it, relative, on random inputs.

    The adapter is run as peft runs it in training: never as a matrix of its own.
    """
    down, up = (tensor.float() for tensor in adapters.layers[layer])
    inputs = torch.randn(PROBES, base.shape[1], generator=torch.Generator().manual_seed(0))
    expected = inputs @ base.float().T + (inputs @ down.T) @ up.T * (adapters.alpha / len(down))
    return ((inputs @ merged.float().T - expected).norm() / expected.norm()).item()


def export_pipeline(trained: Trained, folder: Path, *, dtype: torch.dtype) -> str:
    """A folder for the checkpoint's own pipeline class, with the trained transformer; returns what was checked."""
    recipe = trained.recipe
    index = read_config(recipe.model, "model_index.json", revision=recipe.revision)
    parts = [name for name, value in index.items() if isinstance(value, list) and any(value)]
    others = [name for name in parts if name != TRANSFORMER_FOLDER]
    checked = export_merged(trained, folder / TRANSFORMER_FOLDER, dtype=dtype)
    base = base_folder(recipe, others)
    copied = [path for part in others for path in sorted((base / part).rglob("*")) if path.suffix in PLAIN]
    for path in copied:
        target = folder / path.relative_to(base)
        _link_or_copy(path.resolve(), target)  # the Hub's cache has links
        assert path.stat().st_size == target.stat().st_size, f"{path} is not copied completely"
    _write_json(folder / "model_index.json", {key: value for key, value in index.items() if key != "_name_or_path"})
    return f"{checked}; {len(copied)} files of {', '.join(others)} are the base's"


def _link_or_copy(path: Path, target: Path) -> None:
    """Large weights as a hard link if the disk is the same, all else as a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.stat().st_size >= LINKED_BYTES and target.suffix == ".safetensors":
        try:
            return os.link(path, target)
        except OSError:
            pass  # another disk, or one without hard links
    shutil.copyfile(path, target)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


EXPORTS: dict[str, Callable[..., str]] = {
    "lora": export_lora,
    "comfyui": export_comfyui,
    "merged": export_merged,
    "pipeline": export_pipeline,
}
