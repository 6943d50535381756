"""What a run takes is known before a weight is read."""

import json
import logging

import pytest
from accelerate import PartialState
from diffusers import QwenImage21Transformer2DModel, QwenImageTransformer2DModel
from embedding_sets import write_recipe
from released import NUM_PARAMETERS, write_released

from hf_qie.config.recipe import load_recipe
from hf_qie.errors import InputError
from hf_qie.training.cost import Footprint
from hf_qie.training.model import build_model
from hf_qie.training.setup import make_model, training_arguments

RANK = 32
HIDDEN, MLP = 3072, 4 * 3072


@pytest.fixture(autouse=True)
def one_process():
    PartialState(cpu=True)


def released(tmp_path, **sections):
    """A recipe over a checkpoint of the released shape, of which there is nothing but the config."""
    write_released(tmp_path / "model")
    tasks = {"edit": {"embeddings": "nowhere"}}
    recipe = {"model": str(tmp_path / "model"), "tasks": tasks, **sections}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    return load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    ("preset", "num_layers", "num_trained"),
    [
        # queries, keys and values of both streams and both outputs, all of them square
        ("attention", 480, 480 * 2 * RANK * HIDDEN),
        ("attention+mlp", 720, 480 * 2 * RANK * HIDDEN + 240 * RANK * (HIDDEN + MLP)),
    ],
)
def test_of_the_released_checkpoint_a_lora_trains_what_its_preset_says(tmp_path, preset, num_layers, num_trained):
    recipe = released(tmp_path, trainable={"lora": {"rank": RANK, "target_modules": preset}})
    found = Footprint(build_model(recipe, mixed_precision="bf16", empty=True), optimizer="adamw_torch", num_shards=1)
    # the last block's output of the text stream, and its MLP, get no gradient
    unused = 2 * RANK * HIDDEN + ("mlp" in preset) * 2 * RANK * (HIDDEN + MLP)
    assert (found.num_lora_layers, found.num_trained) == (num_layers, num_trained - unused)
    assert found.num_parameters == NUM_PARAMETERS + num_trained
    assert found.weight_bytes == 2 * NUM_PARAMETERS + 4 * num_trained
    assert (found.gradient_bytes, found.state_bytes) == (4 * found.num_trained, 8 * found.num_trained)


def test_sharded_full_fine_tuning_takes_sixteen_bytes_a_parameter_over_the_devices(tmp_path):
    model = build_model(released(tmp_path), empty=True)
    found = Footprint(model, optimizer="adamw_torch", num_shards=8)
    assert found.num_parameters == NUM_PARAMETERS
    averaged = Footprint(model, optimizer="adamw_torch", num_shards=8, averaged=True)
    assert averaged.average_bytes == found.gradient_bytes
    assert f"GB of optimizer state, {found.gradient_bytes / 1e9:.1f} GB of averages; " in str(averaged)
    total = found.weight_bytes + found.gradient_bytes + found.state_bytes
    assert total == pytest.approx(16 * NUM_PARAMETERS / 8, rel=0.01)  # but for the last block's frozen tensors


def test_of_four_blocks_that_train_the_frozen_rest_takes_two_bytes_a_parameter(tmp_path):
    blocks = [f"transformer_blocks.{i}" for i in range(56, 60)]
    recipe = released(tmp_path, trainable={"modules": blocks})
    found = Footprint(build_model(recipe, mixed_precision="bf16", empty=True), optimizer="adamw_torch", num_shards=1)
    assert found.weight_bytes == 2 * NUM_PARAMETERS + 2 * found.num_trained
    total_gb = (found.weight_bytes + found.gradient_bytes + found.state_bytes) / 1e9
    assert total_gb == pytest.approx(58.7, abs=0.05)  # with 3.6 GB of activations it fits 80


def test_it_is_said_before_a_weight_is_read(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="hf_qie")
    recipe = released(tmp_path, trainable={"lora": {}}, training={"use_cpu": True, "optim": "sgd"})
    with pytest.raises(InputError, match="cannot load the transformer"):
        make_model(recipe, training_arguments(recipe, num_rows=1))
    assert (
        "20,524,772,928 parameters, of which 94,175,232 train (LoRA on 480 linear layers); estimated per device: "
        "82.1 GB of weights, 0.4 GB of gradients, 0.0 GB of optimizer state; activations come on top"
    ) in caplog.text


@pytest.mark.parametrize(
    "trainable", [{}, {"modules": ["attn"]}, {"lora": {"rank": 4, "target_modules": "all-linear"}}]
)
@pytest.mark.parametrize("family", ["edit_plus", "qwen_image_21"])
def test_on_paper_is_as_loaded(tiny, tmp_path, family, trainable):
    recipe = load_recipe(write_recipe(tmp_path, tiny(family), trainable=trainable))
    on_paper, loaded = (
        build_model(recipe, mixed_precision="bf16", empty=True),
        build_model(recipe, mixed_precision="bf16"),
    )
    how = {"optimizer": "adafactor", "num_shards": 2}
    assert vars(Footprint(on_paper, **how)) == vars(Footprint(loaded, **how))
    storages = {parameter.untyped_storage().data_ptr(): parameter for parameter in loaded.parameters()}.values()
    assert sum(p.untyped_storage().nbytes() for p in storages) / 2 == Footprint(loaded, **how).weight_bytes
    assert {parameter.device.type for parameter in on_paper.parameters()} == {"meta"}
    classes = {"edit_plus": QwenImageTransformer2DModel, "qwen_image_21": QwenImage21Transformer2DModel}
    assert isinstance(loaded.get_base_model() if "lora" in trainable else loaded, classes[family])


def test_an_optimizer_that_is_not_known_is_not_guessed_at(tiny, tmp_path):
    recipe = load_recipe(write_recipe(tmp_path, tiny()))
    found = Footprint(build_model(recipe, empty=True), optimizer="stable_adamw", num_shards=1)
    assert found.state_bytes is None
    assert "an unknown amount of optimizer state" in str(found)
