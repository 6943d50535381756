"""Where five steps of training make the host wait for the device, and the kernels that take the most of them."""

from collections.abc import Iterator
from contextlib import ExitStack

from gpu.cases import Case, Context, recipe_of, set_of
from gpu.devices import shortened, traced, waits_counted
from gpu.results import Result
from gpu.weights import random_transformers
from transformers import TrainerCallback

from hf_qie.training.setup import build_trainer

WARM_UP, STEPS, KERNELS = 2, 5, 10
PLACES = 8  # of waits that get a line


class Watch(TrainerCallback):
    """Counts waits over some steps, then traces kernels over as many: tracing waits for the device itself.

    Neither has the last step, which logs.
    """

    def __init__(self, device, warm_up: int, steps: int):
        self.device, self.stack = device, ExitStack()
        self.begins = {warm_up: self.count, warm_up + steps: self.trace}
        self.ends = {warm_up + steps, warm_up + 2 * steps}

    def count(self):
        self.waits = self.stack.enter_context(waits_counted(self.device))

    def trace(self):
        self.kernels = self.stack.enter_context(traced(self.device))

    def on_step_begin(self, args, state, control, **_):
        if begin := self.begins.get(state.global_step):
            begin()

    def on_step_end(self, args, state, control, **_):
        if state.global_step in self.ends:
            self.stack.close()


def measure(context: Context, *, step: str, case: Case) -> Iterator[Result]:
    """Five steps counted, and five traced."""
    case, steps = (case.shrunk(), 1) if context.small else (case, STEPS)
    recipe = recipe_of(case, context, max_steps=WARM_UP + 2 * steps + 1)
    with random_transformers(context.device):
        trainer, _ = build_trainer(recipe, {"edit": set_of(case, recipe, small=context.small)})
        trainer.add_callback(watch := Watch(trainer.args.device, WARM_UP, steps))
        trainer.train()
    waits, trace = watch.waits, watch.kernels
    yield Result(step=step, what="waits of the host a step", value=waits.total() / steps, most=0)
    for place, count in waits.most_common(PLACES):
        yield Result(step=step, what=f"waits a step at {place}", value=count / steps)
    yield Result(step=step, what="kernels a step", value=len(trace.kernels) / steps)
    yield Result(step=step, what="of steps a kernel runs", value=trace.busy_share)
    attention = shortened(trace.attention[:3]) or "none by name"
    yield Result(step=step, what="kernels of attention", value=attention)
    for name, share, calls in trace.longest(KERNELS):
        what = f"of kernels' time, {calls / steps:,.0f} calls a step: {shortened([name])}"
        yield Result(step=step, what=what, value=share)
