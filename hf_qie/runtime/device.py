"""The device of this process, and the dtype that prompt encoder and VAE compute in there."""

import logging
import os
from functools import cache

import torch

logger = logging.getLogger(__name__)

AUTO = "auto"
EMULATED = (
    "bfloat16 is emulated on this CPU, which has no units for it: a convolution takes some 60 times as long as in "
    "float32, a matrix product some 40 times"
)


def own_device() -> torch.device:
    """This process's accelerator, by LOCAL_RANK, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    local_rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.accelerator.device_count()
    index = local_rank % count  # a launcher may show each process its own alone
    torch.accelerator.set_device_index(index)
    return torch.device(accelerator.type, index)


def free_bytes(device: torch.device) -> int | None:
    """What is free in the memory of `device`; None where it has none of its own, as a CPU."""
    tell = getattr(torch.get_device_module(device), "mem_get_info", None)
    return tell(device)[0] if tell else None


def computes_bfloat16(device: torch.device) -> bool:
    """Whether `device` has units for bfloat16; one without emulates it."""
    if device.type == "cpu":
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """`extract.dtype` on `device`: a name is obeyed; `auto` is bfloat16 where there are units for it, else float32."""
    if name != AUTO:
        if name == "bfloat16":
            warn_if_emulated(device)
        return getattr(torch, name)
    native = computes_bfloat16(device)
    name, has = ("bfloat16", "units for it") if native else ("float32", "no units for bfloat16")
    log_once(logging.INFO, f"extract.dtype: auto: {name}, as this {device.type} device has {has}")
    return getattr(torch, name)


def warn_if_emulated(device: torch.device) -> None:
    """Warn, once, of bfloat16 on a CPU without units for it."""
    if device.type == "cpu" and not computes_bfloat16(device):
        log_once(logging.WARNING, EMULATED)


@cache
def log_once(level: int, message: str) -> None:
    """Log from the first rank of a launch, which may have no accelerate state yet."""
    if os.environ.get("RANK", "0") == "0":
        logger.log(level, message)
