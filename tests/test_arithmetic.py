"""Arithmetic of 16 bits: the same on one device, under DDP and in shards; its error, and what moves through memory."""

import json
import sys
from pathlib import Path

import pytest
import torch
from embedding_sets import write_recipe
from ranks import in_ranks
from safetensors.torch import load_file
from test_fsdp import BLOCKS, CHECKPOINTING, LORA, WEIGHTS, fsdp

from hf_qie.config.recipe import load_recipe
from hf_qie.training.model import build_model
from hf_qie.training.precision import DTYPES, FusedRMSNorm, RoundedLinear, compute_in

HALF = {"ACCELERATE_MIXED_PRECISION": "bf16"}
KINDS = [("edit_plus", "lora"), ("edit_plus", "full"), ("qwen_image_21", "lora")]


@pytest.fixture(scope="module")
def bench(root):
    """tests/bench/precision.py."""
    sys.path.insert(0, str(root / "tests" / "bench"))
    import precision

    yield precision
    sys.path.remove(str(root / "tests" / "bench"))


# --- the same everywhere ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory) -> Path:
    """The same two micro-batches a step: of one device, of two under DDP, and of two with a shard each."""
    folder = tmp_path_factory.mktemp("arithmetic")
    alone, together = [], []
    for family, kind in KINDS:
        place = folder / family / kind
        place.mkdir(parents=True)
        # a norm that clips is a sum over all parameters, in another order for shards
        training = {"use_cpu": None, "per_device_train_batch_size": 2, "max_grad_norm": 1e9, "save_strategy": "no"}
        write_recipe(place, tiny(family), trainable=LORA if kind == "lora" else {}, training=training)

        def run(name: str, *overrides: str, place: Path = place) -> dict:
            overrides = [f"training.output_dir={place / name}", *overrides]
            return {"recipe": str(place / "recipe.yaml"), "overrides": overrides, "environment": HALF}

        alone.append(run("one", "training.use_cpu=true", "training.gradient_accumulation_steps=2"))
        together.append(run("ddp", "training.use_cpu=true", "training.activation_checkpointing=true"))
        together.append(run("sharded", *fsdp("SHARDED", CHECKPOINTING if kind == "lora" else "")))
    for runs, ranks in ((alone, 1), (together, 2)):
        log = folder / f"log{ranks}"
        assert in_ranks(runs, ranks=ranks, log=log) == [0] * ranks, log.read_text()
    return folder


def losses_of(run: Path) -> list[float]:
    return [step["loss"] for step in json.loads((run / "rank0.json").read_text())["steps"]]


def differing(run: Path, other: Path, kind: str) -> list[str]:
    """The tensors whose bits are not the same."""
    ours, theirs = load_file(run / WEIGHTS[kind]), load_file(other / WEIGHTS[kind])
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


@pytest.mark.two_rank
@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_one_device_and_ddp_give_the_same_losses_and_weights_bit_for_bit(done, family, kind):
    """Though DDP's activations are computed again."""
    place = done / family / kind
    assert losses_of(place / "ddp") == losses_of(place / "one")
    assert differing(place / "ddp", place / "one", kind) == []


@pytest.mark.two_rank
@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_shards_give_the_losses_of_one_device(done, family, kind):
    """Bit for bit, if the sums of gradients are; the older family adds those of all blocks to its time embedding.

    FSDP2 does so block by block, autograd layer by layer, in bfloat16.
    """
    place = done / family / kind
    ours, theirs = losses_of(place / "sharded"), losses_of(place / "one")
    assert ours[0] == theirs[0]
    if family == "qwen_image_21":
        assert ours == theirs
        assert differing(place / "sharded", place / "one", kind) == []
    assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.two_rank
def test_the_log_says_what_is_rounded_whatever_the_ranks_share(done):
    told = "training in float32, computing in bfloat16, weights rounded where they are used; "
    assert [(done / f"log{ranks}").read_text().count(told) for ranks in (1, 2)] == [len(KINDS), 2 * len(KINDS)]


# --- dtypes ----------------------------------------------------------------------------------------------------------


def recipe_of(folder: Path, model: Path, kind: str):
    return load_recipe(write_recipe(folder, model, trainable=LORA if kind == "lora" else {}))


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("family", BLOCKS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_every_layer_gives_16_bits_and_every_gradient_is_float32(tiny, tmp_path, bench, family, kind, precision):
    recipe = recipe_of(tmp_path, tiny(family), kind)
    model = build_model(recipe, mixed_precision=precision).train()
    compute_in(model, precision)
    given = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, __, output, name=name: given.setdefault(name, output))
    objective = bench.Objective(recipe, global_batch_size=1)
    objective.losses(model, bench.batch_of(objective, model, 2, 6, torch.zeros)).mean().backward()
    # sines and cosines of the noise level, and what holds all of it
    dtypes = {one.dtype for name, one in given.items() if isinstance(one, torch.Tensor) and "time_proj" not in name}
    assert dtypes == {DTYPES[precision]}
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


def test_a_model_in_float32_stays_as_it_is(tiny, tmp_path):
    model = build_model(recipe_of(tmp_path, tiny("edit_plus"), "lora"), empty=True)
    before = [(type(module), dict(vars(module))) for module in model.modules()]
    compute_in(model, "no")
    assert [(type(module), dict(vars(module))) for module in model.modules()] == before
    compute_in(model, "bf16")
    assert {FusedRMSNorm, RoundedLinear} <= {type(module) for module in model.modules()}


# --- error and traffic -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [0, 1], ids=BLOCKS)
def test_the_error_is_that_of_the_dtype_and_no_larger_than_under_autocast(bench, family):
    """Of prediction and gradient against float32, which bfloat16, of 8 bits, rounds by 0.4 % at most."""
    ours, autocast = bench.errors_of((bench.EDIT, bench.EDIT_21)[family], bench.OURS, bench.AUTOCAST, lora=True)
    assert ours[0] < 2e-3 and ours[1] < 1.5e-2 and ours[2] < 2e-2
    assert ours[1] < 1.15 * autocast[1] and ours[2] < 1.15 * autocast[2]


QUICK = {("QwenImageEditPlusPipeline", "now", True), ("QwenImage21Pipeline", "now", True)}
ALL = [
    (pipeline, way, lora)
    for pipeline in ("QwenImageEditPlusPipeline", "QwenImage21Pipeline")
    for lora in (1, 0)
    for way in ("autocast", "without casts of norms and adapters", "FSDP2's policy", "now")
]


@pytest.mark.parametrize(
    ("pipeline", "way", "lora"), [pytest.param(*one, marks=() if one in QUICK else pytest.mark.soak) for one in ALL]
)
def test_kernels_and_bytes_are_those_of_the_page(root, bench, pipeline, way, lora):
    page = (root / "docs" / "performance.md").read_text(encoding="utf-8")
    assert bench.line(pipeline, way, lora=bool(lora)) in page
