"""`training:` holds transformers.TrainingArguments under its own names: our defaults, refusals, checks.

Names, types and defaults are read from its source: importing it takes seconds, and a mistake has to show at once.
"""

import ast
import functools
import importlib.util
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import MISSING, fields
from operator import not_
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, Optional, Union, get_args, get_origin, get_type_hints

from pydantic import Field, TypeAdapter

from hf_qie.errors import InputError
from hf_qie.runtime.rules import Below1, PathName, Positive, Section, Weight, rule, show, unknown, validate
from hf_qie.runtime.yaml_io import read_yaml

DEFAULTS = {
    "output_dir": "outputs/run",
    "learning_rate": 2.0e-5,
    "logging_steps": 10,
    "save_steps": 100,
    "remove_unused_columns": False,
    "logging_nan_inf_filter": False,
}
MAX_STEPS = 512  # unless max_steps or num_train_epochs is given

_ORDER = "the seed and the global batch alone fix the order of the rows"
# By reason, keys that would not do what they say: only their default may be given, or with `=` the values after it.
_REFUSED = {
    "the top-level seed is the only one": "seed= data_seed",
    "a recipe is saved and shared; set HF_TOKEN in the environment": "hub_token",
    "evaluation, checkpoints and logs are counted in steps": "eval_strategy=steps|no save_strategy=steps|no "
    "logging_strategy=steps|no",
    _ORDER: "auto_find_batch_size train_sampling_strategy group_by_length length_column_name dataloader_in_order",
    "a resumed run continues at the row where it stopped": "ignore_data_skip",
    "a run resumes by itself from the last complete checkpoint in training.output_dir; to start from other weights, "
    "set trainable.lora.init_from, or name their folder as model": "resume_from_checkpoint",
    "such a checkpoint would not count as complete; lower save_steps": "enable_jit_checkpoint",
    "all machines share training.output_dir": "save_on_each_node",
    "the collator needs every column": "remove_unused_columns=false",
    "every parameter that trains gets a gradient": "ddp_find_unused_parameters=false",
    "evaluation keeps the loss of each row, and averages at the end": "batch_eval_metrics eval_do_concat_batches "
    "prediction_loss_only include_for_metrics eval_use_gather_object",
    "every block is checkpointed, as torch recommends": 'activation_checkpointing_kwargs={}|{"use_reentrant":false} '
    'gradient_checkpointing_kwargs={}|{"use_reentrant":false}',
    "evaluation uses the precision of training": "bf16_full_eval fp16_full_eval",
    "a loss that is not finite must show": "logging_nan_inf_filter=false",
    "DeepSpeed is not available here; training.fsdp shards": "deepspeed",
    "accelerate's launch file has it, as recipes/accelerate/hsdp_2_nodes.yaml": "parallelism_config",
    "nothing is pushed while training; afterwards hf_qie/export.py --push_to_hub does it": "push_to_hub hub_model_id "
    "hub_strategy hub_private_repo hub_always_push hub_revision",
    "the loss has no labels and counts no tokens": "average_tokens_across_devices label_smoothing_factor label_names",
    "the log has tokens_per_second": "include_num_input_tokens_seen",
    "it is for language models of transformers": "use_liger_kernel liger_kernel_config use_cache neftune_noise_alpha",
    "every step has a full batch": "dataloader_drop_last",
    "one loader serves the whole run": "dataloader_persistent_workers",
    "the loader does not use it": "dataloader_multiprocessing_context",
    "no callback here has a state": "restore_callback_states_from_checkpoint",
    "train.py trains, and eval_strategy says whether it evaluates": "do_train do_eval do_predict",
    "the launcher sets it": "local_rank",
}

# Names of older releases and of other trainers, and what to write in their place.
_ELSEWHERE = {
    "warmup_ratio": "warmup_steps below 1 is a share of all steps: warmup_steps: 0.1",
    "mixed_precision": "set training.bf16: true, or launch with accelerate launch --mixed_precision bf16",
    "logging_dir": "set TENSORBOARD_LOGGING_DIR in the environment",
    "overwrite_output_dir": "a run resumes in its output_dir; name another folder for another run",
    "use_8bit_adam": "set training.optim: adamw_8bit",
    "lr": "it is learning_rate",
    "batch_size": "it is per_device_train_batch_size",
    "train_batch_size": "it is per_device_train_batch_size",
    "checkpointing_steps": "it is save_steps",
    "checkpoints_total_limit": "it is save_total_limit",
    "no_cuda": "it is use_cpu",
    "allow_tf32": "it is tf32",
}

_STEPS = Annotated[float, Field(ge=1), rule("a whole number of at least 1", lambda n: n % 1 == 0)]
_PAIRS = Annotated[str, rule("name=value,name=value", lambda text: all(p.count("=") == 1 for p in text.split(",")))]
_Off, _On = (Annotated[bool, rule(f"{word}: {_ORDER}", test)] for word, test in (("false", not_), ("true", bool)))
_LOG_LEVEL = Literal["detail", "debug", "info", "warning", "error", "critical", "passive"]
# What a value has to be beyond its type in TrainingArguments
_RULES = (
    (_STEPS, "max_steps logging_steps save_steps eval_steps torch_empty_cache_steps ddp_timeout"),
    (_STEPS, "gradient_accumulation_steps eval_accumulation_steps dataloader_prefetch_factor"),
    (_STEPS, "per_device_train_batch_size per_device_eval_batch_size"),
    (Weight, "learning_rate warmup_steps weight_decay adam_epsilon max_grad_norm eval_delay dataloader_num_workers"),
    (Below1, "adam_beta1 adam_beta2"),
    (Positive, "num_train_epochs"),
    (_LOG_LEVEL, "log_level log_level_replica"),
    (_PAIRS, "optim_args"),
)


class _FsdpConfig(Section):
    """Keys of fsdp_config, which TrainingArguments does not check; they may begin with `fsdp_`."""

    version: Annotated[int, rule("1 or 2", (1, 2).__contains__)] = 2  # 1 becomes 2
    state_dict_type: Literal["FULL_STATE_DICT", "SHARDED_STATE_DICT"] = "FULL_STATE_DICT"
    auto_wrap_policy: Literal["TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP"] = "TRANSFORMER_BASED_WRAP"
    transformer_layer_cls_to_wrap: str | list[str] | None = None  # the model's own `_no_split_modules`
    min_num_params: int = 0
    reshard_after_forward: bool = True
    cpu_offload: bool = False
    cpu_ram_efficient_loading: bool = True
    activation_checkpointing: bool = False


class _AcceleratorConfig(Section):
    """Keys of accelerator_config; accelerate's loader is not used."""

    split_batches: _Off = False
    dispatch_batches: _Off | None = None
    even_batches: _On = True
    use_seedable_sampler: _On = True
    non_blocking: _Off = False
    gradient_accumulation_kwargs: dict[str, Any] | None = None
    use_configured_state: bool = False


_SECTIONS = {"fsdp_config": _FsdpConfig, "accelerator_config": _AcceleratorConfig}
# Optimizers that take nothing from optim_args
_PLAIN = "adamw_torch adamw_torch_fused adamw_torch_xla adamw_torch_npu_fused adafactor lomo adalomo adamw_bnb_8bit "
_PLAIN += "adamw_8bit paged_adamw_32bit paged_adamw_8bit lion_32bit lion_8bit paged_lion_32bit paged_lion_8bit"


@functools.cache
def refused() -> dict[str, tuple[list[Any], str]]:
    """By key, the values that may be given all the same, and why no others."""
    keys = {}
    for reason, words in _REFUSED.items():
        for key, given, values in (word.partition("=") for word in words.split()):
            default = training_arguments().get(key, (None, None))[1]
            accepted = [read_yaml(value, key) for value in values.split("|")] if given else [default]
            keys[key] = [value for value in accepted if value is not None], reason
    return keys


# --- what the installed release has ----------------------------------------------------------------------------------

_YAML = (str, bool, int, float, list, dict, NoneType)  # what YAML has
_CHOICES = {  # by key, the file and the enum of its names
    "optim": ("training_args.py", "OptimizerNames"),
    "lr_scheduler_type": ("trainer_utils.py", "SchedulerType"),
}
# What reading the source of a later release raises when it is written in another way
_UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, AttributeError, LookupError)


@functools.cache
def training_arguments() -> dict[str, tuple[Any, Any]]:
    """(type in YAML, default) of each of TrainingArguments' fields; a default that is computed shows as None."""
    try:
        known = _fields_in_source()
    except _UNREADABLE:
        known = _fields_imported()
    return known | {"fsdp": (bool | None, None)}  # annotated as a string, but documented and used as a bool


def _fields_in_source() -> dict[str, tuple[Any, Any]]:
    known, names = {}, defaultdict(lambda: type, {k.__name__: k for k in _YAML}, Optional=Optional, Union=Union)
    for node in (node for node in _source("training_args.py", "TrainingArguments") if isinstance(node, ast.AnnAssign)):
        default = next((k.value for k in getattr(node.value, "keywords", ()) if k.arg == "default"), None)
        try:
            default = ast.literal_eval(default)
        except (TypeError, ValueError):  # none, or computed
            default = None
        kind = _kind(eval(ast.unparse(node.annotation), {}, names))
        if kind is Any and node.target.id != "parallelism_config":
            raise ValueError(node.target.id)
        known[node.target.id] = (kind, default)
    return known


def _fields_imported() -> dict[str, tuple[Any, Any]]:
    from transformers import TrainingArguments

    hints = get_type_hints(TrainingArguments)
    own = {field.name: field.default for field in fields(TrainingArguments) if field.init}
    own = {name: None if default is MISSING else getattr(default, "value", default) for name, default in own.items()}
    return {name: (_kind(hints[name]), default) for name, default in own.items()}


def _kind(annotation: Any) -> Any:
    """Of an annotation the types that YAML has, or None, which is "not set"; Any where it has none."""
    kinds = [get_origin(kind) or kind for kind in get_args(Optional[annotation])]  # noqa: UP045
    kinds = [str if isinstance(kind, type) and issubclass(kind, str) else kind for kind in kinds]  # an enum
    kinds = [kind for kind in kinds if kind in _YAML and not (kind is str and dict in kinds)]  # str: JSON of a dict
    return Union[tuple(kinds)] if len(kinds) > 1 else Any  # noqa: UP007


@functools.cache
def choices(key: str) -> list[str]:
    """The names that `optim` or `lr_scheduler_type` may have; [] for other keys, and where they cannot be read."""
    try:
        return [node.value.value for node in _source(*_CHOICES[key]) if isinstance(node, ast.Assign)]
    except _UNREADABLE:  # TrainingArguments checks the names itself
        return []


def _source(file: str, name: str) -> list[ast.stmt]:
    """The body of a class of transformers."""
    (folder,) = importlib.util.find_spec("transformers").submodule_search_locations
    tree = ast.parse(Path(folder, file).read_text(encoding="utf-8"))
    (body,) = (node.body for node in tree.body if getattr(node, "name", "") == name)
    return body


# --- the recipe's section --------------------------------------------------------------------------------------------


def training_schema() -> dict[str, Any]:
    """The JSON schema of the section, without the keys that have to be left out or at their default."""
    properties = {}
    for key, (kind, default) in training_arguments().items():
        accepted, is_refused = refused().get(key, (choices(key), ""))[0], key in refused()
        if is_refused and accepted in ([], [default]):
            continue
        if accepted:
            properties[key] = {"enum": accepted}
        else:
            kind = next((narrower for narrower, keys in _RULES if key in keys.split()), kind)
            properties[key] = TypeAdapter(kind | None).json_schema()
        properties[key]["default"] = DEFAULTS.get(key, default)
    fsdp = _FsdpConfig.model_json_schema()["properties"]
    properties["fsdp_config"] = {"properties": fsdp | {f"fsdp_{key}": value for key, value in fsdp.items()}}
    return {"properties": properties, "additionalProperties": False}


def check_training(given: Mapping[str, Any]) -> dict[str, Any]:
    """The `training:` section with our defaults; null is TrainingArguments' own "not set", and is left out.

    Raises:
        InputError: a key is unknown, refused or without effect, or a value has the wrong type or fits no other.
    """
    for key, value in given.items():
        at, (accepted, reason) = f"training.{key}", refused().get(key, ([value], ""))
        if key not in training_arguments().keys() | refused().keys():
            raise InputError(at, _unknown(key))
        if value is None:
            continue
        if value not in accepted:
            allowed = f"expected {' | '.join(map(show, accepted))}" if accepted else "leave it out"
            raise InputError(at, f"got {show(value)}, {allowed}: {reason}")
        validate(training_arguments()[key][0], value, at)
        if choices(key) and value not in choices(key):
            raise InputError(at, f"got {show(value)}: {unknown(value, choices(key), 'name')}")
        if key in _SECTIONS:
            section = {str(name).removeprefix("fsdp_"): setting for name, setting in value.items()}
            validate(_SECTIONS[key], section, at)
    training = DEFAULTS | {key: value for key, value in given.items() if value is not None}
    for kind, keys in _RULES:
        for key in training.keys() & keys.split():
            validate(kind, training[key], f"training.{key}")
    training["output_dir"] = validate(PathName, training["output_dir"], "training.output_dir")
    _check_steps(training)
    _check_optimizer(training)
    return training if "num_train_epochs" in training else {"max_steps": MAX_STEPS} | training


def _unknown(key: Any) -> str:
    if key in _ELSEWHERE:
        return f"unknown key, {_ELSEWHERE[key]}"
    message = unknown(key, training_arguments())
    return message if "did you mean" in message else "unknown key; expected one of transformers.TrainingArguments"


def _check_steps(training: Mapping[str, Any]) -> None:
    if {"max_steps", "num_train_epochs"} <= training.keys():
        raise InputError("training.max_steps", "num_train_epochs is given too; leave one of them out")
    log, save = training["logging_steps"], training["save_steps"]
    if save % log and "no" not in (training.get("logging_strategy"), training.get("save_strategy")):
        why = "only there does a resumed run log the same"  # the running loss is not stored
        raise InputError(
            "training.save_steps", f"got {save}, expected a multiple of logging_steps, which is {log}: {why}"
        )


def _check_optimizer(training: Mapping[str, Any]) -> None:
    name, schedule = training.get("optim", "adamw_torch"), training.get("lr_scheduler_type", "linear")
    if schedule in ("constant", "constant_with_warmup") and training.get("lr_scheduler_kwargs"):
        raise InputError("training.lr_scheduler_kwargs", f"without effect on the schedule {schedule}; leave it out")
    if name in _PLAIN.split() and training.get("optim_args"):
        raise InputError("training.optim_args", f"without effect on {name}; leave it out")
    if "optim_target_modules" in training and not name.startswith(("galore_", "apollo_")):
        raise InputError("training.optim_target_modules", f"{name} does not use it")
