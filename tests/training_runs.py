"""Training by a recipe in the process of a test."""

from pathlib import Path

from hf_qie.config.recipe import load_recipe
from hf_qie.train import train
from hf_qie.training.sets import open_sets
from hf_qie.training.setup import build_trainer
from hf_qie.training.trainer import EditTrainer


def trainer_of(recipe: Path, *overrides: str) -> EditTrainer:
    """What train.py would start, not started."""
    loaded = load_recipe(recipe, overrides)
    return build_trainer(loaded, open_sets(loaded))[0]


def run(recipe: Path, *overrides: str) -> EditTrainer:
    """What train.py does."""
    loaded = load_recipe(recipe, overrides)
    return train(loaded, open_sets(loaded))
