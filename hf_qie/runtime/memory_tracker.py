"""What a pass takes, before a weight is read: on fake tensors nothing is computed or allocated.

Workspaces of kernels, fragmentation of the allocator and the device's context are not seen.
"""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_qie.runtime.ledger import Ledger, on_device

UNSEEN_SHARE, UNSEEN_BYTES = 0.03, 10**9  # of the peak, and on top of it: what is not seen


def fake(module: nn.Module) -> nn.Module:
    """`module`, built on the meta device, with fake weights on the CPU; a pass through it takes real inputs too."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return module.to_empty(device="cpu").eval().requires_grad_(False)


def forward_peak(module: Callable[[Any], Any], inputs: Any) -> int:
    """Bytes of all that a pass of `module` makes, at its peak; its weights and `inputs` are not counted."""
    with Ledger() as ledger:
        module(inputs)
    return int(on_device(ledger.peaks[None]))


def num_bytes(module: nn.Module) -> int:
    """Of its parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
