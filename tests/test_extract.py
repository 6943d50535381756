"""RUN 1: what becomes of rows and images, of bad ones, of a run that is killed, and of one that is started again."""

import asyncio
import gc
import json
import logging
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from ports import free_port
from safetensors.torch import load_file, save_file
from torch.nn.modules.module import register_module_forward_hook

from hf_qie.config.recipe import load_recipe
from hf_qie.data.images import read_image, to_pixels
from hf_qie.data.provenance import read_provenance
from hf_qie.errors import InputError
from hf_qie.extract import main
from hf_qie.extraction import run as extraction
from hf_qie.extraction.chunk_writer import WINDOW_BATCHES, WINDOWS, ChunkWriter
from hf_qie.extraction.manifest import read_manifest
from hf_qie.extraction.plan import family_of_recipe, make_plan
from hf_qie.extraction.preprocess import Prepared
from hf_qie.models.base import read_family
from hf_qie.models.qwen_image.family import EDIT_PLUS
from hf_qie.models.qwen_image.text_encoder import Encoder
from hf_qie.models.qwen_image.vae import LatentEncoder
from hf_qie.models.templates import make_prompt

TARGET_SIDE_PX, SOURCE_SIDE_PX = 64, 96
SMALL = {
    "image_sample_size": TARGET_SIDE_PX,
    "source_sample_size": SOURCE_SIDE_PX,
    "dtype": "float32",
    "batch_size": 2,
    "chunk_rows": 2,
    "num_workers": 2,
}
CPU = {"revision": None, "dtype": torch.float32, "device": torch.device("cpu")}
ROWS = {"edit": 15, "combine": 4, "text_to_image": 3}  # of the synthetic edits
CAPTIONS = ("instruction", "instruction_cn")
INVERSE_CAPTIONS = ("inverse_instruction", "inverse_instruction_cn")


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_recipe(folder: Path, model: Path, data: dict[str, list[dict]], image_root: Path, **settings) -> Path:
    """A recipe over `data`, rows by task, whose sets go to `folder`/sets; JSON is YAML."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks = {
        name: {"data": str(write_jsonl(folder / f"{name}.jsonl", rows)), "image_root": str(image_root)}
        for name, rows in data.items()
    }
    section = {"output_dir": str(folder / "sets"), **SMALL, **settings}
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({"model": str(model), "tasks": tasks, "extract": section}), encoding="utf-8")
    return path


def script(root: Path, *arguments: object, ranks: int = 1) -> list[str]:
    """The command line of RUN 1, by path."""
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(ranks)]
        launch += ["--main_process_port", str(free_port())]
    return [*launch, str(root / "hf_qie" / "extract.py"), *map(str, arguments)]


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a set, but those that name the output folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.name: path.read_bytes() for path in files if path.name not in ("provenance.json", "recipe.yaml")}


def stamps(folder: Path) -> dict[Path, tuple[int, int]]:
    """Which files there are, and that they are the same ones."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def matrix(values) -> np.ndarray:
    return np.array(values, np.float16)


def assert_rounded(stored, exact: torch.Tensor) -> None:
    """`stored` is the float16 rounding of `exact`, which is itself off by 1e-5 where sums run in another order."""
    exact = exact.numpy()
    assert (np.abs(matrix(stored) - exact) <= np.abs(exact) * 2**-11 + 2**-25 + 1e-5).all()


@pytest.fixture(scope="session")
def rows(edits) -> dict[str, list[dict]]:
    """The first synthetic rows of each task."""
    return {task: read_jsonl(edits / f"{task}.jsonl")[:number] for task, number in ROWS.items()}


@pytest.fixture(scope="session")
def extracted(built_once, tiny, edits, rows, root) -> Path:
    """A folder with `sets` of all tasks, made by the script as a user starts it, and what it said in `stderr`."""

    def build(folder):
        recipe = write_recipe(folder, tiny("edit_plus"), rows, edits)
        done = subprocess.run(script(root, recipe), check=True, capture_output=True, text=True)
        assert done.stdout == ""
        (folder / "stderr").write_text(done.stderr)

    return built_once("extracted", build)


@pytest.fixture
def run(tmp_path, tiny, edits, caplog):
    """`run(data, *overrides, model=..., **extract)` -> the exit code of RUN 1 in this process; sets go to tmp_path."""
    caplog.set_level(logging.INFO, logger="hf_qie")

    def start(data, *overrides, model=None, image_root=None, **settings):
        recipe = write_recipe(tmp_path, model or tiny("edit_plus"), data, image_root or edits, **settings)
        return main([str(recipe), *overrides])

    return start


# --- what a set holds


def test_a_set_has_each_row_once_and_in_order(extracted, rows):
    for task, given in rows.items():
        data = load_from_disk(extracted / "sets" / task)
        assert data["row"][:] == list(range(len(given)))
        for got, row in zip(data, given, strict=True):
            sources = row["source_image"] or []
            assert got["source_image"] == ([sources] if isinstance(sources, str) else sources)
            assert got["num_sources"] == len(got["source_image"])
            assert [got["target_image"], got["instruction"], got["instruction_cn"]] == [
                *(row["target_image"], row["instruction"], row["instruction_cn"])
            ]
    assert {len(row["source_image"]) for row in load_from_disk(extracted / "sets" / "combine")} == {2, 3}


def test_a_set_is_nothing_but_its_files(extracted):
    for task, number in ROWS.items():
        chunks = -(-number // SMALL["chunk_rows"])
        assert {
            str(path.relative_to(extracted / "sets" / task)) for path in (extracted / "sets" / task).rglob("*")
        } == {
            *(
                "state.json",
                "dataset_info.json",
                "provenance.json",
                "recipe.yaml",
                "bad_rows.jsonl",
                "row_digests.npy",
            ),
            *(f"data-{i:05d}-of-{chunks:05d}.arrow" for i in range(chunks)),
        }


def test_stored_states_are_the_rounding_of_the_encoders(extracted, rows, edits, tiny):
    family = read_family(str(tiny("edit_plus")))
    processor, encoder = (
        family.load_processor(str(tiny("edit_plus")), revision=None),
        Encoder(str(tiny("edit_plus")), **CPU),
    )

    def check(got, prefix, sources, captions):
        images = [read_image(edits / path) for path in sources]
        images = [EDIT_PLUS.resize(image, EDIT_PLUS.fit(image.size, family.vlm_area_px)) for image in images]
        texts = {f"{prefix}text_embeds_{name}": text for name, text in captions.items() if text}
        texts |= {f"{prefix}text_embeds_drop": " "}
        (states,) = encoder([make_prompt(processor, family.template(len(images)), images, list(texts.values()))])
        assert_rounded(got[f"{prefix}image_embeds"] or np.empty((0, 96)), states.shared)
        for name, state in zip(texts, states.texts, strict=True):
            assert_rounded(got[name], state)

    for task, numbers in {"edit": (0, 4), "combine": (0, 1), "text_to_image": (2,)}.items():
        data = load_from_disk(extracted / "sets" / task)
        for number in numbers:
            row, got = rows[task][number], data[number]
            check(got, "", got["source_image"], {name: row[name] for name in CAPTIONS})
            if row.get("inverse_instruction"):
                check(got, "inverse_", [row["target_image"]], {name: row[name] for name in INVERSE_CAPTIONS})


def test_latents_are_those_of_the_images_in_their_order_and_an_inverse_swaps_the_roles(extracted, rows, edits, tiny):
    encode = LatentEncoder(str(tiny("edit_plus")), **CPU)

    def check(got, prefix, sources, target):
        for name, paths, side_px in (("source", sources, SOURCE_SIDE_PX), ("target", [target], TARGET_SIDE_PX)):
            images = [read_image(edits / path) for path in paths]
            sizes = [EDIT_PLUS.fit(image.size, side_px**2) for image in images]
            latents = [
                encode([to_pixels(EDIT_PLUS.resize(i, size))])[0] for i, size in zip(images, sizes, strict=True)
            ]
            grids = [list(EDIT_PLUS.grid_of(size)) for size in sizes]
            assert_rounded(got[f"{prefix}{name}_latents"], torch.cat(latents))
            expected = {f"{prefix}source_grids": grids} if name == "source" else {f"{prefix}target_grid": grids[0]}
            assert expected.items() <= got.items()

    for task, number in (("edit", 0), ("combine", 1)):
        got, row = load_from_disk(extracted / "sets" / task)[number], rows[task][number]
        check(got, "", got["source_image"], row["target_image"])
        if task == "edit":
            check(got, "inverse_", [row["target_image"]], row["source_image"])


def test_text_to_image_rows_have_no_images_before_the_text(extracted):
    for row in load_from_disk(extracted / "sets" / "text_to_image"):
        assert (row["num_sources"], row["image_embeds"], row["source_latents"], row["source_grids"]) == (0, [], [], [])


def test_a_row_without_inverse_has_none(extracted, rows):
    data = load_from_disk(extracted / "sets" / "edit")
    names = [name for name in data.column_names if name.startswith("inverse_")]
    assert len(names) == 4 + 4  # images, two captions and the drop caption; latents and grids
    for row, given in zip(data, rows["edit"], strict=True):
        assert {row[name] is None for name in names} == {not given["inverse_instruction"]}
    assert {bool(row["inverse_instruction"]) for row in rows["edit"]} == {True, False}
    for task in ("combine", "text_to_image"):  # a task without any has no such columns
        names = load_from_disk(extracted / "sets" / task).column_names
        assert not [name for name in names if name.startswith("inverse_")]


def test_where_both_areas_are_equal_an_inverse_borrows_the_latents(run, rows, tmp_path):
    assert run({"edit": rows["edit"][:1]}, source_sample_size=TARGET_SIDE_PX) == 0
    names = load_from_disk(tmp_path / "sets" / "edit").column_names
    assert [name for name in names if name.startswith("inverse_")] == [
        "inverse_image_embeds",
        *(f"inverse_text_embeds_{caption}" for caption in (*INVERSE_CAPTIONS, "drop")),
    ]


def test_a_notebook_whose_thread_runs_an_event_loop_extracts_the_same_set(run, rows, tmp_path):
    async def cell() -> int:
        return run({"text_to_image": rows["text_to_image"]})

    assert asyncio.run(cell()) == 0
    assert len(load_from_disk(tmp_path / "sets" / "text_to_image")) == ROWS["text_to_image"]


def test_without_inverse_there_are_no_such_columns(run, rows, tmp_path):
    assert run({"edit": rows["edit"][:1]}, inverse=False) == 0
    assert not [name for name in load_from_disk(tmp_path / "sets" / "edit").column_names if "inverse" in name]


def test_states_do_not_depend_on_the_target(run, rows, tmp_path):
    one = rows["edit"][:2]
    other = [{**row, "target_image": rows["combine"][1]["target_image"]} for row in one]
    assert run({"one": one, "other": other}, inverse=False) == 0
    one, other = (load_from_disk(tmp_path / "sets" / name) for name in ("one", "other"))
    assert {name for name in one.column_names if one[name][:] != other[name][:]} == {"target_image", "target_latents"}


def test_captions_fix_the_columns_whether_they_occur_or_not(run, rows, tmp_path):
    english = [{key: value for key, value in row.items() if not key.endswith("_cn")} for row in rows["edit"][:1]]
    assert run({"edit": english}) == 0
    (row,) = load_from_disk(tmp_path / "sets" / "edit")
    assert row["instruction_cn"] is row["text_embeds_instruction_cn"] is None
    assert row["inverse_text_embeds_inverse_instruction"] and not row["inverse_text_embeds_inverse_instruction_cn"]


def test_a_row_without_caption_trains_on_the_drop_caption_and_is_counted(run, rows, tmp_path, caplog):
    blank = {**rows["edit"][0], "instruction": " ", "instruction_cn": None}
    assert run({"edit": [blank, rows["edit"][1]]}) == 0
    row, full = load_from_disk(tmp_path / "sets" / "edit")
    assert row["instruction"] is row["text_embeds_instruction"] is row["text_embeds_instruction_cn"] is None
    assert len(row["text_embeds_drop"]) == len(full["text_embeds_drop"])
    assert "2 rows in, 2 out, 0 bad, 1 without caption; " in caplog.text


def test_a_text_to_image_checkpoint_takes_no_sources(run, rows, tmp_path, tiny):
    model = tiny("text_to_image")
    settings = {"model": model, "source_sample_size": None}
    assert run({"text_to_image": rows["text_to_image"]}, **settings) == 0
    assert len(load_from_disk(tmp_path / "sets" / "text_to_image")) == ROWS["text_to_image"]
    with pytest.raises(InputError, match=r"edit\.jsonl:1: source_image: 1 sources, this checkpoint takes 0"):
        run({"edit": rows["edit"]}, **settings)
    assert run({"edit": rows["edit"][:1]}, "tasks.edit.t2i=true", **settings) == 0
    assert load_from_disk(tmp_path / "sets" / "edit")["num_sources"][:] == [0]


def test_an_edit_checkpoint_shows_one_image_to_encoder_and_vae(tiny, edits, rows, tmp_path, monkeypatch):
    model = tiny("edit")
    side_px = 160  # not the family's 1024: that says no more and takes a minute
    family = replace(read_family(str(model)), vlm_area_px=side_px**2, vae_area_px=side_px**2)
    path = write_recipe(tmp_path, model, {"edit": rows["edit"][:1]}, edits, source_sample_size=None)
    monkeypatch.setattr(extraction, "family_of_recipe", lambda _: family)
    assert main([str(path)]) == 0
    (row,) = load_from_disk(tmp_path / "sets" / "edit")
    width, height = EDIT_PLUS.fit(read_image(edits / row["source_image"][0]).size, side_px**2)
    assert row["source_grids"] == [[height // 16, width // 16]]
    assert len(row["image_embeds"]) == 2 + round(height / 28) * round(width / 28)  # its marks, and no label


# --- what it costs


def test_extraction_asks_cudnn_for_attention_last_unless_the_user_says_otherwise(tiny, tmp_path, edits, monkeypatch):
    recipe = load_recipe(write_recipe(tmp_path, tiny(), {"edit": read_jsonl(edits / "edit.jsonl")[:1]}, edits))
    family = family_of_recipe(recipe)
    monkeypatch.setenv(extraction.CUDNN_LAST, "0")  # is as it was behind the test, set or not
    for given, left in ((None, "1"), ("0", "0")):
        if given is None:
            monkeypatch.delenv(extraction.CUDNN_LAST)
        else:
            monkeypatch.setenv(extraction.CUDNN_LAST, given)
        extraction.load_models(recipe, family, dtype=torch.float32, device=torch.device("cpu"))
        assert os.environ[extraction.CUDNN_LAST] == left


def test_torch_still_knows_the_variable_that_puts_cudnn_last():
    library = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
    if not library.exists():
        pytest.skip("torch was built without CUDA")
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        assert content.find(extraction.CUDNN_LAST.encode()) > 0


@pytest.fixture
def chunk(tmp_path, tiny, edits):
    """`chunk(rows, watch, progress)` -> the counts of one chunk of `rows`; `watch` is shown the models before."""

    def write(rows, *, watch=lambda models: None, progress=lambda num_rows: None, **settings):
        recipe = load_recipe(write_recipe(tmp_path, tiny("edit_plus"), {"task": rows}, edits, **settings))
        family = family_of_recipe(recipe)
        plan = make_plan(recipe, recipe.tasks["task"], family, tmp_path)
        models = extraction.load_models(recipe, family, dtype=torch.float32, device=torch.device("cpu"))
        watch(models)
        with ChunkWriter(plan, models, progress=progress) as writer:
            (tmp_path / "staging").mkdir()
            part = tmp_path / "staging" / "chunk.part"
            writer.write(tmp_path / "chunk.arrow", writer.open(range(len(rows))), part=part, near_end=lambda: None)
        return vars(read_manifest(tmp_path / "chunk.arrow")[0])

    return write


def test_each_image_passes_the_vision_tower_once(chunk, rows, edits):
    num_patches = []

    def watch(models):
        models.encoder.model.visual.register_forward_pre_hook(lambda _, args: num_patches.append(len(args[0])))

    chunk(rows["combine"], watch=watch, batch_size=1)
    sizes = [
        EDIT_PLUS.fit(read_image(edits / name).size, 384**2) for row in rows["combine"] for name in row["source_image"]
    ]
    assert len(num_patches) == len(rows["combine"])
    assert sum(num_patches) == sum(4 * round(width / 28) * round(height / 28) for width, height in sizes)


def test_no_logits_are_computed(chunk, rows):
    widths, vocabulary = set(), []
    hook = register_module_forward_hook(lambda _, args, output: widths.add(getattr(output, "shape", (0,))[-1]))
    try:
        chunk(
            rows["edit"][:1],
            watch=lambda models: vocabulary.append(models.encoder.model.config.text_config.vocab_size),
        )
    finally:
        hook.remove()
    assert 96 in widths and vocabulary[0] not in widths


def test_the_manifest_counts_the_tokens_that_the_language_model_is_given(chunk, rows):
    given = []

    def watch(models):
        language_model = models.encoder.model.language_model
        language_model.register_forward_hook(lambda *args: given.append(args[-1].last_hidden_state[..., 0].numel()))

    counts = chunk(rows["edit"][:3], watch=watch, batch_size=1, inverse=False)  # one prompt a pass: no padding
    assert counts["num_tokens"] == sum(given)


def test_rows_under_way_do_not_grow_with_the_rows(chunk, rows):
    alive, others = [], [thing for thing in gc.get_objects() if type(thing) is Prepared]  # what other tests hold

    def progress(_):
        alive.append(sum(type(thing) is Prepared for thing in gc.get_objects()) - len(others))

    given = rows["text_to_image"] * 24
    chunk(given, progress=progress, batch_size=1, num_workers=4)
    assert len(alive) == -(-len(given) // WINDOW_BATCHES) > 2 * WINDOWS
    assert 0 < max(alive) <= WINDOWS * WINDOW_BATCHES


def num_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files through /proc")
def test_a_chunk_leaves_no_file_open_to_the_garbage_collector(chunk, rows):
    before = []
    gc.disable()
    try:
        chunk(rows["text_to_image"], watch=lambda models: before.append(num_open_files()))
        assert num_open_files() <= before[0]  # those of other tests may be closed meanwhile
    finally:
        gc.enable()


# --- bad rows


def spoil(folder: Path, edits: Path) -> list[dict]:
    """Rows of which 1, 3, 4, 5 and 6 are bad, each for a reason of its own, with their images in `folder`."""
    shutil.copytree(edits, folder, dirs_exist_ok=True)
    row = read_jsonl(edits / "edit.jsonl")
    image = folder / row[1]["target_image"]
    image.write_bytes(image.read_bytes()[:200])
    row[3]["instruction_cn"] = "put <|image_pad|> there"
    row[4]["instruction"] = "a " * 5000
    (folder / row[5]["source_image"]).write_text("<html>404</html>")
    row[6] |= {"source_image": None, "instruction": "a " * 1100}
    return row[:9]


def test_bad_rows_are_listed_and_counted_and_the_others_kept(run, edits, tmp_path, caplog):
    rows = spoil(tmp_path / "spoiled", edits)
    assert run({"edit": rows}, image_root=tmp_path / "spoiled") == 3
    folder = tmp_path / "sets" / "edit"
    bad = {row["row"]: row for row in read_jsonl(folder / "bad_rows.jsonl")}
    assert list(bad) == [1, 3, 4, 5, 6]
    assert load_from_disk(folder)["row"][:] == [0, 2, 7, 8]
    assert [(bad[i]["column"], bad[i]["path"]) for i in bad] == [
        ("target_image", rows[1]["target_image"]),
        ("instruction_cn", None),
        ("instruction", None),
        ("source_image", rows[5]["source_image"]),
        ("instruction", None),
    ]
    assert "truncated" in bad[1]["reason"] and "UnidentifiedImageError" in bad[5]["reason"]
    assert bad[3]["reason"] == "the caption holds <|image_pad|>, which stands for an image"
    sizes = [
        EDIT_PLUS.fit(read_image(edits / rows[4]["source_image"]).size, px**2)
        for px in (SOURCE_SIDE_PX, TARGET_SIDE_PX)
    ]
    most = 4096 - max(max(size) // 16 // 2 for size in sizes)
    assert re.fullmatch(rf"\d+ tokens of images and text, at most {most} can be placed", bad[4]["reason"])
    assert re.fullmatch(r"\d+ tokens of images and text, at most 1024 can be placed", bad[6]["reason"])
    counts = read_provenance(folder)["record"]["counts"]
    assert [counts[name] for name in ("rows_in", "rows_out", "bad")] == [9, 4, 5]
    assert "9 rows in, 4 out, 5 bad (listed in " in caplog.text
    assert "more bad rows than extract.max_bad_share allows" in caplog.text


@pytest.mark.parametrize(("num_bad", "share", "code"), [(1, 0, 0), (2, 0.5, 0), (2, 0.2, 3), (2, 0, 3)])
def test_more_than_one_bad_row_and_more_than_the_share_make_exit_3(run, rows, num_bad, share, code):
    given = [dict(row) for row in rows["text_to_image"] + rows["text_to_image"][:1]]
    for row in given[:num_bad]:
        row["instruction"] = "<|image_pad|>"
    assert run({"text_to_image": given}, max_bad_share=share) == code


def test_a_text_of_as_many_tokens_as_fit_is_not_cut(run, rows, tmp_path):
    row = rows["text_to_image"][0]
    given = [{**row, "instruction": "a" + " a" * (n - 1), "instruction_cn": None} for n in (1019, 1020)]
    assert run({"text_to_image": given}) == 0
    (kept,) = load_from_disk(tmp_path / "sets" / "text_to_image")
    assert len(kept["text_embeds_instruction"]) == 1024  # with the five that end a prompt


def test_values_beyond_float16_make_a_bad_row_and_a_set_may_be_empty(run, rows, tmp_path, tiny):
    model = shutil.copytree(tiny("edit_plus"), tmp_path / "loud")
    weights = load_file(model / "text_encoder" / "model.safetensors")
    (norm,) = (name for name in weights if name.endswith("model.norm.weight"))
    weights[norm] *= 1e6
    save_file(weights, model / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    assert run({"edit": rows["edit"][:3]}, model=model) == 3
    folder = tmp_path / "sets" / "edit"
    assert len(load_from_disk(folder)) == 0
    assert read_jsonl(folder / "bad_rows.jsonl")[2] == {
        **{"row": 2, "column": "image_embeds", "path": None},
        "reason": "values beyond float16 (65504) or not finite",
    }


def test_a_bad_row_ends_the_run_where_the_recipe_says_so(tmp_path, edits, tiny, root):
    rows = spoil(tmp_path / "spoiled", edits)
    settings = {"on_bad_row": "fail", "batch_size": 1, "chunk_rows": 256}
    recipe = write_recipe(tmp_path, tiny("edit_plus"), {"edit": rows}, tmp_path / "spoiled", **settings)
    done = subprocess.run(script(root, recipe), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and "Task" not in done.stderr
    assert done.stderr.splitlines()[-1] == (
        f"tasks.edit: row 1: target_image: {rows[1]['target_image']}: cannot read the image "
        "(OSError: image file is truncated); fix it, or set extract.on_bad_row: skip to list such rows and go on"
    )


# --- bad input


def test_data_are_refused_before_any_weight_is_read(run, rows, tmp_path, tiny):
    model = shutil.copytree(tiny("edit_plus"), tmp_path / "broken")
    for weights in model.rglob("*.safetensors"):
        weights.write_text("no weights at all")
    with pytest.raises(InputError, match=r"edit\.jsonl:1: target_image: gone\.png: No such file"):
        run({"edit": [{**rows["edit"][0], "target_image": "gone.png"}]}, model=model)
    assert not (tmp_path / "sets").exists()
    with pytest.raises(InputError, match=r"safetensors is not a safetensors file; fetch it again"):
        run({"edit": rows["edit"]}, model=model)


def test_a_recipe_of_ready_sets_alone_has_nothing_to_extract(run, rows):
    with pytest.raises(
        InputError, match=r"recipe\.yaml: every task has embeddings already; there is nothing to extract"
    ):
        run({"edit": rows["edit"]}, "tasks.edit.embeddings=sets/ready")


# --- the log


def test_the_closing_line_gives_the_numbers_of_the_set(extracted):
    said = (extracted / "stderr").read_text()
    assert "row/s" in said
    for task, number in ROWS.items():
        folder = extracted / "sets" / task
        counts = read_provenance(folder)["record"]["counts"]
        num_bytes = sum(path.stat().st_size for path in folder.glob("*.arrow"))
        share = counts["num_tokens"] / counts["num_tokens_apart"]
        padding = 1 - counts["num_tokens"] / counts["num_tokens_padded"]
        line = next(line for line in said.splitlines() if f"{task}: {number} rows in" in line)
        assert re.search(
            rf"{task}: {number} rows in, {number} out, 0 bad; {num_bytes / 1e6:.1f} MB in \d+\.\d minutes; "
            rf"{counts['num_tokens']:,} tokens encoded, {share:.1%} of those of each caption by itself, "
            rf"{padding:.1%} padding; left in {folder}$",
            line,
        )
        assert share < (0.7 if task == "text_to_image" else 0.45)


def test_sources_of_another_size_than_the_pipelines_are_warned_of_once(extracted):
    assert (extracted / "stderr").read_text().count("extract.source_sample_size: sources of") == 1


# --- started again


def test_a_finished_set_is_left_alone(run, rows, tmp_path, caplog):
    assert run({"edit": rows["edit"][:3]}) == 0
    before = stamps(tmp_path / "sets")
    assert run({"edit": rows["edit"][:3]}, batch_size=1) == 0
    assert stamps(tmp_path / "sets") == before
    assert "edit: finished before: " in caplog.text


def test_auto_computes_in_float32_without_units_and_takes_a_set_that_was_finished_in_bfloat16(
    run, rows, tmp_path, monkeypatch, caplog
):
    for units, dtype in ((False, "float32"), (True, "bfloat16")):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda units=units: units)
        shutil.rmtree(tmp_path / "sets", ignore_errors=True)
        assert run({"edit": rows["edit"][:1]}, dtype="auto") == 0
        provenance = json.loads((tmp_path / "sets" / "edit" / "provenance.json").read_text())
        assert provenance["record"]["dtype"] == provenance["record"]["request"]["dtype"] == dtype
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert run({"edit": rows["edit"][:1]}, dtype="auto") == 0
    assert "edit: finished before: " in caplog.text
    with pytest.raises(InputError, match="was made with another dtype"):
        run({"edit": rows["edit"][:1]}, dtype="float32")


@pytest.fixture
def again(extracted, tmp_path, tiny, edits, rows):
    """`again(*overrides)` starts RUN 1 over a copy of the finished sets, with the recipe that made them."""
    shutil.copytree(extracted / "sets", tmp_path / "sets")
    recipe = write_recipe(tmp_path, tiny("edit_plus"), rows, edits)
    return lambda *overrides: main([str(recipe), *overrides])


def refusal(again, *overrides) -> str:
    with pytest.raises(InputError) as error:
        again(*overrides)
    return str(error.value)


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("extract.image_sample_size=96", "image_sample_size"),
        ("extract.source_sample_size=64", "vae_area_px"),
        ("extract.drop_caption=''", "drop_caption"),
        ("extract.inverse=false", "inverse"),
        ("extract.dtype=bfloat16", "dtype"),
        ("extract.chunk_rows=3", "chunk_rows"),
        ("tasks.edit.columns.captions=[instruction_cn, instruction]", "columns"),
        ("tasks.edit.t2i=true", "data, t2i"),
    ],
)
def test_a_changed_recipe_is_refused_by_field(again, tmp_path, override, field):
    before = content(tmp_path / "sets" / "edit")
    assert refusal(again, override) == (
        f"{tmp_path}/sets/edit: was made with another {field}; give another extract.output_dir, or set "
        "extract.overwrite: true to delete it and start again"
    )
    assert content(tmp_path / "sets" / "edit") == before


def test_changed_data_or_another_place_of_the_images_are_refused(again, tmp_path, edits, rows):
    shutil.copytree(edits, tmp_path / "moved")
    assert "was made with another data, image_root; " in refusal(again, f"tasks.edit.image_root={tmp_path}/moved")
    write_jsonl(tmp_path / "edit.jsonl", [{**row, "instruction": "other"} for row in rows["edit"]])
    assert "was made with another data (the data changed in all of its 15 rows); " in refusal(again)


def test_another_checkpoint_is_refused_by_part(again, tmp_path, tiny):
    model = shutil.copytree(tiny("edit_plus"), tmp_path / "model")
    config = model / "processor" / "processor_config.json"
    config.write_text(config.read_text() + " ")
    assert "was made with another processor; " in refusal(again, f"model={model}")


def test_overwrite_starts_again_what_changed_and_nothing_else(again, tmp_path, rows):
    write_jsonl(tmp_path / "edit.jsonl", [{**row, "instruction": "other"} for row in rows["edit"][:2]])
    untouched = stamps(tmp_path / "sets" / "combine")
    assert again("extract.overwrite=true") == 0
    assert len(load_from_disk(tmp_path / "sets" / "edit")) == 2
    assert stamps(tmp_path / "sets" / "combine") == untouched


def test_a_folder_of_other_files_is_never_touched(run, rows, tmp_path):
    (tmp_path / "sets" / "edit").mkdir(parents=True)
    (tmp_path / "sets" / "edit" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match=r"holds files that are no embedding set; give another extract.output_dir"):
        run({"edit": rows["edit"]}, "extract.overwrite=true")
    assert (tmp_path / "sets" / "edit" / "thesis.txt").exists()


# --- two ranks, and a rank that is killed


def rank_of(process_id: str) -> str | None:
    environment = Path(f"/proc/{process_id}/environ").read_bytes().split(b"\0")
    return next((entry.partition(b"=")[2].decode() for entry in environment if entry.startswith(b"RANK=")), None)


def kill_a_rank(launcher: subprocess.Popen, folder: Path) -> None:
    """SIGKILL rank 1 once two chunks are whole."""
    deadline = time.monotonic() + 300
    while len(list(folder.glob("data-*.arrow"))) < 2:
        assert launcher.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    (victim,) = (int(child) for child in children if rank_of(child) == "1")
    os.kill(victim, signal.SIGKILL)


@pytest.mark.two_rank
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the rank to kill through /proc")
def test_two_ranks_of_which_one_is_killed_leave_in_the_end_what_one_process_leaves(
    extracted, tmp_path, tiny, edits, rows, root
):
    recipe = write_recipe(tmp_path, tiny("edit_plus"), rows, edits)
    command, folder = script(root, recipe, ranks=2), tmp_path / "sets" / "edit"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as launcher:
        kill_a_rank(launcher, folder)
        launcher.communicate(timeout=60)  # the other rank must not wait for ever
    assert launcher.returncode != 0
    assert not (folder / "provenance.json").exists()
    finished = {path: stamp for path, stamp in stamps(folder).items() if path.match("data-*.arrow")}
    assert 2 <= len(finished) < 8  # of eight
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert finished.items() <= stamps(folder).items()
    for task in ROWS:
        assert content(tmp_path / "sets" / task) == content(extracted / "sets" / task)
        counts, alone = (read_provenance(home / "sets" / task)["record"]["counts"] for home in (tmp_path, extracted))
        assert counts == alone
