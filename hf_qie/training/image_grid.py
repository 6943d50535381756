"""Images while training: held-out rows at a fixed seed, every so many steps, as a growing grid.

Letters: B rows, S target tokens.
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor
from transformers import Trainer, TrainerCallback

from hf_qie.data.collate import PROMPT, collate
from hf_qie.data.online_latents import load_vae
from hf_qie.plots import Card, fit, labelled_sheet
from hf_qie.training.evaluation import HeldOut, generators_kept

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

    def __init__(self, trainer: Trainer):
        """`trainer` is an EditTrainer with held-out rows; where it has no VAE, rank 0 loads one to decode."""
        self.trainer, self.vae, recipe = trainer, trainer.encoder, trainer.recipe
        if self.vae is None and trainer.is_world_process_zero():
            self.vae = load_vae(recipe, trainer.args.device)
        self.held_out: HeldOut = trainer.eval_dataset
        self.settings, self.seed = recipe.sampling, recipe.seed
        self.numbers = spread(self.held_out, self.settings.rows)
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
        """Each rank samples its part of the rows, as sharded ranks need each other; rank 0 decodes and writes all."""
        args = self.trainer.args
        turns = -(-len(self.numbers) // args.world_size)
        places = [(turn * args.world_size + args.process_index) % len(self.numbers) for turn in range(turns)]
        self.trainer.model.eval()  # Trainer sets it to train in each step
        with generators_kept(args.device), self.trainer.averaged():
            found = dict(gather_object([(place, self._latents(self.numbers[place])) for place in places]))
        if self.trainer.is_world_process_zero():
            folder = self.folder / f"step-{step:06d}"
            folder.mkdir(parents=True, exist_ok=True)
            for place, card in enumerate(self.cards):
                self.vae.decode(*found[place]).save(folder / f"{card.heading}.png")
            steps = self._steps()
            shown = np.linspace(0, len(steps) - 1, min(len(steps), MOST_STEPS)).round().astype(int)
            draw_grid(self.cards, [steps[place] for place in shown], self.folder).save(self.folder.with_name(GRID))
            self._track(draw_grid(self.cards, [step], self.folder), step)
            logger.info("%d images of step %d: %s", len(found), step, self.folder.with_name(GRID))

    @torch.no_grad()
    def _latents(self, number: int) -> tuple[Tensor, tuple[int, int]]:
        """What the model makes of a held-out row: latents `[S, 64]` on the CPU, and their grid."""
        held_out, trainer = self.held_out, self.trainer
        batch = trainer.on_device(collate([held_out[number]]))
        task, index = held_out.places[number]
        scale, family = self.settings.true_cfg_scale, trainer.objective.family
        without = held_out.tasks[task].read(index, inverse=False, caption=None) | {"draws": [number]}
        prompt = {key: collate([without])[key] for key in PROMPT}
        with trainer.compute_loss_context_manager():
            latents = family.denoise(
                trainer.model,
                batch,
                batch | trainer.on_device(prompt),
                scheduler_config=trainer.objective.scheduler_config,
                sigmas=trainer.objective.sampling_sigmas(self.settings.num_inference_steps),
                true_cfg_scale=family.true_cfg_scale if scale is None else scale,
                seed=self.seed,
            )
        return latents[0].cpu(), batch["grids"][0]

    def _card(self, number: int) -> Card:
        """Sources and target as the VAE decodes them, and the caption that the row is evaluated with."""
        (task, index), row = self.held_out.places[number], self.held_out[number]
        batch = self.trainer.on_device(collate([row]))
        lengths = [height * width for height, width in batch["grids"]]
        latents = torch.cat([batch["target_latents"], batch["source_latents"]], dim=1)[0].split(lengths)
        target, *sources = (fit(self.vae.decode(*one), BOX_PX) for one in zip(latents, batch["grids"], strict=True))
        boxes = [*((f"source {place}", source) for place, source in enumerate(sources, 1)), ("target", target)]
        instruction = self.trainer.recipe.extract.drop_caption
        if row["caption"] != "drop":
            instruction = self.held_out.tasks[task].rows.value(index, row["caption"]).as_py()
        heading = f"{task}-{self.held_out.rows[number]}"
        return Card(heading=heading, boxes=boxes, texts={"instruction": instruction})

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


def spread(held_out: HeldOut, count: int) -> list[int]:
    """The numbers of `count` held-out rows, of each task in turn; all of them where there are fewer."""
    return sorted(range(len(held_out)), key=lambda number: held_out.places[number][1])[:count]


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
