"""What is done at Trainer's public events: checks of a step, complete checkpoints, stack traces on a hang."""

import faulthandler
import os
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from hf_qie.config.launch import num_replicas
from hf_qie.training.checkpoints import apply_settings, mark_complete, read_complete
from hf_qie.training.fsdp import check_sharded
from hf_qie.training.metrics import peak_memory_bytes, reserved_memory_bytes

logger = get_logger(__name__)

PATIENCE = 0.9  # of ddp_timeout: before the collectives of other ranks time out


class RunCallback(TrainerCallback):
    """Checks each step of an EditTrainer, and completes its checkpoints."""

    def __init__(self, trainer: Trainer):
        """`trainer` is an EditTrainer."""
        self.trainer = trainer
        self.best: tuple[float | None, int | None] | None = None  # before an evaluation whose step is not saved

    def on_train_begin(self, args, state, control, *, model, optimizer, lr_scheduler, **kwargs) -> None:
        """Check FSDP; in a resumed run, replace the checkpoint's settings by the recipe's."""
        if args.fsdp:
            check_sharded(model, optimizer, num_replicas=num_replicas(os.environ))
        if state.global_step > 0:
            state.compute_steps(args, state.max_steps)
            was = read_complete(Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"))
            apply_settings(was["settings"], self.trainer.settings, optimizer, lr_scheduler)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """The best metric is that of a step with a checkpoint."""
        if self.best:
            (state.best_metric, state.best_global_step), self.best = self.best, None

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Raise NotFinite for a loss that is not finite: before anything is logged or saved, else a step later.

        Asking for it at once would make the device wait for the CPU. `EditTrainer.log` checks the gradient, and so
        comes before each checkpoint and at the end.
        """
        if control.should_save or control.should_training_stop:
            control.should_log = True
        self.trainer.losses.end_step(state.global_step)
        self.trainer.losses.check(last=control.should_log or control.should_evaluate)
        self.trainer.throughput.end_step()

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        """Called before Trainer compares the metric with the best one."""
        self.best = None if control.should_save else (state.best_metric, state.best_global_step)

    def on_save(self, args, state, control, **kwargs) -> None:
        """Write `complete.json` once every rank has written its files, and only then delete older checkpoints."""
        trainer = self.trainer
        trainer.accelerator.wait_for_everyone()
        if args.should_save:
            settings = trainer.settings | {"changes": trainer.record["changes"]}
            known = {"step": state.global_step, "ranks": args.world_size, "identity": trainer.identity}
            folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            mark_complete(folder, **known, settings=settings)
            limit = trainer.recipe.training.get("save_total_limit")
            rotate_checkpoints(args.output_dir, limit, state.best_model_checkpoint, use_mtime=True)


class PeakMemory(TrainerCallback):
    """At the end of training the peak that was measured, beside the one that was forecast, if any was."""

    def __init__(self, forecast_bytes: float | None):
        self.forecast_bytes = forecast_bytes

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """What came before counts no more: a weight may have been on the device twice while it was loaded."""
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Log both; what was measured is that of this process."""
        measured, reserved = peak_memory_bytes(args.device), reserved_memory_bytes(args.device)
        beside = f", {reserved / 1e9:.2f} GB reserved for it" if reserved else ""
        beside += "" if self.forecast_bytes is None else f", {self.forecast_bytes / 1e9:.2f} GB forecast"
        logger.info("peak memory: %.2f GB measured%s", measured / 1e9, beside)


class StackTraces(TrainerCallback):
    """On a hang every rank prints the stack of each of its threads, under the line `Timeout (…)!`.

    That is shortly before the collectives of the other ranks reach `ddp_timeout` and end the launch, and again where
    NCCL's watchdog aborts a process.
    """

    def __init__(self, ddp_timeout_s: float):
        self.patience_s = PATIENCE * ddp_timeout_s
        faulthandler.enable()
        self._restart()

    def _restart(self, *_: Any, **__: Any) -> None:
        faulthandler.dump_traceback_later(self.patience_s)

    on_train_begin = on_step_begin = on_substep_end = on_step_end = _restart
    on_prediction_step = on_evaluate = on_log = on_save = _restart

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Training has ended; what follows has its own time."""
        faulthandler.cancel_dump_traceback_later()
