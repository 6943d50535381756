"""What the page on performance says of a roofline follows from the code."""

import json
import sys

import pytest


@pytest.fixture(scope="module")
def roofline(root):
    sys.path.insert(0, str(root / "tests" / "bench"))
    import roofline

    yield roofline
    sys.path.remove(str(root / "tests" / "bench"))


@pytest.fixture(scope="module")
def page(root) -> str:
    return (root / "docs" / "performance.md").read_text(encoding="utf-8")


def test_training_on_paper_is_what_the_flop_counter_counts(roofline, page):
    assert roofline.training_table() in page


def test_extraction_on_paper_is_what_the_flop_counter_counts(roofline, page):
    assert roofline.extraction_table() in page


def test_what_a_mask_would_cost_is_what_the_flop_counter_counts(roofline, page):
    assert roofline.unequal_table() in page


def test_what_a_shared_prefix_saves_is_what_the_flop_counter_counts(roofline, page):
    import shared_prefix

    assert shared_prefix.line(512, 1) in page and shared_prefix.line(1024, 3) in page


@pytest.mark.soak
def test_all_that_a_shared_prefix_saves(roofline, page):
    import shared_prefix

    assert shared_prefix.table() in page


def test_full_training_is_six_operations_for_each_weight_that_a_token_meets(roofline):
    from released import TRANSFORMER

    latents, width, blocks = 32 * 32 + 64 * 64, 3072, TRANSFORMER["num_layers"]
    stream = 4 * width**2 + 2 * 4 * width**2  # attention's four matrices and the MLP's two, of either stream
    attention = 2 * 2 * (latents + roofline.PROMPT) ** 2 * width
    by_hand = 3 * blocks * (2 * (latents + roofline.PROMPT) * stream + attention)
    assert roofline.row_flops(lora=False, target_px=512, checkpointing=False) == pytest.approx(by_hand, rel=0.02)


@pytest.mark.parametrize("lora", [True, False])
def test_the_log_counts_what_the_roofline_counts(roofline, tmp_path, lora):
    from released import write_released

    from hf_qie.config.recipe import load_recipe
    from hf_qie.models.qwen_image.family import EDIT_PLUS
    from hf_qie.training.cost import BatchFlops, stand_in
    from hf_qie.training.model import build_model

    trainable = {"lora": {"rank": 32, "target_modules": "attention"} if lora else None}
    recipe = {"model": str(write_released(tmp_path / "model")), "tasks": {"edit": {"embeddings": "nowhere"}}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe | {"trainable": trainable}))
    flops_of = BatchFlops(build_model(load_recipe(tmp_path / "recipe.yaml"), empty=True), EDIT_PLUS)
    for target_px, (height, width) in roofline.TARGETS.items():
        batch = stand_in(1, height * width, roofline.SOURCE[0] * roofline.SOURCE[1], roofline.PROMPT)
        expected = roofline.row_flops(lora=lora, target_px=target_px, checkpointing=False)
        assert flops_of(batch) == pytest.approx(expected, rel=1e-9)
