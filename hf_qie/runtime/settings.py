"""Strict settings: YAML text -> plain values -> frozen dataclasses whose annotations are the rules, and back.

    batch_size: Annotated[int, "an integer of at least 1", lambda n: n >= 1] = 4

is a key with its type, what is wanted in words, the test and the default; `build` walks such annotations. A function
after the test, as `expanded` of a path, makes the value that is tested and kept from the one in the file. A field
with metadata is no key of the file: `derived` says how it follows from the keys beside it. Scalars are those of YAML
1.2's core schema: `1e-4` is a number; `no`, `on`, dates and `1_000` are strings.
"""

import difflib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

import yaml

from hf_qie.errors import InputError, Misfit

MAX_DIGITS = 1000  # of an integer; Python writes no more than 4300 in a message


def derived(rule: Callable[[str, dict[str, Any]], Any]) -> dict[str, Any]:
    """Field metadata: no key, but `rule(address of the section, keys that the file gives)`."""
    return {"derived": rule}


def build(section: type, given: Mapping[str, Any], at: str = "", **known: Any) -> Any:
    """The dataclass `section` from the mapping at address `at`; `known` are fields that the caller fills.

    Raises:
        Misfit: a key is unknown or missing, or a value is not what its annotation wants.
    """
    keys = {f.name: f for f in fields(section) if not f.metadata}
    for key in given:
        if key not in keys:
            raise Misfit(join(at, key), unknown(key, keys))
    for key, rule in keys.items():
        if key in given:
            known[key] = take(given[key], rule.type, join(at, key))
        elif rule.default is MISSING and rule.default_factory is MISSING:
            raise Misfit(join(at, key), f"missing, wanted {words(rule.type)}")
    for rule in fields(section):
        if "derived" in rule.metadata:
            known[rule.name] = rule.metadata["derived"](at, known)
    return section(**known)


def expanded(path: str) -> str:
    """`path` with `~` and environment variables replaced; raises ValueError for one that is not set.

    A path that went through has none left, so that a saved recipe reads back as it is.
    """
    full = os.path.expanduser(os.path.expandvars(path))
    if left := re.search(r"\$(\w+|\{[^}]*\})", full):
        raise ValueError(f"the environment variable {left[1].strip('{}')} is not set; set it, or write the path out")
    if full.startswith("~"):
        user = full.partition("/")[0]
        raise ValueError(f"{user} is not the home of a user; write ./{user} for a file or folder of that name")
    return full


PathName = Annotated[str, "a string that is not blank", str.strip, expanded]  # every key that may be a path is one


def leaves(section: Any, at: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(address, value, default) of every key of a section that is no section itself."""
    for rule in (f for f in fields(section) if not f.metadata):
        value, here = getattr(section, rule.name), join(at, rule.name)
        if is_dataclass(value):
            yield from leaves(value, here)
        elif isinstance(value, Mapping) and all(map(is_dataclass, value.values())):
            for key, item in value.items():
                yield from leaves(item, join(here, key))
        else:
            yield here, value, rule.default


def take(value: Any, kind: Any, at: str, wanted: str = "") -> Any:
    """`value`, as YAML gives it, as the annotation `kind` wants it: lists become tuples, mappings read-only.

    Raises:
        Misfit: it is not what the annotation wants.
    """
    wanted = wanted or words(kind)
    origin, inner = get_origin(kind), get_args(kind)
    if is_dataclass(kind) and value is None:
        value = {}  # a section whose every line is commented out
    if origin is tuple and isinstance(value, str):
        value = [value]  # one name stands for a list of one
    if origin in (Union, UnionType):
        for option in inner:
            if fits(value, option):
                return take(value, option, at, wanted)
    elif origin is Annotated:
        taken = take(value, inner[0], at, wanted)
        for convert in inner[3:]:
            try:
                taken = convert(taken)
            except ValueError as error:
                raise Misfit(at, f"got {show(value)}: {error}") from None
        if inner[2](taken):
            return taken
    elif fits(value, kind):
        if is_dataclass(kind):
            return build(kind, value, at)
        if origin is tuple:
            return tuple(take(item, inner[0], f"{at}[{i}]") for i, item in enumerate(value))
        if origin is Mapping:
            pairs = ((key, item, join(at, key)) for key, item in value.items())
            return MappingProxyType({take(k, inner[0], here): take(v, inner[1], here) for k, v, here in pairs})
        return float(value) if kind is float else value
    raise Misfit(at, f"got {show(value)}, wanted {wanted}")


_SHAPES = {  # annotation: (type that YAML gives, in words)
    str: (str, "a string"),
    bool: (bool, "true or false"),
    int: (int, "an integer"),
    float: ((int, float), "a number"),
    NoneType: (NoneType, "null"),
    tuple: (list, "a list of strings"),
    list: (list, "a list"),
}


def _shape(kind: Any) -> tuple[Any, str]:
    return _SHAPES.get(get_origin(kind) or kind, (dict, "a mapping"))


def fits(value: Any, kind: Any) -> bool:
    """Whether `value` has the shape of `kind`, its contents aside; true is no number, and numbers are finite."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin is Literal:
        return value in inner
    if origin is Annotated:
        return fits(value, inner[0])
    if origin in (Union, UnionType):
        return any(fits(value, option) for option in inner)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, _shape(kind)[0]) and (kind is int or not isinstance(value, int | float) or _finite(value))


def _finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer beyond 1.8e308
        return False


def words(kind: Any) -> str:
    """What an annotation wants, for a message."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return inner[1]
    if origin is Literal:
        return " | ".join(inner)
    if origin in (Union, UnionType):
        return " or ".join(map(words, inner))
    return _shape(kind)[1]


def show(value: Any) -> str:
    """A value in a message: as YAML has it, cut to a line."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def unknown(key: Any, known: Mapping[str, Any]) -> str:
    """What to say of a key that is not among the `known` ones: the nearest of them, or all."""
    near = difflib.get_close_matches(str(key), list(known), n=1)
    return "unknown key, " + (f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}")


def join(at: str, key: Any) -> str:
    """The address of `key` in the section at address `at`."""
    return f"{at}.{key}" if at else str(key)


def override(settings: dict[str, Any], text: str) -> None:
    """Put `a.b.c=value` into plain settings; sections on the way are made where they are missing."""
    where = f"override {text!r}"
    if not re.match(r"[^\s.=]+(\.[^\s.=]+)*=", text):
        raise InputError(f"{where}: wanted a.b.c=value")
    dotted, _, value = text.partition("=")
    *parents, last = (int(part) if part.isdecimal() else part for part in dotted.split("."))
    for key in parents:
        section = {} if settings.get(key) is None else settings[key]
        if not isinstance(section, dict):
            raise InputError(f"{where}: {key} is {show(section)}, which has no keys")
        settings[key] = dict(section)  # a copy: through a YAML alias the same section may stand elsewhere too
        settings = settings[key]
    settings[last] = read_yaml(value, where)


def read_yaml(text: bytes | str, where: str) -> Any:
    """The plain value of one YAML document.

    Raises:
        InputError: it cannot be read; the message has `where`, the line and the reason.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise InputError(f"{where}, line {mark.line + 1}: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{where}: {error}") from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply; a recipe has five levels at most") from None


def write_yaml(value: Any) -> str:
    """A plain value as YAML that reads back as itself, here and with readers of YAML 1.1."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=119)


class _Loader(yaml.SafeLoader):
    """The core schema and merge keys (`<<: *other`), and nothing else: no dates, no tags of Python; no key twice."""

    yaml_implicit_resolvers: ClassVar = {}
    yaml_constructors: ClassVar = {}


class _Dumper(yaml.SafeDumper):
    """Quotes every string that YAML 1.1 or 1.2 would read as something else."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    mapping, lines, merged = {}, {}, {}
    for key_node, value_node in node.value:
        if key_node.value == "<<" and key_node.style is None:  # a key that stands here itself goes first
            merged = _merged(loader, value_node) | merged
            continue
        key, mark = loader.construct_object(key_node, deep=True), key_node.start_mark
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem=f"got {show(key)} as a key, wanted a word or number", problem_mark=mark)
        if key in mapping:
            problem = f"key {show(key)} again, it is in line {lines[key]} already"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
        mapping[key], lines[key] = loader.construct_object(value_node, deep=True), mark.line + 1
    return {**merged, **mapping}


def _merged(loader: _Loader, node: yaml.Node) -> dict[Any, Any]:
    """What a merge key brings: a mapping, or several, of which the first that has a key gives its value."""
    mappings = loader.construct_object(node, deep=True)
    mappings = mappings if isinstance(mappings, list) else [mappings]
    if not all(isinstance(one, dict) for one in mappings):
        problem = f"got <<: {show(mappings)}, wanted an alias of a mapping, as <<: *name, or a list of them"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    return {key: value for one in reversed(mappings) for key, value in one.items()}


def _sequence(loader: _Loader, node: yaml.SequenceNode) -> list[Any]:
    return [loader.construct_object(item, deep=True) for item in node.value]


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text, 0 if text[1:2] in ("o", "x") else 10)


_SCALARS = {  # tag: (what a plain scalar of that kind looks like, how it is read)
    "null": ("~|null|Null|NULL|", lambda text: None),
    "bool": ("true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    "int": ("[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", _integer),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        lambda text: float(re.sub(r"\.(?=[in])", "", text.lower())),
    ),
}
for _tag, (_pattern, _read) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), None)
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", lambda _, node, read=_read: read(node.value))
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_scalar)
_Loader.add_constructor("tag:yaml.org,2002:seq", _sequence)
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor(None, _Loader.construct_undefined)
