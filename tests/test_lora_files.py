"""LoRA files of other tools: all of one is taken, to start a run from and to sample with, or it is refused by name."""

import json
from collections.abc import Iterator
from inspect import signature
from pathlib import Path

import diffusers
import pytest
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline, QwenImage21Pipeline, QwenImageEditPlusPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_qie.config.recipe import Lora, Recipe, Task, Trainable
from hf_qie.errors import InputError
from hf_qie.hub.sampler import load_lora
from hf_qie.models.base import Family
from hf_qie.models.lora_files import LORA_FILE, read_lora
from hf_qie.models.qwen_image.family import EDIT_PLUS
from hf_qie.models.qwen_image_21.family import QWEN_IMAGE_21
from hf_qie.training.model import adapters, build_model, save_weights

FAMILIES = {"edit_plus": (EDIT_PLUS, QwenImageEditPlusPipeline), "qwen_image_21": (QWEN_IMAGE_21, QwenImage21Pipeline)}
RANK = 4
LORA = Lora(rank=RANK, alpha=RANK, target_modules="all-linear")
DIFFUSERS = "transformer."


def recipe(model: Path, **changes) -> Recipe:
    lora = Lora(**vars(LORA) | changes)
    tasks = {"edit": Task(name="edit", data=("none.jsonl",))}
    return Recipe(path=Path(), model=str(model), tasks=tasks, trainable=Trainable(lora=lora))


@pytest.fixture(scope="module", params=FAMILIES)
def kind(request) -> str:
    """Of a tiny checkpoint."""
    return request.param


@pytest.fixture(scope="module")
def family(kind) -> Family:
    """Of that checkpoint."""
    return FAMILIES[kind][0]


@pytest.fixture(scope="module")
def base(tiny, kind) -> Path:
    """That checkpoint."""
    return tiny(kind)


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory) -> dict[str, Tensor]:
    """The tensors of a LoRA that does something, as diffusers has them; both halves of a joined layer share one."""
    PartialState(cpu=True)
    model = build_model(recipe(base))
    torch.manual_seed(3)
    parameters = adapters(model)
    for parameter in parameters.values():
        nn.init.normal_(parameter, std=0.1)
    for key, parameter in parameters.items():
        if key.endswith("img_mlp.proj.lora_A.weight"):
            parameter.data.copy_(parameters[key.replace("proj", "gate_layer")])
    folder = tmp_path_factory.mktemp("lora")
    save_weights(model, folder)
    return load_file(folder / LORA_FILE)


@pytest.fixture(scope="module")
def bare_pipeline(base, kind, family) -> DiffusionPipeline:
    """The tiny pipeline's transformer, in a pipeline without anything else."""
    transformer = getattr(diffusers, family.transformer_class).from_pretrained(base, subfolder="transformer")
    parts = signature(FAMILIES[kind][1]).parameters.values()
    absent = {part.name: None for part in parts if part.default is part.empty}
    pipeline = FAMILIES[kind][1].__new__(FAMILIES[kind][1])
    pipeline.register_modules(**absent | {"transformer": transformer})
    return pipeline


@pytest.fixture
def pipeline(bare_pipeline) -> Iterator[DiffusionPipeline]:
    """The same without adapters, of which loading one that is refused leaves some."""
    yield bare_pipeline
    bare_pipeline.unload_lora_weights()


def halves(key: str) -> str:
    return key.replace("lora_A", "lora_down").replace("lora_B", "lora_up")


def with_alpha(tensors: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    layers = {key.partition(".lora_")[0] for key in tensors}
    return tensors | {f"{layer}.alpha": torch.tensor(alpha) for layer in layers}


def flat(prefix: str, key: str) -> str:
    layer, dot, rest = halves(key.removeprefix(DIFFUSERS)).partition(".lora_")
    return prefix + layer.replace(".", "_") + dot + rest


LAYOUTS = {  # of a tool: its key for diffusers'
    "diffusers": lambda key: key,
    "bare": lambda key: key.removeprefix(DIFFUSERS),
    "peft": lambda key: key.replace(DIFFUSERS, "base_model.model.", 1),
    "peft of a pipeline": lambda key: f"base_model.model.{key}",
    "an adapter by name": lambda key: key.removeprefix(DIFFUSERS).replace(".weight", ".default.weight"),
    "ComfyUI": lambda key: key.replace(DIFFUSERS, "diffusion_model.", 1),
    "of a whole checkpoint": lambda key: key.replace(DIFFUSERS, "model.diffusion_model.", 1),
    "OneTrainer": halves,
    "OneTrainer, flat": lambda key: flat("lora_transformer_", key),
    "kohya": lambda key: flat("lora_unet_", key),
    "lycoris": lambda key: flat("lycoris_", key),
    "without .weight": lambda key: halves(key.removeprefix(DIFFUSERS)).removesuffix(".weight"),
    "diffusers' under ComfyUI's prefix": lambda key: f"diffusion_model.{key}",
}
ALPHAS = {"OneTrainer": 2.0, "OneTrainer, flat": 4.0, "kohya": 4.0, "lycoris": 4.0, "ComfyUI": 8.0}


def write_layout(trained: dict[str, Tensor], layout: str, folder: Path) -> Path:
    tensors = {LAYOUTS[layout](key): tensor for key, tensor in trained.items()}
    if layout in ALPHAS:
        tensors = with_alpha(tensors, ALPHAS[layout])
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": RANK, "use_rslora": False}))
    return folder / "adapter_model.safetensors"


def check_start(base: Path, source: Path, trained: dict[str, Tensor], scale: float) -> None:
    """A run that starts from `source` has `trained`, with a scale in one half."""
    started = adapters(build_model(recipe(base, init_from=str(source))))
    assert started.keys() == trained.keys()
    for key, parameter in started.items():
        torch.testing.assert_close(parameter.detach(), trained[key] * (scale if "lora_A" in key else 1))


def check_sampling(pipeline: DiffusionPipeline, source: Path, family: Family, trained: dict[str, Tensor]) -> None:
    """A pipeline that samples with `source` has every tensor of `trained`."""
    load_lora(pipeline, source, family)
    named = dict(pipeline.transformer.named_parameters())
    loaded = {key.replace(".default_0.", "."): tensor for key, tensor in named.items() if ".lora_" in key}
    assert {DIFFUSERS + key for key in loaded} == trained.keys()
    for key, tensor in loaded.items():
        assert "lora_A" in key or torch.equal(tensor, trained[DIFFUSERS + key])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_starts_from_every_tensor_of_a_file_in_any_layout(trained, base, tmp_path, layout):
    path = write_layout(trained, layout, tmp_path)
    for source in (path, tmp_path):
        check_start(base, source, trained, ALPHAS.get(layout, RANK) / RANK)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sampling_takes_every_tensor_of_a_file_in_any_layout(trained, pipeline, family, tmp_path, layout):
    check_sampling(pipeline, write_layout(trained, layout, tmp_path), family, trained)


@pytest.mark.parametrize("kind", ["qwen_image_21"], indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layer_that_comfyui_joins_is_taken_apart(trained, base, pipeline, family, tmp_path, layout):
    joined = {}
    for key, tensor in trained.items():  # its rows are the gate's, then those of the other
        if ".gate_layer." in key:
            other = trained[key.replace("gate_layer", "proj")]
            assert "lora_B" in key or torch.equal(tensor, other)
            joined[key.replace("gate_layer", "gate_up")] = tensor if "lora_A" in key else torch.cat([tensor, other])
        elif ".img_mlp.proj." not in key:
            joined[key] = tensor
    assert len(joined) < len(trained)
    path = write_layout(joined, layout, tmp_path)
    check_start(base, path, trained, ALPHAS.get(layout, RANK) / RANK)
    check_sampling(pipeline, path, family, trained)


@pytest.mark.parametrize("kind", ["qwen_image_21"], indirect=True)
def test_a_layer_that_is_there_alone_and_joined_is_refused(trained, family, tmp_path):
    key = next(key for key in trained if ".gate_layer." in key and "lora_B" in key)
    up, down = trained[key], trained[key.replace("lora_B", "lora_A")]
    twice = {key.replace("gate_layer", "gate_up"): torch.cat([up, up])}
    twice[key.replace("gate_layer", "gate_up").replace("lora_B", "lora_A")] = down.clone()
    tensors = {LAYOUTS["ComfyUI"](key): tensor for key, tensor in (trained | twice).items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(InputError, match="here: two of its names are of one layer"):
        read_lora(tmp_path / "lora.safetensors", where="here", convert=family.convert_lora)


def test_an_alpha_without_an_adapter_is_refused(trained, family, tmp_path):
    for layout in ("ComfyUI", "kohya"):
        tensors = {LAYOUTS[layout](key): tensor for key, tensor in trained.items()}
        save_file(tensors | {"lora_unet_gone.alpha": torch.tensor(1.0)}, tmp_path / "lora.safetensors")
        with pytest.raises(InputError, match="here: there is an alpha of lora_unet_gone, but no adapter"):
            read_lora(tmp_path / "lora.safetensors", where="here", convert=family.convert_lora)


def test_metadata_that_is_no_mapping_is_refused(trained, family, tmp_path):
    save_file(trained, tmp_path / "lora.safetensors", metadata={"lora_adapter_metadata": "[1]"})
    with pytest.raises(InputError, match="lora_adapter_metadata in its header is not a mapping"):
        read_lora(tmp_path / "lora.safetensors", where="here", convert=family.convert_lora)


def test_two_names_of_one_layer_are_refused(trained, family, tmp_path):
    for added in ("lora_A", "lora_B"):
        key = next(key for key in trained if added in key)
        bare = {LAYOUTS["bare"](key): torch.ones_like(trained[key])}
        save_file(
            {LAYOUTS["ComfyUI"](key): tensor for key, tensor in trained.items()} | bare, tmp_path / "lora.safetensors"
        )
        with pytest.raises(InputError, match="here: two of its names are of one layer"):
            read_lora(tmp_path / "lora.safetensors", where="here", convert=family.convert_lora)


LAYER = "transformer_blocks.0.attn.to_q"
FOREIGN = (  # beside the keys of a LoRA
    f"transformer.{LAYER}.dora_scale",
    f"base_model.model.{LAYER}.lora_magnitude_vector.weight",
    f"diffusion_model.{LAYER}.lokr_w1",
    f"lycoris_{LAYER.replace('.', '_')}.hada_w1_a",
    f"diffusion_model.{LAYER}.diff",
    f"transformer.{LAYER}.lora_B.bias",
    "transformer.norm_out.weight",
)


@pytest.mark.parametrize("key", FOREIGN)
def test_keys_that_a_loader_would_leave_out_are_refused_by_name(trained, base, pipeline, family, tmp_path, key):
    path = tmp_path / "lora.safetensors"
    save_file(trained | {key: torch.zeros(2)}, path)
    with pytest.raises(InputError) as error:
        build_model(recipe(base, init_from=str(path)))
    message = f"{path} is not a plain LoRA: 1 of its {len(trained) + 1} keys would be left out: {key}; expected"
    assert f"trainable.lora: {message}" in str(error.value)
    with pytest.raises(InputError) as error:
        load_lora(pipeline, path, family)
    assert f"--checkpoint: {message}" in str(error.value)


def test_half_an_adapter_is_refused(trained, family, tmp_path):
    one = min(key for key in trained if "lora_B" in key)
    for layout in ("bare", "kohya"):
        tensors = {LAYOUTS[layout](key): tensor for key, tensor in trained.items() if key != one}
        save_file(tensors, tmp_path / "lora.safetensors")
        with pytest.raises(InputError, match="half of an adapter is missing"):
            read_lora(tmp_path / "lora.safetensors", where="here", convert=family.convert_lora)


def test_a_start_that_is_not_there_is_named(base, tmp_path):
    message = f"^trainable.lora: {tmp_path / 'gone'} is neither a file or folder here nor the id of a repository"
    with pytest.raises(InputError, match=message):
        build_model(recipe(base, init_from=str(tmp_path / "gone")))


def test_a_text_encoders_part_is_refused(trained, base, pipeline, family, tmp_path):
    text = {"text_encoder.layers.0.q_proj.lora_A.weight": torch.zeros(RANK, 8)}
    text |= {"text_encoder.layers.0.q_proj.lora_B.weight": torch.zeros(8, RANK)}
    save_file(trained | text, tmp_path / "lora.safetensors")
    with pytest.raises(InputError, match=r"has adapters on text_encoder\.layers\.0\.q_proj, which the model lacks"):
        build_model(recipe(base, init_from=str(tmp_path / "lora.safetensors")))
    found = f"of its {len(trained) + 2} tensors diffusers has loaded {len(trained)}|does not load as a LoRA"
    with pytest.raises(InputError, match=found):
        load_lora(pipeline, tmp_path / "lora.safetensors", family)


def test_pefts_alpha_is_that_of_its_config_and_without_one_nobody_guesses(trained, base, tmp_path):
    path = write_layout(trained, "peft", tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"r": RANK, "lora_alpha": 16}))
    with pytest.raises(InputError, match=r"has alpha 16, the recipe 4; set trainable\.lora\.alpha: 16"):
        build_model(recipe(base, init_from=str(path)))
    config.write_text(json.dumps({"r": RANK, "lora_alpha": RANK, "use_rslora": True}))
    with pytest.raises(InputError, match=r"was trained with use_rslora, which trainable\.lora does not have"):
        build_model(recipe(base, init_from=str(path)))
    config.unlink()
    with pytest.raises(InputError, match=r"has peft's layout, which keeps alpha in adapter_config\.json beside it"):
        build_model(recipe(base, init_from=str(path)))
