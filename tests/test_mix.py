"""The law of the draw: shares, mixture plans, and what they do not depend on."""

from collections import Counter

import numpy as np
import pytest
from datasets import load_from_disk
from shaped_sets import embedding_set

from hf_qie.config.recipe import Mix
from hf_qie.data.mixture import (
    group_plan,
    group_shares,
    mix_table,
    mix_warnings,
    mixture_plan,
    read_groups,
    resolve_same_shape,
)
from hf_qie.data.seeding import draw_rng
from hf_qie.errors import InputError

A, B, C = (2, 3), (3, 2), (4, 4)
DEFAULT = Mix()
EQUAL = {0: 1.0, 1: 1.0, 2: 1.0, 3: 0.0}


@pytest.fixture(scope="module")
def sets():
    """Counts 0, 1 and 2 in `many`, 1 and 3 in `few`: shapes that differ and shapes that repeat."""
    many = [(A,)] * 5 + [(A, B)] * 20 + [(B, B)] * 9 + [(A, A, C)] * 6
    return {"many": embedding_set(many), "few": embedding_set([(C, C)] * 8 + [(A, A, B, B)] * 2)}


WEIGHTS = {"many": 1.0, "few": 3.0}


def shares_by_name(sets, weights, mix):
    groups = read_groups(sets, weights, mix)
    return {(g.task, g.num_sources): share for g, share in zip(groups, group_shares(groups, mix), strict=True)}


def plan_of(sets, mix=DEFAULT, weights=WEIGHTS, **options):
    groups = read_groups(sets, weights, mix)
    options = {"seed": 0, "same_shape": 2, "num_batches": 300} | options
    return mixture_plan(groups, group_shares(groups, mix), **options)


def only_group(data, mix=DEFAULT):
    (group,) = read_groups({"task": data}, {"task": 1.0}, mix)
    return group


def test_without_count_weights_tasks_share_by_weight_and_their_counts_by_rows(sets):
    shares = shares_by_name(sets, WEIGHTS, DEFAULT)
    assert shares == pytest.approx(
        {
            ("few", 1): 3 / 4 * 8 / 10,
            ("few", 3): 3 / 4 * 2 / 10,
            ("many", 0): 1 / 4 * 5 / 40,
            ("many", 1): 1 / 4 * 29 / 40,
            ("many", 2): 1 / 4 * 6 / 40,
        }
    )


def test_with_count_weights_counts_share_by_theirs_and_the_tasks_of_a_count_by_weight(sets):
    shares = shares_by_name(sets, WEIGHTS, Mix(source_count_weights=EQUAL))
    assert shares == pytest.approx(
        {("few", 1): 1 / 4, ("few", 3): 0, ("many", 0): 1 / 3, ("many", 1): 1 / 12, ("many", 2): 1 / 3}
    )


@pytest.mark.parametrize("mapping", [None, EQUAL])
def test_groups_are_drawn_by_their_shares(sets, mapping):
    num_batches, mix = 10_000, Mix(source_count_weights=mapping)
    plan = plan_of(sets, mix, num_batches=num_batches)
    seen = Counter(zip(plan["task"], plan["num_sources"], strict=True))
    for name, share in shares_by_name(sets, WEIGHTS, mix).items():
        three_errors = 3 * np.sqrt(num_batches * share * (1 - share))  # draws are independent, so counts are binomial
        assert abs(seen[name] - num_batches * share) <= three_errors


def test_the_group_of_a_batch_does_not_depend_on_the_one_before(sets):
    few = np.array(plan_of(sets, num_batches=10_000)["task"]) == "few"
    pairs = few[0::2] & few[1::2]
    assert abs(pairs.mean() - 0.75**2) <= 3 * np.sqrt(0.75**2 * (1 - 0.75**2) / len(pairs))  # three standard errors


def test_a_task_of_weight_0_is_not_drawn(sets):
    assert set(plan_of(sets, weights={"many": 0.0, "few": 1.0})["task"]) == {"few"}


def test_a_count_that_occurs_and_is_not_named_is_an_error(sets):
    with pytest.raises(InputError, match=r"source_count_weights: names \[0, 1\], but \['few', 'many'\] .*\[2, 3\]"):
        shares_by_name(sets, WEIGHTS, Mix(source_count_weights={0: 1.0, 1: 1.0}))


def test_counts_of_a_task_that_is_not_trained_need_no_name(sets):
    weights = {"many": 0.0, "few": 1.0}
    shares = shares_by_name(sets, weights, Mix(source_count_weights={1: 1.0, 3: 1.0}))
    assert shares == pytest.approx({("few", 1): 0.5, ("few", 3): 0.5})


def test_a_named_count_that_does_not_occur_drops_out_with_one_warning(sets):
    mix = Mix(source_count_weights=EQUAL | {4: 1.0, 7: 1.0})
    assert shares_by_name(sets, WEIGHTS, mix) == shares_by_name(sets, WEIGHTS, Mix(source_count_weights=EQUAL))
    groups = read_groups(sets, WEIGHTS, mix)
    warnings = mix_warnings(groups, group_shares(groups, mix), mix, rows_drawn=8, same_shape=1)
    assert warnings == ["mix.source_count_weights: no row has [4, 7] sources, so these entries drop out"]


def test_a_mix_without_weight_is_an_error(sets):
    with pytest.raises(InputError, match=r"mix.source_count_weights: all counts that occur, \[1, 3\]"):
        shares_by_name(sets, {"many": 0.0, "few": 1.0}, Mix(source_count_weights={1: 0.0, 3: 0.0}))


def test_a_weighted_task_without_rows_is_an_error(sets):
    with pytest.raises(InputError, match=r"tasks.few: weight 3, but no row"):
        read_groups(sets | {"few": sets["few"].select(range(0))}, WEIGHTS, DEFAULT)


@pytest.mark.parametrize(("short", "long"), [(1, 50), (7, 8), (300, 1000)])
def test_a_longer_run_begins_with_the_shorter_one(sets, short, long):
    assert plan_of(sets, num_batches=long).select(range(short)).to_list() == plan_of(sets, num_batches=short).to_list()


@pytest.mark.parametrize(("short", "long"), [(1, 2), (3, 40), (200, 1001)])
def test_a_longer_plan_of_a_group_begins_with_the_shorter_one(sets, short, long):
    for group in read_groups(sets, WEIGHTS, DEFAULT):
        first, more = (group_plan(group, seed=3, same_shape=4, num_batches=n).to_list() for n in (short, long))
        assert more[:short] == first


def test_a_run_has_the_batches_asked_for_even_of_one_group_or_a_rare_one():
    one = {"a": embedding_set([(A,)] * 3)}
    assert len(plan_of(one, weights={"a": 1.0}, num_batches=1234)) == 1234
    two = one | {"b": embedding_set([(A,)] * 3)}
    assert len(plan_of(two, weights={"a": 1.0, "b": 1e-4}, num_batches=1234)) == 1234


def test_the_order_of_tasks_in_the_recipe_changes_nothing(sets):
    turned = dict(reversed(sets.items()))
    assert plan_of(turned).to_list() == plan_of(sets).to_list()


def test_the_plan_of_a_group_does_not_depend_on_other_groups(sets):
    def batches(of):
        (group,) = (g for g in read_groups(of, WEIGHTS, DEFAULT) if (g.task, g.num_sources) == ("few", 1))
        return group_plan(group, seed=0, same_shape=4, num_batches=100).to_list()

    assert batches(sets) == batches({"few": sets["few"]})


def test_groups_are_drawn_in_the_order_of_their_own_plans(sets):
    run = plan_of(sets, num_batches=500).to_list()
    for group in read_groups(sets, WEIGHTS, DEFAULT):
        drawn = [batch for batch in run if (batch["task"], batch["num_sources"]) == (group.task, group.num_sources)]
        assert drawn == group_plan(group, seed=0, same_shape=2, num_batches=len(drawn)).to_list()


def test_another_seed_draws_another_run(sets):
    assert plan_of(sets, seed=1).to_list() != plan_of(sets, seed=0).to_list()


def test_a_same_shape_batch_has_one_shape():
    shapes = [(A, B), (B, A), (A, A), (C, A)] * 5
    data = embedding_set(shapes, inverse=range(10))
    mix = Mix(inverse_share=0.4)
    seen = set()
    for batch in group_plan(only_group(data, mix), seed=0, same_shape=4, num_batches=200):
        (shape,) = {shapes[row][::-1] if batch["inverse"] else shapes[row] for row in batch["rows"]}
        seen.add((batch["inverse"], shape))
    assert len(seen) == 8  # every shape, both ways


def test_an_inverse_is_bucketed_by_the_grids_stored_for_it():
    data = embedding_set([(A, B), (B, C)], inverse=[0, 1], inverse_grids=(A, C))
    group = only_group(data, Mix(inverse_share=0.5))
    assert len(set(group.bucket[group.inverse])) == 1  # swapped, they would be two
    assert len(set(group.bucket)) == 3


@pytest.mark.parametrize("num_batches", [1, 6, 7, 26, 100])
def test_rows_of_one_shape_are_drawn_equally_often_up_to_one(num_batches):
    plan = group_plan(only_group(embedding_set([(A, B)] * 13)), seed=0, same_shape=4, num_batches=num_batches)
    times = np.bincount(np.ravel(plan["rows"]), minlength=13)
    assert times.sum() == 4 * num_batches
    assert times.max() - times.min() <= 1


def test_shapes_are_drawn_in_proportion_to_their_rows_within_every_pass():
    sizes = {A: 8, B: 23, C: 9}  # 40 rows: an epoch is ten batches of four
    shapes = [(shape, A) for shape, size in sizes.items() for _ in range(size)]
    plan = group_plan(only_group(embedding_set(shapes)), seed=0, same_shape=4, num_batches=200)
    firsts = np.array([list(sizes).index(shapes[rows[0]][0]) for rows in plan["rows"]]).reshape(20, 10)
    for place, size in enumerate(sizes.values()):
        batches = (firsts == place).sum(axis=1)
        # a shape has a stretch of size / 4 of the pass's ten strata: the whole ones are its own, two at most shared
        assert (batches >= np.ceil(size / 4) - 2).all()
        assert (batches <= np.floor(size / 4) + 2).all()


def test_no_row_is_favoured_whatever_its_shape():
    shapes = [(A, A)] * 3 + [(B, B)] * 50 + [(C, C)] * 11
    num_batches = 16_000
    plan = group_plan(only_group(embedding_set(shapes)), seed=0, same_shape=4, num_batches=num_batches)
    times = np.bincount(np.ravel(plan["rows"]))
    # batches by shape vary less than independent draws would: three standard errors of those bound them
    for rows in (slice(0, 3), slice(3, 53), slice(53, 64)):
        part = len(shapes[rows]) / 64
        assert abs(times[rows].sum() / 4 - num_batches * part) <= 3 * np.sqrt(num_batches * part * (1 - part))
        assert np.ptp(times[rows]) <= 1


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_of_the_draws_of_a_row_with_an_inverse_its_share_is_inverse(share):
    with_inverse = np.arange(60) % 3 > 0  # in every shape, rows with and rows without
    data = embedding_set([(A, B)] * 30 + [(C, C)] * 30, inverse=np.flatnonzero(with_inverse))
    plan = group_plan(only_group(data, Mix(inverse_share=share)), seed=0, same_shape=4, num_batches=6000)
    rows, inverse = np.array(plan["rows"]), np.array(plan["inverse"])
    forward_times, inverse_times = (np.bincount(rows[inverse == way].ravel(), minlength=60) for way in (0, 1))
    assert (inverse_times[~with_inverse] == 0).all()
    # A row is drawn 400 times on the average. Its bucket's 10 or 20 rows take turns, so its count varies with its
    # buckets' batches alone, by less than 5 standard errors of independent draws of 4 rows for each of them
    expected_inverse = np.where(with_inverse, 400 * share, 0)
    error = 5 * np.sqrt(400 * 4 / 10)
    assert np.abs(inverse_times - expected_inverse).max() <= error
    assert np.abs(forward_times + inverse_times - 400).max() <= error
    assert abs(inverse.mean() - share * 2 / 3) <= 3 * np.sqrt(share * (1 - share) / len(inverse)) + 1e-12


def test_a_shape_with_fewer_rows_than_a_batch_repeats_them_within_it():
    plan = group_plan(only_group(embedding_set([(A, B)] * 3)), seed=0, same_shape=4, num_batches=3)
    assert all(set(rows) == {0, 1, 2} for rows in plan["rows"])
    assert Counter(np.ravel(plan["rows"])) == {0: 4, 1: 4, 2: 4}


def test_rows_are_counted_from_the_start_of_a_set_that_was_cut():
    data = embedding_set([(A,)] * 3 + [(A, B)] * 4).select(range(2, 6))
    counts = {group.num_sources: sorted(group.rows) for group in read_groups({"a": data}, {"a": 1.0}, DEFAULT)}
    assert counts == {0: [0], 1: [1, 2, 3]}


def test_the_mix_can_be_saved_and_opened_like_any_dataset(sets, tmp_path):
    plan = plan_of(sets)
    plan.save_to_disk(tmp_path / "mix")
    assert load_from_disk(tmp_path / "mix").to_list() == plan.to_list()


@pytest.mark.parametrize(("given", "resolved"), [(None, 2), (2, 2), (4, 4), (8, 8)])
def test_a_same_shape_batch_is_a_micro_batch_unless_the_recipe_says_more(given, resolved):
    assert resolve_same_shape(given, global_batch_size=8, per_device_train_batch_size=2) == resolved


@pytest.mark.parametrize(("given", "resolved"), [(None, 2), (2, 2), (4, 4)])
def test_a_same_shape_batch_counts_rows_and_not_their_draws(given, resolved):
    sizes = {"global_batch_size": 16, "per_device_train_batch_size": 8, "draws_per_row": 4}
    assert resolve_same_shape(given, **sizes) == resolved
    told = r"3 .* the 2 rows of a micro-batch \(per_.*_size, 8 / mix.draws_per_row, 4\), and the 4 rows of a step"
    with pytest.raises(InputError, match=f"same_shape: {told}"):
        resolve_same_shape(3, **sizes)


@pytest.mark.parametrize(("same_shape", "micro_batch"), [(3, 2), (16, 2), (6, 2), (1, 2)])
def test_a_same_shape_that_does_not_fit_is_an_error_that_names_both(same_shape, micro_batch):
    told = rf"{same_shape} .* the {micro_batch} rows of a micro-batch \(per_.*_size, {micro_batch}\), and the 8 rows"
    with pytest.raises(InputError, match=f"same_shape: {told}"):
        resolve_same_shape(same_shape, global_batch_size=8, per_device_train_batch_size=micro_batch)


def test_the_table_has_a_line_for_each_group_with_how_often_it_is_drawn(sets):
    groups = read_groups(sets, WEIGHTS, DEFAULT)
    table = mix_table(groups, group_shares(groups, DEFAULT), rows_drawn=400)
    assert [line.split() for line in table.splitlines()] == [
        ["task", "sources", "rows", "weight", "share", "epochs"],
        ["few", "1", "8", "3", "0.6000", "30.00"],
        ["few", "3", "2", "3", "0.1500", "30.00"],
        ["many", "0", "5", "1", "0.0312", "2.50"],
        ["many", "1", "29", "1", "0.1812", "2.50"],
        ["many", "2", "6", "1", "0.0375", "2.50"],
    ]


def test_a_group_drawn_more_than_ten_times_over_warns_with_its_rows(sets):
    groups = read_groups(sets, WEIGHTS, DEFAULT)
    warnings = mix_warnings(groups, group_shares(groups, DEFAULT), DEFAULT, rows_drawn=400, same_shape=1)
    assert warnings == [
        "task 'few', 1 source(s): this run is 30 epochs over its 8 rows",
        "task 'few', 3 source(s): this run is 30 epochs over its 2 rows",
    ]


def test_draws_of_shapes_smaller_than_a_batch_are_told_by_their_share(sets):
    groups = read_groups(sets, WEIGHTS, DEFAULT)
    shares = group_shares(groups, DEFAULT)
    (warning,) = mix_warnings(groups, shares, DEFAULT, rows_drawn=8, same_shape=6)
    assert warning.startswith("18.1% of the draws")  # 0.15 of three sources, 0.0312 of none
    assert mix_warnings(groups, shares, DEFAULT, rows_drawn=8, same_shape=2) == []


def test_a_generator_is_a_function_of_seed_purpose_and_numbers():
    keys = [
        (0, "noise", 1),
        (0, "noise", 1, 0),
        (0, "noise", 10),
        (1, "noise", 1),
        (0, "sigma", 1),
        (0, "noise", 2**40),
    ]
    assert len({draw_rng(*key).integers(2**62) for key in keys}) == len(keys)
    assert draw_rng(np.int64(0), "noise", np.int64(1)).random() == draw_rng(0, "noise", 1).random()


def test_generators_stay_the_same_from_release_to_release():
    assert draw_rng(7, "noise", 3).random() == 0.6620188939220096
