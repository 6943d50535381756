"""What is open until the device is known: the precision of training, and whether the schedule can be built."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainingArguments, get_scheduler

from hf_qie.errors import InputError
from hf_qie.runtime.device import computes_bfloat16, log_once, warn_if_emulated


def settle(arguments: TrainingArguments, given: Mapping[str, Any]) -> None:
    """Choose the precision where none is named, and try the schedule; `given` is the recipe's section.

    An accelerator with units for bfloat16 trains in it, all else in float32. The launcher's `no` names none:
    accelerate sends it as well where nothing was said. `bf16: false` in the recipe does.
    Raises InputError where the schedule does not take its lr_scheduler_kwargs.
    """
    if given.get("bf16") is False and arguments.mixed_precision == "bf16":  # the launcher's; the recipe goes first
        arguments.mixed_precision = "no"
    if arguments.mixed_precision == "no" and "bf16" not in given:
        device = arguments.device
        if device.type != "cpu" and computes_bfloat16(device):
            arguments.bf16, arguments.mixed_precision = True, "bf16"
            why = f"this {device.type} device has units for bfloat16; training.bf16: false gives float32"
        else:
            why = (
                f"this {device.type} device is no accelerator with units for bfloat16; training.bf16: true asks for it"
            )
        dtype = "bfloat16" if arguments.bf16 else "float32"
        log_once(logging.INFO, f"training: {dtype}, as neither recipe nor launcher names a precision, and {why}")
    elif arguments.mixed_precision == "bf16":
        warn_if_emulated(arguments.device)
    if arguments.max_steps > 0:
        try_schedule(arguments)


def try_schedule(arguments: TrainingArguments) -> None:
    """Raise InputError where Trainer could not build the schedule, or would fail within it."""
    steps, name = arguments.max_steps, arguments.lr_scheduler_type.value
    warmup = arguments.get_warmup_steps(steps)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=arguments.learning_rate)
    try:
        schedule = get_scheduler(name, optimizer, warmup, steps, dict(arguments.lr_scheduler_kwargs or {}))
        for factor in getattr(schedule, "lr_lambdas", ()):
            [factor(step) for step in (warmup + 1, steps)]
    except (TypeError, ValueError, ArithmeticError) as error:
        raise InputError(f"training.lr_scheduler_kwargs: do not fit the schedule {name}: {error}") from error
