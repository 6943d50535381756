"""A step of training: seconds, memory and share of the peak, beside a bare loop over the same model and the forecast.

The transformer has its released shape and random values in bfloat16; adapters of rank 32 train through EditTrainer.
"""

import gc
import time
from collections.abc import Iterator
from itertools import islice

import torch
from gpu.cases import Case, Context, recipe_of, set_of
from gpu.devices import peak_bytes, reset_peak, synchronise
from gpu.results import Result, find
from gpu.weights import random_transformers
from transformers import TrainerCallback

from hf_qie.training.cost import BatchFlops, peak_flops
from hf_qie.training.forecast import Run, forecast
from hf_qie.training.losses import velocity_mse
from hf_qie.training.model import build_model
from hf_qie.training.objective import add_noise
from hf_qie.training.setup import build_trainer
from hf_qie.training.trainer import EditTrainer

WARM_UP, STEPS = 3, 6
SECONDS = "seconds a step"
SAMPLE = "seconds a sample"


class Window(TrainerCallback):
    """Seconds of the steps behind the first ones, and the share of them that waited for data.

    The device is waited for at both ends, and not between.
    """

    def __init__(self, trainer: EditTrainer, warm_up: int):
        self.trainer, self.warm_up = trainer, warm_up

    def on_train_begin(self, args, state, control, **_):
        reset_peak(args.device)

    def on_step_end(self, args, state, control, **_):
        throughput = self.trainer.throughput
        if state.global_step == self.warm_up:
            synchronise(args.device)
            throughput.reset()
            self.started = time.perf_counter()
        elif state.global_step == args.max_steps:
            synchronise(args.device)
            self.seconds = (time.perf_counter() - self.started) / (args.max_steps - self.warm_up)
            self.waited = throughput.waited / throughput.seconds


def measure(context: Context, *, step: str, case: Case, bare: bool = False, plain: str = "") -> Iterator[Result]:
    """Train by a case. `bare`: beside a bare loop; `plain`: name of the step to compare the seconds with."""
    case, steps = (case.shrunk(), 2) if context.small else (case, STEPS)
    warm_up = 1 if context.small else WARM_UP
    recipe = recipe_of(case, context, max_steps=warm_up + steps)
    with random_transformers(context.device):
        trainer, _ = build_trainer(recipe, {"edit": set_of(case, recipe, small=context.small)})
        device = trainer.args.device
        alone = bare_loop(trainer, warm_up, steps) if bare else None
        trainer.add_callback(window := Window(trainer, warm_up))
        trainer.train()
        peak, reserved = peak_bytes(device)
        beside, most = ("a bare loop over the same model", 1.05) if bare else (plain and f"step {plain}", None)
        other = alone if bare else find(context.earlier, plain, SECONDS)
        yield Result(step=step, what=SECONDS, value=window.seconds, unit="s", beside=beside, other=other, most=most)
        yield from rates(step, case, trainer, window, context)
        yield Result(step=step, what="of steps waiting for data", value=window.waited, most=0.02)
        expected = forecast(Run(recipe=recipe, shape=case.shape(small=context.small), device=device.type))
    forecast_gb = {"beside": "the forecast", "other": expected.peak / 1e9, "least": 0.9, "most": 1.1}
    yield Result(step=step, what="peak memory of tensors", value=peak / 1e9, unit="GB", **forecast_gb)
    needed = {"beside": "what check.py says is needed", "other": expected.needed / 1e9, "most": 1.0}
    yield Result(step=step, what="memory reserved by the allocator", value=reserved / 1e9, unit="GB", **needed)


def rates(step: str, case: Case, trainer: EditTrainer, window: Window, context: Context) -> Iterator[Result]:
    """Samples a second, and what the model's operations are of the device's peak, where that is known."""
    draws, device = case.draws_per_row, trainer.args.device
    yield Result(step=step, what="samples/s", value=draws / window.seconds)
    one = step.replace(f"-x{draws}", "-x1")
    other = find(context.earlier, one, SAMPLE) if one != step else None
    beside = {"beside": f"step {one}", "other": other} if one != step else {}
    yield Result(step=step, what=SAMPLE, value=window.seconds / draws, unit="s", **beside)
    family = trainer.objective.family
    flops_of = trainer.throughput.flops_of or BatchFlops(build_model(trainer.recipe, empty=True), family)
    batch = next(iter(trainer.get_train_dataloader()))
    done = flops_of(batch) / window.seconds
    yield Result(step=step, what="operations of the model", value=done / 1e12, unit="TFLOP/s")
    if peak := peak_flops(device, precision="bf16"):
        yield Result(step=step, what="of the device's peak in bfloat16 (MFU)", value=done / peak)


def bare_loop(trainer: EditTrainer, warm_up: int, steps: int) -> float:
    """Seconds a step of the least that training takes: noise, forward, loss, backward, clip, AdamW.

    Batches lie on the device, and noise is drawn there.
    """
    model, device, family = trainer.model, trainer.args.device, trainer.objective.family
    model.to(device).train()
    batches = [trainer._prepare_inputs(one) for one in islice(trainer.get_train_dataloader(), warm_up + steps)]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    for number, batch in enumerate(batches):
        if number == warm_up:
            synchronise(device)
            started = time.perf_counter()
        count = len(batch["draw"]) // len(batch["row"])
        latents = batch["target_latents"].float().repeat_interleave(count, dim=0)
        noise, sigma = torch.randn_like(latents), torch.rand(len(latents), device=device)
        prediction = family.predict(model, batch, add_noise(latents, noise, sigma), sigma)
        velocity_mse(prediction, latents, noise, torch.ones_like(sigma)).mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    synchronise(device)
    seconds = (time.perf_counter() - started) / steps
    del optimizer, batches
    gc.collect()
    return seconds
