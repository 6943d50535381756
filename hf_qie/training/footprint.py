"""What a run takes on one device, on paper: told from the checkpoint's config before its weights are loaded."""

from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

# of an optimizer's states, for each parameter that trains, float32: two moments of four bytes, or what the name says
STATE_BYTES = {
    "adamw_torch": 8,
    "adamw_torch_fused": 8,
    "paged_adamw_32bit": 8,
    "adamw_bnb_8bit": 2,
    "adamw_8bit": 2,
    "paged_adamw_8bit": 2,
    "lion_32bit": 4,
    "lion_8bit": 1,
    "adafactor": 0,  # a row and a column of each matrix
    "sgd": 0,
}


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Parameters in all, and bytes on one device; activations, gathered weights and the VAE come on top."""

    num_parameters: int
    num_trained: int
    num_lora_layers: int
    weight_bytes: float
    gradient_bytes: float
    state_bytes: float | None  # None: of an optimizer that is not known here

    def __str__(self) -> str:
        """One line."""
        lora = f" (LoRA on {self.num_lora_layers:,} linear layers)" if self.num_lora_layers else ""
        states = "states of the optimizer unknown"
        if self.state_bytes is not None:
            states = f"{self.state_bytes / 1e9:,.1f} GB of the optimizer's states"
        weights = f"{self.weight_bytes / 1e9:,.1f} GB of weights, {self.gradient_bytes / 1e9:,.1f} GB of gradients"
        return (
            f"{self.num_parameters:,} parameters, of which {self.num_trained:,} train{lora}; on paper, on each device "
            f"{weights}, {states}; activations come on top"
        )


def footprint(model: nn.Module, *, optimizer: str, num_shards: int) -> Footprint:
    """The footprint of `model`, which may be on the meta device, sharded over `num_shards` devices.

    `optimizer` is TrainingArguments' name for it.
    """
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    num_trained = sum(parameter.numel() for parameter in trained)
    state_bytes = STATE_BYTES.get(optimizer)
    lora = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return Footprint(
        num_parameters=sum(parameter.numel() for parameter in parameters),
        num_trained=num_trained,
        num_lora_layers=len(lora),
        weight_bytes=sum(parameter.nbytes for parameter in parameters) / num_shards,
        gradient_bytes=sum(parameter.nbytes for parameter in trained) / num_shards,
        state_bytes=None if state_bytes is None else state_bytes * num_trained / num_shards,
    )
