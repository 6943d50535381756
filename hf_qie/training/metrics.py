"""Signs of life: the loss of each task, how fast rows go by, and an end to a run whose numbers are none."""

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
from torch.distributed.tensor import DTensor

from hf_qie.data.collate import Batch
from hf_qie.runtime.alive import at, at_any_length
from hf_qie.training.flops import Utilisation

NAMED = 16  # rows of an error message


class NotFinite(RuntimeError):
    """A loss or a gradient is NaN or infinite, so that all that follows is lost."""


class Noted(NamedTuple):
    """Losses of one micro-batch of this rank, on its device."""

    task: list[str]
    row: list[int]
    losses: Tensor  # [B]


class Losses:
    """The losses and groups of this rank's rows since the last log, and whether the latest steps are finite.

    Kept as sums: a run may never log.
    """

    def __init__(self, accelerator: Accelerator, tasks: Sequence[str]):
        self.accelerator, self.tasks = accelerator, sorted(tasks)
        self.sums = torch.zeros(2, len(self.tasks), dtype=torch.float64)  # of the losses, of the rows
        self.drawn: Counter[tuple[str, int]] = Counter()  # rows since the last log, by group of the mix
        self.drawn_in_all: Counter[tuple[str, int]] = Counter()
        self.of_step: list[Noted] = []
        self.unchecked: list[tuple[int, list[Noted], Tensor, Tensor]] = []

    def note(self, batch: Batch, losses: Tensor) -> None:
        """Take in the losses `[B]` of a micro-batch."""
        self.of_step.append(Noted(batch["task"], batch["row"], losses.detach()))
        self.drawn.update((task, len(batch["grids"]) - 1) for task in batch["task"])

    def end_step(self, step: int, gradient_norm: Tensor | float) -> None:
        """Take in the end of a step. It waits for no device: the answer is asked for a step later."""
        if isinstance(gradient_norm, DTensor):
            gradient_norm = gradient_norm.full_tensor()
        losses = torch.cat([noted.losses for noted in self.of_step])
        norm = torch.as_tensor(gradient_norm).to(losses)
        broken = ~torch.isfinite(torch.cat([losses, norm[None]])).all()
        # all ranks learn of it, and so all end at the same step
        self.unchecked.append((step, self.of_step, norm, self.accelerator.reduce(broken.float())))
        self.of_step = []

    def check(self, *, last: bool) -> None:
        """Raise NotFinite for a step with a loss or gradient that is none; the last one is looked at if `last`."""
        while len(self.unchecked) > (0 if last else 1):
            step, noted, norm, broken = self.unchecked.pop(0)
            if broken:
                raise NotFinite(self._what_broke(step, noted, float(norm)))
            index = torch.tensor([self.tasks.index(task) for batch in noted for task in batch.task])
            losses = torch.cat([batch.losses for batch in noted]).cpu().double()
            self.sums[0].index_add_(0, index, losses)
            self.sums[1].index_add_(0, index, torch.ones_like(losses))

    def _what_broke(self, step: int, noted: Sequence[Noted], norm: float) -> str:
        mine = [row for batch in noted for row in zip(batch.task, batch.row, batch.losses.tolist(), strict=True)]
        rows = sorted(gather_object(mine))
        bad = [row for row in rows if not abs(row[2]) < float("inf")]
        named = ", ".join(f"{task} row {row} ({loss:g})" for task, row, loss in (bad or rows)[:NAMED])
        what = (
            f"the loss of {named}"
            if bad
            else f"of the losses of {named} none, but the norm of the gradient ({norm:g})"
        )
        return (
            f"step {step}: {what} is not finite. Nothing is saved of this state: start again to go on from the last "
            "checkpoint; with a lower training.learning_rate, or without these rows, if it comes back"
        )

    def by_task(self) -> dict[str, float]:
        """The mean over each task's draws since the last log, on all ranks, in float64."""
        total, count = self.accelerator.reduce(self.sums.to(self.accelerator.device)).tolist()
        self.sums.zero_()
        return {f"loss/{task}": total[i] / count[i] for i, task in enumerate(self.tasks) if count[i]}

    def drawn_since_log(self) -> Counter[tuple[str, int]]:
        """The rows since the last log on all ranks, by group of the mix."""
        drawn = sum(gather_object([self.drawn]), Counter())
        self.drawn.clear()
        self.drawn_in_all += drawn
        return drawn


class Pace:
    """Rows, tokens and seconds of this rank's steps since the last log, without evaluation, pictures and saving."""

    def __init__(self, accelerator: Accelerator, utilisation: Utilisation | None):
        """`utilisation`: how operations are counted, where the device's peak is known."""
        self.accelerator, self.utilisation = accelerator, utilisation
        self.started = 0.0
        self.begin()

    def begin(self) -> None:
        """Count from here on."""
        self.rows = self.tokens = 0
        self.flops = self.seconds = self.waited = 0.0

    @contextmanager
    def fetching(self) -> Iterator[None]:
        """Around the fetch of a step's batches, with which the step begins."""
        at("the rows of a step")
        self.started = time.perf_counter()
        yield
        self.waited += time.perf_counter() - self.started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no part of a step, though it happens in one."""
        began = time.perf_counter()
        with at_any_length("pictures"):
            yield
        self.started += time.perf_counter() - began

    def note(self, batches: Sequence[Batch]) -> None:
        """Take in the batches of a step, still on the CPU."""
        for batch in batches:
            self.rows += len(batch["row"])
            num_latents = sum(height * width for height, width in batch["grids"])
            num_tokens = batch["prompt_mask"].sum(dim=1).numpy()
            self.tokens += len(batch["row"]) * num_latents + int(num_tokens.sum())
            if self.utilisation:
                self.flops += self.utilisation.row_flops(num_latents, num_tokens)

    def end_step(self) -> None:
        """Take in the end of a step."""
        self.seconds += time.perf_counter() - self.started

    def read(self) -> dict[str, float]:
        """Rows and tokens a second over all ranks; of the slowest rank the wait, of the fullest the memory.

        Where the device's peak is known, also the model's operations a second in parts of it.
        """
        device = self.accelerator.device
        mine = [self.rows, self.tokens, self.flops, self.seconds, self.waited, peak_memory_bytes(device) / 1e9]
        ranks = self.accelerator.gather(torch.tensor([mine], dtype=torch.float64, device=device))
        rows, tokens, flops, *_ = ranks.sum(dim=0).tolist()
        *_, seconds, waited, memory = ranks.amax(dim=0).tolist()
        self.begin()
        pace = {
            "rows_per_second": rows / seconds,
            "tokens_per_second": tokens / seconds,
            "seconds_waiting_for_data": waited,
            "peak_memory_gb": memory,
        }
        if self.utilisation:
            pace["model_flops_utilisation"] = flops / seconds / (len(ranks) * self.utilisation.peak)
        return pace


def peak_memory_bytes(device: torch.device) -> int:
    """The most that tensors took on `device` so far; on the CPU, the most that the process took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # kilobytes but for macOS
