"""Rows of one shape -> one padded batch."""

import numpy as np
import pytest
import torch

from hf_qie.data.collate import Batch, collate


def row(length, *, grids=((2, 3), (1, 2)), draw=0):
    rng = np.random.default_rng(draw)
    num_target, *num_sources = (height * width for height, width in grids)
    return {
        "target_latents": rng.standard_normal((num_target, 64)).astype(np.float16),
        "source_latents": rng.standard_normal((sum(num_sources), 64)).astype(np.float16),
        "prompt_parts": [1 + rng.random((part, 8)).astype(np.float16) for part in (1, length - 1)],
        "image_slots": [1 + place for place in range(len(grids) - 1)],
        "grids": list(grids),
        "task": f"task {draw}",
        "row": 10 + draw,
        "draws": [draw],
    }


def test_prompts_are_padded_with_zeros_on_the_right():
    rows = [row(3, draw=0), row(5, draw=1)]
    batch = collate(rows)
    assert batch["prompt_lengths"] == [3, 5]
    assert batch["prompt_embeds"].shape == (2, 5, 8)
    assert (batch["prompt_embeds"][0, 3:] == 0).all()
    for place, given in enumerate(rows):
        kept = batch["prompt_embeds"][place][: batch["prompt_lengths"][place]]
        np.testing.assert_array_equal(kept.numpy(), np.concatenate(given["prompt_parts"]))


def test_latents_are_stacked_in_float16_and_the_rest_is_listed():
    rows = [row(3, draw=0), row(3, draw=1)]
    batch = collate(rows)
    assert set(batch) == set(Batch.__annotations__) - {"images", "noise", "sigma"}
    for name, num_tokens in (("target_latents", 6), ("source_latents", 2)):
        assert batch[name].shape == (2, num_tokens, 64)
        assert batch[name].dtype == batch["prompt_embeds"].dtype == torch.float16
        np.testing.assert_array_equal(batch[name].numpy(), np.stack([given[name] for given in rows]))
    assert (batch["prompt_lengths"], batch["image_slots"]) == ([3, 3], [[1], [1]])
    lists = {name: batch[name] for name in ("grids", "task", "row", "draw")}
    assert lists == {"grids": [(2, 3), (1, 2)], "task": ["task 0", "task 1"], "row": [10, 11], "draw": [0, 1]}


def test_images_take_the_place_of_latents_by_grid():
    images = [np.full((2, 32, 48, 3), 1, np.uint8), np.full((2, 16, 32, 3), 2, np.uint8)]
    images[0][1] = 3
    latents = ("target_latents", "source_latents")
    rows = [{name: value for name, value in row(3, draw=draw).items() if name not in latents} for draw in (0, 1)]
    batch = collate([row | {"images": [place[i] for place in images]} for i, row in enumerate(rows)])
    assert set(batch) == set(Batch.__annotations__) - {"target_latents", "source_latents", "noise", "sigma"}
    for stacked, given in zip(batch["images"], images, strict=True):
        np.testing.assert_array_equal(stacked.numpy(), given)


def test_text_to_image_rows_have_no_source_tokens():
    assert collate([row(3, grids=[(2, 3)]), row(4, grids=[(2, 3)], draw=1)])["source_latents"].shape == (2, 0, 64)


@pytest.mark.parametrize("grids", [((3, 2), (1, 2)), ((2, 3), (2, 1)), ((2, 3),)])
def test_rows_of_two_shapes_are_refused(grids):
    with pytest.raises(AssertionError, match="shapes differ"):
        collate([row(3), row(3, grids=grids)])
