"""The picture of the losses: which curves, and that they show."""

import itertools

import numpy as np

from hf_qie.training.loss_chart import COLOURS, curves, loss_chart

HISTORY = [
    {"step": 10, "loss": 2.0, "loss/edit": 2.5, "loss/combine": 1.5, "learning_rate": 1e-4},
    {"step": 10, "eval_loss": 1.9, "eval_loss/edit": 1.9, "eval_loss/sigma 0.00-0.25": 1.0},
    {"step": 20, "loss": 1.0, "loss/edit": 1.2, "loss/combine": 0.8},
    {"step": 20, "loss/edit": 1.1},  # logged again after a resume
    {"step": 20, "train_loss": 1.5, "train_runtime": 3.0},
]


def colours_of(chart):
    return {"#{:02x}{:02x}{:02x}".format(*pixel) for pixel in np.asarray(chart).reshape(-1, 3)}


def test_a_curve_for_each_task_in_training_and_held_out():
    assert curves(HISTORY) == {
        "eval_loss/edit": [(10, 1.9)],
        "loss/combine": [(10, 1.5), (20, 0.8)],
        "loss/edit": [(10, 2.5), (20, 1.1)],
    }


def test_without_tasks_the_loss_itself_is_drawn():
    assert curves([{"step": 1, "loss": 3.0}]) == {"loss": [(1, 3.0)]}


def test_every_curve_shows_in_its_colour():
    drawn = colours_of(loss_chart(HISTORY)) & set(COLOURS)
    assert drawn == set(COLOURS[: len(curves(HISTORY))])


def test_a_falling_loss_falls_on_the_chart():
    chart = np.asarray(loss_chart([{"step": step, "loss": 4.0 / step} for step in range(1, 9)]))
    line = (chart == [int(COLOURS[0][i : i + 2], 16) for i in (1, 3, 5)]).all(axis=2)[74:]  # below the legend
    rows = [np.flatnonzero(column).mean() for column in line.T if column.any()]
    assert len(rows) > 100
    assert all(later >= earlier for earlier, later in itertools.pairwise(rows))


def test_a_run_that_logged_nothing_has_a_chart_that_says_so():
    assert loss_chart([]).size == loss_chart(HISTORY).size
