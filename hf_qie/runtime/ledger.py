"""Bytes of live tensors by category, of tensors without data as of others.

torch's own `MemTracker` fails on frozen parameters, and its `FSDPMemTracker` counts what DTensor makes on the meta
device to learn shapes.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS, HOST = "weights", "gradients", "optimizer", "activations", "host"


class Ledger(TorchDispatchMode):
    """Follows the storages that operations make; keeps the bytes of each category at the peak of each part of a step.

    `HOST` is not on the device, and does not count in a peak.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peaks: dict[Any, Counter[str]] = {}  # by part
        self.part: Any = None
        self.category = ACTIVATIONS  # of what is made from now on
        self._known: dict[int, tuple[str, int]] = {}  # storages by address: category, bytes

    def follow(self, tensor: Tensor, category: str | None = None) -> None:
        """Count the storage of `tensor` while it lives; with a `category` also one that is known under another."""
        for storage in storages(tensor):
            key = storage._cdata
            if key not in self._known:
                finalize(storage, self._forget, key).atexit = False
            elif category is None:
                continue
            else:
                self.add(self._known[key][0], -self._known[key][1])
            self._known[key] = category or self.category, storage.nbytes()
            self.add(*self._known[key])

    def add(self, category: str, num_bytes: float) -> None:
        """Count bytes, or with a minus fewer, beside those of storages."""
        self.live[category] += num_bytes
        if on_device(self.live) >= on_device(self.peaks.get(self.part, {})):
            self.peaks[self.part] = self.live.copy()

    def start(self, part: Any) -> None:
        """Begin a part of a step, whose peak is at least what lives now."""
        self.part = part
        self.add(ACTIVATIONS, 0)

    @contextmanager
    def making(self, category: str) -> Iterator[None]:
        """What is made meanwhile is of that category."""
        before, self.category = self.category, category
        yield
        self.category = before

    def _follows(self, value: Any) -> bool:
        return any(storage._cdata in self._known for storage in storages(value))

    def _forget(self, key: int) -> None:
        category, num_bytes = self._known.pop(key)
        self.live[category] -= num_bytes

    def __enter__(self) -> "Ledger":
        resize = self._resize = torch.UntypedStorage.resize_

        def followed(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            resize(storage, size)
            if known := self._known.get(storage._cdata):
                self._known[storage._cdata] = known[0], size
                self.add(known[0], size - known[1])
            return storage

        torch.UntypedStorage.resize_ = followed  # by which FSDP frees and fills what it gathers
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **kwargs or {})
        if any(value.alias_info for value in func._schema.returns) and not self._follows(args[0]):
            return made  # a view of a tensor from elsewhere
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.follow(tensor)
        return made


def on_device(counts: Mapping[str, float]) -> float:
    """Bytes on the device, of all categories."""
    return sum(counts.values()) - counts.get(HOST, 0)


def storages(tensor: Any) -> Iterator[torch.UntypedStorage]:
    """Of a tensor that wraps others (DTensor, torchao's) those of the others: its own only has its shape."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from storages(getattr(tensor, name))
    elif isinstance(tensor, Tensor):  # and not the mesh of a DTensor
        yield tensor.untyped_storage()
