"""Operations on paper are those that a step runs, and the log has its part of the peak where that is known."""

import time

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from embedding_sets import write_recipe, write_set
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from training_runs import trainer_of

from hf_qie.config.recipe import load_recipe
from hf_qie.models.qwen_image.family import EDIT_PLUS
from hf_qie.models.qwen_image.transformer import without_gradient
from hf_qie.training.cost import BatchFlops, count, peak_flops, stand_in
from hf_qie.training.metrics import Throughput
from hf_qie.training.model import build_model

WAYS = {
    "all": {},
    "LoRA": {"lora": {"rank": 4, "alpha": 8, "target_modules": "all-linear"}},
    "a part": {"modules": ["transformer_blocks.1.attn"]},
}
CASES = [("edit_plus", 1), ("qwen_image_21", 1), ("qwen_image_21", 4)]  # and the number of draws a row
DEVICES = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA L40S": 362e12,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("kind", "draws_per_row"), CASES)
def test_operations_on_paper_are_those_of_a_step(tiny, tmp_path, kind, draws_per_row, way):
    grids = {"edit": ((4, 4), (2, 4)), "text_to_image": ((4, 6),), "combine": ((2, 4), (4, 4), (2, 2))}
    for name in grids:
        write_set(tmp_path / "sets" / name, tiny(kind), grids=grids[name])
    sections = {
        "trainable": WAYS[way],
        "training": {"max_steps": 12, "per_device_train_batch_size": 2 * draws_per_row},
        "tasks": {"combine": {"data": "combine.jsonl"}},
        "mix": {"same_shape": 2, "draws_per_row": draws_per_row},
    }
    trainer = trainer_of(write_recipe(tmp_path, tiny(kind), **sections))
    family = trainer.objective.family
    flops_of, shapes = BatchFlops(build_model(trainer.recipe, empty=True), family), set()
    for batch in trainer.get_train_dataloader():
        # the counter does not know the fused attention of CPUs
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            trainer.objective.losses(trainer.model, batch).sum().backward()
        padding = batch["prompt_embeds"][..., 0].numel() - sum(batch["prompt_lengths"])
        # linear layers of the older family run over padding, if it does not count; attention does not
        run = flops_of(batch) + (padding * flops_of.numbers[4] if kind == "edit_plus" else 0)
        assert run == pytest.approx(counter.get_total_flops(), rel=1e-9)
        shapes.add((*batch["grids"], *batch["prompt_lengths"]))
    assert {len(batch["grids"]) for batch in trainer.get_train_dataloader()} == {1, 2, 3}
    assert len(shapes) > 3


@pytest.mark.parametrize("trains", ["", "transformer_blocks.3"])
def test_blocks_that_are_alike_are_counted_once_and_others_one_by_one(trains):
    with torch.device("meta"):
        model = QwenImageTransformer2DModel(
            num_layers=6,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=96,
            axes_dims_rope=(8, 12, 12),
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trains) and not name.startswith(without_gradient(model)))
    batch = stand_in(3, 72, 20, 40)
    assert BatchFlops(model, EDIT_PLUS)(batch) == pytest.approx(count(model, EDIT_PLUS, batch), rel=1e-9)
    assert len(model.transformer_blocks) == 6


def test_rows_of_a_batch_add_up(tiny, tmp_path):
    flops_of = BatchFlops(build_model(load_recipe(write_recipe(tmp_path, tiny())), empty=True), EDIT_PLUS)
    apart = [flops_of(stand_in(1, 16, 8, length)) for length in (7, 9, 30)]
    together = stand_in(3, 16, 8, 0) | {"prompt_lengths": [7, 9, 30]}
    assert flops_of(together) == pytest.approx(sum(apart))


@pytest.mark.parametrize("name", [*DEVICES, "NVIDIA L40", "NVIDIA GeForce RTX 9090"])
def test_the_peak_is_known_by_the_whole_name_and_counts_for_half_precision_alone(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), precision="bf16") == DEVICES.get(name)
    assert peak_flops(torch.device("cuda"), precision="no") is None
    assert peak_flops(torch.device("cpu"), precision="bf16") is None


def test_the_log_has_the_part_of_the_peak_of_all_ranks_that_operations_take(tiny, tmp_path):
    trainer = trainer_of(write_recipe(tmp_path, tiny()))
    flops_of = BatchFlops(build_model(trainer.recipe, empty=True), EDIT_PLUS)
    pace = Throughput(trainer.accelerator, flops_of=flops_of, peak=312e12)
    batch, *_ = trainer.get_train_dataloader()
    pace.add([batch, batch], started=time.perf_counter())
    pace.end_step()
    seconds = pace.seconds
    log = pace.read()
    assert log["model_flops_utilisation"] == pytest.approx(2 * flops_of(batch) / seconds / 312e12)
