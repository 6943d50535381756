"""Rules for values of a recipe or a command line, and the message for a value that breaks one.

    Count = Annotated[int, Field(ge=1), rule("an integer of at least 1")]

is a type, a constraint that pydantic checks, and what an error says was expected. Values are strict:
neither true nor "4" is a number, and numbers are finite.
"""

import difflib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from hf_qie.errors import InputError

STRICT = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)
K, V = TypeVar("K"), TypeVar("V")
FILE = "file"  # where a value comes from, in contrast to code


def rule(expected: str, test: Callable[[Any], Any] = lambda value: True) -> WrapValidator:
    """Annotation: what a value has to be, and a test where pydantic's constraints are not enough."""

    def check(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            checked = handler(value)
            if test(checked):
                return checked
        except ValidationError as error:
            if any(isinstance(part, int) for part in error.errors()[0]["loc"][:1]):  # an item of a list says more
                raise
        raise PydanticCustomError("expected", "{expected}", {"expected": expected})

    return WrapValidator(check)


Listed = Field(strict=False)  # of a tuple: YAML gives a list
One = BeforeValidator(  # of a tuple: a single string stands for a list of one
    lambda value: (value,) if isinstance(value, str) else value, json_schema_input_type=str | tuple[str, ...]
)


def expanded(path: str) -> str:
    """`path` with `~` and environment variables replaced; raises ValueError for one that is not set.

    The result contains none, so that a saved recipe reads back as it is.
    """
    full = os.path.expanduser(os.path.expandvars(path))
    if left := re.search(r"\$(\w+|\{[^}]*\})", full):
        raise ValueError(f"the environment variable {left[1].strip('{}')} is not set; set it, or write the path out")
    if full.startswith("~"):
        user = full.partition("/")[0]
        raise ValueError(f"{user} is not the home of a user; write ./{user} for a file or folder of that name")
    return full


Name = Annotated[str, rule("a string that is not blank", str.strip)]
PathName = Annotated[Name, AfterValidator(expanded)]  # every key that may be a path
Seed = Annotated[int, Field(ge=0, lt=2**32), rule("an integer from 0 to 4294967295")]
Whole = Annotated[int, Field(ge=0), rule("an integer of at least 0")]
Count = Annotated[int, Field(ge=1), rule("an integer of at least 1")]
Steps = Annotated[int, Field(ge=2), rule("an integer of at least 2")]  # one step: shift_terminal would divide by 0
Side = Annotated[int, Field(ge=64), rule("an integer of at least 64")]  # below, a long image rounds to 0 pixels
Positive = Annotated[float, Field(gt=0), rule("a number above 0")]
Weight = Annotated[float, Field(ge=0), rule("a number of at least 0")]
Share = Annotated[float, Field(ge=0, le=1), rule("a number from 0 to 1")]
Below1 = Annotated[float, Field(ge=0, lt=1), rule("a number from 0 to below 1")]
Names = Annotated[tuple[Name, ...], Listed, One, rule("a list of at least one name", len)]
Table = Annotated[Mapping[K, V], AfterValidator(MappingProxyType)]  # read-only


class Section(BaseModel):
    """A section of a recipe: a frozen model of strict values; a field with exclude=True is not a key of the file."""

    model_config = STRICT

    @classmethod
    def key_names(cls) -> list[str]:
        """The keys that a file may have."""
        return [name for name, field in cls.model_fields.items() if not field.exclude]

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, given: Any, info: ValidationInfo) -> Any:
        if given is None:  # a section whose every line is commented out
            return {}
        known = cls.key_names() if info.context == FILE else cls.model_fields
        for key in given if isinstance(given, dict) else ():
            if key not in known:
                raise PydanticCustomError("unknown", "unknown key", {"key": key, "known": cls.key_names()})
        return given


def validate(kind: Any, value: Any, at: str = "") -> Any:
    """`value`, as YAML gives it, as a `kind`: a type, an Annotated one or a Section; `at` is its address.

    Raises:
        InputError: it is not one; the first error, by its own address.
    """
    config = None if isinstance(kind, type) and issubclass(kind, BaseModel) else STRICT
    try:
        return TypeAdapter(kind, config=config).validate_python(value, context=FILE)
    except ValidationError as error:
        raise _misfit(error, value, at) from None


_EXPECTED = {  # by pydantic's types of errors
    "bool_type": "true or false",
    "string_type": "a string",
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "model_type": "a mapping",
}


def _misfit(error: ValidationError, value: Any, at: str) -> InputError:
    """The first of pydantic's errors in our words."""
    first, *others = error.errors()
    context, depth = first.get("ctx", {}), 0
    for part in first["loc"]:  # the last part may name a member of a union, or be [key]
        if isinstance(value, dict) and (part in value or first["type"] == "missing"):
            at, value = join(at, part), value.get(part)
        elif isinstance(part, int) and isinstance(value, list | str) and part < len(value):
            at, value = f"{at}[{part}]", value[part] if isinstance(value, list) else value
        else:
            break
        depth += 1
    if first["type"] == "unknown":
        return InputError(join(at, context["key"]), unknown(context["key"], context["known"]))
    if first["type"] == "missing":
        return InputError(at, "missing")
    got = f"got {show(first['input'])}"
    if first["type"] == "value_error":
        return InputError(at, f"{got}: {context['error']}")
    at_union = first["loc"][depth:] not in ((), ("[key]",))
    members = [one for one in others if at_union and one["loc"][:depth] == first["loc"][:depth]]
    expected = [_EXPECTED.get(e["type"], e.get("ctx", {}).get("expected", e["msg"])) for e in [first, *members]]
    return InputError(at, f"{got}, expected {' or '.join(dict.fromkeys(expected))}")


def show(value: Any) -> str:
    """A value in a message: as YAML has it, cut to a line."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def unknown(key: Any, known: Iterable[str], what: str = "key") -> str:
    """What to say of a key that is not among the `known` ones: the nearest of them, or all."""
    known = list(known)
    near = difflib.get_close_matches(str(key), known, n=1)
    return f"unknown {what}, " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}")


def join(at: str, key: Any) -> str:
    """The address of `key` in the section at address `at`."""
    return f"{at}.{key}" if at else str(key)
