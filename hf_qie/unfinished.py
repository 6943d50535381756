"""An embedding set while it is being made: one folder that every rank, node and launch writes its chunks into.

What the set is made from is written first, `provenance.json` last. A launch may do a part of the chunks alone
(`extract.shard`); whoever finds them all there makes the set whole.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import DatasetInfo, Features
from datasets.config import DATASET_INFO_FILENAME, DATASET_STATE_JSON_FILENAME

from hf_qie.accounts import UNFINISHED, Account, damage, read_account
from hf_qie.alive import at_any_length
from hf_qie.chunks import Models
from hf_qie.device import AUTO
from hf_qie.durable import check_files, move_durably, write_durably, written
from hf_qie.embeddings import PROVENANCE, files_of, fingerprint, read_provenance
from hf_qie.prepare import Plan
from hf_qie.recipe import InputError, Recipe, as_dict, save_recipe

logger = get_logger(__name__)

REQUEST = f"{UNFINISHED}/request.json"  # what it is being made from


def request_of(plan: Plan, compat: Mapping[str, Any], recipe: Recipe, *, dtype: torch.dtype | str) -> dict[str, Any]:
    """All that decides the content of a set; a folder is only gone on with if this is unchanged.

    `dtype`: what encoder and VAE compute in. Not the batch sizes, though they move the last bits: who runs out of
    memory may go on with smaller ones.
    """
    task, settings = plan.task, as_dict(recipe.extract)
    roots = [task.image_root] if task.image_root else sorted({str(Path(name).parent) for name in task.data})
    sizes = {"vae_area_px": plan.source_area_px, "drop_caption": recipe.extract.drop_caption}
    compat = dict(compat) | {field: compat.get(field, value) for field, value in sizes.items()}
    request = {"compat": compat, "data": plan.rows.digest, "image_root": roots, "t2i": task.t2i}
    request |= {"columns": as_dict(task.columns)}
    request |= {"dtype": str(dtype).removeprefix("torch.")}
    return request | {name: settings[name] for name in ("image_sample_size", "inverse", "latents", "chunk_rows")}


def writing(folder: Path, recipe: Recipe) -> Path:
    """Where the chunks of this launch lie, and the claims to them, until they are whole."""
    i, n = recipe.extract.shard or (0, 1)
    return folder / UNFINISHED / f"writing-{i}-of-{n}"


def open_folder(folder: Path, request: Mapping[str, Any], *, recipe: Recipe) -> None:
    """Make `folder` ready for `request`: new, or gone on with where an earlier run with the same request stopped.

    Raises InputError for a folder made from something else, unless `extract.overwrite` is set.
    """
    aside = folder.with_name(f".{folder.name}-deleted")
    shutil.rmtree(aside, ignore_errors=True)  # a launch was killed at it
    found = read_request(folder)
    if found is not None and recipe.extract.dtype == AUTO and (folder / PROVENANCE).exists():
        request = {**request, "dtype": found.get("dtype")}  # a finished set is right whatever device opens it
    if found is not None and found != request:
        before, now = ({**one, **one["compat"], "compat": None} for one in (found, request))
        differing = sorted(field for field in before.keys() | now.keys() if before.get(field) != now.get(field))
        if not recipe.extract.overwrite:
            raise InputError(
                f"{folder}: was made with another {', '.join(differing)}; give another extract.output_dir, or set "
                "extract.overwrite: true to delete it and start again"
            )
        with suppress(FileNotFoundError):  # several launches may start at once
            folder.rename(aside)  # half deleted under its name, it would pass for a whole set
        shutil.rmtree(aside, ignore_errors=True)
    elif found is None and folder.exists() and any(path.name != UNFINISHED for path in folder.iterdir()):
        raise InputError(f"{folder}: holds files that are no embedding set; give another extract.output_dir")
    if (folder / PROVENANCE).exists():
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
        check_files(folder, files_of(read_provenance(folder)))
        return
    shutil.rmtree(writing(folder, recipe), ignore_errors=True)  # of a launch that was killed
    writing(folder, recipe).mkdir(parents=True)
    if read_request(folder) is None:
        write_durably(folder / REQUEST, json.dumps(request))


def read_request(folder: Path) -> dict[str, Any] | None:
    """What the set in `folder`, finished or not, is made from; None where there is none."""
    if (folder / PROVENANCE).exists():
        request = read_provenance(folder)["record"].get("request")
    elif (folder / REQUEST).exists():
        try:
            request = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            request = None
    else:
        return None
    if not isinstance(request, dict) or not isinstance(request.get("compat"), dict):
        raise InputError(f"{folder}: does not say what it is made from, as extract.py does; delete it and start again")
    return request


def chunk_files(plan: Plan, folder: Path) -> dict[Path, range]:
    """Every chunk file of the set and the rows it holds; fixed by `chunk_rows`, whoever writes them."""
    num_rows, step = len(plan.rows.table), plan.extract.chunk_rows
    starts = range(0, num_rows, step)
    return {
        folder / f"data-{i:05d}-of-{len(starts):05d}.arrow": range(start, min(start + step, num_rows))
        for i, start in enumerate(starts)
    }


def rows_done(plan: Plan, folder: Path) -> int:
    """Rows of the chunks that are there."""
    names = set(os.listdir(folder))
    return sum(len(rows) for path, rows in chunk_files(plan, folder).items() if path.name in names)


def is_done(plan: Plan, folder: Path) -> bool:
    """True where every chunk is there."""
    return rows_done(plan, folder) == len(plan.rows.table)


def claim_chunks(plan: Plan, folder: Path, recipe: Recipe) -> Iterator[tuple[Path, range]]:
    """The chunks to write, each to the rank that asks first: a slow one holds up no other.

    Of those of an earlier launch the ranks share out the reading: what is not as it was written is written again.
    """
    i, n = recipe.extract.shard or (0, 1)
    for path, rows in list(chunk_files(plan, folder).items())[i::n]:
        try:
            os.close(os.open(writing(folder, recipe) / f"{path.stem}.claim", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        if path.exists():
            with at_any_length("the reading of chunks of an earlier launch"):
                why = damage(path)
            if why is None:
                continue
            logger.warning("%s %s; it is written again", path, why, main_process_only=False)
            path.unlink()
        yield path, rows


def finish(
    plan: Plan,
    folder: Path,
    *,
    recipe: Recipe,
    request: Mapping[str, Any],
    features: Features,
    record: Mapping[str, Any],
) -> None:
    """Make the chunk files a set that `load_from_disk` opens; of launches that come here at once one is enough.

    `record` says what the set was made with, for the reader.
    """
    try:
        write_rest(plan, folder, recipe=recipe, request=request, features=features, record=record)
    except FileNotFoundError:
        if not (folder / PROVENANCE).exists():  # else another launch was faster
            raise
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)


def write_rest(
    plan: Plan,
    folder: Path,
    *,
    recipe: Recipe,
    request: Mapping[str, Any],
    features: Features,
    record: Mapping[str, Any],
) -> None:
    """Write what stands beside the chunk files; `provenance.json`, the last, says that the set is whole."""
    total, aside, files = Account(), writing(folder, recipe), {}
    for path in chunk_files(plan, folder):
        account, files[path.name] = read_account(path)
        total.add(account)
    assert total.rows_in == total.rows_out + len(total.bad) == len(plan.rows.table)
    compat = request["compat"]
    state = {
        "_data_files": [{"filename": name} for name in files],
        "_fingerprint": fingerprint(request)[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": "train",
    }
    write_durably(folder / DATASET_STATE_JSON_FILENAME, json.dumps(state, indent=2), aside=aside)
    DatasetInfo(features=features).write_to_directory(str(aside), pretty_print=True)
    save_recipe(recipe, aside / "recipe.yaml")
    for name in (DATASET_INFO_FILENAME, "recipe.yaml"):
        move_durably(aside / name, folder / name)
    lines = [json.dumps(bad, ensure_ascii=False) + "\n" for bad in total.bad]
    write_durably(folder / "bad_rows.jsonl", "".join(lines), aside=aside)
    counts = vars(total) | {"bad": len(total.bad), "num_bytes": sum(file["bytes"] for file in files.values())}
    for name in (DATASET_STATE_JSON_FILENAME, DATASET_INFO_FILENAME):
        files[name] = written(folder / name)
    record = {"request": request, "counts": counts, "files": files, **record}
    provenance = {"compat": compat, "fingerprint": fingerprint(compat), "record": record}
    write_durably(folder / PROVENANCE, json.dumps(provenance, indent=2, ensure_ascii=False), aside=aside)


def record_of(recipe: Recipe, models: Models) -> dict[str, Any]:
    """What a set was made with, for the reader; never compared."""
    from importlib.metadata import version

    libraries = ("torch", "torchvision", "transformers", "diffusers", "datasets", "pillow")
    return {
        "model": recipe.model,
        "revision": recipe.revision,
        "versions": {name: version(name) for name in libraries},
        # there is a second one for pictures, slightly different
        "processor": type(getattr(models.processor, "image_processor", models.processor)).__name__,
        "dtype": str(models.encoder.model.dtype).removeprefix("torch."),
        "device": models.encoder.device.type,
        "threads": torch.get_num_threads(),
        "recipe": as_dict(recipe),
    }
