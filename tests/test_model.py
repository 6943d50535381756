"""What trains, what the model is asked, and what lies on disk afterwards is what diffusers would have it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from diffusers import AutoModel, DiffusionPipeline, QwenImageTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import nn

from hf_qie.config.recipe import Lora, Recipe, Task, Trainable
from hf_qie.data.collate import Batch
from hf_qie.errors import InputError
from hf_qie.models.base import Family, read_family
from hf_qie.models.lora_files import LORA_FILE
from hf_qie.models.qwen_image.transformer import LORA_PRESETS, predict
from hf_qie.training.model import (
    adapters,
    base_of,
    build_model,
    lora_targets,
    low_lr_parameters,
    parameters,
    save_weights,
)
from hf_qie.training.precision import compute_in

LORA = Lora(rank=4, alpha=8, target_modules="all-linear")
NUM_LINEAR = {"edit_plus": 34, "qwen_image_21": 22}
both_families = pytest.mark.parametrize("kind", NUM_LINEAR)
full_and_lora = pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])


@pytest.fixture(autouse=True)
def one_process():
    PartialState(cpu=True)


def recipe(model: Path, seed: int = 0, **trainable) -> Recipe:
    task = Task(name="edit", data=("none.jsonl",))
    return Recipe(path=Path(), model=str(model), seed=seed, tasks={"edit": task}, trainable=Trainable(**trainable))


def family_of(model: Path) -> Family:
    return read_family(str(model))


def stock(model: Path, **options) -> nn.Module:
    """The transformer as diffusers loads it."""
    return AutoModel.from_pretrained(str(model), subfolder="transformer", **options)


def batch(lengths=(9, 9), grids=((4, 6), (2, 4), (4, 4))) -> Batch:
    """Rows of random states and latents; `grids` are the target's, then each source's, behind 3 states."""
    random = torch.Generator().manual_seed(0)
    num_rows, mask = len(lengths), torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    target, *sources = (height * width for height, width in grids)
    return Batch(
        target_latents=torch.randn(num_rows, target, 64, generator=random).half(),
        source_latents=torch.randn(num_rows, sum(sources), 64, generator=random).half(),
        prompt_embeds=torch.randn(*mask.shape, 96, generator=random).half() * mask[..., None],
        prompt_lengths=list(lengths),
        image_slots=[[3 * n + 2 for n in range(len(sources))]] * num_rows,
        grids=list(grids),
        task=["edit"] * num_rows,
        row=list(range(num_rows)),
        draw=list(range(num_rows)),
    )


def some_loss(family: Family, model: nn.Module) -> torch.Tensor:
    given = batch()
    sigma = torch.tensor([0.25, 0.75])  # as bfloat16 has them: of another one a model of random values sees another
    return family.predict(model, given, given["target_latents"], sigma).square().mean()


@pytest.mark.parametrize("kind", ["edit_plus", "edit_plus_2511"])
@pytest.mark.parametrize("grids", [((4, 6), (2, 4), (4, 4)), ((4, 6),)], ids=["two sources", "text to image"])
def test_a_prediction_is_what_the_pipeline_asks_of_the_transformer(tiny, kind, grids):
    plain = QwenImageTransformer2DModel.from_pretrained(tiny(kind), subfolder="transformer")
    given, sigma = batch(grids=grids), torch.tensor([0.25, 0.7])
    with torch.no_grad():
        found = predict(build_model(recipe(tiny(kind))), given, given["target_latents"], sigma)
        wanted = plain(
            hidden_states=torch.cat([given["target_latents"], given["source_latents"]], dim=1).float(),
            encoder_hidden_states=given["prompt_embeds"].float(),
            encoder_hidden_states_mask=None,
            timestep=sigma,
            img_shapes=[[(1, h, w) for h, w in grids]] * 2,
        ).sample[:, :24]
    assert torch.equal(found, wanted)


def test_sources_of_a_2511_checkpoint_are_told_that_they_are_clean(tiny):
    """Its config alone (zero_cond_t) makes the block see two time embeddings a row: at its sigma, and at 0."""
    embeddings = {}
    for kind in ("edit_plus", "edit_plus_2511"):
        model, given = build_model(recipe(tiny(kind))), batch()
        model.transformer_blocks[0].img_mod.register_forward_pre_hook(
            lambda _, args, kind=kind: embeddings.update({kind: args[0]})
        )
        with torch.no_grad():
            predict(model, given, given["target_latents"], torch.tensor([0.25, 0.7]))
    assert len(embeddings["edit_plus"]) == 2
    first, second, *clean = embeddings["edit_plus_2511"]
    assert torch.equal(*clean)
    assert not torch.equal(first, second)


def test_a_padded_batch_predicts_what_its_rows_do_alone(tiny):
    model = build_model(recipe(tiny()))
    given, sigma = batch(lengths=(9, 5, 12)), torch.tensor([0.1, 0.5, 0.9])
    with torch.no_grad():
        together = predict(model, given, given["target_latents"], sigma)
        for i, length in enumerate((9, 5, 12)):
            alone = {
                key: value[i : i + 1] if isinstance(value, torch.Tensor) else value for key, value in given.items()
            }
            alone |= {"prompt_embeds": alone["prompt_embeds"][:, :length], "prompt_lengths": [length]}
            single = predict(model, alone, alone["target_latents"], sigma[i : i + 1])
            # float32 attention over another length adds up in another order
            torch.testing.assert_close(together[i : i + 1], single, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "numbers"), [("edit_plus", (16, 24, 34)), ("qwen_image_21", (8, 14, 22))])
def test_the_preset_all_linear_is_every_linear_layer(tiny, kind, numbers):
    """Of attention there are 8 in each of 2 blocks, and 4 for Qwen-Image-2.1."""
    transformer, presets = stock(tiny(kind)), family_of(tiny(kind)).lora_presets
    every = sorted(name for name, module in transformer.named_modules() if isinstance(module, nn.Linear))
    assert lora_targets(transformer, "all-linear", presets) == every
    counts = {preset: len(lora_targets(transformer, preset, presets)) for preset in presets}
    assert counts == dict(zip(("attention", "attention+mlp", "all-linear"), numbers, strict=True))


def test_a_list_of_names_takes_whole_parts_of_names(tiny):
    transformer = QwenImageTransformer2DModel.from_pretrained(tiny(), subfolder="transformer")
    assert lora_targets(transformer, ("transformer_blocks.1.attn.to_q", "img_in"), LORA_PRESETS) == [
        "img_in",
        "transformer_blocks.1.attn.to_q",
    ]
    assert lora_targets(transformer, ("to_q",), LORA_PRESETS) == [f"transformer_blocks.{i}.attn.to_q" for i in (0, 1)]


@pytest.mark.parametrize(
    ("trainable", "message"),
    [
        (
            {"lora": Lora(target_modules=("to_q", "_k"))},
            "trainable.lora.target_modules: '_k' is not the end of any",
        ),
        ({"modules": ("img_mlp", "transformer_block")}, "trainable.modules: 'transformer_block' matches no parameter"),
        ({"low_lr_modules": ("mlp",)}, "trainable.low_lr_modules: 'mlp' matches no parameter that could train"),
        (
            {"modules": ("img_in",), "low_lr_modules": ("img_mlp",)},
            "trainable.low_lr_modules: 'img_mlp' matches no parameter that could train",
        ),
        ({"modules": ("transformer_blocks.1.txt_mlp",)}, "trainable: nothing trains"),
    ],
)
def test_a_name_that_matches_nothing_is_refused_by_name(tiny, trainable, message):
    with pytest.raises(InputError) as error:
        build_model(recipe(tiny(), **trainable))
    assert message in str(error.value)


def test_a_checkpoint_that_is_not_there_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"model_index\.json does not exist"):
        build_model(recipe(tmp_path))


@full_and_lora
@pytest.mark.parametrize(("kind", "count"), [("edit_plus", 6), ("edit_plus_2511", 6), ("qwen_image_21", 0)])
def test_all_that_trains_gets_a_gradient_and_nothing_else_would(tiny, kind, count, lora):
    """Some tensors are frozen by name; freed again, no gradient reaches them, while it reaches all others."""
    model = build_model(recipe(tiny(kind), lora=lora))
    frozen = [name for name, p in parameters(model).items() if not p.requires_grad and (".lora_" in name or not lora)]
    assert len(frozen) == count
    for name in frozen:
        parameters(model)[name].requires_grad_(True)
    some_loss(family_of(tiny(kind)), model).backward()
    assert [n for n, p in parameters(model).items() if p.requires_grad and p.grad is None] == frozen
    given = [n for n, p in parameters(model).items() if p.requires_grad and n not in frozen and ".lora_A" not in n]
    zero = [name for name in given if not parameters(model)[name].grad.any()]
    unread = "transformer_blocks.1.attn.add_q_proj", "transformer_blocks.1.attn.norm_added_q"  # of the last text
    assert all(name.startswith(unread) for name in zero)
    assert bool(zero) == bool(count)


@both_families
def test_only_named_modules_train(tiny, kind):
    model = build_model(recipe(tiny(kind), modules=("img_mlp", "transformer_blocks.0.attn", "proj_out")))
    trained = {name for name, p in parameters(model).items() if p.requires_grad}
    assert trained == {
        name
        for name in parameters(model)
        if ".img_mlp." in name or name.startswith(("transformer_blocks.0.attn.", "proj_out."))
    }


@both_families
@full_and_lora
def test_low_rate_modules_are_found_under_any_wrapper(tiny, kind, lora):
    model = build_model(recipe(tiny(kind), lora=lora, low_lr_modules=("transformer_blocks.0.attn", "img_in")))
    low = {id(p) for p in low_lr_parameters(model, ("transformer_blocks.0.attn", "img_in"))}
    names = {name for name, p in parameters(model).items() if id(p) in low}
    expected = [n for n in parameters(model) if n.startswith(("transformer_blocks.0.attn.", "img_in."))]
    assert names == {name for name in expected if not lora or ".lora_" in name}


@both_families
def test_adapters_start_the_same_in_every_process_and_by_the_seed(tiny, kind):
    torch.manual_seed(1)
    one = {name: p.clone() for name, p in adapters(build_model(recipe(tiny(kind), lora=LORA))).items()}
    torch.manual_seed(2)
    again = adapters(build_model(recipe(tiny(kind), lora=LORA)))
    other = adapters(build_model(recipe(tiny(kind), seed=1, lora=LORA)))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if name.endswith("lora_A.weight"))


@both_families
@full_and_lora
def test_an_empty_model_is_the_loaded_one_but_for_its_values(tiny, kind, tmp_path, lora):
    """Built without weights on the disk."""
    shutil.copytree(
        tiny(kind) / "transformer", tmp_path / "transformer", ignore=shutil.ignore_patterns("*.safetensors")
    )
    shutil.copy(tiny(kind) / "model_index.json", tmp_path)
    empty = build_model(recipe(tmp_path, lora=lora), mixed_precision="bf16", empty=True)
    loaded = build_model(recipe(tiny(kind), lora=lora), mixed_precision="bf16")

    def facts(model: nn.Module) -> dict:
        return {n: (p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()}

    assert facts(empty) == facts(loaded)
    assert {p.device.type for p in empty.parameters()} == {"meta"}


PART = {"modules": ("transformer_blocks.0",)}


@both_families
@pytest.mark.parametrize("trainable", [{}, PART, {"lora": LORA}], ids=["full", "part", "lora"])
def test_what_trains_is_float32_and_what_is_frozen_follows_mixed_precision(tiny, kind, trainable):
    mixed = build_model(recipe(tiny(kind), **trainable), mixed_precision="bf16")
    dtypes = {(parameter.requires_grad, parameter.dtype) for parameter in mixed.parameters()}
    if kind == "edit_plus" and "lora" in trainable:  # two adapters on the last block's text output get no gradient
        dtypes.remove((False, torch.float32))
    # without a setting, the older family has weights without gradient, and Qwen-Image-2.1 none
    frozen = set() if kind == "qwen_image_21" and not trainable else {(False, torch.bfloat16)}
    assert dtypes == {(True, torch.float32)} | frozen
    unmixed = build_model(recipe(tiny(kind), **trainable))
    assert {parameter.dtype for parameter in unmixed.parameters()} == {torch.float32}


@both_families
def test_what_trains_keeps_every_bit_of_the_checkpoint_and_what_is_frozen_is_what_the_pipeline_has(tiny, kind):
    exact, rounded = (
        dict(stock(tiny(kind), dtype=dtype).named_parameters()) for dtype in (torch.float32, torch.bfloat16)
    )
    for name, parameter in build_model(recipe(tiny(kind), **PART), mixed_precision="bf16").named_parameters():
        assert torch.equal(parameter, (exact if parameter.requires_grad else rounded)[name]), name


@both_families
def test_frozen_blocks_in_bfloat16_change_loss_and_gradients_by_its_rounding_alone(tiny, kind):
    found = []
    for precision in ("no", "bf16"):
        model = build_model(recipe(tiny(kind), **PART), mixed_precision=precision)
        compute_in(model, precision)
        loss = some_loss(family_of(tiny(kind)), model.train())
        loss.backward()
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])))
    (whole, gradient), (mixed, other) = found
    assert mixed == pytest.approx(whole, rel=2**-7)  # bfloat16 keeps 8 bits
    assert torch.cosine_similarity(gradient, other, dim=0) > 0.997  # autocast: 0.9979, for values this sharp


@both_families
@full_and_lora
def test_checkpointed_activations_give_the_same_gradients(tiny, kind, lora):
    gradients = []
    for checkpointed in (False, True):
        model = build_model(recipe(tiny(kind), lora=lora))
        if checkpointed:
            base_of(model).enable_gradient_checkpointing()
            assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        some_loss(family_of(tiny(kind)), model.train()).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))


def trained_lora(model_folder: Path, lora: Lora = LORA) -> nn.Module:
    """Adapters that do something: the B halves start at zero."""
    model = build_model(recipe(model_folder, lora=lora))
    torch.manual_seed(3)
    for parameter in adapters(model).values():
        nn.init.normal_(parameter, std=0.1)
    return model


@both_families
def test_a_lora_file_gives_the_official_pipeline_the_trained_output(tiny, tmp_path, kind):
    """Asked as training asks it: our forward of Qwen-Image-2.1 is held to diffusers' in tests/test_packed.py."""
    model, given, family = trained_lora(tiny(kind)), batch(), family_of(tiny(kind))
    save_weights(model, tmp_path)
    transformer = family.load_transformer(str(tiny(kind)), revision=None, dtype=torch.float32)
    pipeline = DiffusionPipeline.from_pretrained(tiny(kind), transformer=transformer)
    assert type(pipeline).__name__ == family.pipeline
    sigma = torch.tensor([0.3, 0.8])
    with torch.no_grad():
        base = family.predict(pipeline.transformer, given, given["target_latents"], sigma)
        pipeline.load_lora_weights(tmp_path)
        loaded = family.predict(pipeline.transformer, given, given["target_latents"], sigma)
        trained = family.predict(model.eval(), given, given["target_latents"], sigma)
    assert torch.equal(loaded, trained)
    assert (loaded - base).abs().max() > 0.1


@both_families
def test_a_lora_file_holds_adapters_alone_under_their_pipeline_keys(tiny, kind, tmp_path):
    model = trained_lora(tiny(kind))
    save_weights(model, tmp_path)
    tensors = load_file(tmp_path / LORA_FILE)
    assert all(key.startswith("transformer.") and ".lora_" in key for key in tensors)
    assert len(tensors) == 2 * NUM_LINEAR[kind]
    assert [path.name for path in tmp_path.iterdir()] == [LORA_FILE]


@both_families
def test_full_weights_load_in_diffusers_bit_for_bit(tiny, kind, tmp_path):
    model = build_model(recipe(tiny(kind)))
    for parameter in model.parameters():
        parameter.data += 0.01
    save_weights(model, tmp_path)
    loaded, own = stock(tmp_path), dict(model.named_parameters())
    assert family_of(tiny(kind)).widths(loaded.config) == (64, 96)
    assert loaded.state_dict().keys() == own.keys()
    assert all(torch.equal(own[name], tensor) for name, tensor in loaded.named_parameters())


@pytest.mark.parametrize("tool", ["diffusers", "ComfyUI"])
@both_families
def test_a_run_starts_from_the_weights_of_a_lora(tiny, tmp_path, kind, tool):
    lora = Lora(rank=4, alpha=4, target_modules="attention")
    model = trained_lora(tiny(kind), lora)
    save_weights(model, tmp_path)
    prefix = "transformer." if tool == "diffusers" else family_of(tiny(kind)).comfyui_prefix
    tensors = {key.replace("transformer.", prefix, 1): t for key, t in load_file(tmp_path / LORA_FILE).items()}
    save_file(tensors, tmp_path / "other.safetensors", metadata={"format": "pt"})
    for source in ("other.safetensors", LORA_FILE, "."):
        started = build_model(recipe(tiny(kind), lora=Lora(**vars(lora) | {"init_from": str(tmp_path / source)})))
        assert all(torch.equal(p, adapters(started)[key]) for key, p in adapters(model).items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 8}, "is not a LoRA of rank 8"),
        ({"target_modules": "attention"}, "36 tensors differ"),
        ({"alpha": 4.0}, "has alpha 8, the recipe 4; set trainable.lora.alpha: 8"),
        ({"init_from": "nowhere"}, "nowhere does not load as a LoRA"),
    ],
)
def test_a_lora_that_does_not_fit_the_recipe_is_refused(tiny, tmp_path, change, message):
    save_weights(trained_lora(tiny()), tmp_path)
    with pytest.raises(InputError) as error:
        build_model(recipe(tiny(), lora=Lora(**vars(LORA) | {"init_from": str(tmp_path)} | change)))
    assert message in str(error.value)


@both_families
def test_the_config_answers_what_reporters_ask(tiny, kind):
    model = build_model(recipe(tiny(kind), lora=LORA))
    assert json.loads(model.config.to_json_string())["num_layers"] == model.config.to_dict()["num_layers"] == 2
