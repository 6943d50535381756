"""What the installed transformers offers, read from its source.

To import it takes seconds, and a mistake in a recipe has to show at once.
"""

import ast
import functools
import importlib.util
import re
from fnmatch import fnmatchcase
from pathlib import Path
from types import NoneType
from typing import Any, Union

# What pip installs for a name of training.optim, by the module that it leaves. The first pattern that fits counts.
OPTIMIZERS = {
    "adamw_torch_[48]bit": ("torchao", "torchao"),
    "adamw_torch_xla": ("torch_xla", "torch_xla"),
    "adamw_torch_npu_fused": ("torch_npu", "torch_npu"),
    "adamw_anyprecision": ("torchdistx", "git+https://github.com/pytorch/torchdistx"),
    "galore_*": ("galore_torch", "galore-torch"),
    "apollo_*": ("apollo_torch", "apollo-torch"),
    "grokadamw": ("grokadamw", "grokadamw"),
    "schedule_free_*": ("schedulefree", "schedulefree"),
    "stable_adamw": ("optimi", "torch-optimi"),
    "*lomo": ("lomo_optim", "lomo-optim"),
    "*_8bit": ("bitsandbytes", "bitsandbytes"),
    "*_32bit": ("bitsandbytes", "bitsandbytes"),
    "ademamix": ("bitsandbytes", "bitsandbytes"),
    "rmsprop_bnb": ("bitsandbytes", "bitsandbytes"),
}
# The same for a name of training.report_to; any of several modules will do.
REPORTERS = {
    "azure_ml": ("azureml", "azureml-core"),
    "comet_ml": ("comet_ml", "comet_ml"),
    "mlflow": ("mlflow", "mlflow"),
    "neptune": ("neptune", "neptune"),
    "tensorboard": ("tensorboard tensorboardX", "tensorboard"),
    "trackio": ("trackio", "trackio"),
    "wandb": ("wandb", "wandb"),
    "codecarbon": ("codecarbon", "codecarbon"),
    "clearml": ("clearml", "clearml"),
    "dagshub": ("dagshub", "dagshub mlflow"),
    "flyte": ("flytekit", "flytekit flytekitplugins-deck-standard"),
    "dvclive": ("dvclive", "dvclive"),
    "swanlab": ("swanlab", "swanlab"),
}


@functools.cache
def source(name: str) -> ast.Module:
    """The source of a file of transformers."""
    (folder,) = importlib.util.find_spec("transformers").submodule_search_locations
    return ast.parse(Path(folder, name).read_text(encoding="utf-8"))


@functools.cache
def training_arguments() -> dict[str, tuple[Any, Any]]:
    """(annotation, default) of each of TrainingArguments' fields; of the annotation the plain types, at their outside.

    A default that is computed shows as None.
    """
    known = {}
    for node in (node for node in _class("training_args.py", "TrainingArguments") if isinstance(node, ast.AnnAssign)):
        default = next((k.value for k in getattr(node.value, "keywords", ()) if k.arg == "default"), None)
        if isinstance(default, ast.UnaryOp) and isinstance(default.op, ast.USub):
            default = ast.Constant(-default.operand.value)
        known[node.target.id] = (_kind(node), default.value if isinstance(default, ast.Constant) else None)
    known["fsdp"] = (bool | None, None)  # annotated as a string, but documented and used as a bool
    return known


def _kind(node: ast.AnnAssign) -> Any:
    """Mappings may be given as a string of JSON there, or as a file; a recipe has YAML for them."""
    kinds = {"str": str, "bool": bool, "int": int, "float": float, "None": NoneType, "list": list, "dict": dict}
    names = re.sub(r"\[[^\[\]]*\]", "", ast.unparse(node.annotation)).split(" | ")
    names = [name for name in names if name in kinds and not (name == "str" and "dict" in names)]
    return Union[tuple(kinds[name] for name in names)]  # noqa: UP007


def _class(file: str, name: str) -> list[ast.stmt]:
    (body,) = (node.body for node in source(file).body if getattr(node, "name", "") == name)
    return body


@functools.cache
def choices(key: str) -> list[str]:
    """The names that may be given for `optim`, `lr_scheduler_type` or `report_to`."""
    if key == "report_to":
        tree = source("integrations/integration_utils.py")
        tables = [node for node in tree.body if isinstance(node, ast.Assign)]
        (table,) = (node.value for node in tables if node.targets[0].id == "INTEGRATION_TO_CALLBACK")
        return [*ast.literal_eval(ast.List(table.keys, ast.Load())), "all", "none"]
    where = {
        "optim": ("training_args.py", "OptimizerNames"),
        "lr_scheduler_type": ("trainer_utils.py", "SchedulerType"),
    }
    return [node.value.value for node in _class(*where[key]) if isinstance(node, ast.Assign)]


def missing_package(key: str, name: str) -> str | None:
    """What pip has to install before `name` works as `optim` or `report_to`; None where it is there."""
    known = OPTIMIZERS if key == "optim" else REPORTERS
    modules, package = next((known[pattern] for pattern in known if fnmatchcase(name, pattern)), ("", ""))
    there = not modules or any(importlib.util.find_spec(module) for module in modules.split())
    return None if there else package
