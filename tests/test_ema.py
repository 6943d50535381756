"""The moving average of what trains: diffusers' schedule, evaluated and saved; weights go on as if it were not there.

Two ranks do all runs of a test in one go; see tests/ranks.py.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from embedding_sets import write_recipe
from ranks import in_ranks
from safetensors.torch import load_file
from training_runs import run, trainer_of
from transformers import TrainerCallback

from hf_qie import export
from hf_qie.config.recipe import load_recipe
from hf_qie.errors import InputError
from hf_qie.training.dcp_reader import averaged_tensors, sharded_tensors
from hf_qie.training.ema import AVERAGE, LAST
from hf_qie.training.model import parameters

LORA = {"lora": {"rank": 4, "alpha": 8, "target_modules": "all-linear"}}
FULL = {"modules": ["transformer_blocks.0", "proj_out"]}
KINDS = {"lora": LORA, "full": FULL}
TASKS = {"edit": {"data": "edit.jsonl", "eval_rows": 3}, "text_to_image": {"data": "none.jsonl", "eval_rows": 5}}
EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "per_device_eval_batch_size": 2}
EMA = "ema={decay: 0.25}"
WEIGHTS = {"full": "transformer/diffusion_pytorch_model.safetensors", "lora": "pytorch_lora_weights.safetensors"}
STATE = "ema/shard-00001-model-00001-of-00001.safetensors"

NUM_ADAPTERS = {"edit_plus": 62, "qwen_image_21": 44}

both_kinds = pytest.mark.parametrize(
    ("family", "kind"), [("edit_plus", "lora"), ("edit_plus", "full"), ("qwen_image_21", "lora")]
)
both_families = pytest.mark.parametrize("family", NUM_ADAPTERS)


@pytest.fixture(autouse=True)
def one_process():
    PartialState(cpu=True)


@pytest.fixture
def family() -> str:
    """The kind of the checkpoint; `both_families` gives others."""
    return "edit_plus"


@pytest.fixture
def kind() -> str:
    """What trains; `both_kinds` gives the other."""
    return "lora"


@pytest.fixture
def recipe(tiny, tmp_path, family, kind) -> Path:
    return write_recipe(tmp_path, tiny(family), tasks=TASKS, trainable=KINDS[kind], training=EVERY_STEP)


def at(folder: Path) -> str:
    return f"training.output_dir={folder}"


def part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def evaluations(trainer) -> list[dict[str, float]]:
    logged = (entry for entry in trainer.state.log_history if "eval_loss" in entry)
    return [{key: value for key, value in entry.items() if key.startswith("eval_loss")} for entry in logged]


class Note(TrainerCallback):
    """What trains after each step, in float64."""

    def __init__(self):
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args, state, control, *, model, **kwargs):
        self.steps.append({name: one.detach().double() for name, one in parameters(model).items()})


# --- what it is ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2])
def test_it_is_the_average_of_the_weights_after_every_step_at_diffusers_decay(recipe, every):
    """In float64, with n / (n + 9) up to the decay: 0 at first, then 2/11, 3/12 and, in place of 4/13, 0.25."""
    accumulated = "training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=2"
    trainer = trainer_of(
        recipe,
        f"ema={{decay: 0.25, every: {every}}}",
        f"training.max_steps={5 * every}",
        "mix.same_shape=2",
        *accumulated,
    )
    trainer.add_callback(note := Note())
    trainer.train()
    assert len(note.steps) == 5 * every
    expected = note.steps[every - 1]
    for decay, weights in zip((2 / 11, 0.25, 0.25, 0.25), note.steps[2 * every - 1 :: every], strict=True):
        expected = {name: decay * expected[name] + (1 - decay) * weights[name] for name in expected}
    with trainer.averaged():
        averages = {name: one.detach().clone() for name, one in parameters(trainer.model).items()}
    for name, average in averages.items():
        torch.testing.assert_close(average.double(), expected[name], atol=1e-7, rtol=1e-6)
    moved = sum(not torch.equal(average.double(), note.steps[-1][name]) for name, average in averages.items())
    assert moved >= 60


@both_kinds
def test_training_with_it_is_training_without_bit_for_bit(recipe, kind, tmp_path):
    """With evaluation of the averages after every step, and images."""
    grid = "sampling={every: 3, rows: 1, num_inference_steps: 2}"
    without = run(recipe, "training.save_steps=4", at(tmp_path / "without"))
    averaged = run(recipe, EMA, grid, "training.save_steps=4")
    ours, theirs = (
        [(entry["loss"], entry["grad_norm"]) for entry in one.state.log_history if "grad_norm" in entry]
        for one in (averaged, without)
    )
    assert ours == theirs
    assert equal(dict(averaged.model.named_parameters()), dict(without.model.named_parameters()))
    assert evaluations(averaged)[0] == evaluations(without)[0], "the first average is that of one step"
    assert evaluations(averaged)[1:] != evaluations(without)[1:]


# --- what it is for --------------------------------------------------------------------------------------------------


@both_kinds
def test_what_is_saved_is_what_was_evaluated(recipe, kind, tmp_path):
    trainer = run(recipe, EMA, "training.eval_steps=4", "training.save_steps=4")
    last = {name: one.detach().clone() for name, one in trainer.ema.trained.items()}
    state = load_file(tmp_path / "run" / "checkpoint-4" / STATE)
    assert equal(part(state, LAST), last)
    assert not equal(part(state, AVERAGE), last)
    for folder in ("run", "run/checkpoint-4"):
        saved = load_file(tmp_path / folder / WEIGHTS[kind])
        names = {"transformer." + name.replace(".default.", "."): name for name in last} if kind == "lora" else {}
        saved = {names.get(name, name): tensor for name, tensor in saved.items()}
        assert equal({name: saved[name] for name in last}, part(state, AVERAGE))
    with torch.no_grad():
        for name, average in part(state, AVERAGE).items():
            trainer.ema.trained[name].copy_(average)
    trainer.ema = None
    assert trainer.evaluate()["eval_loss"] == evaluations(trainer)[0]["eval_loss"]


@both_families
def test_diffusers_loads_the_averages_that_are_exported(recipe, tiny, tmp_path, family):
    run(recipe, EMA, "training.eval_strategy=no", "training.save_steps=4")
    exported = tmp_path / "exported"
    export.main([str(tmp_path / "run" / "checkpoint-4"), "--output", str(exported), "--dtype", "float32"])
    assert "\n- moving average of the weights over the steps (EMA), decay 0.25\n- these weights" in (
        exported / "README.md"
    ).read_text(encoding="utf-8")
    pipeline = DiffusionPipeline.from_pretrained(tiny(family))
    pipeline.load_lora_weights(exported)
    loaded = dict(pipeline.transformer.named_parameters())
    averages = part(load_file(tmp_path / "run" / "checkpoint-4" / STATE), AVERAGE)
    assert len(averages) == NUM_ADAPTERS[family]
    for name, average in averages.items():
        assert torch.equal(loaded[name.replace(".default.", ".default_0.")], average)


def test_weights_are_back_when_an_evaluation_fails(recipe, monkeypatch):
    trainer = run(recipe, EMA, "training.eval_strategy=no", "training.save_steps=4")
    last = {name: one.detach().clone() for name, one in trainer.ema.trained.items()}
    found = []

    def fail(*_, **__):
        with trainer.averaged():  # as what evaluates within an evaluation may ask for
            found.append(equal(trainer.ema.trained, last))
        raise RuntimeError("out of memory")

    monkeypatch.setattr(trainer, "prediction_step", fail)
    averages = [average.clone() for average in trainer.ema.average.shadow_params]
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.evaluate()
    assert found == [False]
    assert equal(trainer.ema.trained, last)
    assert all(map(torch.equal, trainer.ema.average.shadow_params, averages))


@pytest.mark.parametrize("alone", [False, True], ids=["", "weights alone"])
def test_the_best_checkpoint_is_saved_with_its_averages(recipe, tmp_path, alone):
    best = "training.load_best_model_at_end=true", "training.learning_rate=0.3"
    trainer = run(recipe, EMA, *best, f"training.save_only_model={str(alone).lower()}")
    losses = [entry["eval_loss"] for entry in evaluations(trainer)]
    step = 1 + losses.index(min(losses))
    assert step != 4, "the last step should not be the best"
    folder = tmp_path / "run" / f"checkpoint-{step}"
    assert equal(load_file(tmp_path / "run" / WEIGHTS["lora"]), load_file(folder / WEIGHTS["lora"]))
    assert trainer.evaluate()["eval_loss"] == losses[step - 1]
    assert (folder / STATE).exists() is not alone


# --- resuming --------------------------------------------------------------------------------------------------------


@both_kinds
def test_a_resumed_run_is_one_that_was_never_interrupted(recipe, kind, tmp_path):
    settings = "training.max_steps=6", "training.eval_steps=3", "training.save_steps=2"
    every = "ema={decay: 0.25, every: 3}"  # one update before, one after
    straight = run(recipe, every, *settings)
    shutil.copytree(tmp_path / "run" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    resumed = run(recipe, every, *settings, at(tmp_path / "resumed"))
    assert resumed.ema.average.optimization_step == straight.ema.average.optimization_step == 2
    assert evaluations(resumed) == evaluations(straight)
    for file in (WEIGHTS[kind], f"checkpoint-6/{STATE}", f"checkpoint-6/{WEIGHTS[kind]}"):
        assert equal(load_file(tmp_path / "resumed" / file), load_file(tmp_path / "run" / file))


def test_another_average_is_another_run(recipe, tmp_path):
    run(recipe, EMA, "training.max_steps=1", "training.eval_strategy=no")
    for change, message in (
        ("ema.decay=0.5", r"another ema.decay, which .* \(ema.decay was 0.25, is 0.5\); set training.output_dir"),
        ("ema.every=2", r"\(ema.every was 1, is 2\)"),
        ("ema=null", r"\(ema.decay was 0.25, is None; ema.every was 1, is None\)"),
    ):
        with pytest.raises(InputError, match=message):
            run(recipe, EMA, change)
    file = tmp_path / "run" / "checkpoint-1" / "complete.json"
    complete = json.loads(file.read_text())
    del complete["identity"]["ema.decay"], complete["identity"]["ema.every"]  # as before there were averages
    file.write_text(json.dumps(complete))
    with pytest.raises(InputError, match=r"\(ema.decay was None, is 0.25; ema.every was None, is 1\)"):
        run(recipe, EMA)


# --- on two ranks ----------------------------------------------------------------------------------------------------

# after a forward all is left gathered: that must not be the averages that the next step goes on from
SHARDED = (
    "training.fsdp=true",
    "training.fsdp_config={state_dict_type: SHARDED_STATE_DICT, reshard_after_forward: false}",
)
WHOLE = "training.fsdp=true", "training.fsdp_config={state_dict_type: FULL_STATE_DICT}"


def in_two(tmp_path: Path, recipe: Path, runs: dict[str, dict], *, ranks: int = 2) -> None:
    """Runs of six draws a step, each in a folder of its name."""
    size = f"training.per_device_train_batch_size={6 // ranks}"
    todo = [
        {"recipe": str(recipe), **more, "overrides": [EMA, size, at(tmp_path / name), *more["overrides"]]}
        for name, more in runs.items()
    ]
    assert in_ranks(todo, ranks=ranks, log=tmp_path / "log") == [0] * ranks, (tmp_path / "log").read_text()


def report(folder: Path) -> dict:
    return json.loads((folder / "rank0.json").read_text())


def averages(folder: Path) -> dict[str, torch.Tensor]:
    return {name: read() for name, read in averaged_tensors(folder / "checkpoint-4" / "ema").items()}


QUICK = [("edit_plus", "full", SHARDED)]
EVERY = [(family, kind, way) for family in NUM_ADAPTERS for kind in KINDS for way in (SHARDED, WHOLE)]


@pytest.mark.two_rank
@pytest.mark.parametrize(
    ("family", "kind", "way"), [pytest.param(*one, marks=[pytest.mark.soak] * (one not in QUICK)) for one in EVERY]
)
def test_ranks_sharded_or_not_average_alike_and_resume(recipe, tmp_path, kind, way, request):
    settings = json.loads(recipe.read_text())
    settings["mix"], settings["training"] = {"same_shape": 6}, settings["training"] | {"adam_epsilon": 1e-3}
    settings["training"] |= {"save_steps": 3}  # saving after each evaluation would shard what is gathered
    del settings["training"]["use_cpu"]
    recipe.write_text(json.dumps(settings))
    alone = trainer_of(
        recipe, EMA, "training.per_device_train_batch_size=6", "training.use_cpu=true", at(tmp_path / "alone")
    )
    alone.train()
    resumed = {"overrides": way, "checkpoint": str(tmp_path / "sharded" / "checkpoint-3")}
    runs = {"ddp": {"overrides": ["training.use_cpu=true"]}, "sharded": {"overrides": way}, "resumed": resumed}
    in_two(tmp_path, recipe, runs | {"plain": {"overrides": [*way, "ema=null"]}})
    once, of_one = averages(tmp_path / "sharded"), averages(tmp_path / "alone")
    assert of_one.keys() == once.keys()
    for found in (once, averages(tmp_path / "ddp")):
        for name, tensor in of_one.items():  # float32 sums in another order
            torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=0)
    for name in ("sharded", "ddp"):
        ours = [entry["eval_loss"] for entry in report(tmp_path / name)["evaluations"]]
        assert ours == pytest.approx([entry["eval_loss"] for entry in evaluations(alone)], rel=1e-4)
    assert report(tmp_path / "sharded")["steps"] == report(tmp_path / "plain")["steps"]
    assert equal(averages(tmp_path / "resumed"), once)
    if request.node.get_closest_marker("soak"):
        in_two(tmp_path, recipe, {"on three": resumed}, ranks=3)
        for name, tensor in averages(tmp_path / "on three").items():
            torch.testing.assert_close(tensor, once[name], atol=1e-5, rtol=0)
    if (kind, way) == ("full", SHARDED):  # whose checkpoints have no whole transformer
        checkpoint, saved = tmp_path / "sharded" / "checkpoint-4", load_file(tmp_path / "sharded" / WEIGHTS[kind])
        assert equal({name: read() for name, read in sharded_tensors(checkpoint).items()}, saved)
        shutil.rmtree(checkpoint / "ema")
        assert not equal({name: read() for name, read in sharded_tensors(checkpoint).items()}, saved)


# --- what people get wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ema={decay: 1}"], "ema.decay: got 1, expected a number above 0 and below 1"),
        (["ema={decay: 0.0}"], "ema.decay: got 0.0, expected a number above 0 and below 1"),
        (["ema={every: 0}"], "ema.every: got 0, expected an integer of at least 1"),
        (["ema={power: 0.75}"], "ema.power: unknown key"),
        (
            ["ema={}", "training.optim=schedule_free_adamw"],
            "ema: training.optim: schedule_free_adamw averages what trains by itself; leave one of them out",
        ),
    ],
)
def test_what_cannot_be_averaged_is_refused(recipe, overrides, message):
    with pytest.raises(InputError) as error:
        load_recipe(recipe, overrides)
    assert message in str(error.value)
