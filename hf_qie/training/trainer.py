"""`EditTrainer`: transformers.Trainer on a plan of draws, with checkpoints that say when they are whole.

Letters: B rows, S target tokens.
"""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from hf_qie.config.recipe import Recipe
from hf_qie.data.collate import Batch, collate
from hf_qie.data.loader import Draws, RankBatches, open_loader
from hf_qie.data.mixture import realised_shares
from hf_qie.data.online_latents import encode_images
from hf_qie.errors import InputError
from hf_qie.models.qwen_image.vae import LatentEncoder
from hf_qie.runtime.alive import BETWEEN, at, at_any_length
from hf_qie.training.checkpoints import WEIGHTS_ALONE, check_shapes, mark_complete, misfit, read_complete, states_of
from hf_qie.training.dcp_reader import refuse_pickles
from hf_qie.training.evaluation import HeldOut, generators_kept
from hf_qie.training.flops import utilisation
from hf_qie.training.fsdp import check_sharded
from hf_qie.training.metrics import Losses, Pace
from hf_qie.training.model import (
    enable_activation_checkpointing,
    load_weights,
    low_lr_parameters,
    model_on_paper,
    save_weights,
)
from hf_qie.training.objective import Objective
from hf_qie.training.resume import apply_settings, settings_of

logger = get_logger(__name__)


class EditTrainer(Trainer):
    """Trains by flow matching; draw number n decides all that is random about a row, so no cut of a step changes it.

    Overrides, and why:
        get_train_dataloader: one plan for the whole run, read by rank; accelerate would shuffle and shard it again.
        create_optimizer: `trainable.low_lr_modules` train at half the rate.
        create_scheduler: what a resumed run may change is noted before any state is loaded.
        compute_loss: flow matching; Trainer knows no loss for such a model.
        get_eval_dataloader: the held-out rows by shape and rank; accelerate would shard them again.
        prediction_step: loss and noise level of each row, for `HeldOut.metrics`; Trainer computes none without labels.
        evaluate: leaves the generators as they were, so that a run with evaluation is the run without.
        _determine_best_metric: of a best step that is not saved there is nothing to load.
        _load_best_model: by our files, which Trainer does not know: it would only warn.
        _prepare_inputs: pictures without latents are encoded.
        get_batch_samples: how long data is waited for; no rank begins before all can.
        _maybe_log_save_evaluate: ahead of all three, an end to a run whose loss or gradient is not finite; after them
            no rank goes on before all can.
        log: the loss by task, the pace, and the shares that were drawn.
        _init_training_state: after a resume the recipe says when to log and save; Trainer keeps to the checkpoint.
        _prepare_for_training: a model that is not sharded, or whose tensors do not all train, would pass unseen.
        save_model: weights as diffusers loads them; Trainer writes them without a config, or, sharded, not at all.
        _save_checkpoint: `complete.json`, last of all, says that the others are whole; only then older ones go.
        _load_from_checkpoint: Trainer does not know our files.
        _load_optimizer_and_scheduler, _load_rng_state: what Trainer takes, or raises, of states that do not fit; and
            the settings that these states bring back are not those of the recipe.
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
        encoder: LatentEncoder | None = None,
        scheduler_config: Mapping[str, Any],
        identity: Mapping[str, Any],
        record: Mapping[str, Any],
    ):
        """`args.max_steps` is the run; `identity`: what a resumed run must share, kept in each `complete.json`.

        `encoder` where a set has no latents. `record`: what is put on record of the run.
        """
        assert args.max_steps > 0, "the plan has a fixed length"
        if args.activation_checkpointing:
            enable_activation_checkpointing(model, args.activation_checkpointing_kwargs)
            args.activation_checkpointing = args.gradient_checkpointing = False
        if args.n_gpu > 1:
            logger.warning("one process uses one of %d devices; accelerate launch --multi_gpu uses all", args.n_gpu)
            args._n_gpu = 1  # else Trainer would use DataParallel
        metrics = held_out and held_out.metrics
        super().__init__(model, args, collate, train_dataset=draws, eval_dataset=held_out, compute_metrics=metrics)
        assert not self.is_deepspeed_enabled, "refused before anything is loaded"
        self.model_accepts_loss_kwargs = False  # a batch has no labels to count and to scale by
        self.recipe, self.identity, self.record, self.encoder = recipe, identity, record, encoder
        self.global_batch_size = self.get_total_train_batch_size(args)
        self.objective = Objective(recipe, scheduler_config, global_batch_size=self.global_batch_size)
        on_paper, precision = partial(model_on_paper, recipe), args.mixed_precision
        self.losses = Losses(self.accelerator, list(recipe.tasks))
        self.pace = Pace(self.accelerator, utilisation(on_paper, args.device, precision=precision))

    def get_train_dataloader(self) -> DataLoader:
        """The rank's part of every step, from the first on.

        After a resume Trainer steps over the batches before its place, of which no row is read (accelerate's
        `SkipBatchSampler`): a tenth of a microsecond each.
        """
        args = self.args
        batches = RankBatches(
            first_step=0,
            num_steps=args.max_steps,
            global_batch_size=self.global_batch_size,
            per_device_batch_size=args.per_device_train_batch_size,
            rank=args.process_index,
            world_size=args.world_size,
        )
        return self._open_loader(self.train_dataset, batches)

    def get_eval_dataloader(self, eval_dataset: HeldOut | None = None) -> DataLoader:
        """The rank's part of the held-out rows."""
        args, held_out = self.args, eval_dataset or self.eval_dataset
        batches = held_out.batches(
            args.per_device_eval_batch_size, rank=args.process_index, world_size=args.world_size
        )
        return self._open_loader(held_out, batches)

    def _open_loader(self, rows: Dataset, batches: Iterable[Sequence[int]]) -> DataLoader:
        args = self.args
        return open_loader(
            rows,
            batches,
            collate=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type != "cpu",
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's optimizer; each of its groups is cut in two, the second at half the rate at every step."""
        modules = self.recipe.trainable.low_lr_modules
        if self.optimizer is None and modules:
            low = {id(p) for p in low_lr_parameters(self.model if model is None else model, modules)}
            optimizer = super().create_optimizer(model)
            for group in list(optimizer.param_groups):
                slow = [p for p in group["params"] if id(p) in low]
                group["params"] = [p for p in group["params"] if id(p) not in low]
                optimizer.add_param_group({**group, "params": slow, "lr": group["lr"] / 2})
        return super().create_optimizer(model)  # the one just made, if there is one

    def create_scheduler(self, *args: Any, **kwargs: Any) -> LRScheduler:
        """Trainer's."""
        schedule = super().create_scheduler(*args, **kwargs)
        self.settings = settings_of(self.args, self.optimizer, schedule)
        return schedule

    def compute_loss(self, model: nn.Module, inputs: Batch, return_outputs: bool = False, **_: Any) -> Any:
        """Mean over the rows of the micro-batch, each noised by its own draw number."""
        at(f"step {self.state.global_step + 1}")
        per_row, prediction = self.objective.of_draws(model, inputs)
        self.losses.note(inputs, per_row)
        return (per_row.mean(), {"prediction": prediction}) if return_outputs else per_row.mean()

    def prediction_step(self, model: nn.Module, inputs: Batch, *_: Any, **__: Any) -> tuple[None, Tensor, Tensor]:
        """No loss of the batch; of each row (loss, sigma), and its number.

        The last row is repeated up to the size of a full batch: ranks gather equally many.
        """
        inputs, fractions = self._prepare_inputs(inputs), self.eval_dataset.fractions[inputs["draw"]]
        with torch.no_grad(), self.compute_loss_context_manager():
            per_row, sigma = self.objective.of_held_out(model, inputs, fractions)
        place = torch.arange(self.args.per_device_eval_batch_size).clamp_max(len(per_row) - 1)
        numbers = torch.tensor(inputs["draw"])[place]
        return None, torch.stack([per_row, sigma], dim=1)[place], numbers.to(per_row.device)

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        """Trainer's, on the device, and latents in place of images."""
        batch = super()._prepare_inputs(inputs)
        if "images" in batch:
            encode_images(batch, self.encoder, batch_size=self.recipe.extract.vae_batch_size)
        return batch

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Trainer's, without a trace in the generators."""
        with generators_kept(self.args.device):
            return super().evaluate(*args, **kwargs)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Trainer's, among the steps that are saved."""
        return self.control.should_save and super()._determine_best_metric(metrics, trial)

    def _load_best_model(self) -> None:
        """The weights of the best checkpoint, once its files are those that were written."""
        best = self.state.best_model_checkpoint
        if (reason := misfit(Path(best))) not in (None, WEIGHTS_ALONE):
            raise InputError(
                f"{best}: was the best checkpoint, but {reason}; there may be others in its folder to use"
            )
        self._load_from_checkpoint(best)
        metric = self.args.metric_for_best_model
        logger.info("%s is the best checkpoint (%s %g), and so what is saved", best, metric, self.state.best_metric)

    def get_batch_samples(self, *args: Any) -> tuple[list[Batch], None]:
        """Trainer's, by the clock."""
        if self.state.global_step == self._initial_global_step:
            self.accelerator.wait_for_everyone()  # rank 0 alone starts trackers and draws images
        with self.pace.fetching():
            batches, _ = super().get_batch_samples(*args)
        self.pace.note(batches)
        return batches, None

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """Trainer's, once the step is known to be sound.

        Where nothing is logged, evaluated or saved, that is known a step later: asking at once would make the device
        wait for the CPU.
        """
        due = self.control.should_log or self.control.should_evaluate or self.control.should_save
        if self.losses.of_step:  # Trainer also calls at the end of the run, after the call for its last step
            skipped = self.accelerator.optimizer_step_was_skipped  # float16's scale was too large, which is no harm
            self.losses.end_step(self.state.global_step, 0.0 if skipped else grad_norm)
            self.losses.check(last=due or self.control.should_training_stop)
            self.pace.end_step()
        with at_any_length("logging, evaluation or saving", tell=due):
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)
            if due:
                self.accelerator.wait_for_everyone()  # rank 0 alone reports, flushes, digests and rotates
        at(BETWEEN)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """To the mean loss of the steps since the last log, add that of each task's draws and the pace.

        Beside it a line on the shares that were drawn, and another one at the end.
        """
        if "loss" in logs:
            logs |= self.losses.by_task() | self.pace.read()
            logger.info("realised since the last line: %s", realised_shares(self.losses.drawn_since_log()))
        elif "train_runtime" in logs and self.losses.drawn_in_all:
            logger.info("realised since this start: %s", realised_shares(self.losses.drawn_in_all))
        super().log(logs, start_time)

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        """Trainer's state, but with the recipe's own steps between logs and saves."""
        place = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)
        return place

    def _prepare_for_training(self, *args: Any) -> tuple[nn.Module, DataLoader]:
        """Trainer's, then the proof that FSDP is what was asked for."""
        prepared = super()._prepare_for_training(*args)
        if self.args.fsdp:
            check_sharded(self.model, self.optimizer)
        return prepared

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """What trains, for diffusers; every rank calls it. `_internal_call`: for a checkpoint.

        In a checkpoint of sharded state there is no whole transformer: gathering 20B parameters takes its time. Where
        nothing is sharded these are also the weights to resume from, and so stay as they are; else bfloat16, if that
        is the arithmetic.
        """
        full, sharded = self.recipe.trainable.lora is None, self.args.fsdp
        if _internal_call and full and sharded and "SHARDED" in self.args.fsdp_plugin_args["state_dict_type"]:
            return
        to_resume_from = _internal_call and not sharded
        dtype = torch.bfloat16 if self.args.mixed_precision == "bf16" and not to_resume_from else None
        save_weights(self.model, output_dir or self.args.output_dir, writes=self.args.should_save, dtype=dtype)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The weights of a checkpoint, once none of its files holds more than numbers; Trainer loads the rest.

        Of sharded ones accelerate does, whose reader would run what a file of them says.
        """
        refuse_pickles(Path(resume_from_checkpoint))
        if self.args.fsdp:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(self.model if model is None else model, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Trainer's, in words where the states are not those of what trains; then the recipe's settings."""
        with states_of(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            check_shapes(self.optimizer)
            if checkpoint:
                was = read_complete(Path(checkpoint))["settings"]
                apply_settings(was, self.settings, self.optimizer, self.lr_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Trainer's, in words where the generators' states are none."""
        with states_of(checkpoint):
            super()._load_rng_state(checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's checkpoint, then `complete.json`, then the older ones go."""
        folder = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut off here
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            settings = self.settings | {"changes": self.record["changes"]}
            known = {"step": self.state.global_step, "ranks": self.args.world_size, "identity": self.identity}
            mark_complete(folder, **known, settings=settings)
            rotate_checkpoints(self.args.output_dir, limit, self.state.best_model_checkpoint, use_mtime=True)
