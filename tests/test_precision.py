"""In what a run computes where nobody says it, and schedules that are tried before a model is loaded."""

import pytest
import torch
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from embedding_sets import write_recipe

from hf_qie.config.recipe import load_recipe
from hf_qie.errors import InputError
from hf_qie.runtime.device import log_once
from hf_qie.training import setup
from hf_qie.training.sets import open_sets
from hf_qie.training.setup import build_trainer, choose_precision, training_arguments

PLAIN = ["--cpu", "hf_qie/train.py"]


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    PartialState(cpu=True)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)


@pytest.fixture
def settled(tmp_path, monkeypatch, caplog):
    """`settled(device, units, launch, training)` -> (precision, log) of a device of that kind.

    Only the question whether there are units is answered for the library.
    """
    caplog.set_level("INFO")

    def settle_on(device: str, units: bool, launch: list[str], **training) -> tuple[str, list[str]]:
        parsed, _, _ = _validate_launch_command(launch_command_parser().parse_args(launch))
        _, environment = prepare_simple_launcher_cmd_env(parsed)
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", environment["ACCELERATE_MIXED_PRECISION"])
        task = {"edit": {"data": "none.jsonl"}}
        (tmp_path / "recipe.yaml").write_text(str({"tasks": task, "training": {"use_cpu": True, **training}}))
        recipe = load_recipe(tmp_path / "recipe.yaml", ["training.use_cpu=true"])
        monkeypatch.setattr(setup, "computes_bfloat16", lambda _: units)
        monkeypatch.setattr(setup, "choose_precision", lambda *_: None)
        arguments = training_arguments(recipe, num_rows=1)
        arguments.__dict__["_setup_devices"] = torch.device(device)  # what `arguments.device` gives
        caplog.clear()
        log_once.cache_clear()
        choose_precision(arguments, recipe.training)
        return arguments.mixed_precision, caplog.messages

    return settle_on


@pytest.mark.parametrize(
    ("device", "units", "found", "why"),
    [
        ("cuda", True, "bf16", "this cuda device has units for bfloat16; training.bf16: false gives float32"),
        ("cuda", False, "no", "this cuda device is not an accelerator with units for bfloat16; see training.bf16"),
        ("cpu", True, "no", "this cpu device is not an accelerator with units for bfloat16; see training.bf16"),
    ],
)
def test_an_accelerator_with_units_for_bfloat16_trains_in_it_and_the_log_says_why(settled, device, units, found, why):
    chosen, (message,) = settled(device, units, PLAIN)
    assert chosen == found
    assert why in message
    assert ("training: bfloat16, as" if found == "bf16" else "training: float32, as") in message


@pytest.mark.parametrize(
    ("launch", "training", "found"),
    [
        ([], {"bf16": False}, "no"),
        ([], {"fp16": True}, "fp16"),
        (["--mixed_precision", "fp16"], {}, "fp16"),
        (["--mixed_precision", "bf16"], {}, "bf16"),
        (["--mixed_precision", "bf16"], {"bf16": False}, "no"),  # the recipe goes first
        (["--mixed_precision", "no"], {}, "bf16"),  # accelerate says the same where nothing was said
    ],
)
def test_a_precision_that_is_named_is_obeyed(settled, launch, training, found):
    chosen, _ = settled("cuda", True, [*launch, *PLAIN], **training)
    assert chosen == found


@pytest.mark.parametrize("family", ["edit_plus", "qwen_image_21"])
def test_the_precision_chosen_is_that_of_model_and_arithmetic(tiny, tmp_path, monkeypatch, family):
    """On a CPU that is taken for an accelerator."""
    trainable = {"lora": {"rank": 4, "target_modules": "attention"}}
    recipe = load_recipe(write_recipe(tmp_path, tiny(family), trainable=trainable, training={"save_strategy": "no"}))

    def chosen(arguments, given):
        with monkeypatch.context() as patch:
            patch.setitem(arguments.__dict__, "_setup_devices", torch.device("cuda"))
            patch.setattr(setup, "computes_bfloat16", lambda _: True)
            choose_precision(arguments, given)

    monkeypatch.setattr(setup, "choose_precision", chosen)
    trainer, _ = build_trainer(recipe, open_sets(recipe))
    trainer.train()
    assert trainer.accelerator.mixed_precision == "bf16"
    assert trainer.model.get_base_model().transformer_blocks[0].attn.to_q.base_layer.weight.dtype == torch.bfloat16
    assert trainer.record["arithmetic"] == "bfloat16"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["lr_scheduler_type=warmup_stable_decay"], "missing 1 required positional argument: 'num_decay_steps'"),
        (["lr_scheduler_type=cosine_with_min_lr"], "One of min_lr or min_lr_rate should be set"),
        (
            ["lr_scheduler_type=cosine", "lr_scheduler_kwargs={num_cycle: 2}"],
            "unexpected keyword argument 'num_cycle'",
        ),
        (["lr_scheduler_type=cosine", "lr_scheduler_kwargs={num_cycles: two}"], "could not convert string to float"),
    ],
)
def test_a_schedule_that_cannot_be_built_is_an_error_before_the_model(tiny, tmp_path, overrides, told):
    recipe = load_recipe(write_recipe(tmp_path, tiny()), [f"training.{override}" for override in overrides])
    with pytest.raises(InputError) as caught:
        training_arguments(recipe, num_rows=1)
    name = recipe.training["lr_scheduler_type"]
    assert str(caught.value).startswith(f"training.lr_scheduler_kwargs: do not fit the schedule {name}: ")
    assert told in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["lr_scheduler_type=inverse_sqrt", "warmup_steps=0.5"],
        ["lr_scheduler_type=warmup_stable_decay", "lr_scheduler_kwargs={num_decay_steps: 2}"],
        ["lr_scheduler_type=cosine_with_min_lr", "lr_scheduler_kwargs={min_lr: 1e-5}"],
        ["lr_scheduler_type=reduce_lr_on_plateau", "eval_strategy=steps", "lr_scheduler_kwargs={patience: 2}"],
        ["lr_scheduler_type=constant_with_warmup"],
    ],
)
def test_a_schedule_with_what_it_takes_is_built(tiny, tmp_path, overrides):
    overrides = ["tasks.edit.eval_rows=2", *(f"training.{override}" for override in overrides)]
    assert training_arguments(load_recipe(write_recipe(tmp_path, tiny()), overrides), num_rows=1)
