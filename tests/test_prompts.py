"""Prompt tokens with the real vocabulary: what templates and images cost, and that sharing loses none."""

import json

import pytest
import torch
from PIL import Image
from real_vocabulary import save_tokenizer
from transformers import Qwen2Tokenizer, Qwen2VLProcessor

from hf_qie.errors import InputError
from hf_qie.models.prompts import BadPrompt
from hf_qie.models.qwen_image.family import (
    EDIT_PLUS,
    EDIT_PLUS_TEMPLATE,
    EDIT_TEMPLATE,
    TEXT_TO_IMAGE_TEMPLATE,
    check_drop,
)
from hf_qie.models.templates import make_prompt

WEIRD_CAPTIONS = [
    "\nA line break first",
    "  two blanks, then a tab\t",
    "🙂 emoji 👩‍👩‍👧 first",
    "把背景换成浅蓝色，面部微笑。",
    "\u0301 a combining accent first, cafe\u0301 and \ufb01ligree",  # the tokenizer composes what it can
    "1: <|im_end|>\n<|im_start|>user\n{not a field}",
    ": and a colon",
    "",
]


@pytest.fixture(scope="session")
def processor(built_once, tiny):
    """The processor of the released checkpoints: the tiny one's, with Qwen's own vocabulary."""
    tokenizer = Qwen2Tokenizer.from_pretrained(built_once("real_vocabulary", save_tokenizer))
    parts = Qwen2VLProcessor.from_pretrained(tiny("edit_plus"), subfolder="processor")
    return Qwen2VLProcessor(parts.image_processor, tokenizer, parts.video_processor)


def images_of(*sizes):
    """Images as the encoder sees them."""
    return [
        EDIT_PLUS.resize(Image.new("RGB", size, "teal"), EDIT_PLUS.fit(size, EDIT_PLUS.vlm_area_px)) for size in sizes
    ]


def test_the_vocabulary_is_qwens_own(processor):
    tokenizer = processor.tokenizer
    assert tokenizer("Hello world<|endoftext|><|im_start|><|image_pad|>").input_ids == [
        *(9707, 1879),  # as the released checkpoints give them
        *(151643, 151644, 151655),
    ]
    words = [tokenizer.decode([i]) for i in range(1000, 100_000, 997)]
    words = [word for word in words if word.strip().isalpha() and word.isascii()]
    assert len(words) > 30 and all(len(tokenizer(word).input_ids) == 1 for word in words)


@pytest.mark.parametrize(
    ("template", "num_tokens"), [(TEXT_TO_IMAGE_TEMPLATE, 34), (EDIT_TEMPLATE, 64), (EDIT_PLUS_TEMPLATE, 64)]
)
def test_a_template_starts_with_as_many_tokens_as_are_dropped(processor, template, num_tokens):
    assert len(processor.tokenizer(template.before).input_ids) == template.drop == num_tokens
    check_drop(processor.tokenizer, template)
    assert len(processor.tokenizer(template.after).input_ids) == 5  # kept: they are the caption's last states


def test_a_vocabulary_that_splits_a_template_otherwise_is_refused(processor):
    letters = Qwen2Tokenizer(vocab=processor.tokenizer.get_vocab(), merges=[])
    with pytest.raises(InputError, match=r"^model: its tokenizer gives \d{3} tokens .* the pipelines cut off 64; "):
        check_drop(letters, EDIT_PLUS_TEMPLATE)


def test_an_image_costs_its_label_its_marks_and_its_patches(processor):
    assert len(processor.tokenizer("Picture 1: ").input_ids) == 5
    prompt = make_prompt(processor, EDIT_PLUS_TEMPLATE, images_of((384, 384), (448, 320)), ["x"])
    # 384 x 384 becomes 392 x 392 and 448 x 320 becomes 448 x 308, in patches of 28 x 28
    assert prompt.split == 64 + (5 + 2 + 14 * 14) + (5 + 2 + 16 * 11)
    assert prompt.vision["image_grid_thw"].tolist() == [[1, 28, 28], [1, 22, 32]]
    assert len(prompt.vision["pixel_values"]) == 28 * 28 + 22 * 32


@pytest.mark.parametrize("num_images", [0, 1, 3])
def test_shared_and_branch_tokens_are_those_of_the_whole_text(processor, num_images):
    template, images = EDIT_PLUS.template(num_images), images_of(*[(300, 200)] * num_images)
    prompt = make_prompt(processor, template, images, WEIRD_CAPTIONS)
    for caption, branch in zip(WEIRD_CAPTIONS, prompt.branches, strict=True):
        text = template.shared(num_images) + caption + template.after
        inputs = processor(text=[text], images=images or None)  # as the pipelines call it
        assert prompt.shared + branch == list(inputs["input_ids"][0])
    if images:
        assert len(prompt.shared) == prompt.split


@pytest.mark.parametrize("captions", [WEIRD_CAPTIONS[:1], WEIRD_CAPTIONS[3:4]])
def test_one_caption_alone_shares_no_more_than_the_images(processor, captions):
    for num_images in (0, 1):
        images = images_of(*[(300, 200)] * num_images)
        prompt = make_prompt(processor, EDIT_PLUS.template(num_images), images, captions)
        assert len(prompt.shared) <= prompt.split and len(prompt.branches) == 1
        assert prompt.num_tokens == prompt.num_tokens_apart == len(prompt.shared + prompt.branches[0])


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|video_pad|>"])
@pytest.mark.parametrize("num_images", [0, 1])
def test_a_caption_that_holds_an_image_token_is_bad(processor, token, num_images):
    images = images_of(*[(300, 200)] * num_images)
    with pytest.raises(BadPrompt) as bad:
        make_prompt(processor, EDIT_PLUS.template(num_images), images, ["fine", f"put {token} here"])
    assert str(bad.value) == f"the caption holds {token}, which stands for an image"
    assert bad.value.place == 1


def test_the_encoder_sees_at_most_45_percent_of_one_pass_per_prompt(processor, photos):
    """On the mean of portrait_edit.jsonl: two captions and the drop caption over one source."""
    run = apart = 0
    for line in (photos / "portrait_edit.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        with Image.open(photos / row["source_image"]) as image:
            images = images_of(image.size)
        prompt = make_prompt(processor, EDIT_PLUS_TEMPLATE, images, [row["instruction"], row["instruction_cn"], " "])
        texts = [prompt.shared + branch for branch in prompt.branches]
        run, apart = run + prompt.num_tokens, apart + sum(map(len, texts))
    assert run / apart <= 0.45


def test_pixels_do_not_depend_on_the_captions(processor):
    images = images_of((300, 200))
    one, other = (make_prompt(processor, EDIT_PLUS_TEMPLATE, images, captions) for captions in (["a"], WEIRD_CAPTIONS))
    assert torch.equal(one.vision["pixel_values"], other.vision["pixel_values"]) and one.shared == other.shared
