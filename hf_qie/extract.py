"""RUN 1: edit pairs to embedding sets.

    accelerate launch hf_qie/extract.py recipe.yaml [key.of.the.recipe=value ...]

Runs the prompt encoder and the VAE once over every task of the recipe and leaves one embedding set a task under
extract.output_dir; open one with datasets.load_from_disk. With extract.push_to_hub the sets are then published.
Started again, it goes on where it stopped.
Exit codes: 0, 3 (more bad rows than extract.max_bad_share; the good ones are kept), 1 (anything else); `accelerate
launch` itself makes 1 of all but 0.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_qie.recipe import InputError, Recipe, Task, as_dict, load_recipe, run_script, save_recipe

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

    from hf_qie.chunks import Models
    from hf_qie.family import Family
    from hf_qie.prepare import Plan

THREADS = 1  # per rank, whatever the launch: another number changes the last bit of some latents
UNFINISHED = "unfinished"  # beside the chunks of a set until it is whole
REQUEST = f"{UNFINISHED}/request.json"  # what it is being made from
WRITING = f"{UNFINISHED}/writing"  # chunks that are not whole
TOO_MANY_BAD = 3  # exit code


def main(argv: list[str]) -> int:
    """Extract every task of the recipe that has data; returns the exit code."""
    recipe = load_recipe(argv[0], argv[1:])
    os.environ["OMP_NUM_THREADS"] = str(THREADS)  # before torch is imported: it sets the threads that torch starts
    from hf_qie.family import read_family

    family = read_family(recipe.model, revision=recipe.revision)
    with tempfile.TemporaryDirectory(prefix="hf_qie-rows-") as folder:
        plans = {name: make_plan(recipe, task, family, Path(folder)) for name, task in own_tasks(recipe).items()}
    code = extract(recipe, family, plans)  # the rows stay mapped without a name, and a killed run leaves none behind
    if recipe.extract.push_to_hub:
        push(recipe, list(plans), code)
    return code


def own_tasks(recipe: Recipe) -> dict[str, Task]:
    """The tasks to extract: those without a ready set. Raises InputError if there are none."""
    tasks = {name: task for name, task in recipe.tasks.items() if task.embeddings is None}
    if not tasks:
        raise InputError(f"{recipe.path}: every task has embeddings already; there is nothing to extract")
    return tasks


def make_plan(recipe: Recipe, task: Task, family: "Family", folder: Path) -> "Plan":
    """Read and check the data of a task, before any model is loaded."""
    from hf_qie.embeddings import source_area
    from hf_qie.prepare import Plan
    from hf_qie.rows import read_rows

    return Plan(
        task=task,
        family=family,
        extract=recipe.extract,
        rows=read_rows(task, folder=folder, max_sources=family.max_sources),
        source_area_px=source_area(family, recipe.extract.source_sample_size),
    )


def extract(recipe: Recipe, family: "Family", plans: Mapping[str, "Plan"]) -> int:
    """Write the sets of all plans; rank 0 opens and closes each, every rank does its share of the chunks."""
    from accelerate.logging import get_logger

    from hf_qie.embeddings import PROVENANCE, checkpoint_compat, read_provenance

    state = start(recipe)
    logger = get_logger("hf_qie.extract")  # run by path, this module is __main__
    if any(plan.source_area_px != family.vae_area_px for plan in plans.values()):
        logger.warning(
            "extract.source_sample_size: sources of %d x %d pixels, the stock pipeline shows the VAE %s pixels; "
            "edits have to be sampled at the size they were trained at",
            recipe.extract.source_sample_size,
            recipe.extract.source_sample_size,
            f"{family.vae_area_px:,}",
        )
    compat = checkpoint_compat(recipe.model, revision=recipe.revision, family=family)
    models, code = None, 0
    for name, plan in plans.items():
        started, folder = time.monotonic(), Path(recipe.extract.output_dir, name)
        request = request_of(plan, compat, recipe)
        if state.is_main_process:
            open_folder(folder, request, overwrite=recipe.extract.overwrite)
        state.wait_for_everyone()
        if (folder / PROVENANCE).exists():
            logger.info("%s: finished before, nothing to do; delete %s to extract it again", name, folder)
        else:
            models = models or load_models(recipe, family, device=state.device)
            write_chunks(plan, models, folder, rank=state.process_index, world_size=state.num_processes)
            state.wait_for_everyone()
            if state.is_main_process:
                finish(plan, folder, recipe=recipe, request=request, models=models)
            state.wait_for_everyone()
        counts = read_provenance(folder)["record"]["counts"]
        logger.info(closing_line(name, folder, counts, minutes=(time.monotonic() - started) / 60))
        if counts["bad"] > max(1, recipe.extract.max_bad_share * counts["rows_in"]):
            logger.error("%s: more bad rows than extract.max_bad_share allows", name)
            code = TOO_MANY_BAD
    return code


def start(recipe: Recipe) -> "PartialState":
    """Join the other ranks; where the sets are to be published, find out before the work whether they can be."""
    import datasets
    import torch
    from accelerate import PartialState

    from hf_qie.publish import open_repo

    # weeks, not minutes: ranks wait for each other only at the end of a task
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(weeks=4))
    torch.set_num_threads(THREADS)
    datasets.disable_progress_bars()
    if recipe.extract.push_to_hub and state.is_main_process:
        open_repo(recipe.extract)
    return state


def load_models(recipe: Recipe, family: "Family", *, device: "torch.device") -> "Models":
    """Processor, prompt encoder and VAE of the checkpoint, on this rank's device."""
    import torch

    from hf_qie.chunks import Models
    from hf_qie.encoder import Encoder, load_processor
    from hf_qie.latents import LatentEncoder

    where = {"revision": recipe.revision, "dtype": getattr(torch, recipe.extract.dtype), "device": device}
    return Models(
        processor=load_processor(recipe.model, family=family, revision=recipe.revision),
        encoder=Encoder(recipe.model, **where),
        latents=LatentEncoder(recipe.model, **where),
    )


def request_of(plan: "Plan", compat: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """All that decides the content of a set; a folder is only gone on with if this is unchanged.

    Not the batch sizes, though they move the last bits: who runs out of memory may go on with smaller ones.
    """
    task, settings = plan.task, as_dict(recipe.extract)
    roots = [task.image_root] if task.image_root else sorted({str(Path(name).parent) for name in task.data})
    compat = dict(compat) | {"vae_area_px": plan.source_area_px, "drop_caption": recipe.extract.drop_caption}
    request = {"compat": compat, "data": plan.rows.digest, "image_root": roots, "t2i": task.t2i}
    request |= {"columns": as_dict(task.columns)}
    return request | {name: settings[name] for name in ("image_sample_size", "inverse", "dtype", "chunk_rows")}


def open_folder(folder: Path, request: Mapping[str, Any], *, overwrite: bool) -> None:
    """Make `folder` ready for `request`: new, or gone on with where an earlier run with the same request stopped.

    Raises InputError for a folder made from something else, unless `overwrite` is set.
    """
    from hf_qie.embeddings import PROVENANCE, write_durably

    found = read_request(folder)
    if found is not None and found != request:
        before, now = ({**one, **one["compat"], "compat": None} for one in (found, request))
        differing = sorted(field for field in before.keys() | now.keys() if before.get(field) != now.get(field))
        if not overwrite:
            raise InputError(
                f"{folder}: was made with another {', '.join(differing)}; give another extract.output_dir, or set "
                "extract.overwrite: true to delete it and start again"
            )
        shutil.rmtree(folder)
    elif found is None and folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder}: holds files that are no embedding set; give another extract.output_dir")
    shutil.rmtree(folder / (UNFINISHED if (folder / PROVENANCE).exists() else WRITING), ignore_errors=True)
    if read_request(folder) is None:
        (folder / UNFINISHED).mkdir(parents=True, exist_ok=True)
        write_durably(folder / REQUEST, json.dumps(request))


def read_request(folder: Path) -> dict[str, Any] | None:
    """What the set in `folder`, finished or not, is made from; None where there is none."""
    from hf_qie.embeddings import PROVENANCE

    if (folder / PROVENANCE).exists():
        return json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))["record"]["request"]
    if (folder / REQUEST).exists():
        return json.loads((folder / REQUEST).read_text(encoding="utf-8"))
    return None


def chunk_files(plan: "Plan", folder: Path) -> dict[Path, range]:
    """Every chunk file of the set and the rows it holds; fixed by `chunk_rows`, whoever writes them."""
    num_rows, step = len(plan.rows.table), plan.extract.chunk_rows
    starts = range(0, num_rows, step)
    return {
        folder / f"data-{i:05d}-of-{len(starts):05d}.arrow": range(start, min(start + step, num_rows))
        for i, start in enumerate(starts)
    }


def account_path(path: Path) -> Path:
    """Where it says what became of the rows of a chunk file."""
    return path.parent / UNFINISHED / f"{path.stem}.json"


def write_chunks(plan: "Plan", models: "Models", folder: Path, *, rank: int, world_size: int) -> None:
    """Write this rank's chunks that are not there yet."""
    from tqdm import tqdm

    from hf_qie.chunks import ChunkWriter

    mine = list(chunk_files(plan, folder).items())[rank::world_size]
    todo = {path: rows for path, rows in mine if not path.exists()}
    name = plan.task.name if world_size == 1 else f"{plan.task.name} (rank {rank} of {world_size})"
    total = sum(len(rows) for _, rows in mine)
    done = total - sum(len(rows) for rows in todo.values())
    with (
        tqdm(desc=name, unit="row", total=total, initial=done, disable=rank != 0) as bar,
        ChunkWriter(plan, models, progress=bar.update) as writer,
    ):
        for path, rows in todo.items():
            writer.write(path, rows, account_path=account_path(path), aside=folder / WRITING / path.name)


def finish(plan: "Plan", folder: Path, *, recipe: Recipe, request: Mapping[str, Any], models: "Models") -> None:
    """Make the chunk files a set that `load_from_disk` opens; `provenance.json`, written last, says it is whole."""
    from datasets import DatasetInfo

    from hf_qie.chunks import Account
    from hf_qie.embeddings import PROVENANCE, fingerprint, write_durably

    files, total = chunk_files(plan, folder), Account()
    for path in files:
        total.add(Account(**json.loads(account_path(path).read_text(encoding="utf-8"))))
    assert total.rows_in == total.rows_out + len(total.bad) == len(plan.rows.table)
    compat = request["compat"]
    state = {
        "_data_files": [{"filename": path.name} for path in files],
        "_fingerprint": fingerprint(request)[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": "train",
    }
    write_durably(folder / "state.json", json.dumps(state, indent=2))
    DatasetInfo(features=plan.features(models.encoder.width)).write_to_directory(str(folder), pretty_print=True)
    lines = [json.dumps(bad, ensure_ascii=False) + "\n" for bad in total.bad]
    write_durably(folder / "bad_rows.jsonl", "".join(lines))
    save_recipe(recipe, folder / "recipe.yaml")
    counts = vars(total) | {"bad": len(total.bad), "num_bytes": sum(path.stat().st_size for path in files)}
    record = {"request": request, "counts": counts} | record_of(recipe, models)
    provenance = {"compat": compat, "fingerprint": fingerprint(compat), "record": record}
    write_durably(folder / PROVENANCE, json.dumps(provenance, indent=2, ensure_ascii=False))
    shutil.rmtree(folder / UNFINISHED)


def record_of(recipe: Recipe, models: "Models") -> dict[str, Any]:
    """What a set was made with, for the reader; never compared."""
    from importlib.metadata import version

    libraries = ("torch", "torchvision", "transformers", "diffusers", "datasets", "pillow")
    return {
        "model": recipe.model,
        "revision": recipe.revision,
        "versions": {name: version(name) for name in libraries},
        # there is a second one for pictures, slightly different
        "processor": type(getattr(models.processor, "image_processor", models.processor)).__name__,
        "dtype": recipe.extract.dtype,
        "device": models.encoder.device.type,
        "threads": THREADS,
        "recipe": as_dict(recipe),
    }


def closing_line(name: str, folder: Path, counts: Mapping[str, int], *, minutes: float) -> str:
    """One line on what became of the rows of a task, and what it cost."""
    bad = f"{counts['bad']:,} bad" + (f" (listed in {folder / 'bad_rows.jsonl'})" if counts["bad"] else "")
    empty = f", {counts['rows_without_caption']:,} without caption" if counts["rows_without_caption"] else ""
    share = counts["num_tokens"] / max(counts["num_tokens_apart"], 1)
    return (
        f"{name}: {counts['rows_in']:,} rows in, {counts['rows_out']:,} out, {bad}{empty}; "
        f"{counts['num_bytes'] / 1e6:,.1f} MB in {minutes:.1f} minutes; "
        f"{counts['num_tokens']:,} tokens run, {share:.3f} of one pass per prompt; left in {folder}"
    )


def push(recipe: Recipe, names: list[str], code: int) -> None:
    """Publish the finished sets, from one rank; not where too many of their rows are bad."""
    from accelerate import PartialState
    from accelerate.logging import get_logger

    from hf_qie.publish import push_sets

    logger = get_logger("hf_qie.extract")
    if code:
        logger.error("extract.push_to_hub: nothing is pushed; mend the bad rows, or raise extract.max_bad_share")
    elif PartialState().is_main_process:
        folders = {name: Path(recipe.extract.output_dir, name) for name in names}
        address = push_sets(folders, tasks=recipe.tasks, extract=recipe.extract)
        logger.info("pushed %s to %s", ", ".join(names), address)


if __name__ == "__main__":
    run_script(main)
