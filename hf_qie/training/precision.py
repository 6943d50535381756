"""Arithmetic of 16 bits, the same on one device, under DDP and in shards.

What trains, its gradients and the optimizer are float32. The inputs of the model are rounded once, each weight where
it is used, and every operation follows them, as in the official pipelines: FSDP2's policy for shards, here for a model
in one piece as well. There is no autocast: on CUDA its norms give float32, and with them all that is multiplied by
what they give. Sums within a norm, a product of matrices or attention are float32 all the same.
"""

from functools import partial
from typing import Any

import torch
from diffusers.models.normalization import RMSNorm
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn import functional

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # by the name that TrainingArguments have


class RoundedLinear(nn.Linear):
    """A layer of float32, in the dtype of its input."""

    def forward(self, inputs: Tensor) -> Tensor:
        """The output, in the same dtype."""
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        return functional.linear(inputs, self.weight.to(inputs.dtype), bias)


class FusedRMSNorm(RMSNorm):
    """In the dtype of its input, by torch's kernel: diffusers takes eight, with float32 tensors in between."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The output, in the same dtype."""
        return functional.rms_norm(hidden_states, self.dim, self.weight.to(hidden_states.dtype), self.eps)


def compute_in(model: nn.Module, precision: str) -> None:
    """Make `model` compute in bf16 or fp16, sharded or not; with "no" it stays as it is, to the bit."""
    if precision not in DTYPES:
        return
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype == torch.float32:
            module.__class__ = RoundedLinear
        elif type(module) is RMSNorm and module.weight is not None and module.bias is None:
            module.__class__ = FusedRMSNorm
        elif isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False  # peft's: else inputs become float32, as its weights are
    model.register_forward_pre_hook(partial(_round_inputs, DTYPES[precision]), with_kwargs=True)


def _round_inputs(dtype: torch.dtype, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
    def rounded(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(map(rounded, inputs)), {name: rounded(value) for name, value in named.items()}


def sharded_policy(precision: str) -> MixedPrecisionPolicy:
    """The same of shards: what is gathered is rounded before it is sent; gradients are added up in float32."""
    if precision not in DTYPES:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=DTYPES[precision], reduce_dtype=torch.float32)
