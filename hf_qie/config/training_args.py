"""`training:` holds transformers.TrainingArguments under its own names: our defaults, refusals, checks."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import TypeAdapter

from hf_qie.config.installed import choices, missing_package, pairs, training_arguments
from hf_qie.errors import InputError, Misfit
from hf_qie.runtime.rules import Below1, PathName, Positive, Rule, Section, Weight, show, unknown, validate

DEFAULTS = {
    "output_dir": "outputs/run",
    "learning_rate": 2.0e-5,
    "logging_steps": 10,
    "save_steps": 100,
    "remove_unused_columns": False,
    "logging_nan_inf_filter": False,
}
MAX_STEPS = 512  # unless max_steps or num_train_epochs is given

_RESUME = (
    "a run resumes by itself from the last complete checkpoint in training.output_dir; to start from other weights, "
    "set trainable.lora.init_from, or name their folder as model"
)
# By reason, keys that would not do what they say here, and the values that may be given all the same.
_REFUSED: dict[str, dict[str, tuple[Any, ...]]] = {
    "the top-level seed is the only one": {"seed": (), "data_seed": ()},
    "a recipe is saved and shared; set HF_TOKEN in the environment": {"hub_token": ()},
    "evaluation, checkpoints and logs are counted in steps": dict.fromkeys(
        ("eval_strategy", "save_strategy", "logging_strategy"), ("steps", "no")
    ),
    "the seed and the global batch alone fix the order of the rows": {
        "accelerator_config.split_batches": (False,),
        "accelerator_config.dispatch_batches": (False, None),
        "accelerator_config.even_batches": (True,),
        "accelerator_config.use_seedable_sampler": (True,),
        "auto_find_batch_size": (False,),
        "train_sampling_strategy": ("random",),
        "group_by_length": (),  # the older name of the one before
    },
    "the loader is not accelerate's": {"accelerator_config.non_blocking": (False,)},
    "a resumed run continues at the row where it stopped": {"ignore_data_skip": (False,)},
    _RESUME: {"resume_from_checkpoint": (None,)},
    "such a checkpoint would not count as complete; lower save_steps": {"enable_jit_checkpoint": (False,)},
    "all machines share training.output_dir": {"save_on_each_node": (False,)},
    "the collator needs every column": {"remove_unused_columns": (False,)},
    "every parameter that trains gets a gradient": {"ddp_find_unused_parameters": (False, None)},
    "every metric is a loss": {"greater_is_better": (False, None)},
    "evaluation keeps the loss of each row, and averages at the end": {
        "batch_eval_metrics": (False,),
        "eval_do_concat_batches": (True,),
        "prediction_loss_only": (False,),
    },
    "every block is checkpointed, as torch recommends": dict.fromkeys(
        ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"), (None, {}, {"use_reentrant": False})
    ),
    "evaluation uses the precision of training": {"bf16_full_eval": (False,), "fp16_full_eval": (False,)},
    "a loss that is not finite must show": {"logging_nan_inf_filter": (False,)},
    "DeepSpeed is not available here; training.fsdp shards": {"deepspeed": (None,)},
    "only data is shared out over ranks": {"parallelism_config": (None,)},
    "nothing is pushed while training; afterwards hf_qie/export.py --push_to_hub does it": {"push_to_hub": (False,)},
}
REFUSED = {key: (accepted, reason) for reason, keys in _REFUSED.items() for key, accepted in keys.items()}
# By reason, fields that mean nothing for this model or these scripts: refused where they are not at their default.
_NO_EFFECT = {
    "the loss has no labels and counts no tokens": "average_tokens_across_devices label_smoothing_factor label_names",
    "the log has tokens_per_second": "include_num_input_tokens_seen",
    "evaluation keeps the loss of each row, and averages at the end": "include_for_metrics eval_use_gather_object",
    "it is for language models of transformers": "use_liger_kernel liger_kernel_config use_cache neftune_noise_alpha",
    "the seed and the global batch alone fix the order of the rows": "length_column_name dataloader_in_order",
    "every step has a full batch": "dataloader_drop_last",
    "one loader serves the whole run": "dataloader_persistent_workers",
    "the loader does not use it": "dataloader_multiprocessing_context",
    "no callback here has a state": "restore_callback_states_from_checkpoint",
    "nothing is pushed while training; afterwards hf_qie/export.py --push_to_hub does it": "hub_private_repo "
    "hub_model_id hub_strategy hub_always_push hub_revision",
    "train.py trains, and eval_strategy says whether it evaluates": "do_train do_eval do_predict",
    "the launcher sets it": "local_rank",
}
NO_EFFECT = {key: reason for reason, keys in _NO_EFFECT.items() for key in keys.split()}


# Names of older releases and of other trainers, and what to write in their place.
_ELSEWHERE = {
    "warmup_ratio": "warmup_steps below 1 is a share of all steps: warmup_steps: 0.1",
    "mixed_precision": "set training.bf16: true, or launch with accelerate launch --mixed_precision bf16",
    "logging_dir": "set TENSORBOARD_LOGGING_DIR in the environment",
    "overwrite_output_dir": "a run resumes in its output_dir; name another folder for another run",
    "use_8bit_adam": "set training.optim: adamw_8bit",
    "adafactor": "set training.optim: adafactor",
}
_RENAMED = pairs("""
    evaluation_strategy=eval_strategy no_cuda=use_cpu allow_tf32=tf32 lr=learning_rate optimizer=optim
    lr_scheduler=lr_scheduler_type lr_warmup_steps=warmup_steps checkpointing_steps=save_steps
    checkpoints_total_limit=save_total_limit max_train_steps=max_steps num_epochs=num_train_epochs
    batch_size=per_device_train_batch_size train_batch_size=per_device_train_batch_size
""")

_STEPS = Annotated[float, Rule("a whole number of at least 1", lambda n: n >= 1 and n % 1 == 0)]
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
)


class _FsdpConfig(Section):
    """Keys of fsdp_config, which TrainingArguments does not check; they may begin with `fsdp_`."""

    version: Annotated[int, Rule("1 or 2", (1, 2).__contains__)] = 2  # 1 becomes 2
    state_dict_type: Literal["FULL_STATE_DICT", "SHARDED_STATE_DICT"] = "FULL_STATE_DICT"
    auto_wrap_policy: Literal["TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP"] = "TRANSFORMER_BASED_WRAP"
    transformer_layer_cls_to_wrap: str | list[str] = "QwenImageTransformerBlock"
    min_num_params: int = 0
    reshard_after_forward: bool = True
    cpu_offload: bool = False
    cpu_ram_efficient_loading: bool = True
    activation_checkpointing: bool = False


# Optimizers that take nothing from optim_args, and those that need optim_target_modules
_PLAIN = "adamw_torch adamw_torch_fused adamw_torch_xla adamw_torch_npu_fused adafactor lomo adalomo adamw_bnb_8bit "
_PLAIN += "adamw_8bit paged_adamw_32bit paged_adamw_8bit lion_32bit lion_8bit paged_lion_32bit paged_lion_8bit"
_LOW_RANK = ("galore_", "apollo_")


def training_schema() -> dict[str, Any]:
    """The JSON schema of the section, without what is refused whatever its value."""
    properties = {}
    for key, (kind, default) in training_arguments().items():
        if key in NO_EFFECT or REFUSED.get(key, ((None,),))[0] == ():
            continue
        if key in REFUSED:
            properties[key] = {"enum": list(REFUSED[key][0])}
        else:
            rule = next((rule for rule, keys in _RULES if key in keys.split()), kind)
            properties[key] = TypeAdapter(rule | None).json_schema()
        properties[key]["default"] = DEFAULTS.get(key, default)
    for key in ("optim", "lr_scheduler_type"):
        properties[key] = {"enum": choices(key), "default": properties[key]["default"]}
    fsdp = _FsdpConfig.model_json_schema()["properties"]
    properties["fsdp_config"] = {"properties": fsdp | {f"fsdp_{key}": value for key, value in fsdp.items()}}
    return {"properties": properties, "additionalProperties": False}


# --- the check -------------------------------------------------------------------------------------------------------


def check_training(given: Mapping[str, Any]) -> dict[str, Any]:
    """The `training:` section with our defaults; null is TrainingArguments' own "not set", and is left out.

    Raises:
        Misfit: a key is unknown, refused or without effect, or a value has the wrong type or fits no other.
    """
    known = training_arguments()
    for key, value in _with_nested(given).items():
        at = f"training.{key}"
        accepted, reason = REFUSED.get(key, ((value,), ""))
        if value not in accepted:
            allowed = f"expected {' | '.join(map(show, accepted))}" if accepted else "leave it out"
            raise Misfit(at, f"got {show(value)}, {allowed}: {reason}")
        if key in NO_EFFECT and value not in (None, [], known.get(key, (None, None))[1]):
            raise Misfit(at, f"got {show(value)}, leave it out: {NO_EFFECT[key]}")
        if key not in given:  # of accelerator_config
            continue
        if key not in known:
            raise Misfit(at, _unknown(key, known))
        if isinstance(value, str) and dict in get_args(known[key][0]):
            raise Misfit(at, f"got {show(value)}, expected a mapping; write the keys of the file here")
        if value is not None:
            validate(known[key][0], value, at)
    training = DEFAULTS | {key: value for key, value in given.items() if value is not None}
    for rule, keys in _RULES:
        for key in training.keys() & keys.split():
            validate(rule, training[key], f"training.{key}")
    training["output_dir"] = validate(PathName, training["output_dir"], "training.output_dir")
    _check_steps(training)
    _check_names(training)
    _check_optimizer(training)
    config = {str(key).removeprefix("fsdp_"): value for key, value in training.get("fsdp_config", {}).items()}
    validate(_FsdpConfig, config, "training.fsdp_config")
    return training if "num_train_epochs" in training else {"max_steps": MAX_STEPS} | training


def _unknown(key: Any, known: Iterable[str]) -> str:
    if key in _ELSEWHERE or key in _RENAMED:
        return f"unknown key, {_ELSEWHERE.get(key) or f'it is {_RENAMED[key]}'}"
    told = unknown(key, known)
    return told if "did you mean" in told else "unknown key; expected one of transformers.TrainingArguments"


def _with_nested(given: Mapping[str, Any]) -> dict[str, Any]:
    """`given`, and beside it the keys of accelerator_config by their address."""
    nested = given.get("accelerator_config")
    nested = nested if isinstance(nested, dict) else {}
    known = [key.partition(".")[2] for key in REFUSED if "." in key]
    known += ["gradient_accumulation_kwargs", "use_configured_state"]
    for key in nested:
        if key not in known:
            raise Misfit(f"training.accelerator_config.{key}", unknown(key, known))
    return {**given, **{f"accelerator_config.{key}": value for key, value in nested.items()}}


def _check_steps(training: Mapping[str, Any]) -> None:
    """Check how long the run is, and when it logs and saves."""
    if {"max_steps", "num_train_epochs"} <= training.keys():
        raise Misfit("training.max_steps", "num_train_epochs is given too; leave one of them out")
    log, save = training["logging_steps"], training["save_steps"]
    if save % log and "no" not in (training.get("logging_strategy"), training.get("save_strategy")):
        why = "only there does a resumed run log the same"  # the running loss is not stored
        raise Misfit("training.save_steps", f"got {save}, expected a multiple of logging_steps, which is {log}: {why}")
    every = training.get("eval_steps", log)
    if training.get("load_best_model_at_end") and training.get("eval_strategy") == "steps" and save % every:
        why = "load_best_model_at_end compares checkpoints"
        raise Misfit("training.save_steps", f"got {save}, expected a multiple of eval_steps, which is {every}: {why}")


def _check_names(training: Mapping[str, Any]) -> None:
    """Check names that TrainingArguments and Trainer would look up only once the model is there."""
    for key, name in (*_named(training), ("lr_scheduler_type", training.get("lr_scheduler_type", "linear"))):
        if choices(key) and name not in choices(key):
            raise Misfit(f"training.{key}", f"got {show(name)}: {unknown(name, choices(key), 'name')}")


def _check_optimizer(training: Mapping[str, Any]) -> None:
    """Check what the optimizer and the schedule need beside their names, and what they would not read."""
    name, schedule = training.get("optim", "adamw_torch"), training.get("lr_scheduler_type", "linear")
    low_rank = name.startswith(_LOW_RANK)
    if schedule in ("constant", "constant_with_warmup") and training.get("lr_scheduler_kwargs"):
        raise Misfit("training.lr_scheduler_kwargs", f"without effect on the schedule {schedule}; leave it out")
    if options := training.get("optim_args"):
        if name in _PLAIN.split():
            raise Misfit("training.optim_args", f"without effect on {name}; leave it out")
        if any(part.count("=") != 1 for part in options.split(",")):
            raise Misfit("training.optim_args", f"got {show(options)}, expected name=value,name=value")
    if low_rank != ("optim_target_modules" in training):
        need = f"{name} needs it: the layers, or all-linear" if low_rank else f"{name} does not use it"
        raise Misfit("training.optim_target_modules", need)
    if name.endswith("layerwise") and training.get("gradient_accumulation_steps", 1) > 1:
        raise Misfit("training.gradient_accumulation_steps", f"expected 1, which is all that {name} can do")


def check_packages(training: Mapping[str, Any]) -> None:
    """Raise InputError where what `training` names is not installed on this machine."""
    for key, name in _named(training):
        if package := missing_package(key, name):
            raise InputError(f"training.{key}: {name} needs a package that is not installed: pip install {package}")


def _named(training: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(key, name) of what may need a package of its own."""
    reporters = training.get("report_to", "none")
    reporters = [reporters] if isinstance(reporters, str) else reporters
    return [("optim", training.get("optim", "adamw_torch")), *(("report_to", name) for name in reporters)]
