"""Charts by matplotlib, and sheets of labelled images by Pillow, of plain numbers, images and text."""

import contextlib
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHART_INCHES = (7.6, 4.4)
GAP_PX, TEXT_PX, TITLE_PX, LINE_PX = 16, 16, 28, 22
MAX_LINES = 5  # of one text
PAPER, CARD, INK, FAINT = "#f4f4f2", "#ffffff", "#1c1c1e", "#7c7c80"
ACCENT = "#c2410c"  # of the target and of the arrow that points to it
# Pillow's own font has Latin letters alone; these, where one is installed, have Chinese characters too
CHINESE_FONTS = (
    *("NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "NotoSansSC-Regular.otf", "SourceHanSansSC-Regular.otf"),
    *("SourceHanSansCN-Regular.otf", "wqy-microhei.ttc", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf"),  # Linux
    *("PingFang.ttc", "Hiragino Sans GB.ttc", "STHeiti Medium.ttc", "Arial Unicode.ttf"),  # macOS
    *("msyh.ttc", "simhei.ttf", "simsun.ttc"),  # Windows
)
CJK = r"\u2e80-\uffef"  # Chinese, Japanese and Korean characters and their punctuation
CHINESE = re.compile(f"[{CJK}]")


def loss_chart(log_history: Iterable[Mapping[str, Any]]) -> "Figure":
    """Losses by step on a logarithmic scale: each task as `loss/<task>`, thin as `eval_loss/<task>` on held-out rows.

    `log_history` is that of `transformers.TrainerState`. A run that logged no task by name shows its `loss`.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    curves: dict[str, dict[int, float]] = {}
    for entry in log_history:
        for key, value in entry.items():
            if key == "loss" or re.fullmatch(r"(eval_)?loss/(?!sigma )[^/]+", key):
                curves.setdefault(key, {})[entry["step"]] = value  # of a step logged twice, the later
    if len(curves) > 1:
        curves.pop("loss", None)
    tasks = sorted({name.removeprefix("eval_") for name in curves})
    figure = Figure(figsize=CHART_INCHES, layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss", yscale="log")
    for name, losses in sorted(curves.items()):
        steps = sorted(losses)
        axes.plot(
            steps,
            [losses[step] for step in steps],
            label=f"{name}: {losses[steps[-1]]:.4g} at step {steps[-1]:,}",
            color=f"C{tasks.index(name.removeprefix('eval_')) % 10}",
            linewidth=0.8 if name.startswith("eval_") else 2,
            marker="." if len(steps) < 3 else None,  # a single point has no line
        )
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))  # plain numbers, few over many decades
    axes.grid(which="both", alpha=0.3)
    if curves:
        axes.legend(fontsize="small")
    else:
        axes.set_title("no loss was logged")
    return figure


def noise_chart(
    *, shares: Sequence[float], weights: Sequence[float], sampled: Sequence[float], title: str
) -> "Figure":
    """Bars of the share of draws and a line of the loss weight by noise level, 0 to 1, in parts of equal width.

    `sampled` are the noise levels at which the pipeline calls the model.
    """
    import numpy as np
    from matplotlib.figure import Figure

    edges = np.linspace(0, 1, len(shares) + 1)
    figure = Figure(figsize=CHART_INCHES, layout="constrained")
    axes = figure.add_subplot(xlabel="sigma: 0 is a clean image, 1 is noise alone", ylabel="share of draws")
    axes.set_title(title, fontsize="medium")
    drawn = axes.stairs(shares, edges, fill=True, color="#7aa6d8", label="share of draws")
    ticks = axes.plot(sampled, [0] * len(sampled), "|k", markersize=16, label=f"the {len(sampled)} steps of sampling")
    right = axes.twinx()
    line = right.plot((edges[:-1] + edges[1:]) / 2, weights, color=ACCENT, label="weight in the loss")
    right.set(ylabel="weight in the loss", ylim=(0, 1.05 * max(weights)))
    figure.legend(handles=[drawn, *line, *ticks], loc="outside lower center", ncols=3)
    return figure


@dataclass(frozen=True, kw_only=True)
class Card:
    """One row of a data set on a sheet: labelled images side by side, texts below them.

    A string in place of an image is written into its box, None leaves the place empty.
    """

    heading: str
    boxes: Sequence[tuple[str, Image.Image | str | None]]
    target: int | None = None  # the place in `boxes` that an arrow points to
    texts: Mapping[str, str] = field(default_factory=dict)  # by name


def labelled_sheet(
    cards: Sequence[Card], *, title: str, note: str = "", box_px: int = 256, width_px: int = 0
) -> Image.Image:
    """Cards below each other, side by side as far as `width_px` reaches; images fit into squares of `box_px`."""
    card_px = GAP_PX + max(len(card.boxes) for card in cards) * (box_px + GAP_PX)
    drawn = [_draw_card(card, card_px, box_px) for card in cards]
    across = min(len(cards), max(1, (width_px - GAP_PX) // (card_px + GAP_PX)))
    lines = [drawn[start : start + across] for start in range(0, len(drawn), across)]
    heights = [max(card.height for card in line) + GAP_PX for line in lines]
    top = 3 * GAP_PX + TITLE_PX + (LINE_PX if note else 0)
    sheet = Image.new("RGB", (GAP_PX + across * (card_px + GAP_PX), top + sum(heights)), PAPER)
    _write(sheet, (GAP_PX, GAP_PX), title, size=TITLE_PX)
    _write(sheet, (GAP_PX, 2 * GAP_PX + TITLE_PX), note, color=FAINT)
    for line, height in zip(lines, heights, strict=True):
        for place, card in enumerate(line):
            sheet.paste(card, (GAP_PX + place * (card_px + GAP_PX), top))
        top += height
    return sheet


def fit(image: Image.Image, box_px: int) -> Image.Image:
    """The image, RGB, what is transparent on white, as large as a square of side `box_px` takes it."""
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return ImageOps.contain(image.convert("RGB"), (box_px, box_px), Image.Resampling.LANCZOS)


def _draw_card(card: Card, width: int, box_px: int) -> Image.Image:
    inner, top = width - 2 * GAP_PX, GAP_PX + 2 * LINE_PX
    texts = [(name, _lines(text, inner)) for name, text in card.texts.items()]
    below = top + box_px + GAP_PX
    height = below + sum((1 + len(lines)) * LINE_PX + GAP_PX for _, lines in texts)
    image = Image.new("RGB", (width, height), CARD)
    pen = ImageDraw.Draw(image)
    _write(image, (GAP_PX, GAP_PX // 2), card.heading)
    for place, (label, shown) in enumerate(card.boxes):
        left, color = GAP_PX + place * (box_px + GAP_PX), ACCENT if place == card.target else FAINT
        if shown is None:
            continue
        _write(image, (left, top - LINE_PX), label, color=color)
        pen.rectangle((left, top, left + box_px - 1, top + box_px - 1), fill=PAPER)
        if isinstance(shown, str):
            for number, line in enumerate(_lines(shown, box_px - 2 * GAP_PX, max_lines=2 * MAX_LINES)):
                _write(image, (left + GAP_PX, top + GAP_PX + number * LINE_PX), line, color=color)
        else:
            small = fit(shown, box_px)
            image.paste(small, (left + (box_px - small.width) // 2, top + (box_px - small.height) // 2))
    if card.target is not None:
        tip, middle = GAP_PX + card.target * (box_px + GAP_PX) - 1, top + box_px // 2
        pen.polygon([(tip, middle), (tip - GAP_PX + 2, middle - 10), (tip - GAP_PX + 2, middle + 10)], fill=ACCENT)
    for name, lines in texts:
        _write(image, (GAP_PX, below), name, color=FAINT)
        for number, line in enumerate(lines, 1):
            _write(image, (GAP_PX, below + number * LINE_PX), line)
        below += (1 + len(lines)) * LINE_PX + GAP_PX
    return image


def _write(image: Image.Image, corner: tuple[int, int], text: str, *, color: str = INK, size: int = TEXT_PX) -> None:
    if (font := _font(bool(CHINESE.search(text)), size)) is None:
        text, font = CHINESE.sub("?", text), _font(False, size)
    ImageDraw.Draw(image).text(corner, text, fill=color, font=font)


def _lines(text: str, width: int, *, max_lines: int = MAX_LINES) -> list[str]:
    """At most `max_lines` lines of `width` pixels, broken between words and between Chinese characters."""
    if (font := _font(bool(CHINESE.search(text)), TEXT_PX)) is None:
        return _lines("(no font here has these characters: install Noto Sans CJK)", width, max_lines=max_lines)
    lines = [""]
    for piece in re.findall(rf"[^\s{CJK}]{{1,24}}|\s+|[{CJK}][，。、；：？！）》」』”’]*", text):
        if font.getlength(lines[-1] + piece.rstrip()) > width:
            lines.append("")
        lines[-1] += " " * bool(lines[-1]) if piece.isspace() else piece
    return lines if len(lines) <= max_lines else [*lines[: max_lines - 1], f"{lines[max_lines - 1][:-4].rstrip()} ..."]


@functools.cache
def _font(chinese: bool, size: int) -> ImageFont.FreeTypeFont | None:
    """Pillow's own font, or the first installed one that has Chinese characters; None where there is none."""
    for name in CHINESE_FONTS if chinese else ():
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, size)  # looked for where the system keeps fonts
    return None if chinese else ImageFont.load_default(size)
