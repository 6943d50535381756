"""A quantised base: what is stored, that adapters get the gradients of the stored weights, and what a run leaves."""

import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from diffusers import AutoModel, DiffusionPipeline
from embedding_sets import write_recipe as write_any
from ranks import in_ranks
from safetensors.torch import load_file, save_file
from training_runs import trainer_of

from hf_qie import export
from hf_qie.config.recipe import load_recipe
from hf_qie.errors import InputError
from hf_qie.models import quantization
from hf_qie.models.base import read_family
from hf_qie.models.checkpoint import WEIGHTS_FILE, saved_tensors
from hf_qie.models.lora_files import LORA_FILE
from hf_qie.models.quantization import expanded, kind_of, load_quantized, quantized
from hf_qie.models.qwen_image.family import EDIT_PLUS
from hf_qie.training.model import adapters, base_of, parameters
from hf_qie.training.setup import make_model, training_arguments
from hf_qie.training.trainer import EditTrainer

CPU = torch.device("cpu")
KINDS = ("fp8", "int8", "nf4")
LORA = {"lora": {"rank": 4, "alpha": 8, "target_modules": "attention+mlp"}}
both_families = pytest.mark.parametrize("family", ["edit_plus", "qwen_image_21"])
every_kind = pytest.mark.parametrize(
    ("family", "kind"), [*(("edit_plus", kind) for kind in KINDS), ("qwen_image_21", "int8")]
)
learners = pytest.mark.parametrize("learner", ["learner", "qwen_image_21_learner"])
CLASSES = {"fp8": "Float8Tensor", "int8": "Int8Tensor", "nf4": "Params4bit", None: "Parameter"}


@pytest.fixture(autouse=True)
def one_process():
    PartialState(cpu=True)


def write_recipe(folder: Path, model: Path, **sections) -> Path:
    training = {"activation_checkpointing": True} | sections.pop("training", {})
    return write_any(folder, model, training=training, **{"trainable": LORA} | sections)


def trained(trainer: EditTrainer) -> dict[str, torch.Tensor]:
    trainer.train()
    return {name: one.detach().clone() for name, one in adapters(trainer.model).items()}


def losses(trainer: EditTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# --- what is stored --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "error", "bytes_each"), [("fp8", 0.0265, 1.004), ("int8", 0.0081, 1.004), ("nf4", 0.092, 0.517)]
)
def test_normal_weights_are_rounded_by_so_much_and_take_so_many_bytes(kind, error, bytes_each):
    layer = torch.nn.Linear(1024, 1024, dtype=torch.float32)
    torch.manual_seed(0)
    exact = torch.nn.init.normal_(layer.weight.data, std=0.02).clone()
    stored = quantized(layer, kind).weight
    assert (expanded(stored).float() - exact).norm() / exact.norm() == pytest.approx(error, rel=0.05)
    inner = [getattr(stored, name) for name in stored.__tensor_flatten__()[0]] if kind != "nf4" else [stored.data]
    if state := getattr(stored, "quant_state", None):
        inner += [state.absmax, state.state2.absmax]
    total = sum(one.numel() * one.element_size() for one in inner if one is not None)
    assert total / exact.numel() == pytest.approx(bytes_each, abs=0.002)


@both_families
@pytest.mark.parametrize("kind", KINDS)
def test_linear_layers_of_blocks_are_quantised_and_all_else_is_as_it_was(tiny, tmp_path, family, kind):
    path = write_recipe(tmp_path, tiny(family), training={"bf16": True})
    own = read_family(str(tiny(family)))
    base = base_of(trainer_of(path, f"memory.quantization={kind}").model)
    original = AutoModel.from_pretrained(str(tiny(family) / "transformer"), dtype=torch.bfloat16).state_dict()
    found = {}
    for name, parameter in base.named_parameters():
        if "lora_" not in name:
            plain = name.replace("base_layer.", "")
            layer, _, part = plain.rpartition(".")
            found.setdefault(type(parameter).__name__, set()).add(layer)
            linear = part == "weight" and original[plain].ndim == 2
            expected = kind_of(layer, kind, own) if linear else None
            assert type(parameter).__name__ == CLASSES[expected], name
            if expected is None:
                assert torch.equal(parameter, original[plain]), name
    assert any(layer.endswith(("img_mod.1", "modulation.1")) for layer in found["Int8Tensor"])
    assert any("img_mlp" in layer for layer in found[CLASSES[kind]])
    txt_in = {"edit_plus": "txt_in", "qwen_image_21": "txt_in.in_layer"}[family]
    for kept in ("img_in", txt_in, "proj_out", "norm_out.linear", "time_text_embed.timestep_embedder.linear_1"):
        assert kept in found["Parameter"]


def in_shards(model: Path, folder: Path) -> Path:
    """A copy of a checkpoint whose transformer has three weight files; a layer's weight and bias are not in one."""
    shutil.copytree(model, folder)
    transformer = folder / "transformer"
    tensors = load_file(transformer / WEIGHTS_FILE)
    (transformer / WEIGHTS_FILE).unlink()
    mapped = {}
    for i in range(3):
        name = f"part-{i}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[i::3]}
        save_file(part, transformer / name)
        mapped |= dict.fromkeys(part, name)
    (transformer / f"{WEIGHTS_FILE}.index.json").write_text(json.dumps({"weight_map": mapped}))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_one_weight_at_a_time_is_read_from_any_number_of_files(tiny, tmp_path, kind):
    def loaded(folder: Path):
        transformer = EDIT_PLUS.load_transformer(str(folder), revision=None, dtype=torch.float32, empty=True)
        raw: list[weakref.ref] = []

        def noting(name, read):
            def get():
                alive = [one for one in raw if one() is not None]
                assert len(alive) <= 1, "an exact weight outlives its quantised one"
                value = read()
                if kind_of(name.removesuffix(".weight"), kind, EDIT_PLUS) and value.ndim == 2:
                    raw.append(weakref.ref(value))
                return value

            return get

        tensors = {name: noting(name, read) for name, read in saved_tensors(folder / "transformer").items()}
        load_quantized(transformer, tensors, kind, family=EDIT_PLUS, dtype=torch.float32, device=CPU)
        assert len(raw) > 20
        return {name: expanded(one) for name, one in transformer.named_parameters()}

    one, several = loaded(tiny()), loaded(in_shards(tiny(), tmp_path / "shards"))
    assert one.keys() == several.keys()
    assert all(torch.equal(one[name], several[name]) for name in one)


# --- what trains -----------------------------------------------------------------------------------------------------


def gradients(trainer: EditTrainer) -> dict[str, torch.Tensor]:
    """Of the adapters, of the run's first batch, whose `up` halves are no longer 0."""
    for parameter in adapters(trainer.model).values():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(parameter)))
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train().zero_grad()
    trainer.compute_loss(trainer.model, batch).backward()
    return {name: one.grad.clone() for name, one in adapters(trainer.model).items() if one.grad is not None}


def expand(plain: EditTrainer, base: EditTrainer) -> None:
    """Give a run on the plain base the values that the layers of a quantised one compute with."""
    theirs = parameters(base.model)
    with torch.no_grad():
        for name, parameter in parameters(plain.model).items():
            parameter.copy_(expanded(theirs[name]))


@both_families
@pytest.mark.parametrize(("kind", "bf16"), [(kind, bf16) for kind in KINDS for bf16 in (False, True)])
def test_adapters_get_the_gradients_of_the_expanded_weights(tiny, tmp_path, family, kind, bf16):
    path = write_recipe(tmp_path, tiny(family), training={"bf16": bf16})
    base, plain = trainer_of(path, f"memory.quantization={kind}"), trainer_of(path)
    exact = gradients(plain)
    expand(plain, base)
    theirs, ours = gradients(plain), gradients(base)
    assert ours.keys() == theirs.keys()

    def off(one, other):  # the most, over tensors
        return max(float((one[name] - other[name]).norm() / other[name].norm()) for name in other)

    if bf16:  # scales are multiplied in another order
        whole = trainer_of(path, "training.bf16=false")
        expand(whole, base)
        in_float32 = gradients(whole)
        assert off(ours, in_float32) < 1.5 * off(theirs, in_float32), "further off than bfloat16 alone"
    else:
        assert off(ours, theirs) < 1e-5
    assert off(exact, theirs) > (0.02 if kind == "int8" else 0.05), "else the base is not quantised"


@every_kind
def test_the_loss_falls_and_a_resumed_run_goes_on_bit_for_bit(tiny, tmp_path, family, kind):
    targets = {"edit_plus": "attention+mlp", "qwen_image_21": "all-linear"}[family]
    lora = {"lora": {"rank": 16, "alpha": 32, "target_modules": targets}}
    training = {"max_steps": 30, "save_steps": 10, "learning_rate": 1e-2}
    path = write_recipe(
        tmp_path, tiny(family), trainable=lora, training=training, loss={"timestep_sampling": "stratified"}
    )
    straight = trainer_of(path, f"memory.quantization={kind}")
    after, fallen = trained(straight), losses(straight)
    assert sum(fallen[-5:]) < 0.8 * sum(fallen[:5])
    for step in (20, 30):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")
    again = trainer_of(path, f"memory.quantization={kind}")
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-10"))
    assert losses(again)[-20:] == fallen[-20:]
    for name, value in adapters(again.model).items():
        assert torch.equal(value, after[name]), name
    with pytest.raises(InputError, match=rf"memory\.quantization was {kind}, is None"):
        trainer_of(path)


COMPILED = pytest.param("adamw_torch_8bit", "int8", marks=pytest.mark.soak)  # a minute


@pytest.mark.parametrize(("optim", "kind"), [("adamw_bnb_8bit", "nf4"), ("adafactor", "fp8"), COMPILED])
def test_optimizers_of_less_state_train_on_it_and_resume_bit_for_bit(tiny, tmp_path, optim, kind):
    training = {"optim": optim, "learning_rate": 1e-2, "max_steps": 12, "save_steps": 6}
    lora = {
        "lora": {"rank": 64, "target_modules": "attention+mlp"}
    }  # bitsandbytes leaves tensors below 4,096 as they are
    path = write_recipe(tmp_path, tiny(), trainable=lora, training=training, memory={"quantization": kind})
    straight = trainer_of(path)
    after = trained(straight)
    state = [one for values in straight.optimizer.state.values() for one in values.values() if torch.is_tensor(one)]
    small = {type(one).__name__ for one in state} | {str(one.dtype) for one in state}
    assert optim == "adafactor" or small & {"torch.uint8", "OptimState8bit"}, small
    assert sum(losses(straight)[-3:]) < sum(losses(straight)[:3])
    shutil.rmtree(tmp_path / "run" / "checkpoint-12")
    again = trainer_of(path)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
    for name, value in adapters(again.model).items():
        assert torch.equal(value, after[name]), name


@every_kind
def test_evaluation_and_images_in_between_change_nothing(tiny, tmp_path, family, kind):
    tasks = {"edit": {"data": "edit.jsonl", "eval_rows": 2}, "text_to_image": {"data": "text_to_image.jsonl"}}
    path = write_recipe(tmp_path, tiny(family), tasks=tasks, extract={"dtype": "float32"})
    plain = trained(trainer_of(path, f"memory.quantization={kind}"))
    other = [f"training.output_dir={tmp_path / 'other'}", "training.eval_strategy=steps", "training.eval_steps=1"]
    other += ["sampling.every=2", "sampling.rows=1", "sampling.num_inference_steps=2"]
    watched = trained(trainer_of(path, f"memory.quantization={kind}", *other))
    assert (tmp_path / "other" / "pictures.png").is_file()
    assert all(torch.equal(value, watched[name]) for name, value in plain.items())


SLOW = [("learner", kind, "inductor") for kind in KINDS] + [("qwen_image_21_learner", "nf4", "aot_eager")]  # minutes


@pytest.mark.parametrize(
    ("learner", "kind", "backend"),
    [("learner", "nf4", "aot_eager"), *(pytest.param(*case, marks=pytest.mark.soak) for case in SLOW)],
)
def test_compiled_blocks_that_are_streamed_train_on_it_as_they_are(tiny, tmp_path, learner, kind, backend):
    training = {"optim": "sgd", "save_strategy": "no"}
    path = write_recipe(tmp_path, tiny(learner), training=training, memory={"quantization": kind})
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    plain = trained(trainer_of(path))
    compiling = ["training.torch_compile=true", f"training.torch_compile_backend={backend}"]
    compiled = trained(trainer_of(path, *compiling, "memory.stream_blocks=3", "memory.offload_activations=true"))
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] > 0
    for name in plain:  # float32 sums in another order
        torch.testing.assert_close(compiled[name], plain[name], atol=1e-5, rtol=0)


@learners
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_that_are_streamed_are_quantised_and_change_nothing(tiny, tmp_path, learner, kind):
    training = {"max_steps": 3}
    path = write_recipe(tmp_path, tiny(learner), training=training, memory={"quantization": kind})
    plain = trained(trainer_of(path))
    elsewhere = ["memory.stream_blocks=3", "memory.offload_activations=true", f"training.output_dir={tmp_path}/other"]
    trainer = trainer_of(path, *elsewhere)
    blocks = base_of(trainer.model).transformer_blocks
    last = [[layer for layer in block.img_mlp.modules() if hasattr(layer, "base_layer")][-1] for block in blocks]
    weights = [layer.base_layer.weight for layer in last]
    assert {type(weight).__name__ for weight in weights} == {CLASSES[kind]}
    assert len(set(map(id, weights))) == 3, "two slots, and the block that is not streamed"
    streamed = trained(trainer)
    assert all(torch.equal(value, streamed[name]) for name, value in plain.items())


@pytest.mark.two_rank
@pytest.mark.parametrize(
    ("family", "kinds"),
    [("edit_plus", KINDS), ("qwen_image_21", ("nf4",)), pytest.param("qwen_image_21", KINDS, marks=pytest.mark.soak)],
)
def test_two_ranks_train_what_one_does(tiny, tmp_path, family, kinds):
    path = write_recipe(tmp_path, tiny(family), training={"adam_epsilon": 1e-3})
    runs = []
    for kind in kinds:
        alone = [f"memory.quantization={kind}", f"training.output_dir={tmp_path / kind}"]
        trainer_of(path, *alone).train()
        both = [alone[0], f"training.output_dir={tmp_path / kind}-2", "training.per_device_train_batch_size=2"]
        runs.append({"recipe": str(path), "overrides": both})
    assert in_ranks(runs, ranks=2, log=tmp_path / "log") == [0, 0], (tmp_path / "log").read_text()
    for kind in kinds:
        one, two = (load_file(tmp_path / name / "checkpoint-4" / LORA_FILE) for name in (kind, f"{kind}-2"))
        for name in one:  # sums of two micro-batches
            torch.testing.assert_close(one[name], two[name], atol=1e-4, rtol=1e-3, msg=f"{kind} {name}")


@every_kind
def test_what_it_leaves_loads_in_the_stock_pipeline_and_merges_into_the_exact_base(tiny, tmp_path, family, kind):
    path = write_recipe(tmp_path, tiny(family), memory={"quantization": kind})
    trainer = trainer_of(path)
    trainer.train()
    run = tmp_path / "run"
    trainer.save_model()
    trainer.save_state()
    shutil.copy(path, run / "recipe.yaml")
    for to in ("lora", "comfyui", "merged"):
        assert export.main([str(run), "--to", to, "--dtype", "float32", "--output", str(tmp_path / to)]) in (None, 0)
    pipeline = DiffusionPipeline.from_pretrained(tiny(family))
    exact = {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}
    pipeline.load_lora_weights(tmp_path / "lora")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    merged = AutoModel.from_pretrained(str(tmp_path / "merged")).state_dict()
    moved = 0
    for name, value in pipeline.transformer.state_dict().items():
        torch.testing.assert_close(merged[name], value, atol=1e-6, rtol=1e-5)
        moved += not torch.equal(value, exact[name])
    assert moved >= {"edit_plus": 20, "qwen_image_21": 14}[family]  # all that have adapters, of 2.1


# --- bad input -------------------------------------------------------------------------------------------------------


def test_packages_that_are_missing_or_old_are_named_before_anything_is_loaded(tiny, tmp_path, monkeypatch):
    path = write_recipe(tmp_path, tiny())
    monkeypatch.setitem(quantization.FLOORS, "bitsandbytes", "99")
    told = r"got nf4: bitsandbytes>=99 is required .* found bitsandbytes==.*; pip install 'torchao>=.*' 'bits.*>=99'"
    with pytest.raises(InputError, match=rf"^memory\.quantization: {told}$"):
        trainer_of(path, "memory.quantization=nf4")
    monkeypatch.setattr(quantization, "PACKAGES", {"fp8": ("nowhere",)})
    monkeypatch.setitem(quantization.FLOORS, "nowhere", "1")
    with pytest.raises(InputError, match=r"got fp8: The 'nowhere>=1' .* was not found .*; pip install 'nowhere>=1'$"):
        trainer_of(path, "memory.quantization=fp8")


def test_float16_is_refused_as_it_overflows(tiny, tmp_path):
    path = write_recipe(tmp_path, tiny(), memory={"quantization": "int8"})
    with pytest.raises(InputError, match=r"memory\.quantization: got \"int8\" with training\.fp16; .* overflow"):
        trainer_of(path, "training.fp16=true")
    recipe = load_recipe(path)
    arguments = training_arguments(recipe, num_rows=1)
    arguments.mixed_precision = "fp16"  # as the launcher sets it
    with pytest.raises(InputError, match=r"memory\.quantization: got int8 with the launcher's fp16; .* overflow"):
        make_model(recipe, arguments)


def test_the_compiler_is_left_as_it_was(tiny, tmp_path):
    import torch._inductor.config as options

    with options.patch(coordinate_descent_tuning=False):
        trainer_of(write_recipe(tmp_path, tiny()), "memory.quantization=fp8")
        assert options.coordinate_descent_tuning is False


def test_a_base_that_is_quantised_already_or_of_other_weights_is_refused(tiny, tmp_path):
    model = shutil.copytree(tiny(), tmp_path / "model")
    path = write_recipe(tmp_path, model, memory={"quantization": "int8"})
    config_path, weights_path = model / "transformer" / "config.json", model / "transformer" / WEIGHTS_FILE
    config, tensors = json.loads(config_path.read_text()), load_file(weights_path)
    config_path.write_text(json.dumps(config | {"quantization_config": {"quant_method": "torchao"}}))
    with pytest.raises(InputError, match=r"memory\.quantization: got int8, but the transformer of .* is quantised"):
        trainer_of(path)
    config_path.write_text(json.dumps(config))
    save_file({name: tensor for name, tensor in tensors.items() if name != "img_in.bias"}, weights_path)
    with pytest.raises(InputError, match=r"model: img_in\.bias is in the transformer alone"):
        trainer_of(path)
    save_file(tensors | {"img_in.bias": torch.zeros(3)}, weights_path)
    with pytest.raises(InputError, match=r"model: img_in\.bias has shape \[3\], expected \[\d+\] by the config"):
        trainer_of(path)
