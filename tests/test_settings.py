"""Strict settings: which text reads as which value, and that a written value reads back."""

import math

import pytest
import yaml

from hf_qie.runtime.yaml_io import read_yaml, write_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-2.", -2.0),
        ("-.inf", -math.inf),
        ("010", 10),  # octal in YAML 1.1
        ("0o17", 15),
        ("0x1F", 31),
        ("+3", 3),
        ("1_000", "1_000"),
        ("1:30", "1:30"),  # 90 in YAML 1.1
        ("2024-01-31", "2024-01-31"),
        ("0b1", "0b1"),
        ("1e", "1e"),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("Off", "Off"),
        ("y", "y"),
        ("true", True),
        ("False", False),
        ("tRue", "tRue"),
        ("null", None),
        ("~", None),
        ("", None),
        ("none", "none"),
        ("<<", "<<"),
        ('"1e-4"', "1e-4"),
        ("[a, {b: 1}]", ["a", {"b": 1}]),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    read = read_yaml(text, "here")
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize("text", ["1e-4", "yes", "010", "0o17", "null", "", "2024-01-31", "1_000", "a: b", "# c"])
def test_a_string_that_looks_like_something_else_is_quoted_when_written(text):
    written = write_yaml({"key": text})
    assert read_yaml(written, "here") == {"key": text}
    assert yaml.safe_load(written) == {"key": text}  # and a reader of YAML 1.1 sees the same


def test_a_section_that_stands_in_a_merge_key_may_merge_and_be_merged_itself():
    text = "y: &y {k: 0, z: 9}\nb: {<<: &x {<<: *y, k: 1}, m: 2}\nc: *x\n"
    assert read_yaml(text, "here") == {"y": {"k": 0, "z": 9}, "b": {"k": 1, "z": 9, "m": 2}, "c": {"k": 1, "z": 9}}
