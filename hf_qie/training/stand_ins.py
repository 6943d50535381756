"""What stands in a forecast for code that does not run on fake tensors, or does not tell the host from the device."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from hf_qie.models.base import Family
from hf_qie.models.quantization import check_packages, kind_of, quantized
from hf_qie.runtime.ledger import HOST, Ledger, storages
from hf_qie.training.precision import FusedRMSNorm


def checkpointed_elsewhere(ledger: Ledger, category: str, block: nn.Module, *inputs: Any) -> Any:
    """A checkpointed `block` whose inputs wait in memory of a `category`, as `checkpoint_on_cpu` has it."""

    def away(tensor: Tensor) -> Tensor:
        with ledger.making(category):
            if category != HOST:
                return tensor.clone()
            rounded = 1 << (tensor.nbytes - 1).bit_length()  # as torch does with pinned memory
            room = torch.empty(max(rounded, 1), dtype=torch.uint8)
            return room[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    with saved_tensors_hooks(away, torch.clone):
        return checkpoint(block.__call__, *inputs, use_reentrant=False)


def num_bytes(tensor: Tensor) -> int:
    """Of a tensor, or of what a quantised one holds."""
    return sum(storage.nbytes() for storage in storages(tensor))


def quantize_fake(model: nn.Module, kind: str, family: Family) -> None:
    """Quantise the frozen linear layers of `model` as `load_quantized` does; InputError without its packages."""
    check_packages(kind)
    for name, layer in list(model.named_modules()):
        stored = isinstance(layer, nn.Linear) and ".lora_" not in name and kind_of(name, kind, family)
        if stored:
            model.set_submodule(name, Nf4(layer) if stored == "nf4" else quantized(layer, stored))


class FusedNorm(FusedRMSNorm):
    """With a kernel of the CPU that keeps as much for backward as CUDA's: the CPU has none for this norm."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Another norm, of the same shape."""
        return nn.functional.layer_norm(hidden_states, self.dim, self.weight.to(hidden_states.dtype))


class Nf4(nn.Module):
    """A layer as large as bitsandbytes' `Linear4bit`, whose parameters cannot be made of fake tensors."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        count, of = layer.weight.numel(), {"dtype": torch.uint8, "device": layer.weight.device}
        # 4 bits a weight, for each 64 a scale of 8 bits, for each 256 of these one of 32
        sizes = (count // 2, count // 64, count // 64 // 64)
        self.weight, *scales = (nn.Parameter(torch.empty(size, **of), requires_grad=False) for size in sizes)
        self.scales, self.bias = nn.ParameterList(scales), layer.bias
        self.of = {"size": layer.weight.shape, "dtype": layer.weight.dtype, "device": layer.weight.device}

    def forward(self, inputs: Tensor) -> Tensor:
        """The output of a linear layer."""
        return _Expanded.apply(inputs, self.bias, self.of)


class _Expanded(torch.autograd.Function):
    """A linear layer whose weight is expanded in forward and again in backward, as in bitsandbytes' `MatMul4Bit`."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, bias: Tensor | None, of: dict[str, Any]) -> Tensor:
        ctx.of = of
        return nn.functional.linear(inputs, torch.empty(**of), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ torch.empty(**ctx.of), None, None
