"""A rank that hangs or dies ends its launch, and a hang leaves the stack traces of every rank."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from embedding_sets import write_recipe
from ports import free_port

LAUNCH = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --mixed_precision no --main_process_port".split()
STOP = """
import os, signal, sys, time
from hf_qie.runtime.cli import run_script
from hf_qie.train import main
from hf_qie.training import callbacks
from hf_qie.training.trainer import EditTrainer

callbacks.PATIENCE = 0.5  # of a timeout of seconds: ranks of a loaded machine come to a step far apart
compute_loss = EditTrainer.compute_loss

def stop(self, *args, **kwargs):
    if os.environ["RANK"] == "1" and self.state.global_step == 3:
        {stop}
    return compute_loss(self, *args, **kwargs)

EditTrainer.compute_loss = stop
run_script(main)
"""


def launch(tmp_path: Path, root: Path, model: Path, stop: str, *, timeout_s: int) -> subprocess.CompletedProcess:
    """Two ranks, of which the last one stops in its fourth step."""
    training = {"per_device_train_batch_size": 2, "ddp_timeout": timeout_s, "max_steps": 8}
    recipe = write_recipe(tmp_path, model, trainable={"lora": {"rank": 4}}, training=training)
    (tmp_path / "stop.py").write_text(STOP.format(stop=stop))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, *LAUNCH, str(free_port()), str(tmp_path / "stop.py"), str(recipe)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.two_rank
def test_a_hang_ends_the_launch_after_ddp_timeout_and_every_rank_leaves_its_stack_traces(tmp_path, root, tiny):
    done = launch(tmp_path, root, tiny(), "time.sleep(1000)", timeout_s=10)
    assert done.returncode != 0
    assert done.stderr.count("Timeout (0:00:05") >= 2, done.stderr  # more where a slow machine opens the sets
    assert "in stop" in done.stderr  # where the last rank hangs
    assert "in backward" in done.stderr or "in reduce" in done.stderr  # where the first one waits for it
    assert (tmp_path / "run" / "checkpoint-2" / "complete.json").exists()


@pytest.mark.two_rank
def test_a_rank_that_dies_ends_the_launch_at_once(tmp_path, root, tiny):
    done = launch(tmp_path, root, tiny(), "os.kill(os.getpid(), signal.SIGKILL)", timeout_s=30)
    assert done.returncode != 0
    assert "Timeout (" not in done.stderr
    assert (tmp_path / "run" / "checkpoint-2" / "complete.json").exists()
