"""A checkpoint's configs, from a folder in diffusers layout or from the Hub."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from hf_qie.errors import InputError
from hf_qie.runtime.hub_errors import hub_errors


def checkpoint_file(model: str, name: str, *, revision: str | None = None) -> Path:
    """A file of the checkpoint `model`, a folder or a Hub id (cached); raises InputError where it is missing."""
    if not Path(model).is_dir():
        with hub_errors(f"model: {model!r} is not a folder here"):
            return Path(hf_hub_download(model, name, revision=revision))
    path = Path(model, name)
    if not path.is_file():
        raise InputError(f"model: {path} does not exist; {model} has to be a folder in diffusers layout")
    return path


def read_config(model: str, name: str, *, revision: str | None = None) -> dict[str, Any]:
    """One JSON config of the checkpoint, as `transformer/config.json`."""
    path = checkpoint_file(model, name, revision=revision)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"model: {path} is not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise InputError(f"model: {path}: expected a mapping, found a {type(config).__name__}")
    return config
