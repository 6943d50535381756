"""Blocks that are streamed, and inputs of blocks that wait in CPU memory, change no bit of a training run."""

import json
import logging
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline, QwenImageTransformer2DModel
from embedding_sets import write_recipe
from peft import LoraConfig, get_peft_model
from ranks import in_ranks
from safetensors.torch import load_file
from small_recipes import weightless
from torch import nn

from hf_qie.config.recipe import load_recipe
from hf_qie.errors import InputError
from hf_qie.models.qwen_image.family import EDIT_PLUS
from hf_qie.models.qwen_image_21.family import QWEN_IMAGE_21
from hf_qie.models.qwen_image_21.packed import QwenImage21Transformer2DModel, RowLayout
from hf_qie.training import offloading
from hf_qie.training.model import LORA_FILE, lora_targets
from hf_qie.training.offloading import BlockStream, checkpoint_on_cpu, stream_blocks
from hf_qie.training.precision import compute_in
from hf_qie.training.sets import open_sets
from hf_qie.training.setup import build_trainer
from hf_qie.training.trainer import EditTrainer

CPU, NUM_BLOCKS = torch.device("cpu"), 7


@pytest.fixture(autouse=True)
def one_process():
    PartialState(cpu=True)


# --- the transformer alone -------------------------------------------------------------------------------------------


EMPTY = {  # transformers whose hidden states are 64 wide
    "edit_plus": (EDIT_PLUS, QwenImageTransformer2DModel, {"out_channels": 4, "joint_attention_dim": 24}),
    "qwen_image_21": (QWEN_IMAGE_21, QwenImage21Transformer2DModel, {"out_channels": 16, "context_in_dim": 24}),
}
both_families = pytest.mark.parametrize("family", EMPTY)


def model_of(
    targets: str | list[str] = "attention",
    *,
    dropout: float = 0.2,
    dtype: torch.dtype = torch.float32,
    family: str = "edit_plus",
) -> nn.Module:
    """A transformer of seven blocks, with adapters that are not zero."""
    torch.manual_seed(0)
    shape = {"in_channels": 16, "attention_head_dim": 32, "num_attention_heads": 2}
    shape |= {"num_layers": NUM_BLOCKS, "axes_dims_rope": (8, 12, 12)}
    ours, kind, widths = EMPTY[family]
    transformer = nn.Module.to(kind(**shape | widths), dtype)
    names = lora_targets(transformer, targets, ours.lora_presets)
    settings = {"lora_dropout": dropout, "target_modules": names, "init_lora_weights": False}
    model = get_peft_model(transformer, LoraConfig(r=4, lora_alpha=8, **settings))
    for name, parameter in model.named_parameters():
        if f"transformer_blocks.{NUM_BLOCKS - 1}.txt_mlp" in name:
            parameter.requires_grad_(False)  # as in training, where no gradient reaches it
    transformer.enable_gradient_checkpointing()
    compute_in(model, "bf16" if dtype == torch.bfloat16 else "no")
    return model


def streamed(model: nn.Module, count: int) -> BlockStream:
    return stream_blocks(model, model.get_base_model(), count, CPU)


def loss_of(model: nn.Module, seed: int, *, grid: tuple[int, int] = (4, 4), rows: int = 2) -> torch.Tensor:
    torch.manual_seed(seed)  # of dropout too
    latents, prompts = torch.randn(rows, grid[0] * grid[1], 16), torch.randn(rows, 3 + seed % 3, 24)
    inputs = {"hidden_states": latents, "encoder_hidden_states": prompts, "timestep": torch.rand(rows)}
    if isinstance(model.get_base_model(), QwenImage21Transformer2DModel):
        layout = RowLayout(target=grid, sources=((1, 2),), num_text=prompts.shape[1], slots=(2,))
        inputs |= {"source_latents": torch.randn(rows, 2, 16), "rows": [layout] * rows}
    else:
        inputs |= {"img_shapes": [[(1, *grid)]] * rows, "return_dict": False}
    output = model(**inputs)
    return (output[0] if isinstance(output, tuple) else output).float().square().mean()


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def history(model: nn.Module, *, num_steps: int = 2) -> list[torch.Tensor]:
    """Losses and gradients of some steps, with all that may come between them."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    found = []
    for step in range(num_steps):
        for micro_batch in range(2):
            loss = loss_of(model, 10 * step + micro_batch, grid=(4, 2 + step), rows=1 + micro_batch)
            loss.backward()
            found.append(loss.detach())
        found += gradients(model)
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            found.append(loss_of(model, 7))
        model.train()
        loss_of(model, 8)  # its backward never comes
    return found


def assert_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert len(ours) == len(theirs) > 20
    assert all(map(torch.equal, ours, theirs))


QUICK = [(3, "attention", torch.float32), (4, "attention+mlp", torch.bfloat16), (7, "all-linear", torch.float32)]
ALL = [
    (count, targets, dtype)
    for count in (3, 4, 7)
    for targets in EDIT_PLUS.lora_presets
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize(
    ("count", "targets", "dtype"), [pytest.param(*one, marks=() if one in QUICK else pytest.mark.soak) for one in ALL]
)
def test_streamed_blocks_give_the_same_losses_and_gradients(count, targets, dtype):
    model = model_of(targets, dtype=dtype)
    streamed(model, count)
    assert_equal(history(model), history(model_of(targets, dtype=dtype)))


class LateCopies:
    """A stream, and its events, whose copies are done no sooner than something waits for them.

    Until then, a slot that is copied into holds no numbers: whoever reads it too early, or too late, finds NaN.
    """

    def __init__(self, stream: BlockStream):
        self.stream, self.copy, self.launched = stream, stream._copy, []
        stream.copies, stream._copy = self, self.launch

    def launch(self, number: int) -> None:
        for parameter in self.stream.slots[number % 2].values():
            parameter.data.fill_(torch.nan)
        self.launched.append(number)

    def record_event(self) -> int:
        return len(self.launched)

    def wait_event(self, event: int) -> None:
        for place in range(event):
            if self.launched[place] is not None:
                self.copy(self.launched[place])
                self.launched[place] = None

    def wait_stream(self, other: "LateCopies") -> None:
        """What was launched on the CPU is done."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


@both_families
@pytest.mark.parametrize("count", [3, 6])
def test_no_weight_is_used_before_its_copy_is_waited_for_nor_after_the_next_one_is_launched(
    monkeypatch, family, count
):
    model = model_of("all-linear", family=family)
    late = LateCopies(streamed(model, count))
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda: late)
    assert_equal(history(model), history(model_of("all-linear", family=family)))
    assert sum(number is not None for number in late.launched) < 2  # all but one that was brought ahead


@both_families
@pytest.mark.parametrize("count", [3, 6, 7])
def test_a_step_copies_each_block_once_in_each_direction_and_while_another_one_computes(family, count):
    """But for the two that are there: where backward begins, and where the next step does."""
    model, done = model_of(family=family), []
    stream = streamed(model, count)
    copy = stream._copy
    stream._copy = lambda number: (done.append(("copy", number)), copy(number))
    for number in range(count):
        block = model.get_base_model().transformer_blocks[number * NUM_BLOCKS // count]
        block.img_norm1.register_forward_pre_hook(lambda *_, number=number: done.append(("compute", number)))
    loss_of(model, 0).backward()
    forward, backward = [("compute", 0)], [("compute", count - 1)]
    for number in range(1, count - 1):
        forward += [("copy", number + 1), ("compute", number)]
        backward += [("copy", count - 2 - number), ("compute", count - 1 - number)]
    step = [*forward, ("compute", count - 1), *backward, ("compute", 0)]
    assert sum(what == "copy" for what, _ in step) == 2 * (count - 2)
    for seed in range(3):
        done.clear()
        loss_of(model, seed).backward()
        assert done == step


def test_what_is_streamed_is_not_on_the_device_but_for_two_blocks():
    """Counted by the parameters: all are on the device."""
    base, count = model_of("attention+mlp"), 5
    frozen = {name: p.nbytes for name, p in base.named_parameters() if ".lora_" not in name}
    of_a_block = sum(nbytes for name, nbytes in frozen.items() if ".transformer_blocks.0." in name)
    whole = sum(p.nbytes for p in base.parameters())
    stream = streamed(base, count)
    assert sum(home.nbytes for homes in stream.homes for home in homes) == count * of_a_block
    assert sum(p.nbytes for p in base.parameters()) == whole - (count - 2) * of_a_block
    places = [place for place in range(NUM_BLOCKS) if not resident(base, place)]
    assert places == [0, 1, 2, 4, 5]  # evenly spread


def test_no_room_in_cpu_memory_is_an_error_by_name(monkeypatch):
    monkeypatch.setattr(offloading, "BUFFER_BYTES", 2**60)
    with pytest.raises(InputError, match=r"memory\.stream_blocks: no 1152921504\.6 GB more of CPU memory: .*; stream"):
        streamed(model_of(), 3)


def resident(model: nn.Module, place: int) -> bool:
    weights = [block.img_mod[1].weight for block in model.get_base_model().transformer_blocks]
    return sum(weights[place] is other for other in weights) == 1


def test_layers_with_adapters_in_some_blocks_alone():
    """Which makes their weights `base_layer.weight` there alone."""
    targets = ["attn.to_q", "1.img_mlp.net.2", "6.attn.to_out.0", "img_in"]
    model = model_of(targets)
    streamed(model, 7)
    assert_equal(history(model), history(model_of(targets)))


def test_compiled_blocks_stream():
    """What is compiled of a block starts behind the hook: traced, it would copy at the time of compiling alone."""

    def compiled(count: int | None) -> nn.Module:
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        model = model_of(["to_q", "img_mlp.net.2"], dropout=0)
        if count:
            streamed(model, count)
        model.get_base_model().compile_repeated_blocks(backend="eager")
        return model

    found = []
    for count in (None, 3):
        model = compiled(count)
        for seed in (0, 3):
            loss_of(model, seed).backward()
        found.append((gradients(model), dict(torch._dynamo.utils.counters["stats"])))
    (theirs, theirs_counted), (ours, ours_counted) = found
    assert_equal(ours, theirs)
    assert ours_counted == theirs_counted
    assert ours_counted["calls_captured"] > 100


def quantized(model: nn.Module, kind: str) -> nn.Module:
    """With the linear layers of its blocks quantised, but for adapters, by the library of that kind."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".lora_" not in n}
    layers = {name: layer for name, layer in layers.items() if ".transformer_blocks." in name}
    if kind == "nf4":
        bitsandbytes = pytest.importorskip("bitsandbytes").nn
        for name, layer in layers.items():
            ours = bitsandbytes.Linear4bit(layer.in_features, layer.out_features, compute_dtype=layer.weight.dtype)
            ours.weight = bitsandbytes.Params4bit(layer.weight.data, False, quant_type="nf4", module=ours).to("cpu")
            ours.bias, ours.support_avx512bf16_for_cpu = layer.bias, False  # would repack weights when it evaluates
            model.set_submodule(name, ours)
    else:
        torchao = pytest.importorskip("torchao.quantization")
        how = torchao.Float8WeightOnlyConfig if kind == "fp8" else partial(torchao.Int8WeightOnlyConfig, version=2)
        how = how(set_inductor_config=False)  # else it would change the compiler's options for the tests that follow
        torchao.quantize_(model, how, filter_fn=lambda module, name: name in layers)
    return model


@pytest.mark.parametrize("kind", ["int8", "fp8", "nf4"])
def test_quantised_blocks_stream_with_their_scales(kind):
    model = quantized(model_of(), kind)
    plain = sum(home.nbytes for homes in streamed(model_of(), 4).homes for home in homes)
    stream = streamed(model, 4)
    assert sum(home.nbytes for homes in stream.homes for home in homes) < plain / {"int8": 3, "fp8": 3, "nf4": 5}[kind]
    assert_equal(history(model), history(quantized(model_of(), kind)))


@both_families
def test_inputs_of_blocks_wait_on_the_cpu_and_nothing_else(monkeypatch, family):
    packed = Counter()

    class Recorded(torch.autograd.graph.save_on_cpu):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            pack = self.pack_hook
            self.pack_hook = lambda tensor: (packed.update([tuple(tensor.shape)]), pack(tensor))[1]

    monkeypatch.setattr(offloading, "save_on_cpu", Recorded)
    model = model_of("all-linear", family=family)
    model.get_base_model().enable_gradient_checkpointing(checkpoint_on_cpu(CPU))
    assert_equal(history(model, num_steps=1), history(model_of("all-linear", family=family), num_steps=1))
    num_forwards = 3  # with gradients
    if family == "edit_plus":  # image tokens, prompt tokens, the embedding of the time
        assert packed[1, 8, 64] == packed[1, 3, 64] == packed[1, 64] == NUM_BLOCKS
    else:  # all tokens, modulation of the prefix and of a target, rotary factors
        assert packed[1, 13, 64] == packed[2, 4 * 64] == packed[13, 16] == NUM_BLOCKS
    assert sum(packed.values()) == num_forwards * NUM_BLOCKS * 3


# --- runs of a recipe ------------------------------------------------------------------------------------------------

MEMORY = "memory={stream_blocks: 3, offload_activations: true}"
LORA = {"lora": {"rank": 4, "alpha": 8, "dropout": 0.2, "target_modules": "all-linear"}}
TASKS = {"edit": {"data": "edit.jsonl", "eval_rows": 2}, "text_to_image": {"data": "none.jsonl", "eval_rows": 1}}
TRAINING = {
    "activation_checkpointing": True,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "gradient_accumulation_steps": 2,
}


def recipe_in(folder: Path, model: Path, **training) -> Path:
    """Of a checkpoint of four blocks."""
    sampling = {"every": 4, "rows": 2, "num_inference_steps": 2}
    training = TRAINING | {"per_device_train_batch_size": 2} | training
    return write_recipe(folder, model, tasks=TASKS, trainable=LORA, sampling=sampling, training=training)


def trainer_of(recipe: Path, *overrides: str) -> tuple[EditTrainer, Path | None]:
    loaded = load_recipe(recipe, overrides)
    return build_trainer(loaded, open_sets(loaded))


def run(recipe: Path, folder: Path, *overrides: str) -> list[dict[str, float]]:
    """The losses, norms and evaluations of a run, or of the rest of one that lies in the folder."""
    trainer, checkpoint = trainer_of(recipe, f"training.output_dir={folder}", *overrides)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    trainer.save_model()
    kept = ("step", "loss", "grad_norm", "eval_loss")
    return [{key: entry[key] for key in kept if key in entry} for entry in trainer.state.log_history]


def adapters(folder: Path) -> dict[str, bytes]:
    """By tensor: the order of those in a file is any."""
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(folder / LORA_FILE).items()}


def images(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.png")}


learners = pytest.mark.parametrize("kind", ["learner", "qwen_image_21_learner"])


@learners
def test_a_run_is_the_same_with_and_without_and_so_is_one_resumed_with_the_other(tiny, tmp_path, caplog, kind):
    recipe = recipe_in(tmp_path, tiny(kind))
    plain = run(recipe, tmp_path / "plain")
    with caplog.at_level(logging.WARNING, logger="hf_qie"):
        ours = run(recipe, tmp_path / "ours", MEMORY)
    assert "memory.stream_blocks: 3 saves nothing, as training runs on the CPU" in caplog.text
    assert ours == plain
    assert len([entry for entry in ours if "eval_loss" in entry]) == 2
    assert adapters(tmp_path / "ours") == adapters(tmp_path / "plain")
    assert images(tmp_path / "ours") == images(tmp_path / "plain")
    assert len(images(tmp_path / "ours")) == 1 + 2 * 2
    for name, before, after in (("on", "plain", [MEMORY]), ("off", "ours", [])):
        (tmp_path / name).mkdir()
        (tmp_path / before / "checkpoint-2").rename(tmp_path / name / "checkpoint-2")
        assert run(recipe, tmp_path / name, *after) == plain
        assert adapters(tmp_path / name) == adapters(tmp_path / "plain")


@learners
def test_the_adapters_of_a_streamed_run_load_in_diffusers(tiny, tmp_path, kind):
    recipe = recipe_in(tmp_path, tiny(kind), max_steps=1, save_strategy="no")
    run(recipe, tmp_path / "run", MEMORY, "sampling.every=0")
    pipeline = DiffusionPipeline.from_pretrained(tiny(kind))
    pipeline.load_lora_weights(tmp_path / "run")
    loaded = {name for name, p in pipeline.transformer.named_parameters() if ".lora_B" in name and p.any()}
    saved = load_file(tmp_path / "run" / LORA_FILE)
    assert len(loaded) == sum(".lora_B" in name and bool(tensor.any()) for name, tensor in saved.items())
    assert len(loaded) > {"learner": 50, "qwen_image_21_learner": 30}[kind]


@learners
def test_more_blocks_than_there_are_is_an_error_before_weights_are_loaded(tiny, tmp_path, kind):
    recipe = recipe_in(tmp_path, weightless(tiny(kind), tmp_path / "bare"))
    with pytest.raises(InputError, match=r"memory\.stream_blocks: got 5, expected at most 4, the blocks of"):
        trainer_of(recipe, "memory.stream_blocks=5", "sampling.every=0")
    with pytest.raises(InputError, match="cannot load the transformer"):
        trainer_of(recipe, "memory.stream_blocks=4", "sampling.every=0")


@pytest.mark.two_rank
@pytest.mark.parametrize(
    ("kind", "plain"),
    [
        ("learner", ("ddp", "fsdp")),
        ("qwen_image_21_learner", ("fsdp",)),
        pytest.param("qwen_image_21_learner", ("ddp",), marks=pytest.mark.soak),
    ],
)
def test_two_ranks_give_the_same_with_and_without(tiny, tmp_path, kind, plain):
    """DDP with both; FSDP with inputs of blocks on the CPU."""
    training = {"per_device_train_batch_size": 1, "use_cpu": None, "max_steps": 2}
    recipe = recipe_in(tmp_path, tiny(kind), **training)
    fsdp = [
        "training.fsdp=true",
        "training.eval_strategy=no",
        "sampling.every=0",
        "training.fsdp_config={state_dict_type: FULL_STATE_DICT}",
    ]
    ways = {
        "ddp": ["training.use_cpu=true"],
        "ddp, ours": ["training.use_cpu=true", MEMORY],
        "fsdp": fsdp,
        "fsdp, ours": [*fsdp, "memory.offload_activations=true"],
    }
    runs = [
        {"recipe": str(recipe), "overrides": [f"training.output_dir={tmp_path / name}", *how]}
        for name, how in ways.items()
        if name.startswith(plain)
    ]
    log = tmp_path / "log"
    assert in_ranks(runs, ranks=2, log=log) == [0, 0], log.read_text()
    for way in plain:
        ours, theirs = (json.loads((tmp_path / name / "rank0.json").read_text()) for name in (f"{way}, ours", way))
        assert len(ours["steps"]) == 2
        assert ours["steps"] == theirs["steps"]
        assert adapters(tmp_path / f"{way}, ours") == adapters(tmp_path / way)
