"""Point 8: how long a run takes from its start to the first step, resumed at step 10 and at step 1,000,000.

Both go on with the same run of 1,000,010 steps, its plan of all draws included. Nobody waits for a million steps: the
later checkpoint is the earlier one with the step, the schedule and a log of a line every ten steps as they would be
then, marked complete as training marks it.
"""

import json
import shutil
import time
from pathlib import Path
from statistics import median

import torch
from accelerate import PartialState
from embedding_sets import write_recipe
from figures import Figure, at_most
from transformers import TrainerCallback

from hf_qie.config.recipe import load_recipe
from hf_qie.demo.tiny import tiny_checkpoint
from hf_qie.training.checkpoints import COMPLETE, mark_complete
from hf_qie.training.sets import open_sets
from hf_qie.training.setup import build_trainer

EARLY, LATE, LOGGING_STEPS, ROUNDS = 10, 1_000_000, 10, 3
STEPS = LATE + 10


class FirstSave(TrainerCallback):
    """Ends the run once there is a checkpoint."""

    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop = True


class FirstStep(TrainerCallback):
    """Ends the run after its first step, and notes when that was."""

    def on_step_end(self, args, state, control, **kwargs):
        self.at = time.perf_counter()
        control.should_training_stop = True


def forge(early: Path, late: Path) -> None:
    """The checkpoint of the later step."""
    shutil.copytree(early, late)
    complete = json.loads((late / COMPLETE).read_text())
    (late / COMPLETE).unlink()
    state = json.loads((late / "trainer_state.json").read_text())
    line = state["log_history"][-1]
    steps = range(LOGGING_STEPS, LATE + 1, LOGGING_STEPS)
    state |= {"global_step": LATE, "epoch": LATE / STEPS}
    state["log_history"] = [line | {"step": step, "epoch": step / STEPS} for step in steps]
    (late / "trainer_state.json").write_text(json.dumps(state, indent=2))
    schedule = torch.load(late / "scheduler.pt", weights_only=True)
    torch.save(schedule | {"last_epoch": LATE, "_step_count": LATE + 1}, late / "scheduler.pt")
    mark_complete(late, step=LATE, ranks=1, identity=complete["identity"], settings=complete["settings"])


def first_step(recipe: Path, checkpoint: Path, *, step: int) -> float:
    """Seconds from the start of the run to the end of its first step after `step`."""
    started, loaded = time.perf_counter(), load_recipe(recipe)
    trainer, found = build_trainer(loaded, open_sets(loaded))
    assert found == checkpoint
    clock = FirstStep()
    trainer.add_callback(clock)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == step + 1
    return clock.at - started


def measure(folder: Path) -> list[Figure]:
    """Seconds at both steps, by turns."""
    PartialState(cpu=True)
    training = {"max_steps": STEPS, "logging_steps": LOGGING_STEPS, "save_steps": EARLY, "report_to": "none"}
    recipe = write_recipe(folder, tiny_checkpoint(folder / "model"), training=training)
    loaded = load_recipe(recipe)
    trainer, _ = build_trainer(loaded, open_sets(loaded))
    trainer.add_callback(FirstSave())
    trainer.train()
    run, aside = folder / "run", folder / "aside"
    aside.mkdir()
    early, late = run / f"checkpoint-{EARLY}", run / f"checkpoint-{LATE}"
    forge(early, aside / late.name)
    seconds = {EARLY: [], LATE: []}
    for _ in range(ROUNDS):
        seconds[EARLY].append(first_step(recipe, early, step=EARLY))
        shutil.move(aside / late.name, late)
        seconds[LATE].append(first_step(recipe, late, step=LATE))
        shutil.move(late, aside / late.name)
    at_10, at_million = median(seconds[EARLY]), median(seconds[LATE])
    what = "from start to the first step, resumed at step"
    return [
        Figure(point="8", what=f"{what} {EARLY}, of {STEPS:,} planned", ours=at_10, unit="s"),
        Figure(point="8", what=f"{what} {LATE:,}", ours=at_million, unit="s"),
        at_most(2, ratio=False, point="8", what="more at the later one", ours=at_million - at_10, unit="s"),
    ]
