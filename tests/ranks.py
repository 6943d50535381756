"""Runs of train.py in processes of their own, several one after the other in one set of ranks.

The processes are forked from one that has imported everything and computed nothing: seconds less for each.

On a machine without accelerators accelerate leaves FSDP out, and takes ranks for single processes. In these processes
alone it is told that gloo's ranks on the CPU are accelerators; a recipe with `use_cpu: true` has plain DDP all the
same.
"""

import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers.trainer
from accelerate import DistributedType
from accelerate.state import PartialState
from launches import stop
from ports import free_port

import hf_qie.training.callbacks
import hf_qie.training.checkpoints
import hf_qie.training.trainer
from hf_qie.config.recipe import load_recipe
from hf_qie.errors import InputError
from hf_qie.train import run as run_recipe
from hf_qie.training.trainer import EditTrainer

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["hf_qie.training.trainer", "hf_qie.train", "peft", "torch.distributed.checkpoint"])
prepare_backend = PartialState._prepare_backend

# Where a process may be killed: what writes a file of a checkpoint, and a pattern of the file that is cut in half.
KILLS = {
    "weights": (hf_qie.training.trainer, "save_weights", "**/*.safetensors"),
    "torch": (torch, "save", "*.p*"),
    "shards": (transformers.trainer, "save_fsdp_optimizer", "optimizer_0/*.distcp"),
    "complete": (hf_qie.training.checkpoints, "write_durably", "complete.json"),
    "rotation": (hf_qie.training.callbacks, "rotate_checkpoints", None),
    "loss": (EditTrainer, "compute_loss", None),
}


def in_ranks(
    runs: Sequence[Mapping[str, Any]], *, ranks: int, log: Path, alone_s: float = 0, on_gpus: bool = False
) -> list[int]:
    """The exit codes of `ranks` processes that do the `runs`; `alone_s` after one failed, the others are killed.

    `on_gpus`: each on a GPU of its own, as a launcher has them, without all that is replaced for the CPU.

    A run: {recipe, overrides, others: overrides of all ranks but the first, checkpoint: one to put into its folder
    first, environment: what a launcher has set, kill: {rank, point: of KILLS, call: the number of the call there at
    which the rank is killed}, stops: {rank, step, sends: the signal that it sends itself there, None to sleep for
    ever}, notes: a file for the steps that rank 0 computes, sums: one for its sums of gradients over replicas}.
    """
    of_all = ranks, free_port(), runs, log, on_gpus
    processes = [context.Process(target=rank_of, args=(rank, *of_all)) for rank in range(ranks)]
    for process in processes:
        process.start()
    failed_at = None
    while any(process.is_alive() for process in processes):
        if any(process.exitcode for process in processes):
            failed_at = failed_at or time.monotonic()
            if time.monotonic() >= failed_at + alone_s:
                for process in processes:
                    process.kill()
        time.sleep(0.02)
    return [process.exitcode for process in processes]


def rank_of(
    rank: int, ranks: int, port: int, runs: Sequence[Mapping[str, Any]], log: Path, on_gpus: bool = False
) -> None:
    """One of the processes."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if ranks > 1:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ.update({name: str(number) for name, number in numbers.items()})
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
        if not on_gpus:
            PartialState._prepare_backend, PartialState.set_device = gloo_for_accelerators, on_the_cpu
    logging.basicConfig(format="%(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("hf_qie").setLevel(logging.INFO)
    torch.set_num_threads(1)
    environment = dict(os.environ)
    try:
        for run in runs:
            os.environ.clear()
            os.environ.update(environment | run.get("environment", {}))  # without what the run before has set
            do(run, rank)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # without farewells between ranks


def gloo_for_accelerators(self, cpu=False, *args, **kwargs):
    return prepare_backend(self, cpu, *args, **kwargs) if cpu else ("gloo", DistributedType.MULTI_GPU)


def on_the_cpu(self):
    self.device = torch.device("cpu")


def do(run: Mapping[str, Any], rank: int) -> None:
    """One run; beside what it leaves, each rank leaves a report, with the message of an InputError that ended it.

    {main, argv}: that of another script, with no report.
    """
    if "main" in run:
        run["main"](run["argv"])
        return
    recipe = load_recipe(run["recipe"], run["overrides"] + (run.get("others", []) if rank else []))
    folder = Path(recipe.training["output_dir"])
    if "checkpoint" in run and rank == 0:  # the rank that looks for it
        shutil.copytree(run["checkpoint"], folder / Path(run["checkpoint"]).name)
    if run.get("kill", {}).get("rank") == rank:
        kill_at(folder, run["kill"]["point"], run["kill"]["call"])
    if "notes" in run and rank == 0:
        note_steps(Path(run["notes"]))
    if "sums" in run and rank == 0:
        note_sums(Path(run["sums"]))
    if run.get("stops", {}).get("rank") == rank:
        stop_at(run["stops"]["step"], run["stops"]["sends"], folder / "stopped")
    try:
        report = report_of(run_recipe(recipe))
    except InputError as error:
        report = {"error": str(error)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"rank{rank}.json").write_text(json.dumps(report))


def without_pace(entry: Mapping[str, float]) -> dict[str, float]:
    """A log entry but for what no two runs share."""
    return {
        key: value
        for key, value in entry.items()
        if not key.endswith(("_per_second", "_for_data", "_memory_gb", "_utilisation"))
    }


def kill_at(folder: Path, point: str, call: int) -> None:
    """Be killed at a call that writes, with half of the file written."""
    module, name, pattern = KILLS[point]
    write, calls = getattr(module, name), []

    def write_and_die(*args, **kwargs):
        calls.append(write(*args, **kwargs))
        if len(calls) == call:
            if pattern:
                newest = max(folder.glob(f"checkpoint-*/{pattern}"), key=lambda path: path.stat().st_mtime_ns)
                os.truncate(newest, newest.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return calls[-1]

    setattr(module, name, write_and_die)


def stop_at(step: int, sends: signal.Signals | None, stopped: Path) -> None:
    """Go no further than the loss of a step; the file `stopped` says when."""
    compute_loss = EditTrainer.compute_loss

    def compute_and_stop(self, *args, **kwargs):
        if self.state.global_step + 1 == step:
            stopped.touch()
            stop(sends)
        return compute_loss(self, *args, **kwargs)

    EditTrainer.compute_loss = compute_and_stop


def note_steps(notes: Path) -> None:
    """A line for each step that is computed."""
    compute_loss = EditTrainer.compute_loss

    def compute_and_note(self, *args, **kwargs):
        with notes.open("a") as file:
            file.write(f"{self.state.global_step + 1}\n")
        return compute_loss(self, *args, **kwargs)

    EditTrainer.compute_loss = compute_and_note


def note_sums(sums: Path) -> None:
    """A line with the number of ranks for each sum of gradients over replicas."""
    all_reduce = torch.distributed.all_reduce

    def sum_and_note(tensor, *args, group=None, **kwargs):
        if group is not None:  # FSDP2 alone names one
            with sums.open("a") as file:
                file.write(f"{group.size()}\n")
        return all_reduce(tensor, *args, group=group, **kwargs)

    torch.distributed.all_reduce = sum_and_note


def report_of(trainer) -> dict[str, Any]:
    parameters = list(trainer.model.parameters())
    held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    return {
        "steps": [without_pace(entry) for entry in trainer.state.log_history if "loss" in entry],
        "evaluations": [without_pace(entry) for entry in trainer.state.log_history if "eval_loss" in entry],
        "held": len({id(p) for p in held}),
        "trained": sum(p.requires_grad for p in parameters),
        "numel": sum(p.numel() for p in parameters),
        "numel_here": sum(getattr(p, "_local_tensor", p).numel() for p in parameters),
        "dtypes": sorted({f"{p.requires_grad}: {p.dtype}" for p in parameters}),
    }
