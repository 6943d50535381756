"""What the installed transformers offers: fields of TrainingArguments, names of optimizers, schedules and trackers.

They are read from its source, since importing it takes seconds and a mistake in a recipe has to show at once; where
the source cannot be read so, it is imported.
"""

import ast
import functools
import importlib.util
from dataclasses import MISSING, fields
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Optional, Union, get_args, get_origin, get_type_hints


def pairs(text: str) -> dict[str, str]:
    """`a=b c=d` as a mapping."""
    return dict(pair.split("=") for pair in text.split())


# The module that a name of `optim` or `report_to` needs; the first pattern that fits counts.
_MODULES = {
    "optim": pairs("""
        adamw_torch_[48]bit=torchao adamw_torch_xla=torch_xla adamw_torch_npu_fused=torch_npu
        adamw_anyprecision=torchdistx galore_*=galore_torch apollo_*=apollo_torch grokadamw=grokadamw
        schedule_free_*=schedulefree stable_adamw=optimi *lomo=lomo_optim *_8bit=bitsandbytes *_32bit=bitsandbytes
        ademamix=bitsandbytes rmsprop_bnb=bitsandbytes
    """),
    "report_to": pairs("""
        azure_ml=azureml clearml=clearml codecarbon=codecarbon comet_ml=comet_ml dagshub=dagshub dvclive=dvclive
        flyte=flytekit mlflow=mlflow neptune=neptune swanlab=swanlab tensorboard=tensorboard trackio=trackio
        wandb=wandb
    """),
}
_PIP = {  # where the package is not named like the module
    "torchdistx": "git+https://github.com/pytorch/torchdistx",
    "optimi": "torch-optimi",
    "azureml": "azureml-core",
    "flytekit": "flytekit flytekitplugins-deck-standard",
    "dagshub": "dagshub mlflow",
}

# What reading the source of a later release raises when it is written in another way
UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, AttributeError, LookupError)


@functools.cache
def training_arguments() -> dict[str, tuple[Any, Any]]:
    """(type in YAML, default) of each of TrainingArguments' fields; a default that is computed shows as None."""
    try:
        known = _fields_in_source()
    except UNREADABLE:
        known = _fields_imported()
    return known | {"fsdp": (bool | None, None)}  # annotated as a string, but documented and used as a bool


def _fields_in_source() -> dict[str, tuple[Any, Any]]:
    known, names = {}, _Names(str=str, bool=bool, int=int, float=float, list=list, dict=dict, Optional=Optional)
    for node in (node for node in _class("training_args.py", "TrainingArguments") if isinstance(node, ast.AnnAssign)):
        default = next((k.value for k in getattr(node.value, "keywords", ()) if k.arg == "default"), None)
        try:
            default = ast.literal_eval(default)
        except (TypeError, ValueError):  # none, or computed
            default = None
        kind = _plain(eval(ast.unparse(node.annotation), {}, names))
        if kind is None and node.target.id != "parallelism_config":
            raise ValueError(node.target.id)
        known[node.target.id] = (kind or Any, default)
    return known


class _Names(dict):
    """Names of annotations; all other types mean nothing in YAML."""

    def __missing__(self, key: str) -> Any:
        return Union if key == "Union" else type


def _fields_imported() -> dict[str, tuple[Any, Any]]:
    from transformers import TrainingArguments

    hints = get_type_hints(TrainingArguments)
    own = [field for field in fields(TrainingArguments) if field.init]
    defaults = {field.name: None if field.default is MISSING else field.default for field in own}
    defaults = {name: default.value if isinstance(default, Enum) else default for name, default in defaults.items()}
    return {name: (_plain(hints[name]) or Any, default) for name, default in defaults.items()}


def _plain(annotation: Any) -> Any:
    """Of an annotation the types that YAML has; None where there are none. For a string of JSON YAML has mappings."""
    union = get_origin(annotation) in (Union, UnionType)
    kinds = [get_origin(kind) or kind for kind in (get_args(annotation) if union else [annotation])]
    kinds = [str if isinstance(kind, type) and issubclass(kind, Enum) else kind for kind in kinds]
    kinds = [kind for kind in kinds if kind in (str, bool, int, float, list, dict, NoneType)]
    kinds = [kind for kind in kinds if not (kind is str and dict in kinds)]
    return Union[tuple(kinds)] if set(kinds) - {NoneType} else None  # noqa: UP007


@functools.cache
def choices(key: str) -> list[str]:
    """The names that may be given for `optim`, `lr_scheduler_type` or `report_to`; [] where they cannot be read."""
    try:
        if key == "report_to":
            tree = _source("integrations/integration_utils.py")
            nodes = (node for node in tree.body if isinstance(node, ast.Assign))
            (table,) = (node.value for node in nodes if ast.unparse(node.targets[0]) == "INTEGRATION_TO_CALLBACK")
            return [*map(ast.literal_eval, table.keys), "all", "none"]
        place = ("training_args.py", "OptimizerNames") if key == "optim" else ("trainer_utils.py", "SchedulerType")
        return [node.value.value for node in _class(*place) if isinstance(node, ast.Assign)]
    except UNREADABLE:  # TrainingArguments and Trainer check the names themselves
        return []


@functools.cache
def _source(name: str) -> ast.Module:
    (folder,) = importlib.util.find_spec("transformers").submodule_search_locations
    return ast.parse(Path(folder, name).read_text(encoding="utf-8"))


def _class(file: str, name: str) -> list[ast.stmt]:
    (body,) = (node.body for node in _source(file).body if getattr(node, "name", "") == name)
    return body


def missing_package(key: str, name: str) -> str | None:
    """What pip has to install before `name` works as `optim` or `report_to`; None where it is installed."""
    module = next((module for pattern, module in _MODULES[key].items() if fnmatchcase(name, pattern)), None)
    modules = ("tensorboard", "tensorboardX") if module == "tensorboard" else (module,)  # either will do
    return None if module is None or any(map(importlib.util.find_spec, modules)) else _PIP.get(module, module)
