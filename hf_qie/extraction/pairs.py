"""Whether source and target of a task's rows show the same in the same place: pairs that are shifted or scaled.

A model trained on pairs that are some pixels off learns to shift and to zoom. Unlike the rest of RUN 0 this decodes
images, so it looks at a sample of the rows. It does not look for swapped sources and targets: that the image without a
removed object has less detail was right for 146 of 200 objects pasted into photos, and for 124 of 200 soft ones.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
from tqdm import tqdm

from hf_qie.data.fetch import BadUrl
from hf_qie.data.images import BadImage, on_white
from hf_qie.data.schema import SOURCES, TARGET
from hf_qie.extraction.plan import Plan
from hf_qie.extraction.stats import Finding, Survey
from hf_qie.measures.edits import ALIGNED_PX, register_pair
from hf_qie.measures.registration import MAX_ZOOM, Registration

MAX_ROWS = 256  # of a task; of a longer one so many, spread evenly; half a minute on one core at 1024 px


class Compared(NamedTuple):
    """A target against its last source, at the size in which the target is trained on."""

    registration: Registration
    finding: Finding  # to list if the target is off


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """The pairs of some rows of a task."""

    num_pairs: int  # rows with a source that the task has
    compared: list[Compared]
    found: list[Finding]  # images that cannot be decoded, sources with the target's pixels

    @property
    def clear(self) -> list[Compared]:
        """Those with detail enough to tell whether they show the same."""
        return [one for one in self.compared if one.registration.can_tell]

    @property
    def same(self) -> list[Compared]:
        """Of these, those that show the same, in the same place or not."""
        return [one for one in self.clear if one.registration.is_known]

    @property
    def are_aligned(self) -> bool:
        """Whether sources and targets of the task look aligned: most of those that are clear show the same."""
        return 2 * len(self.same) > len(self.clear)

    @property
    def off(self) -> list[Compared]:
        """Where the task looks aligned, pairs that are more than 2 px off, the worst first."""
        off = [one for one in self.same if self.are_aligned and one.registration.farthest_px > ALIGNED_PX]
        return sorted(off, key=lambda one: one.registration.farthest_px, reverse=True)

    @property
    def findings(self) -> list[Finding]:
        """For the list of odd rows."""
        return [*self.found, *(one.finding for one in self.off)]

    def __str__(self) -> str:
        """In one line; empty for text-to-image."""
        if not self.num_pairs:
            return ""
        compared, clear, same = (len(some) for some in (self.compared, self.clear, self.same))
        text = f"{compared:,} of {self.num_pairs:,} compared"
        if not clear:
            return f"unknown; {text}, none with enough detail"
        text += f", {same:,} of {clear:,} with enough detail show the same in source and target"
        if not self.are_aligned:
            return f"no, so that no shift is listed; {text}"
        return f"yes; {text}, {len(self.off) / same:.1%} of these more than {ALIGNED_PX:g} px off"


def compare_pairs(survey: Survey) -> Pairs:
    """Register the target of each row of a task against its last source, of at most `MAX_ROWS` rows that can be used.

    Pairs whose aspects differ by so much that no registration is possible are left out; they are listed already.
    """
    plan, table = survey.plan, survey.plan.rows.table
    has_source = pc.fill_null(pc.list_value_length(table.data["sources"]), 0).to_numpy() > 0
    has_source[[one.row for one in survey.found("bad row")]] = False
    numbers = np.flatnonzero(has_source)
    some = np.linspace(0, len(numbers) - 1, min(MAX_ROWS, len(numbers))).round().astype(int)
    rows = [table[int(number)] for number in numbers[some]]
    with ThreadPoolExecutor(plan.extract.num_workers, "pairs") as readers:
        looks = readers.map(partial(_look, plan=plan, labels=survey.labels), rows)
        bar = tqdm(looks, desc=f"{plan.task.name}: pairs", unit="row", total=len(rows), disable=None)
        looks = [look for look in bar if look]
    known = {(one.kind, one.row) for one in survey.findings}  # the same file, or files with the same bytes
    return Pairs(
        num_pairs=len(numbers),
        compared=[look for look in looks if isinstance(look, Compared)],
        found=[look for look in looks if isinstance(look, Finding) and (look.kind, look.row) not in known],
    )


def _look(row: Mapping[str, Any], *, plan: Plan, labels: Mapping[str, str]) -> Compared | Finding | None:
    """Compare the images of a row; None where their aspects are too far apart. Runs in many threads."""
    images = []
    for name, path in ((SOURCES, row["sources"][-1]), (TARGET, row["target"])):
        try:
            image = plan.read((row["root"], path))
        except (BadImage, BadUrl) as error:
            return Finding("bad row", row["row"], labels[name], path, str(error))
        images.append(on_white(image) if image.mode == "RGBA" else image)
    source, target = images
    if source == target:
        reason = f"the same pixels as {row['target']}"
        return Finding("source equals target", row["row"], labels[SOURCES], row["sources"][-1], reason)
    aspects = sorted(image.width / image.height for image in images)
    if aspects[1] > (1 + MAX_ZOOM) * aspects[0]:
        return None
    size = plan.family.fit(target.size, plan.target_area_px)
    found = register_pair(*(np.asarray(plan.family.resize(image, size)) for image in images))
    zoom = "" if np.isnan(found.scale_x + found.scale_y) else f", scaled by {found.scale_x:.3f} x {found.scale_y:.3f}"
    reason = f"shifted by {found.dx_px:+.1f}, {found.dy_px:+.1f} px{zoom} against {row['sources'][-1]}: "
    reason += f"up to {found.farthest_px:.1f} px at {size[0]} x {size[1]}"
    return Compared(found, Finding("misaligned", row["row"], labels[TARGET], row["target"], reason))
