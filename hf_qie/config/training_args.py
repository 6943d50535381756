"""`training:` holds transformers.TrainingArguments by its own names: our defaults, what we refuse, and the check."""

from collections.abc import Mapping
from typing import Any

from hf_qie.config.installed import choices, missing_package, training_arguments
from hf_qie.errors import InputError, Misfit
from hf_qie.runtime.settings import PathName, fits, show, take, unknown, words

DEFAULTS = {
    "output_dir": "outputs/run",
    "learning_rate": 2.0e-5,
    "logging_steps": 10,
    "save_steps": 100,
    "remove_unused_columns": False,
    "logging_nan_inf_filter": False,
}
PATHS = {"output_dir"}
MAX_STEPS = 512  # unless max_steps or num_train_epochs is given

# Every field of TrainingArguments is in one of WORKS, REFUSED and NO_EFFECT.
WORKS = set(
    """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    optim_target_modules gradient_accumulation_steps max_grad_norm bf16 fp16 tf32 activation_checkpointing
    activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs torch_compile
    torch_compile_backend torch_compile_mode torch_empty_cache_steps logging_steps logging_first_step
    log_on_each_node log_level log_level_replica disable_tqdm report_to run_name project trackio_space_id
    trackio_bucket_id trackio_static_space_id eval_steps eval_delay per_device_eval_batch_size eval_on_start
    eval_accumulation_steps save_only_model save_steps save_total_limit load_best_model_at_end
    metric_for_best_model full_determinism use_cpu accelerator_config dataloader_num_workers dataloader_pin_memory
    dataloader_prefetch_factor ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
    fsdp fsdp_config debug skip_memory_metrics
    """.split()
)

_STEPS_ONLY = (("steps", "no"), "draws are counted in steps, and no epoch ever ends")
_ONE_ORDER = "the seed and the global batch alone fix the order of the draws"
_ONE_SEED = "the top-level seed is the only one"
_BY_ROW = "evaluation keeps the loss of each row, and averages at the end"
_ONE_ARITHMETIC = "evaluation is done in the arithmetic of training"
_PUSH = "nothing is pushed while training; afterwards hf_qie/export.py --push_to_hub does it"
_RESUME = (
    "a run resumes by itself from the last complete checkpoint in training.output_dir; to start from other weights, "
    "set trainable.lora.init_from, or name their folder as model"
)
# Keys that would work against us: the values that may be given all the same, and the reason.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "seed": ((), _ONE_SEED),
    "data_seed": ((), _ONE_SEED),
    "hub_token": ((), "a recipe is saved and shared; set HF_TOKEN in the environment"),
    "eval_strategy": _STEPS_ONLY,
    "save_strategy": _STEPS_ONLY,
    "logging_strategy": _STEPS_ONLY,
    "accelerator_config.split_batches": ((False,), _ONE_ORDER),
    "accelerator_config.dispatch_batches": ((False, None), _ONE_ORDER),
    "accelerator_config.even_batches": ((True,), _ONE_ORDER),
    "accelerator_config.use_seedable_sampler": ((True,), _ONE_ORDER),
    "accelerator_config.non_blocking": ((False,), "the loader is not accelerate's"),
    "auto_find_batch_size": ((False,), _ONE_ORDER),
    "train_sampling_strategy": (("random",), _ONE_ORDER),
    "group_by_length": ((), _ONE_ORDER),  # the older name of the one before
    "ignore_data_skip": ((False,), "a resumed run goes on at the draw where it stopped"),
    "resume_from_checkpoint": ((None,), _RESUME),
    "enable_jit_checkpoint": ((False,), "such a checkpoint would not count as complete; lower save_steps"),
    "save_on_each_node": ((False,), "all machines share training.output_dir"),
    "remove_unused_columns": ((False,), "the collator needs every column"),
    "ddp_find_unused_parameters": ((False, None), "every parameter that trains gets a gradient"),
    "greater_is_better": ((False, None), "every metric is a loss"),
    "batch_eval_metrics": ((False,), _BY_ROW),
    "eval_do_concat_batches": ((True,), _BY_ROW),
    "prediction_loss_only": ((False,), _BY_ROW),
    "bf16_full_eval": ((False,), _ONE_ARITHMETIC),
    "fp16_full_eval": ((False,), _ONE_ARITHMETIC),
    "logging_nan_inf_filter": ((False,), "a loss that is not finite must show"),
    "deepspeed": ((None,), "DeepSpeed is not available here; training.fsdp shards"),
    "parallelism_config": ((None,), "only data is shared out over ranks"),
    "push_to_hub": ((False,), _PUSH),
}

_NO_LABELS = "the loss has no labels and counts no tokens"
_NO_TEXT_MODEL = "it is for language models of transformers, and this transformer is none"
_OWN_LOADER = "the loader of the draws does not use it"
_SCRIPT = "nothing reads it: train.py trains, and eval_strategy says whether it evaluates"
# Fields that mean nothing for this model or these scripts: refused where they are not at their default.
NO_EFFECT = {
    "average_tokens_across_devices": _NO_LABELS,
    "label_smoothing_factor": _NO_LABELS,
    "label_names": _NO_LABELS,
    "include_num_input_tokens_seen": "the log has tokens_per_second",
    "include_for_metrics": _BY_ROW,
    "eval_use_gather_object": _BY_ROW,
    "use_liger_kernel": _NO_TEXT_MODEL,
    "liger_kernel_config": _NO_TEXT_MODEL,
    "use_cache": _NO_TEXT_MODEL,
    "neftune_noise_alpha": _NO_TEXT_MODEL,
    "length_column_name": _ONE_ORDER,
    "dataloader_drop_last": "every step has a whole batch",
    "dataloader_persistent_workers": "one loader serves the whole run",
    "dataloader_multiprocessing_context": _OWN_LOADER,
    "dataloader_in_order": _ONE_ORDER,
    "restore_callback_states_from_checkpoint": "no callback here has a state",
    "hub_private_repo": _PUSH,
    "hub_model_id": _PUSH,
    "hub_strategy": _PUSH,
    "hub_always_push": _PUSH,
    "hub_revision": _PUSH,
    "do_train": _SCRIPT,
    "do_eval": _SCRIPT,
    "do_predict": _SCRIPT,
    "local_rank": "the launcher says it",
}

# Names of older releases and of other trainers, and what to write in their place.
ELSEWHERE = {
    "warmup_ratio": "warmup_steps below 1 is a share of all steps: warmup_steps: 0.1",
    "mixed_precision": "set training.bf16: true, or launch with accelerate launch --mixed_precision bf16",
    "evaluation_strategy": "it is eval_strategy",
    "logging_dir": "set TENSORBOARD_LOGGING_DIR in the environment",
    "overwrite_output_dir": "a run goes on in its output_dir; name another folder for another run",
    "no_cuda": "it is use_cpu",
    "batch_size": "it is per_device_train_batch_size",
    "train_batch_size": "it is per_device_train_batch_size",
    "lr": "it is learning_rate",
    "lr_scheduler": "it is lr_scheduler_type",
    "lr_warmup_steps": "it is warmup_steps",
    "optimizer": "it is optim",
    "use_8bit_adam": "set training.optim: adamw_8bit",
    "adafactor": "set training.optim: adafactor",
    "checkpointing_steps": "it is save_steps",
    "checkpoints_total_limit": "it is save_total_limit",
    "max_train_steps": "it is max_steps",
    "num_epochs": "it is num_train_epochs",
    "allow_tf32": "it is tf32",
}

# Keys of fsdp_config, which TrainingArguments does not check: values, or the type of a value.
FSDP_CONFIG: dict[str, Any] = {
    "version": (2, 1),  # 1 becomes 2
    "state_dict_type": ("FULL_STATE_DICT", "SHARDED_STATE_DICT"),
    "auto_wrap_policy": ("TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP"),
    "transformer_layer_cls_to_wrap": str | list,
    "min_num_params": int,
    "reshard_after_forward": bool,
    "cpu_offload": bool,
    "cpu_ram_efficient_loading": bool,
    "activation_checkpointing": bool,
}


_ONE_OR_MORE = ("a whole number of at least 1", lambda n: n >= 1 and n % 1 == 0)
_NOT_NEGATIVE = ("a number of at least 0", lambda x: x >= 0)
_BETA = ("a number from 0 to below 1", lambda x: 0 <= x < 1)
# What a number has to be; its type is TrainingArguments' own.
NUMBERS = {
    **dict.fromkeys(("max_steps", "logging_steps", "save_steps", "eval_steps"), _ONE_OR_MORE),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), _ONE_OR_MORE),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps"), _ONE_OR_MORE),
    **dict.fromkeys(("torch_empty_cache_steps", "dataloader_prefetch_factor", "ddp_timeout"), _ONE_OR_MORE),
    **dict.fromkeys(("learning_rate", "warmup_steps", "weight_decay", "adam_epsilon", "max_grad_norm"), _NOT_NEGATIVE),
    **dict.fromkeys(("eval_delay", "dataloader_num_workers"), _NOT_NEGATIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), _BETA),
    "num_train_epochs": ("a number above 0", lambda x: x > 0),
}
LOG_LEVELS = ("detail", "debug", "info", "warning", "error", "critical", "passive")
# Optimizers that take nothing from optim_args, and those that need optim_target_modules
PLAIN_OPTIMIZERS = "adamw_torch adamw_torch_fused adamw_torch_xla adamw_torch_npu_fused adafactor lomo adalomo"
PLAIN_OPTIMIZERS = {*PLAIN_OPTIMIZERS.split(), "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"}
PLAIN_OPTIMIZERS |= {"lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit"}
LOW_RANK = ("galore_", "apollo_")


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
            wanted = f"wanted {' | '.join(map(show, accepted))}" if accepted else "leave it out"
            raise Misfit(at, f"got {show(value)}, {wanted}: {reason}")
        if key in NO_EFFECT and value not in (None, [], known.get(key, (None, None))[1]):
            raise Misfit(at, f"got {show(value)}, leave it out: {NO_EFFECT[key]}")
        if key not in known and key in given:
            raise Misfit(at, _unknown(key, known))
        if key in given and not fits(value, known[key][0]):
            hint = "; write the keys of the file here" if isinstance(value, str) and fits({}, known[key][0]) else ""
            raise Misfit(at, f"got {show(value)}, wanted {words(known[key][0])}{hint}")
    training = DEFAULTS | {key: value for key, value in given.items() if value is not None}
    training |= {key: take(training[key], PathName, f"training.{key}") for key in PATHS & training.keys()}
    _check_steps(training)
    _check_names(training)
    _check_optimizer(training)
    _check_fsdp(training.get("fsdp_config", {}))
    return training if "num_train_epochs" in training else {"max_steps": MAX_STEPS} | training


def _unknown(key: Any, known: Mapping[str, Any]) -> str:
    if key in ELSEWHERE:
        return f"unknown key, {ELSEWHERE[key]}"
    told = unknown(key, known)
    return told if "did you mean" in told else "unknown key; wanted one of transformers.TrainingArguments"


def _with_nested(given: Mapping[str, Any]) -> dict[str, Any]:
    """`given`, and beside it the keys of accelerator_config by their address."""
    nested = given.get("accelerator_config")
    nested = nested if isinstance(nested, dict) else {}
    known = [key.partition(".")[2] for key in REFUSED if "." in key]
    known += ["gradient_accumulation_kwargs", "use_configured_state"]
    for key in nested:
        if key not in known:
            raise Misfit(f"training.accelerator_config.{key}", unknown(key, dict.fromkeys(known)))
    return {**given, **{f"accelerator_config.{key}": value for key, value in nested.items()}}


def _check_steps(training: Mapping[str, Any]) -> None:
    """How long the run is, when it logs and saves, and all other numbers."""
    if {"max_steps", "num_train_epochs"} <= training.keys():
        raise Misfit("training.max_steps", "num_train_epochs is given too; leave one of them out")
    for key, (wanted, right) in NUMBERS.items():
        if key in training and not right(training[key]):
            raise Misfit(f"training.{key}", f"got {training[key]}, wanted {wanted}")
    log, save = training["logging_steps"], training["save_steps"]
    if save % log and "no" not in (training.get("logging_strategy"), training.get("save_strategy")):
        why = "only there does a resumed run log the same"  # the running loss is not stored
        raise Misfit("training.save_steps", f"got {save}, wanted a multiple of logging_steps, which is {log}: {why}")


def _check_names(training: Mapping[str, Any]) -> None:
    """Names that TrainingArguments and Trainer would look up only once the model is there."""
    for key, name in (*_named(training), ("lr_scheduler_type", training.get("lr_scheduler_type", "linear"))):
        if name not in choices(key):
            told = unknown(name, dict.fromkeys(choices(key))).replace("key", "name", 1)
            raise Misfit(f"training.{key}", f"got {show(name)}: {told}")
    for key in ("log_level", "log_level_replica"):
        if training.get(key, "passive") not in LOG_LEVELS:
            raise Misfit(f"training.{key}", f"got {show(training[key])}, wanted {' | '.join(LOG_LEVELS)}")


def _check_optimizer(training: Mapping[str, Any]) -> None:
    """What the optimizer and the schedule need beside their names, and what they would not read."""
    name, schedule = training.get("optim", "adamw_torch"), training.get("lr_scheduler_type", "linear")
    if schedule in ("constant", "constant_with_warmup") and training.get("lr_scheduler_kwargs"):
        raise Misfit("training.lr_scheduler_kwargs", f"without effect on the schedule {schedule}; leave it out")
    if options := training.get("optim_args"):
        if name in PLAIN_OPTIMIZERS:
            raise Misfit("training.optim_args", f"without effect on {name}; leave it out")
        if any(part.count("=") != 1 for part in options.split(",")):
            raise Misfit("training.optim_args", f"got {show(options)}, wanted name=value,name=value")
    if name.startswith(LOW_RANK) != ("optim_target_modules" in training):
        need = (
            f"{name} needs it: the layers, or all-linear" if name.startswith(LOW_RANK) else f"{name} does not use it"
        )
        raise Misfit("training.optim_target_modules", need)
    if name.endswith("layerwise") and training.get("gradient_accumulation_steps", 1) > 1:
        raise Misfit("training.gradient_accumulation_steps", f"wanted 1, which is all that {name} can do")


def check_packages(training: Mapping[str, Any]) -> None:
    """Raise InputError where what `training` names is not installed on this machine."""
    for key, name in _named(training):
        if package := missing_package(key, name):
            raise InputError(f"training.{key}: {name} needs a package that is not here: pip install {package}")


def _named(training: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(key, name) of what may need a package of its own."""
    reporters = training.get("report_to", "none")
    reporters = [reporters] if isinstance(reporters, str) else reporters
    return [("optim", training.get("optim", "adamw_torch")), *(("report_to", name) for name in reporters)]


def _check_fsdp(config: Mapping[str, Any]) -> None:
    """The keys may begin with `fsdp_`, as in accelerate's files."""
    for key, value in config.items():
        at, name = f"training.fsdp_config.{key}", str(key).removeprefix("fsdp_")  # YAML's keys may be numbers
        wanted = FSDP_CONFIG.get(name)
        if wanted is None:
            raise Misfit(at, unknown(name, FSDP_CONFIG))
        if isinstance(wanted, tuple):
            if value not in wanted or isinstance(value, bool):
                raise Misfit(at, f"got {show(value)}, wanted {' | '.join(map(show, wanted))}")
        elif not fits(value, wanted):
            raise Misfit(at, f"got {show(value)}, wanted {words(wanted)}")
