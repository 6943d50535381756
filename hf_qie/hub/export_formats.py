"""The formats of an export: each is written, read back, and compared with the weights of the run."""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_qie.errors import InputError
from hf_qie.hub.redact import public
from hf_qie.hub.trained_run import Trained, read_adapters
from hf_qie.models.base import NOTICE
from hf_qie.models.checkpoint import (
    LICENSE_FILE,
    PLAIN,
    WEIGHTS_FILE,
    checkpoint_folder,
    license_file,
    read_config,
    saved_tensors,
)
from hf_qie.models.lora_files import LORA_FILE, PREFIX, write_lora
from hf_qie.training.model import TRANSFORMER_FOLDER

logger = logging.getLogger("hf_qie.export")

ADAPTERS = "adapters for the transformer of {base}, trained by hf_qie; none of its weights is here."
CHANGED = {
    "lora": ADAPTERS,
    "comfyui": ADAPTERS,
    "merged": "the transformer of {base}, trained by hf_qie.",
    "pipeline": "the transformer of {base}, trained by hf_qie; what is outside of transformer/ is the base's.",
}
SHARD_BYTES = 5_000_000_000  # of a weight file, and about what is held in memory at once


def export_lora(trained: Trained, folder: Path, *, dtype: torch.dtype) -> str:
    """`pytorch_lora_weights.safetensors` for diffusers' `load_lora_weights`; returns what was checked."""
    adapters = trained.adapters
    halves = {
        f"{name}.lora_{half}.weight": tensor.to(dtype).contiguous()
        for name, pair in adapters.layers.items()
        for half, tensor in zip("AB", pair, strict=True)
    }
    write_lora(folder, halves, adapters.settings)
    _compare({PREFIX + name: tensor for name, tensor in halves.items()}, load_file(folder / LORA_FILE))
    assert read_adapters(folder / LORA_FILE).settings == adapters.settings, "diffusers reads the scale from these"
    return f"{len(adapters.layers)} adapters equal those of the run in {dtype}"


def export_comfyui(trained: Trained, folder: Path, *, dtype: torch.dtype) -> str:
    """One file for ComfyUI's LoRA loader; returns what was checked.

    Its loader (comfy/lora.py, comfy/weight_adapter/lora.py) reads `<layer>.lora_up.weight`, `.lora_down.weight` and
    `.alpha`, and adds up @ down * alpha / r to the weight of that layer. It knows the layers of diffusers by the same
    names, with `diffusion_model.` before them; only without it where its own model joins two of them into one.
    """
    adapters, tensors, prefix = trained.adapters, {}, trained.family.comfyui_prefix
    for name, (down, up) in adapters.layers.items():
        tensors[f"{prefix}{name}.lora_down.weight"] = down.to(dtype).contiguous()
        tensors[f"{prefix}{name}.lora_up.weight"] = up.to(dtype).contiguous()
        tensors[f"{prefix}{name}.alpha"] = torch.tensor(float(adapters.settings["lora_alpha"]))
    path = folder / f"{trained.name}.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    _compare(tensors, load_file(path))
    return f"{len(adapters.layers)} layers get what the run's adapters add, in {dtype}"


def _compare(tensors: Mapping[str, Tensor], back: Mapping[str, Tensor]) -> None:
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor), f"{name} is not what was written"


def export_merged(trained: Trained, folder: Path, *, dtype: torch.dtype) -> str:
    """A folder for `from_pretrained` of the transformer's class; returns what was checked.

    A LoRA is added to the base in float32 and rounded once. One tensor is read at a time; one file is in memory.
    """
    source = trained.tensors()
    layers = trained.adapters.layers if trained.adapters else {}
    if unknown := sorted(layer for layer in layers if f"{layer}.weight" not in source):
        raise InputError(f"{trained.folder}: has adapters on {unknown[0]}, which {trained.recipe.model!r} lacks")
    dtypes: set[torch.dtype] = set()  # of what was read

    def trained_tensor(key: str) -> Tensor:
        tensor, layer = source[key](), key.removesuffix(".weight")
        dtypes.add(tensor.dtype)
        merged = tensor.float() + trained.adapters.delta(layer) if layer in layers else tensor
        return merged.to(dtype).contiguous()

    recipe = trained.recipe
    shapes = trained.family.load_transformer(
        recipe.model, revision=recipe.revision, dtype=dtype, empty=True
    ).state_dict()
    if misfits := sorted(shapes.keys() ^ source.keys()):
        raise InputError(f"{trained.folder}: {misfits[0]} and {len(misfits) - 1} more tensors are not the model's own")
    folder.mkdir(parents=True, exist_ok=True)
    pattern = WEIGHTS_FILE.replace(".", "{suffix}.")
    split = split_torch_state_dict_into_shards(shapes, filename_pattern=pattern, max_shard_size=SHARD_BYTES)
    for name, keys in split.filename_to_tensors.items():
        save_file({key: trained_tensor(key) for key in keys}, folder / name, metadata={"format": "pt"})
    if not layers and dtype == torch.float32 and dtype not in dtypes:  # what is frozen may be bfloat16, not all of it
        logger.warning("%s holds rounded values; checkpoints of the run may hold float32 ones", trained.folder)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(folder / f"{WEIGHTS_FILE}.index.json", index)
    _write_json(folder / "config.json", trained.base_config)
    back = saved_tensors(folder)
    assert back.keys() == source.keys()
    for name, read in back.items():
        assert torch.equal(read(), trained_tensor(name)), f"{name} is not what was written"
    merged = f"; {len(layers)} of them have the LoRA merged into them" if layers else ""
    return f"{len(back)} tensors in {dtype}{merged}"


def export_pipeline(trained: Trained, folder: Path, *, dtype: torch.dtype) -> str:
    """A folder for the checkpoint's own pipeline class, with the trained transformer; returns what was checked."""
    recipe = trained.recipe
    index = read_config(recipe.model, "model_index.json", revision=recipe.revision)
    parts = [name for name, value in index.items() if _is_part(value)]
    others = [name for name in parts if name != TRANSFORMER_FOLDER]
    checked = export_merged(trained, folder / TRANSFORMER_FOLDER, dtype=dtype)
    base = checkpoint_folder(recipe.model, others, revision=recipe.revision)
    for part in others:
        shutil.copytree(base / part, folder / part, ignore=_code)
    _write_json(folder / "model_index.json", index)
    return f"{checked}; {', '.join(others)} are the base's"


def write_license(trained: Trained, kind: str, folder: Path) -> None:
    """Where the base has a restricted licence, what it asks for: its notice, what was changed, and a copy of it."""
    family, recipe = trained.family, trained.recipe
    if not family.license_notice:
        return
    changed = CHANGED[kind].format(base=public(recipe.model))
    (folder / NOTICE).write_text(f"{family.license_notice}\n\nChanged: {changed}\n", encoding="utf-8")
    if text := license_file(recipe.model, revision=recipe.revision):
        shutil.copyfile(text, folder / LICENSE_FILE)
    else:
        logger.warning(
            "%s has no file %s; whoever gets this export has to get a copy of the licence, %s",
            *(recipe.model, LICENSE_FILE, family.license_link),
        )


def _is_part(value: Any) -> bool:
    """Whether a value of `model_index.json` is the library and class of a part; other lists are settings."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(name, str) for name in value)


def _code(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if Path(folder, name).is_file() and Path(name).suffix not in PLAIN]


def _write_json(path: Path, value: dict) -> None:
    own = {key: item for key, item in value.items() if key != "_name_or_path"}  # where the base was once loaded from
    path.write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")


EXPORTS: dict[str, Callable[..., str]] = {
    "lora": export_lora,
    "comfyui": export_comfyui,
    "merged": export_merged,
    "pipeline": export_pipeline,
}
