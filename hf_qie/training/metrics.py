"""Loss by task, throughput and memory for the log, and the check that losses are finite."""

import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from hf_qie.data.collate import Batch
from hf_qie.errors import InputError
from hf_qie.training.cost import BatchFlops


class NotFinite(InputError):
    """A loss or a gradient is NaN or infinite: of what was trained on, or how fast."""


class Arriving:
    """Numbers on their way from the device: to read them waits for what made them, and for nothing launched since.

    A copy that starts when they are read would wait for all of it, as the device works in order.
    """

    def __init__(self, numbers: Tensor):
        is_cuda = numbers.device.type == "cuda"
        self.numbers = numbers.to("cpu", non_blocking=is_cuda)  # pinned
        self.copied = torch.accelerator.current_stream().record_event() if is_cuda else None

    def read(self) -> list[float]:
        """The numbers."""
        if self.copied:
            self.copied.synchronize()
        return self.numbers.tolist()


class LossMeter:
    """The losses and groups of this rank's rows since the last log, and whether the latest losses are finite."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.sums: Counter[str] = Counter()  # of the losses since the last log, by task
        self.drawn: Counter[tuple[str, int]] = Counter()  # rows since the last log, by group of the mixture
        self.drawn_in_all: Counter[tuple[str, int]] = Counter()
        self.counts: Counter[str] = Counter()  # of the losses in `sums`
        self.of_step: list[tuple[list[tuple[str, int]], Tensor]] = []  # task and row of each draw, losses [B x K]
        self.checked: list[tuple[str, int, float]] = []  # task, row and loss, of the latest step that was checked
        # step, task and row of each draw, their losses and the share of ranks where all are finite
        self.unchecked: list[tuple[int, list[tuple[str, int]], Arriving]] = []

    def add(self, batch: Batch, losses: Tensor) -> None:
        """Add the losses `[B x K]` of a micro-batch, K of each row."""
        count = len(losses) // len(batch["row"])
        rows = [row for row in zip(batch["task"], batch["row"], strict=True) for _ in range(count)]
        self.of_step.append((rows, losses.detach()))
        self.drawn.update((task, len(batch["grids"]) - 1) for task in batch["task"])

    def end_step(self, step: int) -> None:
        """End a step, without waiting for the device: `check` asks for the result."""
        rows = [row for rows, _ in self.of_step for row in rows]
        losses = torch.cat([losses for _, losses in self.of_step])
        finite = torch.isfinite(losses).all(dim=0, keepdim=True).float()
        # reduced, so that all ranks end at the same step
        numbers = torch.cat([losses, self.accelerator.reduce(finite, reduction="mean")])
        self.unchecked.append((step, rows, Arriving(numbers)))
        self.of_step = []

    def check(self, *, last: bool) -> None:
        """Raise NotFinite for a step with a loss that is not finite; unless `last`, the latest step waits."""
        while len(self.unchecked) > (0 if last else 1):
            step, rows, numbers = self.unchecked.pop(0)
            *losses, finite = numbers.read()
            self.checked = [(*row, loss) for row, loss in zip(rows, losses, strict=True)]
            if finite < 1:
                bad = [row for row in gather_object(self.checked) if not abs(row[2]) < float("inf")]
                raise NotFinite(_message(f"step {step}: the loss of {named(bad)}"))
            for task, _, loss in self.checked:
                self.sums[task] += loss
                self.counts[task] += 1

    def check_gradient(self, step: int, norm: float) -> None:
        """Raise NotFinite for a gradient `norm`, the same on all ranks, that is not finite."""
        if not abs(norm) < float("inf"):
            what = f"the norm of the gradient ({norm:g}), though not the loss of {named(gather_object(self.checked))},"
            raise NotFinite(_message(f"step {step}: {what}"))

    def read(self) -> tuple[dict[str, float], Counter[tuple[str, int]]]:
        """Since the last log, on all ranks: the mean loss by task, in float64, and rows by group of the mixture."""
        self.check(last=True)  # what is counted in `drawn` is in `sums` too
        mine = (self.sums, self.counts, self.drawn)
        sums, counts, drawn = totals = (Counter(), Counter(), Counter())
        for one in gather_object([mine]):
            for total, part in zip(totals, one, strict=True):
                total.update(part)
        for part in mine:
            part.clear()
        self.drawn_in_all += drawn
        return {f"loss/{task}": sums[task] / counts[task] for task in sorted(counts)}, drawn


def named(rows: Iterable[tuple[str, int, float]]) -> str:
    """Task, row and loss of the first 16 of some rows, as a message has them."""
    return ", ".join(f"{task} row {row} ({loss:g})" for task, row, loss in sorted(rows)[:16])


def _message(what: str) -> str:
    return (
        f"{what} is not finite. Nothing is saved of this state: start again to resume from the last checkpoint; lower "
        "training.learning_rate, or remove these rows, if it happens again"
    )


class Throughput:
    """Draws, tokens and seconds of this rank's steps since the last log, without evaluation, images and saving."""

    def __init__(self, accelerator: Accelerator, *, flops_of: BatchFlops | None = None, peak: float | None = None):
        """`flops_of` counts the operations of a batch, and `peak` is how many the device can do a second, if known."""
        self.accelerator, self.flops_of, self.peak = accelerator, flops_of, peak
        self.reset()

    def reset(self) -> None:
        """Start counting from zero."""
        self.draws = self.tokens = 0
        self.flops = self.seconds = self.waited = 0.0

    def add(self, batches: Sequence[Batch], *, started: float) -> None:
        """Add the batches of a step, still on the CPU; with the wait for them the step `started`."""
        self.started = started
        self.waited += time.perf_counter() - started
        for batch in batches:
            target, *sources = map(math.prod, batch["grids"])
            self.draws += len(batch["draw"])
            self.tokens += len(batch["draw"]) * target + len(batch["row"]) * sum(sources)
            self.tokens += sum(batch["prompt_lengths"])
            if self.flops_of:
                self.flops += self.flops_of(batch)

    def end_step(self) -> None:
        """End a step."""
        self.seconds += time.perf_counter() - self.started

    def read(self) -> dict[str, float]:
        """Rows and tokens a second over all ranks, the slowest rank's wait for data, the largest peak of memory.

        A row counts once for each of its draws. Where the device's peak is known, also the share of it that the
        model's operations reach.
        """
        device = self.accelerator.device
        memory = peak_memory_bytes(device) / 1e9, reserved_memory_bytes(device) / 1e9
        mine = [self.draws, self.tokens, self.flops, self.seconds, self.waited, *memory]
        ranks = self.accelerator.gather(torch.tensor([mine], dtype=torch.float64, device=device))
        draws, tokens, flops, *_ = ranks.sum(dim=0).tolist()
        *_, seconds, waited, allocated, reserved = ranks.amax(dim=0).tolist()
        self.reset()
        found = {
            "rows_per_second": draws / seconds,
            "tokens_per_second": tokens / seconds,
            "seconds_waiting_for_data": waited,
            "peak_memory_gb": allocated,
        }
        if reserved:
            found["peak_reserved_memory_gb"] = reserved
        if self.flops_of:
            found["model_flops_utilisation"] = flops / seconds / (len(ranks) * self.peak)
        return found


def peak_memory_bytes(device: torch.device) -> int:
    """The most that tensors took on `device` since the start of training; on the CPU, the most of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # kilobytes but for macOS


def reserved_memory_bytes(device: torch.device) -> int:
    """The most that torch's allocator held on `device` for them, fragments included; 0 on the CPU."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0
