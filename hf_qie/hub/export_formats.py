"""The forms in which others load what was trained: each is written, read back, and compared with what it came from.

Letters: r rank, I width of a layer's input, O of its output.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import QwenImageTransformer2DModel
from diffusers.loaders.lora_pipeline import QwenImageLoraLoaderMixin
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
PROBES = 16  # inputs on which a merged layer is compared with the layer and its adapter
# of a merged layer's outputs, relative: float32 sums in another order; bfloat16 keeps 8 bits of a weight
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-8}


# --- adapters --------------------------------------------------------------------------------------------------------


def export_lora(trained: Trained, folder: Path, *, dtype: torch.dtype) -> str:
    """`pytorch_lora_weights.safetensors` for diffusers' `load_lora_weights`; returns what was checked."""
    adapters = wanted_adapters(trained, "lora").to(dtype)
    pairs = (
        (f"{name}.lora_{part}.weight", tensor)
        for name, two in adapters.layers.items()
        for part, tensor in zip("AB", two, strict=True)
    )
    QwenImageLoraLoaderMixin.save_lora_weights(
        folder,
        transformer_lora_layers={key: tensor.contiguous() for key, tensor in pairs},
        transformer_lora_adapter_metadata=dict(adapters.settings),
    )
    back = read_adapters(folder / LORA_FILE)
    assert back.settings == adapters.settings, "diffusers scales by what stands there"
    assert back.layers.keys() == adapters.layers.keys()
    for name, two in adapters.layers.items():
        for one, other in zip(two, back.layers[name], strict=True):
            assert one.dtype == other.dtype, f"{name} is not what was written"
            assert torch.equal(one, other), f"{name} is not what was written"
    return f"{len(back.layers)} adapters equal those of the run in {named(dtype)}"


def export_comfyui(trained: Trained, folder: Path, *, dtype: torch.dtype) -> str:
    """One file for ComfyUI's LoRA loader; returns what was checked.

    Its loader (comfy/lora.py, comfy/weight_adapter/lora.py) looks for `diffusion_model.<layer>.lora_up.weight`,
    `.lora_down.weight` and `.alpha`, and adds up @ down * alpha / r to the weight of that layer; its Qwen-Image has
    the layers of diffusers by the same names.
    """
    adapters = wanted_adapters(trained, "comfyui")
    tensors = {}
    for name, (down, up) in adapters.layers.items():
        tensors[f"diffusion_model.{name}.lora_down.weight"] = down.to(dtype).contiguous()
        tensors[f"diffusion_model.{name}.lora_up.weight"] = up.to(dtype).contiguous()
        tensors[f"diffusion_model.{name}.alpha"] = torch.tensor(adapters.alpha)
    path = folder / comfyui_file(trained)
    save_file(tensors, path, metadata={"format": "pt"})
    back, rounded = load_file(path), adapters.to(dtype)
    for name in rounded.layers:
        down, up, alpha = (back.pop(f"diffusion_model.{name}.{part}") for part in COMFYUI_PARTS)
        delta = up.float() @ down.float() * (alpha.item() / down.shape[0])
        assert torch.equal(delta, rounded.delta(name)), f"{name} is not what was written"
    assert not back, "ComfyUI would report these as not loaded"
    return f"{len(rounded.layers)} layers get what the run's adapters add, in {named(dtype)}"


COMFYUI_PARTS = ("lora_down.weight", "lora_up.weight", "alpha")


def comfyui_file(trained: Trained) -> str:
    """Its name, by which people choose it."""
    return f"{trained.name}.safetensors"


def wanted_adapters(trained: Trained, kind: str) -> Adapters:
    """The run's LoRA; raises InputError where it has trained the weights themselves."""
    if trained.adapters is None:
        raise InputError(
            f"--to {kind}: {trained.output_dir} has trained the transformer's own weights, so there is no LoRA; "
            "export --to merged or pipeline"
        )
    return trained.adapters


# --- whole transformers ----------------------------------------------------------------------------------------------


def export_merged(trained: Trained, folder: Path, *, dtype: torch.dtype) -> str:
    """A folder for `QwenImageTransformer2DModel.from_pretrained`; returns what was checked.

    A LoRA is added to the base in float32 and rounded once. One tensor is read at a time, one file is held.
    """
    adapters = trained.adapters
    source = trained.base() if adapters else trained.full()
    layers = adapters.layers if adapters else {}
    if not adapters and dtype == torch.float32:
        kept = {read().dtype for name, read in source.items() if name.endswith(".bias")}  # the frozen may be bfloat16
        if torch.float32 not in kept:
            told = "/".join(sorted(map(named, kept)))
            logger.warning("%s holds %s values; checkpoints of the run may hold float32 ones", trained.folder, told)
    if strangers := sorted(layer for layer in layers if f"{layer}.weight" not in source):
        raise InputError(f"{trained.folder}: has adapters on {strangers[0]}, which {trained.recipe.model!r} lacks")
    write_transformer(trained, source, folder, dtype=dtype)
    back = saved_tensors(folder)
    assert back.keys() == source.keys()
    worst = 0.0
    for name, read in back.items():
        layer = name.removesuffix(".weight")
        if layer != name and layer in layers:
            worst = max(worst, difference(read(), source[name](), adapters, layer))
        else:
            assert torch.equal(read(), source[name]().to(dtype)), f"{name} is not what was written"
    if worst > TOLERANCES[dtype]:
        raise InputError(
            f"{trained.folder}: merged in {named(dtype)}, a layer differs by {worst:.1e} from base and LoRA; "
            "use --dtype float32"
        )
    merged = f"; {len(layers)} merged layers give the output of base and LoRA to {worst:.1e}" if layers else ""
    return f"{len(back)} tensors in {named(dtype)}{merged}"


def write_transformer(trained: Trained, source: Tensors, folder: Path, *, dtype: torch.dtype) -> None:
    """Config and weights as `save_pretrained` lays them out, a file at a time."""
    with init_empty_weights():  # torch's own `to`: diffusers' warns of it, whatever the model
        empty = nn.Module.to(QwenImageTransformer2DModel.from_config(trained.base_config), dtype)
    shapes = empty.state_dict()
    if misfits := sorted(shapes.keys() ^ source.keys()):
        raise InputError(f"{trained.folder}: {misfits[0]} and {len(misfits) - 1} more tensors are not the model's own")
    folder.mkdir(parents=True, exist_ok=True)
    parts = list(cut(shapes))
    names = [WEIGHTS_FILE]
    if len(parts) > 1:
        names = [WEIGHTS_FILE.replace(".", f"-{i + 1:05d}-of-{len(parts):05d}.", 1) for i in range(len(parts))]
        where = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        size = sum(tensor.nbytes for tensor in shapes.values())
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (folder / f"{WEIGHTS_FILE}.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    for name, part in zip(names, parts, strict=True):
        tensors = {key: with_adapter(trained, key, source[key]()).to(dtype).contiguous() for key in part}
        save_file(tensors, folder / name, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(trained.base_config, indent=2) + "\n", encoding="utf-8")


def cut(shapes: dict[str, Tensor]) -> Iterator[list[str]]:
    """Names in order, in parts of up to `SHARD_BYTES`."""
    part, size = [], 0
    for name, tensor in shapes.items():
        if part and size + tensor.nbytes > SHARD_BYTES:
            yield part
            part, size = [], 0
        part.append(name)
        size += tensor.nbytes
    yield part


def with_adapter(trained: Trained, name: str, tensor: Tensor) -> Tensor:
    """A tensor of the base with what the LoRA adds to it, then in float32; any other as it is."""
    layer = name.removesuffix(".weight")
    if trained.adapters is None or layer == name or layer not in trained.adapters.layers:
        return tensor
    return tensor.float() + trained.adapters.delta(layer)


def difference(merged: Tensor, base: Tensor, adapters: Adapters, layer: str) -> float:
    """How far a merged layer `[O, I]` is from the base with its adapter beside it, relative, on random inputs.

    The adapter is run as peft runs it in training: never as a matrix of its own.
    """
    down, up = (tensor.float() for tensor in adapters.layers[layer])
    inputs = torch.randn(PROBES, base.shape[1], generator=torch.Generator().manual_seed(0))
    wanted = inputs @ base.float().T + (inputs @ down.T) @ up.T * (adapters.alpha / len(down))
    return ((inputs @ merged.float().T - wanted).norm() / wanted.norm()).item()


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
        link_or_copy(path, folder / path.relative_to(base))
    index = {key: value for key, value in index.items() if key != "_name_or_path"}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for path in copied:
        assert path.stat().st_size == (folder / path.relative_to(base)).stat().st_size, f"{path} is not copied whole"
    return f"{checked}; {len(copied)} files of {', '.join(others)} are the base's"


def link_or_copy(path: Path, there: Path) -> None:
    """Weights as a hard link where the disk is the same, for they are gigabytes; what people may edit as a copy."""
    there.parent.mkdir(parents=True, exist_ok=True)
    path = path.resolve()  # the Hub's cache has links
    if path.stat().st_size >= 1 << 20 and there.suffix == ".safetensors":
        try:
            os.link(path, there)
            return
        except OSError:
            pass  # another disk, or one that knows no links
    shutil.copyfile(path, there)


def named(dtype: torch.dtype) -> str:
    """As people write it."""
    return str(dtype).removeprefix("torch.")


EXPORTS: dict[str, Callable[..., str]] = {
    "lora": export_lora,
    "comfyui": export_comfyui,
    "merged": export_merged,
    "pipeline": export_pipeline,
}
