"""Optimizers with two rates, blocks that are compiled, and a base that is quantised."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from diffusers import AutoModel, TorchAoConfig
from embedding_sets import write_recipe
from safetensors.torch import load_file
from torchao.quantization import Int8WeightOnlyConfig

from hf_qie.config.recipe import load_recipe
from hf_qie.errors import InputError
from hf_qie.training.model import parameters
from hf_qie.training.sets import open_sets
from hf_qie.training.setup import build_trainer, make_model, training_arguments
from hf_qie.training.trainer import EditTrainer

both_families = pytest.mark.parametrize("family", ["edit_plus", "qwen_image_21"])
KINDS = {"full": {}, "lora": {"lora": {"rank": 4, "alpha": 8, "target_modules": "all-linear"}}}


@pytest.fixture(autouse=True)
def one_process():
    PartialState(cpu=True)


def trainer_of(recipe: Path, *overrides: str) -> EditTrainer:
    loaded = load_recipe(recipe, overrides)
    return build_trainer(loaded, open_sets(loaded))[0]


def weights(trainer: EditTrainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters(trainer.model).items()}


QUICK = [("adamw_torch", "full"), ("adafactor", "lora"), ("sgd", "full")]
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")


def marked(pairs, quick):
    return [pytest.param(*pair, marks=() if pair in quick else pytest.mark.soak) for pair in pairs]


@both_families
@pytest.mark.parametrize(("optim", "kind"), marked([(o, k) for o in OPTIMIZERS for k in KINDS], QUICK))
def test_an_optimizer_trains_all_that_trains_and_resumes(tiny, tmp_path, family, optim, kind):
    # of adapters: img_in.lora_A and its fellows
    path = write_recipe(tmp_path, tiny(family), trainable=KINDS[kind] | {"low_lr_modules": ["img_mlp", "img_in"]})
    overrides = [f"training.optim={optim}", "training.weight_decay=0.01"]
    trainer = trainer_of(path, *overrides)
    before = weights(trainer)
    trainer.train()
    rates = {group["lr"] for group in trainer.optimizer.param_groups}
    assert len(rates) == 1  # of a linear schedule that has come to its end: 0
    held = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    trained = {name: p for name, p in parameters(trainer.model).items() if p.requires_grad}
    assert sorted(held) == sorted(map(id, trained.values()))
    after = weights(trainer)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved <= set(trained)
    assert len(moved) > 0.8 * len(trained)  # some gradients are exactly zero, and so is what decays from zero
    again = trainer_of(path, *overrides)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for name, value in weights(again).items():
        assert torch.equal(value, after[name]), name


@both_families
def test_a_part_that_trains_beside_frozen_bfloat16_resumes_bit_for_bit_and_loads_in_diffusers(tiny, tmp_path, family):
    path = write_recipe(
        tmp_path, tiny(family), trainable={"modules": ["transformer_blocks.0"]}, training={"bf16": True}
    )
    trainer = trainer_of(path)
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    saved = load_file(checkpoint / "transformer" / "diffusion_pytorch_model.safetensors")
    own = weights(trainer)
    assert {name: tensor.dtype for name, tensor in saved.items()} == {name: own[name].dtype for name in own}
    assert {tensor.dtype for tensor in own.values()} == {torch.float32, torch.bfloat16}
    again = trainer_of(path)
    again.train(resume_from_checkpoint=str(checkpoint))
    for name, value in weights(again).items():
        assert torch.equal(value, own[name]), name
    again.save_model()
    for folder, dtype in ((checkpoint, torch.float32), (tmp_path / "run", torch.bfloat16)):
        loaded = AutoModel.from_pretrained(str(folder), subfolder="transformer", dtype=dtype)
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert all(torch.equal(value, own[name].to(dtype)) for name, value in loaded.named_parameters())


@both_families
@pytest.mark.parametrize(
    ("kind", "checkpointing"), marked([(k, c) for k in KINDS for c in (True, False)], [("lora", True)])
)
def test_compiled_blocks_train_as_they_are(tiny, tmp_path, family, kind, checkpointing):
    """Traced by the compiler, but run without generated code, which takes minutes."""
    path = write_recipe(
        tmp_path, tiny(family), trainable=KINDS[kind], training={"optim": "sgd", "save_strategy": "no"}
    )
    checkpoints = f"training.activation_checkpointing={str(checkpointing).lower()}"
    plain = trainer_of(path, checkpoints)
    compiled = trainer_of(path, checkpoints, "training.torch_compile=true", "training.torch_compile_backend=eager")
    transformer = compiled.model.get_base_model() if kind == "lora" else compiled.model
    assert all(block._compiled_call_impl for block in transformer.transformer_blocks)
    assert transformer._compiled_call_impl is None
    assert not compiled.args.torch_compile
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    plain.train()
    assert not torch._dynamo.utils.counters["stats"]["calls_captured"]
    compiled.train()
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] > 0
    ours, theirs = weights(compiled), weights(plain)
    assert ours.keys() == theirs.keys(), "names stay those of the checkpoint"
    for name in ours:  # float32 sums in another order
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=0)


# --- a quantised base ------------------------------------------------------------------------------------------------


def quantised(model: Path, folder: Path) -> Path:
    """The checkpoint with its transformer as diffusers saves it with int8 weights."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("transformer"))
    how = TorchAoConfig(Int8WeightOnlyConfig(version=2, set_inductor_config=False))
    transformer = AutoModel.from_pretrained(
        str(model), subfolder="transformer", quantization_config=how, dtype=torch.bfloat16
    )
    transformer.save_pretrained(folder / "transformer")
    return folder


@both_families
def test_adapters_train_on_a_quantised_base_near_what_they_do_on_the_whole_one(tiny, tmp_path, family):
    (tmp_path / "whole").mkdir()
    losses, whole = [], tiny(family)
    for model, folder in ((whole, tmp_path / "whole"), (quantised(whole, tmp_path / "int8"), tmp_path)):
        trainer = trainer_of(write_recipe(folder, model, trainable=KINDS["lora"]), "training.bf16=true")
        before = weights(trainer)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        after = weights(trainer)
        moved = {name for name, value in after.items() if "lora" in name and not torch.equal(value, before[name])}
        assert moved
    base = trainer.model.get_base_model().transformer_blocks[0].attn.to_q.base_layer.weight
    assert type(base).__name__ == "Int8Tensor"
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)  # weights of 8 bits


def test_the_weights_of_a_quantised_checkpoint_cannot_train_nor_be_sharded(tiny, tmp_path):
    shutil.copytree(tiny(), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "transformer" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "torchao"}
    (tmp_path / "model" / "transformer" / "config.json").write_text(json.dumps(config))
    path = write_recipe(tmp_path, tmp_path / "model")
    with pytest.raises(
        InputError, match=r"transformer of .* is quantised \(torchao\), so its own weights cannot train"
    ):
        trainer_of(path)
    loaded = load_recipe(write_recipe(tmp_path, tmp_path / "model", trainable=KINDS["lora"]))
    arguments = training_arguments(loaded, num_rows=1)
    arguments.fsdp = True
    with pytest.raises(InputError, match=r"training\.fsdp: the transformer of .* is quantised"):
        make_model(loaded, arguments)
