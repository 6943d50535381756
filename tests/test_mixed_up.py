"""Checkpoints, sets and LoRAs that are put together from parts of different models, found before a model is loaded."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from datasets import load_from_disk
from small_recipes import few_edits, write_recipe
from transformers import PreTrainedModel

from hf_qie import check, extract
from hf_qie.config.recipe import load_recipe
from hf_qie.errors import InputError
from hf_qie.training.model import build_model, save_weights
from hf_qie.training.sets import open_sets

KINDS = ["edit_plus", "qwen_image_21"]
OTHER = dict(zip(KINDS, reversed(KINDS), strict=True))
both_families = pytest.mark.parametrize("kind", KINDS)
LORA = {"lora": {"rank": 4, "alpha": 4, "target_modules": "attention+mlp"}}


@pytest.fixture
def prepared(tiny, edits, tmp_path):
    """`prepared(kind)` -> a recipe of one task on a copy of that checkpoint."""

    def prepare(kind: str) -> Path:
        shutil.copytree(tiny(kind), tmp_path / "model")
        return write_recipe(tmp_path, tmp_path / "model", few_edits(edits, edit=2))

    return prepare


def without_processor(model: Path, other: Path) -> None:
    shutil.rmtree(model / "processor")


def without_vae_weights(model: Path, other: Path) -> None:
    (model / "vae" / "diffusion_pytorch_model.safetensors").unlink()


def without_a_shard(model: Path, other: Path) -> None:
    weights = model / "text_encoder" / "model.safetensors"
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    weights.rename(weights.with_name(shards[0]))
    index = {"weight_map": dict(zip("ab", shards, strict=True))}
    weights.with_name("model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def with_transformer_of_another_width(model: Path, other: Path) -> None:
    path = model / "transformer" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    key = "context_in_dim" if "context_in_dim" in config else "joint_attention_dim"
    path.write_text(json.dumps(config | {key: 128}), encoding="utf-8")


def with_transformer_of_another_family(model: Path, other: Path) -> None:
    shutil.rmtree(model / "transformer")
    shutil.copytree(other / "transformer", model / "transformer")


@both_families
@pytest.mark.parametrize(
    ("damage", "told", "checks"),
    [
        (without_processor, "model: cannot load the processor of ", True),
        (without_vae_weights, "vae lacks its weights, a .safetensors file; fetch the checkpoint again", False),
        (without_a_shard, "text_encoder lacks model-00002-of-00002.safetensors; fetch the checkpoint again", False),
        (
            with_transformer_of_another_width,
            "makes embeddings of width 96, its transformer takes 128; take both",
            True,
        ),
        (with_transformer_of_another_family, "take both from one checkpoint", True),
    ],
)
def test_extraction_refuses_a_checkpoint_whose_parts_do_not_fit(
    prepared, tiny, monkeypatch, kind, damage, told, checks
):
    recipe = prepared(kind)
    damage(recipe.parent / "model", tiny(OTHER[kind]))
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    for main in (extract.main, *([check.main] if checks else [])):
        with pytest.raises(InputError) as error:
            main([str(recipe)])
        assert told in str(error.value)


def test_extraction_asks_for_no_weights_that_it_does_not_load(prepared):
    recipe = prepared("qwen_image_21")
    model = recipe.parent / "model"
    without_vae_weights(model, model)
    (model / "processor" / "config.json").write_text("{}", encoding="utf-8")
    assert extract.main([str(recipe), "extract.latents=false"]) == 0


def test_a_processor_without_its_vocabulary_is_refused(prepared):
    """transformers makes one of the special tokens alone, under other numbers."""
    recipe = prepared("qwen_image_21")
    assert extract.main([str(recipe)]) == 0
    (recipe.parent / "model" / "processor" / "tokenizer.json").unlink()
    unfinished = f"extract.output_dir={recipe.parent / 'more'}"
    for script, *options in ((extract, unfinished), (check,), (check, "--verify", "1")):
        with pytest.raises(
            InputError, match=r"model: <\|image_pad\|> is token \d+ of the processor of .*; fetch both"
        ):
            script.main([str(recipe), *options])


def test_training_names_the_class_of_a_transformer_of_another_family(prepared, tiny):
    recipe = prepared("qwen_image_21")
    assert extract.main([str(recipe)]) == 0
    with_transformer_of_another_family(recipe.parent / "model", tiny("edit_plus"))
    with pytest.raises(
        InputError, match=r"is of class QwenImageTransformer2DModel, but QwenImage21Pipeline, which its model_"
    ):
        open_sets(load_recipe(recipe))


def test_training_refuses_a_set_whose_prompt_columns_are_those_of_another_family(prepared, tiny, edits, tmp_path):
    recipe = prepared("qwen_image_21")
    assert extract.main([str(recipe)]) == 0
    (tmp_path / "old").mkdir()
    old = write_recipe(tmp_path / "old", tiny("edit_plus"), few_edits(edits, edit=2))
    assert extract.main([str(old)]) == 0
    load_from_disk(tmp_path / "old" / "sets" / "edit").save_to_disk(tmp_path / "edited")
    provenance = json.loads((tmp_path / "sets" / "edit" / "provenance.json").read_text(encoding="utf-8"))
    del provenance["record"]["files"]
    (tmp_path / "edited" / "provenance.json").write_text(json.dumps(provenance), encoding="utf-8")
    told = r"tasks.edit: its prompts are in image_embeds, those of Qwen-Image-2.1 in prefix_embeds, image_slots"
    with pytest.raises(InputError, match=told):
        open_sets(load_recipe(recipe, [f"tasks.edit.embeddings={tmp_path / 'edited'}"]))


@both_families
def test_training_warns_of_a_set_with_another_drop_caption(prepared, kind, caplog):
    recipe = prepared(kind)
    assert extract.main([str(recipe)]) == 0
    with caplog.at_level(logging.WARNING):
        open_sets(load_recipe(recipe))
        assert "drop_caption" not in caplog.text
        open_sets(load_recipe(recipe, ["extract.drop_caption=blurry"]))
    assert "its set was made with extract.drop_caption: ' ', the recipe has 'blurry'; training keeps" in caplog.text


@both_families
def test_a_lora_of_another_family_is_called_that(prepared, tiny, tmp_path, kind):
    recipe = prepared(kind)
    path = write_recipe(recipe.parent, tiny(OTHER[kind]), {"edit": []}, trainable=LORA)
    save_weights(build_model(load_recipe(path)), tmp_path)
    path = write_recipe(recipe.parent, tiny(kind), {"edit": []}, trainable=LORA)
    with pytest.raises(
        InputError, match=r"has adapters on transformer_blocks.* which the model lacks; is it of another model"
    ):
        build_model(load_recipe(path, [f"trainable.lora.init_from={tmp_path}"]))
