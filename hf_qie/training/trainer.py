"""`EditTrainer`: transformers.Trainer on a mixture plan, whose draw numbers decide all that is random about a row.

Letters: B rows, S target tokens.
"""

import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import AutocastKwargs
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments

from hf_qie.config.recipe import Recipe
from hf_qie.data.collate import Batch, collate
from hf_qie.data.loader import Draws, RankBatches, open_loader
from hf_qie.data.mixture import realised_shares
from hf_qie.data.online_latents import placed
from hf_qie.errors import InputError
from hf_qie.training.callbacks import RunCallback, StackTraces
from hf_qie.training.checkpoints import WEIGHTS_ALONE, misfit, settings_of
from hf_qie.training.cost import BatchFlops, peak_flops
from hf_qie.training.ema import MovingAverage
from hf_qie.training.evaluation import HeldOut, generators_kept
from hf_qie.training.metrics import LossMeter, Throughput
from hf_qie.training.model import base_of, build_model, load_weights, low_lr_parameters, save_weights
from hf_qie.training.objective import Objective
from hf_qie.training.offloading import checkpoint_on_cpu
from hf_qie.training.precision import compute_in

logger = get_logger(__name__)

# The private methods of Trainer that EditTrainer overrides or calls: their signature there, and the reason.
PRIVATE = {
    "_load_from_checkpoint": (
        "(self, resume_from_checkpoint: str, model: torch.nn.modules.module.Module | None = None) -> None",
        "Trainer raises on a checkpoint with diffusers' files",
    ),
    "_load_best_model": ("(self) -> None", "Trainer only warns where a checkpoint has diffusers' files"),
}


class EditTrainer(Trainer):
    """Trains by flow matching; everything else is Trainer's own, and RunCallback's through its events.

    Overrides:
        get_train_dataloader, get_eval_dataloader: batches by rank and shape; accelerate would shard them again.
        get_batch_samples: measures the time spent waiting for data.
        create_optimizer: `trainable.low_lr_modules` train at half the rate.
        create_scheduler: notes the recipe's settings before a checkpoint's state replaces them.
        training_step: the device need not wait for a batch, which Trainer would copy tensor by tensor; replicas add up
            their gradients once a step.
        compute_loss: flow matching.
        prediction_step: loss and noise level of each row, for `HeldOut.metrics`.
        evaluate: of the averages, if there are any; leaves the random generators as they were.
        log: adds the loss by task and the throughput; raises where the gradient is not finite.
        save_model: weights as diffusers loads them.

    Private ones are in `PRIVATE`.
    """

    loss_is_scaled_for_ga = False  # compute_loss gives the micro-batch's mean, Trainer divides by accumulation

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        recipe: Recipe,
        draws: Draws,
        held_out: HeldOut | None = None,
        encoder: Any = None,
        identity: Mapping[str, Any],
        record: Mapping[str, Any],
    ):
        """`args.max_steps` is the run; `identity`: what a resumed run must share; `record`: see setup.py.

        `encoder` encodes images where a set has no latents.
        """
        assert args.max_steps > 0, "the mixture plan has a fixed length"
        if args.activation_checkpointing:
            on_cpu = checkpoint_on_cpu(args.device) if recipe.memory.offload_activations else None
            base_of(model).enable_gradient_checkpointing(on_cpu)  # diffusers' name; its models lack Trainer's
            args.activation_checkpointing = args.gradient_checkpointing = False
        if args.n_gpu > 1:
            logger.warning("one process uses one of %d devices; accelerate launch --multi_gpu uses all", args.n_gpu)
            args._n_gpu = 1  # else Trainer would use DataParallel
        compute_in(model, args.mixed_precision)
        metrics = held_out and held_out.metrics
        super().__init__(model, args, collate, train_dataset=draws, eval_dataset=held_out, compute_metrics=metrics)
        self.model_accepts_loss_kwargs = False  # a batch has no labels to count and to scale by
        self.recipe, self.identity, self.record, self.encoder = recipe, identity, record, encoder
        self.global_batch_size = self.get_total_train_batch_size(args)
        self.objective = Objective(recipe, global_batch_size=self.global_batch_size)
        self.data_collator = self.objective.collate
        self.accelerator.autocast_handler = AutocastKwargs(enabled=False)  # `compute_in` has done it
        if self.accelerator.ddp_handler:
            self.accelerator.ddp_handler.gradient_as_bucket_view = True  # else DDP has a copy of all gradients
        self.losses = LossMeter(self.accelerator)
        peak = peak_flops(args.device, precision=args.mixed_precision)
        flops_of = peak and BatchFlops(build_model(recipe, empty=True), self.objective.family)
        self.throughput = Throughput(self.accelerator, flops_of=flops_of, peak=peak)
        self.ema = MovingAverage(self) if recipe.ema else None
        if self.ema:
            self.add_callback(self.ema)  # before a checkpoint is complete
        self.add_callback(RunCallback(self))
        if args.world_size > 1:
            self.add_callback(StackTraces(args.ddp_timeout))

    def get_train_dataloader(self) -> DataLoader:
        """The rank's part of every step, from the first on; a resumed Trainer skips batches without reading rows."""
        batches = RankBatches(
            num_draws=self.args.max_steps * self.global_batch_size,
            batch_size=self.args.per_device_train_batch_size,
            rank=self.args.process_index,
            world_size=self.args.world_size,
        )
        return self._open_loader(self.train_dataset, batches, self.data_collator)

    def get_eval_dataloader(self, eval_dataset: HeldOut | None = None) -> DataLoader:
        """The rank's part of the held-out rows."""
        args, held_out = self.args, eval_dataset or self.eval_dataset
        batches = held_out.batches(
            args.per_device_eval_batch_size, rank=args.process_index, world_size=args.world_size
        )
        collate_rows = partial(self.objective.collate_held_out, fractions=held_out.fractions)
        return self._open_loader(held_out, batches, collate_rows)

    def _open_loader(self, rows: Dataset, batches: Iterable[Sequence[int]], collate_rows: Callable) -> DataLoader:
        return open_loader(
            rows,
            batches,
            collate=collate_rows,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type != "cpu",
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )

    def get_batch_samples(self, *args: Any) -> tuple[list[Batch], None]:
        """Trainer's, timed."""
        started = time.perf_counter()
        batches, _ = super().get_batch_samples(*args)
        self.throughput.add(batches, started=started)
        return batches, None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's optimizer; each of its groups is split in two, the second at half the rate at every step."""
        modules = self.recipe.trainable.low_lr_modules
        if self.optimizer is None and modules:
            low = {id(p) for p in low_lr_parameters(self.model if model is None else model, modules)}
            optimizer = super().create_optimizer(model)
            for group in list(optimizer.param_groups):
                slow = [p for p in group["params"] if id(p) in low]
                group["params"] = [p for p in group["params"] if id(p) not in low]
                optimizer.add_param_group({**group, "params": slow, "lr": group["lr"] / 2})
        return super().create_optimizer(model)  # returns the one just made

    def create_scheduler(self, *args: Any, **kwargs: Any) -> LRScheduler:
        """Trainer's."""
        schedule = super().create_scheduler(*args, **kwargs)
        self.settings = settings_of(self.args, self.optimizer, schedule)
        return schedule

    def training_step(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Tensor:
        """Trainer's; with replicas, gradients stay sums of one replica until the last micro-batch of the step."""
        parallelism = self.accelerator.parallelism_config
        if parallelism and parallelism.dp_replicate_enabled:
            model.set_requires_all_reduce(self.accelerator.sync_gradients)
        return super().training_step(model, self.on_device(inputs), *args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: Batch, **_: Any) -> Tensor:
        """Mean over the draws of the micro-batch, each noised by its own number."""
        per_draw = self.objective.losses(model, inputs)
        self.losses.add(inputs, per_draw)
        return per_draw.mean()

    def prediction_step(self, model: nn.Module, inputs: Batch, *_: Any, **__: Any) -> tuple[None, Tensor, Tensor]:
        """No loss of the batch; of each row (loss, sigma), and its number.

        The last row is repeated up to the size of a full batch: ranks gather equally many.
        """
        inputs = self.on_device(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            per_row, sigma = self.objective.losses(model, inputs, held_out=True), inputs["sigma"]
        place = torch.arange(self.args.per_device_eval_batch_size).clamp_max(len(per_row) - 1)
        numbers = torch.tensor(inputs["draw"])[place]
        return None, torch.stack([per_row, sigma], dim=1)[place], numbers.to(per_row.device)

    def on_device(self, batch: Batch) -> Batch:
        """A collated batch on this rank's device."""
        return placed(batch, self.args.device, self.encoder, batch_size=self.recipe.extract.vae_batch_size)

    def averaged(self) -> AbstractContextManager[None]:
        """The model has its averages meanwhile, where the recipe asks for `ema`; every rank enters."""
        return self.ema.applied() if self.ema else nullcontext()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Trainer's; training goes on as if nothing had been evaluated."""
        with generators_kept(self.args.device), self.averaged():
            return super().evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """To the mean loss since the last log, add the loss by task and the throughput; log the realised shares.

        Raises NotFinite where the norm of the gradient is not finite. RunCallback logs before every save.
        """
        if "loss" in logs:
            if not self.accelerator.optimizer_step_was_skipped:  # float16's loss scale was too large: no harm
                self.losses.check_gradient(self.state.global_step, logs["grad_norm"])
            losses, drawn = self.losses.read()
            logs |= losses | self.throughput.read()
            logger.info("drawn since the last log: %s", realised_shares(drawn))
        elif "train_runtime" in logs and self.losses.drawn_in_all:
            logger.info("drawn by this launch: %s", realised_shares(self.losses.drawn_in_all))
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """What trains, for diffusers; every rank calls it. `_internal_call`: for a checkpoint.

        A checkpoint of sharded state has no transformer in one piece: gathering 20B parameters takes its time. Where
        nothing is sharded these are also the weights to resume from, and keep their dtype; else they are bfloat16 if
        training computes in it. With `ema` they are the averages, and the rest to resume from is in `ema/`.
        """
        folder, sharded = output_dir or self.args.output_dir, self.args.fsdp and self.args.fsdp_plugin_args
        if _internal_call:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)  # an incomplete checkpoint of an earlier start
            self.accelerator.wait_for_everyone()
            if sharded and not self.recipe.trainable.lora and "SHARDED" in sharded["state_dict_type"]:
                return
        to_resume_from = _internal_call and not sharded
        dtype = torch.bfloat16 if self.args.mixed_precision == "bf16" and not to_resume_from else None
        with self.averaged():
            save_weights(self.model, folder, writes=self.args.should_save, dtype=dtype)
        if not _internal_call:
            logger.info("weights saved in %s", folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.args.fsdp:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best, metric = self.state.best_model_checkpoint, self.args.metric_for_best_model
        if (reason := misfit(Path(best))) not in (None, WEIGHTS_ALONE):
            raise InputError(f"{best}: the best checkpoint is incomplete: {reason}; export another one of its folder")
        self._load_from_checkpoint(best)
        if self.ema:
            self.ema.load(Path(best))
        logger.info("%s is the best checkpoint (%s %g): its weights are saved", best, metric, self.state.best_metric)
