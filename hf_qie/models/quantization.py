"""A frozen transformer whose linear layers are quantised one by one, while its weight files are read.

The arithmetic is the libraries': bitsandbytes' 4-bit layers, and torchao's weights of int8 and float8 with a scale for
each row. All three compute in the dtype of the model with weights that are expanded for the moment, so that gradients
are those of the expanded weights. diffusers' own loading takes one of these libraries for all layers, and bitsandbytes
only where there is a GPU; and bitsandbytes' int8 layers quantise activations as well, in float16.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor, nn
from tqdm import tqdm
from transformers.utils.versions import require_version

from hf_qie.errors import InputError
from hf_qie.models.base import Family

logger = get_logger(__name__)

FLOORS = {"torchao": "0.18", "bitsandbytes": "0.50"}  # as in setup.py
PACKAGES = {"fp8": ("torchao",), "int8": ("torchao",), "nf4": ("torchao", "bitsandbytes")}


def check_packages(kind: str) -> None:
    """Raise InputError naming what quantising as `kind` takes and that is not installed, or too old."""
    needs = [f"{package}>={FLOORS[package]}" for package in PACKAGES[kind]]
    try:
        for one in needs:
            require_version(one)
    except ImportError as error:  # not found, or too old
        reason = str(error.args[0]).strip().rstrip(".")
        message = f"got {kind}: {reason}; pip install {' '.join(map(repr, needs))}"
        raise InputError("memory.quantization", message) from error


def kind_of(layer: str, kind: str, family: Family) -> str | None:
    """As what the linear layer of that name is stored when a base is quantised as `kind`; None: as it is.

    Modulation is a third of Qwen-Image's parameters and sees one vector a row: its errors reach every token of the
    stream, so it has the smallest there is: int8 rounds normal weights by 0.8 %, fp8 by 2.7 %, nf4 by 9.2 %.
    """

    def among(parts: tuple[str, ...]) -> bool:
        return any(f".{part}." in f".{layer}." for part in parts)

    if among(family.unquantized):
        return None
    return "int8" if among(family.modulation) else kind


def quantized(layer: nn.Linear, kind: str) -> nn.Linear:
    """The layer, or one in its place, with its weight as `kind`, where that lies; its bias stays."""
    dtype = layer.weight.dtype
    if kind == "nf4":
        import bitsandbytes as bnb

        weight, bias = layer.weight.data, layer.bias
        with torch.device("meta"):
            layer = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, bias is not None, compute_dtype=dtype, quant_type="nf4"
            )
        weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer).to(weight.device)
        layer.weight, layer.bias = weight, bias
        layer.support_avx512bf16_for_cpu = False  # evaluation would repack the weights for good, without gradients
    else:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

        how = Float8WeightOnlyConfig if kind == "fp8" else partial(Int8WeightOnlyConfig, version=2)
        quantize_(layer, how(set_inductor_config=False))  # else it would change the compiler's options for good
        layer.weight.requires_grad_(False)
    return layer


def load_quantized(
    transformer: nn.Module,
    tensors: Mapping[str, Callable[[], Tensor]],
    kind: str,
    *,
    family: Family,
    dtype: torch.dtype,
    device: torch.device,
    place: Callable[[str], torch.device] | None = None,
) -> None:
    """Fill `transformer`, which lies on the meta device, with its checkpoint's `tensors`, read one at a time.

    A weight is quantised on `device`, and stays there unless `place` gives another device for its name. The rest is
    of `dtype`. Raises InputError where the tensors are not the transformer's.
    """
    shapes = {name: parameter.shape for name, parameter in transformer.named_parameters()}
    if unmatched := sorted(shapes.keys() ^ tensors.keys()):
        where = "checkpoint" if unmatched[0] in tensors else "transformer"
        raise InputError("model", f"{unmatched[0]} is in the {where} alone; the weights are not those of its config")
    counts: Counter[str] = Counter()
    for name, read in tqdm(tensors.items(), desc=f"quantizing to {kind}", disable=None):
        owner, _, part = name.rpartition(".")
        layer, value = transformer.get_submodule(owner), read().to(device, dtype)
        if value.shape != shapes[name]:
            expected = list(shapes[name])
            raise InputError("model", f"{name} has shape {list(value.shape)}, expected {expected} by the config")
        setattr(layer, part, nn.Parameter(value, requires_grad=False))
        stored = kind_of(owner, kind, family) if part == "weight" and isinstance(layer, nn.Linear) else None
        if stored:
            layer = quantized(layer, stored)
            transformer.set_submodule(owner, layer)
            counts[stored] += 1
        if place:
            setattr(layer, part, _moved(getattr(layer, part), place(name)))
    layers = ", ".join(f"{count} linear layers to {stored}" for stored, count in counts.most_common())
    logger.info("quantised: %s; the rest is %s", layers, str(dtype).removeprefix("torch."))


def _moved(parameter: Any, device: torch.device) -> Any:
    """A parameter on another device; of its own class, which knows how."""
    if parameter.device == device:
        return parameter
    moved = parameter.to(device)
    return moved if isinstance(moved, nn.Parameter) else nn.Parameter(moved, requires_grad=False)


def expanded(weight: Tensor) -> Tensor:
    """The values that a layer computes with, of a weight that may be quantised; in bfloat16 but for its rounding."""
    if state := getattr(weight, "quant_state", None):
        import bitsandbytes as bnb

        return bnb.functional.dequantize_4bit(weight.data, state)
    return weight.dequantize() if hasattr(weight, "__tensor_flatten__") else weight.data
