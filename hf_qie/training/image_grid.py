"""Images while training: held-out rows at a fixed seed, every so many steps, as a growing grid."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from accelerate.logging import get_logger
from PIL import Image
from transformers import Trainer, TrainerCallback

from hf_qie.plots import Card, fit, labelled_sheet
from hf_qie.training.evaluation import generators_kept, spread
from hf_qie.training.held_out_edits import HeldOutEdits

logger = get_logger(__name__)

GRID, FOLDER = "pictures.png", "pictures"  # in the output folder
BOX_PX = 256  # side of the square that an image is fitted into
MOST_STEPS = 24  # in the grid; more would be too wide to look at, and all are in the folder


class ImageGrid(TrainerCallback):
    """Makes images of the same held-out rows before the first step and every `sampling.every` steps.

    They are what the official pipeline would make of the stored embeddings and latents with `--seed` the recipe's
    seed; training is the same with and without them. `<output_dir>/pictures.png` is the grid,
    `pictures/step-000100/<task>-<row>.png` are the single images.
    """

    def __init__(self, trainer: Trainer, edits: HeldOutEdits):
        """`trainer` is an EditTrainer with held-out rows; of its ranks the first decodes, and has `edits.vae`."""
        self.trainer, self.edits, self.settings = trainer, edits, trainer.recipe.sampling
        self.numbers = spread(edits.held_out, self.settings.rows)
        self.folder = Path(trainer.args.output_dir, FOLDER)
        self.cards: list[Card] = []

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Images of the model at the start; a resumed run keeps those of the steps before."""
        if state.is_world_process_zero:
            with generators_kept(args.device):
                self.cards = [self._card(number) for number in self.numbers]
            for step in self._steps():  # of another run, or lost with their step
                if state.global_step == 0 or step > state.global_step:
                    shutil.rmtree(self.folder / f"step-{step:06d}")
        if state.global_step == 0:
            self._sample(0)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Images of this step, if they are due."""
        if state.global_step % self.settings.every == 0:
            self._sample(state.global_step)

    def _sample(self, step: int) -> None:
        """Ranks share the rows; rank 0 decodes and writes all."""
        with generators_kept(self.trainer.args.device), self.trainer.averaged():
            found = self.edits.shared(self.trainer.model, self.numbers, self.settings)
        if self.trainer.is_world_process_zero():
            folder = self.folder / f"step-{step:06d}"
            folder.mkdir(parents=True, exist_ok=True)
            for card, latents in zip(self.cards, found, strict=True):
                self.edits.vae.decode(*latents).save(folder / f"{card.heading}.png")
            steps = self._steps()
            shown = np.linspace(0, len(steps) - 1, min(len(steps), MOST_STEPS)).round().astype(int)
            draw_grid(self.cards, [steps[place] for place in shown], self.folder).save(self.folder.with_name(GRID))
            self._track(draw_grid(self.cards, [step], self.folder), step)
            logger.info("%d images of step %d: %s", len(found), step, self.folder.with_name(GRID))

    def _card(self, number: int) -> Card:
        """Sources and target as the VAE decodes them, and the caption that the row is evaluated with."""
        target, *sources = (fit(image, BOX_PX) for image in self.edits.decoded(number))
        boxes = [*((f"source {place}", source) for place, source in enumerate(sources, 1)), ("target", target)]
        return Card(heading=self.edits.name(number), boxes=boxes, texts=self.edits.named_instruction(number))

    def _steps(self) -> list[int]:
        return sorted(int(folder.name.removeprefix("step-")) for folder in self.folder.glob("step-[0-9]*[0-9]"))

    def _track(self, image: Image.Image, step: int) -> None:
        """Log an image to those trackers of `training.report_to` that take some."""
        for callback in self.trainer.callback_handler.callbacks:
            if (writer := getattr(callback, "tb_writer", None)) is not None:  # TensorBoard's
                writer.add_image("pictures", np.asarray(image), step, dataformats="HWC")
            for name in ("_wandb", "_trackio"):
                if (tracker := getattr(callback, name, None)) is not None:
                    tracker.log({"pictures": tracker.Image(image), "train/global_step": step})


def draw_grid(cards: Sequence[Card], steps: Sequence[int], folder: Path) -> Image.Image:
    """The cards of rows, with sources and target, and beside these the row's images of `steps` in `folder`."""
    most, full = max(len(card.boxes) for card in cards), []
    for card in cards:
        *sources, target = card.boxes
        boxes = [*sources, *[("", None)] * (most - len(card.boxes)), target]
        for step in steps:
            path = folder / f"step-{step:06d}" / f"{card.heading}.png"
            # sampling.rows may have been smaller before
            boxes.append((f"step {step:,}", fit(Image.open(path), BOX_PX) if path.is_file() else None))
        full.append(replace(card, boxes=boxes, target=most - 1))
    return labelled_sheet(full, title="Held-out rows", box_px=BOX_PX)
