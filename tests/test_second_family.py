"""A second family of models is one class and one line in the registry: extraction and training follow it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from second_family import PAINTER, SEEN, TEMPLATE
from small_recipes import write_recipe

from hf_qie import extract, train
from hf_qie.config.recipe import load_recipe
from hf_qie.data.images import read_image
from hf_qie.data.provenance import read_provenance
from hf_qie.data.schema import matrix_width
from hf_qie.models import base
from hf_qie.models.qwen_image.tiny import VAE_CONFIG

CPU = {"revision": None, "dtype": torch.float32, "device": torch.device("cpu")}


@pytest.fixture
def painter(tiny, tmp_path, monkeypatch) -> Path:
    """A checkpoint of the made-up family, which is registered: an encoder of Qwen's kind, the rest its own."""
    monkeypatch.setitem(base.FAMILIES, PAINTER.pipeline, "second_family:PAINTER")
    folder = shutil.copytree(tiny(), tmp_path / "model", ignore=shutil.ignore_patterns("vae", "transformer"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": PAINTER.pipeline}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        scale = {"z_dim": 8, "latents_mean": [0.0] * 8, "latents_std": [1.0] * 8}
        AutoencoderKLQwenImage(**VAE_CONFIG, **scale).save_pretrained(folder / "vae")
        shape = {"num_attention_heads": 4, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6), "num_layers": 2}
        QwenImageTransformer2DModel(**shape, joint_attention_dim=96, in_channels=32, out_channels=8).save_pretrained(
            folder / "transformer"
        )
    return folder


def test_a_made_up_family_is_extracted_and_trained_without_a_change_elsewhere(painter, edits, tmp_path):
    lines = (edits / "combine.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    rows = [json.loads(line) for line in lines]
    for row in rows:
        row["source_image"] = [str(edits / path) for path in row["source_image"]]
        row["target_image"] = str(edits / row["target_image"])
    training = {
        "output_dir": str(tmp_path / "run"),
        "max_steps": 2,
        "per_device_train_batch_size": 1,
        "save_steps": 10,
    }
    lora = {"rank": 2, "alpha": 2}
    path = write_recipe(tmp_path, painter, {"combine": rows}, training=training, trainable={"lora": lora})
    assert extract.main([str(path)]) == 0

    data, family = load_from_disk(tmp_path / "sets" / "combine"), base.read_family(str(painter))
    assert family is PAINTER and len(data) == 4
    assert read_provenance(tmp_path / "sets" / "combine")["compat"]["templates"]["edit"]["before"] == TEMPLATE.before
    row = data[0]
    processor = family.load_processor(str(painter), revision=None)
    images = [read_image(Path(file)) for file in row["source_image"]]
    prompt = family.make_prompt(processor, images, [row["instruction"]])
    text = processor.tokenizer.decode(prompt.shared + prompt.branches[0])
    assert text.startswith(TEMPLATE.before + "<<|image_pad|>") and text.endswith(
        f"{row['instruction']}{TEMPLATE.after}"
    )
    (embeddings,) = family.load_encoder(str(painter), **CPU)([prompt])
    np.testing.assert_allclose(row["image_embeds"], embeddings.shared, atol=1e-2)
    np.testing.assert_allclose(row["text_embeds_instruction"], embeddings.texts[0], atol=1e-2)
    for column in ("target_latents", "source_latents"):
        assert matrix_width(data.features[column]) == 32
        assert np.shape(row[column])[1] == 32

    SEEN.clear()
    recipe = load_recipe(path)
    trainer = train.run(recipe)
    assert trainer.state.global_step == 2 and all(np.isfinite(log["loss"]) for log in trainer.state.log_history[:1])
    sources = {tuple(np.shape(row["source_latents"])): None for row in data}
    assert len(SEEN) == 2
    for latents, ((*_, target),) in SEEN:
        stored = [np.array(row["source_latents"], np.float32) for row in data]
        num_sources = latents.shape[1] - target[1] * target[2]
        assert (num_sources, 32) in sources
        shown = latents[0, :num_sources].numpy()  # clean, as they are stored, and in front
        assert any(one.shape == shown.shape and np.array_equal(one, shown) for one in stored)
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()
