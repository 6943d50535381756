"""Which machine and which versions the figures are of; imports torch alone."""

import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("torch", "transformers", "diffusers", "accelerate", "peft", "torchao", "bitsandbytes")


def describe() -> dict[str, Any]:
    """Name, memory and number of the devices, the date, the commit and the versions."""
    here = Path(__file__).resolve().parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    return {
        **(gpus() if torch.cuda.is_available() else {"device": "cpu", "count": 1}),
        "when": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip() or None,
        "versions": {name: version(name) for name in LIBRARIES},
    }


def gpus() -> dict[str, Any]:
    """Of the first, and how many there are."""
    known = torch.cuda.get_device_properties(0)
    return {
        "device": known.name,
        "count": torch.cuda.device_count(),
        "memory_gb": round(known.total_memory / 1e9, 1),
        "capability": f"{known.major}.{known.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
