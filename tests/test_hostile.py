"""What others made is refused where it is not what it says it is, and nothing in it is run."""

import json
import os
import pickle
import shutil
from pathlib import Path

import embedding_sets
import numpy as np
import pyarrow as pa
import pytest
import small_recipes
import torch
from accelerate import PartialState
from datasets import Dataset, Features, List, Value
from embedding_sets import write_recipe, write_set
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_qie import extract
from hf_qie.config.recipe import load_recipe
from hf_qie.data.embedding_sets import check_columns
from hf_qie.data.provenance import PROVENANCE
from hf_qie.data.schema import matrix
from hf_qie.errors import InputError
from hf_qie.export import main as export
from hf_qie.hub.trained_run import find_trained
from hf_qie.models.checkpoint import saved_tensors
from hf_qie.runtime.files import written
from hf_qie.train import train
from hf_qie.training.checkpoints import COMPLETE, last_checkpoint, mark_complete, misfit
from hf_qie.training.model import build_model
from hf_qie.training.sets import open_sets

LORA = {"lora": {"rank": 4, "alpha": 8, "target_modules": "attention"}}


class Trap:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def sprung(tmp_path) -> Path:
    """What a trap makes; at the end it is not there."""
    path = tmp_path / "sprung"
    yield path
    assert not path.exists()


def test_the_trap_works(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "made")))
    assert (tmp_path / "made").exists()


# --- sets: their provenance


FORGED = {
    "no JSON": "{",
    "a list": [],
    "no compat": {"record": {"model": "m"}},
    "compat a string": {"compat": "1", "record": {"model": "m"}},
    "format a list": {"compat": {"format": [1]}, "record": {"model": "m"}},
    "no record": {"compat": {"format": 1}},
    "model a number": {"compat": {"format": 1}, "record": {"model": 7}},
    "image_root a mapping": {"compat": {"format": 1}, "record": {"model": "m", "request": {"image_root": {}}}},
    "counts a list": {"compat": {"format": 1}, "record": {"model": "m", "counts": [1]}},
    "bytes a string": {
        "compat": {"format": 1},
        "record": {"model": "m", "files": {"a": {"bytes": "1", "sha256": ""}}},
    },
    "a digest missing": {"compat": {"format": 1}, "record": {"model": "m", "files": {"a": {"bytes": 1}}}},
}


@pytest.mark.parametrize("forgery", FORGED)
def test_a_forged_provenance_is_refused_by_its_place(tmp_path, tiny, forgery):
    recipe, forged = load_recipe(write_recipe(tmp_path, tiny())), FORGED[forgery]
    text = forged if isinstance(forged, str) else json.dumps(forged)
    (tmp_path / "sets" / "edit" / PROVENANCE).write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"sets/edit: .*provenance.json.*; fetch or extract the set again$"):
        open_sets(recipe)


def test_a_provenance_nested_beyond_measure_is_refused(tmp_path, tiny):
    recipe = load_recipe(write_recipe(tmp_path, tiny()))
    (tmp_path / "sets" / "edit" / PROVENANCE).write_text("[" * 200_000, encoding="utf-8")
    with pytest.raises(InputError, match=r"cannot read provenance.json"):
        open_sets(recipe)


def test_a_provenance_that_lists_files_elsewhere_has_none_of_them_read(tmp_path, tiny):
    folder, recipe = tmp_path / "sets" / "edit", load_recipe(write_recipe(tmp_path, tiny()))
    provenance = json.loads((folder / PROVENANCE).read_text())
    provenance["record"]["files"] = {"../../recipe.yaml": {"bytes": 1, "sha256": ""}}
    (folder / PROVENANCE).write_text(json.dumps(provenance))
    with pytest.raises(InputError, match=r"sets/edit: recipe.yaml is missing"):
        open_sets(recipe)


WITHOUT_REQUEST = [("staging/request.json", text) for text in ("[", "[]", "{}", '{"compat": 1}')]
WITHOUT_REQUEST.append((PROVENANCE, json.dumps({"compat": {"format": 1}, "record": {"model": "m"}})))


@pytest.mark.parametrize(("file", "text"), WITHOUT_REQUEST)
def test_a_folder_that_does_not_say_what_it_is_made_from_is_not_gone_on_with(tmp_path, tiny, edits, file, text):
    path = tmp_path / "sets" / "edit" / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    recipe = small_recipes.write_recipe(tmp_path, tiny(), {"edit": edits / "edit.jsonl"})
    with pytest.raises(InputError, match=r"sets/edit: does not say what it is made from, .*; delete it and start"):
        extract.main([str(recipe)])


# --- sets: their columns


@pytest.fixture(scope="module")
def rows(tmp_path_factory, tiny) -> list[dict]:
    """Whole rows of one source each."""
    return Dataset.load_from_disk(write_set(tmp_path_factory.mktemp("whole") / "set", tiny(), rows=4)).to_list()


@pytest.fixture(scope="module")
def features(tmp_path_factory, tiny) -> Features:
    return Dataset.load_from_disk(write_set(tmp_path_factory.mktemp("types") / "set", tiny(), rows=1)).features


def test_a_whole_set_passes(rows, features):
    check_columns(Dataset.from_list(rows, features=features), where="set")


WRONG_TYPES = {
    "row": Value("string"),
    "num_sources": Value("int64"),
    "image_embeds": List(List(Value("float32"), length=96)),
    "text_embeds_instruction": matrix(48),
    "target_latents": matrix(32),
    "target_grid": List(Value("int32")),
    "source_grids": List(Value("int32")),
}


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_a_column_of_another_type_is_refused(features, name):
    changed = Features(features | {name: WRONG_TYPES[name]})
    at = f"column {name.replace('target_latents', 'source_latents')}"  # of latents the target's are the measure
    with pytest.raises(InputError, match=rf"set: {at}: got .*, expected .*extract it again|has no column"):
        check_columns(Dataset.from_dict({name: [] for name in changed}, features=changed), where="set")


@pytest.mark.parametrize("name", ["row", "image_embeds", "text_embeds_drop", "target_latents", "source_grids"])
def test_a_missing_column_is_refused(rows, features, name):
    data = Dataset.from_list(rows, features=features).remove_columns([name])
    with pytest.raises(InputError, match=f"set: has no column {name}"):
        check_columns(data, where="set")


def more(row: dict, name: str) -> dict:
    return {name: [*row[name], row[name][0]]}


WRONG_ROWS = {
    "fewer latents than the grid": lambda row: {"target_latents": row["target_latents"][:-1]},
    "more latents than the grids": lambda row: more(row, "source_latents"),
    "another number of sources": lambda row: {"num_sources": 2},
    "a grid without area": lambda row: {"target_grid": [0, 4], "target_latents": []},
    "a negative side": lambda row: {"target_grid": [-4, -4]},
    "a side beyond all positions": lambda row: {"target_grid": [2_000_000_000, 4]},
    "no grid": lambda row: {"target_grid": None},
    "half a grid": lambda row: {"target_grid": None, "target_latents": None},
    "no states of images": lambda row: {"image_embeds": None},
    "no drop caption": lambda row: {"text_embeds_drop": []},
    "no row": lambda row: {"row": None},
    "a negative row": lambda row: {"row": -1},
}


@pytest.mark.parametrize("wrong", WRONG_ROWS)
def test_a_row_that_does_not_hold_together_is_refused(rows, features, wrong):
    changed = [*rows[:2], rows[2] | WRONG_ROWS[wrong](rows[2]), rows[3]]
    with pytest.raises(InputError, match=r"^set: .*column .*; the set is damaged, or not what extract.py makes"):
        check_columns(Dataset.from_list(changed, features=features), where="set")


def test_offsets_that_lead_beyond_a_file_are_refused(tmp_path, tiny):
    recipe = load_recipe(write_recipe(tmp_path, tiny()))
    path = tmp_path / "sets" / "edit" / "data-00000-of-00001.arrow"
    whole, offsets = path.read_bytes(), np.arange(0, 9 * 16, 16, dtype=np.int32)  # of the latents of eight rows
    assert whole.count(offsets.tobytes()) == 1
    for place, value in ((8, 1 << 28), (4, 1 << 28), (4, -16)):
        forged = offsets.copy()
        forged[place] = value
        path.write_bytes(whole.replace(offsets.tobytes(), forged.tobytes()))
        with pytest.raises(InputError, match=r"sets/edit: (column target_latents: |does not open as a dataset)"):
            open_sets(recipe)


@pytest.mark.parametrize("file", ["data-00000-of-00001.arrow", "state.json", "dataset_info.json"])
@pytest.mark.parametrize("content", ["pickle", "nothing", "half"])
def test_files_of_a_set_that_are_something_else_are_refused(tmp_path, tiny, sprung, file, content):
    recipe = load_recipe(write_recipe(tmp_path, tiny()))
    path = tmp_path / "sets" / "edit" / file
    whole = path.read_bytes()
    path.write_bytes({"pickle": pickle.dumps(Trap(sprung)), "nothing": b"", "half": whole[: len(whole) // 2]}[content])
    with pytest.raises(InputError, match=r"sets/edit: (does not open as a dataset|has no column|column )"):
        open_sets(recipe)


@pytest.mark.parametrize(
    ("family", "what", "constant", "width", "expected"),
    [
        ("edit_plus", "image_embeds", "WIDTH", 48, 96),
        ("edit_plus", "target_latents", "LATENT_WIDTH", 32, 64),
        ("qwen_image_21", "prefix_embeds", "WIDTH", 48, 96),
    ],
)
def test_a_set_of_another_width_is_refused(tmp_path, tiny, monkeypatch, family, what, constant, width, expected):
    monkeypatch.setattr(embedding_sets, constant, width)
    recipe = load_recipe(write_recipe(tmp_path, tiny(family)))
    with pytest.raises(InputError, match=rf"tasks.edit: its {what} have width {width}, but .* expects {expected}"):
        open_sets(recipe)


def test_what_was_refused_once_is_refused_again(tmp_path, tiny):
    """What was found whole is noted; what was not must not be."""
    recipe, folder = load_recipe(write_recipe(tmp_path, tiny())), tmp_path / "sets" / "edit"
    rows = [row | {"num_sources": 2} for row in Dataset.load_from_disk(folder).to_list()]
    features, provenance = Dataset.load_from_disk(folder).features, json.loads((folder / PROVENANCE).read_text())
    shutil.rmtree(folder)
    Dataset.from_list(rows, features=features).save_to_disk(folder)
    provenance["record"]["files"] = {path.name: written(path) for path in folder.iterdir()}
    (folder / PROVENANCE).write_text(json.dumps(provenance))
    for _ in range(2):
        with pytest.raises(InputError, match=r"column num_sources: is not the number of source_grids \(8 such rows\)"):
            open_sets(recipe)


def test_a_grid_that_is_null_among_those_of_the_sources_is_refused(tmp_path, tiny):
    recipe, folder = load_recipe(write_recipe(tmp_path, tiny())), tmp_path / "sets" / "edit"
    data, provenance = Dataset.load_from_disk(folder), json.loads((folder / PROVENANCE).read_text())
    rows = [row | {"source_grids": [None]} for row in data.to_list()]
    table = pa.Table.from_pylist(rows, schema=data.features.arrow_schema)
    shutil.rmtree(folder)
    Dataset(table, info=data.info).save_to_disk(folder)
    provenance["record"]["files"] = {path.name: written(path) for path in folder.iterdir()}
    (folder / PROVENANCE).write_text(json.dumps(provenance))
    with pytest.raises(InputError, match=r"sets/edit: column source_grids: has null vectors or numbers"):
        open_sets(recipe)


# --- checkpoints


@pytest.fixture
def run(tmp_path, tiny):
    """A run of four steps with a checkpoint at two, and its recipe."""
    recipe = load_recipe(write_recipe(tmp_path, tiny(), trainable=LORA))
    train(recipe, open_sets(recipe))
    for name in ("checkpoint-4", "trainer_state.json"):
        path = tmp_path / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return recipe, tmp_path / "run" / "checkpoint-2"


def sign(checkpoint: Path) -> None:
    """Have digests fit what was put into a checkpoint."""
    known = json.loads((checkpoint / COMPLETE).read_text())
    (checkpoint / COMPLETE).unlink()
    del known["files"]
    mark_complete(checkpoint, **known)


FORGED_COMPLETE = {
    "a list": [],
    "files a list": {"files": ["optimizer.pt"], "identity": {}},
    "no identity": {"files": {}},
}


@pytest.mark.parametrize("forgery", FORGED_COMPLETE)
def test_a_checkpoint_that_does_not_say_what_it_holds_is_passed_over(tmp_path, forgery):
    PartialState(cpu=True)  # for what `last_checkpoint` says
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    (folder / COMPLETE).write_text(json.dumps(FORGED_COMPLETE[forgery]))
    assert misfit(folder) == f"its {COMPLETE} cannot be read"
    assert last_checkpoint(tmp_path) is None


OTHER_WEIGHTS = {
    "of another shape": lambda tensors, name: {name: tensors[name][:1].contiguous()},
    "without one": lambda tensors, name: {name: None},
    "with one more": lambda tensors, name: {f"{name}s": tensors[name].clone()},
}


@pytest.mark.parametrize("change", OTHER_WEIGHTS)
def test_a_checkpoint_with_the_weights_of_another_model_is_refused(tmp_path, tiny, change):
    recipe = load_recipe(write_recipe(tmp_path, tiny(), training={"max_steps": 2}))
    train(recipe, open_sets(recipe))
    (file,) = (tmp_path / "run" / "checkpoint-2" / "transformer").glob("*.safetensors")
    tensors, name = load_file(file), "transformer_blocks.0.attn.to_q.weight"
    changed = OTHER_WEIGHTS[change](tensors, name)
    tensors = {key: tensor for key, tensor in (tensors | changed).items() if tensor is not None}
    save_file(tensors, file, metadata={"format": "pt"})
    sign(tmp_path / "run" / "checkpoint-2")
    longer = load_recipe(tmp_path / "recipe.yaml", ["training.max_steps=4"])
    # torch itself names the one of another shape
    with pytest.raises(
        (InputError, RuntimeError), match=f"{name}(s? is in it or in the model alone|: copying a param)"
    ):
        train(longer, open_sets(longer))


# --- weights


@pytest.mark.parametrize("to", ["lora", "merged"])
def test_a_pickle_in_place_of_an_adapter_is_refused_by_export(run, sprung, to, tmp_path):
    _, checkpoint = run
    (checkpoint / "pytorch_lora_weights.safetensors").write_bytes(pickle.dumps(Trap(sprung)))
    sign(checkpoint)
    with pytest.raises(InputError, match=r"pytorch_lora_weights.safetensors does not load as a LoRA"):
        export([str(checkpoint), "--to", to])


BAD_ADAPTERS = {
    "of whole numbers": lambda tensor: tensor.to(torch.int32),
    "of three dimensions": lambda tensor: tensor[None],
    "of another rank": lambda tensor: torch.cat([tensor, tensor]),
}


@pytest.mark.parametrize("change", BAD_ADAPTERS)
def test_adapters_of_absurd_shape_or_type_are_refused(run, change, tiny, tmp_path):
    _, checkpoint = run
    file = checkpoint / "pytorch_lora_weights.safetensors"
    tensors = load_file(file)
    name = min(key for key in tensors if key.endswith("lora_A.weight"))
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(tensors | {name: BAD_ADAPTERS[change](tensors[name]).contiguous()}, file, metadata=metadata)
    sign(checkpoint)
    with pytest.raises(InputError, match=r"pytorch_lora_weights.safetensors: .*lora_B do not fit each other"):
        _ = find_trained(checkpoint).adapters
    started = load_recipe(
        tmp_path / "recipe.yaml", [f"trainable.lora.init_from={file}", f"training.output_dir={tmp_path / 'other'}"]
    )
    with pytest.raises(InputError, match=r"is not a LoRA of rank 4 on the layers that the recipe names"):
        train(started, open_sets(started))


def test_a_pickle_in_place_of_the_base_is_refused(tmp_path, tiny, sprung):
    model = shutil.copytree(tiny(), tmp_path / "model")
    recipe = load_recipe(write_recipe(tmp_path, model))
    (file,) = (model / "transformer").glob("*.safetensors")
    file.write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(InputError, match=r"model: cannot load the transformer of "):
        train(recipe, open_sets(recipe))
    (file.with_suffix(".bin")).write_bytes(file.read_bytes())
    file.unlink()
    with pytest.raises(InputError, match=r"model: cannot load the transformer of "):
        train(recipe, open_sets(recipe))


@pytest.mark.parametrize("layers", [1, 3])
def test_weights_of_more_or_fewer_blocks_than_the_config_has_are_refused(tmp_path, tiny, layers):
    model = shutil.copytree(tiny(), tmp_path / "model")
    recipe = load_recipe(write_recipe(tmp_path, model))
    path = model / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_layers": layers}))
    with pytest.raises(InputError, match=r"cannot load the transformer of .*: transformer_blocks\.[12]\..* alone$"):
        build_model(recipe)


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_an_index_of_weights_that_is_none_is_refused(tmp_path, tiny, content):
    model = shutil.copytree(tiny(), tmp_path / "model")
    recipe = load_recipe(write_recipe(tmp_path, model))
    (file,) = (model / "transformer").glob("*.safetensors")
    file.with_name(f"{file.name}.index.json").write_text(content)
    file.rename(file.with_name("part.safetensors"))
    with pytest.raises(InputError, match=r"model: cannot load the transformer of "):
        build_model(recipe)


@pytest.mark.parametrize("text", ["[]", "7", "[" * 200_000])
def test_a_config_that_is_no_config_is_refused(tmp_path, tiny, text):
    model = shutil.copytree(tiny(), tmp_path / "model")
    recipe = load_recipe(write_recipe(tmp_path, model))
    (model / "transformer" / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"transformer/config.json(: expected a mapping| is not valid JSON)"):
        open_sets(recipe)


@pytest.mark.parametrize("content", [{"weight_map": {"a": "../../secret.safetensors"}}, {"weight_map": []}, [], {}])
def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path, content):
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(
        InputError, match=r"the weights cannot be read \(.*(secret.safetensors|weight_map|indices|'list')"
    ):
        saved_tensors(tmp_path)


def test_a_header_larger_than_its_file_is_refused(tmp_path):
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes((10**12).to_bytes(8, "little") + b"{}")
    with pytest.raises(InputError, match=r"cannot be read"):
        saved_tensors(tmp_path)
