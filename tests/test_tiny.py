"""The tiny checkpoint stands in for the real one, and the synthetic edits mean what they say."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, QwenImageTransformer2DModel
from diffusers.modular_pipelines.qwenimage import prompt_templates
from peft import LoraConfig, get_peft_model
from PIL import Image
from synthetic_edits import synthetic_edits

from hf_qie.demo.shapes import COLOURS, CORNERS
from hf_qie.demo.tiny import KINDS, main, tiny_checkpoint
from hf_qie.models.tiny_parts import SPECIAL_TOKENS

SYSTEM_TEXTS = [prompt_templates.QWENIMAGE_PROMPT_TEMPLATE, prompt_templates.QWENIMAGE_EDIT_PLUS_PROMPT_TEMPLATE]


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def pipeline(tiny):
    return DiffusionPipeline.from_pretrained(tiny("edit_plus"))


# --- the checkpoint


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_loads_in_its_official_pipeline(tiny, kind):
    pipeline = DiffusionPipeline.from_pretrained(tiny(kind))
    assert type(pipeline).__name__ == KINDS[kind][0]
    config = pipeline.transformer.config
    assert bool(config.get("zero_cond_t")) == (kind == "edit_plus_2511")
    assert bool(config.get("causal_condition")) == (kind in ("qwen_image_21", "qwen_image_21_learner"))
    assert pipeline.scheduler.config.use_dynamic_shifting and pipeline.scheduler.config.shift_terminal == 0.02


@pytest.mark.parametrize("kind", ["edit_plus", "qwen_image_21"])
def test_the_same_seed_gives_the_same_bytes(tiny, tmp_path, kind):
    torch.manual_seed(1)  # the state of the caller's generator must not matter, nor change
    state = torch.get_rng_state()
    assert file_bytes(tiny_checkpoint(tmp_path / "again", kind=kind)) == file_bytes(tiny(kind))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("kind", "more", "same"),
    [
        ("edit_plus", set(), {"vae/diffusion_pytorch_model.safetensors"}),  # which is trained; all else is random
        ("qwen_image_21", {"vae/config.json"}, set()),  # the scale of its random latents
    ],
)
def test_another_seed_gives_other_weights(tiny, tmp_path, kind, more, same):
    other, first = file_bytes(tiny_checkpoint(tmp_path, kind=kind, seed=1)), file_bytes(tiny(kind))
    differing = {name for name in first if other[name] != first[name]}
    assert differing == {name for name in first if name.endswith(".safetensors")} - same | more


@pytest.mark.parametrize("kind", ["edit_plus", "qwen_image_21"])
def test_a_checkpoint_takes_some_megabytes(tiny, kind):
    # most of it the VAE, in float32 and, in Qwen-Image, with slices in time that no image meets
    assert sum(map(len, file_bytes(tiny(kind)).values())) < 40e6


# --- tokenizer


@pytest.mark.parametrize(("template", "num_tokens"), zip(SYSTEM_TEXTS, (34, 64), strict=True))
def test_the_templates_have_the_real_token_counts(pipeline, template, num_tokens):
    prefix, suffix = template.split("{}")
    assert len(pipeline.tokenizer(prefix).input_ids) == num_tokens
    assert len(pipeline.tokenizer(suffix).input_ids) == 5


def test_an_image_label_has_five_tokens(pipeline):
    for number in (1, 2, 9):
        assert len(pipeline.tokenizer(f"Picture {number}: ").input_ids) == 5


def test_text_outside_the_vocabulary_survives_as_bytes(pipeline):
    text = "把背景换成浅蓝色。面部微笑。 Çédille & 🙂\n\n  two  spaces"
    ids = pipeline.tokenizer(text).input_ids
    assert pipeline.tokenizer.decode(ids) == text
    assert not set(ids) & set(pipeline.tokenizer.all_special_ids)


def test_special_tokens_have_the_ids_that_the_encoder_expects(pipeline):
    tokenizer, config = pipeline.tokenizer, pipeline.text_encoder.config
    expected = {
        "<|image_pad|>": config.image_token_id,
        "<|video_pad|>": config.video_token_id,
        "<|vision_start|>": config.vision_start_token_id,
        "<|vision_end|>": config.vision_end_token_id,
        "<|im_end|>": config.text_config.eos_token_id,
    }
    assert {token: tokenizer(token).input_ids for token in expected} == {t: [i] for t, i in expected.items()}
    ids = tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS)
    assert ids == list(range(len(tokenizer) - len(ids), len(tokenizer)))
    assert len(tokenizer) <= config.text_config.vocab_size


def test_padding_is_on_the_right_with_endoftext(pipeline):
    for tokenizer in (pipeline.tokenizer, pipeline.processor.tokenizer):
        assert (tokenizer.padding_side, tokenizer.pad_token) == ("right", "<|endoftext|>")


def test_the_processor_bounds_images_as_the_real_one(pipeline):
    size = pipeline.processor.image_processor.size
    assert (size.shortest_edge, size.longest_edge) == (3136, 12845056)


# --- prompt encoder


@pytest.fixture(scope="module")
def encode(pipeline, edits):
    """`encode(*prompts, without=...)` -> states `[B, L, D]` of two images and each prompt, some input left out."""
    rows = read_rows(edits / "combine.jsonl")
    images = [Image.open(edits / path).resize((448, 320)) for path in rows[0]["source_image"]]
    label = prompt_templates.QWENIMAGE_EDIT_PLUS_IMG_TEMPLATE
    labels = label.format(1) + label.format(2)

    @torch.no_grad()
    def encode(*prompts: str, without: tuple[str, ...] = ()) -> torch.Tensor:
        text = [prompt_templates.QWENIMAGE_EDIT_PLUS_PROMPT_TEMPLATE.format(labels + prompt) for prompt in prompts]
        inputs = pipeline.processor(text=text, images=images * len(prompts), padding=True, return_tensors="pt")
        return pipeline.text_encoder.model(**{k: v for k, v in inputs.items() if k not in without}).last_hidden_state

    return encode


def test_lost_image_positions_show_in_the_states(encode):
    states, flat = encode("Remove the red circle."), encode("Remove the red circle.", without=("mm_token_type_ids",))
    # the mean: on most tokens, not on one alone; float32 loses 1e-6
    assert (states - flat).abs().mean() > 0.1


def test_padding_changes_no_state(encode):
    short, long = "Remove the red circle.", "Move the black triangle to the top left corner. " * 3
    alone = encode(short)
    padded = encode(short, long)[:1, : alone.shape[1]]
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-5)  # states reach 4; float32 in another order: 1e-6


def test_the_instruction_shows_in_the_states_of_the_tokens_after_it(encode):
    a, b = encode("Remove the red circle."), encode("Remove the blue circle.")
    torch.testing.assert_close(a[:, :100], b[:, :100], rtol=0, atol=1e-5)  # what precedes it cannot see it
    assert (a[:, -5:] - b[:, -5:]).abs().mean() > 0.005  # one word of some four hundred tokens


# --- VAE


@torch.no_grad()
def test_normalised_latents_of_the_edits_are_of_order_one(pipeline, edits):
    rows = read_rows(edits / "edit.jsonl")
    images = [Image.open(edits / row["target_image"]).resize((128, 128)) for row in rows]
    pixels = torch.from_numpy(np.stack([np.array(image) for image in images])).permute(0, 3, 1, 2)[:, :, None]
    latents = pipeline.vae.encode(pixels / 127.5 - 1).latent_dist.mode()
    mean, std = (torch.tensor(pipeline.vae.config[f"latents_{k}"]).view(1, 16, 1, 1, 1) for k in ("mean", "std"))
    assert latents.shape == (24, 16, 1, 16, 16)
    # scaled on images of any colours, so that those of a few colours lie beside 0 in some channels
    assert 0.5 < ((latents - mean) / std).square().mean().sqrt() < 2


# --- transformer


@pytest.fixture(scope="module", params=["edit_plus", "edit_plus_2511"])
def transformer(tiny, request):
    return QwenImageTransformer2DModel.from_pretrained(tiny(request.param), subfolder="transformer")


def transformer_inputs() -> dict:
    torch.manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 128, 64),  # 64 of the target, 64 of a source
        "encoder_hidden_states": torch.randn(1, 20, 96),
        "encoder_hidden_states_mask": torch.ones(1, 20, dtype=torch.bool),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 8, 8), (1, 8, 8)]],
    }


@pytest.mark.parametrize("name", ["target", "source", "prompt", "mask", "timestep", "positions"])
@torch.no_grad()
def test_each_input_shows_in_the_prediction(transformer, name):
    inputs = transformer_inputs()
    before = transformer(**inputs).sample[:, :64]
    if name == "target":
        inputs["hidden_states"][:, :64] += 0.5
    elif name == "source":
        inputs["hidden_states"][:, 64:] = torch.randn(1, 64, 64)
    elif name == "prompt":
        inputs["encoder_hidden_states"] = torch.randn(1, 20, 96)
    elif name == "mask":
        inputs["encoder_hidden_states_mask"][:, 10:] = False
    elif name == "timestep":
        inputs["timestep"] += 0.1
    else:
        inputs["img_shapes"] = [[(1, 4, 16), (1, 8, 8)]]
    after = transformer(**inputs).sample[:, :64]
    assert before.std() == pytest.approx(1, abs=0.5)
    assert (after - before).abs().mean() > 0.05


def test_a_lora_lowers_the_loss(transformer):
    torch.manual_seed(0)
    adapted = get_peft_model(transformer, LoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v"]))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    inputs, wanted = transformer_inputs(), torch.randn(1, 64, 64)
    losses = []
    for _ in range(30):
        loss = (adapted(**inputs).sample[:, :64] - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    adapted.unload()
    assert losses[-1] < 0.9 * losses[0]


# --- synthetic edits


@pytest.mark.parametrize("task", ["edit", "combine", "text_to_image"])
def test_every_row_names_images_that_open_and_has_both_languages(edits, task):
    rows = read_rows(edits / f"{task}.jsonl")
    assert len(rows) == 24
    for row in rows:
        sources = [row["source_image"]] if isinstance(row["source_image"], str) else row["source_image"] or []
        for path in [*sources, row["target_image"]]:
            with Image.open(edits / path) as image:
                image.load()
                assert image.mode == "RGB"
        assert row["instruction"].isascii() and not row["instruction_cn"].isascii()


@pytest.mark.parametrize(
    ("task", "counts"), [("edit", {1: 24}), ("combine", {2: 12, 3: 12}), ("text_to_image", {0: 24})]
)
def test_source_counts_are_spread_as_the_tasks_say(edits, task, counts):
    sources = [row["source_image"] for row in read_rows(edits / f"{task}.jsonl")]
    assert Counter(1 if isinstance(s, str) else len(s or []) for s in sources) == counts


def test_an_inverse_leads_back_where_one_can(edits):
    opposite = {"Change": "Change", "Move": "Move", "Remove": "Add", "Add": "Remove"}
    for row in read_rows(edits / "edit.jsonl"):
        words, back = row["instruction"].split(), row["inverse_instruction"]
        assert (back is None) == (row["inverse_instruction_cn"] is None) == (words[:2] == ["Remove", "every"])
        if back:
            assert back.split()[0] == opposite[words[0]] and back != row["instruction"]
    assert not any("inverse_instruction" in row for row in read_rows(edits / "combine.jsonl"))


def colour_at(path: Path, corner: str) -> tuple[int, ...]:
    right, down = CORNERS[corner]
    with Image.open(path) as image:
        return image.getpixel((right * image.width, down * image.height))


def test_what_is_added_stands_where_the_instruction_says(edits):
    added = [row for row in read_rows(edits / "edit.jsonl") if row["instruction"].startswith("Add ")]
    assert len(added) >= 4
    for row in added:
        _, _, colour, _, _, _, *corner, _ = row["instruction"].split()  # Add a red circle in the top left corner.
        source, target = (colour_at(edits / row[key], " ".join(corner)) for key in ("source_image", "target_image"))
        assert target == COLOURS[colour][1] != source


def test_images_have_several_aspects_and_one_area(edits):
    sizes = {Image.open(path).size for path in (edits / "images").glob("*.png")}
    assert {round(width / height, 1) for width, height in sizes} == {1.0, 1.5, 0.7}
    assert all(abs(width * height / 128**2 - 1) < 0.02 for width, height in sizes)


def test_a_longer_file_begins_with_the_shorter(edits, tmp_path):
    for task, path in synthetic_edits(tmp_path, rows=3).items():
        assert read_rows(path) == read_rows(edits / f"{task}.jsonl")[:3]
    assert all(data == (edits / name).read_bytes() for name, data in file_bytes(tmp_path).items() if "png" in name)


def test_the_script_builds_what_it_is_asked_for(tmp_path):
    main(["--model", str(tmp_path / "model"), "--kind", "text_to_image", "--data", str(tmp_path / "data"), "--rows=2"])
    assert json.loads((tmp_path / "model" / "model_index.json").read_text())["_class_name"] == "QwenImagePipeline"
    assert {path.name for path in (tmp_path / "data").glob("*.jsonl")} == {"repaint.jsonl", "negative.jsonl"}


# --- photos


def test_photo_rows_name_images_that_exist(photos):
    for name, counts in {"edit": {1: 10}, "multi": {2: 5, 3: 3}, "t2i": {0: 10}}.items():
        rows = read_rows(photos / f"portrait_{name}.jsonl")
        sources = [[s] if isinstance(s, str) else s or [] for s in (row["source_image"] for row in rows)]
        assert Counter(map(len, sources)) == counts
        assert all((photos / path).is_file() for paths in sources for path in paths)
        assert all((photos / row["target_image"]).is_file() for row in rows)
