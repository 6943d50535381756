"""Rows of draws, and how ranks share them out."""

import hashlib
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk
from shaped_sets import CAPTIONS, embedding_set

from hf_qie.config.recipe import Mix
from hf_qie.data.collate import collate
from hf_qie.data.loader import Draws, RankBatches, TaskRows, open_loader, text_weights
from hf_qie.data.mixture import group_shares, mixture_plan, read_groups
from hf_qie.data.schema import PROMPT_COLUMNS, shared_embeds
from hf_qie.errors import InputError

A, B = (2, 3), (3, 2)
G = 8  # global batch size
NEVER_DROP = Mix(caption_dropout=0.0)


def opened(data, folder):
    """The set as training has it: memory-mapped Arrow files."""
    data.save_to_disk(folder)
    return load_from_disk(folder)


def draws_of(sets, mix, *, num_steps=4, same_shape=4, seed=0):
    groups = read_groups(sets, dict.fromkeys(sets, 1.0), mix)
    num_batches = num_steps * G // mix.draws_per_row // same_shape
    plan = mixture_plan(groups, group_shares(groups, mix), seed=seed, same_shape=same_shape, num_batches=num_batches)
    return Draws(sets, plan, seed=seed, mix=mix)


every_way = pytest.mark.parametrize("sets", PROMPT_COLUMNS, indirect=True, ids=lambda way: way[0])


@pytest.fixture(scope="module")
def sets(tmp_path_factory, request):
    """Sets with the columns of the older family; `every_way` gives those of others."""
    folder, way = tmp_path_factory.mktemp("sets"), getattr(request, "param", PROMPT_COLUMNS[0])
    shapes = [(A, B)] * 5 + [(B, A)] * 4 + [(A, A, B)] * 3
    edits, texts = (
        embedding_set(given, inverse=inverse, prompt_columns=way)
        for given, inverse in ((shapes, range(0, 9, 2)), ([(B,)] * 3, ()))
    )
    return {"edits": opened(edits, folder / "edits"), "texts": opened(texts, folder / "texts")}


def rank_batches(rank=0, world_size=1, micro_batch=4, num_steps=4):
    return RankBatches(num_draws=num_steps * G, batch_size=micro_batch, rank=rank, world_size=world_size)


def stored(data: Dataset, row: int, column: str) -> np.ndarray:
    return np.array(data[row][column], np.float16).reshape(-1, data.features[column].feature.length)


def assert_prompt(row, images, texts):
    np.testing.assert_array_equal(row["prompt_parts"][0], images)
    assert any(np.array_equal(row["prompt_parts"][1], text) for text in texts)


@every_way
def test_a_row_is_the_one_its_draw_has_in_the_plan_bit_for_bit(sets):
    draws = draws_of(sets, NEVER_DROP)
    for number in range(len(draws)):
        row, batch = draws[number], draws.plan.data[number // 4]
        data, index = sets[batch["task"]], batch["rows"][number % 4]
        assert (row["task"], row["row"], row["draws"]) == (batch["task"], index, [number])
        assert row["grids"] == [tuple(grid) for grid in (data[index]["target_grid"], *data[index]["source_grids"])]
        for name in ("target_latents", "source_latents"):
            np.testing.assert_array_equal(row[name], stored(data, index, name))
        assert row["image_slots"] == data[index].get("image_slots", [])
        images = stored(data, index, shared_embeds(data.features))
        texts = [stored(data, index, f"text_embeds_{caption}") for caption in CAPTIONS]
        assert_prompt(row, images, texts)


def test_a_draw_has_the_embeddings_of_its_row_by_the_caption_that_it_names(sets):
    draws, seen = draws_of(sets, Mix(inverse_share=0.5, caption_dropout=0.5), num_steps=20), set()
    for number in range(len(draws)):
        row, batch = draws[number], draws.plan.data[number // 4]
        column = f"{'inverse_' * batch['inverse']}text_embeds_{row['caption']}"
        np.testing.assert_array_equal(row["prompt_parts"][1], stored(sets[row["task"]], row["row"], column))
        seen.add((row["task"], row["row"], column))
    assert {column.removeprefix("inverse_text_embeds_") for *_, column in seen} > {"drop", "inverse_instruction"}
    assert len({row for task, row, column in seen if (task, column) == ("edits", "text_embeds_drop")}) > 3


def test_rows_are_float16_whatever_their_number_of_sources(sets):
    draws = draws_of(sets, NEVER_DROP, num_steps=20)
    num_sources = set()
    for number in range(len(draws)):
        row = draws[number]
        num_sources.add(len(row["grids"]) - 1)
        arrays = [row["target_latents"], row["source_latents"], *row["prompt_parts"]]
        assert {array.dtype for array in arrays} == {np.dtype(np.float16)}
        num_tokens = [height * width for height, width in row["grids"]]
        assert row["target_latents"].shape == (num_tokens[0], 64)
        assert row["source_latents"].shape == (sum(num_tokens[1:]), 64)
    assert num_sources == {0, 1, 2}


@every_way
def test_a_row_is_views_of_the_arrow_file(sets):
    columns = sets["edits"].data.columns
    buffers = [buffer for column in columns for chunk in column.chunks for buffer in chunk.buffers() if buffer]
    row = draws_of({"edits": sets["edits"]}, NEVER_DROP)[0]
    for array in (row["target_latents"], row["source_latents"], *row["prompt_parts"]):
        start = array.__array_interface__["data"][0]
        assert any(buffer.address <= start < buffer.address + buffer.size for buffer in buffers)
        assert not array.flags.writeable  # a write would be to the set's file


def test_a_row_of_a_set_that_was_cut_is_the_row_of_the_whole_set(sets):
    cut = {"edits": sets["edits"].select(range(3, 9))}
    draws = draws_of(cut, NEVER_DROP)
    row, index = draws[0], draws.plan.data[0]["rows"][0] + 3
    assert row["row"] == index
    np.testing.assert_array_equal(row["target_latents"], stored(sets["edits"], index, "target_latents"))


def test_a_row_of_a_set_that_was_reordered_is_the_one_that_stands_there(sets):
    reordered = {"edits": sets["edits"].select([7, 3, 5])}
    draws = draws_of(reordered, NEVER_DROP)
    for number in range(len(draws)):
        index = [7, 3, 5][draws.plan.data[number // 4]["rows"][number % 4]]
        assert draws[number]["row"] == index
        np.testing.assert_array_equal(draws[number]["target_latents"], stored(sets["edits"], index, "target_latents"))


def inverse_draws(data):
    draws = draws_of({"a": data}, Mix(inverse_share=1.0, caption_dropout=0.0))
    numbers = [number for number in range(len(draws)) if draws.plan.data[number // 4]["inverse"]]
    return [draws[number] for number in numbers]


def test_the_inverse_of_a_row_has_its_images_swapped_and_prompts_of_its_own():
    data = embedding_set([(A, B)] * 3, inverse=range(3))
    for row in inverse_draws(data):
        assert row["grids"] == [B, A]
        np.testing.assert_array_equal(row["target_latents"], stored(data, row["row"], "source_latents"))
        np.testing.assert_array_equal(row["source_latents"], stored(data, row["row"], "target_latents"))
        texts = [stored(data, row["row"], f"inverse_text_embeds_inverse_{caption}") for caption in CAPTIONS]
        images = stored(data, row["row"], "inverse_image_embeds")
        assert_prompt(row, images, texts)


def test_the_inverse_of_a_row_has_its_own_images_where_the_areas_differ():
    data = embedding_set([(A, B)] * 3, inverse=range(3), inverse_grids=((4, 4), (5, 2)))
    for row in inverse_draws(data):
        assert row["grids"] == [(4, 4), (5, 2)]
        np.testing.assert_array_equal(row["target_latents"], stored(data, row["row"], "inverse_target_latents"))
        np.testing.assert_array_equal(row["source_latents"], stored(data, row["row"], "inverse_source_latents"))


def text_shares(data, mix, *, num_draws=2000):
    """Which text columns were drawn, as shares of the draws, found by their values."""
    draws = draws_of({"a": data}, mix, num_steps=num_draws // G)
    prefix = "inverse_" if mix.inverse_share else ""
    names = [name for name in data.column_names if name.startswith(prefix + "text_embeds_")]
    present = [(row, name) for row in range(len(data)) for name in names if data[row][name] is not None]
    column = {stored(data, row, name).tobytes(): name for row, name in present}
    seen = Counter(column[draws[number]["prompt_parts"][1].tobytes()] for number in range(num_draws))
    return {name.removeprefix(prefix + "text_embeds_"): count / num_draws for name, count in seen.items()}


def three_errors(share, num_draws=2000):
    return 3 * np.sqrt(share * (1 - share) / num_draws)


def test_captions_are_drawn_equally_often_unless_dropped():
    shares = text_shares(embedding_set([(A, B)] * 4), Mix(caption_dropout=0.1))
    for name, share in {"instruction": 0.45, "instruction_cn": 0.45, "drop": 0.1}.items():
        assert abs(shares[name] - share) <= three_errors(share)


def test_captions_are_drawn_by_their_weights():
    mix = Mix(caption_weights={"instruction": 3.0, "instruction_cn": 1.0}, caption_dropout=0.0)
    shares = text_shares(embedding_set([(A, B)] * 4), mix)
    assert abs(shares["instruction"] - 0.75) <= three_errors(0.75)


def test_each_text_of_a_list_of_captions_has_the_weight_of_its_column():
    columns = ["text_embeds_instruction", "text_embeds_instruction_2", "text_embeds_cn", "text_embeds_drop"]
    columns += [f"inverse_{column}" for column in columns]
    forward, inverse = text_weights(columns, {"instruction": 3.0, "cn": 1.0}, "a")
    assert list(forward.values()) == list(inverse.values()) == [3.0, 3.0, 1.0]
    forward, _ = text_weights(columns, {"instruction": 3.0, "instruction_2": 0.0, "cn": 1.0}, "a")
    assert forward == {"text_embeds_instruction": 3.0, "text_embeds_cn": 1.0}


def test_an_inverse_caption_has_the_weight_of_the_caption_it_is_the_inverse_of():
    mix = Mix(caption_weights={"instruction": 0.0, "instruction_cn": 1.0}, caption_dropout=0.0, inverse_share=1.0)
    shares = text_shares(embedding_set([(A, B)] * 4, inverse=range(4)), mix, num_draws=80)
    assert shares == {"inverse_instruction_cn": 1.0}


def test_only_captions_that_a_row_has_are_drawn():
    data = embedding_set([(A, B)] * 4, captions=lambda row: CAPTIONS[1:] if row else ())
    shares = text_shares(data, NEVER_DROP, num_draws=80)
    assert shares == {"instruction_cn": 0.75, "drop": 0.25}  # row 0 has no caption; 4 rows, drawn equally often


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"instruction": 1.0}, r"names \['instruction'\], but task 'a' has the captions \['instruction_cn'\] too"),
        ({"instruction": 0.0, "instruction_cn": 0.0}, "every caption of task 'a'.*has weight 0"),
    ],
)
def test_caption_weights_that_do_not_fit_the_captions_are_an_error(weights, message):
    with pytest.raises(InputError, match=f"mix.caption_weights: {message}"):
        draws_of({"a": embedding_set([(A, B)])}, Mix(caption_weights=weights))


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 4), (1, 2), (1, 1), (2, 2), (2, 4), (8, 1)])
def test_a_step_is_the_same_draws_however_ranks_and_accumulation_cut_it(world_size, micro_batch):
    ranks = [list(rank_batches(rank, world_size, micro_batch)) for rank in range(world_size)]
    turns = G // (world_size * micro_batch)
    for step in range(4):
        batches = [batch for rank in ranks for batch in rank[step * turns : (step + 1) * turns]]
        assert all(len(batch) == micro_batch for batch in batches)
        assert sorted(draw for batch in batches for draw in batch) == list(range(step * G, (step + 1) * G))


def test_ranks_take_turns_within_a_step():
    second = list(rank_batches(rank=1, world_size=2, micro_batch=2, num_steps=2))
    assert list(map(list, second)) == [[2, 3], [6, 7], [10, 11], [14, 15]]


def all_batches(sets, num_workers):
    draws = draws_of(sets, Mix(inverse_share=0.3))
    return list(open_loader(draws, rank_batches(micro_batch=2), collate=collate, num_workers=num_workers))


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]) if torch.is_tensor(value) else value == other[name], name


def summary(row):
    return row["task"], row["row"], row["caption"], row["grids"]


def test_the_draws_of_a_seed_are_those_of_every_release(sets):
    """A run that resumes after an update goes on with the rows and captions that it would have had."""
    draws = draws_of(sets, Mix(inverse_share=0.3), num_steps=40, seed=5)
    drawn = [summary(draws[number]) for number in range(len(draws))]
    digest = hashlib.sha256(repr(drawn).encode()).hexdigest()
    assert digest[:16] == "4ccd1ab160f5055b"


@pytest.mark.parametrize("count", [2, 4])
def test_draws_of_a_row_follow_each_other_and_have_its_caption(sets, count):
    """The rows are those of a run with one draw a row: the n-th row is the n-th draw there."""
    alone = draws_of(sets, Mix(inverse_share=0.3))
    several = draws_of(sets, Mix(inverse_share=0.3, draws_per_row=count), num_steps=4 * count)
    assert len(several) == count * len(alone)
    for number in range(len(several)):
        row = several[number]
        assert row["draws"] == [number]
        assert summary(row) == summary(alone[number // count])


@pytest.mark.parametrize("wrong", [[0, 2, 1, 3], [0, 1, 2, 7], [1, 2, 3, 4], [0, 1], [0, 1, 2, 3, 8, 9, 9, 11]])
def test_draws_that_are_not_all_of_their_rows_are_never_read(sets, wrong):
    draws = draws_of(sets, Mix(draws_per_row=4), num_steps=4)
    rows = draws.__getitems__([0, 1, 2, 3, 8, 9, 10, 11])
    assert [row["draws"] for row in rows] == [[0, 1, 2, 3], [8, 9, 10, 11]]
    with pytest.raises(AssertionError, match="a batch has all draws of a row, in their order"):
        draws.__getitems__(wrong)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 8), (1, 4), (2, 4)])
def test_a_batch_has_each_row_once_and_all_its_draws(sets, monkeypatch, num_workers, world_size, micro_batch):
    read, get = [], TaskRows.read
    monkeypatch.setattr(TaskRows, "read", lambda self, *args, **how: read.append(args) or get(self, *args, **how))
    mix = Mix(draws_per_row=4, caption_dropout=0.0)
    draws, seen = draws_of(sets, mix, same_shape=2), {}
    for rank in range(world_size):
        batches = rank_batches(rank, world_size, micro_batch)
        for batch in open_loader(draws, batches, collate=collate, num_workers=num_workers):
            num_rows = micro_batch // 4
            assert len(batch["draw"]) == micro_batch
            assert len(batch["row"]) == len(batch["prompt_embeds"]) == len(batch["target_latents"]) == num_rows
            assert batch["prompt_lengths"] == batch["prompt_embeds"].any(dim=2).sum(dim=1).tolist()
            for place, draw in enumerate(batch["draw"]):
                seen[draw] = batch["task"][place // 4], batch["row"][place // 4]
    if not num_workers:
        assert len(read) == len(draws) / 4
    assert seen == {number: summary(draws[number])[:2] for number in range(len(draws))}


@every_way
def test_workers_change_nothing(sets):
    alone, shared = all_batches(sets, 0), all_batches(sets, 2)
    assert len(alone) == len(shared) == 16
    for one, other in zip(alone, shared, strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loading_leaves_the_global_generators_alone(sets, num_workers):
    torch.manual_seed(0)
    np.random.seed(0)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    all_batches(sets, num_workers)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (np.random.get_state()[1] == state[1]).all()


@every_way
def test_draws_are_pickled_without_their_rows_and_read_the_same_again(sets):
    """What a spawned worker is given."""
    draws = draws_of(sets, NEVER_DROP)
    again = pickle.loads(pickle.dumps(draws))
    assert_equal(collate([draws[5]]), collate([again[5]]))
    one_row = len(pickle.dumps(draws_of({"a": embedding_set([(A, B)])}, NEVER_DROP)))
    assert len(pickle.dumps(draws)) < one_row + sum(data.data.nbytes for data in sets.values()) / 2


def test_a_draw_is_the_same_row_for_any_number_of_steps(sets):
    short, long = draws_of(sets, NEVER_DROP, num_steps=2), draws_of(sets, NEVER_DROP, num_steps=40)
    for number in range(len(short)):
        assert_equal(collate([short[number]]), collate([long[number]]))
