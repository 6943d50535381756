"""The recipe: one YAML file and dotted overrides become a frozen `Recipe`.

This module is the only reader of YAML, and it imports nothing heavy: a mistake in a recipe shows in a fraction of a
second, before torch is loaded. Each section is a dataclass whose annotations are the rules: `_take` walks them, so a
new key is one line here. `training:` holds `transformers.TrainingArguments` by its own names.
"""

import ast
import difflib
import functools
import importlib.util
import json
import math
import os
import re
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

import yaml


class InputError(ValueError):
    """Something the user wrote is wrong: says where, what came, what was wanted and what to do."""


class _Refused(Exception):
    """(address, message): `load_recipe` adds the file or the override that the value came from."""


# A rule of one value: the type, what is wanted in words, and the test.
Name = Annotated[str, "a string that is not blank", str.strip]
Seed = Annotated[int, "an integer from 0 to 4294967295", lambda n: 0 <= n < 2**32]
Whole = Annotated[int, "an integer of at least 0", lambda n: n >= 0]
Count = Annotated[int, "an integer of at least 1", lambda n: n >= 1]
Side = Annotated[int, "an integer of at least 32", lambda px: px >= 32]
Positive = Annotated[float, "a number above 0", lambda x: x > 0]
Weight = Annotated[float, "a number of at least 0", lambda x: x >= 0]
Share = Annotated[float, "a number from 0 to 1", lambda x: 0 <= x <= 1]
Dropout = Annotated[float, "a number from 0 to below 1", lambda x: 0 <= x < 1]
ModeScale = Annotated[float, "a number from -1 to 1.75", lambda x: -1 <= x <= 1.75]  # outside, sigma leaves (0, 1)
Shard = Annotated[tuple[int, ...], "[i, n] with 0 <= i < n", lambda s: len(s) == 2 and 0 <= s[0] < s[1]]
Names = Annotated[tuple[Name, ...], "a list of at least one name", len]
TaskName = Annotated[
    str,
    "a name of letters, digits and _ that does not start with a digit",
    lambda name: re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name),
]
# What an embedding set calls its own columns, and `drop`, which would make a second text_embeds_drop.
SET_COLUMNS = frozenset(
    [
        "row",
        "source_image",
        "target_image",
        "num_sources",
        "image_embeds",
        "target_latents",
        "target_grid",
        "source_latents",
        "source_grids",
        "drop",
    ]
)
CaptionNames = Annotated[
    tuple[Name, ...],
    f"a list of different column names, none of them {', '.join(sorted(SET_COLUMNS))}",
    lambda names: len(set(names)) == len(names) and not SET_COLUMNS & set(names),
]
NOT_A_KEY = {"key": False}  # a field that the recipe does not hold: it follows from what it does hold


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a task's data mean what."""

    sources: Name = "source_image"  # null, one path/URL/image, or an ordered list of them
    target: Name = "target_image"
    captions: CaptionNames = ("instruction", "instruction_cn")
    inverse_captions: CaptionNames = ("inverse_instruction", "inverse_instruction_cn")  # i-th: inverse of the i-th
    required: tuple[str, ...] = field(default=(), metadata=NOT_A_KEY)  # caption columns that the recipe itself names


@dataclass(frozen=True, kw_only=True)
class Task:
    """One dataset and its part in the mix."""

    name: str = field(metadata=NOT_A_KEY)
    data: tuple[Name, ...] = ()  # files or globs, a folder of save_to_disk, or a Hub id; none: a ready set is given
    split: Name = "train"
    image_root: Name | None = None  # relative image paths start here; null: the folder of `data`
    weight: Weight = 1.0  # relative; 0: extracted and evaluated, not trained
    t2i: bool = False  # true: ignore sources, text-to-image
    eval_rows: Whole = 0  # hold out the last n rows of the set for evaluation
    columns: Columns = field(default_factory=Columns)
    embeddings: Name | None = None  # a ready set: folder, `org/name` or `org/name:config`, with `@revision`


@dataclass(frozen=True, kw_only=True)
class Extract:
    """Run 1: states and latents, once."""

    output_dir: Name = "outputs/embeddings"
    batch_size: Count = 4  # rows a forward
    image_sample_size: Side = 512  # px; the target covers the area of this square, sides are multiples of 32
    source_sample_size: Side | None = None  # px, the same for sources; null: what the family's pipeline feeds its VAE
    inverse: bool = True  # also target -> source, where a row has exactly one source and an inverse caption
    drop_caption: str = " "  # what caption dropout trains on: the official negative prompt, with the same images
    latents: bool = True  # store VAE latents; false: training encodes images itself
    vae_batch_size: Count = 1  # images a VAE forward
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"  # of the arithmetic; stored as float16
    chunk_rows: Count = 256  # rows that a crash can cost at most, and the unit that ranks share out
    num_workers: Count = 4  # threads that read and prepare images ahead of the model
    on_bad_row: Literal["skip", "fail"] = "skip"  # skip: counted and listed
    max_bad_share: Share = 0.01  # exit 3, rows kept, when more than this share and more than one row are bad
    overwrite: bool = False  # true: start again where the recipe or the data changed
    shard: Shard | None = None  # [i, n]: this launch does chunks i, i+n, ...
    allow_private_urls: bool = False  # true: also read images from addresses of the local network
    push_to_hub: Name | None = None  # org/name; one config per task, the first is the default
    private: bool = True  # of the pushed repository
    license: Name | None = None  # on the pushed card


@dataclass(frozen=True, kw_only=True)
class Mix:
    """How draws are shared out."""

    source_count_weights: Mapping[Whole, Weight] | None = None  # null: tasks' weights decide, counts follow the rows
    same_shape: Count | None = None  # rows of one shape drawn together; null: per_device_train_batch_size
    caption_weights: Mapping[Name, Weight] | None = None  # null: equal over the captions a row has
    caption_dropout: Share = 0.05  # the chance that a draw trains on `extract.drop_caption`
    inverse_share: Share = 0.0  # the chance that a draw of a row with an inverse is its inverse


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Which sigmas are drawn and how they weigh."""

    timestep_sampling: Literal["uniform", "stratified", "logit_normal", "mode"] = "uniform"
    logit_mean: float = 0.0  # of logit_normal
    logit_std: Positive = 1.0  # of logit_normal
    mode_scale: ModeScale = 1.29  # of mode
    weighting: Literal["none", "sigma_sqrt", "cosmap"] = "none"
    shift: Literal["auto", "none"] | float = "auto"  # auto: the scheduler's mu at the target's tokens; a number: mu


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters in place of full fine-tuning."""

    rank: Count = 32
    alpha: Positive = 32.0  # the adapter's output is scaled by alpha / rank
    dropout: Dropout = 0.0
    target_modules: Literal["attention", "attention+mlp", "all-linear"] | Names = "attention"
    init_from: Name | None = None  # adapters to go on from: a folder or a Hub id


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """What is trained."""

    lora: Lora | None = None  # null: full fine-tuning of `modules`
    modules: Names = (".",)  # dotted-name parts that train; a part matches whole components, "." is all
    low_lr_modules: tuple[Name, ...] = ()  # these train at half the rate


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The picture grid while training."""

    every: Whole = 0  # steps; 0: none
    rows: Count = 4  # held-out rows at fixed seeds
    num_inference_steps: Count = 20
    true_cfg_scale: Weight = 4.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that both runs are told."""

    path: Path = field(compare=False, metadata=NOT_A_KEY)
    model: Name = "Qwen/Qwen-Image-Edit-2509"  # Hub id, or a folder in diffusers layout
    revision: Name | None = None
    seed: Seed = 0  # the only seed
    tasks: Mapping[TaskName, Task]
    extract: Extract = field(default_factory=Extract)
    mix: Mix = field(default_factory=Mix)
    loss: Loss = field(default_factory=Loss)
    trainable: Trainable = field(default_factory=Trainable)
    sampling: Sampling = field(default_factory=Sampling)
    training: Mapping[str, Any] = field(default_factory=dict)  # TrainingArguments, with the defaults below


TRAINING_DEFAULTS = {
    "output_dir": "outputs/run",
    "learning_rate": 2.0e-5,
    "logging_steps": 10,
    "save_steps": 100,
    "remove_unused_columns": False,
    "logging_nan_inf_filter": False,
}
MAX_STEPS = 512  # unless max_steps or num_train_epochs is given
_STEPS_ONLY = (("steps", "no"), "draws are counted in steps, there are no epochs to wait for")
_ONE_ORDER = "the order of the draws is fixed by the seed and the global batch"
_ONE_SEED = "the recipe's top-level seed is the only one"
# TrainingArguments' keys that would work against us: the values that may be given, and the reason.
TRAINING_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "seed": ((), _ONE_SEED),
    "data_seed": ((), _ONE_SEED),
    "hub_token": ((), "recipes are saved and shared; set HF_TOKEN in the environment"),
    "eval_strategy": _STEPS_ONLY,
    "save_strategy": _STEPS_ONLY,
    "logging_strategy": _STEPS_ONLY,
    "accelerator_config.split_batches": ((False,), _ONE_ORDER),
    "accelerator_config.dispatch_batches": ((False, None), _ONE_ORDER),
    "auto_find_batch_size": ((False,), _ONE_ORDER),
    "group_by_length": ((False,), _ONE_ORDER),
    "train_sampling_strategy": (("random",), _ONE_ORDER),
    "ignore_data_skip": ((False,), "a resumed run goes on at the draw where it stopped"),
    "remove_unused_columns": ((False,), "the collator needs every column"),
    "logging_nan_inf_filter": ((False,), "a loss that is not finite must show"),
}
# Addresses whose capability is not built yet: anything but the default is refused. Remove the line that gets built.
LATER = {
    "extract.latents": "encoding images while training",
    "extract.shard": "extraction shared out over job arrays",
    "extract.allow_private_urls": "images from addresses of the local network",
    "extract.push_to_hub": "pushing embedding sets",
    "extract.private": "pushing embedding sets",
    "extract.license": "pushing embedding sets",
    "sampling.*": "pictures while training",
    "tasks.*.eval_rows": "evaluation while training",
    "training.eval_*": "evaluation while training",
    "training.load_best_model_at_end": "evaluation while training",
    "training.fsdp*": "FSDP",
    "training.deepspeed": "DeepSpeed",
    "training.torch_compile*": "compiled training",
    "training.push_to_hub": "pushing from training",
    "training.hub_*": "pushing from training",
}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and put `a.b.c=value` overrides over it; relative paths in it start at the working directory.

    Raises:
        InputError: the file, an override, or a value in either is wrong; the message has its address.
    """
    path = Path(path)
    try:
        raw = _parse(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); the recipe comes before overrides") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path}: got {_show(raw)}, wanted a mapping with at least `tasks`")
    for text in overrides:
        _override(raw, text)
    try:
        recipe = _build(Recipe, raw, "", path=path)
        recipe = replace(recipe, training=MappingProxyType(_training(recipe.training)))
        _check_together(recipe)
    except _Refused as refusal:
        at, message = refusal.args
        by = [text for text in overrides if re.match(re.escape(text.partition("=")[0]) + r"(\W|$)", at)]
        raise InputError(f"{f'override {by[-1]!r}' if by else path}: {at}: {message}") from None
    return recipe


def as_dict(value: Any) -> Any:
    """A recipe, or a part of one, in the plain mappings, lists and scalars of its YAML, defaults filled in."""
    if is_dataclass(value):
        keys = {f.name: getattr(value, f.name) for f in fields(value) if f.metadata.get("key", True)}
        if isinstance(value, Columns):  # a caption list that was left out stays out: naming it makes it required
            keys = {k: v for k, v in keys.items() if "captions" not in k or set(v) <= set(value.required)}
        return as_dict(keys)
    if isinstance(value, Mapping):
        return {k: as_dict(v) for k, v in value.items()}
    return [as_dict(v) for v in value] if isinstance(value, list | tuple) else value


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe to the file `path`; loading it gives an equal `Recipe`."""
    path.write_text(yaml.dump(as_dict(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True), encoding="utf-8")


def run_script(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Run a script's `main` on the command line; an InputError ends it with its message alone and exit status 1.

    Without arguments, or with -h or --help, the script's docstring is printed. Where a launcher started several
    processes on this machine, only the first one speaks.
    """
    argv = sys.argv[1:]
    speaks = os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"
    if not argv or {"-h", "--help"} & set(argv):
        if speaks:
            (sys.stdout if argv else sys.stderr).write(f"{(main.__globals__['__doc__'] or '').strip()}\n")
        sys.exit(0 if argv else 2)
    try:
        sys.exit(main(argv))
    except InputError as error:
        if speaks:
            sys.stderr.write(f"{error}\n")
        sys.exit(1)


def _build(cls: type, given: dict, at: str, **derived: Any) -> Any:
    """The dataclass `cls` from the mapping at address `at`."""
    keys = {f.name: f for f in fields(cls) if f.metadata.get("key", True)}
    for key in given:
        if key not in keys:
            raise _Refused(_join(at, key), _unknown(key, keys))
    for name, rule in keys.items():
        here = _join(at, name)
        if name in given:
            derived[name] = _take(given[name], rule.type, here)
            _check_later(here, derived[name], rule.default)
        elif rule.default is MISSING and rule.default_factory is MISSING:
            raise _Refused(here, f"missing, wanted {_words(rule.type)}")
    if cls is Columns:
        derived["required"] = tuple(c for key in ("captions", "inverse_captions") for c in derived.get(key, ()))
    if cls is Task:
        derived["name"] = at.rpartition(".")[2]
    return cls(**derived)


def _take(value: Any, kind: Any, at: str, wanted: str = "") -> Any:
    """`value`, from YAML, as the annotation `kind` wants it."""
    wanted = wanted or _words(kind)
    origin, inner = get_origin(kind), get_args(kind)
    if is_dataclass(kind) and value is None:
        value = {}  # a section whose every line is commented out
    if origin is tuple and isinstance(value, str):
        value = [value]
    if origin in (Union, UnionType):
        for option in inner:
            if _fits(value, option):
                return _take(value, option, at, wanted)
    elif origin is Annotated:
        taken = _take(value, inner[0], at, wanted)
        if inner[2](taken):
            return taken
    elif _fits(value, kind):
        if is_dataclass(kind):
            return _build(kind, value, at)
        if origin is tuple:
            return tuple(_take(item, inner[0], f"{at}[{i}]") for i, item in enumerate(value))
        if origin is Mapping:
            pairs = ((k, _join(at, k), v) for k, v in value.items())
            return MappingProxyType({_take(k, inner[0], here): _take(v, inner[1], here) for k, here, v in pairs})
        return float(value) if kind is float else value
    raise _Refused(at, f"got {_show(value)}, wanted {wanted}")


_SHAPES = {
    str: (str, "a string"),
    bool: (bool, "true or false"),
    int: (int, "an integer"),
    float: ((int, float), "a number"),
    NoneType: (NoneType, "null"),
    tuple: (list, "a list of strings"),
    list: (list, "a list"),
    dict: (dict, "a mapping"),
}


def _fits(value: Any, kind: Any) -> bool:
    """Whether `value` has the shape of `kind`, its contents aside; true is no number, and numbers are finite."""
    origin = get_origin(kind)
    if kind is Any or origin in (Annotated, Literal, Union):
        options = get_args(kind)[:1] if origin is Annotated else get_args(kind)
        return kind is Any or (value in options if origin is Literal else any(_fits(value, k) for k in options))
    shape, _ = _SHAPES.get(origin or kind, _SHAPES[dict])
    if isinstance(value, bool):
        return shape is bool
    return isinstance(value, shape) and not (isinstance(value, float) and not math.isfinite(value))


def _words(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return inner[1]
    if origin is Literal:
        return " | ".join(inner)
    if origin in (Union, UnionType):
        return " or ".join(_words(k) for k in inner)
    return _SHAPES.get(origin or kind, _SHAPES[dict])[1]


def _check_later(at: str, value: Any, default: Any) -> None:
    for pattern, capability in LATER.items():
        if fnmatchcase(at, pattern) and value != default:
            raise _Refused(at, f"not available yet ({capability}); leave it out")


def _check_together(recipe: Recipe) -> None:
    """What no single value shows."""
    for name, task in recipe.tasks.items():
        columns = task.columns
        if not task.data and task.embeddings is None:
            raise _Refused(
                f"tasks.{name}.data", "missing, and there is no ready set in `embeddings` to take its place"
            )
        if len(columns.inverse_captions) > len(columns.captions):
            got = f"got {len(columns.inverse_captions)} for {len(columns.captions)} captions"
            raise _Refused(f"tasks.{name}.columns.inverse_captions", f"{got}; the i-th is the inverse of the i-th")
    if not any(task.weight for task in recipe.tasks.values()):
        raise _Refused("tasks", "wanted at least one task with a weight above 0")
    for key in ("source_count_weights", "caption_weights"):
        weights = getattr(recipe.mix, key)
        if weights is not None and not any(weights.values()):
            raise _Refused(f"mix.{key}", "wanted at least one weight above 0; null is the default")
    captions = {c: None for task in recipe.tasks.values() for c in task.columns.captions}
    for caption in recipe.mix.caption_weights or ():
        if caption not in captions:
            raise _Refused(f"mix.caption_weights.{caption}", _unknown(caption, captions))


@functools.cache
def _training_arguments() -> dict[str, tuple[Any, Any]]:
    """The (kind, default) of each of TrainingArguments' fields, read from its source: importing it takes seconds."""
    (folder,) = importlib.util.find_spec("transformers").submodule_search_locations
    tree = ast.parse(Path(folder, "training_args.py").read_text(encoding="utf-8"))
    (body,) = (n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "TrainingArguments")
    kinds = {"str": str, "bool": bool, "int": int, "float": float, "None": NoneType, "list": list, "dict": dict}
    known = {}
    for node in (n for n in body if isinstance(n, ast.AnnAssign)):
        names = re.sub(r"\[[^\[\]]*\]", "", ast.unparse(node.annotation)).split(" | ")
        default = next((k.value for k in getattr(node.value, "keywords", ()) if k.arg == "default"), None)
        value = default.value if isinstance(default, ast.Constant) else None
        known[node.target.id] = (Union[tuple(kinds[name] for name in names if name in kinds)], value)  # noqa: UP007
    return known


def _training(given: Mapping[str, Any]) -> dict[str, Any]:
    """The `training:` section checked, with our defaults; null is TrainingArguments' own "not set"."""
    known = _training_arguments()
    nested = given.get("accelerator_config")
    nested = {f"accelerator_config.{k}": v for k, v in nested.items()} if isinstance(nested, dict) else {}
    for key, value in {**given, **nested}.items():
        at = f"training.{key}"
        accepted, reason = TRAINING_REFUSED.get(key, ((value,), ""))
        if value not in accepted:
            wanted = f"wanted {' | '.join(map(_show, accepted))}" if accepted else "leave it out"
            raise _Refused(at, f"got {_show(value)}, {wanted}: {reason}")
        if key in nested or (key in TRAINING_REFUSED and key not in known):
            continue
        if key not in known:
            raise _Refused(at, _unknown(key, known))
        kind, default = known[key]
        _check_later(at, value, default)
        if not _fits(value, kind):
            raise _Refused(at, f"got {_show(value)}, wanted {_words(kind)}")
    training = TRAINING_DEFAULTS | {k: v for k, v in given.items() if v is not None}
    _check_steps(training)
    return training if "num_train_epochs" in training else {"max_steps": MAX_STEPS} | training


def _check_steps(training: Mapping[str, Any]) -> None:
    """How long the run is and when it logs and saves; a resumed run logs the same only where it saved at a log."""
    if {"max_steps", "num_train_epochs"} <= training.keys():
        raise _Refused("training.max_steps", "num_train_epochs is given too; leave one of them out")
    if not training.get("max_steps", 1) >= 1:
        raise _Refused("training.max_steps", f"got {training['max_steps']}, wanted an integer of at least 1")
    if not training.get("num_train_epochs", 1) > 0:
        raise _Refused("training.num_train_epochs", f"got {training['num_train_epochs']}, wanted a number above 0")
    log, save = training["logging_steps"], training["save_steps"]
    for key in ("logging_steps", "save_steps"):
        if training[key] < 1 or training[key] % 1:
            raise _Refused(f"training.{key}", f"got {training[key]}, wanted a whole number of at least 1")
    if save % log and "no" not in (training.get("save_strategy"), training.get("logging_strategy")):
        raise _Refused("training.save_steps", f"got {save}, wanted a multiple of logging_steps, which is {log}")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema: nothing but mappings, lists, strings, numbers, true, false and null; no key twice."""

    yaml_implicit_resolvers: typing.ClassVar = {}
    yaml_constructors: typing.ClassVar = {}


class _Dumper(yaml.SafeDumper):
    """Quotes every string that YAML 1.1 or 1.2 would read as something else."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    mapping, lines = {}, {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if not isinstance(key, str | int | float | None):
            raise yaml.MarkedYAMLError(
                problem="a key must be a plain word or number", problem_mark=key_node.start_mark
            )
        if key in mapping:
            problem = f"key {_show(key)} again, it is in line {lines[key]} already"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
        mapping[key], lines[key] = loader.construct_object(value_node, deep=True), line
    return mapping


def _sequence(loader: _Loader, node: yaml.SequenceNode) -> list:
    return [loader.construct_object(item, deep=True) for item in node.value]


_SCALARS = {  # tag: (what a plain scalar of that kind looks like, how it is read)
    "null": (r"~|null|Null|NULL|", lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", lambda text: int(text, 0 if text[:2] in ("0o", "0x") else 10)),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        lambda text: float(re.sub(r"\.(?=[iInN])", "", text)),
    ),
}
for _tag, (_pattern, _read) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), None)
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", lambda _, node, read=_read: read(node.value))
_Loader.add_constructor("tag:yaml.org,2002:str", lambda loader, node: loader.construct_scalar(node))
_Loader.add_constructor("tag:yaml.org,2002:seq", _sequence)
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor(None, yaml.SafeLoader.construct_undefined)


def _parse(text: bytes | str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{where}{line}: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{where}: {error}") from None


def _override(raw: dict, text: str) -> None:
    """Put `a.b.c=value` into `raw`; sections on the way are made where they are missing."""
    dotted, _, value = text.partition("=")
    if not re.fullmatch(r"[^\s.=]+(\.[^\s.=]+)*=.*", text, re.DOTALL):
        raise InputError(f"override {text!r}: wanted a.b.c=value")
    *parents, last = [int(part) if part.isdecimal() else part for part in dotted.split(".")]
    for key in parents:
        child = {} if raw.get(key) is None else raw[key]
        if not isinstance(child, dict):
            raise InputError(f"override {text!r}: {key} is {_show(child)}, not a section")
        raw[key] = dict(child)  # a copy: a YAML alias may stand for the same section elsewhere
        raw = raw[key]
    raw[last] = _parse(value, f"override {text!r}")


def _join(at: str, key: Any) -> str:
    return f"{at}.{key}" if at else str(key)


def _show(value: Any) -> str:
    """A value as YAML has it, cut to a line."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _unknown(key: Any, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(str(key), list(known), n=1)
    return "unknown key, " + (f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}")
