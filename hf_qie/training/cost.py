"""What training costs, from the checkpoint's config alone: memory of one device, operations of a batch.

Letters: B rows, K draws of each, S tokens of the target, R of its sources, L of the prompt.
"""

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hf_qie.models.base import Family
from hf_qie.training.model import base_of

# bytes of an optimizer's state for each parameter that trains: two float32 moments, or what the name says
STATE_BYTES = {
    "adamw_torch": 8,
    "adamw_torch_fused": 8,
    "paged_adamw_32bit": 8,
    "adamw_bnb_8bit": 2,
    "adamw_8bit": 2,
    "adamw_torch_8bit": 2,
    "adamw_torch_4bit": 1,
    "paged_adamw_8bit": 2,
    "lion_32bit": 4,
    "lion_8bit": 1,
    "adafactor": 0,  # a row and a column of each matrix
    "sgd": 0,
}
# Dense bfloat16 and float16 with sums in float32, TFLOP/s, by a word of the name that torch gives a device; from
# NVIDIA's data sheets, whose larger figures are with sparsity. The first that occurs counts.
PEAKS = {
    "B200": 2250,
    "GH200": 989,
    "H200 NVL": 835,
    "H200": 989,
    "H100 NVL": 835,
    "H100 PCIe": 756,
    "H100": 989,
    "H20": 148,
    "A100": 312,
    "L40S": 362,
}
# (B, S, R, L) at which operations are counted: one for each unknown
POINTS = ((1, 16, 0, 16), (2, 16, 0, 16), (1, 32, 0, 16), (1, 16, 16, 16), (1, 16, 0, 32), (1, 48, 32, 48))


class Footprint:
    """Parameters in all, and bytes on one device; activations, gathered weights and the VAE come on top."""

    def __init__(self, model: nn.Module, *, optimizer: str, num_shards: int, averaged: bool = False):
        """Of `model`, which may be on the meta device, sharded over `num_shards` devices.

        `optimizer` is TrainingArguments' name for it; `averaged`: the recipe has `ema`.
        """
        parameters = list(model.parameters())
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        self.num_parameters = sum(parameter.numel() for parameter in parameters)
        self.num_trained = sum(parameter.numel() for parameter in trained)
        self.num_lora_layers = sum(isinstance(module, BaseTunerLayer) for module in model.modules())
        self.weight_bytes = sum(parameter.nbytes for parameter in parameters) / num_shards
        self.gradient_bytes = sum(parameter.nbytes for parameter in trained) / num_shards
        self.average_bytes = self.gradient_bytes if averaged else 0
        of_one = STATE_BYTES.get(optimizer)  # None: of an optimizer that is not known here
        self.state_bytes = None if of_one is None else of_one * self.num_trained / num_shards

    @property
    def counts(self) -> str:
        """How many parameters there are, and train."""
        lora = f" (LoRA on {self.num_lora_layers:,} linear layers)" if self.num_lora_layers else ""
        return f"{self.num_parameters:,} parameters, of which {self.num_trained:,} train{lora}"

    def __str__(self) -> str:
        state = "an unknown amount" if self.state_bytes is None else f"{self.state_bytes / 1e9:,.1f} GB"
        averages = f", {self.average_bytes / 1e9:,.1f} GB of averages" if self.average_bytes else ""
        return (
            f"{self.counts}; estimated per device: "
            f"{self.weight_bytes / 1e9:,.1f} GB of weights, {self.gradient_bytes / 1e9:,.1f} GB of gradients, "
            f"{state} of optimizer state{averages}; activations come on top"
        )


def peak_flops(device: torch.device, *, precision: str) -> float | None:
    """Operations a second of `device` at its peak in `precision` (no, bf16, fp16); None where it is not known here."""
    if device.type != "cuda" or precision == "no":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for known, peak in PEAKS.items() if re.search(rf"\b{known}\b", name)), None)


class BatchFlops:
    """Operations to train on a batch, forward and backward, without what activation checkpointing runs once more.

    Linear layers take a number for each token of a kind, for each draw and for each batch, attention one for each pair
    of tokens; which of these go backward depends on what trains. So operations are a + b B K + c B K S + d B R +
    e sum(L) + f pairs, of which torch's counter tells the six numbers from as many passes of the model itself.
    """

    def __init__(self, model: nn.Module, family: Family):
        """`model` lies on the meta device."""
        self.family, batches = family, [stand_in(*point) for point in POINTS]
        counted = [count_by_blocks(model, family, batch) for batch in batches]
        self.numbers = np.linalg.solve([self._terms(batch) for batch in batches], counted)

    def _terms(self, batch: Mapping[str, Any]) -> list[float]:
        """What the six numbers are multiplied by."""
        grids, num_tokens, draws = batch["grids"], batch["prompt_lengths"], len(batch["draw"])
        pairs = self.family.attention_pairs(grids, num_tokens, batch["image_slots"], draws // len(num_tokens))
        target, *sources = map(math.prod, grids)
        return [1, draws, draws * target, len(num_tokens) * sum(sources), sum(num_tokens), pairs]

    def __call__(self, batch: Mapping[str, Any]) -> float:
        """Operations of a collated batch, of which tensors are not read: padding does not count."""
        return float(self.numbers @ self._terms(batch))


def stand_in(rows: int, target: int, source: int, num_tokens: int, *, draws_per_row: int = 1) -> dict[str, Any]:
    """What `BatchFlops` reads of a batch of rows that are alike, with one source or, if it has no token, none."""
    sources = [(2, source // 2)] if source else []
    return {
        "grids": [(2, target // 2), *sources],
        "prompt_lengths": [num_tokens] * rows,
        "image_slots": [[num_tokens // 4] * len(sources)] * rows,
        "draw": list(range(rows * draws_per_row)),
    }


def blocks_of(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList, bool]:
    """The blocks of `model`: their owner, their name in it, they themselves, and whether all inner ones are alike.

    The first one passes no gradient on, and of the last one a part has none: neither is like the others.
    """
    owner = base_of(model)
    name, blocks = next((name, part) for name, part in owner.named_children() if isinstance(part, nn.ModuleList))
    trains = [[parameter.requires_grad for parameter in block.parameters()] for block in blocks]
    return owner, name, blocks, all(one == trains[1] for one in trains[1:-1])


def count_by_blocks(model: nn.Module, family: Family, batch: Mapping[str, Any]) -> int:
    """Operations of a step on a batch; of blocks that are alike one is counted for all: most of the time is saved."""
    owner, name, blocks, alike = blocks_of(model)
    if len(blocks) < 4 or not alike:
        return count(model, family, batch)
    few = []
    for kept in (2, 3):
        setattr(owner, name, nn.ModuleList([*blocks[: kept - 1], blocks[-1]]))
        few.append(count(model, family, batch))
    setattr(owner, name, blocks)
    return few[0] + (len(blocks) - 2) * (few[1] - few[0])


def count(model: nn.Module, family: Family, batch: Mapping[str, Any]) -> int:
    """Operations of a step on a batch, whose tensors are made here."""
    empty, (latent_width, width) = partial(torch.empty, device="meta"), family.widths(model.config)
    target, *sources = map(math.prod, batch["grids"])
    lengths, draws = batch["prompt_lengths"], len(batch["draw"])
    rows = len(lengths)
    tensors = {
        "source_latents": empty(rows, sum(sources), latent_width),
        "prompt_embeds": empty(rows, max(lengths), width),
    }
    with FlopCounterMode(display=False) as counter:
        noised, sigma = empty(draws, target, latent_width), empty(draws)
        family.predict(model, batch | tensors, noised, sigma).sum().backward()
    return counter.get_total_flops()
