"""Several runs of train.py by one set of ranks: `torchrun tests/ranks.py runs.json`, a list of runs.

A run: {recipe, overrides, checkpoint: one to put into its folder first, environment: what the launcher has set}.

On a machine without accelerators accelerate leaves FSDP out, and takes ranks for single processes. In these processes
alone it is told that gloo's ranks on the CPU are accelerators; a recipe with `use_cpu: true` has plain DDP all the
same. Beside what a run leaves, each rank leaves a report of it, with the message of an InputError that ended it.
"""

import json
import logging
import os
import shutil
import sys
from pathlib import Path

import torch
from accelerate import DistributedType
from accelerate.state import PartialState

from hf_qie.recipe import InputError, load_recipe
from hf_qie.train import open_sets, train

prepare_backend = PartialState._prepare_backend


def gloo_for_accelerators(self, cpu=False, *args, **kwargs):
    return prepare_backend(self, cpu, *args, **kwargs) if cpu else ("gloo", DistributedType.MULTI_GPU)


def on_the_cpu(self):
    self.device = torch.device("cpu")


def main(runs: Path) -> None:
    PartialState._prepare_backend, PartialState.set_device = gloo_for_accelerators, on_the_cpu
    logging.basicConfig(format="%(name)s: %(message)s")
    logging.getLogger("hf_qie").setLevel(logging.INFO)
    torch.set_num_threads(1)
    environment = dict(os.environ)
    for run in json.loads(runs.read_text()):
        os.environ.clear()
        os.environ.update(environment | run.get("environment", {}))  # without what the run before has set
        recipe = load_recipe(run["recipe"], run["overrides"])
        folder = Path(recipe.training["output_dir"])
        if "checkpoint" in run and os.environ["RANK"] == "0":  # the rank that looks for it
            shutil.copytree(run["checkpoint"], folder / Path(run["checkpoint"]).name)
        try:
            report = report_of(train(recipe, open_sets(recipe)))
        except InputError as error:
            report = {"error": str(error)}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(report))


def report_of(trainer) -> dict:
    parameters = list(trainer.model.parameters())
    held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    return {
        "steps": [entry for entry in trainer.state.log_history if "loss" in entry],
        "held": len({id(p) for p in held}),
        "trained": sum(p.requires_grad for p in parameters),
        "numel": sum(p.numel() for p in parameters),
        "numel_here": sum(getattr(p, "_local_tensor", p).numel() for p in parameters),
        "dtypes": sorted({f"{p.requires_grad}: {p.dtype}" for p in parameters}),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
