"""The moving average of what trains (EMA), which is evaluated, sampled and saved in place of the last step's weights.

A checkpoint's weights for diffusers are averages. Its folder `ema/` has what a resumed run needs beside them, in
safetensors: the averages in float32, and the last step's weights where FSDP does not save these.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.logging import get_logger
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_qie.training.model import parameters

logger = get_logger(__name__)

EMA_FOLDER = "ema"  # in a checkpoint
AVERAGE, LAST = "average.", "last_step."  # before the names of its tensors


class MovingAverage(TrainerCallback):
    """diffusers' EMAModel of what trains, on its device and sharded as it is.

    Update n follows step n * every, with a decay of 0 for n = 1, else min(decay, n / (n + 9)), see
    `EMAModel.get_decay`. n follows from the step alone: as in diffusers' scripts, a step that float16's loss scale
    skipped counts too.
    """

    def __init__(self, trainer: Trainer):
        """`trainer` is an EditTrainer whose recipe has `ema`."""
        self.trainer, self.settings = trainer, trainer.recipe.ema
        self.trained: dict[str, nn.Parameter] = {}
        self.inside = False

    def on_train_begin(self, args, state, control, *, model, **kwargs) -> None:
        """Start from the weights at hand, or from a checkpoint's averages."""
        decay, every = self.settings.decay, self.settings.every
        self.trained = {name: one for name, one in parameters(model).items() if one.requires_grad}
        self.average = EMAModel(self.trained.values(), decay=decay, foreach=True)
        self.average.optimization_step = state.global_step // every
        if state.global_step > 0:
            self.load(Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"))
        times = "every step" if every == 1 else f"every {every} steps"
        logger.info("ema: averages at decay %g, %s, are what is evaluated, sampled and saved", decay, times)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Update the averages, if it is due."""
        if state.global_step % self.settings.every == 0:
            self.average.step(self.trained.values())

    def on_save(self, args, state, control, **kwargs) -> None:
        """Write `ema/`, each rank its shards, so that any number of ranks can resume."""
        if not args.save_only_model:
            folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", EMA_FOLDER)
            with warnings.catch_warnings(action="ignore"):  # of a single process, that it is one
                dcp.save(self._state(), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))

    def load(self, checkpoint: Path) -> None:
        """Take averages and weights of a checkpoint; of one with weights alone, which the model has, the averages."""
        if (folder := checkpoint / EMA_FOLDER).is_dir():
            with warnings.catch_warnings(action="ignore"):
                dcp.load(self._state(), storage_reader=HuggingFaceStorageReader(str(folder)))
        else:
            torch._foreach_copy_(self.average.shadow_params, [one.detach() for one in self.trained.values()])

    def _state(self) -> dict[str, Tensor]:
        """What `ema/` holds, by name: the tensors themselves."""
        averages = dict(zip((AVERAGE + name for name in self.trained), self.average.shadow_params, strict=True))
        last = {} if self.trainer.args.fsdp else self.trained
        return averages | {LAST + name: one.detach() for name, one in last.items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """What trains holds its averages meanwhile; within another such context, and before training, as it is."""
        if self.inside or not self.trained:
            yield
            return
        self.inside = True
        self._exchange()
        try:
            yield
        finally:
            self._exchange()
            self.inside = False

    @torch.no_grad()
    def _exchange(self) -> None:
        """Put the averages in the place of the weights, and these in theirs: no third copy of them is needed."""
        for module in self.trainer.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what is gathered for a forward alone would be taken for the next one as well
        for average, own in zip(self.average.shadow_params, self.trained.values(), strict=True):
            kept = own.clone()
            own.copy_(average)
            average.copy_(kept)
