"""The recipe's section `ema`: the moving average of what trains, and what it does not go together with."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from hf_qie.errors import InputError
from hf_qie.runtime.rules import Count, Section, rule

Decay = Annotated[float, Field(gt=0, lt=1), rule("a number above 0 and below 1")]


class Ema(Section):
    """Moving average of what trains, as diffusers' EMAModel has it."""

    decay: Decay = Field(0.9999, description="of the average at an update; at the n-th at most n / (n + 9)")
    every: Count = Field(1, description="steps from one update to the next")


def check_ema(ema: Ema | None, *, training: Mapping[str, Any]) -> None:
    """Raise InputError where the optimizer has an average of its own: it moves weights when they are evaluated."""
    optimizer = training.get("optim", "")
    if ema and optimizer.startswith("schedule_free"):
        raise InputError("ema", f"training.optim: {optimizer} averages what trains by itself; leave one of them out")
