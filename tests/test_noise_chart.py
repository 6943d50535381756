"""The picture of the noise shows what is drawn, how it weighs, and where the pipeline samples."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_shift, retrieve_timesteps
from PIL import ImageColor

from hf_qie.config.recipe import load_recipe
from hf_qie.training.losses import WEIGHTINGS
from hf_qie.training.noise_chart import BAR, BARS, DRAWS, LINE, MARGIN, TICK, WIDTH, Noise, noise_chart, noise_of

MIDDLES = (np.arange(BARS) + 0.5) / BARS


def noise(tmp_path: Path, tiny: Path, **loss) -> Noise:
    recipe = {"tasks": {"edit": {"data": "edit.jsonl"}}, "loss": loss}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    config = json.loads((tiny / "scheduler" / "scheduler_config.json").read_text())
    return noise_of(load_recipe(tmp_path / "recipe.yaml"), config)


def test_bars_are_the_density_of_the_draws(tiny, tmp_path):
    """Under a shift of m the density of sigma is m / (m + (1 - m) sigma)^2, of uniform u."""
    found = noise(tmp_path, tiny(), shift="auto")
    m = np.exp(calculate_shift(1024, 256, 8192, 0.5, 0.9))  # of 512 x 512, by the values of scheduler_config.json
    density = m / (m + (1 - m) * MIDDLES) ** 2 / BARS
    assert found.num_target_tokens == 1024
    assert found.shares.sum() == pytest.approx(1)
    assert (abs(found.shares - density) <= 4 * np.sqrt(density / DRAWS)).all()  # four standard errors: of 50 bars


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_line_is_the_weighting(tiny, tmp_path, weighting):
    found = noise(tmp_path, tiny(), weighting=weighting)
    expected = WEIGHTINGS[weighting](torch.from_numpy(MIDDLES)).numpy()
    np.testing.assert_allclose(found.weights, expected, rtol=1e-5)  # float32


def test_the_ticks_are_where_the_pipeline_samples(tiny, tmp_path):
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tiny(), subfolder="scheduler")
    mu = calculate_shift(1024, 256, 8192, 0.5, 0.9)
    timesteps, _ = retrieve_timesteps(scheduler, 20, "cpu", sigmas=np.linspace(1.0, 1 / 20, 20), mu=mu)
    # whatever the recipe trains on
    found = noise(tmp_path, tiny(), shift=2.0, timestep_sampling="logit_normal")
    np.testing.assert_allclose(found.inference, timesteps.numpy() / 1000, rtol=1e-6)


def test_the_picture_shows_all_three(tiny, tmp_path):
    found = noise(tmp_path, tiny(), timestep_sampling="logit_normal", weighting="cosmap", shift="none")
    pixels = np.asarray(noise_chart(found)).astype(int)
    blue, red, black = (np.array(ImageColor.getrgb(colour)) for colour in (BAR, LINE, TICK))
    drawn = pixels[MARGIN:]  # below the words
    step = (WIDTH - 2 * MARGIN) / BARS
    columns = (MARGIN + (np.arange(BARS) + 0.5) * step).astype(int)
    heights = np.array(
        [((drawn[:, x] == blue).all(axis=-1) | (drawn[:, x] == red).all(axis=-1)).sum() for x in columns]
    )
    assert np.corrcoef(heights, found.shares)[0, 1] > 0.98
    lines = [np.flatnonzero((drawn[:, x] == red).all(axis=-1)).mean() for x in columns]
    assert np.corrcoef(lines, found.weights)[0, 1] < -0.98  # rows count downwards
    ticks = max((row == black).all(axis=-1).sum() for row in drawn)
    assert ticks == len(found.inference)


def test_check_draws_it_beside_the_contact_sheets(tiny, tmp_path, edits, capsys):
    from hf_qie.check import main

    recipe = {
        "model": str(tiny()),
        "tasks": {"edit": {"data": str(edits / "edit.jsonl")}},
        "extract": {"output_dir": str(tmp_path / "sets"), "image_sample_size": 64, "source_sample_size": 64},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    main([str(tmp_path / "recipe.yaml")])
    path = tmp_path / "sets" / "first-look" / "noise-levels.png"
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert str(path) in capsys.readouterr().out
