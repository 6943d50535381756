"""RUN 2: embedding sets to LoRA weights, or to a fine-tuned transformer.

    accelerate launch [-q] hf_qie/train.py recipe.yaml [key.of.the.recipe=value ...]

Trains on the sets that hf_qie/extract.py wrote, without the prompt encoder in memory, and without the VAE unless a set
has no latents (extract.latents: false) or images are made while training (sampling.every, evaluation.every). The
weights are saved to training.output_dir as pytorch_lora_weights.safetensors, or as the folder transformer/, beside the
checkpoints and the recipe. Started again, a run resumes from its last complete checkpoint.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hf_qie.config.launch import fsdp_settings, num_started
from hf_qie.config.recipe import Recipe, load_recipe, save_recipe
from hf_qie.runtime.cli import run_script
from hf_qie.runtime.files import write_durably

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_qie.training.trainer import EditTrainer


def main(argv: list[str]) -> None:
    """Train by the recipe `argv[0]` with the overrides `argv[1:]`."""
    recipe = load_recipe(argv[0], argv[1:])
    fsdp_settings(recipe, os.environ)  # reports what does not fit before torch is imported
    run(recipe)


def run(recipe: Recipe) -> "EditTrainer":
    """Open the sets and train on them; no other launch uses the output folder meanwhile."""
    from hf_qie.runtime.lock import held
    from hf_qie.training.sets import open_sets

    if num_started(os.environ) > 1:
        from hf_qie.training.setup import join_ranks

        join_ranks(recipe)
    folder = Path(recipe.training["output_dir"])
    with held(folder, remedy="give another training.output_dir"):
        return train(recipe, open_sets(recipe))


def train(recipe: Recipe, sets: Mapping[str, "Dataset"]) -> "EditTrainer":
    """Train from the start, or from the last complete checkpoint of the output folder; save the weights."""
    from hf_qie.plots import loss_chart
    from hf_qie.training.checkpoints import RECORD, STATE
    from hf_qie.training.setup import build_trainer

    trainer, checkpoint = build_trainer(recipe, sets)
    folder = Path(trainer.args.output_dir)
    if trainer.args.should_save:
        save_recipe(recipe, folder / "recipe.yaml")
        write_durably(folder / RECORD, json.dumps(trainer.record, indent=2, allow_nan=False))
        (folder / STATE).unlink(missing_ok=True)  # the run has not ended yet
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    trainer.save_model()
    trainer.save_state()  # after the weights: says that the run has ended
    if trainer.args.should_save:
        loss_chart(trainer.state.log_history).savefig(folder / "loss.png")
    return trainer


if __name__ == "__main__":
    run_script(main)
