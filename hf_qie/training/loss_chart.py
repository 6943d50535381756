"""A picture of a run's losses: by step, of each task, in training and on held-out rows."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw

# px
WIDTH, HEIGHT, MARGIN = 760, 420, 60
COLOURS = ("#1f5cc4", "#c2410c", "#2c7a2c", "#7b2cbf", "#8a6d00", "#0e7490", "#b0226b", "#444444")
INK, FAINT = "#444444", "#dddddd"


def curves(log_history: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """(step, loss) in the order of the steps, by name: each task as `loss/<task>`, held out as `eval_loss/<task>`.

    `log_history` is that of `transformers.TrainerState`, as in a checkpoint's trainer_state.json. A run that has
    logged no task by name has its `loss`.
    """
    found: dict[str, dict[int, float]] = {}
    for entry in log_history:
        for key, value in entry.items():
            if key == "loss" or (key.startswith(("loss/", "eval_loss/")) and key.count("/") == 1):
                found.setdefault(key, {})[entry["step"]] = value  # of a step logged twice, the later
    found = {name: points for name, points in found.items() if not name.startswith("eval_loss/sigma ")}
    if any("/" in name for name in found):
        found.pop("loss", None)
    return {name: sorted(points.items()) for name, points in sorted(found.items())}


def loss_chart(log_history: Sequence[Mapping[str, Any]]) -> Image.Image:
    """Lines of the losses over steps, on a logarithmic scale; those of held-out rows are thin."""
    drawn = {name: [(s, v) for s, v in points if v > 0] for name, points in curves(log_history).items()}
    points = [point for line in drawn.values() for point in line]
    chart = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(chart)
    if not points:
        pen.text((MARGIN, MARGIN), "no loss was logged", fill=INK)
        return chart
    last = max(1, *(step for step, _ in points))
    low, high = (math.log10(edge(value for _, value in points)) for edge in (min, max))
    low, high = low - 0.02, high + 0.02  # a level line stands in the middle
    left, right, top, bottom = MARGIN, WIDTH - MARGIN, MARGIN + 14 * ((len(drawn) + 2) // 3), HEIGHT - MARGIN

    def place(step: int, loss: float) -> tuple[float, float]:
        return left + step / last * (right - left), bottom - (math.log10(loss) - low) / (high - low) * (bottom - top)

    for i in range(5):
        loss, step = 10 ** (low + i / 4 * (high - low)), round(i / 4 * last)
        pen.line([place(0, loss), place(last, loss)], fill=FAINT)
        pen.text((left - 6, place(0, loss)[1]), f"{loss:.3g}", fill=INK, anchor="rm")
        pen.text((place(step, loss)[0], bottom + 8), f"{step:,}", fill=INK, anchor="ma")
    pen.text(((left + right) / 2, bottom + 26), "step", fill=INK, anchor="ma")
    for number, (name, line) in enumerate(drawn.items()):
        colour = COLOURS[number % len(COLOURS)]
        pen.line([place(*point) for point in line], fill=colour, width=1 if name.startswith("eval_") else 3)
        if line:  # a single point is no line
            pen.circle(place(*line[-1]), 3, fill=colour)
        words = f"{name}: {line[-1][1]:.4g} at step {line[-1][0]:,}" if line else f"{name}: never above 0"
        pen.text((left + number % 3 * (right - left) / 3, 16 + 14 * (number // 3)), words, fill=colour)
    return chart
