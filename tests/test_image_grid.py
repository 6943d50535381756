"""Images while training: what the official pipeline would make, and no trace in training."""

import json
import logging
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from embedding_sets import WIDTH, write_recipe
from PIL import Image
from ranks import in_ranks
from safetensors.torch import load_file
from small_recipes import columns_of, extract_edits
from training_runs import run

from hf_qie.config.recipe import load_recipe
from hf_qie.data.images import read_image, to_pixels
from hf_qie.errors import InputError
from hf_qie.hub.sampler import Sampler
from hf_qie.models.base import read_family
from hf_qie.models.checkpoint import read_config
from hf_qie.models.prompts import PromptEmbeddings
from hf_qie.models.qwen_image.family import EDIT_PLUS
from hf_qie.models.qwen_image.pipeline import text_to_image
from hf_qie.models.qwen_image.transformer import denoise
from hf_qie.models.qwen_image.vae import LatentEncoder
from hf_qie.plots import GAP_PX, Card
from hf_qie.training.evaluation import HeldOut, split_sets, spread
from hf_qie.training.held_out_edits import HeldOutEdits
from hf_qie.training.image_grid import BOX_PX, draw_grid
from hf_qie.training.sets import open_sets
from hf_qie.training.trainer import EditTrainer

LORA = {"lora": {"rank": 4, "alpha": 8, "dropout": 0.2, "target_modules": "all-linear"}}
TASKS = {"edit": {"data": "edit.jsonl", "eval_rows": 2}, "text_to_image": {"data": "none.jsonl", "eval_rows": 1}}
EVERY_OTHER = {"every": 2, "rows": 3, "num_inference_steps": 2}
NAMES = ["edit-6.png", "edit-7.png", "text_to_image-7.png"]

both_families = pytest.mark.parametrize("family", ["edit_plus", "qwen_image_21"])


@pytest.fixture(autouse=True)
def one_process():
    PartialState(cpu=True)


@pytest.fixture
def family() -> str:
    """The kind of the checkpoint; `both_families` gives others."""
    return "edit_plus"


@pytest.fixture
def recipe(tiny, tmp_path, family) -> Path:
    return write_recipe(tmp_path, tiny(family), tasks=TASKS, trainable=LORA, sampling=EVERY_OTHER)


@pytest.fixture
def extracted(built_once, tiny, edits, family) -> Path:
    """A recipe whose sets are finished."""
    name = "few_edits" if family == "edit_plus" else f"few_edits_{family}"  # which other files of tests share
    return built_once(name, lambda folder: extract_edits(folder, tiny(family), edits)) / "recipe.yaml"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("pictures/**/*.png"))}


def steps_of(trainer: EditTrainer) -> list[dict[str, float]]:
    entries = [{k: v for k, v in e.items() if k.startswith(("loss", "grad"))} for e in trainer.state.log_history]
    return [entry for entry in entries if entry]


def hold(ours: Path, theirs: Path, **tolerance: float) -> None:
    (one,), (other,) = (
        [load_file(path) for path in [*folder.glob("*.safetensors"), *folder.glob("transformer/*.safetensors")]]
        for folder in (ours, theirs)
    )
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **({"atol": 0, "rtol": 0} | tolerance))


# --- what they are ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_sources", [0, 1, 2])
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_the_loop_is_the_official_pipelines(tiny, extracted, photos, num_sources, cfg):
    """In float32, to 1e-4: the same sums in another order, which guidance multiplies."""
    recipe = load_recipe(extracted)
    sampler = Sampler(recipe, checkpoint="base")
    images = [read_image(photos / "images" / f"source_{i:02d}.jpg") for i in (1, 2)[:num_sources]]
    embeddings, size = sampler.embed("Make it red.", images), sampler.size(images)
    seen, pipeline = [], sampler.pipeline if images else text_to_image(sampler.pipeline)
    decode = pipeline.vae.decode
    pipeline.vae.decode = lambda latents, **kwargs: seen.append(latents) or decode(latents, **kwargs)
    image = sampler.generate(embeddings, images, seed=5, num_inference_steps=3, true_cfg_scale=cfg)
    sizes = [EDIT_PLUS.fit(image.size, sampler.family.vae_area_px) for image in images]
    vae = LatentEncoder(recipe.model, revision=None, dtype=torch.float32, device=torch.device("cpu"))
    latents = [vae([to_pixels(EDIT_PLUS.resize(image, s))])[0] for image, s in zip(images, sizes, strict=True)]
    batches = []
    for text in embeddings.texts:
        embeds = torch.cat([embeddings.shared, text])[None]
        sources = torch.cat([torch.zeros(0, 64), *latents])[None]
        batch = {"prompt_embeds": embeds, "prompt_lengths": [embeds.shape[1]]}
        batches.append(
            batch | {"source_latents": sources, "grids": [EDIT_PLUS.grid_of(size), *map(EDIT_PLUS.grid_of, sizes)]}
        )
    with torch.no_grad():
        config = read_config(recipe.model, "scheduler/scheduler_config.json")
        options = {"scheduler_config": config, "true_cfg_scale": cfg, "seed": 5}
        options["sigmas"] = EDIT_PLUS.sampling_sigmas(3, {})
        mine = denoise(sampler.pipeline.transformer, *batches, **options)
    (z,) = seen
    theirs = ((z - vae.mean) / vae.std)[0, :, 0]
    c, h, w = theirs.shape
    theirs = theirs.view(c, h // 2, 2, w // 2, 2).permute(1, 3, 0, 2, 4).reshape(1, -1, 4 * c)
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    levels = np.asarray(vae.decode(mine[0], EDIT_PLUS.grid_of(size)), int) - np.asarray(image, int)
    assert abs(levels).max() <= 1


@pytest.fixture
def drawn(extracted, built_once, family) -> Path:
    """The folder of a run on extracted edits, with images of two rows."""
    return built_once(f"drawn_{family}", lambda folder: draw(extracted, folder / "run")) / "run"


def draw(recipe: Path, folder: Path) -> None:
    training = {"output_dir": str(folder), "use_cpu": True, "per_device_train_batch_size": 2, "max_steps": 2}
    training |= {"logging_steps": 1, "save_steps": 2, "learning_rate": 1e-2, "disable_tqdm": True}
    training |= {"report_to": "tensorboard"}
    sampling = ["sampling.every=1", "sampling.rows=2", "sampling.num_inference_steps=2"]
    held_out = ["tasks.edit.eval_rows=1", "tasks.combine.eval_rows=1"]
    run(recipe, *(f"training.{k}={json.dumps(v)}" for k, v in training.items()), *sampling, *held_out)


@both_families
@pytest.mark.parametrize(("step", "checkpoint"), [(0, "base"), (2, None)])
def test_an_image_on_disk_is_what_sampling_makes_of_that_row(drawn, extracted, step, checkpoint):
    recipe = load_recipe(drawn / "recipe.yaml")
    sampler, sets = Sampler(recipe, checkpoint=checkpoint), open_sets(recipe)
    recipe_family = read_family(recipe.model)
    held_out = HeldOut(split_sets(sets, recipe.tasks)[1], recipe)
    for task in ("edit", "combine"):
        row = sets[task][-1]
        place = next(n for n, (name, _) in enumerate(held_out.places) if name == task)
        matrices = (row[f"text_embeds_{name}"] for name in (held_out[place]["caption"], "drop"))
        name, *slots = recipe_family.prompt_columns
        embeddings = PromptEmbeddings(
            shared=torch.tensor(row[name]).reshape(-1, WIDTH),
            texts=[torch.tensor(m) for m in matrices],
            slots=tuple(row[slots[0]]) if slots else (),
        )
        images = [read_image(Path(path), recipe_family.image_mode) for path in row["source_image"]]
        height, width = row["target_grid"]
        size = (16 * width, 16 * height)
        theirs = sampler.generate(embeddings, images, seed=recipe.seed, num_inference_steps=2, size=size)
        with Image.open(drawn / "pictures" / f"step-{step:06d}" / f"{task}-{row['row']}.png") as image:
            levels = np.abs(np.asarray(image, int) - np.asarray(theirs, int))
        assert levels.mean() < 0.5  # stored source latents are rounded to float16


def test_the_tracker_has_the_images_of_each_step(drawn):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = drawn.rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events), size_guidance={"images": 0}).Reload()
    assert [event.step for event in accumulator.Images("pictures")] == [0, 1, 2]


def test_rows_come_from_each_task_in_turn(recipe):
    loaded = load_recipe(recipe)
    held_out = HeldOut(split_sets(open_sets(loaded), loaded.tasks)[1], loaded)
    assert [held_out.places[number] for number in spread(held_out, 9)] == [
        ("edit", 0),
        ("text_to_image", 0),
        ("edit", 1),
    ]
    assert spread(held_out, 2) == spread(held_out, 9)[:2]


@pytest.mark.parametrize("label", ["instruction", "instruction_cn", "drop_caption"])
def test_a_sheet_names_the_caption_that_a_row_is_evaluated_with(recipe, label):
    loaded = load_recipe(recipe, ["extract.drop_caption=Keep it."])
    data = open_sets(loaded)["text_to_image"]
    if label == "drop_caption":  # of rows without another
        data = data.map(lambda row: {"text_embeds_instruction": None})
    elif label != "instruction":
        data = data.rename_columns({"instruction": label, "text_embeds_instruction": f"text_embeds_{label}"})
    held_out = HeldOut(split_sets({"text_to_image": data}, loaded.tasks)[1], loaded)
    edits = HeldOutEdits(held_out, loaded, objective=None, vae=None, on_device=None)
    text = "Keep it." if label == "drop_caption" else data[-1][label]
    assert text and edits.named_instruction(0) == {label: text}
    assert edits.instruction(0) == text


def test_the_grid_has_sources_target_and_steps_in_columns(tmp_path):
    def plain(colour: str) -> Image.Image:
        return Image.new("RGB", (BOX_PX, BOX_PX), colour)

    boxes = [("source 1", plain("red")), ("source 2", plain("lime")), ("target", plain("blue"))]
    one = Card(heading="a", boxes=boxes, texts={"instruction": "x"})
    two = Card(heading="b", boxes=boxes[2:], texts={"instruction": "x" * 999})
    (tmp_path / "step-000004").mkdir()
    plain("yellow").save(tmp_path / "step-000004" / "b.png")
    grid = draw_grid([one, two], [0, 4], tmp_path)
    colours = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0))
    columns = [columns_of(grid, colour) for colour in colours]
    assert all(len(found) == 1 for found in columns), "the targets of both rows stand in one column"
    starts = [start for ((start, _),) in columns]
    assert np.diff(starts).tolist() == [BOX_PX + GAP_PX, BOX_PX + GAP_PX, 2 * (BOX_PX + GAP_PX)]


# --- what they leave -------------------------------------------------------------------------------------------------


@both_families
def test_training_with_images_is_training_without_bit_for_bit(recipe, tiny, tmp_path, monkeypatch, family):
    """Though something in the making of images draws from every generator."""
    calls, module = [], sys.modules[read_family(str(tiny(family))).denoise.__module__]
    predict = module.predict

    def greedy(*args):
        calls.append((torch.rand(3), np.random.random(3), random.random()))
        return predict(*args)

    monkeypatch.setattr(module, "predict", greedy)
    without = run(recipe, "sampling.every=0", f"training.output_dir={tmp_path / 'without'}")
    trainer = run(recipe)
    assert len(calls) >= 3 * 3 * 2  # images x rows x steps
    assert steps_of(trainer) == steps_of(without)
    hold(tmp_path / "run", tmp_path / "without")
    states = [
        torch.load(tmp_path / name / "checkpoint-4" / "rng_state.pth", weights_only=False)
        for name in ("run", "without")
    ]
    assert torch.equal(states[0]["cpu"], states[1]["cpu"])
    assert states[0]["python"] == states[1]["python"]
    assert not (tmp_path / "without" / "pictures").exists()
    made = files(tmp_path / "run")
    assert [*made] == [f"pictures/step-{step:06d}/{name}" for step in (0, 2, 4) for name in NAMES]
    assert len(set(made.values())) == len(made), "the model has learned, so each image is another"


@both_families
def test_a_resumed_run_keeps_the_images_of_before_and_makes_the_same_grid(recipe, tmp_path):
    run(recipe)
    folder = tmp_path / "run"
    straight, grid = files(folder), (folder / "pictures.png").read_bytes()
    shutil.rmtree(folder / "checkpoint-4")
    kept = (folder / "pictures" / "step-000000" / NAMES[0]).stat().st_mtime_ns
    (folder / "pictures.png").unlink()
    shutil.copytree(folder / "pictures" / "step-000004", folder / "pictures" / "step-000003")  # lost with its step
    run(recipe)
    assert files(folder) == straight
    assert (folder / "pictures.png").read_bytes() == grid
    assert (folder / "pictures" / "step-000000" / NAMES[0]).stat().st_mtime_ns == kept


def test_a_run_from_the_start_leaves_out_the_images_of_another(recipe, tmp_path):
    stale = tmp_path / "run" / "pictures" / "step-000009"
    stale.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(stale / NAMES[0])
    run(recipe, "training.max_steps=2")
    assert not stale.exists()


SHARDED = "training.fsdp=true", "training.fsdp_config={state_dict_type: SHARDED_STATE_DICT}"
WAYS = {"ddp": ["training.use_cpu=true"], "sharded": SHARDED, "bare": [*SHARDED, "sampling.every=0"]}


@pytest.mark.two_rank
@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("edit_plus", ("ddp", "sharded", "bare")),
        ("qwen_image_21", ("sharded",)),
        pytest.param("qwen_image_21", ("ddp", "sharded", "bare"), marks=pytest.mark.soak),
    ],
)
def test_two_ranks_sharded_or_not_make_the_images_of_one_and_train_as_without(recipe, tiny, tmp_path, family, names):
    training = {"use_cpu": None, "per_device_train_batch_size": 2, "adam_epsilon": 1e-3}
    lora = {"lora": LORA["lora"] | {"dropout": 0.0}}
    path = write_recipe(
        tmp_path,
        tiny(family),
        tasks=TASKS,
        trainable=lora,
        training=training,
        sampling=EVERY_OTHER,
        extract={"dtype": "float32"},
    )
    runs = [
        {"recipe": str(path), "overrides": [f"training.output_dir={tmp_path / name}", *WAYS[name]]} for name in names
    ]
    assert in_ranks(runs, ranks=2, log=tmp_path / "log") == [0, 0], (tmp_path / "log").read_text()
    if "bare" in names:
        hold(tmp_path / "sharded", tmp_path / "bare")
    run(
        path,
        "training.use_cpu=true",
        "training.per_device_train_batch_size=4",
        f"training.output_dir={tmp_path / 'one'}",
    )
    for way in (name for name in names if name != "bare"):
        made = files(tmp_path / "one")
        assert len(made) == 9 and [*files(tmp_path / way)] == [*made]
        for name in made:
            one, other = (np.asarray(Image.open(tmp_path / run / name), int) for run in ("one", way))
            assert abs(one - other).mean() < 0.5, name  # float32 sums in another order


# --- what people get wrong, and are told -----------------------------------------------------------------------------


def test_images_without_held_out_rows_are_refused(recipe):
    with pytest.raises(InputError, match=r"sampling\.every: no task holds out rows to evaluate on; set tasks"):
        load_recipe(recipe, ["tasks.edit.eval_rows=0", "tasks.text_to_image.eval_rows=0"])


def test_the_start_says_that_the_vae_is_there(recipe, caplog):
    caplog.set_level(logging.INFO, "hf_qie")
    run(recipe, "training.max_steps=1")
    assert "VAE: loaded by rank 0, for images: 0.03 GB of weights on rank 0, and up to" in caplog.text
    assert "never evaluated on" not in caplog.text
