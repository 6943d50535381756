"""Loss by task, throughput and memory for the log, and the check that losses are finite."""

import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from hf_qie.data.collate import Batch
from hf_qie.training.cost import Utilisation

NAMED = 16  # rows of an error message


class NotFinite(RuntimeError):
    """A loss or a gradient is NaN or infinite."""


class _MicroBatch(NamedTuple):
    """This rank's rows of a micro-batch, their losses on its device."""

    task: list[str]
    row: list[int]
    losses: Tensor  # [B]


class LossMeter:
    """The losses and groups of this rank's rows since the last log, and whether the latest losses are finite."""

    def __init__(self, accelerator: Accelerator, tasks: Sequence[str]):
        self.accelerator, self.tasks = accelerator, sorted(tasks)
        self.sums = torch.zeros(2, len(self.tasks), dtype=torch.float64)  # of the losses, of the rows
        self.drawn: Counter[tuple[str, int]] = Counter()  # rows since the last log, by group of the mixture
        self.drawn_in_all: Counter[tuple[str, int]] = Counter()
        self.of_step: list[_MicroBatch] = []
        self.checked: list[_MicroBatch] = []  # of the latest step that was checked
        self.unchecked: list[tuple[int, list[_MicroBatch], Tensor]] = []

    def add(self, batch: Batch, losses: Tensor) -> None:
        """Add the losses `[B]` of a micro-batch."""
        self.of_step.append(_MicroBatch(batch["task"], batch["row"], losses.detach()))
        self.drawn.update((task, len(batch["grids"]) - 1) for task in batch["task"])

    def end_step(self, step: int) -> None:
        """End a step, without waiting for the device: `check` asks for the result."""
        broken = ~torch.isfinite(torch.cat([part.losses for part in self.of_step])).all()
        # reduced, so that all ranks end at the same step
        self.unchecked.append((step, self.of_step, self.accelerator.reduce(broken.float())))
        self.of_step = []

    def check(self, *, last: bool) -> None:
        """Raise NotFinite for a step with a loss that is not finite; unless `last`, the latest step waits."""
        while len(self.unchecked) > (0 if last else 1):
            step, self.checked, broken = self.unchecked.pop(0)
            if broken:
                bad = [row for row in self._rows() if not abs(row[2]) < float("inf")]
                raise NotFinite(_message(f"step {step}: the loss of {_names(bad)}"))
            index = torch.tensor([self.tasks.index(task) for part in self.checked for task in part.task])
            losses = torch.cat([part.losses for part in self.checked]).cpu().double()
            self.sums[0].index_add_(0, index, losses)
            self.sums[1].index_add_(0, index, torch.ones_like(losses))

    def check_gradient(self, step: int, norm: float) -> None:
        """Raise NotFinite for a gradient `norm`, the same on all ranks, that is not finite."""
        if not abs(norm) < float("inf"):
            what = f"the norm of the gradient ({norm:g}), though not the loss of {_names(self._rows())},"
            raise NotFinite(_message(f"step {step}: {what}"))

    def _rows(self) -> list[tuple[str, int, float]]:
        """Task, row and loss of the rows of the latest step that was checked, on all ranks."""
        mine = [row for part in self.checked for row in zip(part.task, part.row, part.losses.tolist(), strict=True)]
        return sorted(gather_object(mine))

    def by_task(self) -> dict[str, float]:
        """The mean over each task's draws since the last log, on all ranks, in float64."""
        total, count = self.accelerator.reduce(self.sums.to(self.accelerator.device)).tolist()
        self.sums.zero_()
        return {f"loss/{task}": total[i] / count[i] for i, task in enumerate(self.tasks) if count[i]}

    def drawn_since_log(self) -> Counter[tuple[str, int]]:
        """The rows since the last log on all ranks, by group of the mixture."""
        drawn = sum(gather_object([self.drawn]), Counter())
        self.drawn.clear()
        self.drawn_in_all += drawn
        return drawn


def _names(rows: Sequence[tuple[str, int, float]]) -> str:
    return ", ".join(f"{task} row {row} ({loss:g})" for task, row, loss in rows[:NAMED])


def _message(what: str) -> str:
    return (
        f"{what} is not finite. Nothing is saved of this state: start again to resume from the last checkpoint; lower "
        "training.learning_rate, or remove these rows, if it happens again"
    )


class Throughput:
    """Rows, tokens and seconds of this rank's steps since the last log; evaluation, images and saving do not count."""

    def __init__(self, accelerator: Accelerator, utilisation: Utilisation | None):
        """`utilisation`: how operations are counted, where the device's peak is known."""
        self.accelerator, self.utilisation = accelerator, utilisation
        self.started = 0.0
        self.reset()

    def reset(self) -> None:
        """Start counting from zero."""
        self.rows = self.tokens = 0
        self.flops = self.seconds = self.waited = 0.0

    @contextmanager
    def fetching(self) -> Iterator[None]:
        """Around the fetch of a step's batches, with which the step begins."""
        self.started = time.perf_counter()
        yield
        self.waited += time.perf_counter() - self.started

    def add(self, batches: Sequence[Batch]) -> None:
        """Add the batches of a step, still on the CPU."""
        for batch in batches:
            self.rows += len(batch["row"])
            num_latents = sum(height * width for height, width in batch["grids"])
            num_tokens = batch["prompt_mask"].sum(dim=1).numpy()
            self.tokens += len(batch["row"]) * num_latents + int(num_tokens.sum())
            if self.utilisation:
                self.flops += self.utilisation.row_flops(num_latents, num_tokens)

    def end_step(self) -> None:
        """End a step."""
        self.seconds += time.perf_counter() - self.started

    def read(self) -> dict[str, float]:
        """Rows and tokens a second over all ranks, the slowest rank's wait for data, the largest peak of memory.

        Where the device's peak is known, also the share of it that the model's operations reach.
        """
        device = self.accelerator.device
        mine = [self.rows, self.tokens, self.flops, self.seconds, self.waited, _peak_memory_bytes(device) / 1e9]
        ranks = self.accelerator.gather(torch.tensor([mine], dtype=torch.float64, device=device))
        rows, tokens, flops, *_ = ranks.sum(dim=0).tolist()
        *_, seconds, waited, memory = ranks.amax(dim=0).tolist()
        self.reset()
        found = {
            "rows_per_second": rows / seconds,
            "tokens_per_second": tokens / seconds,
            "seconds_waiting_for_data": waited,
            "peak_memory_gb": memory,
        }
        if self.utilisation:
            found["model_flops_utilisation"] = flops / seconds / (len(ranks) * self.utilisation.peak)
        return found


def _peak_memory_bytes(device: torch.device) -> int:
    """The most that tensors took on `device` so far; on the CPU, the most that the process took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # kilobytes but for macOS
