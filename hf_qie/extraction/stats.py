"""What image headers and captions tell of a task's rows: sizes, lengths, buckets, and rows that look wrong."""

import filecmp
import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features
from tqdm import tqdm

from hf_qie.config.recipe import Mix, Recipe
from hf_qie.config.training_args import training_arguments
from hf_qie.data.largest import Shape, largest, largest_in, ready_sets
from hf_qie.data.mixture import read_groups, small_bucket_share
from hf_qie.data.samples import BadRow, most_bad, text_columns
from hf_qie.data.schema import HAS_INVERSE, INVERSE, SOURCES, TARGET, TEXT_EMBEDS, columns_of, shared_embeds
from hf_qie.errors import InputError
from hf_qie.extraction.estimate import Header, Outlook, outlooks
from hf_qie.extraction.plan import Plan, family_of_recipe, make_plan, open_processor

WINDOW_ROWS = 256  # looked at together
NAMED = 3  # findings of a kind in the report; all are in the file
KINDS = ("bad row", "source equals target", "duplicate", "no caption", "other aspect", "small image", "misaligned")
ASPECT = 0.01  # how far the aspect of a target may be from that of its last source
SMALL = 0.5  # of the side of extract.image_sample_size; an image with less is enlarged to more than twice its size


class Finding(NamedTuple):
    """A row to look at twice."""

    kind: str  # one of KINDS
    row: int
    column: str
    path: str | None
    reason: str


class Survey:
    """Figures over a task's rows."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.num_rows = self.num_bytes = 0
        self.source_counts: Counter[int] = Counter()
        self.labels = {image.name: image.label(plan.task.columns) for image in columns_of("image")}
        self.sizes: dict[str, Counter] = {name: Counter() for name in self.labels}  # (width, height) px
        self.num_tokens: dict[str, Counter] = {caption: Counter() for caption in text_columns(plan.task.columns)}
        self.findings: list[Finding] = []
        self.largest: Shape | None = None  # of what a row becomes, the most tokens for the transformer
        self._first: dict[int, int] = {}  # hash of a row's content -> its first row
        # the columns that decide on buckets, without embeddings
        grids = [prefix + column.name for prefix in ("", INVERSE) for column in columns_of("grid")]
        features, names = plan.features, ("num_sources", *grids, HAS_INVERSE)
        self._schema = pa.schema(Features({name: features[name] for name in names if name in features}).type)
        self._shapes = [self._schema.empty_table()]

    def add(self, rows: Sequence[Mapping[str, Any]], looks: Sequence[Outlook | BadRow]) -> None:
        """Add `rows` and what they become."""
        shapes = []
        for row, look in zip(rows, looks, strict=True):
            self.num_rows += 1
            if not row["bad"]:
                self.source_counts[len(row["sources"])] += 1
            if isinstance(look, BadRow):
                self.findings.append(Finding("bad row", row["row"], look.column, look.path, look.reason))
                continue
            self.findings += self._odd(row, look)
            self.num_bytes += look.num_bytes
            self.largest = largest([*shapes_of(look), *filter(None, [self.largest])])
            for name, headers in look.headers.items():
                self.sizes[name].update(header.size for header in headers)
            for caption, num_tokens in look.num_tokens.items():
                self.num_tokens[caption][num_tokens] += 1
            inverse = [] if HAS_INVERSE in look.num_embeds else None  # there or null, but empty
            count = len(look.headers[SOURCES])
            shapes.append({"num_sources": count, HAS_INVERSE: inverse, **look.grids})
        self._shapes.append(pa.Table.from_pylist(shapes, schema=self._schema))

    def _odd(self, row: Mapping[str, Any], look: Outlook) -> Iterator[Finding]:
        """What may be wrong with a row that can be used."""
        number, names, extract = row["row"], self.plan.task.columns, self.plan.extract
        captions = [row["texts"][caption] for caption in names.captions]
        sources, (target,) = look.headers[SOURCES], look.headers[TARGET]
        target_at = number, self.labels[TARGET], row["target"]
        if same := [path for path, source in zip(row["sources"], sources, strict=True) if _is_same(source, target)]:
            reason = f"the same image as {row['target']}"
            yield Finding("source equals target", number, self.labels[SOURCES], same[0], reason)
        content = hash((*(header.content for header in chain(*look.headers.values())), *captions))
        if (first := self._first.setdefault(content, number)) != number:
            yield Finding("duplicate", *target_at, f"sources, target and captions of row {first}")
        if not any(captions):
            reason = "trains on extract.drop_caption alone"
            yield Finding("no caption", number, " or ".join(names.captions), None, reason)
        aspects = sorted(width / height for width, height in (target.size, *(one.size for one in sources[-1:])))
        if (apart := aspects[-1] / aspects[0] - 1) > ASPECT:
            this, other = (f"{width} x {height} px" for width, height in (target.size, sources[-1].size))
            reason = f"{this}, its aspect is {apart:.1%} off that of the last source, {other}"
            yield Finding("other aspect", *target_at, reason)
        for image in columns_of("image"):
            for path, header in zip(image.paths(row), look.headers[image.name], strict=True):
                if math.prod(header.size) < SMALL**2 * self.plan.target_area_px:
                    size, side = f"{header.size[0]} x {header.size[1]} px", extract.image_sample_size
                    reason = f"{size}, less than half of extract.image_sample_size, {side}"
                    yield Finding("small image", number, self.labels[image.name], path, reason)

    def found(self, kind: str) -> list[Finding]:
        """Findings of one kind, in the order of rows."""
        return [finding for finding in self.findings if finding.kind == kind]

    def buckets(self, mix: Mix, *, batch_rows: int) -> tuple[int, float]:
        """How many buckets training draws from, and the share of draws from those with fewer rows than a batch."""
        shapes = Dataset(pa.concat_tables(self._shapes))
        if not len(shapes):
            return 0, 0.0
        groups = read_groups({"task": shapes}, {"task": 1.0}, mix)
        small = sum(group.num_rows * small_bucket_share(group, batch_rows) for group in groups)
        return sum(len(np.unique(group.bucket)) for group in groups), small / len(shapes)

    def problems(self) -> list[str]:
        """Why extraction would not end well on these rows; empty if it would."""
        extract, at, bad = self.plan.extract, f"tasks.{self.plan.task.name}", len(self.found("bad row"))
        most = most_bad(extract, self.num_rows)
        if bad == self.num_rows:
            return [f"{at}: every row is bad"]
        rule = "on_bad_row: fail allows none" if most == 0 else f"max_bad_share allows {most:,.0f}"
        wrong = f"{at}: {bad:,} of {self.num_rows:,} rows are bad, extract.{rule}; fix them, or allow more"
        return [wrong] if bad > most else []


def shapes_of(look: Outlook) -> list[Shape]:
    """What the transformer sees of a row, in each of its directions, with the longest caption."""
    shapes = []
    for prefix in ("", INVERSE):
        if (num_shared := look.num_embeds.get(prefix + shared_embeds(look.num_embeds))) is not None:
            texts = [number for name, number in look.num_embeds.items() if name.startswith(prefix + TEXT_EMBEDS)]
            grids = look.grids[f"{prefix}target_grid"], *look.grids[f"{prefix}source_grids"]
            shapes.append(Shape(grids=grids, num_tokens=num_shared + max(texts)))
    return shapes


def survey(plan: Plan, processor: Any) -> Survey:
    """Look at every row of a plan."""
    found = Survey(plan)
    with tqdm(desc=plan.task.name, unit="row", total=len(plan.rows.table), disable=None) as bar:
        for batch in plan.rows.table.iter(WINDOW_ROWS):
            rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
            found.add(rows, outlooks(rows, plan, processor))
            bar.update(len(rows))
    return found


def largest_shape(recipe: Recipe) -> Shape:
    """Of a micro-batch of the rows to train on: by their sets, or, where a task has none yet, by headers and captions.

    Raises InputError where there is no row.
    """
    sets, shapes, processor = ready_sets(recipe), [], None
    family = family_of_recipe(recipe)
    if sets:
        shapes.append(largest_in(sets, {name: recipe.tasks[name].weight for name in sets}, recipe.mix))
    with tempfile.TemporaryDirectory(prefix="hf_qie-rows-") as folder:
        for name, task in recipe.tasks.items():
            if task.weight > 0 and name not in sets:
                processor = processor or open_processor(recipe, family)
                shapes.append(survey(make_plan(recipe, task, family, Path(folder)), processor).largest)
                if shapes[-1] is None:
                    raise InputError(f"tasks.{name}: every row is bad; check.py without --memory names the reasons")
    draws = recipe.training.get("per_device_train_batch_size", training_arguments()["per_device_train_batch_size"][1])
    of_row = recipe.mix.draws_per_row
    return replace(largest(shapes), rows=draws // of_row, draws_per_row=of_row)


def report(found: Survey, mix: Mix, *, batch_rows: int, pairs: str, findings: Path) -> str:
    """All about a task, and its `pairs`, on one page; `findings` gets every finding, one JSON object a line."""
    images = [("", "number", "smallest", "median", "largest", "sizes")]
    for name, sizes in found.sizes.items():
        if sizes:
            shown = ["{} x {} px".format(*_quantile(sizes, share, key=math.prod)) for share in (0, 0.5, 1)]
            images.append((found.labels[name], sizes.total(), *shown, len(sizes)))
    captions = [("", "number", "median", "95 %", "longest")]
    for caption, lengths in found.num_tokens.items():
        if lengths:
            shown = [f"{_quantile(lengths, share):,} tokens" for share in (0.5, 0.95, 1)]
            captions.append((caption, lengths.total(), *shown))
    num_buckets, small = found.buckets(mix, batch_rows=batch_rows)
    counts = [f"{rows:,} with {number}" for number, rows in sorted(found.source_counts.items())]
    small_buckets = f"{small:.1%} of the draws from buckets of fewer rows than a batch, {batch_rows}"
    figures = {"sources of a row": ", ".join(counts), "buckets": f"{num_buckets:,}; {small_buckets}"}
    figures |= {kind: f"{len(found.found(kind)):,}" for kind in KINDS}
    figures |= {"aligned pairs": pairs} if pairs else {}
    figures["on disk"] = f"{found.num_bytes / 1e6:,.1f} MB"
    width = max(map(len, figures))
    lines = [*aligned(images), "", *aligned(captions), "", *(f"{k:<{width}}  {v}" for k, v in figures.items())]
    for kind in KINDS:
        of_kind = found.found(kind)
        for one in of_kind[:NAMED]:
            lines.append(f"{kind}: row {one.row}: {one.column}: {f'{one.path}: ' if one.path else ''}{one.reason}")
        if len(of_kind) > NAMED:
            lines.append(f"{kind}: and {len(of_kind) - NAMED:,} more, all in {findings}")
    text = "".join(json.dumps(one._asdict(), ensure_ascii=False) + "\n" for one in found.findings)
    findings.write_text(text, encoding="utf-8")
    return "\n".join([f"{found.plan.task.name}: {found.num_rows:,} rows", *(f"  {line}".rstrip() for line in lines)])


def aligned(rows: Sequence[Sequence[Any]]) -> list[str]:
    """Rows of a table as lines; the first column to the left, the others to the right."""
    texts = [[f"{value:,}" if isinstance(value, int) else value for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    sides = [str.ljust, *[str.rjust] * (len(widths) - 1)]
    return ["  ".join(pad(*one) for pad, *one in zip(sides, row, widths, strict=True)) for row in texts]


def _is_same(one: Header, other: Header) -> bool:
    """Whether two images are one, or two files with the same bytes."""
    files = one.content, other.content
    are_files = one.size == other.size and all(isinstance(file, Path) for file in files)
    return files[0] == files[1] or (are_files and filecmp.cmp(*files, shallow=False))


def _quantile(counts: Counter, share: float, *, key: Callable[[Any], Any] | None = None) -> Any:
    """The smallest value (by `key`) that at least `share` of all do not pass."""
    values = sorted(counts, key=key)
    return values[np.searchsorted(np.cumsum([counts[value] for value in values]), share * counts.total())]
