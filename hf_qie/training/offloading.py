"""Frozen blocks and inputs of blocks that wait in CPU memory and come to the device when they are needed.

Streaming is our own code, as nothing that exists is right in all of it. FSDP2's `CPUOffloadPolicy` on one rank gives
the same gradients, but not under DDP, and cannot shard the quantised weights of torchao and bitsandbytes. diffusers'
group offloading hooks forward alone: backward brings block after block to the device and leaves all of them there.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.checkpoint import checkpoint

from hf_qie.config.memory import NUM_SLOTS
from hf_qie.errors import InputError

logger = get_logger(__name__)

BUFFER_BYTES = 2**30  # of host memory; pinned, torch rounds each up to a power of two: alone, weights take half more
ALIGNMENT_BYTES = 64  # of a weight in it


def streamed_blocks(transformer: nn.Module, count: int) -> dict[str, nn.Module]:
    """Which `count` blocks of a diffusers transformer are streamed, by name: evenly spread, in order of computation.

    The transformer may be an empty one. Raises InputError where it has fewer blocks.
    """
    kinds = transformer._repeated_blocks
    blocks = [(name, module) for name, module in transformer.named_modules() if type(module).__name__ in kinds]
    if count > len(blocks):
        message = f"got {count}, expected at most {len(blocks)}, the blocks of the transformer"
        raise InputError("memory.stream_blocks", message)
    if count and len({_shapes(block) for _, block in blocks}) > 1:
        raise InputError("memory.stream_blocks", f"got {count}, but the blocks of this transformer are not all alike")
    return dict(blocks[place * len(blocks) // count] for place in range(count))


def _shapes(block: nn.Module) -> tuple[tuple[str, torch.Size], ...]:
    """Of a block's frozen parameters, which share a slot."""
    return tuple((name, module._parameters[key].shape) for name, (module, key) in _frozen(block).items())


def stream_blocks(model: nn.Module, transformer: nn.Module, count: int, device: torch.device) -> "BlockStream":
    """Move `model` to `device`, but for the frozen weights of `count` blocks of its `transformer`.

    These stay in CPU memory, pinned if `device` is an accelerator, and are copied to the device ahead of use.
    """
    stream = BlockStream(list(streamed_blocks(transformer, count).values()), device)
    model.to(device)  # what is streamed is no parameter of it any more
    if device.type == "cpu":
        logger.warning("memory.stream_blocks: %d saves nothing, as training runs on the CPU", count)
    gigabytes = sum(home.nbytes for homes in stream.homes for home in homes) / 1e9
    logger.info("%d blocks are streamed: %.1f GB in CPU memory, on each rank", count, gigabytes)
    return stream


class BlockStream:
    """Lends streamed blocks the frozen weights of one of `NUM_SLOTS` slots on the device, by turns.

    The parameters of a block are those of its slot, so that all parameters of the model lie on the device. Before a
    block computes, a hook makes its slot hold its weights, then starts to copy those of the block that is next: the
    following one in a forward pass, the preceding one in a backward pass. A training step after the first copies
    2 x (count - NUM_SLOTS) blocks, from the CPU to the device alone.

    It relies on activation checkpointing, under which a block's weights are used between the hook and the end of its
    own forward, or of its recomputation and backward. The last operation of a block has to save a tensor for its
    backward, as a gate does, so that the recomputation comes first. Autograd runs nodes that were recorded last first:
    the backward of a block is launched to its end before the block before it is recomputed.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device):
        self.slots = [_slot(blocks[0], device) for _ in range(NUM_SLOTS)]
        self.held: list[int | None] = [None] * NUM_SLOTS  # the number of the block whose weights a slot holds
        self.copies = None if device.type == "cpu" else torch.Stream(device)
        self.copied: list[Any] = [None] * NUM_SLOTS  # events
        self.previous = -1
        self.homes: list[list[Tensor]] = []  # by the number of the block
        keep = _HostMemory(pin=self.copies is not None).keep
        for number, block in enumerate(blocks):
            slot, homes = self.slots[number % NUM_SLOTS], []
            for name, (module, key) in _frozen(block).items():
                homes += map(keep, _plain(module._parameters[key]))
                module._parameters[key] = slot[name]
                if hasattr(slot[name], "quant_state"):  # bitsandbytes' module refers to it as well
                    module.quant_state = slot[name].quant_state
            self.homes.append(homes)
            block.register_forward_pre_hook(partial(self._before, number))

    @torch.compiler.disable  # what is compiled of a block starts behind it
    def _before(self, number: int, *_: Any) -> None:
        """Wait for the weights of a block that is about to compute, and start to copy those of the next one."""
        self._bring(number)
        if self.copies:
            torch.accelerator.current_stream().wait_event(self.copied[number % NUM_SLOTS])
        forward = number > self.previous or number == 0  # the last block, twice in succession, has turned
        following = number + 1 if forward else number - 1
        if following in range(len(self.homes)):
            self._bring(following)
        self.previous = number

    def _bring(self, number: int) -> None:
        """Start to copy the weights of a block into its slot, unless they are there."""
        place = number % NUM_SLOTS
        if self.held[place] == number:
            return
        self.held[place] = number
        if self.copies is None:
            self._copy(number)
            return
        self.copies.wait_stream(torch.accelerator.current_stream())  # the block before may still use the slot
        with self.copies:
            self._copy(number)
            self.copied[place] = self.copies.record_event()

    @torch.no_grad()
    def _copy(self, number: int) -> None:
        slot = self.slots[number % NUM_SLOTS]
        into = [tensor for parameter in slot.values() for tensor in _plain(parameter)]
        for tensor, home in zip(into, self.homes[number], strict=True):
            tensor.copy_(home, non_blocking=True)


def _frozen(block: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Where the weights of the base are, by names that do not depend on which layers of the block have adapters."""
    return {
        f"{path}.{key}".replace(".base_layer", ""): (module, key)
        for path, module in block.named_modules()
        for key in module._parameters
        if module._parameters[key] is not None and ".lora_" not in f".{path}.{key}"
    }


def _slot(block: nn.Module, device: torch.device) -> dict[str, nn.Parameter]:
    """Parameters on the device like the frozen ones of a block."""
    slot = {}
    for name, (module, key) in _frozen(block).items():
        moved = copy.deepcopy(module._parameters[key]).to(device)
        slot[name] = moved if isinstance(moved, nn.Parameter) else nn.Parameter(moved, requires_grad=False)
    return slot


def _plain(value: Any) -> Iterator[Tensor]:
    """The tensors that hold the numbers of a weight: itself, or those of a quantised one, with its scales."""
    if isinstance(value, Tensor) and is_traceable_wrapper_subclass(value):  # torchao
        for name in value.__tensor_flatten__()[0]:
            yield from _plain(getattr(value, name))
    elif isinstance(value, Tensor):
        yield value.detach()
    state = getattr(value, "quant_state", None) if isinstance(value, Tensor) else value  # bitsandbytes
    for part in vars(state).values() if state is not None else ():
        if isinstance(part, Tensor) or type(part) is type(state):
            yield from _plain(part)


class _HostMemory:
    """Copies of tensors in CPU memory, in buffers that hold many."""

    def __init__(self, *, pin: bool):
        self.pin, self.room = pin, torch.empty(0, dtype=torch.uint8)

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy, with the strides of `tensor`, which covers its memory without gaps.

        Raises InputError where there is no room for it.
        """
        size = math.ceil(tensor.nbytes / ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        if len(self.room) < size:
            num_bytes = max(size, BUFFER_BYTES)
            try:
                self.room = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self.pin)
            except RuntimeError as error:  # systems limit pinned memory, some to half of all
                why = str(error).partition("\n")[0]
                message = f"no {num_bytes / 1e9:.1f} GB more of {'pinned ' * self.pin}CPU memory: {why}; stream fewer"
                raise InputError("memory.stream_blocks", message) from error
        piece, self.room = self.room[: tensor.nbytes], self.room[size:]
        return piece.view(tensor.dtype).as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def checkpoint_on_cpu(device: torch.device) -> Callable[..., Any]:
    """For diffusers' `enable_gradient_checkpointing`: the inputs of a block wait in CPU memory for its recomputation.

    torch (2.14) copies on the stream that computes, without blocking the host: at 25 GB/s that is 40 ms for each GB,
    both ways 80 ms. trl's `OffloadActivations` has a stream of its own, but keeps up to five inputs on the device for
    it, makes the host wait at the end of each forward, and cannot be made without an accelerator.
    """
    place = {} if device.type == "cpu" else {"device_type": device.type}  # where it looks for pinned memory

    def checkpointed(block: nn.Module, *inputs: Any) -> Any:
        # only what the block is given: within it, tensors are not saved but computed again
        with save_on_cpu(pin_memory=True, **place):
            return checkpoint(block.__call__, *inputs, use_reentrant=False)

    return checkpointed
