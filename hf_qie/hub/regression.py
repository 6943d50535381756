"""What a fine-tune did to edits that it was not trained for: base and checkpoints on rows of other data."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import TrainingArguments

from hf_qie.config.recipe import Recipe, as_dict
from hf_qie.hub.foreign_rows import BLANK, embedded
from hf_qie.hub.score_report import BOX_PX, LINES, SHOWN, Figures
from hf_qie.hub.scoring import BASE, Candidate, Scorer
from hf_qie.hub.trained_run import EVALUATION, REGRESSION, SUMMARY
from hf_qie.measures.edits import FOREIGN, KNOWN, aggregate, psnr
from hf_qie.plots import Card, fit, labelled_sheet
from hf_qie.runtime.files import write_durably
from hf_qie.training.held_out_edits import HeldOutEdits, rgb

logger = logging.getLogger("hf_qie.score")

SHEET = "edits.png"  # in the folder of the data
ORDER = KNOWN | FOREIGN
WITHOUT_TARGET = {"kept_error": "changed", "drift": "drift", "zoom": "zoom"}  # scores with the source in its place


class ForeignEdits(HeldOutEdits):
    """Edits of rows that may have no target."""

    def has_target(self, number: int) -> bool:
        """Whether the data has a target of this row."""
        sources, target, _ = self._keys[number]
        return target not in sources and Path(target).name != BLANK

    def score(self, number: int, output: Image.Image) -> dict[str, float]:
        """Of a row without a target only what compares the output with its source."""
        found = super().score(number, output)
        if self.has_target(number):
            return found
        return {name: found[was] for was, name in WITHOUT_TARGET.items() if was in found}


class Regression(Scorer):
    """Edits rows of the data in `evaluation.regression` of a recipe, and scores them."""

    edits_class = ForeignEdits

    def __init__(self, recipe: Recipe, arguments: TrainingArguments):
        """Every rank makes one. Raises InputError where there are no rows to edit."""
        name = re.sub(r"[^\w.-]+", "-", Path(recipe.evaluation.regression.data[0]).name).strip("-.") or "data"
        folder = Path(arguments.output_dir, EVALUATION, REGRESSION, name)
        super().__init__(embedded(recipe, folder), arguments)
        self.folder = folder


def regression_report(scorer: Regression, chosen: Sequence[Candidate]) -> dict[str, Figures]:
    """Write lines, summary and a sheet, and log the table; returns the figures by name. `chosen` has the base."""
    rows, outputs = {one.name: scorer.rows(one) for one in chosen}, _outputs(scorer, chosen)
    for name in rows.keys() - {BASE}:
        for row, output, base in zip(rows[name], outputs[name], outputs[BASE], strict=True):
            row["scores"]["base_psnr"] = psnr(rgb(output), rgb(base))
    figures = {name: aggregate(row["scores"] for row in found) for name, found in rows.items()}
    data = scorer.recipe.evaluation.regression
    settings = {"seed": scorer.recipe.seed, "arithmetic": scorer.arithmetic, **as_dict(scorer.recipe.evaluation)}
    steps = {one.name: {"step": one.step, "scores": figures[one.name]} for one in chosen}
    summary = {"data": ", ".join(data.data), "rows": len(scorer.numbers), "settings": settings, "checkpoints": steps}
    lines = [{"checkpoint": name, "row": row["row"], **row["scores"]} for name, found in rows.items() for row in found]
    write_durably(scorer.folder / LINES, "".join(json.dumps(line) + "\n" for line in lines))
    write_durably(scorer.folder / SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    _sheet(scorer, outputs).save(scorer.folder / SHEET)
    logger.info("%d rows of %s\n%s", len(scorer.numbers), summary["data"], regression_table(figures))
    logger.info("%s", scorer.folder)
    return figures


def regression_table(figures: Mapping[str, Figures]) -> str:
    """A line for each score; a column for each candidate, and for each but the base one for what it differs by."""
    base, others = figures[BASE], {name: found for name, found in figures.items() if name != BASE}
    lines = [("score", BASE, *(title for name in others for title in (name, "difference")))]
    for score in (name for name in ORDER if any(name in found for found in figures.values())):
        unit = f" ({ORDER[score].unit})" if ORDER[score].unit else ""
        cells = [f"{base[score]:.3f}" if score in base else ""]
        for found in others.values():
            cells.append(f"{found[score]:.3f}" if score in found else "")
            cells.append(f"{found[score] - base[score]:+.3f}" if score in found and score in base else "")
        lines.append((score + unit, *cells))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    )


def _outputs(scorer: Regression, chosen: Sequence[Candidate]) -> dict[str, list[Image.Image]]:
    """What each candidate made of the rows."""
    paths = {one.name: [scorer.path(one, number).with_suffix(".png") for number in scorer.numbers] for one in chosen}
    return {name: [Image.open(path) for path in some] for name, some in paths.items()}


def _sheet(scorer: Regression, outputs: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """Rows as images: sources, target where there is one, and what each candidate made."""
    edits, cards = scorer.edits, []
    places = np.linspace(0, len(scorer.numbers) - 1, min(len(scorer.numbers), SHOWN)).round().astype(int)
    for place in places:
        number = scorer.numbers[place]
        target, *sources = edits.images(number)
        boxes = [(f"source {i}", source) for i, source in enumerate(sources, 1)]
        boxes += [(name, some[place]) for name, some in outputs.items()]
        boxes += [("target", target)] if edits.has_target(number) else []
        boxes = [(label, fit(image, BOX_PX)) for label, image in boxes]
        cards.append(Card(heading=edits.name(number), boxes=boxes, texts=edits.named_instruction(number)))
    return labelled_sheet(cards, title=f"{scorer.folder.name}: {len(cards)} rows", box_px=BOX_PX)
