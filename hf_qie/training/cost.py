"""What training costs, from the checkpoint's config alone: memory of one device, operations of a row.

Letters: S latent tokens of target and sources, L prompt tokens.
"""

import re
from functools import partial

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
POINTS = ((16, 16), (32, 16), (16, 32), (48, 48))  # (S, L) at which operations are counted: one for each unknown


class Footprint:
    """Parameters in all, and bytes on one device; activations, gathered weights and the VAE come on top."""

    def __init__(self, model: nn.Module, *, optimizer: str, num_shards: int):
        """Of `model`, which may be on the meta device, sharded over `num_shards` devices.

        `optimizer` is TrainingArguments' name for it.
        """
        parameters = list(model.parameters())
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        self.num_parameters = sum(parameter.numel() for parameter in parameters)
        self.num_trained = sum(parameter.numel() for parameter in trained)
        self.num_lora_layers = sum(isinstance(module, BaseTunerLayer) for module in model.modules())
        self.weight_bytes = sum(parameter.nbytes for parameter in parameters) / num_shards
        self.gradient_bytes = sum(parameter.nbytes for parameter in trained) / num_shards
        of_one = STATE_BYTES.get(optimizer)  # None: of an optimizer that is not known here
        self.state_bytes = None if of_one is None else of_one * self.num_trained / num_shards

    @property
    def counts(self) -> str:
        """How many parameters there are, and train."""
        lora = f" (LoRA on {self.num_lora_layers:,} linear layers)" if self.num_lora_layers else ""
        return f"{self.num_parameters:,} parameters, of which {self.num_trained:,} train{lora}"

    def __str__(self) -> str:
        state = "an unknown amount" if self.state_bytes is None else f"{self.state_bytes / 1e9:,.1f} GB"
        return (
            f"{self.counts}; estimated per device: "
            f"{self.weight_bytes / 1e9:,.1f} GB of weights, {self.gradient_bytes / 1e9:,.1f} GB of gradients, "
            f"{state} of optimizer state; activations come on top"
        )


def peak_flops(device: torch.device, *, precision: str) -> float | None:
    """Operations a second of `device` at its peak in `precision` (no, bf16, fp16); None where it is not known here."""
    if device.type != "cuda" or precision == "no":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for known, peak in PEAKS.items() if re.search(rf"\b{known}\b", name)), None)


class RowFlops:
    """Operations to train on one row, forward and backward, without what activation checkpointing runs once more.

    Linear layers take a number for each token of their stream and for each row, attention one for each pair of
    tokens; which of these go backward depends on what trains. So operations are a + b S + c L + d (S + L)^2, of which
    torch's counter tells the four numbers from as many passes of the model itself.
    """

    def __init__(self, model: nn.Module, family: Family):
        """`model` lies on the meta device."""
        counted = [count_by_blocks(model, family, num_latents, num_tokens) for num_latents, num_tokens in POINTS]
        terms = [self._terms(num_latents, np.array([num_tokens])) for num_latents, num_tokens in POINTS]
        self.numbers = np.linalg.solve(terms, counted)

    @staticmethod
    def _terms(num_latents: int, num_tokens: np.ndarray) -> list[float]:
        """What the four numbers are multiplied by, summed over rows of S latent tokens and L[rows] prompt tokens."""
        rows = len(num_tokens)
        return [rows, rows * num_latents, num_tokens.sum(), np.square(num_latents + num_tokens, dtype=float).sum()]

    def __call__(self, num_latents: int, num_tokens: np.ndarray) -> float:
        """Operations of rows with that many latent tokens, target and sources, and `num_tokens[rows]` of prompt."""
        return float(self.numbers @ self._terms(num_latents, num_tokens))


def blocks_of(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList, bool]:
    """The blocks of `model`: their owner, their name in it, they themselves, and whether all inner ones are alike.

    The first one passes no gradient on, and of the last one a part has none: neither is like the others.
    """
    owner = base_of(model)
    name, blocks = next((name, part) for name, part in owner.named_children() if isinstance(part, nn.ModuleList))
    trains = [[parameter.requires_grad for parameter in block.parameters()] for block in blocks]
    return owner, name, blocks, all(one == trains[1] for one in trains[1:-1])


def count_by_blocks(model: nn.Module, family: Family, num_latents: int, num_tokens: int) -> int:
    """Operations of a step on one row; of blocks that are alike one is counted for all: most of the time is saved."""
    owner, name, blocks, alike = blocks_of(model)
    if len(blocks) < 4 or not alike:
        return count(model, family, num_latents, num_tokens)
    few = []
    for kept in (2, 3):
        setattr(owner, name, nn.ModuleList([*blocks[: kept - 1], blocks[-1]]))
        few.append(count(model, family, num_latents, num_tokens))
    setattr(owner, name, blocks)
    return few[0] + (len(blocks) - 2) * (few[1] - few[0])


def count(model: nn.Module, family: Family, num_latents: int, num_tokens: int) -> int:
    """Operations of a step on one row."""
    empty, (latent_width, width) = partial(torch.empty, device="meta"), family.widths(model.config)
    batch = {
        "source_latents": empty(1, 0, latent_width),
        "prompt_embeds": empty(1, num_tokens, width),
        "prompt_mask": torch.ones(1, num_tokens, dtype=torch.bool),
        "grids": [(1, num_latents)],
    }
    with FlopCounterMode(display=False) as counter:
        family.predict(model, batch, empty(1, num_latents, latent_width), empty(1)).sum().backward()
    return counter.get_total_flops()
