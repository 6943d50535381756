"""A training step, or the prompt encoder, on a device that is not there; what makes the host wait for it, as JSON.

    python tests/fake_device.py cuda|stand-in CASE.json

Tensors are fake: nothing is computed, but devices and dtypes are those of a run, so that tensors of two devices that
meet raise. Without a driver torch goes forward on fake tensors of CUDA, not backward; for that there is the stand-in,
torch's device for backends that are written in Python. A process of its own: diffusers keeps tables of positions,
which would be fake ones, and a stand-in is registered for good.
"""

import json
import os
import sys
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from embedding_sets import WIDTH
from PIL import Image
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from hf_qie.config.recipe import load_recipe
from hf_qie.models.base import read_family
from hf_qie.training.model import base_of, build_model
from hf_qie.training.objective import Objective
from hf_qie.training.precision import compute_in

STAND_IN = "standin"
# operations whose result has to be known on the host: a number, or a shape
READS = {"item", "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "repeat_interleave"}
READS |= {"unique_consecutive", "_unique2"}
MOST_KNOWN = 10_000
KNOWN = ("hf_qie", "diffusers", "transformers", "peft")  # whose lines a wait is named after


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for the device, by the line that asks for it.

    Whole numbers that come from the host stay known, as long as they are few: shapes may follow from them.
    """

    def __init__(self, device: str, mode: FakeTensorMode, *, fakes_all: bool = True):
        """`fakes_all`: also tensors of the CPU, whose numbers are not needed."""
        super().__init__()
        self.device, self.mode, self.fakes_all, self.found = device, mode, fakes_all, Counter()
        self.known = WeakIdKeyDictionary()

    def _involves(self, given: Sequence[Tensor], kwargs: Mapping[str, Any]) -> bool:
        asked = kwargs.get("device")
        fake = any(isinstance(one, FakeTensor) for one in given)
        return fake or (asked is not None and torch.device(asked).type == self.device)

    def _is_there(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.device.type == self.device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name.removeprefix("aten::")
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        there = [value for value in given if self._is_there(value)]
        if not self.fakes_all and not self._involves(given, kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        real = self._real(func, args, kwargs)
        if name in READS:
            if there:
                self._note(name)
            if not isinstance(real, Tensor):
                return 1.0 if real is None else real  # what it is does not matter
            with self.mode:
                made = torch.empty(real.shape, dtype=real.dtype, device=given[0].device)
        else:
            if name.startswith("index"):
                args = (args[0], [part for one in args[1] for part in self._places(one)], *args[2:])
            args, kwargs = tree_map(self._fake, (args, kwargs))
            with self.mode:
                made = func(*args, **kwargs)
        if name.startswith("index") and there and any(one.dim() and not self._is_there(one) for one in given[1:]):
            self._note(f"{name} with an index of the CPU")
        if name in ("_to_copy", "copy_", "to"):  # the last in inference mode alone
            source = args[1] if name == "copy_" else args[0]
            waits = not kwargs.get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False)
            if self._is_there(source) != self._is_there(made) and (waits or self._is_there(source)):
                self._note("copied from the device" if self._is_there(source) else "copied to the device")
        for one, value in zip(tree_leaves(made), tree_leaves(real), strict=False):
            if isinstance(one, Tensor) and isinstance(value, Tensor):
                self.known[one] = value
        return made

    def _fake(self, value: Any) -> Any:
        """Without numbers, with which torch would compute on the device."""
        if not isinstance(value, Tensor):
            return value
        fake = value if isinstance(value, FakeTensor) else self.mode.from_tensor(value)
        fake.constant = None
        return fake

    def _places(self, index: Any) -> Sequence[Any]:
        """An index, or in place of a mask, whose number of places is not known to a fake tensor, these places."""
        if not isinstance(index, Tensor) or index.dtype != torch.bool or index not in self.known:
            return [index]
        self._note("index by a mask")
        with unset_fake_temporarily():
            places = self.known[index].nonzero().unbind(1)
        with self.mode:
            return [torch.empty(len(places[0]), dtype=torch.long, device=self.device) for _ in places]

    def _real(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What `func` gives, if all that it is given is known; else None."""

        def known(value: Any) -> Any:
            if isinstance(value, torch.device):
                return torch.device("cpu")
            if not isinstance(value, Tensor):
                return value
            real = self.known.get(value, value.constant if isinstance(value, FakeTensor) else value)
            if real is None or real.is_floating_point() or real.is_complex() or real.numel() > MOST_KNOWN:
                raise LookupError
            return real

        try:
            with unset_fake_temporarily():
                found = func(*tree_map(known, args), **tree_map(known, kwargs))
        except LookupError:
            return None
        return None if isinstance(found, Tensor) and found.is_floating_point() else found

    def _note(self, what: str) -> None:
        for frame in reversed(traceback.extract_stack()):
            parts = Path(frame.filename).parts
            if any(part in KNOWN for part in parts):
                self.found[f"{parts[-1]}:{frame.name}: {what}"] += 1
                return
        self.found[what] += 1


class StandIn(backend_registration._DummyBackendModule):
    """What activation checkpointing asks of a device."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self, device: Any = 0) -> Tensor:
        return torch.empty(8, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Any = 0) -> None:
        pass


def batch_of(case: Mapping[str, Any], objective: Objective) -> dict[str, Any]:
    """A collated batch on the CPU: a row for each of `lengths`, with one source."""
    import numpy as np

    def matrix(num_tokens: int, width: int) -> np.ndarray:
        return np.zeros((num_tokens, width), np.float16)

    count, family = case.get("draws_per_row", 1), objective.family
    slots = [2] if len(family.prompt_columns) > 1 else []
    rows = [
        {
            "target_latents": matrix(16, 64),
            "source_latents": matrix(8, 64),
            "prompt_parts": [matrix(3, WIDTH), matrix(length, WIDTH)],
            "image_slots": slots,
            "grids": [(4, 4), (2, 4)],
            "task": "edit",
            "row": place,
            "draws": list(range(place * count, (place + 1) * count)),
        }
        for place, length in enumerate(case["lengths"])
    ]
    return objective.collate(rows)


def step(case: Mapping[str, Any], device: str) -> Counter:
    """Waits of the second of two micro-batches, with the step of the optimizer behind it."""
    recipe, backward = load_recipe(Path(case["recipe"])), device == STAND_IN
    model, objective = build_model(recipe, mixed_precision="bf16", empty=True), Objective(recipe, global_batch_size=4)
    batches = [batch_of(case, objective) for _ in range(2)]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model.to_empty(device=device)
        if case.get("checkpointing"):
            base_of(model).enable_gradient_checkpointing()
        model.train()
        compute_in(model, "bf16")
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, fused=False, foreach=True)
        fakes = [tree_map(lambda one: mode.from_tensor(one) if isinstance(one, Tensor) else one, b) for b in batches]
        for batch in fakes:
            with Waits(device, mode) as waits:
                on_device = send_to_device(batch, device, non_blocking=True)
                loss = objective.losses(model, on_device).mean()
                if case.get("mistakes"):
                    bool(loss > 0), loss.item(), loss.cpu(), torch.ones(2).to(device)
                if backward:
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(trained, 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
            assert loss.device.type == device and loss.dtype == torch.float32
    return waits.found


def encode(case: Mapping[str, Any], device: str) -> Counter:
    """Waits of a pass of the prompt encoder over two prompts."""
    family = read_family(case["model"])
    processor = family.load_processor(case["model"], revision=None)
    sources = [Image.new("RGB", (64, 64)), Image.new("RGB", (96, 64))]
    prompts = [family.make_prompt(processor, sources[:count], ["brighter", " "]) for count in (1, 2)]

    class FakeEncoder(family.load_encoder):
        """With weights that are not there."""

        def load(self, model: str, *, revision: str | None, dtype: torch.dtype) -> Any:
            config = self.config_class.from_pretrained(model, subfolder="text_encoder", revision=revision)
            with torch.device("meta"):
                made = self.base_class._from_config(config, dtype=dtype, attn_implementation="sdpa")
            with FakeTensorMode(allow_non_fake_inputs=True):
                return made.to_empty(device=device).eval().requires_grad_(False)

        def place(self, device: torch.device, room_bytes: float) -> None:
            pass

    encoder = FakeEncoder(case["model"], revision=None, dtype=torch.bfloat16, device=torch.device(device))
    mode = detect_fake_mode(list(encoder.model.parameters()))
    with mode, Waits(device, mode, fakes_all=False) as waits:
        made = encoder(prompts)
    assert {one.device.type for each in made for one in (each.shared, *each.texts)} == {device}
    return waits.found


if __name__ == "__main__":
    which, cases = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    if which != "cuda":
        backend_registration._setup_privateuseone_for_python_backend(STAND_IN, backend_module=StandIn())
        which = STAND_IN
    torch.set_num_threads(1)
    print(json.dumps([dict((encode if "model" in case else step)(case, which)) for case in cases]))
    sys.stdout.flush()
    os._exit(0)  # threads of a stand-in do not end by themselves
