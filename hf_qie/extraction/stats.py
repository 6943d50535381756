"""What headers and captions tell of a task: how many rows, which sizes, lengths and shapes, and what looks wrong."""

import filecmp
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features

from hf_qie.config.recipe import Mix
from hf_qie.data.mixture import read_groups, small_bucket_share
from hf_qie.data.samples import BadRow, most_bad
from hf_qie.data.schema import INVERSE, SOURCES, columns_of
from hf_qie.extraction.estimate import Estimator, Header, Outlook
from hf_qie.extraction.preprocess import Plan

WINDOW_ROWS = 256  # looked at together
NAMED = 3  # findings of a kind that are told; all are in the file
KINDS = ("bad row", "source equals target", "duplicate", "no caption", "other aspect", "small image")
ASPECT = 0.01  # how far the aspect of a target may be from that of its last source
SMALL = 0.5  # of the side of extract.image_sample_size; an image with less is blown up to more than twice its size


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A row to look at twice."""

    kind: str  # one of KINDS
    row: int
    column: str
    path: str | None
    reason: str


class Survey:
    """The sum over a task's rows; `take` adds some of them."""

    def __init__(self, plan: Plan, *, width: int):
        self.plan = plan
        columns, captions = plan.task.columns, (*plan.task.columns.captions, *plan.inverse_captions)
        self.num_rows, self.num_bytes = 0, 0
        self.source_counts: Counter[int] = Counter()
        self.sizes: dict[str, Counter] = {
            columns.source_label: Counter(),
            columns.target: Counter(),
        }  # (width, height) px
        self.grids: dict[str, set] = {columns.source_label: set(), columns.target: set()}
        self.num_tokens: dict[str, Counter[int]] = {caption: Counter() for caption in captions}
        self.findings: list[Finding] = []
        self.seen: dict[int, int] = {}  # hash of a row's content to its first row
        features = plan.features(width)
        grids = [prefix + column.name for prefix in ("", INVERSE) for column in columns_of("grid")]
        names = [name for name in ("num_sources", *grids, "inverse_image_embeds") if name in features]
        self.schema = pa.schema(Features({name: features[name] for name in names}).type)
        self.shapes = [self.schema.empty_table()]  # the columns that decide on buckets, without states

    def take(self, rows: Sequence[Mapping[str, Any]], outlooks: Sequence[Outlook | BadRow]) -> None:
        """Add `rows` and what they become."""
        columns, good = self.plan.task.columns, []
        for row, look in zip(rows, outlooks, strict=True):
            self.num_rows += 1
            if not row["bad"]:
                self.source_counts[len(row["sources"])] += 1
            self.find(row, look)
            if isinstance(look, BadRow):
                continue
            good.append(look)
            self.num_bytes += look.num_bytes
            self.sizes[columns.source_label].update(source.size for source in look.sources)
            self.sizes[columns.target][look.target.size] += 1
            self.grids[columns.source_label].update(look.forward.grids[SOURCES])
            self.grids[columns.target].add(look.forward.target_grid)
            for caption, num_tokens in look.num_tokens.items():
                self.num_tokens[caption][num_tokens] += 1
        self.shapes.append(pa.Table.from_pylist([shape_columns(look) for look in good], schema=self.schema))

    def find(self, row: Mapping[str, Any], look: Outlook | BadRow) -> None:
        """Note what is wrong with a row, or may be."""
        columns = self.plan.task.columns
        captions = [row["texts"][caption] for caption in columns.captions]

        def note(kind: str, reason: str, *, column: str, path: str | None = None) -> None:
            self.findings.append(Finding(kind=kind, row=row["row"], column=column, path=path, reason=reason))

        if isinstance(look, BadRow):
            note("bad row", look.reason, column=look.column, path=look.path)
            return
        pairs = zip(row["sources"], look.sources, strict=True)
        if equal := [path for path, source in pairs if same_picture(source, look.target)]:
            note(
                "source equals target",
                f"the same picture as {row['target']}",
                column=columns.source_label,
                path=equal[0],
            )
        content = hash((*(picture.content for picture in (*look.sources, look.target)), *captions))
        if (first := self.seen.setdefault(content, row["row"])) != row["row"]:
            reason = f"sources, target and captions of row {first}"
            note("duplicate", reason, column=columns.target, path=row["target"])
        if not any(captions):
            note("no caption", "trains on extract.drop_caption alone", column=" or ".join(columns.captions))
        if look.sources and (apart := aspect_difference(look.sources[-1].size, look.target.size)) > ASPECT:
            sizes = [f"{width} x {height}" for width, height in (look.target.size, look.sources[-1].size)]
            reason = f"{sizes[0]} px, its aspect is {apart:.1%} off that of the last source, {sizes[1]} px"
            note("other aspect", reason, column=columns.target, path=row["target"])
        of_row = zip((*row["sources"], row["target"]), (*look.sources, look.target), strict=True)
        for place, (path, image) in enumerate(of_row):
            if math.prod(image.size) < SMALL**2 * self.plan.target_area_px:
                side = self.plan.extract.image_sample_size
                reason = f"{image.size[0]} x {image.size[1]} px, less than half of extract.image_sample_size, {side}"
                column = columns.target if place == len(look.sources) else columns.source_label
                note("small image", reason, column=column, path=path)

    def found(self, kind: str) -> list[Finding]:
        """Findings of one kind, in the order of rows."""
        return [finding for finding in self.findings if finding.kind == kind]

    def buckets(self, mix: Mix, *, batch_rows: int) -> tuple[int, float]:
        """How many shapes training will draw from, and the share of draws from those with fewer rows than a batch."""
        shapes = Dataset(pa.concat_tables(self.shapes))
        if not len(shapes):
            return 0, 0.0
        groups = read_groups({"task": shapes}, {"task": 1.0}, mix)
        small = sum(group.num_rows * small_bucket_share(group, batch_rows) for group in groups)
        return sum(len(np.unique(group.bucket)) for group in groups), small / len(shapes)


def survey(plan: Plan, processor: Any, *, width: int, progress: Callable[[int], Any]) -> Survey:
    """Look at every row of a plan; `width` is the encoder's."""
    found, estimator = Survey(plan, width=width), Estimator(plan, processor, width=width, fetch=True)
    for rows in windows(plan.rows.table):
        found.take(rows, estimator(rows))
        progress(len(rows))
    return found


def windows(table: Dataset) -> Iterator[list[dict[str, Any]]]:
    """The rows of `table`, some at a time."""
    for start in range(0, len(table), WINDOW_ROWS):
        columns = table[start : start + WINDOW_ROWS]
        yield [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def shape_columns(look: Outlook) -> dict[str, Any]:
    """The columns of the set that decide on a row's bucket; states are there or null, but empty."""
    columns: dict[str, Any] = {"num_sources": len(look.sources)}
    columns["inverse_image_embeds"] = [] if look.inverse else None
    for prefix, way in (("", look.forward), (INVERSE, look.inverse)):
        for column in columns_of("grid") if way else ():
            grids = way.grids[column.of]
            columns[prefix + column.name] = grids if column.many else grids[0]
    return columns


def aspect_difference(one: tuple[int, int], other: tuple[int, int]) -> float:
    """By which part the larger ratio of width to height is above the smaller one; both are (width, height)."""
    ratio = one[0] * other[1] / (one[1] * other[0])
    return max(ratio, 1 / ratio) - 1


def same_picture(one: Header, other: Header) -> bool:
    """Whether two pictures are one, or two files with the same bytes."""
    if one.content == other.content:
        return True
    return bool(one.file and other.file and one.size == other.size) and filecmp.cmp(
        one.file, other.file, shallow=False
    )


def quantile(counts: Counter, share: float, *, key: Callable[[Any], Any] = lambda value: value) -> Any:
    """The smallest value (by `key`) that at least `share` of all do not pass."""
    rank, passed = math.ceil(share * counts.total()), 0
    for value in sorted(counts, key=key):
        passed += counts[value]
        if passed >= rank:
            return value
    raise ValueError("no values")


def table_of(found: Survey, mix: Mix, *, batch_rows: int) -> str:
    """All about a task on one page."""
    rows = [("", "number", "smallest", "median", "largest", "sizes", "grids")]
    for column, sizes in found.sizes.items():
        if sizes:
            at = [quantile(sizes, share, key=math.prod) for share in (0, 0.5, 1)]
            shown = [f"{width} x {height} px" for width, height in at]
            rows.append((column, sizes.total(), *shown, len(sizes), len(found.grids[column])))
    lines = aligned(rows)
    rows = [("", "number", "median", "95 %", "longest")]
    for caption, lengths in found.num_tokens.items():
        if lengths:
            at = [quantile(lengths, share) for share in (0.5, 0.95, 1)]
            rows.append((caption, lengths.total(), *(f"{length:,} tokens" for length in at)))
    lines += ["", *aligned(rows), ""]
    num_shapes, small = found.buckets(mix, batch_rows=batch_rows)
    counts = [f"{rows:,} with {number}" for number, rows in sorted(found.source_counts.items())]
    lines += aligned(
        [
            ("sources of a row", ", ".join(counts)),
            (
                "buckets",
                f"{num_shapes:,}; {small:.1%} of the draws from buckets of fewer rows than a batch, {batch_rows}",
            ),
            *((kind, f"{len(found.found(kind)):,}") for kind in KINDS),
            ("on disk", f"{found.num_bytes / 1e6:,.1f} MB"),
        ],
        left=True,
    )
    return "\n".join([f"{found.plan.task.name}: {found.num_rows:,} rows", *(f"  {line}".rstrip() for line in lines)])


def unusable(found: Survey) -> list[str]:
    """Why extraction would not end well on the rows of a task; nothing if it would."""
    extract, name, bad = found.plan.extract, found.plan.task.name, len(found.found("bad row"))
    most = most_bad(extract, found.num_rows)
    if bad == found.num_rows:
        return [f"tasks.{name}: every row is bad"]
    if bad > most:
        rule = "on_bad_row: fail allows none" if most == 0 else f"max_bad_share allows {most:,.0f}"
        return [f"tasks.{name}: {bad:,} of {found.num_rows:,} rows are bad, extract.{rule}; fix them, or allow more"]
    return []


def aligned(rows: Sequence[Sequence[Any]], *, left: bool = False) -> list[str]:
    """Rows of cells as lines; the first column to the left, the others to the right unless `left`."""
    texts = [[f"{cell:,}" if isinstance(cell, int) else cell for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]

    def line(texts: Sequence[str]) -> str:
        first, *rest = zip(texts, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(text.ljust(w) if left else text.rjust(w) for text, w in rest)])

    return [line(row) for row in texts]


def findings_of(found: Survey, path: Path) -> list[str]:
    """The first findings of each kind, in words; all of them go to the JSONL file `path`."""
    path.write_text("".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in found.findings), "utf-8")
    lines = []
    for kind in KINDS:
        of_kind = found.found(kind)
        for one in of_kind[:NAMED]:
            lines.append(f"  {kind}: row {one.row}: {one.column}: {f'{one.path}: ' if one.path else ''}{one.reason}")
        if len(of_kind) > NAMED:
            lines.append(f"  {kind}: and {len(of_kind) - NAMED:,} more, all in {path}")
    return lines
