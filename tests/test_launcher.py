"""What `accelerate launch` says and what the recipe says become one FSDP plugin, or an error."""

import os
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from test_fsdp import BLOCKS, PEOPLES_FLAGS, environment_of
from torch.distributed.fsdp import StateDictType
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from hf_qie.config.launch import fsdp_settings, num_replicas
from hf_qie.config.memory import Memory
from hf_qie.config.recipe import Lora, Recipe, Task, Trainable, load_recipe
from hf_qie.config.training_args import check_training
from hf_qie.errors import InputError
from hf_qie.training.setup import training_arguments

OF_PEOPLE = PEOPLES_FLAGS.format(block=BLOCKS["edit_plus"])


def recipe(dropout: float | None = None, memory: dict | None = None, **training) -> Recipe:
    lora = None if dropout is None else Lora(dropout=dropout)
    return Recipe(
        path=Path("recipe.yaml"),
        tasks={"edit": Task(name="edit", data=("none.jsonl",))},
        trainable=Trainable(lora=lora),
        memory=Memory(**memory or {}),
        training=check_training(training),
    )


def plugin(flags: str, **training) -> FullyShardedDataParallelPlugin:
    """What accelerate is told in the end by these flags and keys of `training`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("FSDP_", "ACCELERATE_"))}
    with patch.dict(os.environ, environment | (environment_of(flags) if flags else {}), clear=True):
        training_arguments(recipe(use_cpu=True, **training), num_rows=0)  # as several ranks join first
        arguments = training_arguments(recipe(use_cpu=True, **training), num_rows=1)
        return FullyShardedDataParallelPlugin(**arguments.fsdp_plugin_args)


def test_flags_as_people_have_them_give_the_plugin_they_name():
    made = plugin(OF_PEOPLE)
    assert made.fsdp_version == 2
    assert made.auto_wrap_policy is transformer_auto_wrap_policy
    assert made.transformer_cls_names_to_wrap == ["QwenImageTransformerBlock"]
    assert made.state_dict_type == StateDictType.SHARDED_STATE_DICT
    assert (made.cpu_ram_efficient_loading, made.reshard_after_forward) == (True, True)
    policy = made.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)


def test_every_flag_of_fsdp2_reaches_the_plugin():
    made = plugin(
        "--use_fsdp --fsdp_version 2 --fsdp_reshard_after_forward false --fsdp_cpu_ram_efficient_loading false "
        "--fsdp_activation_checkpointing true --fsdp_activation_checkpointing_offload true "
        "--fsdp_auto_wrap_policy SIZE_BASED_WRAP --fsdp_min_num_params 77 --fsdp_state_dict_type FULL_STATE_DICT"
    )
    assert (made.reshard_after_forward, made.cpu_ram_efficient_loading) == (False, False)
    assert (made.activation_checkpointing, made.activation_checkpointing_offload) == (True, True)
    assert (made.min_num_params, made.state_dict_type) == (77, StateDictType.FULL_STATE_DICT)


def test_a_key_of_the_recipe_comes_before_the_flag_of_the_launcher():
    config = {"fsdp_state_dict_type": "FULL_STATE_DICT", "cpu_ram_efficient_loading": False}
    made = plugin(OF_PEOPLE, fsdp_config=config)
    assert made.state_dict_type == StateDictType.FULL_STATE_DICT
    assert made.cpu_ram_efficient_loading is False
    assert made.transformer_cls_names_to_wrap == ["QwenImageTransformerBlock"]


def test_the_recipe_alone_turns_it_on_with_one_rank_that_reads_the_checkpoint():
    made = plugin("", fsdp=True)
    assert (made.fsdp_version, made.cpu_ram_efficient_loading) == (2, True)
    assert made.auto_wrap_policy is transformer_auto_wrap_policy


@pytest.mark.parametrize("flags", ["--fsdp_sharding_strategy SHARD_GRAD_OP", "--fsdp_sharding_strategy 2"])
def test_a_strategy_of_version_1_becomes_what_it_means_in_version_2(flags):
    assert plugin(f"--use_fsdp {flags}").reshard_after_forward is False


def test_the_launch_file_and_its_recipe_say_the_same(root):
    path = root / "recipes" / "accelerate" / "fsdp_8_gpus.yaml"
    environment = environment_of(f"--config_file {path}")
    given = load_recipe(root / "recipes" / "full_fsdp.yaml")
    launched, both = fsdp_settings(recipe(), environment), fsdp_settings(given, environment)
    assert launched.items() <= (both | {"activation_checkpointing": False}).items()
    assert (both["version"], both["activation_checkpointing"]) == (2, True)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"


def test_without_fsdp_nothing_of_it_is_set():
    assert fsdp_settings(recipe(), {"FSDP_VERSION": "1"}) is None


FSDP = {"ACCELERATE_USE_FSDP": "true"}
CHECKPOINTING = {"fsdp": True, "fsdp_config": {"activation_checkpointing": True}}


def split(ranks: int = 16, **sizes: int | str) -> dict[str, str]:
    """What the launcher sets for so many ranks with these sizes of ParallelismConfig."""
    variables = {f"PARALLELISM_CONFIG_{name.upper()}_SIZE": str(size) for name, size in sizes.items()}
    return FSDP | variables | {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "WORLD_SIZE": str(ranks)}


MISTAKES = [
    (recipe(fsdp=False), FSDP, "training.fsdp: false, but accelerate launch asks for FSDP"),
    (recipe(fsdp_config={"cpu_offload": True}), {}, "training.fsdp_config: without effect; set training.fsdp: true"),
    (recipe(**CHECKPOINTING, activation_checkpointing=True), {}, "FSDP's own is set too; leave one of them out"),
    (recipe(**CHECKPOINTING, dropout=0.1), {}, "FSDP's own activation checkpointing recomputes with another mask"),
    (
        recipe(fsdp=True, save_only_model=True),
        FSDP | {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
        "training.save_only_model: sharded weights alone are of no use",
    ),
    (
        recipe(),
        FSDP | {"FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"},
        "FSDP's sharding strategy 'HYBRID_SHARD' is not available; use FULL_SHARD",
    ),
    (
        recipe(),
        split(dp_replicate=2),
        "accelerate launch: parallelism_config_dp_replicate_size: got 2, which x 1 (dp_shard_size) is not the number "
        "of ranks, 16; set them to the number of machines and of GPUs in each",
    ),
    (recipe(), split(dp_replicate=2, dp_shard=8, ranks=32), "got 2, which x 8 (dp_shard_size) is not the number of"),
    (recipe(), split(dp_replicate=16), "dp_shard_size: got 1, with which each rank holds the whole model; for that"),
    (recipe(), split(dp_replicate="two"), "dp_replicate_size: got 'two', expected a whole number of at least 1"),
    (recipe(), split(dp_shard=0), "dp_shard_size: got '0', expected a whole number of at least 1"),
    (recipe(), split(tp=2, dp_shard=8), "parallelism_config_tp_size: tensor parallelism is not available"),
    (recipe(), split(cp=2, dp_shard=8), "parallelism_config_cp_size: context parallelism is not available"),
    (recipe(), split(sp=2, dp_shard=8), "parallelism_config_sp_size: sequence parallelism is not available"),
    (
        recipe(),
        split(dp_replicate=2, dp_shard=8) | {"ACCELERATE_USE_FSDP": "false"},
        "parallelism_config_dp_replicate_size: without effect, as without FSDP each rank holds the whole model",
    ),
    (recipe(optim="adamw_bnb_8bit"), FSDP, "training.optim: adamw_bnb_8bit takes no sharded parameters"),
    (recipe(memory={"quantization": "nf4"}), FSDP, "memory.quantization: nf4 cannot be combined with FSDP"),
    (recipe(fsdp=True, memory={"stream_blocks": 40}), {}, "memory.stream_blocks: 40 cannot be combined with FSDP"),
]


def test_sizes_of_data_that_fit_the_ranks_are_taken():
    for ranks, sizes, replicas in ((16, {"dp_replicate": 2, "dp_shard": 8}, 2), (16, {"dp_shard": 16}, 1), (1, {}, 1)):
        environment = split(ranks=ranks, **sizes)
        assert num_replicas(environment) == replicas
        assert fsdp_settings(recipe(), environment) == fsdp_settings(recipe(), FSDP)


@pytest.mark.parametrize(("given", "environment", "message"), MISTAKES)
def test_what_would_be_wrong_or_without_effect_is_refused(given, environment, message):
    with pytest.raises(InputError) as error:
        fsdp_settings(given, environment)
    assert message in str(error.value)


def test_dropout_goes_with_the_checkpointing_that_keeps_its_mask():
    assert fsdp_settings(recipe(fsdp=True, activation_checkpointing=True, dropout=0.1), {})
