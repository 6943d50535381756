"""FSDP2: its arguments, checks that it is active and complete, and full tensors from shards."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from hf_qie.config.recipe import Recipe
from hf_qie.errors import InputError


def fsdp_arguments(recipe: Recipe, settings: Mapping[str, Any]) -> dict[str, Any]:
    """TrainingArguments' keys for FSDP, by the `settings` of recipe and launcher."""
    given = recipe.training.get("accelerator_config") or {}
    # gradients are sharded after every micro-batch: 20B unsharded ones fit on no device
    accelerator = {"gradient_accumulation_kwargs": {"sync_each_batch": True}} | given
    return {"fsdp": True, "fsdp_config": {**settings, "version": 2}, "accelerator_config": accelerator}


def refuse_inactive(arguments: TrainingArguments) -> None:
    """Raise InputError where accelerate would silently leave out the FSDP that `arguments` ask for."""
    state = PartialState()
    if arguments.fsdp and state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise InputError(
            f"training.fsdp: asked for, but not active in {state.num_processes} process(es) on {state.device.type}; "
            "it needs `accelerate launch` and ranks on accelerators"
        )


def check_sharded(model: nn.Module, optimizer: torch.optim.Optimizer, *, num_replicas: int = 1) -> None:
    """Raise unless every parameter is sharded in each of the replicas, and the optimizer holds each one that trains.

    accelerate maps the optimizer's parameters by their addresses; where these are all the same, as on the meta device,
    one tensor trains and the others do not, without an error.
    """
    parameters = list(model.parameters())
    if not all(isinstance(parameter, DTensor) for parameter in parameters):
        raise InputError("training.fsdp: asked for, but not active: no parameter is sharded")
    found = {math.prod(parameter.device_mesh.shape[:-1]) for parameter in parameters}
    if found != {num_replicas}:
        raise RuntimeError(f"{num_replicas} replicas were asked for, but parameters have {sorted(found)}")
    trained = {id(parameter) for parameter in parameters if parameter.requires_grad}
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if held != trained:
        raise RuntimeError(
            f"the optimizer holds {len(held)} distinct tensors, {len(held & trained)} of the {len(trained)} that train"
        )


def in_memory(model: nn.Module) -> nn.Module:
    """A model from the meta device, with memory of its own: accelerate tells parameters apart by their addresses.

    Its buffers keep their numbers: of those that are in no checkpoint none comes from rank 0.
    """
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    model.to_empty(device="cpu")
    for module, kept in buffers:
        module._buffers |= kept
    return model


def gathered(tensors: Mapping[str, Tensor], *, keep: bool, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The full tensors on the CPU, as `dtype` if one is given; {} on ranks that do not `keep` them.

    Gathered one at a time. Where tensors are sharded, every rank calls it.
    """
    full = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.to(tensor.device_mesh.device_type).full_tensor()  # shards may be offloaded
        if keep:
            full[name] = tensor.to("cpu", dtype)
    return full
