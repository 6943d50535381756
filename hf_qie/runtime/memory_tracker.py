"""Bytes of the tensors that live while code runs, counted operation by operation.

On fake tensors nothing is computed or allocated, so that the peak of a pass is known before a weight is read. Kernel
workspaces, fragmentation of the allocator and the device's context are not seen.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any
from weakref import finalize

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS, HOST = "weights", "gradients", "optimizer", "activations", "host"
UNSEEN_SHARE, UNSEEN_BYTES = 0.03, 10**9  # of the peak, and on top of it: what is not seen


class Ledger(TorchDispatchMode):
    """Follows the bytes of live storages by category; keeps the categories at the peak of each part of the step."""

    def __init__(self):
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peaks: dict[Any, Counter[str]] = {}  # by part of the step
        self.part: Any = None
        self.category = ACTIVATIONS  # of what is made from now on
        self._known: dict[int, tuple[str, int]] = {}  # storages by their address: category, bytes

    def follow(self, tensor: Tensor, category: str | None = None) -> None:
        """Count the storage of `tensor` while it lives; `category` also moves one that is known."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            finalize(storage, self._forget, key).atexit = False
        elif category is None:
            return
        else:
            self._count(*self._known[key], sign=-1)
        self._known[key] = category or self.category, storage.nbytes()
        self._count(*self._known[key])

    def start(self, part: Any) -> None:
        """Begin a part of the step; its peak starts at what lives now."""
        self.part = part
        self._count(ACTIVATIONS, 0)

    def _count(self, category: str, num_bytes: int, sign: int = 1) -> None:
        self.live[category] += sign * num_bytes
        if _on_device(self.live) >= _on_device(self.peaks.get(self.part, {})):
            self.peaks[self.part] = self.live.copy()

    def _forget(self, key: int) -> None:
        category, num_bytes = self._known.pop(key)
        self.live[category] -= num_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **kwargs or {})
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.follow(tensor)
        return made


def _on_device(counts: Mapping[str, int]) -> int:
    return sum(counts.values()) - counts.get(HOST, 0)


def fake(module: nn.Module) -> nn.Module:
    """`module`, built on the meta device, with fake weights on the CPU; a pass through it takes real inputs too."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return module.to_empty(device="cpu").eval().requires_grad_(False)


def forward_peak(module: Any, inputs: Any) -> int:
    """Bytes of all that a pass of `module` makes, at its peak; its weights and `inputs` are not counted."""
    with Ledger() as ledger:
        module(inputs)
    return sum(ledger.peaks[None].values())


def num_bytes(module: nn.Module) -> int:
    """Of its parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
