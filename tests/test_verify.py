"""A finished set against the official pipeline: what passes, and what does not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import load_from_disk
from small_recipes import extract_edits

from hf_qie import check
from hf_qie.data.provenance import PROVENANCE, read_provenance
from hf_qie.errors import InputError
from hf_qie.extraction.verify import Difference, bound, compare
from hf_qie.runtime.files import written


@pytest.fixture(scope="session")
def extracted(built_once, tiny, edits) -> Path:
    """A recipe whose sets are finished."""
    return built_once("few_edits", lambda folder: extract_edits(folder, tiny(), edits)) / "recipe.yaml"


def test_a_good_set_is_the_official_pipelines(extracted, capsys):
    check.main([str(extracted), "--verify", "1"])
    out = capsys.readouterr().out
    assert "edit: 1 rows, made in float32, against QwenImageEditPlusPipeline in float32\n" in out
    assert "beyond rounding" not in out
    for column in ("text_embeds_drop", "image_embeds", "target_latents", "inverse_text_embeds_drop", "source_grids"):
        assert f"  {column} " in out


def test_a_byte_that_changed_on_the_disk_is_told_by_its_file(extracted, tmp_path):
    folder = shutil.copytree(extracted.parent / "sets", tmp_path / "sets")
    file = next((folder / "edit").glob("*.arrow"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    with pytest.raises(InputError, match=f"{file.name} is not what was written"):
        check.main([str(extracted), f"extract.output_dir={folder}", "--verify", "1"])


def altered(extracted: Path, folder: Path, change) -> Path:
    """A copy of the finished sets, a row of the task `edit` at a time through `change`."""
    shutil.copytree(extracted.parent / "sets", folder)
    data = load_from_disk(folder / "edit")
    rows = [change(row) for row in data.to_list()]
    shutil.rmtree(folder / "edit")
    type(data).from_list(rows, features=data.features).save_to_disk(folder / "edit")
    provenance = read_provenance(extracted.parent / "sets" / "edit")
    provenance["record"]["files"] = {path.name: written(path) for path in (folder / "edit").iterdir()}
    (folder / "edit" / PROVENANCE).write_text(json.dumps(provenance), encoding="utf-8")
    return folder


def test_a_set_that_is_off_by_a_thousandth_is_told_by_its_column(extracted, tmp_path, capsys):
    def change(row):
        return row | {"text_embeds_drop": [[x * 1.001 for x in state] for state in row["text_embeds_drop"]]}

    folder = altered(extracted, tmp_path / "sets", change)
    with pytest.raises(
        InputError, match=r"edit: differs by more than rounding in text_embeds_drop; extract it again$"
    ):
        check.main([str(extracted), f"extract.output_dir={folder}", "--verify", "1"])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "beyond rounding" in line)
    assert line.split()[0] == "text_embeds_drop"


def test_a_set_of_other_images_is_refused(extracted, tmp_path):
    folder = altered(extracted, tmp_path / "sets", lambda row: row | {"target_image": "images/other.png"})
    with pytest.raises(InputError, match="has other images than the data now; extract it again"):
        check.main([str(extracted), f"extract.output_dir={folder}", "--verify", "1"])


def test_a_set_made_with_another_drop_caption_is_refused(extracted):
    with pytest.raises(InputError, match="drop_caption differ"):
        check.main([str(extracted), "extract.drop_caption=nothing", "--verify", "1"])


def test_rounding_to_float16_is_within_the_bound_and_a_thousandth_is_not():
    values = torch.randn(200, 96, generator=torch.Generator().manual_seed(0))
    limit = bound(torch.float32)
    assert compare("x", values.half().float(), values).relative < limit
    assert compare("x", (values * 1.001).half().float(), values).relative > limit


def test_another_length_or_grid_is_infinitely_off():
    off = compare("x", torch.zeros(3, 4), torch.zeros(2, 4))
    assert off == Difference(column="x", largest=float("inf"), mean=float("inf"), relative=float("inf"))
    assert compare("x", None, torch.zeros(2, 4)).relative == float("inf")
    assert compare("target_grid", [32, 34], torch.tensor([34, 32])).relative == float("inf")
    assert compare("target_grid", [32, 34], torch.tensor([32, 34])).relative == 0
