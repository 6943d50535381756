"""A run that is killed again and again, also while it writes a checkpoint, ends as the run that never was."""

import json
import random
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from embedding_sets import write_recipe
from ranks import in_ranks
from safetensors.torch import load_file

from hf_qie.training.checkpoints import last_checkpoint

LORA = {"lora": {"rank": 4, "alpha": 8, "target_modules": "all-linear", "dropout": 0.2}}
FSDP = "training.fsdp=true", "training.fsdp_config={state_dict_type: SHARDED_STATE_DICT}"
# Where which rank is killed, (point, call, rank), and the checkpoint that the next start goes on from. Eight steps of
# four draws, of which the fifth begins the second pass over the 16 rows; a checkpoint every two steps, in which the
# first rank calls torch.save for its optimizer, its scheduler and its generators, the second one for its generators.
CHAINS = {
    "one rank": [
        ("weights", 1, 0, None),
        ("torch", 5, 0, 2),  # the scheduler of checkpoint 4
        ("torch", 4, 0, 4),  # the optimizer of checkpoint 6
        ("rotation", 1, 0, 6),  # of checkpoint 6
        ("complete", 1, 0, 6),  # of checkpoint 8
    ],
    "two ranks": [("weights", 1, 0, None), ("torch", 2, 1, 2), ("torch", 4, 0, 4), ("complete", 1, 0, 4)],
    "sharded": [("shards", 1, 0, None), ("shards", 2, 1, 2), ("complete", 2, 0, 4), ("rotation", 1, 0, 6)],
}


QUICK = [("one rank", "lora", "learner"), ("two ranks", "full", "learner")]
# FSDP shards no quantised base
ALL = [(chain, kind, "learner") for chain in CHAINS for kind in ("full", "lora", "small")][:-1]
ALL += [("one rank", "small", "qwen_image_21_learner"), ("sharded", "lora", "qwen_image_21_learner")]
SMALL = {"quantization": "nf4", "stream_blocks": 3, "offload_activations": True}


@pytest.mark.parametrize(
    ("chain", "kind", "model"), [pytest.param(*one, marks=() if one in QUICK else pytest.mark.faults) for one in ALL]
)
def test_a_run_that_is_killed_again_and_again_is_one_that_never_was(tiny, tmp_path, chain, kind, model):
    PartialState(cpu=True)  # for what `last_checkpoint` says
    ranks = 1 if chain == "one rank" else 2
    training = {"per_device_train_batch_size": 4 // ranks, "max_steps": 8, "save_total_limit": 2}
    training["use_cpu"] = None if chain == "sharded" else True
    sections = {"trainable": {} if kind == "full" else LORA, "memory": SMALL if kind == "small" else {}}
    training["activation_checkpointing"] = kind == "small"
    recipe = write_recipe(tmp_path, tiny(model), training=training, **sections)
    log = tmp_path / "log"

    def run(name: str, **more) -> dict:
        overrides = [f"training.output_dir={tmp_path / name}", *(FSDP if chain == "sharded" else ())]
        return {"recipe": str(recipe), "overrides": overrides, **more}

    for point, call, rank, whole in CHAINS[chain]:
        kill = {"rank": rank, "point": point, "call": call}
        codes = in_ranks([run("killed", kill=kill)], ranks=ranks, log=log)
        assert codes[rank] == -signal.SIGKILL, log.read_text()
        last = last_checkpoint(tmp_path / "killed")
        assert (last and last.name) == (whole and f"checkpoint-{whole}")
    assert in_ranks([run("killed"), run("straight")], ranks=ranks, log=log) == [0] * ranks, log.read_text()
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert steps(killed) == steps(straight)  # losses, by task too, norms, rates
    (weights,) = (path.relative_to(straight) for path in straight.rglob("*.safetensors") if is_final(path, straight))
    ours, theirs = load_file(killed / weights), load_file(straight / weights)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert f"{tmp_path / 'killed' / 'checkpoint'}-4 is skipped: it has no complete.json" in log.read_text()


# What a kill may hit, and up to which call of it
MOMENTS = {"weights": 2, "torch": 6, "complete": 2, "rotation": 2, "loss": 6}
KILLS, SAVE_STEPS, STEPS = 20, 2, 60


@pytest.mark.faults
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_is_killed_twenty_times_is_one_that_never_was(tiny, tmp_path, ranks, record_property):
    PartialState(cpu=True)
    training = {"per_device_train_batch_size": 4 // ranks, "max_steps": STEPS, "save_total_limit": 2}
    recipe = write_recipe(tmp_path, tiny(), trainable=LORA, training=training | {"save_steps": SAVE_STEPS})
    killed, straight, log, notes = (tmp_path / name for name in ("killed", "straight", "log", "notes"))
    rng, places = random.Random(ranks), []

    def run(folder: Path, **more) -> dict:
        return {"recipe": str(recipe), "overrides": [f"training.output_dir={folder}"], **more}

    for _ in range(KILLS):
        point = rng.choice(sorted(MOMENTS))
        # the second rank writes nothing but its generators
        rank = rng.randrange(ranks) if point in ("torch", "loss") else 0
        kill = {"rank": rank, "point": point, "call": rng.randint(1, 2 if rank else MOMENTS[point])}
        codes = in_ranks([run(killed, kill=kill, notes=str(notes))], ranks=ranks, log=log)
        assert codes[rank] == -signal.SIGKILL, log.read_text()
        places.append(last_checkpoint(killed))
    for last in (run(killed, notes=str(notes)), run(straight)):
        assert in_ranks([last], ranks=ranks, log=log) == [0] * ranks, log.read_text()
    record_property("where the kills were", [place and place.name for place in places])
    assert steps(killed) == steps(straight)  # losses, by task too, norms, rates
    assert len(steps(killed)) == STEPS
    (weights,) = (path.relative_to(straight) for path in straight.rglob("*.safetensors") if is_final(path, straight))
    ours, theirs = load_file(killed / weights), load_file(straight / weights)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    computed = Counter(notes.read_text().split())
    record_property("steps computed again", computed.total() - STEPS)
    assert len(computed) == STEPS
    # a step behind a checkpoint that was not finished is computed again, at most an interval and the step under way
    assert computed.total() - STEPS <= KILLS * (SAVE_STEPS + 1)


def is_final(path: Path, run: Path) -> bool:
    return not path.relative_to(run).parts[0].startswith("checkpoint-")


def steps(run: Path) -> list[dict]:
    return json.loads((run / "rank0.json").read_text())["steps"]
