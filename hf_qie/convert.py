"""Embeddings that FireRed-Image-Edit extracted to embedding sets; no model is run.

    python hf_qie/convert.py recipe.yaml [key.of.the.recipe=value ...] [--empty_text null_text_embedding.pt]

tasks.<name>.data names the JSONL files that its extraction wrote, whose rows name `.pt` files, and
tasks.<name>.columns.target their target, `edit_image`. Leaves one set a task under extract.output_dir, as
hf_qie/extract.py does. Such files hold no latents: training reads the pictures, in the sizes of this recipe, and
encodes them. Nor do they say how they were computed: training takes them with a warning.
--empty_text: the states of the empty text, for rows without pictures, which name none.
Started again, it goes on where it stopped.
Exit codes: 0, 3 (more bad rows than extract.max_bad_share; the good ones are kept), 1 (anything else).
"""

import logging
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_qie.config.recipe import Recipe, load_recipe
from hf_qie.errors import InputError
from hf_qie.runtime.cli import Options, run_script, to_path
from hf_qie.runtime.ranks import world_size

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from hf_qie.extraction.firered import Foreign
    from hf_qie.extraction.manifest import Counts

WINDOW_ROWS = 16  # held before they are written: a row has megabytes


def main(argv: list[str]) -> int:
    """Convert every task of the recipe that has data; returns the exit code."""
    parser = Options()
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--empty_text", type=to_path)
    arguments = parser.parse_intermixed_args(argv)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    recipe = recipe.model_copy(update={"extract": recipe.extract.model_copy(update={"latents": False})})
    if arguments.empty_text and not arguments.empty_text.is_file():
        raise InputError(f"--empty_text: no file {arguments.empty_text}")
    with tempfile.TemporaryDirectory(prefix="hf_qie-rows-") as folder:
        sources = open_tasks(recipe, Path(folder), empty_text=arguments.empty_text)
    return convert(recipe, sources)


def open_tasks(recipe: Recipe, folder: Path, *, empty_text: Path | None) -> dict[str, "Foreign"]:
    """Rows and files of every task that has data, checked; raises InputError."""
    from hf_qie.extraction.estimate import encoder_width
    from hf_qie.extraction.firered import has_inverse_files, open_foreign
    from hf_qie.extraction.plan import make_plan, own_tasks
    from hf_qie.models.base import read_family

    family, sources = read_family(recipe.model, revision=recipe.revision), {}
    width = encoder_width(recipe.model, revision=recipe.revision)
    for name, task in own_tasks(recipe).items():
        plan = make_plan(recipe, task, family, folder, refuse=True)
        foreign = open_foreign(plan, folder, width=width, empty_text=empty_text)
        if not has_inverse_files(foreign):  # rows have inverse captions all the same
            extract = plan.extract.model_copy(update={"inverse": False})
            foreign = replace(foreign, plan=replace(plan, extract=extract))
        sources[name] = foreign
    return sources


def convert(recipe: Recipe, sources: Mapping[str, "Foreign"]) -> int:
    """Write the sets of all tasks; returns the exit code."""
    from hf_qie.data.provenance import read_provenance
    from hf_qie.extraction.run import TOO_MANY_BAD, are_finished, check_disk, has_too_many_bad
    from hf_qie.hub.publish import open_repo, push_unless_bad

    if world_size() > 1:
        raise InputError("hf_qie/convert.py: runs no model and is one process; start it with python")
    if recipe.extract.push_to_hub:
        open_repo(recipe.extract)  # finds out before the work whether the sets can be published
    plans = {name: foreign.plan for name, foreign in sources.items()}
    check_disk(recipe, next(iter(plans.values())).family, plans)
    logger, code = logging.getLogger("hf_qie.convert"), 0
    folders = {name: Path(recipe.extract.output_dir, name) for name in sources}
    for name, foreign in sources.items():
        started, folder = time.monotonic(), folders[name]
        if not make_set(foreign, recipe):
            logger.info("%s: chunks are left to other launches; the one that writes the last finishes the set", name)
            continue
        counts = read_provenance(folder)["record"]["counts"]
        logger.info(
            "%s: %s rows in, %s out, %s bad%s; %s MB in %.1f minutes; left in %s",
            name,
            *(f"{counts[key]:,}" for key in ("rows_in", "rows_out", "bad")),
            f" (listed in {folder / 'bad_rows.jsonl'})" if counts["bad"] else "",
            f"{counts['num_bytes'] / 1e6:,.1f}",
            (time.monotonic() - started) / 60,
            folder,
        )
        if has_too_many_bad(recipe, folder, tell=True):
            code = TOO_MANY_BAD
    if recipe.extract.push_to_hub and are_finished(folders.values()):
        push_unless_bad(recipe, code)
    return code


def make_set(foreign: "Foreign", recipe: Recipe) -> bool:
    """Make one set; whether it is complete now."""
    from tqdm import tqdm

    from hf_qie.extraction.firered import dtype_in
    from hf_qie.extraction.set_writer import SetWriter, request_of

    plan = foreign.plan
    recipe = recipe.model_copy(update={"extract": plan.extract})
    set_writer = SetWriter(plan, request_of(plan, compat_of(), recipe, dtype=dtype_in(foreign)), recipe=recipe)
    set_writer.open()
    if set_writer.is_finished:
        return True
    with (
        ThreadPoolExecutor(plan.extract.num_workers, "reader") as readers,
        tqdm(desc=plan.task.name, unit="row", total=len(foreign.table)) as bar,
    ):
        for path, rows, lock in set_writer.claims():
            try:
                write_chunk(foreign, path, rows, part=set_writer.part(path), readers=readers)
            finally:
                lock.release()
            bar.update(len(rows))
    set_writer.finish(plan.features(foreign.width), record_of(foreign, recipe))
    return set_writer.is_finished


def compat_of() -> dict[str, Any]:
    """What is known of how the states were computed: nothing; and of the VAE: that there was none."""
    from hf_qie.data.provenance import FORMAT_VERSION, UNKNOWN

    unknown = ("encoder", "processor", "templates", "vlm_area_px", "resampling", "positions", "drop_caption")
    return {"format": FORMAT_VERSION, "vae": {}} | dict.fromkeys(unknown, UNKNOWN)


def record_of(foreign: "Foreign", recipe: Recipe) -> dict[str, Any]:
    """What a set was made with, for the reader; never compared."""
    from importlib.metadata import version

    from hf_qie.config.recipe import as_dict
    from hf_qie.data.provenance import UNKNOWN
    from hf_qie.extraction.firered import dtype_in

    return {
        "model": UNKNOWN,
        "revision": None,
        "versions": {name: version(name) for name in ("torch", "datasets", "pillow")},
        "processor": UNKNOWN,
        "dtype": dtype_in(foreign),
        "device": UNKNOWN,
        "threads": UNKNOWN,
        "converted_from": ".pt files of another trainer",
        "recipe": as_dict(recipe),
    }


def write_chunk(foreign: "Foreign", path: Path, rows: range, *, part: Path, readers: "Executor") -> None:
    """Write rows into the file `part`, which becomes `path` once it is complete and its manifest is on disk."""
    from datasets.arrow_writer import ArrowWriter

    from hf_qie.data.schema import to_table
    from hf_qie.extraction.manifest import Counts, complete_chunk

    features, counts = foreign.plan.features(foreign.width), Counts(rows_in=len(rows))
    with ArrowWriter(features=features, path=str(part)) as writer:
        for first in range(rows.start, rows.stop, WINDOW_ROWS):
            window = foreign.plan.rows.table.select(range(first, min(first + WINDOW_ROWS, rows.stop)))
            good = list(
                filter(None, map(partial(keep, foreign, counts), window, readers.map(foreign.columns, window)))
            )
            if good:
                writer.write_table(to_table(good, features))
        writer.finalize()
    complete_chunk(part, path, counts)


def keep(foreign: "Foreign", counts: "Counts", row: Mapping[str, Any], columns: Any) -> dict[str, Any] | None:
    """The columns of a good row; a bad one is listed, or stops the run where the recipe says so."""
    from hf_qie.data.samples import BadRow

    if not isinstance(columns, BadRow):
        counts.rows_out += 1
        counts.rows_without_caption += not any(row["texts"][name] for name in foreign.plan.task.columns.captions)
        return columns
    if foreign.plan.extract.on_bad_row == "fail":
        raise InputError(
            f"{foreign.table[row['row']]['where']}: {columns.named}; mend it, or set extract.on_bad_row: skip to list "
            "such rows and go on"
        ) from columns
    bad = {"row": row["row"], "column": columns.column, "path": columns.path, "reason": columns.reason}
    counts.bad.append(bad)
    return None


if __name__ == "__main__":
    run_script(main)
