"""What captions share is stored in one of two ways; whatever opens, mixes or loads a set goes by its columns."""

import numpy as np
import pytest
from datasets import Dataset
from shaped_sets import CAPTIONS, embedding_set

from hf_qie.config.recipe import Mix
from hf_qie.data.collate import collate
from hf_qie.data.embedding_sets import check_columns
from hf_qie.data.largest import largest_in
from hf_qie.data.loader import TaskRows
from hf_qie.data.mixture import read_groups
from hf_qie.data.schema import PROMPT_COLUMNS, prompt_columns_in, set_features, shared_embeds
from hf_qie.errors import InputError
from hf_qie.models.base import families

A, B = (4, 6), (6, 4)
IMAGE_EMBEDS, PREFIX_EMBEDS = PROMPT_COLUMNS


def set_of(prompt_columns, **more) -> Dataset:
    return embedding_set([(A, B, A), (A,), (B, A)], inverse=[2], prompt_columns=prompt_columns, **more)


def test_every_family_stores_what_captions_share_in_one_of_the_ways():
    assert {family.prompt_columns for family in families()} <= {*PROMPT_COLUMNS}


@pytest.mark.parametrize("prompt_columns", PROMPT_COLUMNS)
def test_a_set_has_the_columns_of_one_way_in_both_directions(prompt_columns):
    widths = {"width": 8, "latent_width": 64, "inverse_latents": False}
    features = set_features(captions=["a"], inverse_captions=["b"], prompt_columns=prompt_columns, **widths)
    every = {prefix + name for way in PROMPT_COLUMNS for name in way for prefix in ("", "inverse_")}
    assert every.intersection(features) == {prefix + name for name in prompt_columns for prefix in ("", "inverse_")}
    assert prompt_columns_in(features) == prompt_columns and shared_embeds(features) == prompt_columns[0]
    check_columns(set_of(prompt_columns), where="set")


def test_a_set_with_columns_of_both_ways_is_refused():
    data = set_of(PREFIX_EMBEDS)
    both, feature = data, data.features["prefix_embeds"]
    for prefix in ("", "inverse_"):
        both = both.add_column(f"{prefix}image_embeds", data[f"{prefix}prefix_embeds"], feature=feature)
    with pytest.raises(InputError, match=r"^set: column (inverse_)?prefix_embeds: got .*, expected None; "):
        check_columns(both, where="set")
    surplus = [prefix + name for name in PREFIX_EMBEDS for prefix in ("", "inverse_")]
    check_columns(both.remove_columns(surplus), where="set")
    with pytest.raises(InputError, match=r"^set: has no column image_slots"):
        check_columns(data.remove_columns("image_slots"), where="set")


# of a row with two sources, six embeddings before the caption and images behind the 2nd and the 5th
WRONG = {
    "fewer places than sources": [2],
    "more places than sources": [2, 5, 6],
    "out of order": [5, 2],
    "negative": [-1, 5],
    "behind the caption": [2, 7],
    "a null": [2, None],
    "null": None,
}


def with_value(row: int, column: str, value: list | None) -> Dataset:
    """A set with places of images in which one row has another value."""
    data = set_of(PREFIX_EMBEDS)
    rows = data.to_list()
    rows[row][column] = value
    return Dataset.from_list(rows, features=data.features)


@pytest.mark.parametrize("places", WRONG.values(), ids=WRONG)
def test_places_that_no_prompt_can_have_are_refused(places):
    with pytest.raises(InputError, match=r"^set: place 0, column image_slots: has .* \(1 such rows\)"):
        check_columns(with_value(0, "image_slots", places), where="set")


def test_places_may_be_at_either_end_and_at_one_place():
    for places in ([0, 0], [0, 6], [6, 6]):
        check_columns(with_value(0, "image_slots", places), where="set")


@pytest.mark.parametrize("places", [[], [4], None])
def test_the_places_of_an_inverse_are_checked_too(places):
    with pytest.raises(InputError, match=r"^set: place 2, column inverse_image_slots: has "):
        check_columns(with_value(2, "inverse_image_slots", places), where="set")


def test_a_row_has_its_embeddings_in_either_way_and_places_in_one():
    data = [set_of(way) for way in PROMPT_COLUMNS]
    one, other = (TaskRows("task", each, mix=Mix()) for each in data)
    for index, inverse, places in ((0, False, [2, 5]), (1, False, []), (2, False, [2]), (2, True, [2])):
        for caption in (None, 0.0, 0.99):
            mine, theirs = (rows.read(index, inverse=inverse, caption=caption) for rows in (one, other))
            assert (mine.pop("image_slots"), theirs.pop("image_slots")) == ([], places)
            for a, b in zip(mine.pop("prompt_parts"), theirs.pop("prompt_parts"), strict=True):
                np.testing.assert_array_equal(a, b)
            assert mine.keys() == theirs.keys() and mine["caption"] == theirs["caption"]


def test_a_batch_lists_lengths_and_places_of_each_row():
    rows = TaskRows("task", embedding_set([(A, B, A)] * 3, prompt_columns=PREFIX_EMBEDS), mix=Mix())
    read = [rows.read(index, inverse=False, caption=0.0) | {"draws": [index]} for index in range(3)]
    batch = collate(read)
    assert batch["image_slots"] == [[2, 5]] * 3
    assert batch["prompt_lengths"] == [8, 9, 10]  # texts differ in length
    for row, length, embeds in zip(read, batch["prompt_lengths"], batch["prompt_embeds"], strict=True):
        np.testing.assert_array_equal(embeds[:length].numpy(), np.concatenate(row["prompt_parts"]))
        assert not embeds[length:].any()


def test_mixture_and_largest_rows_do_not_depend_on_the_way():
    mix = Mix(inverse_share=0.25)
    found = []
    for way in PROMPT_COLUMNS:
        sets = {"task": set_of(way, inverse_grids=(A, B), captions=lambda row: CAPTIONS)}
        groups = read_groups(sets, {"task": 1.0}, mix)
        found.append(([vars(group) for group in groups], largest_in(sets, {"task": 1.0}, mix)))
    (one, shape), (other, same) = found
    assert shape == same and sum(group["inverse"].sum() for group in one) == 1
    for a, b in zip(one, other, strict=True):
        for name, value in a.items():
            np.testing.assert_array_equal(value, b[name])
