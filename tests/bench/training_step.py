"""What a step of training costs beside a bare PyTorch loop over the same model and tensors.

    python tests/bench/training_step.py [--rounds 5] [--steps 16] [--layers 14] [--width 256]

Both train the same transformer in float32 on one thread, on batches of 4 rows; the loop has its batches in memory and
does nothing but noise, forward, loss, backward, clip and AdamW. The two take turns in rounds, so that a machine that
gets slower gets slower for both; the figure is the median over rounds, of the median over steps. Also what reading and
collating take for a row of real width, and the mix for a million draws.
"""

import argparse
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from diffusers import QwenImageTransformer2DModel
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from embedding_sets import write_recipe

from hf_qie.collate import collate
from hf_qie.embeddings import set_features, to_table
from hf_qie.flow import add_noise
from hf_qie.loader import Draws
from hf_qie.losses import velocity_mse
from hf_qie.mix import group_shares, mixed_plan, read_groups
from hf_qie.model import predict
from hf_qie.recipe import Mix, load_recipe
from hf_qie.tiny import tiny_checkpoint
from hf_qie.train import build_trainer, open_sets

BATCH = 4


class Clock(TrainerCallback):
    """Marks the end of each step."""

    def __init__(self):
        self.marks: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.marks.append(time.perf_counter())


def checkpoint(folder: Path, *, width: int, layers: int) -> Path:
    """The tiny checkpoint with a transformer that takes a while."""
    tiny_checkpoint(folder)
    model = QwenImageTransformer2DModel(
        num_layers=layers,
        attention_head_dim=64,
        num_attention_heads=width // 64,
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


def compare_steps(folder: Path, *, num_steps: int, rounds: int, width: int, layers: int) -> None:
    model = checkpoint(folder / "model", width=width, layers=layers)
    training = {"max_steps": num_steps, "save_strategy": "no", "logging_steps": 10, "optim": "adamw_torch"}
    recipe = write_recipe(folder, model, training=training)
    ratios, ours, theirs = [], [], []
    for _ in range(rounds):
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
        theirs.append(statistics.median(bare))
        ratios.append(ours[-1] / theirs[-1])
    print(
        f"step: {statistics.median(ours):.4f} s, bare loop {statistics.median(theirs):.4f} s; "
        f"ratio {statistics.median(ratios):.4f} (rounds: {', '.join(f'{ratio:.3f}' for ratio in ratios)})"
    )


def rows(folder: Path, *, num_rows: int = 64, tokens: int = 1000, width: int = 3584) -> None:
    """Reading and collating rows of real width: 1,000 prompt tokens, target of 512 x 512, source of 1024 x 1024."""
    features = set_features(width=width, captions=["instruction"], inverse_captions=(), inverse_latents=False)
    values = np.random.default_rng(0)

    def matrix(length: int, columns: int) -> np.ndarray:
        return values.standard_normal((length, columns), np.float32).astype(np.float16)

    def row(number: int) -> dict:
        return {
            "row": number,
            "source_image": ["a.png"],
            "target_image": "b.png",
            "instruction": "edit",
            "num_sources": 1,
            "image_embeds": matrix(tokens - 100, width),
            "text_embeds_instruction": matrix(100, width),
            "text_embeds_drop": matrix(6, width),
            "target_latents": matrix(32 * 32, 64),
            "target_grid": [32, 32],
            "source_latents": matrix(64 * 64, 64),
            "source_grids": [[64, 64]],
        }

    Dataset(to_table([row(number) for number in range(num_rows)], features)).save_to_disk(folder / "wide")
    data = Dataset.load_from_disk(str(folder / "wide"))
    mix = Mix(caption_dropout=0.0)
    groups = read_groups({"a": data}, {"a": 1.0}, mix)
    plan = mixed_plan(groups, group_shares(groups, mix), seed=0, same_shape=BATCH, num_cells=64)
    draws = Draws({"a": data}, plan, seed=0, mix=mix)
    seconds = []
    for first in range(0, 256, BATCH):
        started = time.perf_counter()
        collate([draws[number] for number in range(first, first + BATCH)])
        seconds.append((time.perf_counter() - started) / BATCH)
    print(f"reading and collating: {1e3 * statistics.median(seconds):.2f} ms a row (at most {1e3 * max(seconds):.2f})")


def plan(num_draws: int, num_rows: int) -> None:
    """The mix over four tasks, whose rows have a hundred shapes."""
    grids = np.stack(np.divmod(np.arange(100), 10), axis=1) + 20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sets = {}
    for task in range(4):
        each = np.random.default_rng(task).integers(0, 100, num_rows // 4)
        columns = {
            "row": range(len(each)),
            "num_sources": np.ones(len(each), np.int8),
            "target_grid": grids[each].tolist(),
            "source_grids": [[grid] for grid in grids[each].tolist()],
        }
        sets[str(task)] = Dataset.from_dict(columns)
    started = time.perf_counter()
    groups = read_groups(sets, {"0": 1, "1": 2, "2": 3, "3": 0.5}, Mix())
    run = mixed_plan(groups, group_shares(groups, Mix()), seed=0, same_shape=4, num_cells=num_draws // 4)
    seconds = time.perf_counter() - started
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6
    print(
        f"mix: {num_draws:,} draws over {num_rows:,} rows in {seconds:.1f} s, {peak:.2f} GB more ({len(run):,} cells)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=14)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    PartialState(cpu=True)
    with tempfile.TemporaryDirectory() as folder:
        plan(250_000, 250_000)
        plan(1_000_000, 1_000_000)
        rows(Path(folder))
        sizes = {"width": arguments.width, "layers": arguments.layers}
        compare_steps(Path(folder), num_steps=arguments.steps, rounds=arguments.rounds, **sizes)


if __name__ == "__main__":
    main()
