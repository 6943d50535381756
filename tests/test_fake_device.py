"""On a device that is not there: no tensor of a step lies on another one, and the host waits where a reason is named.

Steps run in bfloat16 on fake tensors, in a process of their own; see fake_device.py. On fake CUDA: copies of a second
micro-batch, forward and loss, and the check of the losses before. On a stand-in: the same with backward, clipping and
AdamW. Weights of torchao are its own tensors over fake ones; of bitsandbytes the layers and operations are its own.
What kernels themselves do is not seen: these are the devices and shapes that their libraries declare.
"""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import diffusers
import pytest
from embedding_sets import write_recipe

LORA = {"lora": {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": "attention"}}
EDIT, EDIT_2511, EDIT_21 = FAMILIES = ("edit_plus", "edit_plus_2511", "qwen_image_21")
EQUAL, UNEQUAL = [4, 4], [4, 6]  # lengths of prompts
MEMORY = {
    "streamed": {"stream_blocks": 3, "offload_activations": True},  # of four, which takes two slots
    "streamed-int8": {"stream_blocks": 3, "quantization": "int8"},
    "int8": {"quantization": "int8"},
    "fp8": {"quantization": "fp8"},
    "nf4": {"quantization": "nf4"},
}
# What makes the host wait in a micro-batch, and why it may: the first is in diffusers, before the first block, where
# the device still has the backward pass before to run.
ZERO_COND = {"transformer_qwenimage.py:forward: copied to the device": 1}  # which tokens are sources', of 2511 alone
LOSSES = {"metrics.py:read: waits for an event": 1}  # once a step, those of the step before: this one is launched
# What is on streams, where the host waits for nothing: a block is copied while another one computes. Three blocks are
# streamed: in a forward pass, and with the backward pass behind it
COPIES, ORDERED = "offloading.py:_bring: copies on a stream of its own", "offloading.py:_before: the device waits"
ONCE, TWICE = {COPIES: 2, ORDERED: 3}, {COPIES: 2, ORDERED: 6}


def case(family: str = EDIT, trainable: dict = LORA, *, memory: str = "", lengths=EQUAL, allowed=None, **more) -> dict:
    """Of one step; on CUDA, whose waits for losses are allowed, unless `more` says otherwise."""
    allowed = (LOSSES if more.get("device", "cuda") == "cuda" else {}) | (allowed or {})
    more = {"device": "cuda", "checkpointing": True, "lengths": lengths} | more
    return {"family": family, "trainable": trainable, "memory": memory, "allowed": allowed, "more": more}


on_stand_in = partial(case, device="standin")
STEPS = {
    "LoRA": case(),
    "LoRA, padded": case(lengths=UNEQUAL),
    "all": case(trainable={}),
    "2511, padded": case(EDIT_2511, lengths=UNEQUAL, allowed=ZERO_COND),
    "2511, all": case(EDIT_2511, {}, allowed=ZERO_COND),
    "2.1, padded": case(EDIT_21, lengths=UNEQUAL),
    "2.1, all": case(EDIT_21, {}, checkpointing=False),
    # extract.latents: false: images are copied with the rest of a batch, and encoded by the VAE
    "images": case(images=True),
    "2.1, images": case(EDIT_21, images=True),
    "streamed": case(memory="streamed", allowed=ONCE),
    "int8": case(memory="int8"),
    "fp8": case(memory="fp8"),
    "nf4": case(memory="nf4"),
    "step": on_stand_in(lengths=UNEQUAL, checkpointing=False),
    "step, all": on_stand_in(trainable={}, lengths=UNEQUAL),
    "step, 2.1, all": on_stand_in(EDIT_21, {}),
    "step, 2.1, two draws": on_stand_in(EDIT_21, lengths=UNEQUAL, draws_per_row=2),
    # copies between host and device wait unless they are asked not to, and the memory of the host is pinned
    "step, streamed": on_stand_in(memory="streamed", lengths=UNEQUAL, allowed=TWICE),
    "step, 2.1, streamed int8": on_stand_in(EDIT_21, memory="streamed-int8", allowed=TWICE),
    "step, fp8": on_stand_in(memory="fp8"),
    "step, 2.1, nf4": on_stand_in(EDIT_21, memory="nf4"),
}


@pytest.fixture(scope="module")
def waits(root, tiny, built_once, tmp_path_factory) -> dict[str, dict[str, int]]:
    """By case what makes the host wait, how often; all in one process, of one worker of the tests."""

    def four_blocks(family: str, folder: Path) -> None:
        """The tiny checkpoint with a transformer of four blocks."""
        shutil.copytree(tiny(family), folder)
        config = json.loads((folder / "transformer" / "config.json").read_text())
        kind = getattr(diffusers, config["_class_name"])
        kind.from_config(config | {"num_layers": 4}).save_pretrained(folder / "transformer")

    def recipe_of(folder: Path, family: str, trainable: dict, memory: str) -> str:
        folder.mkdir()
        model = tiny(family)
        if "streamed" in memory:
            model = built_once(f"four_blocks_{family}", partial(four_blocks, family))
        sections = {"memory": MEMORY[memory], "training": {"activation_checkpointing": True}} if memory else {}
        sections |= {"loss": {"edit_weight": 1}, "extract": {"dtype": "bfloat16"}}
        return str(write_recipe(folder, model, trainable=trainable, **sections))

    def build(folder: Path) -> None:
        folder.mkdir()
        cases = {
            name: one["more"]
            | {"recipe": recipe_of(folder / name, *(one[key] for key in ("family", "trainable", "memory")))}
            for name, one in STEPS.items()
        }
        cases |= {f"encoder, {family}": {"model": str(tiny(family)), "device": "cuda"} for family in (EDIT, EDIT_21)}
        cases["mistakes"] = cases["2.1, padded"] | {"mistakes": True}
        (folder / "cases.json").write_text(json.dumps(cases))
        command = [sys.executable, str(Path(__file__).with_name("fake_device.py")), str(folder / "cases.json")]
        environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{Path(__file__).parent}"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr[-6000:]
        (folder / "waits.json").write_text(done.stdout)

    return json.loads((built_once("waits_of_a_device", build) / "waits.json").read_text())


@pytest.mark.parametrize("name", STEPS)
def test_a_step_waits_for_nothing_but_what_is_named(waits, name):
    assert waits[name] == STEPS[name]["allowed"]


# transformers makes positions, windows and the lengths of images from their sizes, which it wants on the device, and
# adds features of images to the first layers of Qwen3-VL at places that a mask on the device names
SIZES = "vision_utils.py", "modeling_qwen2_5_vl.py", "modeling_qwen3_vl.py"
INPUTS = "prompt_encoder.py:__call__", "prompt_encoder.py:embed", "prompt_encoder.py:<genexpr>"  # few, once a batch
OUTPUTS = ("prompt_encoder.py:unpack",)  # which embeddings are kept: behind it they are copied to the host


@pytest.mark.parametrize("family", [EDIT, EDIT_21])
def test_the_prompt_encoder_waits_for_inputs_outputs_and_images_alone(waits, family):
    """Of two prompts with one and two images."""
    found = waits[f"encoder, {family}"]
    assert {name for name in found if not name.startswith(SIZES + INPUTS + OUTPUTS)} == set()
    assert any(name.startswith(SIZES) for name in found), "else the list is out of date"


def test_what_waits_is_found(waits):
    """A loss that is asked for, a tensor that is copied back, and two that are copied without pinned memory."""
    names = [name for name, count in waits["mistakes"].items() for _ in range(count) if name not in LOSSES]
    kinds = sorted(name.rpartition(": ")[2] for name in names)
    assert kinds == ["_local_scalar_dense"] * 2 + ["copied from the device"] + ["copied to the device"] * 2
