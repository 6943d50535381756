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
from uuid import uuid4

import numpy as np
import torch
from accelerate.logging import get_logger
from datasets import DatasetInfo, Features
from datasets.config import DATASET_INFO_FILENAME, DATASET_STATE_JSON_FILENAME

from hf_qie.config.recipe import Recipe, as_dict, save_recipe
from hf_qie.data.provenance import PROVENANCE, files_of, fingerprint, read_provenance, request_differences
from hf_qie.errors import InputError
from hf_qie.extraction.chunk_writer import Models
from hf_qie.extraction.manifest import REQUEST, UNFINISHED, Account, damage, read_account
from hf_qie.extraction.preprocess import Plan
from hf_qie.extraction.reuse import (
    ROW_DIGESTS,
    is_interrupted,
    read_digests,
    read_request,
    set_aside,
    set_aside_in,
    share,
    write_digests,
)
from hf_qie.runtime.alive import at_any_length
from hf_qie.runtime.device import AUTO
from hf_qie.runtime.files import check_sizes, move_durably, write_durably, written
from hf_qie.runtime.lock import in_turn, lock_of, refuse_holder

logger = get_logger(__name__)


def request_of(plan: Plan, compat: Mapping[str, Any], recipe: Recipe, *, dtype: torch.dtype | str) -> dict[str, Any]:
    """All that decides the content of a set; a folder is only gone on with if this is unchanged.

    `dtype`: what encoder and VAE compute in. Not the batch sizes, though they move the last bits: who runs out of
    memory may go on with smaller ones.
    """
    task, settings = plan.task, as_dict(recipe.extract)
    roots = [task.image_root] if task.image_root else sorted({str(Path(name).parent) for name in task.data})
    sizes = {"vae_area_px": plan.source_area_px, "drop_caption": recipe.extract.drop_caption}
    compat = dict(compat) | {field: compat.get(field, value) for field, value in sizes.items()}
    request = {"compat": compat, "data": plan.rows.digest, "identity": plan.rows.identity}
    request |= {"image_root": roots, "t2i": task.t2i}
    request |= {"columns": as_dict(recipe.tasks[task.name].columns)}  # as lists of captions may grow, row by row
    request |= {"dtype": str(dtype).removeprefix("torch.")}
    return request | {name: settings[name] for name in ("image_sample_size", "inverse", "latents", "chunk_rows")}


def writing(folder: Path, recipe: Recipe) -> Path:
    """Where the chunks of this launch lie, and the claims to them, until they are whole."""
    i, n = recipe.extract.shard or (0, 1)
    return folder / UNFINISHED / f"writing-{i}-of-{n}"


def open_folder(
    folder: Path, request: Mapping[str, Any], *, recipe: Recipe, digests: np.ndarray | None = None
) -> None:
    """Make `folder` ready for `request`: new, or gone on with where an earlier run with the same request stopped.

    `digests[rows, 16]` uint8, of the rows: where nothing but the data differ, what was made of the others is set aside
    to take over the rows that are the same. Raises InputError for a folder made from something else, unless
    `extract.overwrite` is set.
    """
    with in_turn(folder):  # shards start and end at once
        open_in_turn(folder, request, recipe=recipe, digests=digests)


def open_in_turn(folder: Path, request: Mapping[str, Any], *, recipe: Recipe, digests: np.ndarray | None) -> None:
    """What `open_folder` does, while no other launch opens or ends the set."""
    shutil.rmtree(deleted(folder), ignore_errors=True)  # a launch was killed at it
    found = read_request(folder)
    differing = request_differences(found or request, request)
    is_finished = (folder / PROVENANCE).exists() and not is_interrupted(folder)
    if differing == ["dtype"] and recipe.extract.dtype == AUTO and is_finished:
        differing = []  # such a set is right whatever device opens it
    if is_remade(folder, request, digests):
        if differing and not (folder / PROVENANCE).exists():
            refuse_sharers(folder, recipe)
        set_aside(folder)
    elif differing:
        refuse_or_delete(folder, found, request, differing, recipe)
    elif found is None and folder.exists() and any(path.name != UNFINISHED for path in folder.iterdir()):
        raise InputError(f"{folder}: holds files that are no embedding set; give another extract.output_dir")
    if (folder / PROVENANCE).exists():
        clean_up(folder)
        check_sizes(folder, files_of(read_provenance(folder)))
        return
    shutil.rmtree(writing(folder, recipe), ignore_errors=True)  # of a launch that was killed
    writing(folder, recipe).mkdir(parents=True)
    if read_request(folder) is None:
        if digests is not None:
            write_digests(digests, folder / UNFINISHED / ROW_DIGESTS, aside=writing(folder, recipe))
        write_durably(folder / REQUEST, json.dumps(request))


def deleted(folder: Path) -> Path:
    """The name of a set under which it is deleted: half gone under its own, it would pass for a whole one."""
    return folder.with_name(f".{folder.name}-deleted")


def refuse_sharers(folder: Path, recipe: Recipe) -> None:
    """Raise InputError where another launch is at work on a shard of an unfinished set, of data as they were."""
    for place in (folder / UNFINISHED).glob("writing-*-of-*"):
        lock = lock_of(folder, place.name.removeprefix("writing-"))
        with suppress(FileNotFoundError):  # nobody holds it
            since = lock.with_name(f"{lock.name}.json").stat().st_mtime_ns
            if place == writing(folder, recipe) or place.stat().st_mtime_ns < since:
                continue  # this launch, or one that has yet to open the set
            refuse_holder(folder, lock, remedy="end it: the data or images of the set have changed since it began")


def is_remade(folder: Path, request: Mapping[str, Any], digests: np.ndarray | None) -> bool:
    """Whether a set differs in its data alone and is to be made anew of what it has.

    Where one is finished, there or set aside, only if some rows are the same; with the same data only if a launch was
    killed while it set aside what is there.
    """
    found = read_request(folder)
    differing = request_differences(found or request, request)
    if found is None or digests is None or differing not in ([], ["data"]):
        return False
    if not differing:
        return is_interrupted(folder)
    sets = [folder, *set_aside_in(folder)]
    if any((one / PROVENANCE).exists() for one in sets):  # a finished one is not given up for data of other rows
        return any(share(read_digests(one), digests) for one in sets)
    return True


def refuse_or_delete(
    folder: Path, found: Mapping[str, Any], request: Mapping[str, Any], differing: list[str], recipe: Recipe
) -> None:
    """Raise InputError for a set that is made from something else, or delete it where the recipe says so."""
    if not recipe.extract.overwrite:
        fields = ", ".join(differing)
        if differing == ["data"] and (old := read_digests(folder)) is not None:
            same = found.get("identity") == request.get("identity")
            what = "size or time of their images" if same else "the data"
            fields += f" ({what} changed in all of its {len(old):,} rows)"
        raise InputError(
            f"{folder}: was made with another {fields}; give another extract.output_dir, or set "
            "extract.overwrite: true to delete it and start again"
        )
    with suppress(FileNotFoundError):  # several launches may start at once
        folder.rename(deleted(folder))
    shutil.rmtree(deleted(folder), ignore_errors=True)


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
                why = damage(path, data=plan.rows.digest)
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
    """Make the chunk files a set that `load_from_disk` opens; of launches that come here at once the first one does.

    `record` says what the set was made with, for the reader.
    """
    with in_turn(folder):
        if not (folder / PROVENANCE).exists() and is_done(plan, folder):  # nobody has set them aside since
            write_rest(plan, folder, recipe=recipe, request=request, features=features, record=record)
        if (folder / PROVENANCE).exists():
            clean_up(folder)


def clean_up(folder: Path) -> None:
    """Delete what a finished set needs no more; half of what was set aside would pass for a move that was killed."""
    for before in set_aside_in(folder):
        before.rename(before.with_name(f"deleted-{uuid4().hex}"))
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
        try:
            account, files[path.name] = read_account(path, data=plan.rows.digest)
        except ValueError as error:
            raise InputError(f"{path} {error}; start again") from error
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
    names = [DATASET_STATE_JSON_FILENAME, DATASET_INFO_FILENAME]
    if (digests := read_digests(folder)) is not None:
        write_digests(digests, folder / ROW_DIGESTS, aside=aside)
        names.append(ROW_DIGESTS)
    for name in names:
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
