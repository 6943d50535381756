"""Files of another trainer as embedding sets: what extract.py made, written as they do, comes back bit for bit."""

import json
import logging
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import load_from_disk
from ports import free_port
from small_recipes import WIDTH, extract_edits

from hf_qie.check import main as check
from hf_qie.config.recipe import load_recipe
from hf_qie.convert import main
from hf_qie.data.provenance import UNKNOWN, read_provenance
from hf_qie.errors import InputError
from hf_qie.extraction.firered import shared_length
from hf_qie.hub.dataset_card import dataset_card
from hf_qie.training.sets import open_sets

TASKS = ("edit", "combine", "text_to_image")
LATENTS = ("target_latents", "source_latents", "inverse_target_latents", "inverse_source_latents")
TEXTS = {"instruction": "en", "instruction_cn": "cn", "drop": "droptext"}


@pytest.fixture(autouse=True)
def fresh_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def extracted(built_once, tiny, edits) -> Path:
    """The recipe of three finished sets; read only."""
    return built_once("few_edits", lambda folder: extract_edits(folder, tiny(), edits)) / "recipe.yaml"


def theirs(extracted: Path, folder: Path) -> None:
    """The sets as the other trainer's extraction leaves them, and `folder`/recipe.yaml over its JSONL files."""
    recipe, tasks = json.loads(extracted.read_text(encoding="utf-8")), {}
    for task in TASKS:
        data, rows = load_from_disk(extracted.parent / "sets" / task), []
        (folder / "pt" / task).mkdir(parents=True)
        for states, row in zip(data, read_jsonl(extracted.parent / f"{task}.jsonl"), strict=True):
            row["edit_image"] = row.pop("target_image")
            for prefix, way in (("", ""), ("inverse_", "_inv")):
                shared = states.get(f"{prefix}image_embeds")
                for text, kind in TEXTS.items():
                    column = f"{prefix}text_embeds_{text if text == 'drop' else prefix + text}"
                    alone = task == "text_to_image" and kind == "droptext"
                    if shared is None or states.get(column) is None:
                        continue
                    file = folder / "pt" / task / f"{states['row']}_{kind}{way}.pt"
                    values = [torch.tensor(part).reshape(-1, WIDTH).float() for part in (shared, states[column])]
                    torch.save(torch.cat(values), folder / "pt" / "null_text_embedding.pt" if alone else file)
                    row |= {} if alone else {f"embeddings_tensor_{kind}{way}": str(file.relative_to(folder))}
            rows.append(row)
        write_jsonl(folder / f"{task}.jsonl", rows)
        tasks[task] = {"data": str(folder / f"{task}.jsonl"), "columns": {"target": "edit_image"}}
    recipe |= {"tasks": tasks, "extract": recipe["extract"] | {"output_dir": str(folder / "sets"), "chunk_rows": 2}}
    training = {"output_dir": str(folder / "run"), "use_cpu": True, "per_device_train_batch_size": 1}
    recipe |= {"mix": {"inverse_share": 0.5, "same_shape": 1}, "trainable": {"lora": {"rank": 4, "alpha": 8}}}
    recipe |= {"training": training | {"max_steps": 2, "logging_steps": 1, "save_steps": 2, "disable_tqdm": True}}
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")


def convert(folder: Path, *overrides: str) -> int:
    return main([str(folder / "recipe.yaml"), *overrides, "--empty_text", str(folder / "pt/null_text_embedding.pt")])


@pytest.fixture(scope="module")
def converted(built_once, extracted) -> Path:
    """A folder with such files and recipe.yaml, and the sets made of them; read only."""

    def build(folder: Path) -> None:
        folder.mkdir()
        theirs(extracted, folder)
        assert convert(folder) == 0
        AcceleratorState._reset_state(reset_partial_state=True)

    return built_once("converted", build)


@pytest.fixture
def work(converted, tmp_path) -> Path:
    """Files and recipe of a test's own, without sets: one task of six edits."""
    for name in ("pt", "edit.jsonl", "recipe.yaml"):
        (shutil.copytree if name == "pt" else shutil.copy)(converted / name, tmp_path / name)
    recipe = json.loads((tmp_path / "recipe.yaml").read_text())
    recipe["tasks"] = {"edit": recipe["tasks"]["edit"] | {"data": str(tmp_path / "edit.jsonl")}}
    recipe["extract"] |= {"output_dir": str(tmp_path / "sets")}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    return tmp_path


@pytest.mark.parametrize("task", TASKS)
def test_a_set_comes_back_bit_for_bit_but_for_its_latents(extracted, converted, task):
    first, back = (load_from_disk(folder / "sets" / task) for folder in (extracted.parent, converted))
    assert back.features == first.features
    names = [name for name in first.column_names if name not in LATENTS]
    assert {"image_embeds", "text_embeds_drop", "target_grid", "source_grids"} < set(names)
    if task == "text_to_image":  # one file for all rows, whose states were computed in batches of several lengths
        names.remove("text_embeds_drop")
        for one, other in zip(first["text_embeds_drop"], back["text_embeds_drop"], strict=True):
            torch.testing.assert_close(torch.tensor(one), torch.tensor(other), atol=2e-3, rtol=2e-3)  # of float16
    assert back.select_columns(names)[:] == first.select_columns(names)[:]
    for name in set(LATENTS) & set(back.column_names):
        assert back.data.column(name).null_count == len(back)


def test_what_is_not_known_of_the_states_is_said(converted, extracted):
    compat, made = (read_provenance(folder / "sets" / "edit")["compat"] for folder in (converted, extracted.parent))
    assert compat.keys() == made.keys()
    known = {field for field, value in compat.items() if value != UNKNOWN}
    assert known == {"format", "vae", "vae_area_px"}
    assert compat["vae_area_px"] == made["vae_area_px"]
    record = read_provenance(converted / "sets" / "edit")["record"]
    assert record["model"] == UNKNOWN and record["dtype"] == "float32"
    assert record["counts"]["rows_in"] == record["counts"]["rows_out"] == 6


def test_such_sets_train_beside_others_with_one_warning_each(converted, extracted, root):
    overrides = [f"tasks.combine.embeddings={extracted.parent / 'sets' / 'combine'}"]
    overrides += [f"training.output_dir={converted / 'run'}"]
    done = subprocess.run(
        [sys.executable, str(root / "hf_qie/train.py"), str(converted / "recipe.yaml"), *overrides],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if "embeddings were computed by another trainer" in line]
    assert len(told) == 2
    assert "tasks.edit: " in told[0] and "encoder, processor, templates" in told[0]
    assert (converted / "run" / "checkpoint-2" / "complete.json").is_file()


def test_verify_tells_how_far_such_states_are_from_the_pipelines(converted, capsys):
    assert not check([str(converted / "recipe.yaml"), "--verify", "1"])
    told = capsys.readouterr().out
    assert told.count("its embeddings were computed by another trainer") == len(TASKS)
    assert "text_embeds_instruction_cn" in told and "target_latents" not in told


def test_what_is_known_and_differs_is_still_refused(converted, extracted, tmp_path):
    shutil.copytree(converted / "sets", tmp_path / "sets")
    path = tmp_path / "sets" / "edit" / "provenance.json"
    provenance = json.loads(path.read_text())
    provenance["compat"]["vae_area_px"] = 64 * 64
    path.write_text(json.dumps(provenance))
    with pytest.raises(InputError, match=r"tasks\.combine: .* does not fit the set of task edit: vae_area_px differ"):
        open_sets(load_recipe(converted / "recipe.yaml", [f"extract.output_dir={tmp_path / 'sets'}"]))


def test_sets_that_a_third_does_not_know_are_compared_all_the_same(converted, extracted, tmp_path):
    for task in ("combine", "text_to_image"):
        shutil.copytree(extracted.parent / "sets" / task, tmp_path / task)
    path = tmp_path / "text_to_image" / "provenance.json"
    provenance = json.loads(path.read_text())
    provenance["compat"]["drop_caption"] = "nothing"
    path.write_text(json.dumps(provenance))
    overrides = [f"tasks.{task}.embeddings={tmp_path / task}" for task in ("combine", "text_to_image")]
    with pytest.raises(InputError, match=r"tasks\.text_to_image: .* fit the set of task combine: drop_caption differ"):
        open_sets(load_recipe(converted / "recipe.yaml", overrides))


def test_started_again_it_has_nothing_to_do(converted, tmp_path, caplog):
    caplog.set_level("INFO", logger="hf_qie.convert")
    folder = shutil.copytree(converted / "sets", tmp_path / "sets")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.arrow")}
    assert convert(converted, f"extract.output_dir={folder}") == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.arrow")} == before


def test_launches_that_share_the_chunks_leave_the_set_of_one(converted, tmp_path):
    """And so does a launch that goes on where another was killed: chunks that are there are left alone."""
    for shard in ("[1, 2]", "[0, 2]"):
        assert convert(converted, f"extract.output_dir={tmp_path}", f"extract.shard={shard}") == 0
        AcceleratorState._reset_state(reset_partial_state=True)
        assert (tmp_path / "edit" / "provenance.json").exists() == (shard == "[0, 2]")
    for path in (converted / "sets" / "edit").glob("*.arrow"):
        assert (tmp_path / "edit" / path.name).read_bytes() == path.read_bytes()


def test_a_card_of_such_a_set_says_what_is_not_known(converted):
    provenance = read_provenance(converted / "sets" / "edit")
    provenance["record"] |= {"skipped": {}}
    info = load_from_disk(converted / "sets" / "edit").info
    info.dataset_size = 0
    files = {"edit": "data/*.parquet"}
    card = dataset_card(
        None, repo="a/b", infos={"edit": info}, data_files=files, provenances={"edit": provenance}, license=None
    )
    assert "not known of them: encoder, processor, templates, vlm_area_px, resampling, positions, drop_caption" in (
        " ".join(card.text.split())
    )


def test_the_page_on_migration_says_how(root, converted, tiny, tmp_path):
    """Its recipe and its command, with a tiny checkpoint, where a reader would have the files."""
    page = (root / "docs" / "migration.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"^```yaml\n(# moved\.yaml\n.*?)^```$", page, flags=re.M | re.S)
    (command,) = re.findall(r"^python (hf_qie/convert\.py .*)$", page, flags=re.M)
    (tmp_path / "moved.yaml").write_text(recipe, encoding="utf-8")
    shutil.copy(converted / "pt" / "null_text_embedding.pt", tmp_path)
    for task in ("edit", "text_to_image"):
        rows = read_jsonl(converted / f"{task}.jsonl")
        for row in rows:
            row |= {key: str(converted / path) for key, path in row.items() if key.startswith("embeddings_tensor_")}
        (tmp_path / "meta" / task).mkdir(parents=True)
        write_jsonl(tmp_path / "meta" / task / f"{task}_rank_000.jsonl", rows)
    (tmp_path / "hf_qie").symlink_to(root / "hf_qie")
    subprocess.run([sys.executable, *shlex.split(command), f"model={tiny()}"], cwd=tmp_path, check=True)
    assert {len(load_from_disk(tmp_path / "outputs/moved" / task)) for task in ("edit", "text_to_image")} == {6, 3}


# --- what is wrong with files --------------------------------------------------------------------------------------


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("was-run",)


def rotten(path: Path, save: Callable[[Path], object]) -> Path:
    path.unlink(missing_ok=True)
    save(path)
    return path


def rows_of(states: object) -> Callable[[Path], object]:
    return lambda path: torch.save(states, path)


BROKEN = {
    "hostile": (
        lambda path: path.write_bytes(pickle.dumps(Hostile(), protocol=2)),
        "holds more than tensors, and is not opened",
    ),
    "hostile in zip": (rows_of({"embeddings_tensor_en": Hostile()}), "holds more than tensors, and is not opened"),
    "empty": (lambda path: path.touch(), "damaged, or holds more than tensors"),
    "text": (lambda path: path.write_text("<html>"), "damaged, or holds more than tensors"),
    "missing": (lambda path: None, "not found"),
    "endless device": (lambda path: path.symlink_to("/dev/zero"), "not found"),
    "narrow": (rows_of(torch.zeros(5, WIDTH - 1)), f"embeddings are 95 wide, those of this checkpoint {WIDTH}"),
    "flat": (rows_of(torch.zeros(WIDTH)), "holds a tensor of [96], expected [tokens, width]"),
    "batch": (rows_of(torch.zeros(2, 5, WIDTH)), "holds a tensor of [2, 5, 96], expected [tokens, width]"),
    "no tokens": (rows_of(torch.zeros(0, WIDTH)), "holds a tensor of [0, 96], expected [tokens, width]"),
    "integers": (rows_of(torch.zeros(5, WIDTH, dtype=torch.long)), "expected a tensor of floating point numbers"),
    "list": (rows_of([1.0]), "holds list, expected a tensor"),
    "other keys": (rows_of({"prompt": torch.zeros(5, WIDTH)}), "has no embeddings_tensor_en; there are prompt"),
    "not finite": (rows_of(torch.full((5, WIDTH), torch.nan)), "values beyond float16 (65504) or not finite"),
    "endless": (rows_of(torch.zeros(1, WIDTH).expand(10**9, WIDTH)), "1000000000 tokens of images and text"),
}


def test_bad_files_are_listed_with_row_column_path_and_reason_and_nothing_is_run(work, monkeypatch):
    monkeypatch.chdir(work)
    rows, first = [], read_jsonl(work / "edit.jsonl")[0]
    for name, (save, _) in BROKEN.items():
        rows.append(first | {"embeddings_tensor_en": str(rotten(work / "pt" / f"{name}.pt", save))})
    rows.append(first)
    write_jsonl(work / "edit.jsonl", rows)
    assert convert(work) == 3
    bad = read_jsonl(work / "sets" / "edit" / "bad_rows.jsonl")
    assert [one["row"] for one in bad] == list(range(len(BROKEN)))
    for one, (name, (_, reason)) in zip(bad, BROKEN.items(), strict=True):
        assert reason in one["reason"], name
        assert one["column"] == "embeddings_tensor_en"
        assert one["path"] == (None if name == "endless" else str(work / "pt" / f"{name}.pt"))
    assert not (work / "was-run").exists()
    assert len(load_from_disk(work / "sets" / "edit")) == 1


@pytest.mark.parametrize("key", ["embeddings_tensor_cn", "embeddings_tensor_droptext", "embeddings_tensor_en_inv"])
def test_a_text_without_states_is_told_by_file_line_and_column(work, key):
    rows = read_jsonl(work / "edit.jsonl")
    del rows[2][key]
    write_jsonl(work / "edit.jsonl", rows)
    with pytest.raises(InputError) as error:
        convert(work, "extract.on_bad_row=fail")
    assert str(error.value) == (
        f"{work / 'edit.jsonl'}:3: {key}: missing, or null; fix it, or set extract.on_bad_row: skip to list such "
        "rows and go on"
    )


def test_states_of_a_caption_that_a_row_lacks_are_left_out(work):
    """For such a caption they encode the empty text."""
    rows = read_jsonl(work / "edit.jsonl")
    for row in rows:
        row["instruction_cn"] = ""
    write_jsonl(work / "edit.jsonl", rows)
    assert convert(work) == 0
    data = load_from_disk(work / "sets" / "edit")
    assert data.data.column("text_embeds_instruction_cn").null_count == len(rows)
    assert data.data.column("text_embeds_instruction").null_count == 0


def test_without_files_for_the_way_back_a_set_has_no_inverse(work):
    rows = [
        {key: value for key, value in row.items() if not key.endswith("_inv")}
        for row in read_jsonl(work / "edit.jsonl")
    ]
    write_jsonl(work / "edit.jsonl", rows)
    assert convert(work) == 0
    assert not [name for name in load_from_disk(work / "sets" / "edit").column_names if name.startswith("inverse_")]


def test_rows_without_images_need_the_states_of_the_empty_text(converted, tmp_path):
    overrides = [f"extract.output_dir={tmp_path}", "tasks.edit.weight=0"]
    assert main([str(converted / "recipe.yaml"), *overrides]) == 3
    (first, *_) = read_jsonl(tmp_path / "text_to_image" / "bad_rows.jsonl")
    assert first["reason"] == "missing; give --empty_text the file of the empty text's embeddings"
    assert not read_jsonl(tmp_path / "edit" / "bad_rows.jsonl")


def test_a_file_may_hold_all_texts_of_a_row(work):
    rows = read_jsonl(work / "edit.jsonl")
    for number, row in enumerate(rows):
        keys = [key for key in row if key.startswith("embeddings_tensor_")]
        torch.save({key: torch.load(work / row.pop(key))[None] for key in keys}, work / f"{number}.pt")
        row["embeds"] = f"{number}.pt"
    before = read_jsonl(work / "edit.jsonl")
    assert convert(work, f"extract.output_dir={work / 'apart'}") == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    write_jsonl(work / "edit.jsonl", rows)
    assert len(before) == len(rows)
    assert convert(work) == 0
    one, other = (load_from_disk(work / name / "edit") for name in ("apart", "sets"))
    assert one[:] == other[:]


def test_a_set_of_other_rows_is_refused_as_its_files_may_have_changed_too(work):
    assert convert(work) == 0
    rows = read_jsonl(work / "edit.jsonl")
    write_jsonl(work / "edit.jsonl", [rows[0] | {"instruction": "Another."}, *rows[1:]])
    with pytest.raises(InputError, match=r"edit: was made with another data; give another extract\.output_dir"):
        convert(work)


def test_jsonl_that_their_extraction_read_and_not_wrote_is_refused(work):
    rows = read_jsonl(work / "edit.jsonl")
    write_jsonl(work / "edit.jsonl", [{k: v for k, v in row.items() if "tensor" not in k} for row in rows])
    with pytest.raises(InputError, match=r"tasks\.edit\.data: no row of .* names a file under embeddings_tensor_en"):
        convert(work)


def test_several_ranks_are_refused(work, root):
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --mixed_precision no"
    launch += f" --main_process_port {free_port()}"
    done = subprocess.run(
        [sys.executable, *launch.split(), str(root / "hf_qie/convert.py"), str(work / "recipe.yaml")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "runs no model and is one process; start it with python" in done.stderr
    assert not (work / "sets").exists()


def test_caption_columns_that_do_not_tell_the_language_are_refused(work):
    with pytest.raises(InputError, match=r"one caption column whose name ends in _cn, and one whose name does not"):
        convert(work, "tasks.edit.columns.captions=[instruction, edit_image]")


def test_an_image_behind_a_url_is_told(work):
    rows = read_jsonl(work / "edit.jsonl")
    rows[1]["source_image"] = "http://127.0.0.1/a.png"
    write_jsonl(work / "edit.jsonl", rows)
    assert convert(work) == 0, "one bad row is allowed"
    (bad,) = read_jsonl(work / "sets" / "edit" / "bad_rows.jsonl")
    assert (bad["row"], bad["column"]) == (1, "source_image")
    assert bad["reason"] == "a URL; training without latents reads images from files"


def test_the_shared_part_ends_where_texts_begin_to_differ_by_more_than_bfloat16_does():
    states = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    other = states.clone()
    other[6:] = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    assert shared_length([states, other]) == 6
    assert shared_length([states.bfloat16(), (other * (1 + 2.0**-9)).bfloat16()]) == 6
    assert shared_length([states, other, states[:4]]) == 4
    assert shared_length([states, other * 1.1]) == 0
    assert shared_length([states]) == 0
    other[2] = -other[2]
    assert shared_length([states, other]) == 2, "what follows a difference is not shared, though it were equal"


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.INFO)
