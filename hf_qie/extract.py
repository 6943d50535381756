"""RUN 1: edit pairs to embedding sets.

    accelerate launch [-q] hf_qie/extract.py recipe.yaml [key.of.the.recipe=value ...]

Runs the prompt encoder and the VAE once over every task of the recipe and leaves one embedding set a task under
extract.output_dir; open one with datasets.load_from_disk. With extract.push_to_hub the sets are then published.
Started again, it goes on where it stopped.
Exit codes: 0, 3 (more bad rows than extract.max_bad_share; the good ones are kept), 1 (anything else); `accelerate
launch` itself makes 1 of all but 0.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_qie.config.launch import check_ranks
from hf_qie.config.recipe import Recipe, load_recipe
from hf_qie.runtime.cli import run_script

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

    from hf_qie.extraction.chunk_writer import Models
    from hf_qie.extraction.preprocess import Plan
    from hf_qie.models.base import Family

THREADS = 1  # per rank, whatever the launch: another number changes the last bit of some latents
TOO_MANY_BAD = 3  # exit code


def main(argv: list[str]) -> int:
    """Extract every task of the recipe that has data; returns the exit code."""
    recipe = load_recipe(argv[0], argv[1:])
    os.environ["OMP_NUM_THREADS"] = str(THREADS)  # before torch is imported: it sets the threads that torch starts
    from hf_qie.extraction.plan import own_tasks, read_plans, rows_folder
    from hf_qie.models.base import read_family
    from hf_qie.runtime.alive import Alive
    from hf_qie.runtime.lock import held_by_launch

    family, tasks = read_family(recipe.model, revision=recipe.revision), own_tasks(recipe)
    state = start()
    remedy = "give another extract.output_dir, or an extract.shard that nobody works on"
    with held_by_launch(locks_of(recipe, tasks), remedy=remedy):
        with Alive(signs_folder(recipe)):
            try:
                plans = read_plans(recipe, tasks, family, state)
                code = extract(recipe, family, plans)
            finally:
                if state.is_main_process:
                    shutil.rmtree(rows_folder(recipe, tasks), ignore_errors=True)
        if recipe.extract.push_to_hub:
            push(recipe, list(plans), code)
    return code


def signs_folder(recipe: Recipe) -> Path:
    """Where the ranks of this launch tell each other that they are alive; no other launch holds its first set."""
    i, n = recipe.extract.shard or (0, 1)
    first = next(name for name, task in recipe.tasks.items() if task.embeddings is None)
    return Path(recipe.extract.output_dir, f"signs-of-life-{first}-{i}-of-{n}")  # no task can have this name


def locks_of(recipe: Recipe, tasks: Iterable[str]) -> dict[Path, Path]:
    """What this launch holds while it runs: its shard of each task's set, beside the set, which may be deleted."""
    from hf_qie.runtime.lock import lock_of

    i, n = recipe.extract.shard or (0, 1)
    folders = [Path(recipe.extract.output_dir, name) for name in tasks]
    return {folder: lock_of(folder, f"{i}-of-{n}") for folder in folders}


def extract(recipe: Recipe, family: "Family", plans: Mapping[str, "Plan"]) -> int:
    """Write the sets of all plans; returns the exit code."""
    from accelerate.logging import get_logger

    from hf_qie.data.provenance import PROVENANCE, checkpoint_compat, read_provenance
    from hf_qie.data.samples import most_bad
    from hf_qie.extraction.set_writer import request_of
    from hf_qie.hub.publish import open_repo
    from hf_qie.runtime.device import compute_dtype

    state = start()
    dtype = compute_dtype(recipe.extract.dtype, state.device)
    if recipe.extract.push_to_hub and state.is_main_process:
        open_repo(recipe.extract)  # finds out before the work whether the sets can be published
    if state.is_main_process:
        check_disk(recipe, family, plans)
    logger = get_logger("hf_qie.extract")  # run by path, this module is __main__
    if (side := recipe.extract.source_sample_size) and side**2 != family.vae_area_px:
        logger.warning(
            "extract.source_sample_size: sources of %d x %d pixels, the stock pipeline shows the VAE %s pixels; "
            "edits have to be sampled at the size they were trained at",
            *(side, side, f"{family.vae_area_px:,}"),
        )
    compat = checkpoint_compat(recipe.model, revision=recipe.revision, family=family)
    models = cache(partial(load_models, recipe, family, dtype=dtype, device=state.device))
    code = 0
    for name, plan in plans.items():
        started, folder = time.monotonic(), Path(recipe.extract.output_dir, name)
        is_new = make_set(plan, folder, recipe, request_of(plan, compat, recipe, dtype=dtype), models, state)
        if not (folder / PROVENANCE).exists():
            logger.info("%s: chunks are left to other launches; the one that does the last ends the set", name)
            continue
        counts = read_provenance(folder)["record"]["counts"]
        minutes = (time.monotonic() - started) / 60
        logger.info(closing_line(name, folder, counts, minutes=minutes) if is_new else old_line(name, folder, counts))
        if counts["bad"] > most_bad(recipe.extract, counts["rows_in"]):
            logger.error("%s: more bad rows than extract.max_bad_share allows", name)
            code = TOO_MANY_BAD
    return code


def make_set(
    plan: "Plan",
    folder: Path,
    recipe: Recipe,
    request: Mapping[str, Any],
    models: Callable[[], "Models"],
    state: "PartialState",
) -> bool:
    """Make one set, unless it was finished before; rank 0 opens and closes it, every rank does chunks."""
    from hf_qie.data.provenance import PROVENANCE
    from hf_qie.extraction.reuse import digests_of
    from hf_qie.extraction.set_writer import finish, is_done, open_folder, record_of
    from hf_qie.runtime.alive import at_any_length

    with at_any_length("the opening of a set"):
        if state.is_main_process:
            open_folder(folder, request, recipe=recipe, digests=digests_of(plan.rows.table))
        state.wait_for_everyone()
    if (folder / PROVENANCE).exists():
        return False
    with at_any_length("the loading of models"):
        loaded = models()
    write_chunks(plan, loaded, folder, recipe=recipe, rank=state.process_index)
    with at_any_length("the end of its chunks, waiting for those of others"):
        state.wait_for_everyone()
        if state.is_main_process and is_done(plan, folder):
            made = {"features": plan.features(loaded.encoder.width), "record": record_of(recipe, loaded)}
            finish(plan, folder, recipe=recipe, request=request, **made)
        state.wait_for_everyone()
    return True


def start() -> "PartialState":
    """Join the other ranks."""
    import datasets
    import torch
    from accelerate import PartialState

    # weeks, not minutes: ranks wait for the first one to read the data, and for each other at the end of a task
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(weeks=4))
    check_ranks(os.environ)
    torch.set_num_threads(THREADS)
    datasets.disable_progress_bars()
    return state


def check_disk(recipe: Recipe, family: "Family", plans: Mapping[str, "Plan"]) -> None:
    """Find out before a model is loaded whether the disk can hold the sets; raises InputError."""
    from accelerate.logging import get_logger

    from hf_qie.extraction.estimate import check_space, encoder_width, estimate_bytes
    from hf_qie.extraction.reuse import keeps_some
    from hf_qie.models.qwen_image.text_encoder import load_processor

    output_dir = Path(recipe.extract.output_dir)
    remade = [name for name, plan in plans.items() if keeps_some(output_dir / name, plan.rows)]
    processor = load_processor(recipe.model, family=family, revision=recipe.revision)
    width = encoder_width(recipe.model, revision=recipe.revision)
    num_bytes = {name: estimate_bytes(plan, processor, width=width) for name, plan in plans.items()}
    get_logger("hf_qie.extract").info(check_space(num_bytes, output_dir, remade=remade))


def load_models(recipe: Recipe, family: "Family", *, dtype: "torch.dtype", device: "torch.device") -> "Models":
    """Processor, prompt encoder and, where latents are stored, VAE of the checkpoint, on this rank's device."""
    from hf_qie.extraction.chunk_writer import Models
    from hf_qie.models.qwen_image.text_encoder import Encoder, load_processor
    from hf_qie.models.qwen_image.vae import LatentEncoder

    where = {"revision": recipe.revision, "dtype": dtype, "device": device}
    return Models(
        processor=load_processor(recipe.model, family=family, revision=recipe.revision),
        encoder=Encoder(recipe.model, **where),
        latents=LatentEncoder(recipe.model, **where) if recipe.extract.latents else None,
    )


def write_chunks(plan: "Plan", models: "Models", folder: Path, *, recipe: Recipe, rank: int) -> None:
    """Write chunks that are not there yet until none is left; the bar shows what all ranks have done."""
    from tqdm import tqdm

    from hf_qie.extraction.chunk_writer import ChunkWriter
    from hf_qie.extraction.reuse import find_kept
    from hf_qie.extraction.set_writer import chunk_files, claim_chunks, rows_done, writing

    kept = find_kept(folder, plan.rows.table, plan.features(models.encoder.width), task=plan.task.name)
    claims = claim_chunks(plan, folder, recipe)
    total, done = sum(map(len, chunk_files(plan, folder).values())), rows_done(plan, folder)
    with (
        tqdm(desc=plan.task.name, unit="row", total=total, initial=done, disable=rank != 0) as bar,
        ChunkWriter(plan, models, progress=bar.update, kept=kept) as writer,
    ):
        waiting = [(path, writer.open(rows)) for path, rows in islice(claims, 1)]
        while waiting:
            path, chunk = waiting.pop()
            writer.write(
                path,
                chunk,
                aside=writing(folder, recipe) / path.name,
                near_end=lambda: waiting.extend((path, writer.open(rows)) for path, rows in islice(claims, 1)),
            )
            bar.update(rows_done(plan, folder) - bar.n)


def old_line(name: str, folder: Path, counts: Mapping[str, int]) -> str:
    """One line on a set that there was nothing to do for."""
    from hf_qie.data.provenance import PROVENANCE
    from hf_qie.extraction.reuse import read_digests

    same = "data" if read_digests(folder) is None else "data and images"  # older sets do not know of their images
    finished = datetime.fromtimestamp((folder / PROVENANCE).stat().st_mtime)
    return (
        f"{name}: finished before, nothing to do; delete {folder} to extract it again. It was made until "
        f"{finished:%Y-%m-%d %H:%M} of the same {same}: {counts['rows_in']:,} rows in, "
        f"{counts['rows_out']:,} out, {counts['bad']:,} bad"
    )


def closing_line(name: str, folder: Path, counts: Mapping[str, int], *, minutes: float) -> str:
    """One line on what became of the rows of a task, and what it cost."""
    kept = f" ({counts['rows_kept']:,} of them kept)" if counts.get("rows_kept") else ""
    bad = f"{counts['bad']:,} bad" + (f" (listed in {folder / 'bad_rows.jsonl'})" if counts["bad"] else "")
    empty = f", {counts['rows_without_caption']:,} without caption" if counts["rows_without_caption"] else ""
    share = counts["num_tokens"] / max(counts["num_tokens_apart"], 1)
    padding = 1 - counts["num_tokens"] / max(counts["num_tokens_padded"], 1)
    return (
        f"{name}: {counts['rows_in']:,} rows in, {counts['rows_out']:,} out{kept}, {bad}{empty}; "
        f"{counts['num_bytes'] / 1e6:,.1f} MB in {minutes:.1f} minutes; "
        f"{counts['num_tokens']:,} tokens run, {share:.3f} of one pass per prompt, {padding:.1%} padding; "
        f"left in {folder}"
    )


def push(recipe: Recipe, names: list[str], code: int) -> None:
    """Publish the sets, from one rank; not where one is unfinished, or too many of its rows are bad."""
    from accelerate import PartialState
    from accelerate.logging import get_logger

    from hf_qie.data.provenance import PROVENANCE
    from hf_qie.hub.publish import push_sets

    logger = get_logger("hf_qie.extract")
    if not all(Path(recipe.extract.output_dir, name, PROVENANCE).exists() for name in names):
        logger.info("extract.push_to_hub: the launch that ends the last set pushes them")
    elif code:
        logger.error("extract.push_to_hub: nothing is pushed; mend the bad rows, or raise extract.max_bad_share")
    elif PartialState().is_main_process:
        folders = {name: Path(recipe.extract.output_dir, name) for name in names}
        address = push_sets(folders, tasks=recipe.tasks, extract=recipe.extract)
        logger.info("pushed %s to %s", ", ".join(names), address)


if __name__ == "__main__":
    run_script(main)
