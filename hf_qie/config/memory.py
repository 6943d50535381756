"""The recipe's section `memory`: what makes training fit a smaller device, and what it does not go together with."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from hf_qie.errors import InputError
from hf_qie.runtime.rules import Section, Whole, show

FLOAT16 = "int8 weights of up to 127 overflow float16 before they are scaled; train in bfloat16 or float32"
NUM_SLOTS = 2  # streamed blocks that are on the device at any time: the one that computes, and the next one


class Memory(Section):
    """How training is made to fit the device."""

    quantization: Literal["fp8", "int8", "nf4"] | None = Field(None, description="of the frozen base of a LoRA")
    stream_blocks: Whole = Field(
        0, description="transformer blocks that live in CPU memory and are copied ahead of use"
    )
    offload_activations: bool = Field(False, description="inputs of checkpointed blocks wait in CPU memory")


def is_checkpointed(training: Mapping[str, Any]) -> bool:
    """Whether a recipe's `training` computes activations of blocks again; the older name counts where it is alone."""
    return bool(training.get("activation_checkpointing", training.get("gradient_checkpointing", False)))


def check_memory(memory: Memory, *, lora: bool, training: Mapping[str, Any]) -> None:
    """Raise InputError where the section contradicts the rest of a recipe; FSDP is checked in launch.py."""
    for key in ("quantization", "stream_blocks"):
        if (value := getattr(memory, key)) and not lora:
            raise InputError(f"memory.{key}", f"got {show(value)}, but only a frozen base can be; set trainable.lora")
    if (kind := memory.quantization) and training.get("fp16"):
        raise InputError("memory.quantization", f"got {show(kind)} with training.fp16; {FLOAT16}")
    for key in ("quantization", "stream_blocks", "offload_activations"):  # else expanded weights stay until backward
        if (value := getattr(memory, key)) and not is_checkpointed(training):
            instead = ", in place of fsdp_config's" * ("fsdp_config" in training)
            message = f"got {show(value)}; it needs training.activation_checkpointing: true{instead}"
            raise InputError(f"memory.{key}", message)
    if 0 < memory.stream_blocks <= NUM_SLOTS:
        message = f"got {memory.stream_blocks}, expected 0 or more than {NUM_SLOTS}, which are always on the device"
        raise InputError("memory.stream_blocks", message)
