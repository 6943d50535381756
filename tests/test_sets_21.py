"""Sets of Qwen-Image-2.1: text positions, places of images and alpha, from data to batches, cards and a push."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from datasets import Dataset, load_from_disk
from hub import Hub
from huggingface_hub import DatasetCard
from real_vocabulary import save_tokenizer
from small_recipes import cut_outs, few_edits, plans_of, write_recipe
from transformers import Qwen2Tokenizer, Qwen3VLProcessor

from hf_qie import check, convert, extract
from hf_qie.config.recipe import load_recipe
from hf_qie.data.images import read_image, to_pixels
from hf_qie.data.provenance import PROVENANCE, read_provenance
from hf_qie.errors import InputError
from hf_qie.extraction.estimate import estimate_bytes, outlooks
from hf_qie.hub.dataset_card import END, dataset_card, makers_of
from hf_qie.models.base import NOTICE, families, read_family
from hf_qie.models.qwen_image_21.family import LICENSE_NOTICE
from hf_qie.runtime.files import written
from hf_qie.training.sets import open_sets

TEXT = ("text_embeds_instruction",)
TASKS = ("edit", "combine", "text_to_image", "cut_out")
CPU = {"revision": None, "dtype": torch.float32, "device": torch.device("cpu")}


@pytest.fixture(autouse=True)
def fresh_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def made(built_once, tiny, edits) -> Path:
    """The recipe of finished sets of all tasks; read only. Sources are of another area than targets."""

    def build(folder: Path) -> None:
        folder.mkdir()
        tasks = few_edits(edits, edit=4, combine=3, text_to_image=3) | {"cut_out": cut_outs(folder, edits)}
        training = {"output_dir": str(folder / "run"), "use_cpu": True, "max_steps": 24, "disable_tqdm": True}
        more = {"mix": {"inverse_share": 0.5}, "trainable": {"lora": {"rank": 2}}}
        training |= {"per_device_train_batch_size": 1}
        assert extract.main([str(write_recipe(folder, tiny("qwen_image_21"), tasks, training=training, **more))]) == 0

    return built_once("sets_21", build) / "recipe.yaml"


@pytest.fixture
def family(tiny):
    return read_family(str(tiny("qwen_image_21"))).with_source_size(96)


def rows_of(recipe: Path, task: str) -> list[dict]:
    return load_from_disk(recipe.parent / "sets" / task).to_list()


def paths(recipe: Path, row: dict) -> list[Path]:
    return [Path(recipe.parent, path) for path in (*row["source_image"], row["target_image"])]


def rounded(values: torch.Tensor) -> np.ndarray:
    return values.to(torch.float16).numpy()


# --- what is stored --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_stored_are_the_encoders_embeddings_of_text_and_the_places_of_images(made, tiny, family, task):
    encoder = family.load_encoder(str(tiny("qwen_image_21")), **CPU)
    processor = family.load_processor(str(tiny("qwen_image_21")), revision=None)
    for row in rows_of(made, task):
        *sources, _ = [read_image(path, "RGBA") for path in paths(made, row)]
        captions = [row["instruction"], row["instruction_cn"], " "]
        prompt = family.make_prompt(processor, sources, captions)
        (embeddings,) = encoder([prompt])
        assert row["image_slots"] == list(prompt.slots) and len(prompt.slots) == row["num_sources"]
        names = ("prefix_embeds", "text_embeds_instruction", "text_embeds_instruction_cn", "text_embeds_drop")
        for name, wanted in zip(names, (embeddings.shared, *embeddings.texts), strict=True):
            got = np.array(row[name], np.float32).reshape(-1, 96)
            np.testing.assert_allclose(got, rounded(wanted), atol=4e-3)  # a batch of other rows moves the last bit
        # none of an image's own: as many as the latents make room for
        slots = sum(height * width for height, width in row["source_grids"]) // 4
        tokens = len(prompt.shared) + len(prompt.branches[0]) - prompt.drop
        assert len(row["prefix_embeds"]) + len(row["text_embeds_instruction"]) == tokens - slots


def test_latents_have_the_alpha_of_sources_and_targets(made, tiny, family):
    vae = family.load_vae(str(tiny("qwen_image_21")), **CPU)
    rows = rows_of(made, "cut_out")
    for row in rows:
        *sources, target = [read_image(path, "RGBA") for path in paths(made, row)]
        for image, area, name in ((target, 64**2, "target_latents"), (sources[0], 96**2, "source_latents")):
            (latents,) = vae([to_pixels(family.resize(image, family.fit(image.size, area)))])
            np.testing.assert_allclose(np.array(row[name]), rounded(latents), atol=1e-2)
            opaque = image.convert("RGB").convert("RGBA")
            (others,) = vae([to_pixels(family.resize(opaque, family.fit(image.size, area)))])
            is_opaque = np.asarray(image)[..., 3].min() == 255
            assert is_opaque == (name == "source_latents" and row is not rows[2])
            assert is_opaque or np.abs(np.array(row[name]) - rounded(others)).max() > 0.1


def test_all_captions_of_rows_with_the_same_sources_share_a_pass(made, tiny, family):
    counts = read_provenance(made.parent / "sets" / "cut_out")["record"]["counts"]
    processor = family.load_processor(str(tiny("qwen_image_21")), revision=None)
    passes = []
    rows = rows_of(made, "cut_out")
    for some in (rows[:2], rows[2:]):  # of two sources
        captions = [caption for row in some for caption in (row["instruction"], row["instruction_cn"])]
        images = [read_image(path, "RGBA") for path in paths(made, some[0])[:-1]]
        passes.append(family.make_prompt(processor, images, [*captions, " "]).num_tokens)
    assert counts["num_tokens"] == sum(passes)
    assert counts["num_tokens_apart"] > 2 * sum(passes)


def test_what_rows_become_is_known_from_headers_and_captions(made, tmp_path):
    plans, processor = plans_of(made, tmp_path)
    for name, plan in plans.items():
        for look, row in zip(outlooks(list(plan.rows.table), plan, processor), rows_of(made, name), strict=True):
            stored = {
                column: len(values) for column, values in row.items() if "embeds" in column and values is not None
            }
            assert look.num_embeds == stored
        written_bytes = sum(path.stat().st_size for path in (made.parent / "sets" / name).glob("*.arrow"))
        assert 0 < written_bytes - estimate_bytes(plan, processor) < 0.02 * written_bytes + 6000


def test_the_sets_are_the_official_pipelines(made, capsys):
    check.main([str(made), "--verify", "3"])
    out = capsys.readouterr().out
    assert out.count("made in float32, against QwenImage21Pipeline in float32\n") == len(TASKS)
    assert "beyond rounding" not in out
    for column in ("prefix_embeds", "image_slots", "text_embeds_drop", "inverse_image_slots", "target_latents"):
        assert f"  {column} " in out


@pytest.mark.parametrize(
    ("column", "change"),
    [
        ("image_slots", lambda places: [place - 1 for place in places]),
        ("prefix_embeds", lambda embeds: [[1.001 * x for x in one] for one in embeds]),
    ],
)
def test_a_set_with_another_place_or_embedding_is_told_by_its_column(made, tmp_path, column, change):
    folder = shutil.copytree(made.parent / "sets", tmp_path / "sets") / "combine"
    data = load_from_disk(folder)
    rows = [row | {column: change(row[column])} for row in data.to_list()]
    provenance = read_provenance(folder)
    shutil.rmtree(folder)
    Dataset.from_list(rows, features=data.features).save_to_disk(folder)
    provenance["record"]["files"] = {path.name: written(path) for path in folder.iterdir()}
    (folder / PROVENANCE).write_text(json.dumps(provenance), encoding="utf-8")
    with pytest.raises(InputError, match=rf"combine: differs by more than rounding in {column}; extract it again$"):
        check.main([str(made), f"extract.output_dir={tmp_path / 'sets'}", "--verify", "3"])


# --- how small it is -------------------------------------------------------------------------------------------------


def test_embeddings_take_at_most_a_tenth_of_those_of_every_caption_with_its_images(built_once, tiny, photos, tmp_path):
    """By the columns' own lengths, in the released vocabulary, over photos: one source of 1024 x 1024 pixels."""
    model = tiny("qwen_image_21")
    parts = Qwen3VLProcessor.from_pretrained(model, subfolder="processor")
    tokenizer = Qwen2Tokenizer.from_pretrained(built_once("real_vocabulary", save_tokenizer))
    processor = Qwen3VLProcessor(
        parts.image_processor, tokenizer, parts.video_processor, chat_template=parts.chat_template
    )
    sizes = {"image_sample_size": 1024, "source_sample_size": None, "inverse": False}
    path = write_recipe(tmp_path, model, {"edit": photos / "portrait_edit.jsonl"}, extract=sizes)
    (plan,) = plans_of(path, tmp_path / "mapped")[0].values()
    stored = usual = 0
    for look in outlooks(list(plan.rows.table), plan, processor):
        ((height, width),) = look.grids["source_grids"]
        assert height * width == pytest.approx(64 * 64, rel=0.05)
        prefix = look.num_embeds["prefix_embeds"]
        texts = [number for name, number in look.num_embeds.items() if name.startswith("text_embeds_")]
        assert len(texts) == 3  # two captions and the drop caption
        stored += prefix + sum(texts)
        usual += sum(prefix + height * width // 4 + number for number in texts)
    assert stored / usual < 0.1


# --- training on it --------------------------------------------------------------------------------------------------


def test_a_set_and_a_checkpoint_of_two_families_are_refused_by_name(made, tiny, tmp_path):
    other = f"model={tiny('edit_plus')}"
    with pytest.raises(InputError) as error:
        open_sets(load_recipe(made, [other]))
    assert str(error.value) == (
        f"tasks.edit: its embedding set was made for Qwen-Image-2.1, the checkpoint {tiny('edit_plus')} is of "
        "Qwen-Image-Edit; extract it again for that family, or train without it"
    )
    folder = shutil.copytree(made.parent / "sets", tmp_path / "sets")
    with pytest.raises(InputError, match=r"edit: was made for Qwen-Image-2\.1, .* is Qwen-Image-Edit; give another"):
        extract.main([str(made), other, f"extract.output_dir={folder}"])


def test_embeddings_of_another_trainer_are_not_converted(made):
    with pytest.raises(
        InputError, match=r"^model: .* is Qwen-Image-2\.1, whose embeddings that trainer does not make"
    ):
        convert.main([str(made)])


# --- licence, card and push ------------------------------------------------------------------------------------------


PUSH = """
import sys
from pathlib import Path
from hf_qie.config.recipe import load_recipe
from hf_qie.hub.publish import push_sets
recipe = load_recipe(sys.argv[1], sys.argv[2:])
folders = {name: Path(recipe.extract.output_dir, name) for name in recipe.tasks}
push_sets(folders, tasks=recipe.tasks, extract=recipe.extract)
"""


def python(hub: Hub, home: Path, *command: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=hub.environment(home), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_licence_is_in_the_log_on_the_card_and_beside_a_pushed_set(made, tmp_path, loopback_hub, caplog):
    folder = shutil.copytree(made.parent / "sets", tmp_path / "sets")
    there = f"extract.output_dir={folder}"
    assert extract.main([str(made), there]) == 0  # is finished
    assert LICENSE_NOTICE in caplog.text
    python(loopback_hub, tmp_path / "home", "-c", PUSH, made, there, "extract.push_to_hub=org/sets")
    assert loopback_hub.read("org/sets", NOTICE).decode() == f"{LICENSE_NOTICE}\n"
    _, metadata, text = loopback_hub.read("org/sets", "README.md").decode().split("---\n", 2)
    metadata = yaml.safe_load(metadata)
    assert metadata["license"] == "other" and metadata["license_name"] == "qwen-research"
    assert metadata["license_link"] == "https://huggingface.co/Qwen/Qwen-Image-2.1/blob/main/LICENSE"
    named = f"[qwen-research]({metadata['license_link']})"
    assert "qwen-image-2.1" in metadata["tags"] and "qwen-image-edit" not in metadata["tags"]
    assert text.rstrip().removesuffix(END.rstrip()).rstrip().endswith(f"{named}\n\n{LICENSE_NOTICE}")
    assert "What Qwen-Image-2.1 sees of 13 edits" in text
    assert "| `image_slots` | `List(int32)` | of each source, how many of `prefix_embeds` stand in front of" in text
    assert "pixels of a source: 9,216 for the prompt encoder, 9,216 for the VAE; the stock pipeline" in text
    (lines,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    show = "print({name: list(value.shape) for name, value in ds[0].items()})"
    shapes = ast.literal_eval(python(loopback_hub, tmp_path / "home", "-c", lines + show))
    first = rows_of(made, "edit")[0]
    assert shapes == {name: list(np.shape(first[name])) for name in ("prefix_embeds", "image_slots", *TEXT)}


def card_of(made: Path, *, compat: dict | None = None, present: DatasetCard | None = None, **options) -> DatasetCard:
    """The card of one set, with fields of its `compat` changed."""
    folder = made.parent / "sets" / "edit"
    provenance, info = read_provenance(folder), load_from_disk(folder).info
    provenance["compat"] |= compat or {}
    provenance["record"] |= {"skipped": {}}
    info.dataset_size = 0
    sets = {"infos": {"edit": info}, "data_files": {"edit": "*.parquet"}, "provenances": {"edit": provenance}}
    return dataset_card(present, repo="org/sets", **sets, **{"license": None} | options)


@pytest.mark.parametrize("field", ["templates", "resampling", "alpha", "positions", "embeddings"])
def test_a_set_that_another_release_made_keeps_licence_and_tag(made, field):
    changed = {field: "as it will be some day"}
    card = card_of(made, compat=changed)
    assert card.data.license_name == "qwen-research"
    assert card.data.tags == ["hf_qie", "qwen-image-2.1", "image-to-image"]
    assert LICENSE_NOTICE in card.text and "What Qwen-Image-2.1 sees of" in card.text


@pytest.mark.parametrize(
    ("license", "found"), [("mit", {"license": "mit"}), (None, None), ("other", None)], ids=["another", "none", "same"]
)
def test_a_licence_that_is_given_later_leaves_nothing_of_the_familys(made, license, found):
    present = card_of(made)
    card = DatasetCard(str(card_of(made, present=DatasetCard(str(present)), license=license)))
    before, after = (
        {key: value for key, value in one.data.to_dict().items() if "license" in key} for one in (present, card)
    )
    assert before.keys() == {"license", "license_name", "license_link"} and after == (found or before)


def test_the_makers_of_sets_are_the_families_of_today_or_all_of_that_name():
    old, new = [[one for one in families() if one.license_name == name] for name in ("", "qwen-research")]
    for family in (*old, *new):
        assert makers_of({"set": {"compat": family.compat}}) == [family]
    assert makers_of({"set": {"compat": old[0].compat | {"positions": "others"}}}) == old
    assert makers_of({"a": {"compat": new[0].compat | {"alpha": "none"}}, "b": {"compat": old[1].compat}}) == [
        *(old[1], new[0])
    ]
