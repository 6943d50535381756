"""Strict YAML 1.2: text -> plain values, and back.

Scalars are those of the core schema: `1e-4` is a number; `no`, `on`, dates and `1_000` are strings. Merge keys
(`<<: *other`) are read; tags of Python are not, and no key may occur twice.
"""

import re
from typing import Any, ClassVar

import yaml

from hf_qie.errors import InputError
from hf_qie.runtime.rules import show

MAX_DIGITS = 1000  # of an integer; Python writes no more than 4300 in a message


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

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Refuse a key that occurs twice, then replace merge keys by what they bring: of several the first goes first.

        PyYAML's own does the same up to 6.0.3; in 6.0.4 the last of a list of mappings goes first.
        """
        if getattr(node, "is_flat", False):
            return
        node.is_flat, lines, merged, own = True, {}, [], []
        for key_node, value_node in node.value:
            key, mark = self.construct_object(key_node, deep=True), key_node.start_mark
            if not isinstance(key_node, yaml.ScalarNode):
                problem = f"got {show(key)} as a key, expected a word or number"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
            if key in lines and not key_node.tag.endswith(":merge"):
                problem = f"key {show(key)} again, it is in line {lines[key]} already"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
            lines[key] = mark.line + 1
            if key_node.tag.endswith(":merge"):
                merged = self._brought(value_node) + merged
            else:
                own.append((key_node, value_node))
        node.value = merged + own  # of two equal keys the later one counts

    def _brought(self, node: yaml.Node) -> list[tuple[yaml.Node, yaml.Node]]:
        mappings = node.value if isinstance(node, yaml.SequenceNode) else [node]
        for one in mappings:
            if not isinstance(one, yaml.MappingNode):
                problem = f"expected a mapping or list of mappings for merging, but found {one.id}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=one.start_mark)
            self.flatten_mapping(one)
        return [pair for one in reversed(mappings) for pair in one.value]


class _Dumper(yaml.SafeDumper):
    """Quotes every string that YAML 1.1 or 1.2 would read as something else."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    return {loader.construct_object(key): loader.construct_object(value, deep=True) for key, value in node.value}


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text, 0 if text[1:2] in ("o", "x") else 10)


_SCALARS = {  # tag: (what a plain scalar of that kind looks like, how it is read)
    "merge": ("<<", str),
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
_Loader.add_constructor("tag:yaml.org,2002:seq", lambda loader, node: loader.construct_sequence(node, deep=True))
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor(None, _Loader.construct_undefined)
