"""FSDP2: that it is active, that all that trains is trained, and whole tensors out of shards."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from hf_qie.config.recipe import Recipe
from hf_qie.errors import InputError

# accelerate's own policy would also add up gradients over the ranks in bfloat16
BF16_POLICY = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def fsdp_arguments(recipe: Recipe, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What TrainingArguments are told of FSDP, by the `settings` of recipe and launcher."""
    told = {"fsdp": True, "fsdp_config": {**settings, "version": 2}}
    given = recipe.training.get("accelerator_config", {})
    if isinstance(given, dict):  # gradients are sharded after every micro-batch: 20B whole ones fit on no device
        told["accelerator_config"] = {"gradient_accumulation_kwargs": {"sync_each_batch": True}} | given
    return told


def refuse_inactive(arguments: TrainingArguments) -> None:
    """Raise InputError where accelerate would silently leave out the FSDP that `arguments` ask for."""
    state = PartialState()
    if arguments.fsdp and state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise InputError(
            f"training.fsdp: asked for, but not active in {state.num_processes} process(es) on {state.device.type}; "
            "it needs `accelerate launch` and ranks on accelerators"
        )


def check_sharded(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise unless every parameter is sharded, and the optimizer holds each one that trains.

    accelerate finds the optimizer's parameters again by their addresses; where these are one and the same, as on the
    meta device, one tensor trains and the others do not, without a word.
    """
    parameters = list(model.parameters())
    if not all(isinstance(parameter, DTensor) for parameter in parameters):
        raise InputError("training.fsdp: asked for, but not active: the model came back whole")
    trained = {id(parameter) for parameter in parameters if parameter.requires_grad}
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if held != trained:
        raise RuntimeError(
            f"the optimizer holds {len(held)} distinct tensors, {len(held & trained)} of the {len(trained)} that train"
        )


def gathered(tensors: Mapping[str, Tensor], *, keep: bool, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Each tensor whole and on the CPU, as `dtype` if one is given; {} on ranks that do not `keep` them.

    One at a time, so that no device ever holds more. Where tensors are sharded, every rank calls it.
    """
    whole = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.to(tensor.device_mesh.device_type).full_tensor()  # shards may be offloaded
        if keep:
            whole[name] = tensor.to("cpu", dtype)
    return whole
