"""A line in the table of columns is all that a new column of the set takes, beside the code that computes it."""

import json

import numpy as np
import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from datasets import Dataset, DatasetInfo, Features, List, Value, load_from_disk
from PIL import Image
from small_recipes import plans_of, write_recipe

from hf_qie.config.recipe import load_recipe
from hf_qie.data import schema
from hf_qie.data.embedding_sets import check_columns
from hf_qie.data.schema import ALWAYS, TEXT, Column, matrix
from hf_qie.errors import InputError
from hf_qie.extract import main as extract
from hf_qie.extraction.contact_sheet import given
from hf_qie.extraction.estimate import outlooks
from hf_qie.extraction.verify import beyond, bound, verify_set
from hf_qie.hub.dataset_card import _columns as described
from hf_qie.training.sets import open_sets
from hf_qie.training.setup import build_trainer

SIDE_PX = 64  # of the masks


def coverage(images: list[Image.Image], grid: tuple[int, int]) -> np.ndarray:
    """`[S, 1]`: how much of each latent token of the target the mask covers."""
    height, width = grid
    covered = np.asarray(images[0].convert("L").resize((width, height), Image.Resampling.BOX))
    return covered.reshape(-1, 1) / 255


MASK = (
    Column("mask_image", "image", "path of the mask", TEXT),
    Column("mask", "values", "covered part of a token", matrix(1), of="mask_image", inverse=ALWAYS, compute=coverage),
    Column("mask_latents", "latents", "latents of the mask, in the target's size", of="mask_image", inverse=ALWAYS),
)


@pytest.fixture
def masked(monkeypatch):
    """The table with a mask; the parts of the package find it there."""
    monkeypatch.setattr(schema, "COLUMNS", (*schema.COLUMNS, *MASK))
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def recipe(tmp_path, tiny, edits, masked):
    """A recipe over six edits with a mask each, of which the right part is covered; the last has lost its file."""
    rows = [json.loads(line) for line in (edits / "edit.jsonl").read_text(encoding="utf-8").splitlines()[:6]]
    for number, row in enumerate(rows):
        pixels = np.zeros((SIDE_PX, SIDE_PX), np.uint8)
        pixels[:, SIDE_PX // 2 :] = 255
        Image.fromarray(pixels).save(tmp_path / f"mask_{number}.png")
        for key in ("source_image", "target_image"):
            row[key] = str(edits / row[key])
        row["mask_image"] = f"mask_{number}.png"
    (tmp_path / "mask_5.png").unlink()
    return write_recipe(
        tmp_path,
        tiny(),
        {"edit": rows},
        extract={"max_bad_share": 0.5},
        mix={"inverse_share": 0.5},
        trainable={"lora": {"rank": 4, "alpha": 8}},
        training={
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "per_device_train_batch_size": 2,
            "max_steps": 16,
            "disable_tqdm": True,
        },
    )


def test_a_new_image_column_is_read_checked_stored_described_and_loaded(recipe, tmp_path):
    assert extract([str(recipe)]) == 0
    folder = tmp_path / "sets" / "edit"
    data = load_from_disk(folder)

    # checked: a mask that is not there is a bad row with its column and path
    (bad,) = map(json.loads, (folder / "bad_rows.jsonl").read_text(encoding="utf-8").splitlines())
    assert (bad["row"], bad["column"], bad["path"]) == (5, "mask_image", "mask_5.png")

    # stored: paths, what is computed of the masks, and their latents, for the inverse too
    new = ["mask_image", "mask", "mask_latents", "inverse_mask", "inverse_mask_latents"]
    assert [name for name in data.column_names if "mask" in name] == new
    assert data.features["mask_image"] == Value("string") and data.features["mask"] == matrix(1)
    assert data.features["mask_latents"] == List(List(Value("float16"), length=64))
    for row in data:
        height, width = row["target_grid"]
        covered = np.array(row["mask"]).reshape(height, width)
        assert (covered[:, : width // 2] == 0).all() and (covered[:, -(width // 2) :] == 1).all()
        assert np.shape(row["mask_latents"]) == (height * width, 64)

    # listed on the card
    info = DatasetInfo(features=data.features)
    assert ("mask_image", "string", "path of the mask") in described(info)
    assert [name for name, _, meaning in described(info) if meaning == "covered part of a token"] == [
        "mask",
        "inverse_mask",
    ]

    # opened, validated, mixed and loaded into a batch
    PartialState(cpu=True)
    loaded = load_recipe(recipe)
    trainer, _ = build_trainer(loaded, open_sets(loaded))
    directions = set()
    for batch in trainer.get_train_dataloader():
        assert batch["mask"].shape == (2, batch["target_latents"].shape[1], 1)
        assert batch["mask_latents"].shape == batch["target_latents"].shape
        for place, draw in enumerate(batch["draw"]):
            planned = trainer.train_dataset.plan.data[draw // 2]
            (row,) = (one for one in data if one["row"] == batch["row"][place])
            prefix = "inverse_" if planned["inverse"] else ""
            directions.add(prefix)
            for name in ("mask", "mask_latents"):
                wanted = np.array(row[prefix + name], np.float16)
                np.testing.assert_array_equal(batch[name][place].numpy(), wanted)
    assert directions == {"", "inverse_"}


def test_a_new_column_is_validated(recipe, tmp_path):
    assert extract([str(recipe)]) == 0
    data = load_from_disk(tmp_path / "sets" / "edit")
    shorter = data.map(lambda row: {"mask_latents": row["mask_latents"][1:]}, features=data.features)
    wide = Features(data.features | {"mask": matrix(2)})
    for changed, problem in (
        (data.remove_columns("mask"), "has no column mask"),
        (shorter, "column mask_latents: has not the vectors"),
        (Dataset.from_dict({name: [] for name in wide}, features=wide), "column mask: got"),
    ):
        with pytest.raises(InputError, match=f"set: .*{problem}"):
            check_columns(changed, where="set")


def test_a_new_column_is_looked_at_and_verified_before_and_after_extraction(recipe, tmp_path):
    plans, processor = plans_of(recipe, tmp_path / "mapped")
    plan, rows = plans["edit"], list(plans["edit"].rows.table)
    *looks, bad = outlooks(rows, plan, processor)
    assert (bad.column, bad.path) == ("mask_image", "mask_5.png")
    assert [name for name, _ in given(rows[0])] == ["source", "mask"]
    assert extract([str(recipe)]) == 0
    written = sum(path.stat().st_size for path in (tmp_path / "sets" / "edit").glob("*.arrow"))
    assert sum(look.num_bytes for look in looks) == pytest.approx(written, rel=0.05)
    model, device = load_recipe(recipe).model, torch.device("cpu")
    official = plan.family.load_official(model, revision=None, dtype=torch.float32, device=device)
    count, differences = verify_set(plan, official, num_rows=2)
    assert count == 2 and not beyond(differences, limit=bound(torch.float32))
    assert {"mask_latents", "inverse_mask_latents"} <= {difference.column for difference in differences}


def test_a_new_image_is_encoded_while_training_where_no_latents_are_stored(recipe, tmp_path):
    batches = []
    for latents in ("true", "false"):
        overrides = [f"extract.latents={latents}", f"extract.output_dir={tmp_path / latents}"]
        assert extract([str(recipe), *overrides]) == 0
        PartialState(cpu=True)
        loaded = load_recipe(recipe, overrides)
        trainer, _ = build_trainer(loaded, open_sets(loaded))
        batches.append([trainer.on_device(batch) for batch in trainer.get_train_dataloader()])
    for stored, encoded in zip(*batches, strict=True):
        for name in ("target_latents", "source_latents", "mask_latents", "mask"):
            assert torch.equal(stored[name], encoded[name]), name
