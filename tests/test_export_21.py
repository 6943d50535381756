"""What is trained on Qwen-Image-2.1 leaves in every format, with its licence, and is what others load and sample."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import PartialState
from accelerate.state import AcceleratorState
from diffusers import QwenImage21Pipeline, QwenImage21Transformer2DModel
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from small_recipes import few_edits, write_recipe
from torch import Tensor

from hf_qie import export, extract, sampling
from hf_qie.config.recipe import load_recipe
from hf_qie.data.images import on_white
from hf_qie.hub.model_card import model_card
from hf_qie.hub.sampler import Sampler
from hf_qie.hub.trained_run import find_trained
from hf_qie.models.base import FAMILIES, NOTICE, family_of
from hf_qie.models.qwen_image_21.family import LICENSE_NOTICE
from hf_qie.train import train
from hf_qie.training.model import build_model, load_weights
from hf_qie.training.sets import open_sets

KINDS = ("lora", "comfyui", "merged", "pipeline")
LORA = {"lora": {"rank": 4, "alpha": 8, "target_modules": "all-linear"}}  # alpha is not the rank: the scale is 2


@pytest.fixture(scope="module")
def run(built_once, tiny, edits) -> Path:
    """The output folder of a run that trained a LoRA on all layers."""

    def build(folder: Path) -> None:
        folder.mkdir()
        training = {"output_dir": str(folder / "run"), "use_cpu": True, "max_steps": 4, "learning_rate": 1e-2}
        training |= {"per_device_train_batch_size": 1, "disable_tqdm": True}
        tasks = few_edits(edits, edit=3, text_to_image=2)
        path = write_recipe(folder, tiny("qwen_image_21"), tasks, training=training, trainable=LORA)
        assert extract.main([str(path)]) == 0
        PartialState(cpu=True)
        recipe = load_recipe(path)
        train(recipe, open_sets(recipe))
        AcceleratorState._reset_state(reset_partial_state=True)

    return built_once("run_21", build) / "run"


@pytest.fixture(scope="module")
def exported(built_once, run) -> Path:
    """A folder with an export of each kind."""

    def build(folder: Path) -> None:
        for kind in KINDS:
            export.main([str(run), "--to", kind, "--output", str(folder / kind), "--dtype", "float32"])

    return built_once("exported_21", build)


def velocity(transformer: torch.nn.Module) -> Tensor:
    """What a transformer makes of fixed inputs: text of 5, a source of 2 x 4 behind the 2nd, a target of 4 x 4."""
    generator = torch.Generator().manual_seed(0)
    places = torch.zeros(1, 7 + 4, dtype=torch.bool)
    places[:, 2:4] = places[:, 7:] = True  # of four latents each
    with torch.no_grad():
        return transformer.eval()(
            hidden_states=torch.randn(1, 24, 64, generator=generator),
            encoder_hidden_states=torch.randn(1, 7, 96, generator=generator),
            timestep=torch.tensor([0.5]),
            img_shapes=[[(1, 2, 4), (1, 4, 4)]],
            img_mask=places,
            return_dict=False,
        )[0][:, -16:]


@pytest.fixture(scope="module")
def trained(run) -> Tensor:
    """What the trained model gives, wrapped as training wraps it; the stock class has no other forward."""
    PartialState(cpu=True)
    model = build_model(load_recipe(run / "recipe.yaml"))
    load_weights(model, run)
    wrapped = {name.replace("base_layer.", ""): value for name, value in model.state_dict().items()}
    names = sorted({name.partition(".lora_")[0] for name in wrapped if ".lora_" in name})
    assert names
    stock = QwenImage21Transformer2DModel.from_pretrained(
        load_recipe(run / "recipe.yaml").model, subfolder="transformer"
    )
    weights = stock.state_dict()
    prefix = next(name for name in wrapped if name.endswith("img_in.weight")).removesuffix("img_in.weight")
    for name in names:
        down, up = (next(wrapped[key] for key in wrapped if key.startswith(f"{name}.lora_{half}")) for half in "AB")
        weights[f"{name.removeprefix(prefix)}.weight"] += 2.0 * up @ down
    stock.load_state_dict(weights)
    AcceleratorState._reset_state(reset_partial_state=True)
    return velocity(stock)


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_diffusers_loads_every_format_to_what_was_trained(exported, trained, tiny):
    base = QwenImage21Pipeline.from_pretrained(tiny("qwen_image_21"))
    assert (velocity(base.transformer) - trained).abs().max() > 0.01, "else nothing is compared"
    same(velocity(QwenImage21Transformer2DModel.from_pretrained(exported / "merged")), trained)
    same(velocity(QwenImage21Pipeline.from_pretrained(exported / "pipeline").transformer), trained)
    for kind, file in (("lora", "pytorch_lora_weights.safetensors"), ("comfyui", "run.safetensors")):
        pipeline = QwenImage21Pipeline.from_pretrained(tiny("qwen_image_21"))
        pipeline.load_lora_weights(exported / kind, weight_name=file)
        same(velocity(pipeline.transformer), trained)


def comfyui_keys(weights: dict[str, Tensor]) -> dict[str, tuple[str, slice]]:
    """Where ComfyUI's loader puts what: comfy/lora.py, model_lora_keys_unet, of Qwen-Image."""
    found = {}
    for name, tensor in weights.items():
        layer, half = name.removesuffix(".weight"), len(tensor) // 2
        found[f"diffusion_model.{layer}"] = name, slice(None)
        if layer.endswith(".img_mlp.gate_up"):
            found[layer.replace("gate_up", "gate_layer")] = name, slice(half)
            found[layer.replace("gate_up", "proj")] = name, slice(half, None)
        else:
            found[layer] = name, slice(None)
    return found


@pytest.mark.parametrize("joins", [True, False])  # its own checkpoints have gate and up in one; diffusers' do not
def test_comfyui_finds_a_place_for_every_layer_joined_or_not(exported, trained, tiny, joins):
    transformer = QwenImage21Transformer2DModel.from_pretrained(tiny("qwen_image_21"), subfolder="transformer")
    own, joined = transformer.state_dict(), {}
    for name, tensor in own.items():
        if not joins:
            joined[name] = tensor.clone()
        elif name.endswith("img_mlp.gate_layer.weight"):
            joined[name.replace("gate_layer", "gate_up")] = torch.cat(
                [tensor, own[name.replace("gate_layer", "proj")]]
            )
        elif not name.endswith("img_mlp.proj.weight"):
            joined[name] = tensor.clone()
    keys, lora = comfyui_keys(joined), load_file(exported / "comfyui" / "run.safetensors")
    layers = {key.removesuffix(".alpha") for key in lora if key.endswith(".alpha")}
    assert len(lora) == 3 * len(layers) and any("gate_layer" in layer for layer in layers)
    for layer in layers:
        up, down, alpha = (lora[f"{layer}.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha"))
        name, rows = keys[layer]
        joined[name][rows] += alpha / len(down) * up @ down
    for name, tensor in joined.items():
        if name.endswith("gate_up.weight"):
            own[name.replace("gate_up", "gate_layer")], own[name.replace("gate_up", "proj")] = tensor.chunk(2)
        else:
            own[name] = tensor
    transformer.load_state_dict(own)
    same(velocity(transformer), trained)


def test_comfyui_knows_merged_weights_as_its_qwen_image_21(exported):
    """Keys that comfy/model_detection.py asks for, of this model."""
    merged = load_file(exported / "merged" / "diffusion_pytorch_model.safetensors")
    first = ("attn.norm_q", "img_mlp.proj")
    asked = {"txt_in.text_norm", "modulation.1", "img_in", "proj_out", *(f"transformer_blocks.0.{it}" for it in first)}
    assert {f"{layer}.weight" for layer in asked} <= merged.keys()


def test_only_rounded_values_of_full_fine_tuning_are_named_as_such(run, tiny, tmp_path, caplog):
    """This transformer has no biases to tell them by."""
    full = shutil.copytree(run, tmp_path / "full")
    recipe = yaml.safe_load((full / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["trainable"]["lora"] = None
    (full / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    shutil.copytree(tiny("qwen_image_21") / "transformer", full / "transformer")
    options = ["--to", "merged", "--dtype", "float32", "--output"]
    export.main([str(full), *options, str(tmp_path / "exact")])
    assert "holds" not in caplog.text
    path = full / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: one.bfloat16() for name, one in load_file(path).items()}, path, metadata={"format": "pt"})
    export.main([str(full), *options, str(tmp_path / "rounded")])
    assert f"{full} holds rounded values" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_the_licence_goes_with_every_export_and_the_code_on_its_card_runs(exported, tiny, tmp_path, kind, monkeypatch):
    folder = exported / kind
    notice, changed = (folder / NOTICE).read_text(encoding="utf-8").split("\n\n")
    assert notice == LICENSE_NOTICE and changed.startswith("Changed: ") and " of qwen_image_21, trained by" in changed
    assert ("adapters" in changed, "outside of transformer/" in changed) == (kind in KINDS[:2], kind == "pipeline")
    _, metadata, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    metadata = yaml.safe_load(metadata)
    assert metadata["pipeline_tag"] == "image-to-image" and "qwen-image-2.1" in metadata["tags"]
    assert (metadata["license"], metadata["license_name"]) == ("other", "qwen-research")
    assert f"\n## Licence\n\n[qwen-research]({metadata['license_link']})\n\n{LICENSE_NOTICE}\n" in text
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert "    output_resolution=96,  # sources are seen as in training\n" in blocks[1]
    assert "VAE_IMAGE_SIZE" not in text and "negative_prompt" not in text and "true_cfg_scale" not in blocks[1]
    code = "".join(blocks).replace('"qwen_image_21"', repr(str(tiny("qwen_image_21")))).replace('("cuda"', '("cpu"')
    code = code.replace(f'"{kind}"', repr(str(folder))).replace("width=64,", "width=64, num_inference_steps=2,")
    monkeypatch.chdir(tmp_path)
    image = Image.effect_noise((80, 64), 64).convert("RGBA")
    image.putalpha(100)
    image.save("input.png")
    names = {}
    exec(code, names)
    assert names["source"].tobytes() == image.tobytes()  # alpha is a channel of what the model sees
    assert Image.open("output.png").mode == "RGBA" and Image.open("output.png").size == (64, 64)


def test_the_card_of_a_run_without_sources_is_one_of_text_to_image(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    record = json.loads((copy / "run.json").read_text())
    record["mix"] = [group for group in record["mix"] if not group["sources"]]
    (copy / "run.json").write_text(json.dumps(record))
    export.main([str(copy), "--to", "lora", "--dtype", "float32"])
    text = (copy / "export" / "lora" / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: text-to-image\n" in text and "load_image" not in text
    assert "pipe = QwenImage21Pipeline.from_pretrained(" in text and 'prompt="A red boat on a lake"' in text


def test_a_licence_that_a_user_gives_takes_the_familys_place_and_the_notice_stays(run, tmp_path):
    export.main([str(run), "--output", str(tmp_path / "to"), "--license", "cc-by-nc-4.0"])
    text = (tmp_path / "to" / "README.md").read_text(encoding="utf-8")
    assert "license: cc-by-nc-4.0\n" in text and "license_name" not in text and LICENSE_NOTICE in text
    assert (tmp_path / "to" / NOTICE).is_file()


def test_a_licence_that_is_given_later_leaves_nothing_of_the_familys(run, exported, tmp_path):
    present = ModelCard((exported / "lora" / "README.md").read_text(encoding="utf-8"))
    assert (present.data.license, present.data.license_name) == ("other", "qwen-research")
    how = {"dtype": "float32", "repo": "org/lora", "folder": tmp_path, "present": present}
    card = ModelCard(str(model_card(find_trained(run), "lora", license="mit", **how)))
    assert {key: value for key, value in card.data.to_dict().items() if "license" in key} == {"license": "mit"}
    again = ModelCard(str(model_card(find_trained(run), "lora", license=None, **how)))
    assert again.data.license_link == present.data.license_link


def test_sizes_on_a_card_are_those_that_the_pipeline_takes(run, tmp_path):
    trained, shown = find_trained(run), {}
    for side in (80, 96):
        extract_section = trained.recipe.extract.model_copy(update={"image_sample_size": side})
        recipe = trained.recipe.model_copy(update={"extract": extract_section})
        how = {"dtype": "float32", "repo": None, "folder": tmp_path, "license": None, "present": None}
        text = model_card(replace(trained, recipe=recipe), "lora", **how).text
        shown[side] = re.findall(r"^    (?:height|width)=(\d+),", text, re.M)
    assert shown == {80: ["64", "64"], 96: ["96", "96"]}  # by 32
    assert [family_of(name).call_multiple_px for name in FAMILIES] == [16, 16, 16, 32]


def on_base(run: Path, base: Path, folder: Path) -> Path:
    """A copy of a run as if it had started from `base`."""
    copy, recipe = shutil.copytree(run, folder), load_recipe(run / "recipe.yaml")
    (copy / "recipe.yaml").write_text((copy / "recipe.yaml").read_text().replace(recipe.model, str(base)))
    (copy / "run.json").unlink()
    return copy


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_has_a_copy_of_the_licence_of_its_base(run, tiny, tmp_path, kind, caplog):
    base = shutil.copytree(tiny("qwen_image_21"), tmp_path / "base")
    copy = on_base(run, base, tmp_path / "run")
    export.main([str(copy), "--to", kind, "--output", str(tmp_path / "without")])
    assert "has no file LICENSE; whoever gets this export has to get a copy" in caplog.text
    caplog.clear()
    (base / "LICENSE").write_bytes("§ 1 Qwen RESEARCH LICENSE\r\n".encode())
    export.main([str(copy), "--to", kind, "--output", str(tmp_path / "with")])
    assert (tmp_path / "with" / "LICENSE").read_bytes() == (base / "LICENSE").read_bytes()
    assert not (tmp_path / "without" / "LICENSE").exists() and "LICENSE" not in caplog.text


def test_the_licence_of_a_base_on_the_hub_is_fetched_where_there_is_one(tmp_path, loopback_hub):
    for name in ("org/with", "org/without"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "LICENSE.md" if name == "org/without" else folder / "LICENSE").write_text("words")
        loopback_hub.upload(name, folder)
    code = "from hf_qie.models.checkpoint import license_file as f\n"
    code += "print(f('org/with').read_text(), f('org/without'))"
    environment = loopback_hub.environment(tmp_path / "home")
    ask = [sys.executable, "-c", code]
    assert subprocess.run(ask, env=environment, capture_output=True, text=True).stdout == "words None\n"
    no_network = environment | {"HF_HUB_OFFLINE": "1"}
    assert subprocess.run(ask, env=no_network, capture_output=True, text=True).stdout == "words None\n"


def test_noise_levels_of_a_checkpoint_are_no_part_of_its_pipeline(run, tiny, tmp_path):
    base = shutil.copytree(tiny("qwen_image_21"), tmp_path / "base")
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps(index | {"sample_sigmas": [1.0, 0.6]}))
    copy = on_base(run, base, tmp_path / "run")
    export.main([str(copy), "--to", "pipeline", "--output", str(tmp_path / "to")])
    assert QwenImage21Pipeline.from_pretrained(tmp_path / "to").config.sample_sigmas == [1.0, 0.6]


@pytest.mark.parametrize(("num_sources", "scale"), [(0, None), (1, None), (3, 3.0)])
def test_a_sampler_makes_the_pipelines_image_from_what_was_trained(run, exported, photos, num_sources, scale):
    images = []
    for number in range(num_sources):  # the first is opaque
        images.append(Image.open(photos / "images" / f"source_{number + 1:02d}.jpg").convert("RGBA"))
        images[-1].putalpha(255 - 100 * number)
    sampler = Sampler(load_recipe(run / "recipe.yaml", ["extract.source_sample_size=128"]))
    mine = sampler("Make it red.", images=images, seed=3, num_inference_steps=2, true_cfg_scale=scale)
    stock = QwenImage21Pipeline.from_pretrained(exported / "pipeline", dtype=torch.float32)
    width, height = sampler.size(images)
    guided = {} if scale is None else {"true_cfg_scale": scale, "negative_prompt": " "}
    theirs = stock(
        "Make it red.",
        image=images or None,
        generator=torch.Generator().manual_seed(3),
        num_inference_steps=2,
        output_resolution=128,
        height=height,
        width=width,
        **guided,
    ).images[0]
    assert mine.mode == theirs.mode == "RGBA" and mine.size == theirs.size == (width, height)
    assert np.abs(np.asarray(mine).astype(int) - np.asarray(theirs).astype(int)).max() <= 1


def test_the_script_puts_an_image_on_white_in_a_format_without_alpha(run, tmp_path):
    for name in ("out.jpg", "out.png"):
        more = ["--instruction", "Make it red.", "--output", str(tmp_path / name), "--num_inference_steps", "2"]
        sampling.main([str(run / "recipe.yaml"), *more])
    with Image.open(tmp_path / "out.jpg") as jpeg, Image.open(tmp_path / "out.png") as png:
        assert (jpeg.format, jpeg.mode, png.mode) == ("JPEG", "RGB", "RGBA")
        apart = np.abs(np.asarray(jpeg).astype(int) - np.asarray(on_white(png)).astype(int))
    assert apart.mean() < 12  # JPEG's loss on noise
