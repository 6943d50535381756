"""`training:` holds transformers.TrainingArguments by its own names: our defaults, what we refuse, and the check.

Importing TrainingArguments takes seconds, so its fields are read from the source, and a mistake shows at once.
"""

import ast
import functools
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Union

from hf_qie.settings import Misfit, PathName, fits, show, take, unknown, words

DEFAULTS = {
    "output_dir": "outputs/run",
    "learning_rate": 2.0e-5,
    "logging_steps": 10,
    "save_steps": 100,
    "remove_unused_columns": False,
    "logging_nan_inf_filter": False,
}
PATHS = {"output_dir", "resume_from_checkpoint"}
MAX_STEPS = 512  # unless max_steps or num_train_epochs is given

_STEPS_ONLY = (("steps", "no"), "draws are counted in steps, and no epoch ever ends")
_ONE_ORDER = "the seed and the global batch alone fix the order of the draws"
_ONE_SEED = "the top-level seed is the only one"
_BY_ROW = "evaluation keeps the loss of each row, and averages at the end"
_ONE_ARITHMETIC = "evaluation is done in the arithmetic of training"
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
    "auto_find_batch_size": ((False,), _ONE_ORDER),
    "train_sampling_strategy": (("random",), _ONE_ORDER),
    "group_by_length": ((), _ONE_ORDER),  # the older name of the one before
    "ignore_data_skip": ((False,), "a resumed run goes on at the draw where it stopped"),
    "remove_unused_columns": ((False,), "the collator needs every column"),
    "ddp_find_unused_parameters": ((False, None), "every parameter that trains gets a gradient"),
    "greater_is_better": ((False, None), "every metric is a loss"),
    "batch_eval_metrics": ((False,), _BY_ROW),
    "eval_do_concat_batches": ((True,), _BY_ROW),
    "bf16_full_eval": ((False,), _ONE_ARITHMETIC),
    "fp16_full_eval": ((False,), _ONE_ARITHMETIC),
    "logging_nan_inf_filter": ((False,), "a loss that is not finite must show"),
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


@functools.cache
def training_arguments() -> dict[str, tuple[Any, Any]]:
    """(annotation, default) of each of TrainingArguments' fields; of the annotation the plain types, at their outside.

    A default that is computed shows as None.
    """
    (folder,) = importlib.util.find_spec("transformers").submodule_search_locations
    tree = ast.parse(Path(folder, "training_args.py").read_text(encoding="utf-8"))
    (body,) = (node.body for node in tree.body if getattr(node, "name", "") == "TrainingArguments")
    kinds = {"str": str, "bool": bool, "int": int, "float": float, "None": NoneType, "list": list, "dict": dict}
    known = {}
    for node in (node for node in body if isinstance(node, ast.AnnAssign)):
        names = re.sub(r"\[[^\[\]]*\]", "", ast.unparse(node.annotation)).split(" | ")
        default = next((k.value for k in getattr(node.value, "keywords", ()) if k.arg == "default"), None)
        kind = Union[tuple(kinds[name] for name in names if name in kinds)]  # noqa: UP007
        known[node.target.id] = (kind, default.value if isinstance(default, ast.Constant) else None)
    known["fsdp"] = (bool | None, None)  # annotated as a string, but documented and used as a bool
    return known


def check_training(given: Mapping[str, Any]) -> dict[str, Any]:
    """The `training:` section with our defaults; null is TrainingArguments' own "not set", and is left out.

    Raises:
        Misfit: a key is unknown or refused, or a value has the wrong type or fits no other.
    """
    known = training_arguments()
    for key, value in _with_nested(given).items():
        at = f"training.{key}"
        accepted, reason = REFUSED.get(key, ((value,), ""))
        if value not in accepted:
            wanted = f"wanted {' | '.join(map(show, accepted))}" if accepted else "leave it out"
            raise Misfit(at, f"got {show(value)}, {wanted}: {reason}")
        if key not in known and key in given:
            raise Misfit(at, unknown(key, known))
        if key in given and not fits(value, known[key][0]):
            raise Misfit(at, f"got {show(value)}, wanted {words(known[key][0])}")
    training = DEFAULTS | {key: value for key, value in given.items() if value is not None}
    training |= {key: take(training[key], PathName, f"training.{key}") for key in PATHS & training.keys()}
    _check_steps(training)
    _check_fsdp(training.get("fsdp_config", {}))
    return training if "num_train_epochs" in training else {"max_steps": MAX_STEPS} | training


def _with_nested(given: Mapping[str, Any]) -> dict[str, Any]:
    nested = given.get("accelerator_config")
    nested = nested if isinstance(nested, dict) else {}
    return {**given, **{f"accelerator_config.{key}": value for key, value in nested.items()}}


def _check_steps(training: Mapping[str, Any]) -> None:
    """How long the run is, and when it logs and saves."""
    if {"max_steps", "num_train_epochs"} <= training.keys():
        raise Misfit("training.max_steps", "num_train_epochs is given too; leave one of them out")
    if training.get("num_train_epochs", 1) <= 0:
        raise Misfit("training.num_train_epochs", f"got {training['num_train_epochs']}, wanted a number above 0")
    for key in ("max_steps", "logging_steps", "save_steps", "eval_steps"):
        steps = training.get(key, 1)
        if steps < 1 or steps % 1:
            raise Misfit(f"training.{key}", f"got {steps}, wanted a whole number of at least 1")
    log, save = training["logging_steps"], training["save_steps"]
    if save % log and "no" not in (training.get("logging_strategy"), training.get("save_strategy")):
        why = "only there does a resumed run log the same"  # the running loss is not stored
        raise Misfit("training.save_steps", f"got {save}, wanted a multiple of logging_steps, which is {log}: {why}")


def _check_fsdp(config: Any) -> None:
    """The keys may begin with `fsdp_`, as in accelerate's files."""
    if not isinstance(config, dict):
        raise Misfit("training.fsdp_config", f"got {show(config)}, wanted a mapping; write the keys of the file here")
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
