"""What a draw number decides: sigma and noise. Numbers are those of the published scheduler."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling
from embedding_sets import write_recipe

from hf_qie.config.recipe import Loss, load_recipe
from hf_qie.models.denoising import shift_mu
from hf_qie.training.objective import (
    Objective,
    add_noise,
    eval_fractions,
    noise_for,
    shifted,
    sigmas_for,
    time_fraction,
)

SCHEMES = ["uniform", "stratified", "logit_normal", "mode"]
G = 16  # global batch size


@pytest.fixture(scope="module")
def scheduler():
    """The one of Qwen-Image-Edit, as its scheduler_config.json has it."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_image_seq_len=256,
        base_shift=0.5,
        max_image_seq_len=8192,
        max_shift=0.9,
        shift=1.0,
        shift_terminal=0.02,
        time_shift_type="exponential",
    )


@pytest.mark.parametrize(
    ("side_px", "mu", "shift"),
    [(512, 0.5387, 1.714), (768, 0.6032, None), (1024, 0.6935, 2.00), (1328, 0.8343, 2.303), (2048, 1.3129, None)],
)
def test_mu_is_the_schedulers_own_at_the_targets_tokens(scheduler, side_px, mu, shift):
    num_tokens = (side_px // 16) ** 2
    got = shift_mu(num_tokens, scheduler.config)
    assert got == pytest.approx(mu, abs=5e-5)  # the four digits given
    assert got == pytest.approx(calculate_shift(num_tokens, 256, 8192, 0.5, 0.9), rel=1e-12)
    if shift:
        assert np.exp(got) == pytest.approx(shift, abs=5e-3)


def test_a_scheduler_without_dynamic_shifting_has_one_shift():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    u = torch.tensor([0.1, 0.5, 0.9])
    by_scheduler = 3.0 * u / (1 + 2.0 * u)  # scheduling_flow_match_euler_discrete.py, set_timesteps
    torch.testing.assert_close(shifted(u, shift_mu(4096, scheduler.config)), by_scheduler)


def test_sigmas_are_shifted_as_the_scheduler_does_before_its_stretch(scheduler):
    u = torch.linspace(0.001, 0.999, 97)
    torch.testing.assert_close(shifted(u, 0.6935), scheduler.time_shift(0.6935, 1.0, u))  # float32's default tolerance
    assert shifted(u.double(), 0.6935).dtype == torch.float32
    torch.testing.assert_close(shifted(u, None), u, rtol=0, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes_equal_diffusers_on_the_same_numbers(scheme):
    loss = Loss(timestep_sampling=scheme, logit_mean=0.4, logit_std=1.3, mode_scale=0.9)
    theirs = compute_density_for_timestep_sampling(
        scheme, 1000, logit_mean=0.4, logit_std=1.3, mode_scale=0.9, generator=torch.Generator().manual_seed(0)
    )
    generator = torch.Generator().manual_seed(0)
    base = (torch.randn if scheme == "logit_normal" else torch.rand)(1000, generator=generator)
    torch.testing.assert_close(time_fraction(base, loss), theirs)  # float32's default tolerance


@pytest.mark.parametrize("scheme", SCHEMES)
def test_u_lies_between_0_and_1_without_them(scheme):
    loss = Loss(timestep_sampling=scheme, mode_scale=1.29)
    u = time_fraction(
        torch.tensor([0.0, 1.0, -50.0, 50.0] if scheme == "logit_normal" else [0.0, 1 - 1e-9]).double(), loss
    )
    assert ((u > 0) & (u < 1)).all()
    assert shifted(u, 0.7).isfinite().all()


@pytest.mark.parametrize("kind", ["edit_plus", "qwen_image_21"])
def test_rows_are_shifted_by_the_tokens_of_their_target_alone(tiny, tmp_path, kind):
    """Those of sources do not count, in training and in evaluation: so the pipelines call their scheduler."""
    model, grids, sigmas = tiny(kind), [(32, 32), (64, 64)], {}
    row = {"target_latents": np.zeros((1024, 64), np.float16), "source_latents": np.zeros((4096, 64), np.float16)}
    row |= {"prompt_parts": [np.zeros((5, 96), np.float16)], "image_slots": [2], "grids": grids, "task": "edit"}
    rows = [row | {"row": number, "draws": [number]} for number in range(4)]
    for shift in ("none", "auto"):
        objective = Objective(load_recipe(write_recipe(tmp_path, model, loss={"shift": shift})), global_batch_size=4)
        held_out = objective.collate_held_out(rows, fractions=torch.tensor([0.1, 0.3, 0.6, 0.9]))
        sigmas[shift] = torch.cat([objective.collate(rows)["sigma"], held_out["sigma"]])
    of_model = FlowMatchEulerDiscreteScheduler.from_pretrained(model, subfolder="scheduler")
    keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = calculate_shift(1024, *(of_model.config[key] for key in keys))
    torch.testing.assert_close(sigmas["auto"], of_model.time_shift(mu, 1.0, sigmas["none"]))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_sigma_is_a_function_of_seed_and_draw_alone(scheme):
    options = {"loss": Loss(timestep_sampling=scheme), "seed": 3, "global_batch_size": G, "mu": 0.6}
    whole = sigmas_for(range(64), **options)
    assert whole.dtype == torch.float32
    assert len(set(whole.tolist())) == 64
    backwards = torch.cat([sigmas_for([draw], **options) for draw in reversed(range(64))]).flip(0)
    torch.testing.assert_close(backwards, whole, rtol=0, atol=0)
    assert not torch.equal(sigmas_for(range(64), **options | {"seed": 4}), whole)


def test_a_stratified_step_has_one_sigma_in_each_of_its_strata_in_an_order_of_its_own():
    loss = Loss(timestep_sampling="stratified")
    u = sigmas_for(range(5 * G), loss=loss, seed=0, global_batch_size=G, mu=None).reshape(5, G)
    strata = (u * G).long()
    assert all(sorted(step.tolist()) == list(range(G)) for step in strata)
    assert len({tuple(step.tolist()) for step in strata}) == 5


@pytest.mark.parametrize("scheme", ["uniform", "stratified"])
def test_u_is_uniform_over_many_draws(scheme):
    loss, num_draws = Loss(timestep_sampling=scheme), 2000
    u = sigmas_for(range(num_draws), loss=loss, seed=0, global_batch_size=G, mu=None)
    assert abs(u.mean() - 0.5) <= 3 * np.sqrt(1 / 12 / num_draws)  # three standard errors of independent draws
    assert abs((u < 0.25).float().mean() - 0.25) <= 3 * np.sqrt(3 / 16 / num_draws)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_held_out_rows_share_out_the_density_that_training_draws_from(scheme):
    loss, rows = Loss(timestep_sampling=scheme, logit_mean=0.5), range(40, 140)
    u = eval_fractions(rows, loss=loss, seed=0)
    assert torch.equal(u, eval_fractions(rows, loss=loss, seed=0))
    many = sigmas_for(range(20_000), loss=loss, seed=0, global_batch_size=G, mu=None)
    for edge in (0.1, 0.25, 0.5, 0.75, 0.9):
        # strata of 1/100 each; and three standard errors of the 20,000 draws
        assert abs((u < edge).float().mean() - (many < edge).float().mean()) <= 0.01 + 3 * 0.5 / np.sqrt(20_000)


def test_the_noise_of_a_draw_is_the_same_in_any_batch():
    whole = noise_for([4, 9, 2], (6, 64), seed=0)
    assert whole.dtype == torch.float32
    torch.testing.assert_close(noise_for([2], (6, 64), seed=0)[0], whole[2], rtol=0, atol=0)
    torch.testing.assert_close(noise_for([9, 4], (6, 64), seed=0), whole[[1, 0]], rtol=0, atol=0)


def test_two_draws_have_independent_normal_noise():
    one, other = noise_for([0, 1], (1000, 64), seed=0).reshape(2, -1)
    num = len(one)
    for values, scale in ((one, 1), (other, 1), (one * other, 1), (one**2 - 1, np.sqrt(2))):
        assert abs(values.mean()) <= 3 * scale / np.sqrt(
            num
        )  # three standard errors: mean 0, no correlation, variance 1


def test_evaluation_noise_is_not_that_of_a_draw():
    assert not torch.equal(noise_for([3], (6, 64), seed=0, purpose="eval noise"), noise_for([3], (6, 64), seed=0))


def test_noise_takes_the_place_of_latents_by_sigma_in_float32():
    latents, noise = torch.randn(3, 6, 64).half(), torch.randn(3, 6, 64)
    noisy = add_noise(latents, noise, torch.tensor([0.0, 0.25, 1.0]))
    assert noisy.dtype == torch.float32
    torch.testing.assert_close(noisy[0], latents[0].float(), rtol=0, atol=0)
    torch.testing.assert_close(noisy[1], 0.75 * latents[1].float() + 0.25 * noise[1], rtol=0, atol=0)
    torch.testing.assert_close(noisy[2], noise[2], rtol=0, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_mean_of_diffusers_scripts_is_ours_with_the_other_sign(scheduler, scheme):
    """Their u picks from timesteps that fall, as in train_dreambooth_lora_qwen_image.py; ours is the noise level."""
    u = compute_density_for_timestep_sampling(
        scheme, 40_000, logit_mean=0.8, logit_std=1.0, mode_scale=0.9, generator=torch.Generator().manual_seed(0)
    )
    theirs = scheduler.timesteps[(u * scheduler.config.num_train_timesteps).long()] / 1000
    ours = Loss(timestep_sampling=scheme, logit_mean=-0.8, mode_scale=0.9)
    sigma = sigmas_for(range(10_000), loss=ours, seed=0, global_batch_size=G, mu=None)
    quantiles = torch.linspace(0.05, 0.95, 7)
    # three standard errors at the thinnest density, and their grid of a thousandth
    torch.testing.assert_close(sigma.quantile(quantiles), theirs.quantile(quantiles), atol=0.02, rtol=0)
