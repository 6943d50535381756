"""RUN 2: embedding sets to LoRA weights, or to a fine-tuned transformer.

    accelerate launch [-q] hf_qie/train.py recipe.yaml [key.of.the.recipe=value ...]

Trains on the sets that hf_qie/extract.py left, without the prompt encoder in memory, and without the VAE unless a set
has no latents (extract.latents: false) or pictures are made on the way (sampling.every). What trained lands in
training.output_dir as pytorch_lora_weights.safetensors, or as the folder transformer/, beside the checkpoints and the
recipe. Started again, it goes on from the last checkpoint that is whole.
"""

import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_qie.config.launch import check_ranks, fsdp_environment, fsdp_settings, num_started, refuse_launcher
from hf_qie.config.recipe import Recipe, load_recipe, save_recipe
from hf_qie.config.training_args import check_packages
from hf_qie.errors import InputError
from hf_qie.runtime.cli import run_script
from hf_qie.runtime.files import prove_writable

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn
    from transformers import TrainingArguments

    from hf_qie.data.loader import Draws
    from hf_qie.training.trainer import EditTrainer

COMPILE = ("torch_compile", "torch_compile_backend", "torch_compile_mode")


def main(argv: list[str]) -> None:
    """Train by the recipe `argv[0]` with the overrides `argv[1:]`."""
    recipe = load_recipe(argv[0], argv[1:])
    check_packages(recipe.training)
    refuse_launcher(os.environ)
    fsdp_settings(recipe, os.environ)  # what does not fit shows before anything is imported
    prove_writable(Path(recipe.training["output_dir"]))
    run(recipe)


def run(recipe: Recipe) -> "EditTrainer":
    """Open the sets and train on them, in sight of the other ranks and alone in the output folder."""
    from hf_qie.runtime.alive import STUCK_S, Alive, at_any_length
    from hf_qie.runtime.lock import held

    if num_started(os.environ) > 1:
        training_arguments(recipe, num_rows=0)  # joins the ranks
        check_ranks(os.environ)
    # with another shape a compiler takes minutes
    stuck_s = math.inf if any(map(recipe.training.get, COMPILE)) else recipe.training.get("ddp_timeout", STUCK_S)
    folder = Path(recipe.training["output_dir"])
    with (
        held(folder, remedy="give another training.output_dir"),
        Alive(folder / "signs-of-life", stuck_s=stuck_s),
    ):
        with at_any_length("the opening of its sets"):
            sets = open_sets(recipe)
        return train(recipe, sets)


def open_sets(recipe: Recipe) -> dict[str, "Dataset"]:
    """The embedding sets of the tasks to train or to evaluate on, once they fit each other and the checkpoint.

    Raises InputError where one is missing or does not fit.
    """
    from hf_qie.data.embedding_sets import open_embeddings
    from hf_qie.data.provenance import check_compat, checkpoint_compat, unverified
    from hf_qie.data.schema import matrix_width
    from hf_qie.models.base import read_family
    from hf_qie.models.checkpoint import check_steps, read_config

    if recipe.sampling.every:
        check_steps(recipe.sampling.num_inference_steps, recipe, "sampling.num_inference_steps")
    opened = {
        name: open_embeddings(task.embeddings or Path(recipe.extract.output_dir, name), task=name)
        for name, task in recipe.tasks.items()
        if task.weight > 0 or task.eval_rows
    }
    family = read_family(recipe.model, revision=recipe.revision)
    checkpoint = checkpoint_compat(recipe.model, revision=recipe.revision, family=family, weights=False)
    provenances = {name: provenance for name, (_, provenance) in opened.items()}
    check_compat(provenances, checkpoint, model=recipe.model)
    takes = read_config(recipe.model, "transformer/config.json", revision=recipe.revision).get("joint_attention_dim")
    for name, (data, _) in opened.items():
        if (width := matrix_width(data.features["image_embeds"])) != takes:
            raise InputError(f"tasks.{name}: its states have {width} numbers, but {recipe.model} takes {takes}")
    if os.environ.get("RANK", "0") == "0":
        for warning in unverified(provenances):
            logging.getLogger("hf_qie.train").warning(warning)
    from hf_qie.data.loader import check_caption_weights
    from hf_qie.data.online_latents import has_latents, made_from, with_files

    check_caption_weights(recipe, {name: data for name, (data, _) in opened.items()})
    sets = {}
    for name, (data, provenance) in opened.items():
        # a set of the Hub does not say where it was made
        roots = [recipe.tasks[name].image_root] if recipe.tasks[name].image_root else made_from(provenance) or ["."]
        sets[name] = data if has_latents(data) else with_files(data, task=name, roots=roots)
    return sets


def train(recipe: Recipe, sets: Mapping[str, "Dataset"]) -> "EditTrainer":
    """Train from the last whole checkpoint of the output folder, or from the start; save what trained."""
    from hf_qie.plots import loss_chart
    from hf_qie.runtime.alive import at_any_length
    from hf_qie.training.run_record import STATE, write_record

    with at_any_length("the loading of the model"):
        trainer, checkpoint = build_trainer(recipe, sets)
    log_start(trainer, checkpoint)
    if trainer.args.should_save:
        save_recipe(recipe, Path(trainer.args.output_dir, "recipe.yaml"))
        write_record(trainer.args.output_dir, trainer.record)
        Path(trainer.args.output_dir, STATE).unlink(missing_ok=True)  # the run has not ended any more
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    with at_any_length("the saving of what trained", tell=True):
        trainer.save_model()
        trainer.save_state()  # after the weights: says that the run has ended
    if trainer.args.should_save:
        loss_chart(trainer.state.log_history).savefig(Path(trainer.args.output_dir, "loss.png"))
    return trainer


def build_trainer(recipe: Recipe, sets: Mapping[str, "Dataset"]) -> tuple["EditTrainer", Path | None]:
    """The trainer, and the checkpoint that it has to go on from, if there is one.

    Raises InputError where the output folder holds a run that cannot go on as this one.
    """
    from hf_qie.data.online_latents import has_latents, load_vae
    from hf_qie.models.checkpoint import read_config
    from hf_qie.training.evaluation import HeldOut, check_metric, held_out_part, training_part
    from hf_qie.training.fsdp import refuse_inactive
    from hf_qie.training.image_grid import PictureGrid
    from hf_qie.training.resume import changes, checkpoint_of, run_identity
    from hf_qie.training.trainer import EditTrainer

    held_out, trained = held_out_part(sets, recipe.tasks), training_part(sets, recipe.tasks)
    arguments = training_arguments(recipe, num_rows=sum(map(len, trained.values())))
    refuse_inactive(arguments)
    check_metric(arguments.metric_for_best_model, held_out)
    draws, record = plan_draws(recipe, trained, arguments)
    batch = global_batch_size(arguments)
    identity = run_identity(recipe, sets, arguments, same_shape=draws.same_shape, global_batch_size=batch)
    checkpoint = checkpoint_of(arguments, identity)
    record["changes"] = changes(checkpoint, arguments) if checkpoint else []
    trainer = EditTrainer(
        make_model(recipe, arguments),
        arguments,
        recipe=recipe,
        draws=draws,
        held_out=HeldOut(held_out, recipe) if held_out else None,
        encoder=None if all(map(has_latents, sets.values())) else load_vae(recipe, arguments.device),
        scheduler_config=read_config(recipe.model, "scheduler/scheduler_config.json", revision=recipe.revision),
        identity=identity,
        record=record,
    )
    if recipe.sampling.every:
        trainer.add_callback(PictureGrid(trainer))
    return trainer, checkpoint


def make_model(recipe: Recipe, arguments: "TrainingArguments") -> "nn.Module":
    """The model as it trains; what it will take is logged before it is loaded."""
    from accelerate import PartialState
    from accelerate.logging import get_logger

    from hf_qie.models.checkpoint import read_config
    from hf_qie.training.footprint import footprint
    from hf_qie.training.model import build_model, compile_blocks, model_on_paper

    precision = arguments.mixed_precision
    config = read_config(recipe.model, "transformer/config.json", revision=recipe.revision)
    if arguments.fsdp and "quantization_config" in config:
        raise InputError(f"training.fsdp: the transformer of {recipe.model!r} is quantised, and so cannot be sharded")
    on_paper = model_on_paper(recipe, mixed_precision=precision)
    num_shards = arguments.world_size if arguments.fsdp else 1
    get_logger("hf_qie.train").info(str(footprint(on_paper, optimizer=arguments.optim, num_shards=num_shards)))
    # of sharded weights the first rank tells the others
    empty = bool(arguments.fsdp) and arguments.fsdp_plugin_args["cpu_ram_efficient_loading"]
    empty = empty and not PartialState().is_main_process
    model = build_model(recipe, mixed_precision=precision, empty=empty)
    if any(map(recipe.training.get, COMPILE)):
        backend = recipe.training.get("torch_compile_backend", "inductor")
        compile_blocks(model, backend=backend, mode=recipe.training.get("torch_compile_mode"))
    return model


def training_arguments(recipe: Recipe, *, num_rows: int) -> "TrainingArguments":
    """The recipe's `training` section as TrainingArguments; epochs over `num_rows` become steps.

    Raises InputError where TrainingArguments refuses a value.
    """
    from accelerate.logging import get_logger
    from transformers import TrainingArguments

    from hf_qie.training.fsdp import BF16_POLICY, fsdp_arguments
    from hf_qie.training.precision import settle

    section = dict(recipe.training)
    epochs = section.pop("num_train_epochs", None)
    for key in COMPILE:  # what `compile_blocks` does; Trainer would compile the whole
        section.pop(key, None)
    # every parameter that trains gets a gradient, so DDP need not look for those that do not
    forced = {"seed": recipe.seed, "data_seed": recipe.seed, "ddp_find_unused_parameters": False}
    forced["greater_is_better"] = False  # every metric is a loss; Trainer takes one that does not end so for a score
    if settings := fsdp_settings(recipe, os.environ):
        forced |= fsdp_arguments(recipe, settings)
        os.environ.update(fsdp_environment(settings))
    try:
        arguments = TrainingArguments(**section | forced)
    except (ValueError, TypeError) as error:
        raise InputError(f"{recipe.path}: training: {error}") from error
    if epochs is not None:
        arguments.max_steps = math.ceil(epochs * num_rows / global_batch_size(arguments))
    settle(arguments, recipe.training)
    if settings and settings.get("version", 2) == 1:
        get_logger("hf_qie.train").info("FSDP: version 1 was asked for, version 2 is used; there is no other here")
    if settings and arguments.mixed_precision == "bf16":
        arguments.fsdp_plugin_args["mixed_precision_policy"] = BF16_POLICY
    return arguments


def global_batch_size(arguments: "TrainingArguments") -> int:
    """Rows in a step, over all ranks and accumulation."""
    return arguments.world_size * arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps


def plan_draws(
    recipe: Recipe, sets: Mapping[str, "Dataset"], arguments: "TrainingArguments"
) -> tuple["Draws", dict[str, Any]]:
    """Every draw of the run, and what is put on record of it; logs what is drawn how often."""
    from accelerate.logging import get_logger

    from hf_qie.data.loader import Draws
    from hf_qie.data.mixture import group_shares, mix_table, mix_warnings, mixed_plan, read_groups, resolve_same_shape
    from hf_qie.training.run_record import run_record

    logger = get_logger("hf_qie.train")
    batch = global_batch_size(arguments)
    same_shape = resolve_same_shape(
        recipe.mix.same_shape,
        global_batch_size=batch,
        per_device_train_batch_size=arguments.per_device_train_batch_size,
    )
    groups = read_groups(sets, {name: recipe.tasks[name].weight for name in sets}, recipe.mix)
    shares = group_shares(groups, recipe.mix)
    num_draws = arguments.max_steps * batch
    logger.info("%s draws\n%s", f"{num_draws:,}", mix_table(groups, shares, num_draws=num_draws))
    for warning in mix_warnings(groups, shares, recipe.mix, num_draws=num_draws, same_shape=same_shape):
        logger.warning(warning)
    plan = mixed_plan(groups, shares, seed=recipe.seed, same_shape=same_shape, num_cells=num_draws // same_shape)
    return Draws(sets, plan, seed=recipe.seed, mix=recipe.mix), run_record(recipe, arguments, groups, shares)


def log_start(trainer: "EditTrainer", checkpoint: Path | None) -> None:
    """One line on what is about to happen."""
    from accelerate.logging import get_logger

    from hf_qie.training.checkpoints import step_of

    arguments, parameters, every = trainer.args, list(trainer.model.parameters()), trainer.recipe.sampling.every
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    vae = "loaded by the first rank, for pictures" if every else "not loaded"
    vae = "loaded, as sets have no latents" if trainer.encoder else vae
    logger = get_logger("hf_qie.train")
    logger.info(
        "training %s of %s parameters in %s, arithmetic in %s; %d rows a step: %d ranks x %d rows x %d accumulated; "
        "%d steps, %s; encoder: not loaded, VAE: %s",
        f"{sum(parameter.numel() for parameter in trained):,}",
        f"{sum(parameter.numel() for parameter in parameters):,}",
        "/".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in trained})),
        {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}[arguments.mixed_precision],
        global_batch_size(arguments),
        arguments.world_size,
        arguments.per_device_train_batch_size,
        arguments.gradient_accumulation_steps,
        arguments.max_steps,
        f"going on from {checkpoint}" if checkpoint else "from the first",
        vae,
    )
    if trainer.eval_dataset and arguments.eval_strategy == "no" and not every:
        logger.warning("rows are held out, but never evaluated on; set training.eval_strategy: steps")
    if arguments.fsdp:
        told = arguments.fsdp_plugin_args
        loading = "the first rank" if told["cpu_ram_efficient_loading"] else "every rank"
        logger.info("FSDP2: checkpoints of %s; %s reads the transformer", told["state_dict_type"], loading)
    if checkpoint and step_of(checkpoint) >= arguments.max_steps:
        logger.warning("%s is the end of this run; raise training.max_steps to go on", checkpoint)


if __name__ == "__main__":
    run_script(main)
