"""`loss.edit_weight`: positions weigh by what an edit changes there, with mean 1 in each row, however a run is cut."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from embedding_sets import write_recipe
from PIL import ImageDraw
from training_runs import run, trainer_of

from hf_qie.data.images import to_pixels
from hf_qie.demo.shapes import Scene, Thing, draw
from hf_qie.models.qwen_image.family import EDIT_PLUS
from hf_qie.models.qwen_image_21.family import QWEN_IMAGE_21
from hf_qie.training.checkpoints import COMPLETE, read_complete
from hf_qie.training.losses import edit_weights, latent_change, velocity_mse
from hf_qie.training.model import parameters
from hf_qie.training.objective import may_share_aspect

both_families = pytest.mark.parametrize("family", ["edit_plus", "qwen_image_21"])
WEIGHTED = {"edit_weight": 3.0}
SGD = {"optim": "sgd", "learning_rate": 0.1}
STRENGTHS = (0.0, 0.5, 1.0, 4.0, 100.0)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- the law ---------------------------------------------------------------------------------------------------------


def test_one_part_is_spread_evenly_and_k_parts_go_by_change():
    change = torch.tensor([[0.0, 0.0, 0.0, 4.0], [1.0, 3.0, 2.0, 2.0]])
    assert edit_weights([change], 1).tolist() == [[0.5, 0.5, 0.5, 2.5], [0.75, 1.25, 1.0, 1.0]]
    assert edit_weights([change], 3).tolist() == [[0.25, 0.25, 0.25, 3.25], [0.625, 1.375, 1.0, 1.0]]


@pytest.mark.parametrize("k", STRENGTHS)
def test_weights_have_mean_1_and_grow_with_change_between_their_bounds(k):
    change = normal(5, 64).abs()
    weights = edit_weights([change], k)
    torch.testing.assert_close(weights.mean(dim=1), torch.ones(5), rtol=0, atol=1e-6)
    assert weights.min() >= 1 / (1 + k) and weights.max() <= (1 + k * 64) / (1 + k)
    order = change.argsort(dim=1)
    assert (weights.gather(1, order).diff(dim=1) >= 0).all()


def test_all_weigh_1_without_edit_weight_and_without_change():
    assert (edit_weights([normal(2, 9).abs()], 0) == 1).all()
    for k in STRENGTHS:
        torch.testing.assert_close(edit_weights([torch.zeros(2, 9)], k), torch.ones(2, 9))


def test_an_edit_weight_without_bounds_leaves_what_changes_alone():
    change = normal(3, 9).abs()
    expected = change / change.mean(dim=1, keepdim=True)
    torch.testing.assert_close(edit_weights([change], 1e6), expected, rtol=0, atol=1e-5)


def test_a_row_weighs_the_same_in_any_batch_and_at_any_scale():
    change = normal(4, 16).abs()
    together = edit_weights([change], 2)
    assert torch.equal(edit_weights([change[2:3]], 2), together[2:3])
    torch.testing.assert_close(edit_weights([7 * change], 2), together)


def test_of_several_sources_the_nearest_counts_at_each_position():
    one, other = torch.tensor([[0.0, 4.0, 1.0]]), torch.tensor([[2.0, 0.0, 3.0]])
    expected = edit_weights([torch.tensor([[0.0, 0.0, 1.0]])], 1)
    assert torch.equal(edit_weights([one, other], 1), expected)
    assert torch.equal(edit_weights([other, one], 1), expected)


def test_the_loss_of_a_row_is_the_mean_of_weighted_positions():
    latents, noise, prediction = normal(3, 2, 5, 64)
    weight, weights = torch.tensor([1.0, 0.5]), edit_weights([normal(2, 5, seed=1).abs()], 2)
    squares = ((prediction - (noise - latents)) ** 2).mean(dim=2)
    expected = weight * torch.stack([(w * s).mean() for w, s in zip(weights, squares, strict=True)])
    torch.testing.assert_close(velocity_mse(prediction, latents, noise, weight, of_positions=weights), expected)
    evenly = velocity_mse(prediction, latents, noise, weight, of_positions=torch.ones(2, 5))
    assert torch.equal(evenly, velocity_mse(prediction, latents, noise, weight))


# --- what changes, in sizes that differ ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [EDIT_PLUS, QWEN_IMAGE_21])
def test_change_in_one_size_is_the_mean_distance_of_packed_latents(family):
    target, source = normal(2, 2, 4 * 6, 64)
    change = latent_change(family.unpack(target, (4, 6)), family.unpack(source, (4, 6)), grid=(4, 6))
    torch.testing.assert_close(change, (target - source).abs().mean(dim=2))


def plane(height: int, width: int) -> torch.Tensor:
    """Latents [1, 2, height, width] that are the coordinates of their positions, 0 to 1 over the image."""
    down, right = ((torch.arange(side) + 0.5) / side for side in (height, width))
    return torch.stack(torch.meshgrid(down, right, indexing="ij"))[None]


@pytest.mark.parametrize("size", [(32, 32), (24, 22), (8, 12)], ids=["twice", "odd", "half"])
@pytest.mark.parametrize("side", [1, 2])
def test_a_source_of_another_size_is_compared_at_the_same_places(size, side):
    grid = 16 // side, 16 // side
    change = latent_change(plane(16, 16), plane(*size), grid=grid).view(grid)
    assert change[2:-2, 2:-2].abs().max() < 1e-3, "half a pixel is 0.02 and more"
    offset = latent_change(plane(16, 16) + 0.5, plane(*size), grid=grid).view(grid)
    assert (offset[2:-2, 2:-2] - 0.5).abs().max() < 1e-3
    constant = latent_change(torch.ones(1, 4, 16, 16), torch.zeros(1, 4, *size), grid=grid)
    torch.testing.assert_close(constant, torch.ones_like(constant))  # at the edges too


@pytest.mark.parametrize(("source_px", "least"), [(128, 4), (256, 2)])
def test_a_small_edit_weighs_more_than_its_surroundings(tiny, source_px, least):
    """Of images through the tiny VAE: by how much, on average, in sources of the target's size and of twice that."""
    vae = EDIT_PLUS.load_vae(str(tiny()), revision=None, dtype=torch.float32, device=torch.device("cpu"))
    things = tuple(
        Thing(shape=s, colour="blue", corner=c) for s, c in (("circle", "top left"), ("square", "top right"))
    )
    before = draw(Scene(above="white", below="grey", things=things, size_px=(256, 256)))
    after, box = before.copy(), (64, 160, 128, 224)
    ImageDraw.Draw(after).rectangle(box, fill=(214, 40, 40))

    def encoded(image, px: int) -> torch.Tensor:
        latents = vae([to_pixels(np.asarray(image.resize((px, px))))])[0][None]
        return EDIT_PLUS.unpack(latents, (px // 16, px // 16))

    weights = edit_weights([latent_change(encoded(after, 128), encoded(before, source_px), grid=(8, 8))], 1.0)
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[5:7, 2:4] = True  # 128 px in tokens of 16
    weights = weights.view(8, 8)
    assert weights[inside].mean() / weights[~inside].mean() > least


# --- which sources count ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target_px", "source_px"), [(512, 1024), (512, 512), (1024, 1024), (256, 1024)])
def test_images_of_one_aspect_are_aligned_however_their_sides_are_rounded(target_px, source_px):
    def grids(aspect: float, other: float) -> list[tuple[int, int]]:
        sizes = EDIT_PLUS.fit((aspect, 1), target_px**2), EDIT_PLUS.fit((other, 1), source_px**2)
        return [EDIT_PLUS.grid_of(size) for size in sizes]

    aspects = np.geomspace(1 / 3, 3, 201)
    assert all(may_share_aspect(*grids(aspect, aspect), rounding=1) for aspect in aspects)
    assert not any(may_share_aspect(*grids(aspect, 1.4 * aspect), rounding=1) for aspect in aspects)


def batch_of(trainer, *grids: tuple[int, int], inverse: bool = False) -> dict:
    """Two rows of a target and its sources with these grids, which share their first latents."""
    target, *sources = (normal(math.prod(grid), 64, seed=n).half().numpy() for n, grid in enumerate(grids))
    if inverse:
        target, sources = sources[0], [target]
    embeds = np.zeros((4, 96), np.float16)
    row = {
        "target_latents": target,
        "source_latents": np.concatenate([target[:0], *sources]),
        "prompt_parts": [embeds],
        "image_slots": [2] * len(sources),
        "grids": list(grids),
        "task": "edit",
    }
    rows = [row | {"row": number, "draws": [number]} for number in range(2)]
    return trainer.objective.collate(rows)


def test_sources_of_another_aspect_do_not_count_and_rows_without_sources_weigh_evenly(tiny, tmp_path):
    trainer = trainer_of(write_recipe(tmp_path, tiny(), loss=WEIGHTED))
    weights = trainer.objective.edit_weights
    assert weights(batch_of(trainer, (4, 4))) is None
    assert weights(batch_of(trainer, (4, 4), (2, 12))) is None
    alone = weights(batch_of(trainer, (4, 4), (4, 4)))
    assert alone.shape == (2, 16) and alone.std() > 0.05
    assert torch.equal(weights(batch_of(trainer, (4, 4), (4, 4), (2, 12))), alone)
    assert not torch.equal(weights(batch_of(trainer, (4, 4), (4, 4), (6, 6))), alone)
    assert torch.equal(weights(batch_of(trainer, (4, 4), (4, 4), inverse=True)), alone), "|a - b| is |b - a|"


# --- in training -----------------------------------------------------------------------------------------------------


def by_task(trainer) -> dict[str, dict]:
    """The first batch of each task."""
    found = {}
    for batch in trainer.get_train_dataloader():
        found.setdefault(batch["task"][0], batch)
    return found


@both_families
def test_the_loss_is_weighted_in_training_alone_and_where_there_is_a_source(tiny, tmp_path, family):
    path = write_recipe(tmp_path, tiny(family), loss=WEIGHTED)
    trainer, plain = trainer_of(path), trainer_of(path, "loss.edit_weight=0")
    batches = by_task(trainer)
    assert plain.objective.edit_weights(batches["edit"]) is None
    with torch.no_grad():
        for task, batch in batches.items():
            evenly, weighted = (one.objective.losses(trainer.model, batch) for one in (plain, trainer))
            assert torch.equal(evenly, weighted) == (task == "text_to_image")
            assert torch.equal(trainer.objective.losses(trainer.model, batch, held_out=True), evenly)


def test_all_draws_of_a_row_have_its_weights(tiny, tmp_path):
    path = write_recipe(tmp_path, tiny("qwen_image_21"), loss=WEIGHTED, mix={"draws_per_row": 2, "same_shape": 2})
    trainer = trainer_of(path)
    batch = by_task(trainer)["edit"]
    weights = trainer.objective.edit_weights(batch)
    assert weights.shape == (4, 16)
    assert torch.equal(weights[0::2], weights[1::2]) and not torch.equal(weights[0], weights[2])
    one = {key: value[:1] for key, value in batch.items() if key != "grids"} | {"grids": batch["grids"]}
    torch.testing.assert_close(trainer.objective.edit_weights(one), weights[:1])


def assert_close(one, other) -> None:
    theirs = parameters(other.model)
    for name, value in parameters(one.model).items():
        torch.testing.assert_close(value, theirs[name], atol=1e-5, rtol=0)


@both_families
def test_the_cut_of_a_step_changes_nothing(tiny, tmp_path, family):
    path = write_recipe(tmp_path, tiny(family), loss=WEIGHTED, training=SGD)
    whole = run(path, f"training.output_dir={tmp_path / 'whole'}")
    cut = "training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=2"
    assert_close(run(path, f"training.output_dir={tmp_path / 'cut'}", *cut), whole)


@both_families
def test_a_resumed_run_is_one_that_was_never_interrupted(tiny, tmp_path, family):
    path = write_recipe(tmp_path, tiny(family), loss=WEIGHTED)
    straight = run(path)
    shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resumed = run(path, f"training.output_dir={tmp_path / 'resumed'}")
    theirs = parameters(straight.model)
    assert all(torch.equal(value, theirs[name]) for name, value in parameters(resumed.model).items())


def test_a_checkpoint_from_before_edit_weight_had_none(tiny, tmp_path):
    path = write_recipe(tmp_path, tiny())
    run(path, "training.max_steps=2")
    file = tmp_path / "run" / "checkpoint-2" / COMPLETE
    complete = json.loads(file.read_text())
    assert complete["identity"].pop("loss.edit_weight") == 0
    file.write_text(json.dumps(complete))
    assert run(path).state.global_step == 4
    assert read_complete(tmp_path / "run" / "checkpoint-4")["identity"]["loss.edit_weight"] == 0
