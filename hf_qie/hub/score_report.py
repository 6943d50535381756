"""What score.py makes of the rows that it scored: files, sheets of images, a table, figures for trackers, the best."""

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from hf_qie.config.recipe import Recipe, as_dict
from hf_qie.errors import InputError
from hf_qie.hub.scoring import Candidate, Scorer, weight_files
from hf_qie.hub.trained_run import SUMMARY
from hf_qie.measures.edits import KNOWN
from hf_qie.plots import Card, fit, labelled_sheet
from hf_qie.runtime.files import write_durably
from hf_qie.training.checkpoints import COMPLETE, STATE, mark_complete, read_complete
from hf_qie.training.evaluation import score_of_metric

logger = logging.getLogger("hf_qie.score")

LINES = "scores.jsonl"  # in the folder of the evaluation
BEST = "best"  # in the output folder
METRIC = "edit_score"  # by which candidates are ranked, unless training.metric_for_best_model is another score
SHOWN = 24  # rows of a sheet
BOX_PX = 256  # side of the square that an image is fitted into

Figures = Mapping[str, float]  # by score, and by score/task


def report(scorer: Scorer, chosen: Sequence[Candidate]) -> dict[str, Figures]:
    """Write the lines, the summary and a sheet for each candidate, and log the table; returns its figures by name."""
    rows = {one.name: scorer.rows(one) for one in chosen}
    figures = {
        name: scorer.edits.figures(scorer.numbers, [row["scores"] for row in found]) for name, found in rows.items()
    }
    metric = score_of_metric(scorer.recipe) or METRIC
    best = best_of(figures, metric) if len(figures) > 1 else None
    summary = {"metric": metric, "best": best, "rows": len(scorer.numbers)}
    settings = {"seed": scorer.recipe.seed, "arithmetic": scorer.arithmetic, **as_dict(scorer.recipe.evaluation)}
    steps = {one.name: {"step": one.step, "scores": figures[one.name]} for one in chosen}
    summary |= {"settings": settings, "checkpoints": steps}
    lines = [
        {"checkpoint": name, "task": row["task"], "row": row["row"], **row["scores"]}
        for name, found in rows.items()
        for row in found
    ]
    write_durably(scorer.folder / LINES, "".join(json.dumps(line) + "\n" for line in lines))
    write_durably(scorer.folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
    for candidate in chosen:
        _sheet(scorer, candidate, rows[candidate.name]).save(scorer.folder / f"{candidate.name}.png")
    logger.info("%d held-out rows\n%s", len(scorer.numbers), table(figures))
    logger.info("%s%s", f"best by {metric}: {best}; " * (best is not None), scorer.folder)
    return figures


def best_of(figures: Mapping[str, Figures], metric: str) -> str | None:
    """The candidate with the best figure, of equal ones the first; None where none has it."""
    sign = 1 if KNOWN[metric.partition("/")[0]].higher_is_better else -1
    named = {name: sign * found[metric] for name, found in figures.items() if metric in found}
    return max(named, key=named.get, default=None)


def table(figures: Mapping[str, Figures]) -> str:
    """A line for each candidate and, where there are several, each task; a column for each score that any has."""
    tasks = dict.fromkeys(name.partition("/")[2] for found in figures.values() for name in found)
    tasks = [task for task in tasks if not task or len(tasks) > 2]
    scores = [score for score in KNOWN if any(score in found for found in figures.values())]
    units = (f" ({KNOWN[score].unit})" if KNOWN[score].unit else "" for score in scores)
    lines = [("checkpoint", "task", *map("".join, zip(scores, units, strict=True)))]
    for name, found in figures.items():
        for task in tasks:
            values = (found.get(f"{score}/{task}" if task else score) for score in scores)
            lines.append((name, task or "all", *("" if value is None else f"{value:.3f}" for value in values)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([*map(str.ljust, line[:2], widths), *map(str.rjust, line[2:], widths[2:])]).rstrip()
        for line in lines
    )


def _sheet(scorer: Scorer, candidate: Candidate, rows: Sequence[Mapping[str, Any]]) -> Image.Image:
    """Rows as images: sources, output, target, and how far the last two differ."""
    edits, cards = scorer.edits, []
    places = np.linspace(0, len(rows) - 1, min(len(rows), SHOWN)).round().astype(int)
    images = [edits.images(scorer.numbers[place]) for place in places]
    most = max(map(len, images)) - 1
    for place, (target, *sources) in zip(places, images, strict=True):
        number = scorer.numbers[place]
        with Image.open(scorer.path(candidate, number).with_suffix(".png")) as file:
            output = file.copy()
        difference = ImageChops.difference(output.convert("RGB"), target.convert("RGB"))
        boxes = [*((f"source {i}", source) for i, source in enumerate(sources, 1)), *[("", None)] * most][:most]
        boxes += [("output", output), ("target", target), ("difference", difference)]
        scores = "   ".join(f"{name} {value:.3g}" for name, value in rows[place]["scores"].items())
        texts = edits.named_instruction(number) | {"scores": scores}
        boxes = [(label, image and fit(image, BOX_PX)) for label, image in boxes]
        cards.append(Card(heading=edits.name(number), boxes=boxes, texts=texts))
    return labelled_sheet(cards, title=f"{candidate.name}: {len(cards)} of {len(rows)} rows", box_px=BOX_PX)


def track(arguments: TrainingArguments, figures: Mapping[int, Figures], *, prefix: str = "eval_") -> None:
    """Log figures by step to the trackers of `training.report_to`, by default by the names of evaluation there."""
    state, control = TrainerState(), TrainerControl()
    for make in figures and get_reporting_integration_callbacks(arguments.report_to):
        tracker = make()
        tracker.on_train_begin(arguments, state, control)
        for step, found in figures.items():
            state.global_step = step
            tracker.on_log(arguments, state, control, logs={prefix + name: value for name, value in found.items()})
        tracker.on_train_end(arguments, state, control)


def keep_best(recipe: Recipe, chosen: Sequence[Candidate], figures: Mapping[str, Figures]) -> None:
    """`<output_dir>/best`: the weights of the best checkpoint, as export.py and sampling.py take a checkpoint.

    Files of a checkpoint are linked where the disk can. Raises InputError where no candidate has the score.
    """
    metric, output_dir = score_of_metric(recipe) or METRIC, Path(recipe.training["output_dir"])
    best = next((one for one in chosen if one.name == best_of(figures, metric)), None)
    if best is None:
        raise InputError(f"--keep_best: no row that was scored has {metric}; set training.metric_for_best_model")
    if best.folder is None:
        logger.warning("--keep_best: no checkpoint has a better %s than the base; nothing is kept", metric)
        return
    staging, was = output_dir / f"{BEST}.staging", {"identity": {}, "settings": {}}
    shutil.rmtree(staging, ignore_errors=True)
    for path in [*weight_files(best.folder), best.folder / STATE]:
        target = staging / path.relative_to(best.folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            if best.folder == output_dir:  # whose weights train.py may write anew, into the same file
                raise OSError
            os.link(path, target)
        except OSError:
            shutil.copyfile(path, target)
    (staging / SUMMARY).write_text(json.dumps(dict(figures[best.name]), indent=2) + "\n", encoding="utf-8")
    if (best.folder / COMPLETE).is_file():
        was = read_complete(best.folder)
    known = {key: was[key] for key in ("identity", "settings")}
    mark_complete(staging, step=best.step, **known)
    shutil.rmtree(output_dir / BEST, ignore_errors=True)
    staging.replace(output_dir / BEST)
    logger.info("%s: the weights of %s, the best by %s", output_dir / BEST, best.name, metric)
