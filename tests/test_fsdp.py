"""FSDP2 gives DDP's weights, trains all it should, and leaves what resumes and what diffusers loads.

Two ranks on gloo do all the runs of a family in one go; see tests/ranks.py. With Qwen-Image-2.1 they are of sharded
state alone; tests/test_draws_per_row.py holds full state and shards to one rank.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline
from embedding_sets import write_recipe
from ranks import in_ranks
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard

from hf_qie.errors import InputError
from hf_qie.training.fsdp import check_sharded
from hf_qie.training.model import LORA_FILE

LORA = {"lora": {"rank": 4, "alpha": 8, "target_modules": "all-linear"}}
WEIGHTS = {"full": "transformer/diffusion_pytorch_model.safetensors", "lora": LORA_FILE}
CHECKPOINTING = ", activation_checkpointing: true"
PEOPLES_FLAGS = (
    "--use_fsdp --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP "
    "--fsdp_transformer_layer_cls_to_wrap={block} --fsdp_state_dict_type=SHARDED_STATE_DICT "
    "--mixed_precision bf16"
)


BLOCKS = {"edit_plus": "QwenImageTransformerBlock", "qwen_image_21": "QwenImage21TransformerBlock"}
NUM_TRAINED = {"edit_plus": {"full": 71, "lora": 62}, "qwen_image_21": {"full": 27, "lora": 44}}


def fsdp(state: str, more: str = "") -> list[str]:
    config = f"{{fsdp_version: 2, state_dict_type: {state}_STATE_DICT, cpu_ram_efficient_loading: true{more}}}"
    return ["training.fsdp=true", f"training.fsdp_config={config}"]


def runs_in(folder: Path, model: Path, family: str) -> list[dict]:
    """Every run of these tests with a family, each in a folder of its name."""
    runs = []
    shutil.copytree(model, folder / "bare", ignore=shutil.ignore_patterns("*.safetensors"))

    def add(kind: str, name: str, *overrides: str, **more) -> None:
        recipe, output_dir = folder / kind / "recipe.yaml", folder / kind / name
        overrides = [f"training.output_dir={output_dir}", *overrides]
        runs.append({"recipe": str(recipe), "overrides": overrides, **more})

    for kind, trainable in (("full", {}), ("lora", LORA)):
        (folder / kind).mkdir(parents=True)
        # a large epsilon keeps AdamW from blowing up the rounding of gradients that are nearly 0
        training = {"use_cpu": None, "per_device_train_batch_size": 2, "adam_epsilon": 1e-3}
        write_recipe(folder / kind, model, trainable=trainable, training=training)
        add(kind, "ddp", "training.use_cpu=true")
        for state in ("SHARDED", "FULL") if family == "edit_plus" else ("SHARDED",):
            overrides = [*fsdp(state), f"training.activation_checkpointing={'true' if state == 'FULL' else 'false'}"]
            add(kind, state, *overrides, others=[f"model={folder / 'bare'}"])
            checkpoint = str(folder / kind / state / "checkpoint-2")
            add(kind, f"{state} resumed", *overrides, checkpoint=checkpoint)
            if kind == "lora" and family == "edit_plus":
                add(kind, f"{state} slower", *overrides, "training.learning_rate=1e-4", checkpoint=checkpoint)
    add("full", "other state", *fsdp("FULL"), checkpoint=str(folder / "full" / "SHARDED" / "checkpoint-2"))
    cut = "training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=2"
    add("full", "accumulated", *fsdp("SHARDED", CHECKPOINTING), *cut)
    if family == "edit_plus":
        add("full", "on the CPU", *fsdp("SHARDED"), "training.use_cpu=true")
    for kind in ("full", "lora"):
        add(kind, "flags", environment=environment_of(PEOPLES_FLAGS.format(block=BLOCKS[family])))
    return runs


def environment_of(flags: str) -> dict[str, str]:
    """What `accelerate launch` with these flags sets for its ranks, beside their numbers."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    arguments = launch_command_parser().parse_args([*flags.split(), "--num_processes", "2", "hf_qie/train.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    variables = prepare_multi_gpu_env(arguments)
    return {
        name: value for name, value in variables.items() if name.startswith(("FSDP_", "ACCELERATE_", "PARALLELISM_"))
    }


@pytest.fixture
def family() -> str:
    """The kind of the checkpoint; `both_families` gives others."""
    return "edit_plus"


@pytest.fixture
def done(built_once, tiny, family) -> Path:
    """The folder of all runs with a family, done."""

    def build(folder: Path) -> None:
        runs = runs_in(folder, tiny(family), family)
        assert in_ranks(runs, ranks=2, log=folder / "log") == [0, 0], (folder / "log").read_text()

    return built_once(f"fsdp_{family}", build)


def reports(run: Path) -> list[dict]:
    """What the two ranks said of a run."""
    return [json.loads((run / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def hold(ours: Path, theirs: Path, kind: str, atol: float = 0.0) -> None:
    one, other = load_file(ours / WEIGHTS[kind]), load_file(theirs / WEIGHTS[kind])
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


pytestmark = pytest.mark.two_rank
both_kinds = pytest.mark.parametrize("kind", ["full", "lora"])
both_families = pytest.mark.parametrize("family", BLOCKS)
both_states = pytest.mark.parametrize("state", ["SHARDED", "FULL"])


@both_states
def test_a_resumed_run_of_shards_has_the_rate_of_its_recipe(done, state):
    slower = reports(done / "lora" / f"{state} slower")[0]["steps"]
    assert [entry["learning_rate"] for entry in slower[2:]] == pytest.approx([5e-5, 2.5e-5])


FAMILIES_AND_STATES = [("edit_plus", "SHARDED"), ("edit_plus", "FULL"), ("qwen_image_21", "SHARDED")]
all_states = pytest.mark.parametrize(("family", "state"), FAMILIES_AND_STATES)


@all_states
@both_kinds
def test_fsdp_gives_the_weights_and_losses_of_ddp(done, kind, state):
    """Though the second rank's checkpoint has no weights."""
    hold(done / kind / state, done / kind / "ddp", kind, atol=1e-5)  # float32 sums in another order
    ours, theirs = (reports(done / kind / name)[0]["steps"] for name in (state, "ddp"))
    assert len(ours) == 4
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-4)  # norms too, of gradients that differ by rounding


@all_states
@both_kinds
def test_every_rank_holds_its_part_and_trains_every_tensor_that_trains(done, kind, family, state):
    ranks = reports(done / kind / state)
    for report in ranks:
        assert report["held"] == report["trained"] == NUM_TRAINED[family][kind]
        assert report["numel_here"] < report["numel"]
    assert sum(report["numel_here"] for report in ranks) == ranks[0]["numel"]


@all_states
@both_kinds
def test_a_resumed_sharded_run_is_one_that_was_never_interrupted(done, kind, state):
    straight, resumed = done / kind / state, done / kind / f"{state} resumed"
    hold(resumed, straight, kind)
    assert [report["steps"] for report in reports(resumed)] == [report["steps"] for report in reports(straight)]


@both_families
def test_gradients_that_are_sharded_after_each_micro_batch_add_up_to_the_same(done):
    """With FSDP's own activation checkpointing, which wraps each block once more."""
    hold(done / "full" / "accumulated", done / "full" / "ddp", "full", atol=1e-5)  # float32 sums in another order


@both_families
def test_a_checkpoint_of_another_state_is_refused(done):
    for report in reports(done / "full" / "other state"):
        assert (
            "holds a run with another training.fsdp_config.state_dict_type, which this one cannot resume"
            in report["error"]
        )


def test_fsdp_that_would_not_be_active_is_an_error(done):
    for report in reports(done / "full" / "on the CPU"):
        assert "training.fsdp: asked for, but not active in 2 process(es) on cpu" in report["error"]


SAVED = {"edit_plus": ["SHARDED", "FULL", "SHARDED resumed", "FULL/checkpoint-4", "flags"]}
SAVED |= {"qwen_image_21": ["SHARDED", "flags"]}


@pytest.mark.parametrize(("family", "state"), [(family, state) for family in SAVED for state in SAVED[family]])
def test_full_weights_that_fsdp_saved_load_in_diffusers(done, tiny, family, state):
    loaded = AutoModel.from_pretrained(str(done / "full" / state), subfolder="transformer")
    base = AutoModel.from_pretrained(str(tiny(family)), subfolder="transformer")
    shapes, expected = ({name: p.shape for name, p in one.named_parameters()} for one in (loaded, base))
    assert type(loaded) is type(base) and shapes == expected


SAVED_LORA = {"edit_plus": ["SHARDED", "FULL", "SHARDED/checkpoint-4", "FULL/checkpoint-4"]}
SAVED_LORA |= {"qwen_image_21": ["SHARDED/checkpoint-4"]}


@pytest.mark.parametrize(
    ("family", "state"), [(family, state) for family in SAVED_LORA for state in SAVED_LORA[family]]
)
def test_adapters_that_fsdp_saved_load_in_diffusers(done, tiny, family, state):
    pipeline = DiffusionPipeline.from_pretrained(tiny(family))
    pipeline.load_lora_weights(done / "lora" / state)
    hold(done / "lora" / state, done / "lora" / "ddp", "lora", atol=1e-5)
    named = dict(pipeline.transformer.named_parameters())
    loaded = {name for name in named if ".lora_" in name and named[name].abs().sum() > 0}
    assert len(loaded) >= NUM_TRAINED[family]["lora"]  # every one that trained


@both_families
def test_peoples_flags_train_a_frozen_base_in_bfloat16_and_what_trains_in_float32(done, family):
    (full, *_), (lora, *_) = reports(done / "full" / "flags"), reports(done / "lora" / "flags")
    # of the older family some weights get no gradient
    assert full["dtypes"] == [*["False: torch.bfloat16"] * (family == "edit_plus"), "True: torch.float32"]
    assert "False: torch.bfloat16" in lora["dtypes"]
    assert "True: torch.float32" in lora["dtypes"]
    assert "True: torch.bfloat16" not in lora["dtypes"]
    assert "FSDP: version 1 was asked for, version 2 is used" in (done / "log").read_text()
    for kind, report in (("full", full), ("lora", lora)):
        losses = [entry["loss"] for entry in report["steps"]]
        exact = [entry["loss"] for entry in reports(done / kind / "ddp")[0]["steps"]]
        assert losses != exact
        assert losses == pytest.approx(exact, rel=0.02)  # bfloat16 keeps 8 bits: 0.4% a rounding


def test_what_was_trained_in_bfloat16_arithmetic_is_exported_in_bfloat16(done):
    tensors = load_file(done / "full" / "flags" / WEIGHTS["full"])
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


@pytest.fixture
def one_rank(tmp_path):
    """A process group of one, in which modules can be sharded."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def sharded() -> nn.Module:
    return fully_shard(
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), mesh=torch.distributed.init_device_mesh("cpu", (1,))
    )


def test_an_optimizer_that_lacks_a_tensor_is_an_error(one_rank):
    model = sharded()
    check_sharded(model, torch.optim.SGD(model.parameters()))
    one_for_all = torch.optim.SGD([next(model.parameters())])
    with pytest.raises(RuntimeError, match="the optimizer holds 1 distinct tensors, 1 of the 4 that train"):
        check_sharded(model, one_for_all)


def test_a_model_that_is_not_sharded_is_an_error():
    model = nn.Linear(2, 2)
    with pytest.raises(InputError, match="not active: no parameter is sharded"):
        check_sharded(model, torch.optim.SGD(model.parameters()))
