"""Images while training: held-out rows at a fixed seed, every so many steps, as a growing grid.

Letters: B rows, S target tokens.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor
from transformers import Trainer, TrainerCallback

from hf_qie.data.collate import collate
from hf_qie.data.online_latents import load_vae
from hf_qie.plots import Card, fit, labelled_sheet
from hf_qie.training.evaluation import HeldOut, generators_kept

logger = get_logger(__name__)

GRID, FOLDER = "pictures.png", "pictures"  # in the output folder
BOX_PX = 256  # side of the square that an image is fitted into
MOST_STEPS = 24  # in the grid; more would be too wide to look at, and all are in the folder


@dataclass(kw_only=True)
class GridRow:
    """One held-out row of the grid."""

    name: str  # of its files
    instruction: str
    sources: list[Image.Image]
    target: Image.Image


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
        self.rows: list[GridRow] = []

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Images of the model at the start; a resumed run keeps those of the steps before."""
        if state.is_world_process_zero:
            with generators_kept(args.device):
                self.rows = [self._row(number) for number in self.numbers]
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
        started, args = time.monotonic(), self.trainer.args
        turns = -(-len(self.numbers) // args.world_size)
        places = [(turn * args.world_size + args.process_index) % len(self.numbers) for turn in range(turns)]
        self.trainer.model.eval()  # Trainer sets it to train in each step
        with generators_kept(args.device):
            found = dict(gather_object([(place, self._latents(self.numbers[place])) for place in places]))
        if self.trainer.is_world_process_zero():
            folder = self.folder / f"step-{step:06d}"
            folder.mkdir(parents=True, exist_ok=True)
            for place, row in enumerate(self.rows):
                self.vae.decode(*found[place]).save(folder / f"{row.name}.png")
            steps = self._steps()
            shown = np.linspace(0, len(steps) - 1, min(len(steps), MOST_STEPS)).round().astype(int)
            grid = draw_grid(self.rows, [steps[place] for place in shown], self.folder)
            grid.save(self.folder.with_name(GRID))
            self._track(draw_grid(self.rows, [step], self.folder), step)
            seconds = time.monotonic() - started
            logger.info("%d images of step %d in %.0f s: %s", len(found), step, seconds, self.folder.with_name(GRID))

    @torch.no_grad()
    def _latents(self, number: int) -> tuple[Tensor, tuple[int, int]]:
        """What the model makes of a held-out row: latents `[S, 64]` on the CPU, and their grid."""
        held_out, trainer = self.held_out, self.trainer
        batch = trainer.on_device(collate([held_out[number]]))
        task, index = held_out.places[number]
        without = held_out.tasks[task].read(index, inverse=False, caption=None) | {"draw": number}
        prompt = trainer.on_device({key: collate([without])[key] for key in ("prompt_embeds", "prompt_mask")})
        with trainer.compute_loss_context_manager():
            latents = trainer.objective.family.denoise(
                trainer.model,
                batch,
                batch | prompt,
                scheduler_config=trainer.objective.scheduler_config,
                num_inference_steps=self.settings.num_inference_steps,
                true_cfg_scale=self.settings.true_cfg_scale,
                seed=self.seed,
            )
        return latents[0].cpu(), batch["grids"][0]

    def _row(self, number: int) -> GridRow:
        """Sources and target as the VAE decodes them, and the caption that the row is evaluated with."""
        task, _ = self.held_out.places[number]
        batch = self.trainer.on_device(collate([self.held_out[number]]))
        lengths = [height * width for height, width in batch["grids"]]
        latents = torch.cat([batch["target_latents"], batch["source_latents"]], dim=1)[0].split(lengths)
        target, *sources = (fit(self.vae.decode(*one), BOX_PX) for one in zip(latents, batch["grids"], strict=True))
        instruction = self.held_out.instruction(number) or self.trainer.recipe.extract.drop_caption
        name = f"{task}-{self.held_out.rows[number]}"
        return GridRow(name=name, instruction=instruction, sources=sources, target=target)

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
    by_task = [[n for n, place in enumerate(held_out.places) if place[0] == task] for task in held_out.tasks]
    return [number for number in chain(*zip_longest(*by_task)) if number is not None][:count]


def draw_grid(rows: Sequence[GridRow], steps: Sequence[int], folder: Path) -> Image.Image:
    """One card a row: its sources, the target, its images of `steps` in `folder`, and below them its instruction."""
    most = max(len(row.sources) for row in rows)
    labels = [f"source {place + 1}" if most > 1 else "source" for place in range(most)]
    labels += ["target", *(f"step {step:,}" for step in steps)]
    cards = []
    for row in rows:
        paths = [folder / f"step-{step:06d}" / f"{row.name}.png" for step in steps]
        # sampling.rows may have been smaller before
        made = [fit(Image.open(path), BOX_PX) if path.is_file() else None for path in paths]
        boxes = zip(labels, [*row.sources, *[None] * (most - len(row.sources)), row.target, *made], strict=True)
        cards.append(Card(heading=row.name, boxes=list(boxes), target=most, texts={"instruction": row.instruction}))
    return labelled_sheet(cards, title="Held-out rows", box_px=BOX_PX)
