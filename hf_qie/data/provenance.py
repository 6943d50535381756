"""What an embedding set was made from: `provenance.json` beside its data, and whether two sets fit each other."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from hf_qie.errors import InputError
from hf_qie.models.base import Family, family_name
from hf_qie.models.checkpoint import read_config
from hf_qie.runtime.files import samples
from hf_qie.runtime.hub_errors import hub_errors

FORMAT_VERSION = 1
PROVENANCE = "provenance.json"
# What is read of a provenance, and as what: `?` marks what may be missing, `*` each item. The format comes first, as
# another one may have all else otherwise.
KINDS = {
    "compat.format": int,
    "record.model": str,
    "record.dtype?": str,
    "record.set?": str,
    "record.request?.image_root?": list,
    "record.request?.latents?": bool,
    "record.recipe?": dict,
    "record.skipped?": dict,
    "record.counts?.rows_in?": int,
    "record.counts?.rows_out?": int,
    "record.counts?.bad?": int,
    "record.counts?.num_bytes?": int,
    "record.files?.*.bytes": int,
    "record.files?.*.sha256": str,
}
UNKNOWN = "unknown"  # of a field of `compat` in a set that others made: compared with nothing
SAMPLES, SAMPLE_BYTES = 16, 1 << 16  # 1 MB of a weight file at fixed offsets: 16 GB take seconds, not minutes


def request_differences(found: Mapping[str, Any], request: Mapping[str, Any]) -> list[str]:
    """In what a set is made from something else than `request`; `identity` only tells what of the data changed."""
    before, now = ({**one, **one["compat"], "compat": None, "identity": None} for one in (found, request))
    if "identity" in request and found.get("data") == request["identity"]:  # of a set from before rows had digests
        before["data"] = now["data"]
    return sorted(field for field in before.keys() | now.keys() if before.get(field) != now.get(field))


def files_of(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """`bytes` and `sha256` of each file of a set on disk; {} of a set that was written before they were recorded."""
    files = provenance["record"].get("files", {})
    return {Path(name).name: was for name, was in files.items()}  # nothing beyond the set's own folder


def read_provenance(folder: Path) -> dict[str, Any]:
    """`compat` and `record` of the set in `folder`; raises InputError for a set of another format."""
    return parse_provenance(folder / PROVENANCE, where=str(folder))


def parse_provenance(path: Path, *, where: str) -> dict[str, Any]:
    """The provenance in a file; raises InputError for a set of another format."""
    try:
        provenance = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{where}: cannot read {path.name} ({error}); fetch or extract the set again") from error
    for place, kind in KINDS.items():
        if not _has_kind(provenance, place.split("."), kind):
            at = f"{where}: {path.name}: {place.replace('?', '')}"
            raise InputError(f"{at} is missing or invalid; fetch or extract the set again")
        if place == "compat.format" and (version := provenance["compat"]["format"]) != FORMAT_VERSION:
            raise InputError(f"{where}: the set has format {version}, this hf_qie reads {FORMAT_VERSION}")
    return provenance


def _has_kind(value: Any, place: Sequence[str], kind: type) -> bool:
    if not place:
        return type(value) is kind  # true is not an integer
    if not isinstance(value, dict):
        return False
    name, *rest = place
    if name == "*":
        return all(_has_kind(item, rest, kind) for item in value.values())
    known = name.removesuffix("?")
    return _has_kind(value[known], rest, kind) if known in value else known != name


def checkpoint_compat(model: str, *, revision: str | None, family: Family, weights: bool = True) -> dict[str, Any]:
    """The part of `compat` that the checkpoint decides; the recipe adds `vae_area_px` and `drop_caption`.

    `weights: False` leaves out weight files that are not on this machine, rather than fetch 16 GB to compare them.
    """
    folders = family.compat_folders.items()
    parts = {part: _identity(model, names, revision=revision, weights=weights) for part, names in folders}
    return {"format": FORMAT_VERSION, **parts, **family.compat}


def check_transformer(model: str, *, revision: str | None, family: Family) -> tuple[int, int]:
    """Widths of the latents and of the embeddings that the transformer of a checkpoint takes, by its config.

    Raises InputError where it is not one of `family`.
    """
    config = read_config(model, "transformer/config.json", revision=revision)
    if (found := config.get("_class_name")) != family.transformer_class:
        raise InputError(
            f"model: the transformer of {model} is of class {found}, but {family.pipeline}, which its "
            f"model_index.json names, has a {family.transformer_class}; take both from one checkpoint"
        )
    return family.widths(config)


def check_weight_files(model: str, folders: Iterable[str]) -> None:
    """Raise InputError where `model` is a folder, and weight files are missing in one of its `folders`."""
    for folder in (Path(model, name) for name in folders):
        if not (folder / "config.json").is_file():
            continue
        wanted = set()
        for index in folder.glob("*.safetensors.index.json"):
            wanted.update(read_config(str(folder), index.name).get("weight_map", {}).values())
        missing = sorted(name for name in wanted if not (folder / name).is_file())
        if missing or not any(folder.glob("*.safetensors")):
            found = missing[0] if missing else "its weights, a .safetensors file"
            raise InputError(f"model: {folder} lacks {found}; fetch the checkpoint again")


def _identity(model: str, folders: Iterable[str], *, revision: str | None, weights: bool) -> dict[str, str]:
    """sha256 by file over parts of a checkpoint: small files whole, weights by size, header and samples."""
    root = Path(model)
    if not root.is_dir():
        patterns = [f"{folder}/{kind}" for folder in folders for kind in (("*",) if weights else ("*.json", "*.txt"))]
        with hub_errors(f"model: {model!r} is not a folder here"):
            root = Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    digests = {}
    for folder in folders:
        if not (root / folder).is_dir():
            raise InputError(f"model: {root} has no folder {folder}; it has to be in diffusers layout")
        for path in sorted((root / folder).iterdir()):
            if path.suffix == ".safetensors":
                digests[f"{folder}/{path.name}"] = _weight_digest(path)
            elif path.suffix in (".json", ".txt", ".jinja"):
                digests[f"{folder}/{path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return digests


def _weight_digest(path: Path) -> str:
    """sha256 over the size, the safetensors header and 1 MB at fixed offsets of a weight file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if (length := int.from_bytes(head, "little")) > size:  # what Git leaves where LFS is not installed, say
            raise InputError(f"model: {path} is not a safetensors file; fetch it again")
        digest = hashlib.sha256(str(size).encode() + head + file.read(length))
        for part in samples(file, count=SAMPLES, num_bytes=SAMPLE_BYTES):
            digest.update(part)
    return digest.hexdigest()


def fingerprint(compat: Mapping[str, Any]) -> str:
    """One hash over what has to be equal."""
    return hashlib.sha256(json.dumps(compat, sort_keys=True).encode()).hexdigest()


def check_compat(provenances: Mapping[str, Mapping[str, Any]], checkpoint: Mapping[str, Any], *, model: str) -> None:
    """Raise InputError naming the fields in which a set differs from the checkpoint or from the set of a task before.

    `checkpoint` is `checkpoint_compat` of the model that trains. What a set does not know is not compared: see
    `unverified`.
    """
    others = {f"the checkpoint {model}": checkpoint}
    for task, provenance in provenances.items():
        made_for = family_name(provenance["compat"])
        for other, compat in others.items():
            if made_for != (family := family_name(compat)):
                raise InputError(
                    f"tasks.{task}: its embedding set was made for {made_for}, {other} is of {family}; "
                    "extract it again for that family, or train without it"
                )
            if differing := _differences(provenance["compat"], compat):
                raise InputError(
                    f"tasks.{task}: its embedding set does not fit {other}: {', '.join(differing)} differ; "
                    f"it was made from {provenance['record']['model']}. Extract it again, or train without it"
                )
        others[f"the set of task {task}"] = provenance["compat"]


def unverified(provenances: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A warning for each task whose set does not know all that `check_compat` compares, as others computed it."""
    warnings = []
    for task, provenance in provenances.items():
        if unknown := [field for field, value in provenance["compat"].items() if value == UNKNOWN]:
            warnings.append(
                f"tasks.{task}: its embeddings were computed by another trainer and may differ from the checkpoint's: "
                f"{', '.join(unknown)} are unknown; compare with check.py --verify, or extract them again"
            )
    return warnings


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Fields of `other` that differ in `one`; of digests by path those that both know: weights may not be at hand."""
    found = []
    for field, value in other.items():
        mine = one.get(field)
        if UNKNOWN in (mine, value) or mine == value:
            continue
        if isinstance(mine, Mapping) and isinstance(value, Mapping) and all("/" in name for name in (*mine, *value)):
            found += [f"{field} ({name})" for name in sorted(mine.keys() & value.keys()) if mine[name] != value[name]]
        else:
            found.append(field)
    return found
