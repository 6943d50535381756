"""On a device that is not there: no tensor of a step lies on another one, and the host waits where a reason is named.

A step runs on fake tensors, in processes of their own; see fake_device.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from embedding_sets import write_recipe

LORA = {"lora": {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": "attention"}}
FAMILIES = ("edit_plus", "edit_plus_2511", "qwen_image_21")
# What makes the host wait in a micro-batch, and why it may: all of it is in diffusers, before the first block, where
# the device still has the backward pass before to run.
ZERO_COND = "transformer_qwenimage.py:forward: copied to the device"  # which tokens are sources', of 2511 alone


@pytest.fixture(scope="module")
def waits_of(root, tmp_path_factory):
    """`waits_of(device, cases)` -> what makes the host wait in each of them, how often."""

    def run(device: str, cases: list[dict]) -> list[dict[str, int]]:
        file = tmp_path_factory.mktemp("cases") / "cases.json"
        file.write_text(json.dumps(cases))
        command = [sys.executable, str(Path(__file__).with_name("fake_device.py")), device, str(file)]
        environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{Path(__file__).parent}"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-6000:]
        return json.loads(done.stdout)

    return run


@pytest.fixture
def recipes(tiny, tmp_path) -> dict[tuple[str, str], str]:
    """By family and what trains."""
    found = {}
    for family in FAMILIES:
        for name, trainable in (("lora", LORA), ("all", {})):
            folder = tmp_path / f"{family}-{name}"
            folder.mkdir()
            found[family, name] = str(write_recipe(folder, tiny(family), trainable=trainable, loss={"edit_weight": 1}))
    return found


def test_forward_and_loss_on_cuda_wait_for_nothing_but_what_is_named(recipes, waits_of):
    """In bfloat16 by autocast, as on one GPU, of a second micro-batch; rows of equal and unequal prompts."""
    cases, allowed = [], []
    for (family, _), recipe in recipes.items():
        for lengths in ([4, 4], [4, 6]):
            cases.append({"recipe": recipe, "lengths": lengths, "checkpointing": True})
            allowed.append({ZERO_COND: 1} if family == "edit_plus_2511" else {})
    cases.append({"recipe": recipes["qwen_image_21", "lora"], "lengths": [4, 6], "draws_per_row": 2})
    assert waits_of("cuda", cases) == [*allowed, {}]


def test_a_step_with_backward_and_optimizer_waits_for_nothing(recipes, waits_of):
    """On the stand-in: loss, backward, clipping and AdamW; LoRA and all, with and without checkpointing."""
    cases = [
        {"recipe": recipes[family, name], "lengths": [4, 6], "checkpointing": name == "all"}
        for family in ("edit_plus", "qwen_image_21")
        for name in ("lora", "all")
    ]
    cases.append({"recipe": recipes["qwen_image_21", "lora"], "lengths": [4, 6], "checkpointing": True})
    cases.append(cases[-1] | {"draws_per_row": 2})
    assert waits_of("stand-in", cases) == [{}] * len(cases)


# transformers makes positions, windows and the lengths of images from their sizes, which it wants on the device, and
# adds features of images to the first layers of Qwen3-VL at places that a mask on the device names
SIZES = "vision_utils.py", "modeling_qwen2_5_vl.py", "modeling_qwen3_vl.py"
INPUTS = "prompt_encoder.py:__call__", "prompt_encoder.py:embed", "prompt_encoder.py:<genexpr>"  # few, once a batch
OUTPUTS = ("prompt_encoder.py:unpack",)  # which embeddings are kept: behind it they are copied to the host


@pytest.mark.parametrize("family", ["edit_plus", "qwen_image_21"])
def test_the_prompt_encoder_waits_for_inputs_outputs_and_images_alone(tiny, waits_of, family):
    """Of two prompts with one and two images."""
    (found,) = waits_of("cuda", [{"model": str(tiny(family))}])
    assert {name for name in found if not name.startswith(SIZES + INPUTS + OUTPUTS)} == set()
    assert any(name.startswith(SIZES) for name in found), "else the list is out of date"


def test_what_waits_is_found(recipes, waits_of):
    """A loss that is asked for, a tensor that is copied back, and one that is copied without pinned memory."""
    case = {"recipe": recipes["qwen_image_21", "lora"], "lengths": [4, 4], "mistakes": True}
    (found,) = waits_of("cuda", [case])
    kinds = sorted(name.rpartition(": ")[2] for name, count in found.items() for _ in range(count))
    assert kinds == ["_local_scalar_dense"] * 2 + ["copied from the device", "copied to the device"]
