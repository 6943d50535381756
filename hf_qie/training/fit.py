"""Whether a recipe fits a GPU by the forecast, and the fewest changes that make it fit."""

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations, product

from accelerate import PartialState
from datasets import Dataset
from transformers import TrainingArguments

from hf_qie.config.launch import fsdp_settings
from hf_qie.config.memory import NUM_SLOTS
from hf_qie.config.recipe import Recipe, load_recipe
from hf_qie.config.training_args import training_arguments
from hf_qie.data.largest import Shape, largest_in
from hf_qie.data.mixture import check_shared_prefix
from hf_qie.data.online_latents import has_latents
from hf_qie.errors import InputError
from hf_qie.models.quantization import check_packages
from hf_qie.runtime.memory_tracker import UNSEEN_BYTES, UNSEEN_SHARE
from hf_qie.training.cost import blocks_of
from hf_qie.training.forecast import Forecast, Run, forecast, is_known, largest_image, streamed, vae_memory
from hf_qie.training.model import build_model, saved_quantised

logger = logging.getLogger(__name__)

# A card that is sold with 24 GB has 24 GiB. Programs can use 98 % of an RTX 4090 or an H100, and 92 % where error
# correction takes its part: of an A10 22.2 GiB, of an L40 44.4
GIB, SHOWN = 2**30, 0.92
EIGHT_BIT = "adamw_bnb_8bit"
STREAM = ("memory.stream_blocks",)  # its value is the smallest that fits
INT8 = ("memory.quantization=int8",)

UNSEEN = f"with {UNSEEN_SHARE:.0%} and {UNSEEN_BYTES / 1e9:g} GB for kernels' workspaces, fragmentation, CUDA and NCCL"

SMALLER = {None: ("int8", "nf4"), "int8": ("nf4",), "fp8": ("nf4",), "nf4": ()}  # those that take less

Overrides = tuple[str, ...]


def usable_bytes(gpu_memory: float) -> float:
    """What a program can use of a card that is sold with so many GB."""
    return SHOWN * GIB * gpu_memory


def fewest_changes(start: Run, change: Callable[[Overrides], Run], limit: float) -> list[tuple[Overrides, Forecast]]:
    """The ways to stay below `limit` bytes with the fewest changes, those of least harm first.

    Where one change is enough, int8 with streaming is the last way. Where none is found, the changes that need the
    least. `change` gives the run with overrides; it raises InputError.
    """
    model = build_model(start.recipe, mixed_precision=start.precision, empty=True)
    num_blocks = len(blocks_of(model)[2])
    kinds = list(_changes(start, num_blocks))

    @cache
    def needs(overrides: Overrides) -> Forecast:
        return forecast(change(overrides), model)

    def attempt(chosen: Sequence[Overrides]) -> tuple[Overrides, Forecast] | None:
        overrides = tuple(key for one in chosen if one != STREAM for key in one)
        try:
            if STREAM not in chosen:
                return overrides, needs(overrides)
            found = needs((*overrides, f"{STREAM[0]}=0"))
            over = round((found.needed - limit) / (1 + UNSEEN_SHARE) / found.block, 6)  # 3, not 3.0000000001
            count = min(max(NUM_SLOTS + math.ceil(over), NUM_SLOTS + 1), num_blocks)
            overrides = (*overrides, f"{STREAM[0]}={count}")
            change(overrides)
        except InputError:  # they do not go together
            return None
        return overrides, streamed(found, count)

    least = attempt([kind[-1] for kind in kinds])
    if least and least[1].needed > limit:
        return [least]
    tried = [least] if least else []
    for number in range(len(kinds) + 1):
        fitting = []
        for some in combinations(kinds, number):
            for way in filter(None, map(attempt, product(*some))):
                tried.append(way)
                if way[1].needed <= limit:
                    fitting.append(way)
                    break  # of the values of a key the first that fits
        if fitting:
            # takes less CPU memory than streaming alone, and rounds less than nf4
            both = attempt([INT8, STREAM]) if number == 1 and [STREAM] in kinds and INT8 in kinds[-1] else None
            return fitting + ([both] if both and both[1].needed <= limit else [])
    return [min(tried, key=lambda way: way[1].needed)]


def _changes(run: Run, num_blocks: int) -> Iterator[list[Overrides]]:
    """What could be changed, in the order of harm: each with its values, the one that takes the least last."""
    recipe, training = run.recipe, run.recipe.training
    frozen = recipe.trainable.lora and not run.fsdp
    if run.eval_rows > 1:
        yield [("training.per_device_eval_batch_size=1",)]
    if not run.checkpointed:
        yield [("training.activation_checkpointing=true",)]
    if (rows := run.shape.rows) > 1:
        of_row = run.shape.draws_per_row
        accumulated = training.get("gradient_accumulation_steps", 1)
        yield [
            (
                f"training.per_device_train_batch_size={fewer * of_row}",
                f"training.gradient_accumulation_steps={accumulated * rows // fewer}",
            )
            for fewer in range(rows - 1, 0, -1)
            if rows % fewer == 0
        ]
    if not recipe.memory.offload_activations and not (run.fsdp and run.fsdp.get("activation_checkpointing")):
        yield [("memory.offload_activations=true",)]
    if frozen and NUM_SLOTS < num_blocks > recipe.memory.stream_blocks:
        yield [STREAM]
    if "8bit" not in training.get("optim", "") and not run.fsdp:  # bitsandbytes' take no sharded parameters
        yield [(f"training.optim={EIGHT_BIT}",)]
    if frozen and (smaller := list(filter(_installed, SMALLER[recipe.memory.quantization]))):
        yield [(f"memory.quantization={kind}",) for kind in smaller]


def _installed(kind: str) -> bool:
    """Whether a base can be quantised so here; a warning says what is missing."""
    try:
        check_packages(kind)
    except InputError as error:
        logger.warning("not tried: %s", error)
        return False
    return True


def forecast_recipe(recipe: Recipe, shape: Shape, *, num_ranks: int = 1) -> tuple[Run, Forecast]:
    """What training by `recipe` takes of each of `num_ranks` GPUs, or of a CPU where it asks for that.

    `shape`: of the largest micro-batch.
    """
    check_shared_prefix(recipe)
    training, on_cpu = recipe.training, bool(recipe.training.get("use_cpu"))
    precision = "fp16" if training.get("fp16") else "bf16" if training.get("bf16", not on_cpu) else "no"
    fsdp, device = fsdp_settings(recipe, os.environ), "cpu" if on_cpu else "cuda"
    if fsdp and num_ranks == 1:
        raise InputError("--num_gpus: the recipe shards training (training.fsdp); give the number of GPUs")
    if saved_quantised(recipe):
        raise InputError(f"model: the forecast does not know the sizes of {recipe.model!r}, which was saved quantised")
    run = Run(recipe=recipe, shape=shape, precision=precision, device=device, num_ranks=num_ranks, fsdp=fsdp)
    run = replace(run, encodes=not recipe.extract.latents, eval_rows=_eval_rows(recipe))
    return run, forecast(run)


def forecast_start(recipe: Recipe, sets: Mapping[str, Dataset], arguments: TrainingArguments) -> Forecast | None:
    """What training on whole `sets` takes of this process's accelerator, logged; None where it is not forecast.

    That is on the CPU, where ranks shard, as a process that has joined them cannot play all of them, and for a base
    that was saved quantised.
    """
    is_first = PartialState().is_main_process
    if arguments.device.type == "cpu" or arguments.fsdp or not is_first or saved_quantised(recipe):
        return None
    run = run_of(recipe, sets, arguments)
    found = forecast(run)
    logger.info(report(run, found))
    return found


def run_of(recipe: Recipe, sets: Mapping[str, Dataset], arguments: TrainingArguments) -> Run:
    """What decides the memory of training on whole `sets`, in this launch."""
    weights = {name: recipe.tasks[name].weight for name in sets}
    rows = arguments.per_device_train_batch_size // recipe.mix.draws_per_row
    shape = replace(largest_in(sets, weights, recipe.mix), rows=rows)
    run = Run(recipe=recipe, shape=shape, precision=arguments.mixed_precision, num_ranks=arguments.world_size)
    device = "cpu" if arguments.device.type == "cpu" else "cuda"
    encodes = not all(map(has_latents, sets.values()))
    return replace(run, device=device, encodes=encodes, eval_rows=_eval_rows(recipe))


def report_vae(run: Run) -> str:
    """Where the VAE is that training loads, and what it takes there; that is beyond the footprint of the model."""
    vae, (width, height) = vae_memory(run), largest_image(run)
    where = "loaded, as sets have no latents" if run.encodes else "loaded by rank 0, for images"
    return (
        f"{where}: {_gb(vae.weights)} GB of weights on {'each rank' if run.encodes else 'rank 0'}, and up to "
        f"{_gb(vae.activations)} GB more for images of {width} x {height} px"
    )


def _eval_rows(recipe: Recipe) -> int:
    """Rows of a batch of evaluation on one device; 0 where there is none."""
    key, training = "per_device_eval_batch_size", recipe.training
    return training.get(key, training_arguments()[key][1]) if training.get("eval_strategy", "no") != "no" else 0


def report(run: Run, found: Forecast) -> str:
    """The forecast as a table."""
    vae, alone = vae_memory(run), ", on rank 0 alone" * (run.num_ranks > 1 and not run.encodes)
    pixels = run.family.pixels_per_token
    target, *sources = (f"{pixels * width} x {pixels * height} px" for height, width in run.shape.grids)
    beside = ["and averages of what trains"] * (run.recipe.ema is not None)
    beside += [f"with {_gb(vae.weights)} GB of the VAE{alone}"] if vae else []
    rows = [
        ("weights", found.weights, ", ".join(beside)),
        ("gradients", found.gradients, ""),
        ("optimizer", found.optimizer, "" if is_known(run.recipe) else "as AdamW: training.optim is not known here"),
        ("activations", found.activations, "and all that is temporary"),
        ("peak", found.peak, "of each GPU"),
        ("needed", found.needed, UNSEEN),
        ("host", found.host, "of pinned CPU memory for each GPU"),
    ][: None if found.host else -1]
    ways = f"{run.num_ranks} GPU{'s' * (run.num_ranks > 1)}{' with FSDP' * bool(run.fsdp)}"
    count, of_row = run.shape.rows, run.shape.draws_per_row
    size = f"{count} row{'s' * (count > 1)}{f' of {of_row} noises each' * (of_row > 1)}"
    shape = f"{size}, target {target}, sources {', '.join(sources) or 'none'}"
    head = f"forecast for {ways}; largest micro-batch: {shape}, {run.shape.num_tokens:,} prompt tokens"
    return "\n".join([head, *(f"  {name:<11}  {_gb(size):>9} GB  {why}".rstrip() for name, size, why in rows)])


def verdict(run: Run, found: Forecast, gpu_memory: float, *, overrides: Sequence[str]) -> str:
    """That the forecast fits a card of `gpu_memory` GB; else raises InputError with the changes that make it fit.

    `overrides`: those that the recipe has already.
    """

    def change(more: Overrides) -> Run:
        recipe = load_recipe(run.recipe.path, [*overrides, *more])
        fsdp_settings(recipe, os.environ)
        of_row = run.shape.draws_per_row
        draws = recipe.training.get("per_device_train_batch_size", run.shape.rows * of_row)
        return replace(
            run, recipe=recipe, shape=replace(run.shape, rows=draws // of_row), eval_rows=_eval_rows(recipe)
        )

    limit = usable_bytes(gpu_memory)
    card = f"the {_gb(limit)} GB (10^9 bytes) that a program can use of a card of {gpu_memory:g} GB"
    if found.needed <= limit:
        return f"training fits: {_gb(found.needed)} of {card}"
    ways = fewest_changes(run, change, limit)
    fits = ways[0][1].needed <= limit
    what = "each of these makes it fit" if fits else "none of the changes tried here makes it fit; the least is"
    lines = [f"{run.recipe.path}: training does not fit: it needs {_gb(found.needed)} of {card}; {what}:"]
    for changes, least in ways:
        lines.append(f"  {' '.join(changes)}\n    needed {_gb(least.needed)} GB, host {_gb(least.host)} GB")
    raise InputError("\n".join(lines))


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.2f}"
