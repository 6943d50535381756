"""What headers and captions alone tell of a row and of a set, against what extraction makes of them."""

from pathlib import Path

import pytest
from datasets import load_from_disk
from PIL import Image
from small_recipes import WIDTH, extract_edits, image_file, plans_of, weightless, write_recipe

from hf_qie.data.images import BadImage, header_size, read_image
from hf_qie.extraction.estimate import SAMPLE_ROWS, estimate_bytes, outlooks
from hf_qie.extraction.preprocess import ImageCache, prepare
from hf_qie.extraction.stats import survey


@pytest.fixture(scope="session")
def checkpoint(built_once, tiny) -> Path:
    """A checkpoint without weights."""
    return built_once("edit_plus_weightless", lambda folder: weightless(tiny("edit_plus"), folder))


@pytest.fixture(scope="session")
def extracted(built_once, tiny, edits) -> Path:
    """A recipe whose sets are finished."""
    return built_once("few_edits", lambda folder: extract_edits(folder, tiny(), edits)) / "recipe.yaml"


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", [None, 1, 3, 5, 6, 8])
def test_a_header_gives_the_size_that_the_image_is_read_in(tmp_path, suffix, orientation):
    path = image_file(tmp_path / f"p.{suffix}", orientation=orientation)
    assert header_size(path) == read_image(path).size == ((60, 80) if (orientation or 1) >= 5 else (80, 60))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "I;16"])
def test_a_header_of_any_mode_gives_the_size(tmp_path, mode):
    path = image_file(tmp_path / ("p.tif" if mode == "CMYK" else "p.png"), mode=mode)
    assert header_size(path) == read_image(path).size


def test_a_header_says_as_much_as_reading_of_what_is_no_image(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "page.jpg").write_text("<!DOCTYPE html><title>Not found</title>")
    image_file(tmp_path / "whole.png", (300, 300))
    (tmp_path / "head.png").write_bytes((tmp_path / "whole.png").read_bytes()[:20])
    image_file(tmp_path / "long.png", (900, 100))
    image_file(tmp_path / "float.tif", mode="F")
    image_file(tmp_path / "large.png", (9500, 9500), mode="1")
    (tmp_path / "folder.png").mkdir()
    for name in ("empty.png", "page.jpg", "head.png", "long.png", "float.tif", "large.png", "folder.png", "gone.png"):
        with pytest.raises(BadImage) as read:
            read_image(tmp_path / name)
        with pytest.raises(BadImage) as header:
            header_size(tmp_path / name)
        assert str(header.value) == str(read.value)


def test_no_pixel_is_decoded(tmp_path):
    path = image_file(tmp_path / "p.jpg", (300, 300))
    path.write_bytes(path.read_bytes()[:700])  # its header, and hardly more
    assert header_size(path) == (300, 300)
    with pytest.raises(BadImage):
        read_image(path)


CAPTIONS = [
    {"instruction": "\nA line break first", "instruction_cn": "  两个空格"},
    {"instruction": "Ends in an emoji 🙂", "instruction_cn": "\n\n"},
    {"instruction": "Has <|im_end|> inside", "instruction_cn": "é ﬁ ½"},  # normal forms differ in length
]


@pytest.mark.parametrize("kind", ["edit_plus", "edit", "text_to_image"])
def test_the_outlook_of_a_row_is_what_it_is_prepared_to(kind, tmp_path, tiny, built_once, photos):
    tasks = {"edit": (1,), "multi": (2, 3), "t2i": (0,)}
    tasks = {"edit_plus": tasks, "edit": {"edit": (1,)}, "text_to_image": {"t2i": (0,)}}[kind]
    images = [str(photos / "images" / f"source_{number:02d}.jpg") for number in (1, 2, 4)]
    rows = {
        name: [
            {"source_image": images[:number], "target_image": images[-1], "inverse_instruction": "Undo.", **captions}
            for number in counts
            for captions in CAPTIONS
        ]
        for name, counts in tasks.items()
    }
    sizes = {} if kind == "edit_plus" else {"source_sample_size": None}
    model = built_once(f"{kind}_weightless", lambda folder: weightless(tiny(kind), folder))
    plans, processor = plans_of(write_recipe(tmp_path, model, rows, extract=sizes), tmp_path / "mapped")
    for plan in plans.values():
        given = list(plan.rows.table)
        for row, look in zip(given, outlooks(given, plan, processor), strict=True):
            prepared = prepare(row, ImageCache([row], plan), plan=plan, processor=processor)
            num_embeds = {}
            for direction in prepared.directions:
                prompt = direction.prompt
                num_embeds[f"{direction.prefix}image_embeds"] = prompt.split - prompt.drop
                for name, branch in zip((*direction.captions, "drop"), prompt.branches, strict=True):
                    num_embeds[f"{direction.prefix}text_embeds_{name}"] = (
                        len(prompt.shared) + len(branch) - prompt.split
                    )
            assert look.num_embeds == num_embeds
            grids = {name: value for name, value in prepared.columns.items() if "_grid" in name}
            assert grids.items() <= look.grids.items()


def test_the_estimate_is_what_extraction_writes(extracted, tmp_path, tiny):
    plans, processor = plans_of(extracted, tmp_path)
    for name, plan in plans.items():
        assert plan.family.encoder_width(str(tiny()), revision=None) == WIDTH
        written = sum(path.stat().st_size for path in (extracted.parent / "sets" / name).glob("*.arrow"))
        # left out are Arrow's own headers, some KB for the rows of a batch: of 7B's vectors it is nothing
        assert 0 < written - estimate_bytes(plan, processor) < 0.02 * written + 6000


def test_the_outlook_counts_every_vector_of_a_set(extracted, tmp_path):
    plans, processor = plans_of(extracted, tmp_path)
    for name, plan in plans.items():
        looks = outlooks(list(plan.rows.table), plan, processor)
        for look, row in zip(looks, load_from_disk(extracted.parent / "sets" / name), strict=True):
            assert look.num_embeds == {name: len(v) for name, v in row.items() if "embeds" in name and v is not None}
            latents = [values for column, values in row.items() if "latents" in column and values]
            grids = [grid for name, value in look.grids.items() for grid in ([value] if "target" in name else value)]
            assert sum(map(len, latents)) == sum(height * width for height, width in grids)  # areas differ here


def test_a_sample_stands_for_all_rows(tmp_path, checkpoint):
    Image.new("RGB", (64, 64)).save(tmp_path / "p.png")
    rows = [{"source_image": "p.png", "target_image": "p.png", "instruction": "x" * (i % 50)} for i in range(1200)]
    assert len(rows) > 2 * SAMPLE_ROWS
    plans, processor = plans_of(write_recipe(tmp_path, checkpoint, {"many": rows}), tmp_path / "mapped")
    whole = survey(plans["many"], processor).num_bytes
    sample = estimate_bytes(plans["many"], processor)
    assert sample == pytest.approx(whole, rel=0.01)  # every caption length as often, by turns
