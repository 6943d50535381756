"""What is asked of a device that computes: its memory, its kernels, the places where the host waits for it.

On the CPU, where a test runs all steps, operations of torch stand for kernels, and nothing waits.
"""

import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from hf_qie.training.metrics import peak_memory_bytes

WAITS = "called a synchronizing CUDA operation"  # torch's warning in set_sync_debug_mode("warn")
ATTENTION = re.compile(r"flash|fmha|sdpa|attention|mem_eff", re.IGNORECASE)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Count peaks of memory from here on; what a CPU's process took at most cannot be reset."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> tuple[int, int]:
    """The most that tensors took since `reset_peak`, and the most that torch's allocator reserved for them."""
    allocated = peak_memory_bytes(device)
    return allocated, torch.cuda.max_memory_reserved(device) if device.type == "cuda" else allocated


@dataclass(frozen=True)
class Kernel:
    """One that has run."""

    name: str
    start_ns: int
    end_ns: int


@dataclass
class Trace:
    """All kernels of a stretch of time; copies of memory count as kernels."""

    kernels: list[Kernel] = field(default_factory=list)

    @property
    def span_s(self) -> float:
        """From the start of the first to the end of the last."""
        ends = [kernel.end_ns for kernel in self.kernels]
        return (max(ends) - min(kernel.start_ns for kernel in self.kernels)) / 1e9 if ends else 0.0

    @property
    def busy_share(self) -> float:
        """Of that time, in which at least one runs."""
        busy, until = 0, 0
        for kernel in sorted(self.kernels, key=lambda one: one.start_ns):
            busy += max(kernel.end_ns - max(kernel.start_ns, until), 0)
            until = max(until, kernel.end_ns)
        return busy / 1e9 / self.span_s if self.span_s else 0.0

    def longest(self, count: int) -> list[tuple[str, float, int]]:
        """Name, share of the time of all, and calls of the kernels that take the most in all."""
        taken, calls = Counter(), Counter()
        for kernel in self.kernels:
            taken[kernel.name] += kernel.end_ns - kernel.start_ns
            calls[kernel.name] += 1
        total = sum(taken.values()) or 1
        return [(name, ns / total, calls[name]) for name, ns in taken.most_common(count)]

    @property
    def attention(self) -> list[str]:
        """Names of kernels of attention, those that take the most first."""
        return [name for name, _, _ in self.longest(len(self.kernels)) if ATTENTION.search(name)]


@contextmanager
def traced(device: torch.device) -> Iterator[Trace]:
    """A trace that is filled at the end; of a GPU it has the kernels of all threads, of the CPU those of this one.

    The events are read as the profiler has them: torch's own tables take minutes for steps of 100,000 kernels.
    """
    of_gpu, trace = device.type == "cuda", Trace()
    with profile(activities=[ProfilerActivity.CUDA if of_gpu else ProfilerActivity.CPU]) as profiler:
        yield trace
        synchronise(device)
    wanted = DeviceType.CUDA if of_gpu else DeviceType.CPU
    for event in profiler.profiler.kineto_results.events():
        if event.device_type() == wanted and not event.is_user_annotation():
            trace.kernels.append(Kernel(event.name(), event.start_ns(), event.end_ns()))


@contextmanager
def waits_counted(device: torch.device) -> Iterator[Counter[str]]:
    """How often the host waits for a GPU, by file and line; torch warns at each call that makes it wait.

    Not seen are calls of CUDA that torch does not check, as `torch.cuda.synchronize` itself.
    """
    found: Counter[str] = Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", WAITS)
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
            found.update(place_of(one) for one in caught if WAITS in str(one.message))
    for one in caught:
        if WAITS not in str(one.message):
            sys.stderr.write(f"{one.category.__name__}: {one.message}\n")


def place_of(caught: warnings.WarningMessage) -> str:
    """File and line, from the name of the library or of the package on."""
    path = re.sub(r".*/(site-packages/|(?=hf_qie/|tests/))", "", caught.filename)
    return f"{path}:{caught.lineno}"


def shortened(names: Sequence[str], length: int = 90) -> str:
    """Names of kernels, which are hundreds of characters long, for a table."""
    return "; ".join(name if len(name) <= length else name[: length - 3] + "..." for name in names)
