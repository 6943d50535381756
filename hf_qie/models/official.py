"""The official pipeline of a checkpoint: without its encoder, to sample; without its transformer, to compare with."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import cpu_offload

from hf_qie.models.base import Family


def load_pipeline(
    family: Family,
    model: str,
    *,
    revision: str | None,
    transformer: Path | None,
    dtype: torch.dtype,
    without: Iterable[str],
) -> Any:
    """The family's pipeline `without` some of its parts; `transformer`: a folder with another one than the model's."""
    parts: dict[str, Any] = dict.fromkeys(without)
    if transformer:
        kind = getattr(diffusers, family.transformer_class)
        parts["transformer"] = kind.from_pretrained(transformer, use_safetensors=True, dtype=dtype)
    pipeline = _pipeline(family, model, revision=revision, dtype=dtype, **parts)
    pipeline.set_progress_bar_config(disable=None)
    return pipeline


class OfficialPipeline:
    """The checkpoint's own pipeline, without its transformer; what it makes of prompts and images is the families'."""

    def __init__(
        self,
        family: Family,
        model: str,
        *,
        revision: str | None,
        dtype: torch.dtype,
        device: torch.device,
        offload: bool = False,
    ):
        self.pipeline = _pipeline(family, model, revision=revision, dtype=dtype, transformer=None)
        self.family, self.device = family, device
        if offload:
            cpu_offload(self.pipeline.text_encoder, execution_device=device)
            self.pipeline.vae.to(device)
        else:
            self.pipeline.to(device)


def _pipeline(family: Family, model: str, **options: Any) -> Any:
    return getattr(diffusers, family.pipeline).from_pretrained(model, use_safetensors=True, **options)
