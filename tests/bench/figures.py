"""One line of the table that `make bench` prints, and the shape of the rows that are measured."""

from dataclasses import dataclass

SYSTEM_TOKENS, IMAGE_TOKENS, AFTER_TOKENS = 64, 5 + 1 + 196 + 1, 5  # of the template of Qwen-Image-Edit-2509
CAPTION_TOKENS, DROP_TOKENS = 50, 1


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Something measured, beside what it is measured against."""

    point: str  # of the list in docs/performance.md
    what: str
    ours: float
    unit: str
    usual: float | None = None  # None: there is no usual way to hold it against
    target: str = ""
    met: bool | None = None  # None: no target was set

    @property
    def ratio(self) -> float | None:
        """Ours to the usual way."""
        return None if self.usual is None else self.ours / self.usual


def at_most(limit: float, *, ratio: bool = True, **values) -> Figure:
    """A figure whose ratio, or whose own value, is to be no larger than `limit`."""
    figure = Figure(target=f"<= {limit:g}" + ("" if ratio else f" {values['unit']}"), **values)
    return judged(figure, (figure.ratio if ratio else figure.ours) <= limit)


def at_least(limit: float, *, ratio: bool = False, **values) -> Figure:
    """A figure that is to be no smaller than `limit`."""
    figure = Figure(target=f">= {limit:g}" + ("" if ratio else f" {values['unit']}").rstrip(), **values)
    return judged(figure, (figure.ratio if ratio else figure.ours) >= limit)


def judged(figure: Figure, met: bool) -> Figure:
    """The same, with its verdict."""
    return Figure(**{**vars(figure), "met": bool(met)})


def table(figures: list[Figure]) -> str:
    """One line a figure."""
    head = ("", "what", "ours", "the usual way", "ratio", "target", "met")
    lines = [head, *(cells(figure) for figure in figures)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    align = ("<", "<", ">", ">", ">", "<", "<")
    lines = [[f"{cell:{a}{w}}" for cell, a, w in zip(line, align, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def cells(figure: Figure) -> tuple[str, ...]:
    """The columns of a line."""
    met = {True: "yes", False: "NO", None: ""}[figure.met]
    usual = "" if figure.usual is None else f"{number(figure.usual)} {figure.unit}".rstrip()
    ratio = "" if figure.ratio is None else number(figure.ratio)
    ours = f"{number(figure.ours)} {figure.unit}".rstrip()
    return (figure.point, figure.what, ours, usual, ratio, figure.target, met)


def number(value: float) -> str:
    """Three digits that count."""
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
