"""What `accelerate launch` sets in the environment, brought together with the recipe.

Trainer takes FSDP's settings from `training.fsdp_config` alone, and accelerate takes its own from the environment: one
would override the other in silence.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from hf_qie.config.recipe import Recipe
from hf_qie.errors import InputError

_REFUSED = {  # by the flag that asks for it
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_DYNAMO_BACKEND": "compiling the whole model",  # training.torch_compile compiles its blocks
}
# accelerate's sizes other than of data, by their names
_OTHER_SIZES = {"tp_size": "tensor", "cp_size": "context", "sp_size": "sequence"}
# optimizers of bitsandbytes, by TrainingArguments' names
_BITSANDBYTES = re.compile(r".*bnb.*|paged_.*|(adamw|lion|ademamix|rmsprop)_(8|32)bit").fullmatch
# FSDP1's names for what FSDP2 calls reshard_after_forward; the other strategies are refused.
_RESHARD = {"true": True, "full_shard": True, "1": True, "false": False, "shard_grad_op": False, "2": False}


def _is_on(flag: str) -> bool:
    return flag.lower() not in ("no", "false", "0", "")


# accelerate's variables by the keys that TrainingArguments has in fsdp_config
_FSDP_VARIABLES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "FSDP_VERSION": ("version", int),
    "FSDP_STATE_DICT_TYPE": ("state_dict_type", str.upper),
    "FSDP_AUTO_WRAP_POLICY": ("auto_wrap_policy", str.upper),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": ("transformer_layer_cls_to_wrap", lambda names: names.split(",")),
    "FSDP_MIN_NUM_PARAMS": ("min_num_params", int),
    "FSDP_OFFLOAD_PARAMS": ("cpu_offload", _is_on),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": ("cpu_ram_efficient_loading", _is_on),
    "FSDP_ACTIVATION_CHECKPOINTING": ("activation_checkpointing", _is_on),
}


def num_started(environment: Mapping[str, str]) -> int:
    """How many processes the launcher started, by the variables that accelerate looks for."""
    names = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    return max(int(environment.get(name, "1")) for name in names)


def check_ranks(environment: Mapping[str, str]) -> None:
    """Raise InputError where the launcher started more processes than have joined: each would do all of it alone."""
    from accelerate import PartialState

    state, started = PartialState(), num_started(environment)
    if state.num_processes != started:
        raise InputError(
            f"accelerate launch: started {started} processes, but each runs alone, as {state.num_processes} process "
            f"on {state.device.type}, and all would write the same files. If there are GPUs, find out why none is "
            "visible (nvidia-smi, CUDA_VISIBLE_DEVICES); else launch with --num_processes 1, or, to train on several "
            "CPUs, set training.use_cpu: true"
        )


def num_replicas(environment: Mapping[str, str]) -> int:
    """Into how many groups the ranks fall, each of which shards the model for itself: accelerate's dp_replicate_size.

    Raises InputError where the launcher's sizes are not those of data, or do not fit the number of ranks.
    """
    if not _is_on(environment.get("ACCELERATE_USE_PARALLELISM_CONFIG", "no")):
        return 1
    sizes, at = {}, "accelerate launch: parallelism_config_"
    for name in ("dp_replicate_size", "dp_shard_size", *_OTHER_SIZES):
        given = environment.get(f"PARALLELISM_CONFIG_{name.upper()}", "1")
        if not given.isdecimal() or given == "0":
            raise InputError(f"{at}{name}: got {given!r}, expected a whole number of at least 1")
        sizes[name] = int(given)
    for name, kind in _OTHER_SIZES.items():
        if sizes[name] > 1:
            raise InputError(
                f"{at}{name}: {kind} parallelism is not available; of ParallelismConfig only dp_replicate_size and "
                "dp_shard_size can be set, as only data is split over ranks"
            )
    (replicas, shards, *_), ranks = sizes.values(), num_started(environment)
    if replicas * shards != ranks:
        raise InputError(
            f"{at}dp_replicate_size: got {replicas}, which x {shards} (dp_shard_size) is not the number of ranks, "
            f"{ranks}; set them to the number of machines and of GPUs in each"
        )
    if shards == 1 < ranks:
        raise InputError(
            f"{at}dp_shard_size: got 1, with which each rank holds the whole model; for that launch with --multi_gpu, "
            "without --use_fsdp and --use_parallelism_config"
        )
    return replicas


def fsdp_settings(recipe: Recipe, environment: Mapping[str, str]) -> dict[str, Any] | None:
    """`training.fsdp_config` in full: the recipe's keys, then the launcher's, then ours; None without FSDP.

    Raises InputError where they contradict each other, or one has no effect or is not available.
    """
    for flag, capability in _REFUSED.items():
        if _is_on(environment.get(flag, "no")):
            raise InputError(f"accelerate launch: asks for {capability}, which is not available yet; leave it out")
    training, launched = recipe.training, _is_on(environment.get("ACCELERATE_USE_FSDP", "no"))
    named = {key.removeprefix("fsdp_"): value for key, value in training.get("fsdp_config", {}).items()}
    if launched and training.get("fsdp") is False:
        raise InputError("training.fsdp: false, but accelerate launch asks for FSDP; leave one of them out")
    replicas = num_replicas(environment)
    if not launched and not training.get("fsdp"):
        if replicas > 1:
            raise InputError(
                "accelerate launch: parallelism_config_dp_replicate_size: without effect, as without FSDP each rank "
                "holds the whole model; set training.fsdp: true, or launch with --use_fsdp --fsdp_version 2"
            )
        if named:
            raise InputError("training.fsdp_config: without effect; set training.fsdp: true, or launch --use_fsdp")
        return None
    for key in ("quantization", "stream_blocks"):
        if value := getattr(recipe.memory, key):
            raise InputError(f"memory.{key}: {value} cannot be combined with FSDP; leave one of them out")
    if _BITSANDBYTES(str(training.get("optim"))):
        raise InputError(f"training.optim: {training['optim']} takes no sharded parameters; leave it out")
    # only rank 0 reads the checkpoint; else the host would hold it once per rank
    settings = {"cpu_ram_efficient_loading": True} | (_launched(environment) if launched else {}) | named
    checkpointing = settings.get("activation_checkpointing", False)
    if checkpointing and (training.get("activation_checkpointing") or training.get("gradient_checkpointing")):
        raise InputError("training.activation_checkpointing: FSDP's own is set too; leave one of them out")
    if checkpointing and recipe.trainable.lora and recipe.trainable.lora.dropout:
        raise InputError(
            "trainable.lora.dropout: FSDP's own activation checkpointing recomputes with another mask; set dropout "
            "to 0, or training.activation_checkpointing: true in place of fsdp_config's"
        )
    if training.get("save_only_model") and settings.get("state_dict_type") == "SHARDED_STATE_DICT":
        raise InputError("training.save_only_model: sharded weights alone are of no use; use FULL_STATE_DICT with it")
    return settings


def _launched(environment: Mapping[str, str]) -> dict[str, Any]:
    """The launcher's settings by the keys of fsdp_config."""
    settings = {key: read(environment[name]) for name, (key, read) in _FSDP_VARIABLES.items() if name in environment}
    ways = [environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower()]
    if settings.get("version", 1) == 1:
        ways.append(environment.get("FSDP_SHARDING_STRATEGY", "FULL_SHARD").lower())
    if refused := [way.upper() for way in ways if way not in _RESHARD]:
        raise InputError(
            f"accelerate launch: FSDP's sharding strategy {refused[0]!r} is not available; use FULL_SHARD, or "
            "SHARD_GRAD_OP, which keeps gathered weights from forward to backward; how to shard within machines alone "
            "is in recipes/accelerate/hsdp_2_nodes.yaml"
        )
    return settings | {"reshard_after_forward": all(_RESHARD[way] for way in ways)}


def fsdp_environment(settings: Mapping[str, Any]) -> dict[str, str]:
    """What accelerate reads from the environment before it sees any settings.

    It chooses by them whether the process group has a backend for CPU tensors, which offloading and full state need.
    """
    return {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_OFFLOAD_PARAMS": str(settings.get("cpu_offload", False)).lower(),
        "FSDP_STATE_DICT_TYPE": settings.get("state_dict_type", "FULL_STATE_DICT"),
        # version 1 says it by its strategy, which version 2 does not read
        "FSDP_RESHARD_AFTER_FORWARD": str(settings.get("reshard_after_forward", True)).lower(),
    }
