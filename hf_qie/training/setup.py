"""RUN 2 before its first step: arguments, mixture, model and trainer, from the recipe and its embedding sets."""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import Dataset
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from hf_qie.config.launch import check_ranks, fsdp_environment, fsdp_settings, num_replicas
from hf_qie.config.memory import FLOAT16
from hf_qie.config.recipe import Recipe
from hf_qie.data.loader import Draws
from hf_qie.data.mixture import (
    Group,
    group_shares,
    mix_table,
    mix_warnings,
    mixture_plan,
    read_groups,
    resolve_same_shape,
)
from hf_qie.data.online_latents import has_latents, load_vae
from hf_qie.errors import InputError
from hf_qie.models.base import read_family
from hf_qie.models.checkpoint import checkpoint_file, checkpoint_folder
from hf_qie.models.quantization import check_packages
from hf_qie.runtime.device import computes_bfloat16, log_once, warn_if_emulated
from hf_qie.training.callbacks import PeakMemory, StackTraces
from hf_qie.training.checkpoints import changes, checkpoint_of, run_identity, step_of
from hf_qie.training.cost import Footprint
from hf_qie.training.edit_evaluation import EditEvaluation
from hf_qie.training.evaluation import HeldOut, check_metric, higher_is_better, split_sets
from hf_qie.training.fit import forecast_start, report_vae, run_of
from hf_qie.training.fsdp import fsdp_arguments, in_memory, refuse_inactive
from hf_qie.training.held_out_edits import edits_of
from hf_qie.training.image_grid import ImageGrid
from hf_qie.training.model import TRANSFORMER_FOLDER, base_of, build_model, compile_blocks, saved_quantised
from hf_qie.training.offloading import stream_blocks, streamed_blocks
from hf_qie.training.precision import sharded_policy
from hf_qie.training.trainer import EditTrainer

logger = get_logger(__name__)

LIBRARIES = ("torch", "transformers", "diffusers", "accelerate", "peft", "datasets")  # of the run record
COMPILE = ("torch_compile", "torch_compile_backend", "torch_compile_mode")


def join_ranks(recipe: Recipe) -> None:
    """Form the process group of a launch of several processes; raises InputError where they do not find each other."""
    # Before any rank waits for another: a download may take longer than their collectives. Of the ranks of a machine
    # one downloads, and the others wait for its lock on the file.
    checkpoint_folder(recipe.model, [TRANSFORMER_FOLDER], revision=recipe.revision)
    training = recipe.training
    if training.get("use_cpu") and "ddp_timeout" in training:  # TrainingArguments does not pass it on to gloo
        timeout = timedelta(seconds=training["ddp_timeout"])
        PartialState(cpu=True, backend=training.get("ddp_backend"), timeout=timeout)
    arguments = training_arguments(recipe, num_rows=0)
    check_ranks(os.environ)
    StackTraces(arguments.ddp_timeout)  # while sets and model are opened


def build_trainer(recipe: Recipe, sets: Mapping[str, Dataset]) -> tuple[EditTrainer, Path | None]:
    """The trainer, and the checkpoint that it resumes from, if there is one.

    Raises InputError where the output folder holds a run that this one cannot resume.
    """
    trained, held_out = split_sets(sets, recipe.tasks)
    arguments = training_arguments(recipe, num_rows=sum(map(len, trained.values())))
    refuse_inactive(arguments)
    if evaluated := HeldOut(held_out, recipe) if held_out else None:
        check_metric(recipe, held_out)
    draws, record = _plan_mixture(recipe, trained, arguments)
    identity = run_identity(recipe, sets, arguments)
    identity |= {"mix.same_shape": draws.same_shape, "global batch": global_batch_size(arguments)}
    checkpoint = checkpoint_of(arguments, identity)
    record["changes"] = changes(checkpoint, arguments) if checkpoint else []
    expected = forecast_start(recipe, sets, arguments)
    trainer = EditTrainer(
        make_model(recipe, arguments),
        arguments,
        recipe=recipe,
        draws=draws,
        held_out=evaluated,
        encoder=None if all(map(has_latents, sets.values())) else load_vae(recipe, arguments.device),
        identity=identity,
        record=record,
    )
    if recipe.makes_images:
        edits = edits_of(trainer)
        if recipe.sampling.every:
            trainer.add_callback(ImageGrid(trainer, edits))
        if recipe.evaluation.every:
            trainer.compute_metrics = EditEvaluation(trainer, edits)
    if arguments.device.type != "cpu":
        trainer.add_callback(PeakMemory(expected and expected.peak))
    has_vae = trainer.encoder or recipe.makes_images
    _log_start(trainer, checkpoint, vae=report_vae(run_of(recipe, sets, arguments)) if has_vae else "not loaded")
    return trainer, checkpoint


def training_arguments(recipe: Recipe, *, num_rows: int) -> TrainingArguments:
    """The recipe's `training` section as TrainingArguments; epochs, visits of `num_rows` rows, become steps.

    Raises InputError where TrainingArguments or the schedule refuses a value.
    """
    # RunCallback deletes older checkpoints, once the new one is complete; `make_model` compiles, and only the blocks
    ours, epochs = ("num_train_epochs", "save_total_limit", *COMPILE), recipe.training.get("num_train_epochs")
    section = {key: value for key, value in recipe.training.items() if key not in ours}
    # every parameter that trains gets a gradient, so DDP need not look for those that do not
    forced = {"seed": recipe.seed, "data_seed": recipe.seed, "ddp_find_unused_parameters": False}
    forced["greater_is_better"] = higher_is_better(recipe)  # Trainer goes by the name
    if settings := fsdp_settings(recipe, os.environ):
        forced |= fsdp_arguments(recipe, settings)
        os.environ.update(fsdp_environment(settings))
    try:
        arguments = TrainingArguments(**section | forced)
    except (ValueError, TypeError) as error:
        raise InputError(f"{recipe.path}: training: {error}") from error
    if epochs is not None:
        num_draws = epochs * num_rows * recipe.mix.draws_per_row
        arguments.max_steps = math.ceil(num_draws / global_batch_size(arguments))
    choose_precision(arguments, recipe.training)
    if arguments.max_steps > 0:
        _try_schedule(arguments)
    if settings and settings.get("version", 2) == 1:
        logger.info("FSDP: version 1 was asked for, version 2 is used; version 1 is not available")
    if settings and arguments.mixed_precision != "no":  # accelerate's own would add up gradients in 16 bits as well
        arguments.fsdp_plugin_args["mixed_precision_policy"] = sharded_policy(arguments.mixed_precision)
    return arguments


def choose_precision(arguments: TrainingArguments, given: Mapping[str, Any]) -> None:
    """Choose the precision where neither recipe nor launcher does; `given` is the recipe's section.

    An accelerator with units for bfloat16 trains in it, all else in float32. The launcher's `no` is not a choice:
    accelerate sends it as well where nothing was said. `bf16: false` in the recipe is.
    """
    if given.get("bf16") is False and arguments.mixed_precision == "bf16":  # the recipe goes before the launcher
        arguments.mixed_precision = "no"
    if arguments.mixed_precision == "no" and "bf16" not in given:
        device = arguments.device
        why = f"this {device.type} device is not an accelerator with units for bfloat16; see training.bf16"
        if device.type != "cpu" and computes_bfloat16(device):
            arguments.bf16, arguments.mixed_precision = True, "bf16"
            why = f"this {device.type} device has units for bfloat16; training.bf16: false gives float32"
        dtype = "bfloat16" if arguments.bf16 else "float32"
        log_once(logging.INFO, f"training: {dtype}, as neither recipe nor launcher sets a precision, and {why}")
    elif arguments.mixed_precision == "bf16":
        warn_if_emulated(arguments.device)


def _try_schedule(arguments: TrainingArguments) -> None:
    """Raise InputError where Trainer could not build the schedule, or would fail within it."""
    steps, name = arguments.max_steps, arguments.lr_scheduler_type.value
    warmup = arguments.get_warmup_steps(steps)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=arguments.learning_rate)
    try:
        schedule = get_scheduler(name, optimizer, warmup, steps, dict(arguments.lr_scheduler_kwargs or {}))
        for factor in getattr(schedule, "lr_lambdas", ()):
            [factor(step) for step in (warmup + 1, steps)]
    except (TypeError, ValueError, ArithmeticError) as error:
        raise InputError(f"training.lr_scheduler_kwargs: do not fit the schedule {name}: {error}") from error


def _try_packages(arguments: TrainingArguments, model: nn.Module) -> None:
    """Raise InputError for a tracker or an optimizer that is unknown, not installed, or lacks a setting."""
    try:
        key = "report_to"
        [make() for make in get_reporting_integration_callbacks(arguments.report_to)]
        key = "optim"
        EditTrainer.get_optimizer_cls_and_kwargs(arguments, model)
    except (ImportError, RuntimeError, ValueError, TypeError) as error:
        raise InputError(f"training.{key}: {error}") from error


def global_batch_size(arguments: TrainingArguments) -> int:
    """Draws in a step, over all ranks and accumulation."""
    return arguments.world_size * arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps


def _plan_mixture(
    recipe: Recipe, sets: Mapping[str, Dataset], arguments: TrainingArguments
) -> tuple[Draws, dict[str, Any]]:
    """Every draw of the run, and its run record; logs how often each group is drawn."""
    batch, micro_batch = global_batch_size(arguments), arguments.per_device_train_batch_size
    of_row = recipe.mix.draws_per_row
    same_shape = resolve_same_shape(
        recipe.mix.same_shape,
        global_batch_size=batch,
        per_device_train_batch_size=micro_batch,
        draws_per_row=of_row,
    )
    groups = read_groups(sets, {name: recipe.tasks[name].weight for name in sets}, recipe.mix)
    shares = group_shares(groups, recipe.mix)
    rows_drawn = arguments.max_steps * batch // of_row
    what = "draws" if of_row == 1 else f"rows drawn, {of_row} noises each"
    logger.info("%s %s\n%s", f"{rows_drawn:,}", what, mix_table(groups, shares, rows_drawn=rows_drawn))
    for warning in mix_warnings(groups, shares, recipe.mix, rows_drawn=rows_drawn, same_shape=same_shape):
        logger.warning(warning)
    num_batches = rows_drawn // same_shape
    plan = mixture_plan(groups, shares, seed=recipe.seed, same_shape=same_shape, num_batches=num_batches)
    family = read_family(recipe.model, revision=recipe.revision)
    draws = Draws(sets, plan, seed=recipe.seed, mix=recipe.mix, family=family)
    return draws, _run_record(recipe, arguments, groups, shares)


def _run_record(
    recipe: Recipe, arguments: TrainingArguments, groups: Sequence[Group], shares: np.ndarray
) -> dict[str, Any]:
    """What neither the recipe nor Trainer's state has: the groups of the mixture, defaults, machine and versions."""
    device = arguments.device
    return {
        "commit": base_commit(recipe),
        "started_in": str(Path.cwd()),  # where relative paths of the recipe start
        "mix": [
            {"task": one.task, "sources": one.num_sources, "rows": one.num_rows, "weight": one.weight, "share": share}
            for one, share in zip(groups, shares.tolist(), strict=True)
        ],
        "steps": arguments.max_steps,
        "ranks": arguments.world_size,
        "rows_a_rank": arguments.per_device_train_batch_size // recipe.mix.draws_per_row,
        "draws_per_row": recipe.mix.draws_per_row,
        "accumulated": arguments.gradient_accumulation_steps,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "sharded": bool(arguments.fsdp),
        "arithmetic": {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}[arguments.mixed_precision],
        "learning_rate": arguments.learning_rate,
        "schedule": str(getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)),
        "optimizer": str(getattr(arguments.optim, "value", arguments.optim)),
        "versions": {name: version(name) for name in LIBRARIES},
    }


def base_commit(recipe: Recipe) -> str | None:
    """The commit of a base from the Hub, whose cache has a folder for each."""
    if Path(recipe.model).is_dir():
        return None
    return checkpoint_file(recipe.model, "model_index.json", revision=recipe.revision).parent.name


def make_model(recipe: Recipe, arguments: TrainingArguments) -> nn.Module:
    """The model as it trains, on the CPU, or, where blocks are streamed, with all else on its device.

    Its footprint is logged before it is loaded.
    """
    precision = arguments.mixed_precision
    if kind := recipe.memory.quantization:
        check_packages(kind)
        if precision == "fp16":
            raise InputError("memory.quantization", f"got {kind} with the launcher's fp16; {FLOAT16}")
    if arguments.fsdp and saved_quantised(recipe):
        raise InputError(f"training.fsdp: the transformer of {recipe.model!r} is quantised and cannot be sharded")
    on_paper = build_model(recipe, mixed_precision=precision, empty=True)
    streamed_blocks(base_of(on_paper), recipe.memory.stream_blocks)  # raises where there are fewer
    replicas = num_replicas(os.environ)
    num_shards = arguments.world_size // replicas if arguments.fsdp else 1
    if replicas > 1:
        logger.info("FSDP: %d replicas of the model, each sharded over %d ranks", replicas, num_shards)
    _try_packages(arguments, on_paper)
    how = {"num_shards": num_shards, "averaged": recipe.ema is not None}
    footprint = Footprint(on_paper, optimizer=arguments.optim, **how)
    # with less on the device than there is of the model, the forecast alone says how much
    logger.info(footprint.counts if kind or recipe.memory.stream_blocks else str(footprint))
    # rank 0 loads and broadcasts
    empty = bool(arguments.fsdp) and arguments.fsdp_plugin_args["cpu_ram_efficient_loading"]
    empty = empty and not PartialState().is_main_process
    model = in_memory(on_paper) if empty else build_model(recipe, mixed_precision=precision, device=arguments.device)
    if not arguments.fsdp:  # every rank has read the same: DDP need not broadcast 41 GB, and cannot if quantised
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
    if recipe.memory.stream_blocks:
        stream_blocks(model, base_of(model), recipe.memory.stream_blocks, arguments.device)
    if any(map(recipe.training.get, COMPILE)):
        backend = recipe.training.get("torch_compile_backend", "inductor")
        mode = recipe.training.get("torch_compile_mode")
        compile_blocks(base_of(model), backend=backend, mode=mode)
    return model


def _log_start(trainer: EditTrainer, checkpoint: Path | None, *, vae: str) -> None:
    """In which precision it trains, on how many rows a step, and what else is loaded: of the VAE, `vae`."""
    arguments, images, of_row = trainer.args, trainer.recipe.makes_images, trainer.recipe.mix.draws_per_row
    if notice := trainer.objective.family.license_notice:
        logger.warning("%s: %s", trainer.recipe.model, notice)
    logger.info(
        "training in float32, computing in %s%s; %d rows a step: %d ranks x %d rows x %d accumulated%s; %d steps, %s; "
        "encoder: not loaded, VAE: %s",
        trainer.record["arithmetic"] + ", weights rounded where they are used" * (arguments.mixed_precision != "no"),
        "".join(f", memory.{key}: {value}" for key, value in trainer.recipe.memory if value),
        global_batch_size(arguments) // of_row,
        arguments.world_size,
        arguments.per_device_train_batch_size // of_row,
        arguments.gradient_accumulation_steps,
        f", {of_row} noises each" * (of_row > 1),
        arguments.max_steps,
        f"resuming from {checkpoint}" if checkpoint else "from the first",
        vae,
    )
    if trainer.eval_dataset and arguments.eval_strategy == "no" and not images:
        logger.info(
            "rows are held out, but never evaluated on while training; score.py does, or training.eval_strategy"
        )
    if checkpoint and step_of(checkpoint) == arguments.max_steps:
        logger.warning("%s is the end of this run; raise training.max_steps to train further", checkpoint)
