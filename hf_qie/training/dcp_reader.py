"""Sharded checkpoints of torch.distributed.checkpoint, read for export without running code from their files.

torch's own reader unpickles `.metadata`, which says how the tensors are sharded: a file from somebody else could run
any code. Here only the types that torch writes there may come out of it.
"""

import pickle
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint import metadata as kinds
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from hf_qie.errors import InputError
from hf_qie.training.ema import AVERAGE, EMA_FOLDER

MODEL_FOLDER = "pytorch_model_fsdp_0"  # accelerate's name for it
REMEDY = "export a checkpoint of a run of your own"
ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))},
    "pathlib": {"PosixPath", "WindowsPath"},  # where it was written, which nobody opens
    "pathlib._local": {"PosixPath", "WindowsPath"},  # the same, of Python 3.13
}


def _memory_format(kind: Any, name: str) -> Any:
    if kind is not kinds._MEM_FORMAT_ENCODING or name not in kind.__members__:
        raise pickle.UnpicklingError("it asks for builtins.getattr, which no checkpoint of torch does")
    return kind[name]


class Restricted(pickle.Unpickler):
    """Finds nothing but what `ALLOWED` names."""

    def find_class(self, module: str, name: str) -> Any:
        """Raise UnpicklingError for any other name, before it is imported."""
        if (module, name) == ("builtins", "getattr"):  # how Python up to 3.11.3 writes the member of an enum
            return _memory_format
        if name not in ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint of torch does")
        return super().find_class(module, name)


def _read_metadata(folder: Path) -> Metadata:
    """The checked `.metadata` of `folder`: of tensors alone, in files of the folder."""
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            metadata = Restricted(file).load()
        for name, described in metadata.state_dict_metadata.items():
            if not isinstance(described, TensorStorageMetadata):
                raise ValueError(f"{name} is not a tensor")
        for stored in metadata.storage_data.values():
            name = stored.relative_path
            if name == ".." or Path(name).name != name or stored.transform_descriptors:
                raise ValueError(f"it leads to {name}")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; the checkpoint is incomplete") from error
    except Exception as error:  # a pickle that was tampered with can raise anything
        raise InputError(f"{path}: is refused, {error}; {REMEDY}") from error
    return metadata


def sharded_tensors(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """The model's tensors in a sharded checkpoint by name, each read in one piece when it is called for.

    Of a run with `ema` those that trained are averages. Raises InputError where the files hold anything but tensors.
    """
    averages, folder = folder / EMA_FOLDER, folder / MODEL_FOLDER
    reader, metadata = dcp.FileSystemReader(folder), _read_metadata(folder)
    reader.read_metadata = lambda *_, **__: metadata  # its own would unpickle it; tensors it reads as weights only
    tensors = {}
    for name, described in metadata.state_dict_metadata.items():
        own = name.removeprefix("model.").replace("_checkpoint_wrapped_module.", "")
        tensors[own] = partial(_read_tensor, reader, name, described)
    return tensors | (averaged_tensors(averages) if averages.is_dir() else {})


def averaged_tensors(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """The averages in a checkpoint's folder `ema/`, as `sharded_tensors` has them."""
    reader = HuggingFaceStorageReader(str(folder))
    try:
        described = reader.read_metadata().state_dict_metadata
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: is refused, {error}; {REMEDY}") from error
    return {
        name.removeprefix(AVERAGE): partial(_read_tensor, reader, name, one)
        for name, one in described.items()
        if name.startswith(AVERAGE)
    }


def _read_tensor(reader: dcp.StorageReader, name: str, described: TensorStorageMetadata) -> Tensor:
    tensor = torch.empty(described.size, dtype=described.properties.dtype)
    with warnings.catch_warnings(action="ignore"):  # it warns of no_dist
        try:
            dcp.load({name: tensor}, storage_reader=reader, no_dist=True)
        except dcp.CheckpointException as error:
            (cause,) = (failure[0] for failure in error.failures.values())  # torch's words advise to load it unsafely
            raise InputError(
                f"{reader.path}: {name} is refused, its shards are damaged or hold more than numbers "
                f"({type(cause).__name__}); {REMEDY}"
            ) from error
    return tensor
