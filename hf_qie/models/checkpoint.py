"""A checkpoint's configs, weight files and transformer, from a folder in diffusers layout or from the Hub."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hf_qie.errors import InputError
from hf_qie.runtime.hub_errors import hub_errors

LICENSE_FILE = "LICENSE"  # at the root of a checkpoint
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"  # diffusers' name for it
PLAIN = (".json", ".txt", ".jinja", ".model", ".safetensors")  # files of a checkpoint that are fetched: no code
Tensors = Mapping[str, Callable[[], Tensor]]  # by name, each read when called: a model is never in memory as a whole


def checkpoint_file(model: str, name: str, *, revision: str | None = None) -> Path:
    """A file of the checkpoint `model`, a folder or a Hub id (cached); raises InputError where it is missing."""
    if not Path(model).is_dir():
        with hub_errors(f"model: {model!r} is not a folder here"):
            return Path(hf_hub_download(model, name, revision=revision))
    path = Path(model, name)
    if not path.is_file():
        raise InputError(f"model: {path} does not exist; {model} has to be a folder in diffusers layout")
    return path


def license_file(model: str, *, revision: str | None = None) -> Path | None:
    """The licence at the root of the checkpoint `model`, a folder or a Hub id (cached); None where none is found."""
    if Path(model).is_dir():
        path = Path(model, LICENSE_FILE)
        return path if path.is_file() else None
    with hub_errors(f"model: {model!r} is not a folder here"):
        try:
            return Path(hf_hub_download(model, LICENSE_FILE, revision=revision))
        except EntryNotFoundError:  # the repository has none, or it is not cached and there is no network
            return None


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


def checkpoint_folder(model: str, parts: Sequence[str], *, revision: str | None = None) -> Path:
    """A folder with these parts of the checkpoint `model`, on disk or from the Hub (cached)."""
    if not Path(model).is_dir():
        patterns = [f"{part}/*{kind}" for part in parts for kind in PLAIN]
        with hub_errors(f"model: {model!r} is not a folder here"):
            return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    if missing := [part for part in parts if not Path(model, part).is_dir()]:
        raise InputError(f"model: {model} has no folder {missing[0]}; it has to be in diffusers layout")
    return Path(model)


def saved_tensors(folder: Path) -> Tensors:
    """The tensors of a model that diffusers saved in `folder`; raises InputError naming a file that cannot be read."""
    index, path, files = folder / f"{WEIGHTS_FILE}.index.json", folder, []
    try:
        names = {WEIGHTS_FILE}
        if (path := index).exists():
            mapped = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = {Path(name).name for name in mapped.values()}  # none outside of the folder
        for path in (folder / name for name in sorted(names)):
            files.append(safe_open(path, framework="pt"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise InputError(f"{path}: the weights cannot be read ({error}); fetch or write them again") from error
    return {key: partial(file.get_tensor, key) for file in files for key in file.keys()}  # noqa: SIM118, it is no dict


def load_transformer(
    kind: Any, model: str, *, revision: str | None, dtype: torch.dtype, empty: bool = False
) -> nn.Module:
    """The transformer of a checkpoint, of diffusers' class `kind`, quantised if it was saved so.

    An `empty` one has its parameters on the meta device. Raises InputError where it cannot be loaded.
    """
    where = {"subfolder": "transformer", "revision": revision}
    try:
        if empty:
            config = kind.load_config(model, **where)
            with init_empty_weights():
                transformer = kind.from_config(config)
            for parameter in transformer.parameters():  # buffers stay what they are: no checkpoint has them
                parameter.data = parameter.data.to(dtype)
        else:  # never a pickle
            transformer, keys = kind.from_pretrained(
                model, dtype=dtype, use_safetensors=True, output_loading_info=True, **where
            )
            if unmatched := sorted([*keys["missing_keys"], *keys["unexpected_keys"]]):
                raise ValueError(f"{unmatched[0]} is in its weights or by its config alone")
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError, LookupError) as error:
        raise InputError(f"model: cannot load the transformer of {model!r}: {error}") from error
    # what Trainer's reporters ask of a config, and diffusers' config lacks
    transformer.config.to_json_string = transformer.to_json_string
    transformer.config.to_dict = lambda config=transformer.config: dict(config)
    return transformer
