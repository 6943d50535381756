"""Charts show the numbers that they are given; sheets show images where they say, and no text that cannot be read."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_shift, retrieve_timesteps
from PIL import Image
from small_recipes import BLUE, GREEN, RED, columns_of

from hf_qie import plots
from hf_qie.config.recipe import load_recipe
from hf_qie.plots import Card, labelled_sheet, loss_chart, noise_chart
from hf_qie.training.losses import loss_weight
from hf_qie.training.objective import noise_levels

HISTORY = [
    {"step": 10, "loss": 2.0, "loss/edit": 2.5, "loss/combine": 1.5, "learning_rate": 1e-4},
    {"step": 10, "eval_loss": 1.9, "eval_loss/edit": 1.9, "eval_loss/sigma 0.00-0.25": 1.0},
    {"step": 20, "loss": 1.0, "loss/edit": 1.2, "loss/combine": 0.8},
    {"step": 20, "loss/edit": 1.1},  # logged again after a resume
    {"step": 20, "train_loss": 1.5, "train_runtime": 3.0},
]


def curves(history) -> dict:
    (axes,) = loss_chart(history).axes
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}


# --- losses


def test_a_curve_for_each_task_in_training_and_held_out():
    assert curves(HISTORY) == {
        "eval_loss/edit: 1.9 at step 10": [(10, 1.9)],
        "loss/combine: 0.8 at step 20": [(10, 1.5), (20, 0.8)],
        "loss/edit: 1.1 at step 20": [(10, 2.5), (20, 1.1)],
    }


def test_a_held_out_curve_is_thin_and_has_the_color_of_its_task():
    held_out, other, trained = loss_chart(HISTORY).axes[0].lines
    assert held_out.get_color() == trained.get_color() != other.get_color()
    assert held_out.get_linewidth() < trained.get_linewidth() == other.get_linewidth()


def test_without_tasks_the_loss_itself_is_drawn():
    assert curves([{"step": 1, "loss": 3.0}]) == {"loss: 3 at step 1": [(1, 3.0)]}


def test_a_run_that_logged_nothing_has_a_chart_that_says_so(tmp_path):
    chart = loss_chart([])
    chart.savefig(tmp_path / "loss.png")
    assert chart.axes[0].get_title() == "no loss was logged"


# --- noise


MIDDLES = (np.arange(50) + 0.5) / 50


def levels(tmp_path: Path, tiny: Path, **loss) -> dict:
    recipe = {"model": str(tiny), "tasks": {"edit": {"data": "edit.jsonl"}}, "loss": loss}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    return noise_levels(load_recipe(tmp_path / "recipe.yaml"))


def test_bars_are_the_density_of_the_draws(tiny, tmp_path):
    """Under a shift of m the density of sigma is m / (m + (1 - m) sigma)^2, of uniform u."""
    found = levels(tmp_path, tiny(), shift="auto")
    m = np.exp(calculate_shift(1024, 256, 8192, 0.5, 0.9))  # of 512 x 512, by the values of scheduler_config.json
    density = m / (m + (1 - m) * MIDDLES) ** 2 / 50
    assert found["title"].endswith("; 1,024 target tokens")
    assert found["shares"].sum() == pytest.approx(1)
    assert (abs(found["shares"] - density) <= 4 * np.sqrt(density / 10_000)).all()  # four standard errors: of 50 bars


@pytest.mark.parametrize("weighting", ["none", "sigma_sqrt", "cosmap"])
def test_the_line_is_the_weighting(tiny, tmp_path, weighting):
    expected = loss_weight(weighting, torch.from_numpy(MIDDLES)).numpy()
    found = levels(tmp_path, tiny(), weighting=weighting)
    np.testing.assert_allclose(found["weights"], expected, rtol=1e-5)  # float32


def test_the_ticks_are_where_the_pipeline_samples(tiny, tmp_path):
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tiny(), subfolder="scheduler")
    mu = calculate_shift(1024, 256, 8192, 0.5, 0.9)
    timesteps, _ = retrieve_timesteps(scheduler, 20, "cpu", sigmas=np.linspace(1.0, 1 / 20, 20), mu=mu)
    # whatever the recipe trains on
    found = levels(tmp_path, tiny(), shift=2.0, timestep_sampling="logit_normal")
    np.testing.assert_allclose(found["sampled"], timesteps.numpy() / 1000, rtol=1e-6)


def test_the_chart_shows_all_three():
    bars, right = noise_chart(shares=[0.25, 0.75], weights=[1.0, 2.0], sampled=[0.9, 0.5, 0.1], title="t").axes
    assert list(bars.patches[0].get_data().values) == [0.25, 0.75]
    assert list(right.lines[0].get_xdata()) == [0.25, 0.75] and list(right.lines[0].get_ydata()) == [1.0, 2.0]
    assert list(bars.lines[0].get_xdata()) == [0.9, 0.5, 0.1]


# --- sheets


def card(*colors, target: int, **texts: str) -> Card:
    boxes = [("x", color and Image.new("RGB", (8, 8), color)) for color in colors]
    return Card(heading="row 0", boxes=boxes, target=target, texts=texts)


def test_images_stand_in_their_order_in_boxes_and_the_arrow_before_the_target():
    sheet = labelled_sheet([card(RED, GREEN, BLUE, target=2)], title="", box_px=100)
    (red,), (green,), (blue,) = (columns_of(sheet, color) for color in (RED, GREEN, BLUE))
    assert red[1] < green[0] <= green[1] < blue[0]
    assert all(end - start + 1 == 100 for start, end in (red, green, blue))
    arrow, label = columns_of(sheet, tuple(bytes.fromhex(plots.ACCENT[1:])))[:2]
    assert green[1] < arrow[0] < arrow[1] < blue[0] <= label[0]


def test_an_empty_place_keeps_targets_in_line():
    cards = [card(RED, None, BLUE, target=2), card(RED, GREEN, BLUE, target=2), card(None, None, BLUE, target=2)]
    assert len(columns_of(labelled_sheet(cards, title=""), BLUE)) == 1


def test_cards_stand_side_by_side_as_far_as_the_width_reaches():
    cards = [card(RED, BLUE, target=1)] * 5
    narrow = labelled_sheet(cards, title="", box_px=100)
    wide = labelled_sheet(cards, title="", box_px=100, width_px=2 * narrow.width)
    assert len(columns_of(narrow, RED)) == 1 and len(columns_of(wide, RED)) == 2
    assert narrow.width < wide.width <= 2 * narrow.width and wide.height < narrow.height


def test_characters_without_a_font_are_left_out_and_never_drawn_as_boxes(monkeypatch):
    monkeypatch.setattr(plots, "CHINESE_FONTS", ())
    plots._font.cache_clear()
    try:
        assert plots._lines("Make it blue.", 400) == ["Make it blue."]
        assert "Noto Sans CJK" in "".join(plots._lines("把天空变成蓝色。", 400))
        assert plots._lines(" ", 400) == [""]
        labelled_sheet([card(RED, target=0, 指令="把天空变成蓝色。")], title="图")
    finally:
        plots._font.cache_clear()


def test_lines_are_no_wider_than_their_card_and_no_more_than_allowed():
    font = plots._font(False, plots.TEXT_PX)
    text = "Replace the background, and keep the boat, " * 10
    lines = plots._lines(text, 400, max_lines=100)
    assert all(font.getlength(line.rstrip()) <= 400 for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert len(plots._lines(text, 400, max_lines=3)) == 3 and plots._lines(text, 400, max_lines=3)[-1].endswith(" ...")
