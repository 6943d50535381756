"""Overrides of a recipe on the command line: `a.b.c=value`."""

import re
from typing import Any

from hf_qie.errors import InputError
from hf_qie.runtime.rules import show
from hf_qie.runtime.yaml_io import read_yaml


def override(settings: dict[str, Any], text: str) -> None:
    """Put `a.b.c=value` into plain settings; sections that are missing on the way are added."""
    where = f"override {text!r}"
    if not re.match(r"[^\s.=]+(\.[^\s.=]+)*=", text):
        raise InputError(f"{where}: expected a.b.c=value")
    dotted, _, value = text.partition("=")
    *parents, last = (int(part) if part.isdecimal() else part for part in dotted.split("."))
    for key in parents:
        section = {} if settings.get(key) is None else settings[key]
        if not isinstance(section, dict):
            raise InputError(f"{where}: {key} is {show(section)}, which has no keys")
        settings[key] = dict(section)  # a copy: through a YAML alias the same section may stand elsewhere too
        settings = settings[key]
    settings[last] = read_yaml(value, where)
