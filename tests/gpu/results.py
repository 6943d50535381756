"""One line of what `make gpu` found, and the lines as a table for the terminal and for docs/performance.md."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HEAD = ("step", "what", "measured", "compared with", "its value", "ratio", "target", "met")
FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class Result:
    """Something measured or seen, beside what it is compared with, if there is anything."""

    step: str
    what: str
    value: float | str
    unit: str = ""
    beside: str = ""  # what it is compared with
    other: float | None = None  # the value of that, in the same unit
    least: float | None = None  # of the ratio, or of the value where nothing stands beside it
    most: float | None = None

    @property
    def ratio(self) -> float | None:
        """Of the value to that of what it is compared with."""
        return self.value / self.other if self.other else None

    @property
    def target(self) -> str:
        """What was asked for, in words."""
        if self.least is not None and self.most is not None:
            return f"{self.least:g} to {self.most:g}"
        limits = ((">=", self.least), ("<=", self.most))
        return "".join(f"{sign} {limit:g}" for sign, limit in limits if limit is not None)

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None where there is none."""
        if self.what == FAILED:
            return False
        judged = self.value if self.other is None else self.ratio
        if not self.target or judged is None:
            return None
        return (self.least is None or judged >= self.least) and (self.most is None or judged <= self.most)

    def cells(self) -> tuple[str, ...]:
        """Under `HEAD`."""
        measured = f"{number(self.value)} {self.unit}".rstrip()
        other = "" if self.other is None else f"{number(self.other)} {self.unit}".rstrip()
        ratio = "" if self.ratio is None else number(self.ratio)
        met = {True: "yes", False: "NO", None: ""}[self.met]
        return self.step, self.what, measured, self.beside, other, ratio, self.target, met


def number(value: float | str) -> str:
    """Three digits that count; words as they are."""
    if isinstance(value, str):
        return value
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(results: Sequence[Result]) -> str:
    """One line a result, in columns."""
    lines = [HEAD, *(result.cells() for result in results)]
    widths = [min(max(map(len, column)), 100) for column in zip(*lines, strict=True)]
    rows = [[f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(row).rstrip() for row in rows)


def markdown(results: Iterable[Result]) -> str:
    """The same, for a page."""
    lines = [HEAD, ("---",) * len(HEAD), *(result.cells() for result in results)]
    return "".join(f"| {' | '.join(map(escaped, line))} |\n" for line in lines)


def escaped(cell: str) -> str:
    """Without what a page takes for a border or for a tag, as in names of C++."""
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", cell.replace("|", "/"))


def as_json(result: Result) -> dict[str, Any]:
    """With what follows from it, for those who read the file."""
    return asdict(result) | {"ratio": result.ratio, "met": result.met}


def from_json(values: Mapping[str, Any]) -> Result:
    """The result that `as_json` wrote."""
    return Result(**{key: value for key, value in values.items() if key not in ("ratio", "met")})


def read_lines(path: Path) -> list[Result]:
    """The results that a step has written so far, one a line; a line that is cut off is left out."""
    if not path.exists():
        return []
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    return [from_json(json.loads(line)) for line in whole.splitlines()]


def find(results: Iterable[Result], step: str, what: str) -> float | None:
    """The value of a result by step and name; None where there is none."""
    found = (one.value for one in results if (one.step, one.what) == (step, what))
    return next((value for value in found if not isinstance(value, str)), None)
