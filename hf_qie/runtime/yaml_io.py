"""Strict YAML 1.2: text -> plain values, and back.

Scalars are those of the core schema: `1e-4` is a number; `no`, `on`, dates and `1_000` are strings. Merge keys
(`<<: *other`) are read; tags of Python are not, and no key may occur twice.
"""

import re
from typing import Any, ClassVar

import yaml

from hf_qie.errors import InputError
from hf_qie.runtime.rules import show


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
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last: of an escape beyond Unicode
        raise InputError(f"{where}: {error}") from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply; a recipe has five levels at most") from None


def write_yaml(value: Any) -> str:
    """A plain value as YAML that reads back as itself, here and with readers of YAML 1.1."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=119)


class _Loader(yaml.SafeLoader):
    """The core schema alone: no dates, no sets, no tags of Python."""

    yaml_implicit_resolvers: ClassVar = {}
    yaml_constructors: ClassVar = {}


class _Dumper(yaml.SafeDumper):
    """Quotes every string that YAML 1.1 or 1.2 would read as something else."""


_SCALARS = {  # tag: (what a plain scalar of that kind looks like, how it is read)
    "merge": ("<<", str),
    "null": ("~|null|Null|NULL|", lambda text: None),
    "bool": ("true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    "int": (
        "[-+]?[0-9]+|0o[0-7]{1,99}|0x[0-9a-fA-F]{1,99}",  # a message could not hold a number of 5,000 digits
        lambda text: int(text, 0 if text[1:2] in ("o", "x") else 10),
    ),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        lambda text: float(re.sub(r"\.(?=[in])", "", text.lower())),
    ),
}
for _tag, (_pattern, _read) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), None)
    _Loader.add_constructor(
        f"tag:yaml.org,2002:{_tag}", lambda loader, node, read=_read: read(loader.construct_scalar(node))
    )


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    """A mapping with what its merge keys bring: its own keys go first, then the first of several that are merged.

    PyYAML's own differs between releases, and takes a key that occurs twice.
    """
    merged, own, lines = {}, {}, {}

    def refuse(problem: str, at: yaml.Node) -> None:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)

    for key_node, value_node in node.value:
        key, value = (loader.construct_object(part, deep=True) for part in (key_node, value_node))
        if not isinstance(key_node, yaml.ScalarNode):
            refuse(f"got {show(key)} as a key, expected a word or number", key_node)
        if key_node.tag.endswith(":merge"):
            for section in value if isinstance(value, list) else [value]:
                if not isinstance(section, dict):
                    refuse(f"got {show(section)}, expected a mapping or a list of mappings to merge", value_node)
                merged = section | merged
        elif key in lines:
            refuse(f"key {show(key)} again, it is in line {lines[key]} already", key_node)
        else:
            own[key], lines[key] = value, key_node.start_mark.line + 1
    return merged | own


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_scalar)
_Loader.add_constructor("tag:yaml.org,2002:seq", lambda loader, node: loader.construct_sequence(node, deep=True))
_Loader.add_constructor(None, _Loader.construct_undefined)
