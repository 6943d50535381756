"""RUN 0: what it tells of a task's rows, and where it stops."""

import asyncio
import json
import re
import shutil
from collections import Counter, namedtuple
from pathlib import Path

import datasets
import pytest
from image_server import image_server
from PIL import Image
from small_recipes import (
    BLUE,
    GREEN,
    RED,
    columns_of,
    extract_edits,
    few_edits,
    image_file,
    plans_of,
    weightless,
    write_recipe,
)

from hf_qie import check, extract
from hf_qie.config.recipe import load_recipe
from hf_qie.errors import InputError
from hf_qie.extraction import contact_sheet as sheet
from hf_qie.extraction.estimate import estimate_bytes
from hf_qie.extraction.stats import KINDS, survey
from hf_qie.models.base import read_family

URLS = ("/p.png", "/gone.png")


@pytest.fixture(scope="session")
def checkpoint(built_once, tiny) -> Path:
    """A checkpoint without weights."""
    return built_once("edit_plus_weightless", lambda folder: weightless(tiny("edit_plus"), folder))


@pytest.fixture(scope="session")
def extracted(built_once, tiny, edits) -> Path:
    """A recipe whose sets are finished."""
    return built_once("few_edits", lambda folder: extract_edits(folder, tiny(), edits)) / "recipe.yaml"


@pytest.fixture
def odd(tmp_path, checkpoint) -> Path:
    """A recipe over rows with every kind of oddness; what is wrong with each stands beside it."""
    plain = {"red": (128, 64), "blue": (64, 128), "green": (64, 128), "wide": (900, 100)}
    colours = {"red": RED, "blue": BLUE, "green": GREEN, "wide": GREEN}
    for name, size in plain.items():
        Image.new("RGB", size, colours[name]).save(tmp_path / f"{name}.png")
    shutil.copy(tmp_path / "red.png", tmp_path / "copy.png")
    Image.new("1", (12000, 12000)).save(tmp_path / "huge.png")
    (tmp_path / "broken.png").write_bytes(b"<html>not found</html>")
    shown = {"source_image": "red.png", "target_image": "blue.png"}
    rows = [
        {**shown, "instruction": "Make it blue.", "instruction_cn": "变成蓝色。", "inverse_instruction": "Undo it."},
        {**shown, "instruction": "Make it blue.", "instruction_cn": "变成蓝色。"},  # the same, but for its inverse
        {**shown, "target_image": "red.png", "instruction": "Keep it."},
        {**shown, "target_image": "copy.png", "instruction": "Keep it."},
        {**shown, "target_image": "broken.png", "instruction": "a"},
        {**shown, "source_image": "wide.png", "instruction": "a"},
        {**shown, "target_image": "huge.png", "instruction": "a"},
        {**shown, "instruction": "one word too many " * 1500},
        {**shown, "instruction": "Put <|image_pad|> here."},
        {**shown, "instruction": " ", "instruction_cn": None},
        {**shown, "source_image": ["red.png", "green.png"], "instruction": "Mix them."},
        {**shown, "source_image": None, "instruction": "Draw a blue field."},
    ]
    extract = {"max_bad_share": 0.5}
    return write_recipe(tmp_path, checkpoint, {"odd": rows}, extract=extract, mix={"same_shape": 2})


@pytest.fixture
def found(odd, tmp_path):
    """The survey of the odd rows."""
    plans, processor = plans_of(odd, tmp_path / "mapped")
    return survey(plans["odd"], processor)


def test_every_row_is_counted_by_its_sources(found):
    assert found.num_rows == 12
    assert found.source_counts == {0: 1, 1: 10, 2: 1}


def test_each_odd_row_is_found_with_its_reason(found):
    told = {kind: {(one.row, one.column, one.path): one.reason for one in found.found(kind)} for kind in KINDS}
    bad = told["bad row"]
    assert {row for row, *_ in bad} == {4, 5, 6, 7, 8}
    assert "it begins with '<html>" in bad[4, "target_image", "broken.png"]
    assert bad[5, "source_image", "wide.png"] == "900 x 100 pixels are longer than 8 to 1"
    assert "12000" in bad[6, "target_image", "huge.png"]
    assert "at most 4092 can be placed" in bad[7, "instruction", None]  # 4096 less half the source's 8 tokens
    assert "<|image_pad|>" in bad[8, "instruction", None]
    assert told["duplicate"] == {(1, "target_image", "blue.png"): "sources, target and captions of row 0"}
    assert set(told["source equals target"]) == {(2, "source_image", "red.png"), (3, "source_image", "red.png")}
    assert [row for row, *_ in told["no caption"]] == [9]
    square = "64 x 128 px, its aspect is 300.0% off that of the last source, 128 x 64 px"
    # with several sources it is the last one, whose shape the pipeline takes
    assert told["other aspect"] == {(row, "target_image", "blue.png"): square for row in (0, 1, 9)}
    assert told["small image"] == {}


def test_sizes_are_those_of_the_good_rows(found):
    assert found.sizes["target_image"] == {(64, 128): 5, (128, 64): 2}
    assert found.sizes["source_image"] == {(128, 64): 6, (64, 128): 1}


def test_a_caption_is_as_long_as_the_tokenizer_says(found, tiny):
    tokenizer = read_family(str(tiny())).load_processor(str(tiny()), revision=None).tokenizer
    good = ["Make it blue.", "Make it blue.", "Keep it.", "Keep it.", "Mix them.", "Draw a blue field."]
    assert found.num_tokens["instruction"] == Counter(len(tokenizer(text)["input_ids"]) for text in good)
    assert found.num_tokens["instruction_cn"] == {len(tokenizer("变成蓝色。")["input_ids"]): 2}
    assert found.num_tokens["inverse_instruction"] == {len(tokenizer("Undo it.")["input_ids"]): 1}


def test_buckets_are_those_that_the_mix_draws_from(found, odd):
    # shapes of the seven good rows: (red to blue) three times, (red to red) twice, two sources once, none once
    assert found.buckets(load_recipe(odd).mix, batch_rows=2) == (4, pytest.approx(2 / 7))
    # with inverses, the row that has one is in a bucket of its own, and so is its inverse
    inverse = load_recipe(odd, ["mix.inverse_share=0.5"]).mix
    assert found.buckets(inverse, batch_rows=2) == (6, pytest.approx(3 / 7))


def test_the_look_needs_no_model_and_tells_all_of_it(odd, capsys):
    check.main([str(odd)])
    out = capsys.readouterr().out
    told = dict(re.findall(r"^  (\S.*?)  +(\S.*)$", out, re.MULTILINE))
    assert out.startswith("odd: 12 rows\n")
    assert told["sources of a row"] == "1 with 0, 10 with 1, 1 with 2"
    assert told["buckets"] == "4; 28.6% of the draws from buckets of fewer rows than a batch, 2"
    assert [told[kind] for kind in KINDS] == ["5", "2", "1", "1", "3", "0", "0"]
    assert "  bad row: row 5: source_image: wide.png: 900 x 100 pixels are longer than 8 to 1\n" in out
    folder = odd.parent / "sets" / "first-look"
    assert all((folder / name).read_bytes()[:4] == b"\x89PNG" for name in ("odd.png", "noise-levels.png"))
    assert f"bad row: and 2 more, all in {folder / 'odd.jsonl'}\n" in out
    rows = [json.loads(line)["row"] for line in (folder / "odd.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == [0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9]


def test_another_aspect_and_an_image_far_too_small_are_found(tmp_path, checkpoint):
    sizes = {"wide": (200, 199), "wider": (102, 100), "square": (100, 100), "small": (31, 31), "enough": (32, 32)}
    for name, size in sizes.items():
        image_file(tmp_path / f"{name}.png", size)
    pairs = [("wide", "square"), ("wider", "square"), ("square", "wider"), ("small", "enough"), ("enough", "small")]
    rows = [{"source_image": f"{one}.png", "target_image": f"{other}.png", "instruction": "a"} for one, other in pairs]
    rows.append({"source_image": ["square.png", "wider.png"], "target_image": "wider.png", "instruction": "a"})
    plans, processor = plans_of(write_recipe(tmp_path, checkpoint, {"sized": rows}), tmp_path / "mapped")
    found = survey(plans["sized"], processor)
    aspects, small = (found.found(kind) for kind in ("other aspect", "small image"))
    assert [one.row for one in aspects] == [1, 2]
    assert aspects[0].reason == "100 x 100 px, its aspect is 2.0% off that of the last source, 102 x 100 px"
    told = "31 x 31 px, less than half of extract.image_sample_size, 64"
    assert [(one.row, one.column, one.reason) for one in small] == [
        (3, "source_image", told),
        (4, "target_image", told),
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("extract.max_bad_share=0.2", r"tasks.odd: 5 of 12 rows are bad, extract.max_bad_share allows 2; .*"),
        ("extract.on_bad_row=fail", r"tasks.odd: 5 of 12 rows are bad, extract.on_bad_row: fail allows none; .*"),
    ],
)
def test_rows_that_extraction_would_not_accept_are_an_error(odd, capsys, override, message):
    with pytest.raises(InputError, match=message):
        check.main([str(odd), override])
    assert capsys.readouterr().out.startswith("odd: 12 rows")


def test_images_in_the_data_are_told_by_their_bytes(tmp_path, checkpoint):
    red, blue = (Image.new("RGB", (64, 64), colour) for colour in (RED, BLUE))
    rows = {"source_image": [red, red, red, red], "target_image": [blue, blue, red, blue], "instruction": list("aaab")}
    images = {"source_image": datasets.Image(), "target_image": datasets.Image()}
    features = datasets.Features({**images, "instruction": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    plans, processor = plans_of(write_recipe(tmp_path, checkpoint, {"saved": tmp_path / "saved"}), tmp_path / "map")
    found = survey(plans["saved"], processor)
    assert [(one.kind, one.row) for one in found.findings] == [("duplicate", 1), ("source equals target", 2)]
    assert columns_of(sheet.contact_sheet(plans["saved"], seed=0), RED)


def test_images_behind_urls_are_fetched_by_the_look_and_not_by_the_estimate(tmp_path, checkpoint):
    (tmp_path / "images").mkdir()
    path = image_file(tmp_path / "images" / "p.png", (128, 64))
    with image_server() as server:
        server.put_folder(path.parent)
        rows = [{"source_image": server.url(name), "target_image": str(path), "instruction": "a"} for name in URLS]
        recipe = write_recipe(tmp_path, checkpoint, {"urls": rows}, extract={"allow_private_urls": True})
        plans, processor = plans_of(recipe, tmp_path / "mapped")
        estimate = estimate_bytes(plans["urls"], processor)
        assert server.asked == []
        found = survey(plans["urls"], processor)
        assert set(server.asked) == set(URLS)
    assert found.sizes["source_image"] == {(128, 64): 1}
    assert [(one.kind, one.row, one.reason) for one in found.findings] == [("bad row", 1, "HTTP 404 Not Found")]
    # that one of two rows is bad the estimate cannot know; a square has more tokens than an image of 2 to 1
    assert estimate == pytest.approx(2 * found.num_bytes, rel=0.15)


DiskUsage = namedtuple("DiskUsage", "total used free")


def test_the_look_refuses_a_disk_that_is_too_small(odd, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: DiskUsage(10**9, 0, 12_345))
    with pytest.raises(InputError, match=r"extract.output_dir: \S*sets: about [\d,]+ bytes to write .* 12,345 free"):
        check.main([str(odd)])


def test_extraction_stops_before_a_model_is_loaded(odd, monkeypatch):
    # the checkpoint has no weights: loading a model would be another error
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: DiskUsage(10**9, 0, 12_345))
    with pytest.raises(InputError, match=r"extract.output_dir: \S*sets: about [\d,]+ bytes to write .* 12,345 free"):
        extract.main([str(odd)])
    assert not (odd.parent / "sets").exists()


def test_a_look_may_be_taken_from_a_notebook(extracted, capsys):
    async def cell():
        check.main([str(extracted)])

    asyncio.run(cell())
    assert capsys.readouterr().out.startswith("edit: 6 rows")


def test_what_is_written_already_needs_no_room(extracted, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: DiskUsage(10**9, 0, 0))
    check.main([str(extracted)])
    assert ": about 0 bytes to write (0.00 GB)" in capsys.readouterr().out


def with_processor(model: Path, folder: Path, **size: int) -> Path:
    """A copy of a checkpoint of Qwen-Image-2.1 whose processor keeps images in these areas, in pixels."""
    shutil.copytree(model, folder)
    path = folder / "processor" / "processor_config.json"
    config = json.loads(path.read_text())
    config["image_processor"]["size"] |= size
    path.write_text(json.dumps(config))
    return folder


def test_a_size_of_sources_that_extraction_refuses_is_refused_here(tmp_path, tiny, edits):
    model = with_processor(tiny("qwen_image_21"), tmp_path / "model", shortest_edge=256**2)
    sizes = {"source_sample_size": 128}
    path = write_recipe(tmp_path, model, few_edits(edits, edit=1), extract=sizes)
    for program, *options in ((check,), (check, "--memory"), (extract,)):
        with pytest.raises(InputError, match=r"^extract.source_sample_size: 128: the processor of .* once more"):
            program.main([str(path), *options])


def test_a_size_of_sources_that_extraction_takes_is_taken_here(tmp_path, tiny, edits):
    """Although the processor would not keep the family's own size."""
    model = with_processor(tiny("qwen_image_21"), tmp_path / "model", longest_edge=512**2)
    path = write_recipe(tmp_path, model, few_edits(edits, edit=1), extract={"source_sample_size": 128})
    check.main([str(path)])
    check.main([str(path), "--memory"])
    assert extract.main([str(path)]) == 0


def test_draws_that_cannot_share_a_row_are_refused_before_anything_takes_time(odd, tmp_path, capsys):
    several = ["mix.draws_per_row=4", "training.per_device_train_batch_size=8"]
    for program, *options in ((check,), (check, "--memory"), (extract,)):
        with pytest.raises(InputError, match=r"^mix.draws_per_row: 4, but what the transformer of .* set it to 1$"):
            program.main([str(odd), *several, *options])
    assert capsys.readouterr().out == "" and not (odd.parent / "sets").exists()


def test_without_a_finished_set_there_is_nothing_to_verify(odd):
    with pytest.raises(InputError, match="no finished embedding set; run"):
        check.main([str(odd), "--verify", "1"])
