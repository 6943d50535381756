"""What sharding sends between two machines in a step, with the released shape: a table in recipes/README.md.

NCCL's rings carry (n - 1) / n of a tensor over each link of n ranks where it is gathered or reduced to shards, and
twice as much where all ranks get the sum (nccl-tests, doc/PERFORMANCE.md). A ring over the ranks of two machines in
their order has one link there and one back.
"""

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from memory_table import ROOT, shape_of
from released import write_released
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_qie.config.recipe import load_recipe
from hf_qie.runtime.ledger import WEIGHTS, Ledger, on_device
from hf_qie.training.cost import blocks_of
from hf_qie.training.forecast import Run, _batch, _optimizer, _shard, _wrap, forecast
from hf_qie.training.model import build_model
from hf_qie.training.objective import Objective

MACHINES, GPUS = 2, 8  # of each machine
RECIPES = {"all": "full_fsdp.yaml", "LoRA": "lora_one_gpu.yaml"}
WAYS = {1: "all 16 GPUs", MACHINES: "the 8 of each machine"}  # by the number of replicas
NETWORK = 100e9 / 8  # bytes a second, each way
GATHERED, REDUCED = 2, 4  # bytes of a parameter: bfloat16 weights, float32 gradients
RING = {"_allgather_base_": 1, "_reduce_scatter_base_": 1, "allreduce_": 2}


def run_of(folder: Path, trains: str, replicas: int) -> Run:
    """A recipe on a checkpoint that has configs alone; what a rank holds depends on the ranks of its replica."""
    recipe = load_recipe(ROOT / "recipes" / RECIPES[trains], [f"model={folder}"])
    fsdp = {"reshard_after_forward": True, "activation_checkpointing": True}
    return Run(recipe=recipe, shape=shape_of(512, 1), num_ranks=MACHINES * GPUS // replicas, fsdp=fsdp)


def sent_bytes(model: nn.Module, replicas: int, micro_batches: int) -> float:
    """Bytes from each machine to the other in a step, by the sizes of the model's parameters.

    A block is gathered forward, and once backward, for what is computed again too; the rest stays from forward to
    backward. Replicas add up their shards of gradients once a step.
    """
    of_blocks = sum(parameter.numel() for parameter in blocks_of(model)[2].parameters())
    parameters = list(model.parameters())
    rest = sum(parameter.numel() for parameter in parameters) - of_blocks
    gradients = REDUCED * sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    if replicas == 1:
        ranks = MACHINES * GPUS
        return micro_batches * (ranks - 1) / ranks * (GATHERED * (2 * of_blocks + rest) + gradients)
    return 2 * (replicas - 1) / replicas * gradients  # by a ring for each GPU of a machine, of its shard


class Collectives(TorchDispatchMode):
    """Adds up what crosses from a machine to the other, of all groups like that of rank 0."""

    def __init__(self):
        super().__init__()
        self.sent = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            leaves = tree_leaves((args, kwargs))
            group = next(one for one in leaves if isinstance(one, torch.ScriptObject))  # and then the operation
            ranks = dist.get_process_group_ranks(dist.ProcessGroup.unbox(group))
            if len({rank // GPUS for rank in ranks}) > 1:
                size = max(one.nbytes for one in leaves if isinstance(one, torch.Tensor))
                groups = MACHINES * GPUS // len(ranks)
                times = RING[func.__name__.partition(".")[0]]
                self.sent += groups * times * (len(ranks) - 1) / len(ranks) * size
        return func(*args, **(kwargs or {}))


@contextmanager
def fake_ranks(replicas: int) -> Iterator[dist.DeviceMesh]:
    """The mesh of all ranks, of which this process is the only real one."""
    sizes = (MACHINES * GPUS,) if replicas == 1 else (replicas, MACHINES * GPUS // replicas)
    dist.init_process_group("fake", rank=0, world_size=MACHINES * GPUS, store=FakeStore())
    try:
        yield init_device_mesh("cpu", sizes, mesh_dim_names=("replicas", "shards")[-len(sizes) :])
    finally:
        dist.destroy_process_group()


def step(run: Run, model: nn.Module, replicas: int, micro_batches: int) -> tuple[float, float]:
    """Bytes sent in a step that is run on tensors without data, and the peak on a device."""
    with (
        fake_ranks(replicas) as mesh,
        Collectives() as counted,
        FakeTensorMode(allow_non_fake_inputs=True),
        Ledger() as ledger,
    ):
        with ledger.making(WEIGHTS):
            model.to_empty(device="cpu")
            _shard(run, model, mesh)
        optimizer = _optimizer(run, model, ledger)
        model.zero_grad()
        _wrap(run, model, ledger)
        objective = Objective(run.recipe, global_batch_size=micro_batches)
        ledger.peaks.clear()
        ledger.start("step")
        counted.sent = 0.0
        for number in range(1, micro_batches + 1):
            if replicas > 1:
                model.set_requires_all_reduce(number == micro_batches)  # as EditTrainer.training_step
            objective.losses(model, _batch(run, model)).mean().backward()
        optimizer.step()
    return counted.sent, on_device(ledger.peaks["step"])


def by_blocks(run: Run, model: nn.Module, replicas: int, micro_batches: int) -> tuple[float, float]:
    """`step` of the whole model: of its inner blocks, which are alike, a few are run."""
    owner, name, blocks, _ = blocks_of(model)
    few = []
    try:
        for kept in (4, 5):
            setattr(owner, name, nn.ModuleList([*blocks[: kept - 1], blocks[-1]]))
            few.append(step(run, copy.deepcopy(model), replicas, micro_batches))
    finally:
        setattr(owner, name, blocks)
    return tuple(fewer + (len(blocks) - 4) * (more - fewer) for fewer, more in zip(*few, strict=True))


def line(folder: Path, trains: str, replicas: int) -> str:
    """A line of the table but for its last cell, the peak."""
    model = build_model(run_of(folder, trains, replicas).recipe, mixed_precision="bf16", empty=True)
    one, two = (sent_bytes(model, replicas, micro_batches) for micro_batches in (1, 2))
    sent = f"{one / 1e9:.1f} | {two / 1e9:.1f} | {one / NETWORK:.2f} | {two / NETWORK:.2f}"
    return f"| {trains} | {WAYS[replicas]} | {sent} | "


def table() -> str:
    """The whole table, as markdown."""
    PartialState(cpu=True)
    head = "| trains | sharded over | GB, 1 micro-batch | GB, 2 micro-batches | seconds, 1 | seconds, 2 | peak, GB |\n"
    lines = [head, "|---" * 7 + "|\n"]
    with tempfile.TemporaryDirectory() as name:
        folder = write_released(Path(name, "model"))
        for trains in RECIPES:
            for replicas in WAYS:
                peak = forecast(run_of(folder, trains, replicas)).peak
                lines.append(f"{line(folder, trains, replicas)}{peak / 1e9:.1f} |\n")
    return "".join(lines)


if __name__ == "__main__":
    print(table())
