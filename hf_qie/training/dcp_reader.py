"""Sharded checkpoints of torch.distributed.checkpoint, read without running anything that their files could hold.

torch's own reader unpickles `.metadata`, which says how the tensors are cut, and whoever made that file can have it
run any code. Here only the types that torch itself writes there may come out of it.
"""

import pickle
import warnings
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import metadata as kinds
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from torch.serialization import get_unsafe_globals_in_checkpoint
from transformers.trainer_pt_utils import safe_globals

from hf_qie.errors import InputError
from hf_qie.training.checkpoints import NEVER_LOADED

OWN = "take a checkpoint of a run of your own"
MODEL_FOLDER = "pytorch_model_fsdp_0"  # accelerate's name for it
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


def memory_format(kind: Any, name: str) -> Any:
    """The member `name` of torch's enum of memory formats; raises UnpicklingError for that of anything else."""
    if kind is not kinds._MEM_FORMAT_ENCODING or name not in kind.__members__:
        raise pickle.UnpicklingError("it wants builtins.getattr, which no checkpoint of torch does")
    return kind[name]


class Restricted(pickle.Unpickler):
    """Finds nothing but what `ALLOWED` names."""

    def find_class(self, module: str, name: str) -> Any:
        """Raise UnpicklingError for any other name, before it is imported."""
        if (module, name) == ("builtins", "getattr"):  # how Python up to 3.11.3 writes the member of an enum
            return memory_format
        if name not in ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it wants {module}.{name}, which no checkpoint of torch does")
        return super().find_class(module, name)


class ShardReader(dcp.FileSystemReader):
    """torch's reader of sharded tensors, with metadata that was read once and checked.

    Tensors it reads with `weights_only=True`; what is no tensor, which it would unpickle, is refused here.
    """

    def __init__(self, folder: Path):
        """Raises InputError where the metadata are not what torch writes."""
        super().__init__(folder)
        self.metadata = read_metadata(folder)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What was read and checked."""
        return self.metadata


def refuse_pickles(checkpoint: Path) -> None:
    """Raise InputError where a file of a checkpoint that Trainer loads holds more than numbers, or is no safetensors.

    Nothing is loaded for it: pickles are looked through for the names that they would import.
    """
    for path in sorted(checkpoint.rglob("*")):
        if path.suffix == ".safetensors":
            try:
                safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise InputError(f"{path}: is refused, it is no safetensors file ({error}); {OWN}") from error
        elif path.suffix in (".pt", ".pth", ".bin") and path.name != NEVER_LOADED:
            refuse_names(path, where=str(path))
        elif path.name == ".metadata":
            refuse_shards(path.parent)


def refuse_shards(folder: Path) -> None:
    """Raise InputError where a sharded state holds more than numbers; what is no tensor is looked through."""
    metadata = read_metadata(folder, tensors_alone=False)
    for index, stored in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            with (folder / stored.relative_path).open("rb") as file:
                file.seek(stored.offset)
                refuse_names(BytesIO(file.read(stored.length)), where=f"{folder}: {index.fqn}")


def refuse_names(file: Path | BytesIO, *, where: str) -> None:
    """Raise InputError where torch's file would import what `torch.load(weights_only=True)` does not allow."""
    try:
        with safe_globals():  # numpy's arrays, which Trainer's generators are
            names = get_unsafe_globals_in_checkpoint(file)
    except Exception as error:  # of a file that is none of torch's, or was tampered with
        raise InputError(f"{where}: is refused, it is no file of torch's ({error}); {OWN}") from error
    if names:
        raise InputError(f"{where}: is refused, it wants {', '.join(names)}, which are no numbers; {OWN}")


def read_metadata(folder: Path, *, tensors_alone: bool = True) -> Metadata:
    """What `.metadata` says; raises InputError unless it speaks of files of `folder`, and of tensors alone if so."""
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            metadata = Restricted(file).load()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; the checkpoint is not whole") from error
    except Exception as error:  # a pickle that was tampered with can raise anything
        raise InputError(f"{path}: is refused, {error}; {OWN}") from error
    parts = [getattr(metadata, name, None) for name in ("state_dict_metadata", "storage_data")]
    if not isinstance(metadata, Metadata) or not all(isinstance(part, dict) for part in parts):
        raise InputError(f"{path}: is refused, it is no metadata of a checkpoint; {OWN}")
    kind = TensorStorageMetadata if tensors_alone else (TensorStorageMetadata, BytesStorageMetadata)
    for name, described in metadata.state_dict_metadata.items():
        if not isinstance(described, kind):
            raise InputError(f"{path}: is refused, {name} is no tensor; {OWN}")
    for index, stored in metadata.storage_data.items():
        known = isinstance(index, kinds.MetadataIndex) and isinstance(stored, _StorageInfo)
        name = stored.relative_path if known else None
        inside = isinstance(name, str) and Path(name).name == name and name not in (".", "..")
        if not inside or stored.transform_descriptors:
            raise InputError(f"{path}: is refused, it leads to {name}; {OWN}")
    return metadata


def sharded_tensors(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """The model's tensors in a sharded checkpoint by name, each read whole when it is called for."""
    reader = ShardReader(folder / MODEL_FOLDER)
    return {
        name.removeprefix("model.").replace("_checkpoint_wrapped_module.", ""): partial(read_tensor, reader, name)
        for name in reader.metadata.state_dict_metadata
    }


def read_tensor(reader: ShardReader, name: str) -> Tensor:
    """One tensor, put together from its shards; raises InputError where their files hold anything else."""
    described = reader.metadata.state_dict_metadata[name]
    tensor = torch.empty(described.size, dtype=described.properties.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it is told
        try:
            dcp.load({name: tensor}, storage_reader=reader, no_dist=True)
        except dcp.CheckpointException as error:
            (cause,) = (failure[0] for failure in error.failures.values())  # torch's words advise to load it unsafely
            raise InputError(
                f"{reader.path}: {name} is refused, its shards are damaged or hold more than numbers "
                f"({type(cause).__name__}); take a checkpoint of a run of your own"
            ) from error
    return tensor
