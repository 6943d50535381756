"""Training steps, and the prompt encoder, on a device that is not there; what makes the host wait for it, as JSON.

    python tests/fake_device.py CASES.json

Tensors are fake: nothing is computed, but devices and dtypes are those of a run, so that tensors of two devices that
meet raise. Without a driver torch goes forward on fake tensors of CUDA, not backward; for that there is the stand-in,
torch's device for backends that are written in Python. A process of its own: diffusers keeps tables of positions,
which would be fake ones, and a stand-in is registered for good.
"""

import copy
import json
import os
import sys
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator, PartialState
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

from hf_qie.config.recipe import Recipe, load_recipe
from hf_qie.data.online_latents import load_vae
from hf_qie.models.base import read_family
from hf_qie.models.image_latents import VaeLatents
from hf_qie.training.metrics import LossMeter
from hf_qie.training.model import base_of, build_model
from hf_qie.training.objective import Objective
from hf_qie.training.offloading import checkpoint_on_cpu, stream_blocks
from hf_qie.training.precision import compute_in
from hf_qie.training.trainer import EditTrainer

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
        self.pinned: set[int] = set()  # memory of the CPU from and into which copies need no wait

    def pin(self, tensor: Tensor) -> Tensor:
        """Note that its memory is so."""
        self.pinned.add(tensor.untyped_storage()._cdata)
        return tensor

    def pinned_copy(self, tensor: Tensor) -> Tensor:
        """A fake tensor for one that the loader has made."""
        return self.pin(self.mode.from_tensor(tensor))

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.pinned

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
        pin = kwargs.get("pin_memory")
        if pin:
            kwargs = kwargs | {"pin_memory": False}  # which asks for a driver
        real = self._real(func, args, kwargs)
        if name in READS:
            if there:
                self.note(name)
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
            self.note(f"{name} with an index of the CPU")
        if name in ("_to_copy", "copy_", "to"):  # the last in inference mode alone
            source = args[1] if name == "copy_" else args[0]
            at_once = kwargs.get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False)
            if self._is_there(source) != self._is_there(made):
                self._note_copy(source, made, at_once=at_once, is_new=name != "copy_")
        elif pin:
            self.pin(made)
        for one, value in zip(tree_leaves(made), tree_leaves(real), strict=False):
            if isinstance(one, Tensor) and isinstance(value, Tensor):
                self.known[one] = value
        return made

    def _note_copy(self, source: Tensor, made: Tensor, *, at_once: bool, is_new: bool) -> None:
        """A copy between host and device: without a wait from and into pinned memory alone, if it is asked for.

        What is new on the host, and asked for so, torch pins itself.
        """
        back = self._is_there(source)
        if at_once and back and is_new:
            self.pin(made)
        if not (at_once and self._is_pinned(made if back else source)):
            self.note("copied from the device" if back else "copied to the device")

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
        self.note("index by a mask")
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

    def note(self, what: str) -> None:
        """Count it, under the line of a library or of ours that asks for it."""
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


class Stream:
    """A stream of a device that is not there: what waits for it, and when."""

    waits: Waits  # of the step

    def __init__(self, device: Any = None):
        pass

    def __enter__(self) -> "Stream":
        self.waits.note("copies on a stream of its own")
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def record_event(self) -> "Stream":
        return self

    def wait_event(self, event: "Stream") -> None:
        self.waits.note("the device waits")

    def wait_stream(self, other: "Stream") -> None:
        """The copies wait for the device."""

    def synchronize(self) -> None:
        """Of an event as well."""
        self.waits.note("waits for an event")


def batch_of(case: Mapping[str, Any], objective: Objective) -> dict[str, Any]:
    """A collated batch on the CPU: a row for each of `lengths`, with one source."""
    import numpy as np

    def matrix(num_tokens: int, width: int) -> np.ndarray:
        return np.zeros((num_tokens, width), np.float16)

    count, family = case.get("draws_per_row", 1), objective.family
    slots = [2] if len(family.prompt_columns) > 1 else []
    grids = [(4, 4), (2, 4)]
    if case.get("images"):
        pixels, channels = family.pixels_per_token, len(family.image_mode)
        sizes = [(pixels * height, pixels * width, channels) for height, width in grids]
        images = {"images": [np.zeros(size, np.uint8) for size in sizes]}
    else:
        images = {"target_latents": matrix(16, 64), "source_latents": matrix(8, 64)}
    rows = [
        {
            **images,
            "prompt_parts": [matrix(3, WIDTH), matrix(length, WIDTH)],
            "image_slots": slots,
            "grids": grids,
            "task": "edit",
            "row": place,
            "draws": list(range(place * count, (place + 1) * count)),
        }
        for place, length in enumerate(case["lengths"])
    ]
    return objective.collate(rows)


def move(model: torch.nn.Module, mode: FakeTensorMode, device: str) -> None:
    """Put all parameters and buffers on a device that is not there.

    Those that bitsandbytes holds in a class of its own, which cannot be made of fake tensors, become plain ones, with
    the state that its layers ask for.
    """

    def away(value: Any) -> Any:
        return mode.from_tensor(value).to(device) if isinstance(value, Tensor) else value

    def state_away(state: Any) -> Any:
        moved = copy.copy(state)
        for name, part in vars(state).items():
            setattr(moved, name, state_away(part) if type(part) is type(state) else away(part))
        return moved

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            state = getattr(parameter, "quant_state", None)
            value = away(parameter.data if state else parameter.detach())
            module._parameters[name] = torch.nn.Parameter(value, requires_grad=parameter.requires_grad)
            if state:
                module._parameters[name].quant_state = module.quant_state = state_away(state)
        for name, buffer in module._buffers.items():
            module._buffers[name] = away(buffer)


def place(model: torch.nn.Module, recipe: Recipe, mode: FakeTensorMode, device: str) -> None:
    """Put a model on the device as training does; one that is not quantised comes from the meta device."""
    memory = recipe.memory
    first = "cpu" if memory.stream_blocks else device
    move(model, mode, first) if memory.quantization else model.to_empty(device=first)
    if memory.stream_blocks:
        with patch.object(torch.nn.Module, "to", partialmethod(move, mode)):  # which fails on fake tensors
            stream_blocks(model, base_of(model), memory.stream_blocks, torch.device(device))


def vae_on_paper(recipe: Recipe) -> Any:
    """In place of `VaeLatents.load`: the VAE of the checkpoint's config, in bfloat16."""
    kind, where = read_family(recipe.model).load_vae.vae_class, {"subfolder": "vae", "revision": recipe.revision}
    with torch.device("meta"):
        made = torch.nn.Module.to(kind.from_config(kind.load_config(recipe.model, **where)), torch.bfloat16)
    return lambda *_, device, **__: made.to_empty(device=device).eval().requires_grad_(False)


def step(case: Mapping[str, Any]) -> Counter:
    """Waits of the second of two micro-batches, with the step of the optimizer behind it.

    On the stand-in the whole step; on CUDA no backward, but what EditTrainer does before and behind it: copies of the
    batch, images that are encoded, losses that are looked at a step later. In bfloat16 on both.
    """
    recipe, device = load_recipe(Path(case["recipe"])), case["device"]
    objective, memory = Objective(recipe, global_batch_size=4), recipe.memory
    batches, mode = [batch_of(case, objective) for _ in range(2)], FakeTensorMode(allow_non_fake_inputs=True)
    model = build_model(recipe, mixed_precision="bf16", empty=not memory.quantization)
    Stream.waits = waits = Waits(device, mode)
    with ExitStack() as stack:
        if case.get("images"):
            stack.enter_context(patch.object(VaeLatents, "load", vae_on_paper(recipe)))
        stack.enter_context(patch.object(torch, "Stream", Stream))
        stack.enter_context(patch.object(torch.accelerator, "current_stream", Stream))
        stack.enter_context(mode)
        stack.enter_context(waits)
        place(model, recipe, mode, device)
        compute_in(model, "bf16")
        if case.get("checkpointing") or memory.offload_activations:
            on_cpu = checkpoint_on_cpu(torch.device(device)) if memory.offload_activations else None
            base_of(model).enable_gradient_checkpointing(on_cpu)
        if memory.offload_activations:  # torch pins where there is CUDA
            stack.enter_context(patch.object(torch.cuda, "is_available", lambda: True))
        vae = load_vae(recipe, torch.device(device)) if case.get("images") else None
        trainer = SimpleNamespace(args=SimpleNamespace(device=torch.device(device)), recipe=recipe, encoder=vae)
        two_batches(case, model.train(), objective, batches, trainer, waits)
    return waits.found


def two_batches(
    case: Mapping[str, Any],
    model: torch.nn.Module,
    objective: Objective,
    batches: Sequence[Mapping[str, Any]],
    trainer: Any,
    waits: Waits,
) -> None:
    """One after the other; at the end `waits` has those of the second. `trainer` is what EditTrainer's methods ask."""
    device, trained = case["device"], [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, meter = torch.optim.AdamW(trained, fused=False, foreach=True), LossMeter(Accelerator(cpu=True))
    for number, collated in enumerate(batches):
        batch = tree_map(lambda one: waits.pinned_copy(one) if isinstance(one, Tensor) else one, dict(collated))
        waits.found.clear()
        if device == STAND_IN:
            batch = send_to_device(batch, device, non_blocking=True)
        else:
            batch = EditTrainer.on_device(trainer, batch)
        losses = objective.losses(model, batch)
        loss = losses.mean()
        if case.get("mistakes"):
            bool(loss > 0), loss.item(), loss.cpu(), torch.ones(2).to(device)
            torch.ones(2).to(device, non_blocking=True)
        if device == STAND_IN:
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        else:
            meter.add(batch, losses)
            meter.end_step(number)
            meter.check(last=False)
        assert loss.device.type == device and loss.dtype == torch.float32


def encode(case: Mapping[str, Any]) -> Counter:
    """Waits of a pass of the prompt encoder over two prompts."""
    device = case["device"]
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


def waits_of(case: Mapping[str, Any]) -> dict[str, Any]:
    """What makes the host wait in a case, how often, or the end of the traceback of what went wrong."""
    try:
        return dict(encode(case) if "model" in case else step(case))
    except Exception:
        return {"error": traceback.format_exc()[-3000:]}


if __name__ == "__main__":
    cases = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    PartialState(cpu=True)  # of this process; asked for by logs
    on_cuda, on_stand_in = ([name for name in cases if cases[name]["device"] == one] for one in ("cuda", STAND_IN))
    found = {name: waits_of(cases[name]) for name in on_cuda}
    # behind it, fake tensors of CUDA ask for a driver
    backend_registration._setup_privateuseone_for_python_backend(STAND_IN, backend_module=StandIn())
    print(json.dumps(found | {name: waits_of(cases[name]) for name in on_stand_in}))
    sys.stdout.flush()
    os._exit(0)  # threads of a stand-in do not end by themselves
