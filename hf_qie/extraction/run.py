"""A launch of RUN 1: rank 0 reads the data and opens the sets, then every rank writes chunks until none is left.

Ranks, and launches that share a set, share locks on its chunks and nothing else. Whoever writes the last chunk
finishes the set.
"""

import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import datasets
import torch
from tqdm import tqdm

from hf_qie.config.recipe import Recipe, Task, as_dict
from hf_qie.data.mixture import check_shared_prefix
from hf_qie.data.provenance import PROVENANCE, check_weight_files, checkpoint_compat, read_provenance
from hf_qie.data.readers import open_data
from hf_qie.data.samples import most_bad, open_rows
from hf_qie.extraction.chunk_writer import ChunkWriter, Models
from hf_qie.extraction.estimate import check_space, estimate_bytes
from hf_qie.extraction.manifest import STAGING
from hf_qie.extraction.memory import Forecast, forecast
from hf_qie.extraction.plan import Plan, family_of_recipe, make_plan, open_processor, own_tasks, plan_of
from hf_qie.extraction.reuse import find_reuse
from hf_qie.extraction.set_writer import SetWriter, check_request, request_of, set_lock
from hf_qie.models.base import Family, read_family
from hf_qie.runtime.cli import logged_from_any_rank
from hf_qie.runtime.device import compute_dtype, free_bytes, own_device
from hf_qie.runtime.files import move_durably
from hf_qie.runtime.lock import in_turn
from hf_qie.runtime.ranks import from_rank_0, rank

# torch reads it at its first attention on a GPU: else it prefers cuDNN's on Hopper, which plans some 35 ms for a new
# shape, and nearly every batch has one
CUDNN_LAST = "TORCH_CUDNN_SDPA_DEPRIORITIZED"
THREADS = 1  # per rank, whatever the launch: another number changes the last bit of some latents
TOO_MANY_BAD = 3  # exit code
ROWS = "rows.arrow"  # in the staging folder of a set: the rows of its task, for every rank
LIBRARIES = ("torch", "torchvision", "transformers", "diffusers", "datasets", "pillow")

logger = logging.getLogger(__name__)


def extract(recipe: Recipe) -> tuple[int, bool]:
    """Do this process's part in the sets of a recipe.

    Returns its exit code, and whether it finished the last set; where all were finished before, rank 0 did.
    """
    torch.set_num_threads(THREADS)
    datasets.disable_progress_bars()
    check_shared_prefix(recipe)  # of training, which would find it out after all of this
    family, tasks, device = family_of_recipe(recipe), own_tasks(recipe), own_device()
    opened = from_rank_0(lambda: open_sets(recipe, tasks, family, device))
    memory = next((Forecast(**known["memory"]) for known in opened.values() if "memory" in known), None)
    load = cache(lambda dtype: load_models(recipe, family, dtype=getattr(torch, dtype), device=device, memory=memory))
    is_last = rank() == 0 and not opened
    for name, known in opened.items():
        request, has_inverse = known["request"], known["has_inverse"]
        if plan := open_plan(recipe, tasks[name], family, request=request, has_inverse=has_inverse):
            is_last = write_set(SetWriter(plan, known["request"]), load, device) or is_last
    return exit_code(recipe), is_last


def open_sets(recipe: Recipe, tasks: Mapping[str, Task], family: Family, device: torch.device) -> dict[str, Any]:
    """Read the data of all tasks and open their sets; returns what every rank needs of each that is not finished."""
    with TemporaryDirectory(prefix="hf_qie-rows-") as name:
        folder, opened = Path(name), {}
        plans = {name: make_plan(recipe, task, family, folder, refuse=True) for name, task in tasks.items()}
        check_disk(plans)
        own = read_family(recipe.model, revision=recipe.revision)
        if (side := recipe.extract.source_sample_size) and side**2 != own.vae_area_px:
            logger.warning(
                "extract.source_sample_size: sources of %d x %d pixels, the stock pipeline shows the %s %s pixels; "
                "edits have to be sampled at the size they were trained at",
                *(side, side, "encoder and the VAE" if own.one_resize else "VAE", f"{own.vae_area_px:,}"),
            )
        if family.license_notice:
            logger.warning("%s: %s", recipe.model, family.license_notice)
        compat = checkpoint_compat(recipe.model, revision=recipe.revision, family=family)
        dtype = compute_dtype(recipe.extract.dtype, device)
        for name, plan in plans.items():
            writer = SetWriter(plan, request_of(plan, compat, dtype=dtype))
            writer.open()
            if writer.is_finished:
                log_set(recipe, writer.folder)
                continue
            table = writer.staging / ROWS
            if not table.exists():  # by an earlier launch, of the same data
                part = table.with_name(f"rows-{uuid4().hex}.part")
                move_durably(Path(shutil.copyfile(folder / f"{name}.arrow", part)), table)
            opened[name] = {"request": writer.request, "has_inverse": plan.rows.has_inverse}
        if opened and free_bytes(device) is not None:
            memory = forecast_memory({name: plans[name] for name in opened}, dtype=dtype)
            opened = {name: known | {"memory": memory} for name, known in opened.items()}
    return opened


def forecast_memory(plans: Mapping[str, Plan], *, dtype: torch.dtype) -> dict[str, int]:
    """The forecast for a device, as JSON holds it."""
    first = next(iter(plans.values()))
    processor = first.family.load_processor(first.recipe.model, revision=first.recipe.revision)
    found = forecast(plans, processor, dtype=dtype)
    logger.info("%s", found)
    return asdict(found)


def open_plan(
    recipe: Recipe, task: Task, family: Family, *, request: Mapping[str, Any], has_inverse: bool
) -> Plan | None:
    """The plan of a set that rank 0 has opened; None where others have finished it meanwhile."""
    folder = Path(recipe.extract.output_dir, task.name)
    with set_lock(folder):  # its rows are deleted when it is finished
        check_request(folder, request)
        if are_finished([folder]):
            return None
        stored = open_data(task, None)[1]
        known = {"has_inverse": has_inverse, "digest": request["data"], "identity": request["identity"]}
        return plan_of(recipe, task, family, open_rows(task, folder / STAGING / ROWS, stored=stored, **known))


def check_disk(plans: Mapping[str, Plan]) -> None:
    """Find out before a model is loaded whether the disk can hold the sets; raises InputError."""
    first = next(iter(plans.values()))
    processor = open_processor(first.recipe, first.family)
    logger.info(check_space({name: estimate_bytes(plan, processor) for name, plan in plans.items()}, plans))


def load_models(
    recipe: Recipe, family: Family, *, dtype: torch.dtype, device: torch.device, memory: Forecast | None = None
) -> Models:
    """Processor, prompt encoder and, where latents are stored, VAE of the checkpoint, on this rank's device.

    By the forecast `memory` as much of the encoder lies there as fits; raises InputError where too little would.
    """
    os.environ.setdefault(CUDNN_LAST, "1")
    where = {"revision": recipe.revision, "dtype": dtype, "device": device}
    free = free_bytes(device)
    room = memory.room(free, device) if memory and free is not None else math.inf
    parts = family.compat_folders
    check_weight_files(recipe.model, [*parts["encoder"], *(parts["vae"] if recipe.extract.latents else ())])
    return Models(
        processor=family.load_processor(recipe.model, revision=recipe.revision),
        encoder=family.load_encoder(recipe.model, room_bytes=room, **where),
        latents=family.load_vae(recipe.model, **where) if recipe.extract.latents else None,
    )


def write_set(
    writer: SetWriter,
    load: Callable[[str], Models],
    device: torch.device,
    *,
    kind: type[ChunkWriter] = ChunkWriter,
    known: Mapping[str, Any] | None = None,
) -> bool:
    """Write chunks of a set until none is left, and finish it if no chunk is missing.

    `load` gives the models of a chunk writer of that `kind` in a dtype; `known` takes the place of what `record_of`
    says. Returns whether this process finished the last set of the recipe.
    """
    started, plan = time.monotonic(), writer.plan
    write_chunks(writer, lambda: load(writer.request["dtype"]), kind)
    with in_turn(writer.folder.with_name(".finish.lock")):  # of processes that finish two sets one is the last
        is_done = writer.finish(lambda: record_of(writer, device) | (known or {}))
        is_last = is_done and are_finished(writer.folder.with_name(name) for name in own_tasks(plan.recipe))
    if is_done:
        with logged_from_any_rank():
            log_set(plan.recipe, writer.folder, minutes=(time.monotonic() - started) / 60)
    elif not writer.is_finished:
        logger.info(
            "%s: chunks are left to other processes, which have locks in %s; the one that writes the last finishes it",
            *(plan.task.name, writer.staging),
        )
    return is_last


def write_chunks(writer: SetWriter, load: Callable[[], Models], kind: type[ChunkWriter] = ChunkWriter) -> None:
    """Write chunks that are not there yet until none is left; the bar of rank 0 shows what all ranks have done."""
    claims, plan = writer.claims(), writer.plan
    first = next(claims, None)
    if first is None:
        return
    if reuse := find_reuse(plan) if writer.can_reuse else None:
        logger.info("%s: its data or images changed: %s", plan.task.name, reuse)
    total, done = len(plan.rows.table), writer.rows_done()
    with (
        ExitStack() as locks,
        tqdm(desc=plan.task.name, unit="row", total=total, initial=done, disable=rank() != 0) as bar,
        kind(plan, load(), progress=bar.update, reuse=reuse) as chunk_writer,
    ):

        def open_chunk(path, rows, lock):
            locks.callback(lock.release)
            return path, chunk_writer.open(rows), lock

        opened = [open_chunk(*first)]
        while opened:
            path, chunk, lock = opened.pop()
            chunk_writer.write(
                path,
                chunk,
                part=writer.part(path),
                near_end=lambda: opened.extend(open_chunk(*claim) for claim in islice(claims, 1)),
            )
            lock.release()
            bar.update(writer.rows_done() - bar.n)


def record_of(writer: SetWriter, device: torch.device) -> dict[str, Any]:
    """What a set was made with, for the reader; never compared."""
    recipe = writer.plan.recipe
    processor = writer.plan.family.load_processor(recipe.model, revision=recipe.revision)
    return {
        "model": recipe.model,
        "revision": recipe.revision,
        "versions": {name: version(name) for name in LIBRARIES},
        # there are two for images, slightly different
        "processor": type(getattr(processor, "image_processor", processor)).__name__,
        "dtype": writer.request["dtype"],
        "device": device.type,
        "threads": torch.get_num_threads(),
        "recipe": as_dict(recipe),
    }


def are_finished(folders: Iterable[Path]) -> bool:
    """Whether all sets are complete."""
    return all((folder / PROVENANCE).exists() for folder in folders)


def exit_code(recipe: Recipe) -> int:
    """Not 0 only once all sets are finished, as a launcher ends all ranks when one fails."""
    folders = [Path(recipe.extract.output_dir, name) for name in own_tasks(recipe)]
    is_bad = are_finished(folders) and any(has_too_many_bad(recipe, folder) for folder in folders)
    return TOO_MANY_BAD if is_bad else 0


def has_too_many_bad(recipe: Recipe, folder: Path) -> bool:
    """Whether more rows of a finished set are bad than `extract.max_bad_share` allows."""
    counts = read_provenance(folder)["record"]["counts"]
    return counts["bad"] > most_bad(recipe.extract, counts["rows_in"])


def log_set(recipe: Recipe, folder: Path, *, minutes: float | None = None) -> None:
    """Log what became of the rows of a finished set and what it cost; without `minutes` it was finished before."""
    counts = read_provenance(folder)["record"]["counts"]
    rows = f"{counts['rows_in']:,} rows in, {counts['rows_out']:,} out"
    rows += f" ({counts['rows_reused']:,} of them reused)" if counts.get("rows_reused") else ""
    rows += f", {counts['bad']:,} bad"
    rows += f" (listed in {folder / 'bad_rows.jsonl'})" if counts["bad"] else ""
    rows += f", {counts['rows_without_caption']:,} without caption" if counts.get("rows_without_caption") else ""
    if minutes is None:
        logger.info("%s: finished before: %s; delete %s to extract it again", folder.name, rows, folder)
    else:
        cost = f"{counts['num_bytes'] / 1e6:,.1f} MB in {minutes:.1f} minutes; "
        if num_tokens := counts["num_tokens"]:
            share, padding = num_tokens / counts["num_tokens_apart"], 1 - num_tokens / counts["num_tokens_padded"]
            cost += f"{num_tokens:,} tokens encoded, {share:.1%} of those of each caption by itself, "
            cost += f"{padding:.1%} padding; "
        logger.info("%s: %s; %sleft in %s", folder.name, rows, cost, folder)
    if has_too_many_bad(recipe, folder):
        logger.error("%s: more bad rows than extract.max_bad_share allows", folder.name)
