"""Peak memory of training before a weight is read: the recipe's own step, on tensors without data.

The step runs on fake CPU tensors, where what CUDA's autocast does beyond the CPU's is imitated: without a GPU torch
cannot go backward through fake tensors of one. Of blocks that are alike three and four are run, and the difference
stands for each of the rest.
"""

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import finalize

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.optimization import Adafactor

from hf_qie.config.recipe import Recipe
from hf_qie.models.base import Grid, read_family
from hf_qie.training.cost import blocks_of
from hf_qie.training.model import base_of, build_model
from hf_qie.training.objective import Objective

FEWEST = 3  # blocks of the smaller model: a first, an inner and a last one
WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS, HOST = "weights", "gradients", "optimizer", "activations", "host"
# Optimizers of torch's own operations, whose state and temporary tensors are followed too. CUDA takes the foreach one.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw_torch": torch.optim.AdamW,
    "adamw_torch_fused": partial(torch.optim.AdamW, fused=True),
    "adafactor": partial(Adafactor, scale_parameter=False, relative_step=False, lr=1e-4),
    "sgd": torch.optim.SGD,
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of a micro-batch."""

    target: Grid
    sources: tuple[Grid, ...] = ()
    num_tokens: int  # of the longest prompt
    rows: int = 1

    @property
    def size(self) -> int:
        """Tokens that the transformer sees."""
        return self.rows * (self.num_tokens + sum(height * width for height, width in (self.target, *self.sources)))


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Bytes of one device at the peak of a step, and of pinned host memory."""

    weights: float
    gradients: float
    optimizer: float
    activations: float  # and all that is temporary
    host: float = 0.0

    @property
    def peak(self) -> float:
        """What the device's allocator hands out at most."""
        return self.weights + self.gradients + self.optimizer + self.activations


class Ledger(TorchDispatchMode):
    """Follows the bytes of live storages by category; keeps the categories at the peak of each part of the step."""

    def __init__(self):
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peaks: dict[Any, Counter[str]] = {}  # by part of the step
        self.part: Any = None
        self.category = ACTIVATIONS  # of what is made from now on
        self._known: dict[int, tuple[str, int]] = {}  # storages by their address: category, bytes

    def follow(self, tensor: Tensor, category: str | None = None) -> None:
        """Count the storage of `tensor` while it lives; `category` also moves one that is known."""
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()  # of a DTensor the shard
        key = storage._cdata
        if key not in self._known:
            finalize(storage, self._forget, key).atexit = False
        elif category is None:
            return
        else:
            self._count(*self._known[key], sign=-1)
        self._known[key] = category or self.category, storage.nbytes()
        self._count(*self._known[key])

    def start(self, part: Any) -> None:
        """Begin a part of the step; its peak starts at what lives now."""
        self.part = part
        self._count(ACTIVATIONS, 0)

    def _count(self, category: str, num_bytes: int, sign: int = 1) -> None:
        self.live[category] += sign * num_bytes
        if _on_device(self.live) >= _on_device(self.peaks.get(self.part, {})):
            self.peaks[self.part] = self.live.copy()

    def _forget(self, key: int) -> None:
        category, num_bytes = self._known.pop(key)
        self.live[category] -= num_bytes

    def __enter__(self) -> "Ledger":
        resize = torch.UntypedStorage.resize_

        def followed(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            resize(storage, size)
            if storage._cdata in self._known:
                category, num_bytes = self._known[storage._cdata]
                self._known[storage._cdata] = category, size
                self._count(category, size - num_bytes)
            return storage

        self._resize, torch.UntypedStorage.resize_ = resize, followed  # frees and fills what FSDP gathers
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **kwargs or {})
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.follow(tensor)
        return made


def _on_device(counts: Mapping[str, int]) -> int:
    return sum(counts.values()) - counts.get(HOST, 0)


def forecast(
    recipe: Recipe, shape: Shape, *, precision: str = "bf16", device: str = "cuda", num_ranks: int = 1
) -> Forecast:
    """What a micro-batch of `shape` takes, in training by `recipe` on one of `num_ranks` devices.

    `precision`: no, bf16 or fp16; `device`: the type.
    """
    model = build_model(recipe, mixed_precision=precision, empty=True)
    owner, name, blocks, alike = blocks_of(model)
    run = partial(_peaks, recipe, shape, precision=precision, device=device)
    if not alike or len(blocks) <= FEWEST + 1:
        return _forecast(run(model), {}, 0)
    few = []
    for kept in (FEWEST, FEWEST + 1):
        setattr(owner, name, nn.ModuleList([*blocks[: kept - 1], blocks[-1]]))
        few.append(run(copy.deepcopy(model)))
    setattr(owner, name, blocks)
    return _forecast(*few, len(blocks) - FEWEST)


def _forecast(fewer: Mapping[Any, Counter], more: Mapping[Any, Counter], num_more: int) -> Forecast:
    """The highest of all parts, drawn out by `num_more` times what `more` has beyond `fewer`."""
    names = (WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS, HOST)
    drawn = [
        {name: peak[name] + num_more * (more.get(part, peak)[name] - peak[name]) for name in names}
        for part, peak in fewer.items()
    ]
    return Forecast(**max(drawn, key=_on_device))


def _peaks(recipe: Recipe, shape: Shape, model: nn.Module, *, precision: str, device: str) -> dict[Any, Counter]:
    """Bytes by category at the peak of each part of a step of `model`, which is moved from the meta device."""
    with FakeTensorMode(allow_non_fake_inputs=True), Ledger() as ledger:
        ledger.category = WEIGHTS
        model.to_empty(device="cpu")
        optimizer = _optimizer(recipe, model, ledger, device=device)
        loss = _prepared(recipe, model, precision=precision, device=device)
        ledger.category = ACTIVATIONS
        _follow_parts(model, ledger)
        ledger.peaks.clear()
        ledger.start("forward")
        value = loss(_batch(recipe, shape, model))
        ledger.start("backward")
        value.backward()
        del value
        ledger.start("step")
        optimizer.step()
        return ledger.peaks


def _prepared(recipe: Recipe, model: nn.Module, *, precision: str, device: str) -> Callable[[Any], Tensor]:
    """The loss of a batch, with the model wrapped as accelerate wraps it."""
    if recipe.training.get("activation_checkpointing") or recipe.training.get("gradient_checkpointing"):
        base_of(model).enable_gradient_checkpointing()
    model.train()
    if precision in DTYPES:
        model.forward = convert_outputs_to_fp32(torch.autocast("cpu", DTYPES[precision])(model.forward))
        for module in model.modules() if device == "cuda" else ():
            if isinstance(module, nn.LayerNorm):  # autocast normalises in float32 on CUDA, and not on the CPU
                module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    objective = Objective(recipe, global_batch_size=1)
    return lambda batch: objective.of_draws(model, batch).mean()


def _optimizer(recipe: Recipe, model: nn.Module, ledger: Ledger, *, device: str) -> Any:
    """The optimizer with its state, and gradients as they are when a micro-batch begins."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
        ledger.follow(parameter.grad, GRADIENTS)
        parameter.register_post_accumulate_grad_hook(lambda one: ledger.follow(one.grad, GRADIENTS))
    name = recipe.training.get("optim", "adamw_torch")
    foreach = {"foreach": True} if device == "cuda" and name in ("adamw_torch", "sgd") else {}
    optimizer = OPTIMIZERS[name](trained, **foreach)
    ledger.category = OPTIMIZER
    optimizer.step()
    if recipe.training.get("gradient_accumulation_steps", 1) == 1:
        optimizer.zero_grad()
    return optimizer


def _batch(recipe: Recipe, shape: Shape, model: nn.Module) -> dict[str, Any]:
    """A collated batch on the device."""
    latent_width, width = read_family(recipe.model, revision=recipe.revision).widths(base_of(model).config)
    target, *sources = (height * width for height, width in (shape.target, *shape.sources))
    empty = partial(torch.empty, dtype=torch.float16)
    return {
        "target_latents": empty(shape.rows, target, latent_width),
        "source_latents": empty(shape.rows, sum(sources), latent_width),
        "prompt_embeds": empty(shape.rows, shape.num_tokens, width),
        "prompt_mask": torch.tensor([[True]]),  # padding takes next to nothing
        "grids": [shape.target, *shape.sources],
        "draw": list(range(shape.rows)),
    }


def _follow_parts(model: nn.Module, ledger: Ledger) -> None:
    """Start a part of the step at each block: first, inner or last, forward and backward.

    Peaks of inner blocks are as many blocks from one end as from the other: each kind of part grows in its own way.
    """
    _, _, blocks, _ = blocks_of(model)
    for index, block in enumerate(blocks):
        place = {0: "first", len(blocks) - 1: "last"}.get(index, "inner")

        def mark(_: Any, __: Any, outputs: Any, place: str = place) -> None:
            for output in outputs:
                if output.requires_grad:
                    output.register_hook(lambda _: ledger.start(("backward", place)))

        block.register_forward_hook(mark)
