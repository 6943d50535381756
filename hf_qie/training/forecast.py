"""Peak memory of training before a weight is read: the recipe's own step, on tensors without data.

The tensors are fake ones of the CPU: without a GPU torch does not go backward through fake tensors of one. Of blocks
that are alike a few are run, and what one more takes stands for each of the rest. Workspaces of kernels,
fragmentation, the CUDA context and NCCL are not seen.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import convert_outputs_to_fp32
from diffusers.training_utils import EMAModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import TrainingArguments
from transformers.optimization import Adafactor

from hf_qie.config.memory import NUM_SLOTS, is_checkpointed
from hf_qie.config.recipe import Recipe
from hf_qie.data.largest import Shape
from hf_qie.models.base import Family, ForwardMemory, read_family
from hf_qie.runtime.device import AUTO
from hf_qie.runtime.ledger import ACTIVATIONS, GRADIENTS, HOST, OPTIMIZER, WEIGHTS, Ledger, on_device
from hf_qie.runtime.memory_tracker import UNSEEN_BYTES, UNSEEN_SHARE
from hf_qie.training.cost import STATE_BYTES, blocks_of
from hf_qie.training.model import base_of, build_model
from hf_qie.training.objective import Objective
from hf_qie.training.offloading import streamed_blocks
from hf_qie.training.precision import DTYPES, FusedRMSNorm, compute_in, sharded_policy
from hf_qie.training.stand_ins import FusedNorm, checkpointed_elsewhere, num_bytes, quantize_fake

CATEGORIES = (WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS, HOST)
# Optimizers of torch's operations, whose temporary tensors count too. Without a choice CUDA takes the foreach form.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw_torch": partial(torch.optim.AdamW, foreach=True),
    "adamw_torch_fused": partial(torch.optim.AdamW, fused=True),
    "adafactor": partial(Adafactor, scale_parameter=False, relative_step=False, lr=1e-4),
    "sgd": partial(torch.optim.SGD, foreach=True),
}
FOREACH = ("adamw_torch", "sgd")
AS_ADAMW = 8  # bytes of state for a parameter, of an optimizer that is not known here: as much as most take


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Bytes of one device at the peak of a step, and of CPU memory that waits for it, pinned."""

    weights: float
    gradients: float
    optimizer: float
    activations: float  # and all that is temporary
    host: float
    block: float = 0.0  # the frozen weights of one block, wherever they are

    @property
    def peak(self) -> float:
        """What the device's allocator hands out at most."""
        return self.weights + self.gradients + self.optimizer + self.activations

    @property
    def needed(self) -> float:
        """The peak, and a margin for what is not seen."""
        return (1 + UNSEEN_SHARE) * self.peak + UNSEEN_BYTES


def is_known(recipe: Recipe) -> bool:
    """Whether the size of the optimizer's state is known."""
    return recipe.training.get("optim", TrainingArguments.default_optim) in OPTIMIZERS | STATE_BYTES


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that decides what a micro-batch takes."""

    recipe: Recipe
    shape: Shape
    precision: str = "bf16"  # no, bf16 or fp16
    device: str = "cuda"  # the type
    num_ranks: int = 1
    fsdp: Mapping[str, Any] | None = None  # launch.py's settings
    encodes: bool = False  # images, as the sets have no latents
    eval_rows: int = 0  # of a batch of evaluation

    @property
    def family(self) -> Family:
        """Of the checkpoint."""
        return read_family(self.recipe.model, revision=self.recipe.revision)

    @property
    def checkpointed(self) -> bool:
        """Whether activations of blocks are computed again."""
        return is_checkpointed(self.recipe.training) or bool(self.fsdp and self.fsdp.get("activation_checkpointing"))


def forecast(run: Run, model: nn.Module | None = None) -> Forecast:
    """What a micro-batch takes at most; `model` is the run's on the meta device, if it is there already."""
    if model is None:
        model = build_model(run.recipe, mixed_precision=run.precision, empty=True)
    streamed_blocks(base_of(model), run.recipe.memory.stream_blocks)  # raises where there are fewer
    owner, name, blocks, alike = blocks_of(model)
    fewest = 4 if run.fsdp else 3  # a first, a last and inner ones: of two that are sharded one is gathered ahead
    vae = vae_memory(run)
    with _fake_ranks(run) as mesh:
        if not alike or len(blocks) <= fewest + 1:
            return _elsewhere(run, *_step(run, copy.deepcopy(model), mesh, vae))
        few = []
        try:
            for kept in (fewest, fewest + 1):
                setattr(owner, name, nn.ModuleList([*blocks[: kept - 1], blocks[-1]]))
                few.append(_step(run, copy.deepcopy(model), mesh, vae))
        finally:
            setattr(owner, name, blocks)
    (fewer, block), (more, _) = few
    return _elsewhere(run, _drawn_out(fewer, more, len(blocks) - fewest), block)


def _drawn_out(fewer: Mapping[Any, Counter], more: Mapping[Any, Counter], times: int) -> dict[Any, Counter]:
    """The peaks of each part in `fewer`, with so many times what `more` has beyond them."""
    return {
        part: Counter({name: peak[name] + times * (more[part][name] - peak[name]) for name in CATEGORIES})
        for part, peak in fewer.items()
    }


def _elsewhere(run: Run, peaks: Mapping[Any, Counter], block: int) -> Forecast:
    """The highest of the peaks, with what DDP adds, and what lies in CPU memory in its place."""
    if run.fsdp and run.fsdp.get("cpu_offload"):
        for peak in peaks.values():
            peak[HOST] += sum(peak.pop(name, 0) for name in (WEIGHTS, GRADIENTS, OPTIMIZER))
    highest = max(peaks.values(), key=on_device)
    host = max(peak[HOST] for peak in peaks.values())  # at another moment
    found = Forecast(**{name: highest[name] for name in CATEGORIES} | {HOST: host}, block=block)
    return streamed(found, run.recipe.memory.stream_blocks)


def streamed(found: Forecast, count: int) -> Forecast:
    """With the frozen weights of `count` blocks in CPU memory."""
    away = max(count - NUM_SLOTS, 0)
    return replace(found, weights=found.weights - away * found.block, host=found.host + count * found.block)


@contextmanager
def _fake_ranks(run: Run) -> Iterator[Any]:
    """The mesh of sharded ranks, of which this process is the only real one; None where nothing is sharded."""
    if not run.fsdp:
        yield None
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=run.num_ranks, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (run.num_ranks,))
    finally:
        dist.destroy_process_group()


def _step(run: Run, model: nn.Module, mesh: Any, vae: ForwardMemory | None) -> tuple[dict[Any, Counter], int]:
    """Bytes by category at the peak of each part of a step, and of a block's frozen weights.

    `model` comes from the meta device.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), Ledger() as ledger:
        with ledger.making(WEIGHTS):
            model.to_empty(device="cpu")
            if kind := run.recipe.memory.quantization:
                quantize_fake(model, kind, run.family)
            block = sum(num_bytes(one) for one in blocks_of(model)[2][1].parameters() if not one.requires_grad)
            if run.fsdp:
                _shard(run, model, mesh)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with ledger.making(WEIGHTS):
            average = EMAModel(trained, foreach=True) if run.recipe.ema else None
        optimizer = _optimizer(run, model, ledger)
        _wrap(run, model, ledger)
        _follow_parts(model, ledger)
        objective = Objective(run.recipe, global_batch_size=run.shape.rows * run.shape.draws_per_row)
        ledger.peaks.clear()
        if vae:
            ledger.add(WEIGHTS, vae.weights)
            ledger.start("VAE")
            ledger.add(ACTIVATIONS, vae.activations)
            ledger.add(ACTIVATIONS, -vae.activations)
        ledger.start("forward")
        loss = objective.losses(model, _batch(run, model)).mean()
        ledger.start("backward")
        loss.backward()
        del loss
        ledger.start("step")
        if optimizer:
            optimizer.step()
        model.zero_grad()
        if average:
            average.step(trained)
        if run.eval_rows:
            ledger.start("evaluation")
            with torch.no_grad():
                objective.losses(model, _batch(run, model, rows=run.eval_rows, draws_per_row=1), held_out=True)
    return ledger.peaks, block


def _shard(run: Run, model: nn.Module, mesh: Any) -> None:
    """FSDP2 as accelerate sets it up: each block, and the rest."""
    policy = sharded_policy(run.precision)
    for block in blocks_of(model)[2]:
        again = run.fsdp.get("reshard_after_forward", True)
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=again)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def _optimizer(run: Run, model: nn.Module, ledger: Ledger) -> torch.optim.Optimizer | None:
    """The optimizer with its state, and gradients as they are when a micro-batch begins; None for one that is counted.

    Gradients of several micro-batches add up, so that all but the first find them there. DDP sends them in buckets as
    large; of a single micro-batch they are views of these.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    name, optimizer = run.recipe.training.get("optim", TrainingArguments.default_optim), None
    ddp = run.num_ranks > 1 and not run.fsdp
    accumulates = run.recipe.training.get("gradient_accumulation_steps", 1) > 1
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
        ledger.follow(parameter.grad, GRADIENTS)
        parameter.register_post_accumulate_grad_hook(lambda one: ledger.follow(one.grad, GRADIENTS))
        local = getattr(parameter, "_local_tensor", parameter)
        if ddp and accumulates:
            ledger.add(GRADIENTS, local.nbytes)
        if name not in OPTIMIZERS:
            ledger.add(OPTIMIZER, STATE_BYTES.get(name, AS_ADAMW) * local.numel())
    if name in OPTIMIZERS:
        foreach = {} if run.device == "cuda" or name not in FOREACH else {"foreach": False}
        with ledger.making(OPTIMIZER):
            optimizer = OPTIMIZERS[name](trained, **foreach)
            optimizer.step()
    if not (accumulates or ddp):
        model.zero_grad()
    return optimizer


def _wrap(run: Run, model: nn.Module, ledger: Ledger) -> None:
    """What trainer and accelerate do to the model: activation checkpointing and precision."""
    if run.checkpointed:
        offloaded = partial(checkpointed_elsewhere, ledger, HOST if run.device == "cuda" else ACTIVATIONS)
        base_of(model).enable_gradient_checkpointing(offloaded if run.recipe.memory.offload_activations else None)
    model.train()
    compute_in(model, run.precision)
    for module in model.modules() if run.device == "cuda" else ():
        if isinstance(module, FusedRMSNorm):
            module.__class__ = FusedNorm
    if not run.fsdp and run.precision in DTYPES:
        model.forward = convert_outputs_to_fp32(model.forward)


def largest_image(run: Run) -> tuple[int, int]:
    """Width and height in pixels of the largest image of a row."""
    height, width = (run.family.pixels_per_token * side for side in max(run.shape.grids, key=math.prod))
    return width, height


def vae_memory(run: Run) -> ForwardMemory | None:
    """What the VAE takes, where training has one: to encode a batch, or to decode an image between two steps."""
    extract, decodes = run.recipe.extract, run.recipe.makes_images
    if not (run.encodes or decodes):
        return None
    auto = "bfloat16" if run.device == "cuda" else "float32"  # as compute_dtype has it on a device that is there
    return run.family.vae_memory(
        run.recipe.model,
        revision=run.recipe.revision,
        dtype=getattr(torch, auto if extract.dtype == AUTO else extract.dtype),
        size=largest_image(run),
        batch_size=min(run.shape.rows, extract.vae_batch_size) if run.encodes else 0,
        decodes=decodes,
    )


def _batch(run: Run, model: nn.Module, **other: int) -> dict[str, Any]:
    """A collated batch on the device, of `other` numbers in evaluation."""
    shape, (latent_width, width) = replace(run.shape, **other), run.family.widths(base_of(model).config)
    rows = shape.rows
    target, *sources = (height * width for height, width in shape.grids)
    empty = partial(torch.empty, dtype=torch.float16)
    return {
        "target_latents": empty(rows, target, latent_width),
        "source_latents": empty(rows, sum(sources), latent_width),
        "prompt_embeds": empty(rows, shape.num_tokens, width),
        "prompt_lengths": [shape.num_tokens] * rows,  # unequal ones take less
        "image_slots": [[0] * len(sources)] * rows,
        "grids": list(shape.grids),
        "draw": list(range(rows * shape.draws_per_row)),
        "noise": torch.empty(rows * shape.draws_per_row, target, latent_width),
        "sigma": torch.empty(rows * shape.draws_per_row),
    }


def _follow_parts(model: nn.Module, ledger: Ledger) -> None:
    """Begin a part of the step where the gradient reaches a block, of each kind: first, inner or last.

    What a part takes is linear in the number of blocks, and what the whole step takes is not.
    """
    blocks = blocks_of(model)[2]
    for index, block in enumerate(blocks):
        place = {0: "first", len(blocks) - 1: "last"}.get(index, "inner")

        def mark(_: Any, __: Any, outputs: Any, place: str = place) -> None:
            for output in outputs:
                if output.requires_grad:
                    output.register_hook(lambda _: ledger.start(place))

        block.register_forward_hook(mark)
