"""A checkpoint's own files say which family it is, and a family's templates are its pipeline's."""

import json
import shutil

import diffusers
import pytest
from huggingface_hub.errors import HfHubHTTPError

from hf_qie.errors import InputError
from hf_qie.models import checkpoint as checkpoint_module
from hf_qie.models.base import read_family


@pytest.fixture
def checkpoint(tmp_path):
    """`checkpoint(model_index, transformer)` -> a checkpoint of those two configs alone."""

    def write(model_index, transformer=None):
        for name, config in (("model_index.json", model_index), ("transformer/config.json", transformer or {})):
            path = tmp_path / "model" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(config), encoding="utf-8")
        return str(tmp_path / "model")

    return write


@pytest.mark.parametrize(
    ("kind", "pipeline", "max_sources", "vlm_side_px", "one_resize"),
    [
        ("edit_plus", "QwenImageEditPlusPipeline", None, 384, False),
        ("edit_plus_2511", "QwenImageEditPlusPipeline", None, 384, False),
        ("edit", "QwenImageEditPipeline", 1, 1024, True),
        ("text_to_image", "QwenImagePipeline", 0, 1024, True),
    ],
)
def test_the_model_index_decides_the_family(tiny, kind, pipeline, max_sources, vlm_side_px, one_resize):
    family = read_family(str(tiny(kind)))
    assert (family.pipeline, family.max_sources, family.one_resize) == (pipeline, max_sources, one_resize)
    assert (family.vlm_area_px, family.vae_area_px) == (vlm_side_px**2, 1024**2)
    assert (family.edit is None) == (kind == "text_to_image")


@pytest.mark.parametrize("kind", ["edit_plus", "edit", "text_to_image"])
def test_templates_and_drop_counts_are_the_pipelines(tiny, kind):
    pipeline, family = diffusers.DiffusionPipeline.from_pretrained(tiny(kind)), read_family(str(tiny(kind)))
    template = family.edit or family.text_to_image
    # Edit writes its one image into the template, Edit-Plus puts its images before the caption
    numbered = "{number}" in template.picture
    image = "" if numbered else template.picture
    assert template.before + image + "{}" + template.after == pipeline.prompt_template_encode
    assert template.drop == pipeline.prompt_template_encode_start_idx


def test_the_text_to_image_template_of_every_family_is_that_of_its_pipeline(tiny):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tiny("text_to_image"))
    for kind in ("edit_plus", "edit", "text_to_image"):
        template = read_family(str(tiny(kind))).template(0)
        assert template.before + "{}" + template.after == pipeline.prompt_template_encode
        assert template.drop == pipeline.prompt_template_encode_start_idx


def test_images_are_numbered_from_one_without_a_separator(tiny):
    template = read_family(str(tiny("edit_plus"))).template(2)
    vision = "<|vision_start|><|image_pad|><|vision_end|>"
    assert template.shared(2) == f"{template.before}Picture 1: {vision}Picture 2: {vision}"


def test_another_pipeline_is_refused_by_name(checkpoint):
    model = checkpoint({"_class_name": "QwenImageLayeredPipeline"})
    with pytest.raises(InputError) as error:
        read_family(model)
    assert str(error.value) == (
        f"model: {model} is a QwenImageLayeredPipeline; hf_qie trains QwenImageEditPlusPipeline, "
        "QwenImageEditPipeline, QwenImagePipeline, QwenImage21Pipeline"
    )


@pytest.mark.parametrize("flag", ["use_layer3d_rope", "use_additional_t_cond", "guidance_embeds"])
def test_a_transformer_with_more_inputs_is_refused_by_flag(checkpoint, flag):
    model = checkpoint({"_class_name": "QwenImageEditPlusPipeline"}, {flag: True})
    with pytest.raises(InputError) as error:
        read_family(model)
    assert str(error.value) == f"model: the transformer of {model} has {flag}, which hf_qie does not train"


def test_a_folder_without_model_index_is_no_checkpoint(tmp_path):
    with pytest.raises(InputError) as error:
        read_family(str(tmp_path))
    assert str(error.value) == (
        f"model: {tmp_path}/model_index.json does not exist; {tmp_path} has to be a folder in diffusers layout"
    )


def test_a_config_that_is_no_json_is_named(tiny, tmp_path):
    shutil.copy(tiny("edit_plus") / "model_index.json", tmp_path)
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text("<html>")
    with pytest.raises(InputError, match=r"^model: .*/transformer/config\.json is not valid JSON \(.+\)$"):
        read_family(str(tmp_path))


@pytest.mark.parametrize("model", ["/no/such/folder", "./no/such", "Qwen/Qwen-Image/Edit", "Qwen Image"])
def test_what_is_neither_folder_nor_hub_id_is_refused(model):
    with pytest.raises(InputError) as error:
        read_family(model)
    assert str(error.value).startswith(f"model: {model!r} is not a folder here; invalid Hub id: ")


def test_a_hub_id_out_of_reach_is_told_from_a_missing_folder():
    with pytest.raises(InputError) as error:
        read_family("outputs/tiny")
    assert str(error.value) == (
        "model: 'outputs/tiny' is not a folder here; it is not in the local cache, and the Hub cannot be reached"
    )


def test_what_the_hub_says_reaches_the_user(monkeypatch):
    class Answer:
        headers, request, status_code = {}, None, 401

    def download(*_, **__):
        raise HfHubHTTPError("401: log in to see org/name", response=Answer())

    monkeypatch.setattr(checkpoint_module, "hf_hub_download", download)
    with pytest.raises(InputError, match=r"^model: 'org/name' is not a folder here; the Hub answers: 401: log in"):
        read_family("org/name")
