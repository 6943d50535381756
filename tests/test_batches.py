"""Which prompts and images run together: what rows share, and how much of the batches is padding."""

import json
import random
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from real_vocabulary import save_tokenizer
from transformers import Qwen2Tokenizer, Qwen2VLImageProcessor

from hf_qie.data.images import read_image
from hf_qie.extraction.batching import like_length, same_size, shared_passes
from hf_qie.extraction.chunk_writer import WINDOW_BATCHES
from hf_qie.extraction.plan import SizedFile
from hf_qie.extraction.preprocess import Direction, Prepared
from hf_qie.models.prompts import Prompt, PromptEmbeddings
from hf_qie.models.qwen_image.family import EDIT_PLUS, EDIT_PLUS_TEMPLATE
from hf_qie.models.templates import make_prompt

BATCH_SIZE = 4  # the recipe's default
NUM_INSTRUCTIONS = 1542
VLM_AREA_PX = 384**2
CAPTIONS = ("instruction", "instruction_cn")
TARGET = (("", "target.png"), (64, 64))


class Processor:
    """The checkpoints' own tokens for captions and photos; a photo is processed once, though many rows show it."""

    def __init__(self, tokenizer: Qwen2Tokenizer):
        self.tokenizer, self.image_processor = tokenizer, self
        self.process = Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=28 * 28 * 1280)
        self.merge_size = self.process.merge_size
        self.processed = cache(lambda path: self.process(images=[self.shown(path)], return_tensors="pt"))

    def __call__(self, images: list[Path], **_: object) -> dict:
        (path,) = images
        return self.processed(path)

    def shown(self, path: Path) -> Image.Image:
        image = read_image(path)
        return EDIT_PLUS.resize(image, EDIT_PLUS.fit(image.size, VLM_AREA_PX))


@pytest.fixture(scope="module")
def processor(built_once) -> Processor:
    return Processor(Qwen2Tokenizer.from_pretrained(built_once("real_vocabulary", save_tokenizer)))


def made_up_instructions() -> list[dict[str, str]]:
    """Instructions whose lengths are spread as those of people: most are short, one in fifty is long."""
    rng = random.Random(0)
    words = "add a red boat to the lake behind the house and make the sky look like evening".split()
    lengths = [round(rng.lognormvariate(2.4, 0.6)) + 2 for _ in range(NUM_INSTRUCTIONS)]
    return [
        {
            "instruction": " ".join(rng.choices(words, k=n)),
            "instruction_cn": "".join(rng.choices("在图中加一只船", k=2 * n)),
        }
        for n in lengths
    ]


@pytest.fixture(scope="module")
def instructions(photos) -> list[dict[str, str]]:
    path = photos / "instructions_bilingual.jsonl"
    if not path.exists():
        return made_up_instructions()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def direction(prompt: Prompt, source: str, num_captions: int = len(CAPTIONS)) -> Direction:
    """One row's way from `source` to its target."""
    images = shown((("", source), (64, 64)))
    return Direction(prefix="", captions=CAPTIONS[:num_captions], prompt=prompt, images=images)


def shown(*sources: SizedFile) -> dict[str, list[SizedFile]]:
    return {"source_image": list(sources), "target_image": [TARGET]}


def prepared(*directions: Direction) -> Prepared:
    return Prepared(columns={}, directions=list(directions), resized={})


@pytest.fixture(scope="module")
def rows(processor, photos, instructions) -> list[Prepared]:
    """All instructions over the photos by turns; the inverse of each is the next instruction."""
    sources, targets = (sorted((photos / "images").glob(f"{role}_*.jpg")) for role in ("source", "target"))

    def way(path: Path, row: dict[str, str]) -> Direction:
        texts = [row[caption] for caption in CAPTIONS]
        return direction(make_prompt(processor, EDIT_PLUS_TEMPLATE, [path], [*texts, " "]), str(path))

    return [
        prepared(way(sources[i % len(sources)], row), way(targets[i % len(targets)], undo))
        for i, (row, undo) in enumerate(pairwise([*instructions, instructions[0]]))
    ]


def padding_share(rows: list[Prepared]) -> float:
    """Padding over all tokens that the encoder runs, window by window as a chunk is done."""
    window, run, padded = WINDOW_BATCHES * BATCH_SIZE, 0, 0
    for start in range(0, len(rows), window):
        passes = shared_passes(rows[start : start + window], batch_size=BATCH_SIZE)
        for batch in like_length(passes, batch_size=BATCH_SIZE):
            lengths = [one.prompt.num_tokens for one in batch]
            run, padded = run + sum(lengths), padded + max(lengths) * len(lengths)
    return 1 - run / padded


@pytest.mark.parametrize("inverse", [False, True])
def test_under_a_tenth_of_the_batches_is_padding(rows, inverse):
    assert len(rows) == NUM_INSTRUCTIONS
    assert padding_share(rows if inverse else [prepared(row.directions[0]) for row in rows]) < 0.1


# --- what is shared: small prompts whose tokens say where they come from


def small(source: int, *captions: list[int]) -> Direction:
    """A way from the image `source` with `captions` of one token or more; the drop caption is token 0."""
    branches = [*captions, [0]]
    prompt = Prompt(shared=[source] * 5, branches=branches, drop=1, split=4, vision={})
    return direction(prompt, str(source), num_captions=len(captions))


def test_rows_that_follow_each_other_with_the_same_sources_share_a_pass():
    rows = [prepared(small(source, [10 + i])) for i, source in enumerate([7, 7, 7, 8, 7])]
    prompts = [one.prompt for one in shared_passes(rows, batch_size=4)]
    assert [prompt.branches for prompt in prompts] == [[[10], [11], [12], [0]], [[13], [0]], [[14], [0]]]
    assert [prompt.shared[0] for prompt in prompts] == [7, 8, 7]


def test_a_pass_takes_no_more_rows_than_a_batch():
    rows = [prepared(small(7, [10 + i])) for i in range(5)]
    assert [len(one.directions) for one in shared_passes(rows, batch_size=2)] == [2, 2, 1]


def test_the_same_images_in_another_order_are_other_sources():
    one, other = small(7, [1]), small(7, [2])
    second = (("", "second.png"), (64, 64))
    rows = [
        prepared(replace(one, images=shown(*one.images["source_image"], second))),
        prepared(replace(other, images=shown(second, *other.images["source_image"]))),
    ]
    assert len(shared_passes(rows, batch_size=4)) == 2


def test_inverses_share_a_pass_where_rows_have_the_same_target():
    rows = [prepared(small(source, [10 + i]), small(99, [20 + i])) for i, source in enumerate([1, 2, 3])]
    assert [one.prompt.branches[:-1] for one in shared_passes(rows, batch_size=4)] == [
        *([[10]], [[11]], [[12]], [[20], [21], [22]])
    ]


def test_rows_without_images_share_nothing():
    rows = [prepared(replace(small(7, [10 + i]), images=shown())) for i in range(3)]
    assert [len(one.directions) for one in shared_passes(rows, batch_size=4)] == [1, 1, 1]


def test_each_row_gets_the_states_of_its_own_captions_and_of_the_drop_caption():
    ways = [small(7, [10], [11]), small(7), small(7, [12])]
    (one,) = shared_passes([prepared(way) for way in ways], batch_size=4)
    texts = [torch.tensor([float(branch[0])]) for branch in one.prompt.branches]
    one.keep(PromptEmbeddings(shared=torch.empty(0), texts=texts), prompt_columns=("image_embeds",))
    found = [{name: float(value[0]) for name, value in way.columns.items() if len(value)} for way in ways]
    drop = {"text_embeds_drop": 0}
    assert found == [
        drop | {"text_embeds_instruction": 10, "text_embeds_instruction_cn": 11},
        drop,
        drop | {"text_embeds_instruction": 12},
    ]


# --- batches


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
def test_every_row_is_in_one_batch_and_none_is_over_full(batch_size):
    rng = random.Random(batch_size)
    rows = [prepared(small(rng.randrange(4), [1] * rng.randrange(1, 30))) for _ in range(100)]
    passes = shared_passes(rows, batch_size=batch_size)
    batches = like_length(passes, batch_size=batch_size)
    counted = Counter(id(way) for batch in batches for one in batch for way in one.directions)
    assert counted == Counter(id(row.directions[0]) for row in rows)
    assert max(sum(len(one.directions) for one in batch) for batch in batches) <= batch_size
    lengths = [one.prompt.num_tokens for batch in batches for one in batch]
    assert lengths == sorted(lengths, reverse=True)


def test_images_of_one_size_share_a_pass_each_once_and_in_their_order():
    images = [(("", f"{i % 9}.png"), (64, 64 + 32 * (i % 3))) for i in range(20)]
    batches = same_size(images, batch_size=2)
    assert [file for batch in batches for (_, file), _ in batch] == [f"{i}.png" for i in (0, 3, 6, 1, 4, 7, 2, 5, 8)]
    assert [len(batch) for batch in batches] == [2, 1] * 3
    assert all(len({size for _, size in batch}) == 1 for batch in batches)
