"""The formats of an export: each is written, read back, and compared with the weights of the run."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_qie.errors import InputError
from hf_qie.hub.trained_run import (
    PLAIN,
    WEIGHTS_FILE,
    Trained,
    base_folder,
    read_adapters,
    saved_tensors,
)
from hf_qie.models.base import read_family
from hf_qie.models.checkpoint import read_config
from hf_qie.models.lora_files import LORA_FILE, write_lora
from hf_qie.training.model import TRANSFORMER_FOLDER

logger = logging.getLogger("hf_qie.export")

SHARD_BYTES = 5_000_000_000  # of a weight file, and about what is held in memory at once


def export_lora(trained: Trained, folder: Path, *, dtype: torch.dtype) -> str:
    """`pytorch_lora_weights.safetensors` for diffusers' `load_lora_weights`; returns what was checked."""
    adapters = trained.adapters.to(dtype)
    halves = {
        f"{name}.lora_{half}.weight": tensor.contiguous()
        for name, pair in adapters.layers.items()
        for half, tensor in zip("AB", pair, strict=True)
    }
    write_lora(folder, halves, adapters.settings)
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
        parts = ("lora_down.weight", "lora_up.weight", "alpha")
        down, up, alpha = (back.pop(f"diffusion_model.{name}.{part}").float() for part in parts)
        delta = up @ down * (alpha.item() / len(down))
        assert torch.equal(delta, adapters.delta(name)), f"{name} is not what was written"
    assert not back, "ComfyUI would report these as not loaded"
    return f"{len(adapters.layers)} layers get what the run's adapters add, in {_named(dtype)}"


def export_merged(trained: Trained, folder: Path, *, dtype: torch.dtype) -> str:
    """A folder for `from_pretrained` of the transformer's class; returns what was checked.

    A LoRA is added to the base in float32 and rounded once. One tensor is read at a time; one file is in memory.
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

    def trained_tensor(key: str) -> Tensor:
        tensor, layer = source[key](), key.removesuffix(".weight")
        merged = tensor.float() + trained.adapters.delta(layer) if layer in layers else tensor
        return merged.to(dtype).contiguous()

    recipe = trained.recipe
    family = read_family(recipe.model, revision=recipe.revision)
    shapes = family.load_transformer(recipe.model, revision=recipe.revision, dtype=dtype, empty=True).state_dict()
    if misfits := sorted(shapes.keys() ^ source.keys()):
        raise InputError(f"{trained.folder}: {misfits[0]} and {len(misfits) - 1} more tensors are not the model's own")
    folder.mkdir(parents=True, exist_ok=True)
    pattern = WEIGHTS_FILE.replace(".", "{suffix}.")
    split = split_torch_state_dict_into_shards(shapes, filename_pattern=pattern, max_shard_size=SHARD_BYTES)
    for name, keys in split.filename_to_tensors.items():
        save_file({key: trained_tensor(key) for key in keys}, folder / name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(folder / f"{WEIGHTS_FILE}.index.json", index)
    _write_json(folder / "config.json", trained.base_config)
    back = saved_tensors(folder)
    assert back.keys() == source.keys()
    for name, read in back.items():
        assert torch.equal(read(), trained_tensor(name)), f"{name} is not what was written"
    merged = f"; {len(layers)} of them have the LoRA merged into them" if layers else ""
    return f"{len(back)} tensors in {_named(dtype)}{merged}"


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
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    _write_json(folder / "model_index.json", index)
    return f"{checked}; {len(copied)} files of {', '.join(others)} are the base's"


def _write_json(path: Path, value: dict) -> None:
    own = {key: item for key, item in value.items() if key != "_name_or_path"}  # where the base was once loaded from
    path.write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


EXPORTS: dict[str, Callable[..., str]] = {
    "lora": export_lora,
    "comfyui": export_comfyui,
    "merged": export_merged,
    "pipeline": export_pipeline,
}
