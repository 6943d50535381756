"""Point 5: what a step of training costs beside a bare PyTorch loop over the same model and tensors.

Both train the same transformer in float32 on one thread, on batches of 4 rows; the loop has its batches in memory and
does nothing but noise, forward, loss, backward, clip and AdamW. The two take turns in rounds, so that a machine that
gets slower gets slower for both; the figure is the median over rounds, of the median over steps.
"""

import statistics
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from diffusers import QwenImageTransformer2DModel
from embedding_sets import write_recipe
from figures import Figure, at_most
from transformers import TrainerCallback

from hf_qie.config.recipe import load_recipe
from hf_qie.demo.tiny import tiny_checkpoint
from hf_qie.models.qwen_image.transformer import predict
from hf_qie.training.losses import velocity_mse
from hf_qie.training.objective import add_noise
from hf_qie.training.sets import open_sets
from hf_qie.training.setup import build_trainer

ROUNDS, STEPS, WIDTH, LAYERS = 4, 16, 256, 14


class Clock(TrainerCallback):
    """Marks the end of each step."""

    def __init__(self):
        self.marks: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.marks.append(time.perf_counter())


def checkpoint(folder: Path) -> Path:
    """The tiny checkpoint with a transformer that takes a while."""
    tiny_checkpoint(folder)
    model = QwenImageTransformer2DModel(
        num_layers=LAYERS,
        attention_head_dim=64,
        num_attention_heads=WIDTH // 64,
        joint_attention_dim=96,
        axes_dims_rope=(16, 24, 24),
    )
    model.save_pretrained(folder / "transformer")
    return folder


def bare_loop(trainer, batches, optimizer, schedule) -> list[float]:
    """Seconds of each step."""
    model, parameters = trainer.model, [p for p in trainer.model.parameters() if p.requires_grad]
    seconds = []
    for batch in batches:
        started = time.perf_counter()
        latents = batch["target_latents"].float()
        noise, sigma = torch.randn_like(latents), torch.rand(len(latents))
        prediction = predict(model, batch, add_noise(latents, noise, sigma), sigma)
        velocity_mse(prediction, latents, noise, torch.ones(len(latents))).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    return seconds


def measure(folder: Path) -> list[Figure]:
    """Both ways, by turns."""
    PartialState(cpu=True)
    model = checkpoint(folder / "model")
    training = {"max_steps": STEPS, "save_strategy": "no", "logging_steps": 10, "optim": "adamw_torch"}
    recipe = write_recipe(folder, model, training=training)
    ratios, ours = [], []
    for _ in range(ROUNDS):
        loaded = load_recipe(recipe)
        trainer, _ = build_trainer(loaded, open_sets(loaded))
        batches = list(trainer.get_train_dataloader())
        optimizer = torch.optim.AdamW([p for p in trainer.model.parameters() if p.requires_grad], lr=1e-6)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        trainer.model.train()
        bare = bare_loop(trainer, batches, optimizer, schedule)[2:]  # the first ones warm up
        clock = Clock()
        trainer.add_callback(clock)
        trainer.train()
        full = np.diff(clock.marks)[2:]
        ours.append(statistics.median(full))
        ratios.append(ours[-1] / statistics.median(bare))
    mine, bare = statistics.median(ours), statistics.median(ours) / statistics.median(ratios)
    what = "a step of the trainer, against a bare loop"
    return [at_most(1.05, point="5", what=what, ours=1e3 * mine, usual=1e3 * bare, unit="ms")]
