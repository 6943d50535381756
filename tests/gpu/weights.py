"""Models of real shapes with random values, made where they compute: nothing is read, and the host holds none of it.

Only what reads weights is replaced, for the time of a `with`; configs, adapters, quantisation and streaming are as in
every run.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from hf_qie.extraction import run as extraction
from hf_qie.models.base import families, read_family
from hf_qie.models.image_latents import VaeLatents
from hf_qie.models.prompt_encoder import PromptEncoder
from hf_qie.training import model as training_model

SCALE = 0.5  # of what flows through a matrix: values stay small over 60 blocks


def random_values(like: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A weight of that shape: a matrix that halves what flows through it, a bias or the scale of a norm near 1."""
    values = torch.empty(like.shape, dtype=dtype or like.dtype, device=device)
    if values.ndim < 2:
        return values.normal_(mean=1.0, std=0.02)
    return values.normal_(std=SCALE * values[0].numel() ** -0.5)


@contextmanager
def random_transformers(device: torch.device) -> Iterator[None]:
    """The transformers of all families are filled on `device`, whatever quantises or wraps them afterwards."""
    with ExitStack() as stack:
        for kind in {type(family) for family in families()}:
            made = staticmethod(partial(_filled, kind.load_transformer, device))
            stack.enter_context(patch.object(kind, "load_transformer", made))
        stack.enter_context(patch.object(training_model, "saved_tensors", partial(_tensors, device)))
        yield


def _filled(load: Any, device: torch.device, model: str, *, empty: bool = False, **where: Any) -> nn.Module:
    """The empty transformer of a checkpoint, and unless it is to stay so, its parameters on `device`.

    Its buffers, which no checkpoint has, are what they are.
    """
    transformer = load(model, empty=True, **where)
    for module in transformer.modules() if not empty else ():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(random_values(parameter, device))
    return transformer


def _tensors(device: torch.device, folder: Path) -> Mapping[str, Any]:
    """In place of a checkpoint's tensors: each is made when it is called."""
    model = str(folder.parent)
    transformer = read_family(model).load_transformer(model, revision=None, dtype=torch.bfloat16, empty=True)
    return {name: partial(random_values, one, device) for name, one in transformer.named_parameters()}


@contextmanager
def random_encoders(device: torch.device) -> Iterator[dict[str, nn.Module]]:
    """Prompt encoders and VAEs of a config alone; yields where the last encoder is, `full`, with its language head."""
    made: dict[str, nn.Module] = {}

    def encoder(self: PromptEncoder, model: str, *, revision: str | None, dtype: torch.dtype) -> nn.Module:
        config = self.config_class.from_pretrained(model, subfolder="text_encoder", revision=revision)
        with torch.device(device):
            full = self.full_class._from_config(config, dtype=dtype, attn_implementation="sdpa")
        made["full"] = full.eval().requires_grad_(False)
        return full.model

    def vae(self: VaeLatents, model: str, *, dtype: torch.dtype, device: torch.device, **where: Any) -> nn.Module:
        config = self.vae_class.load_config(model, subfolder="vae", **where)
        with torch.device(device):
            return nn.Module.to(self.vae_class.from_config(config), dtype).eval().requires_grad_(False)

    with (
        patch.object(PromptEncoder, "load", encoder),
        patch.object(VaeLatents, "load", vae),
        patch.object(extraction, "check_weight_files", lambda *_: None),  # there are none
    ):
        yield made
