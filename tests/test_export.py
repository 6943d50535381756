"""What others load is what was trained: every form, of every kind of checkpoint, to the last bit or to rounding."""

import asyncio
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from diffusers import QwenImageEditPlusPipeline, QwenImageTransformer2DModel
from embedding_sets import write_recipe
from ranks import in_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, BytesStorageMetadata

from hf_qie import export
from hf_qie.config.recipe import load_recipe
from hf_qie.errors import InputError
from hf_qie.hub import export_formats as formats
from hf_qie.hub.scoring import put_weights, weight_files
from hf_qie.hub.trained_run import find_trained
from hf_qie.models.checkpoint import saved_tensors
from hf_qie.training.checkpoints import COMPLETE, mark_complete
from hf_qie.training.dcp_reader import Restricted, sharded_tensors
from hf_qie.training.model import LORA_FILE, build_model, load_weights

LORA = {"lora": {"rank": 4, "alpha": 8, "target_modules": "all-linear"}}  # alpha is not the rank: the scale is 2
SHARDED = [
    "training.use_cpu=false",
    "training.fsdp=true",
    "training.fsdp_config={fsdp_version: 2, state_dict_type: SHARDED_STATE_DICT, activation_checkpointing: true}",
]


@pytest.fixture(scope="module")
def done(built_once, tiny) -> Path:
    """Runs of each kind, by its name: `lora` and `full`, of each `alone`, `sharded` and `cut` (off at step 6)."""

    def build(folder: Path) -> None:
        alone, two = [], []
        for kind, trainable in (("lora", LORA), ("full", {})):
            (folder / kind).mkdir(parents=True)
            path = write_recipe(folder / kind, tiny(), trainable=trainable, training={"learning_rate": 1e-2})

            def run(name: str, *overrides: str, path: Path = path, **more) -> dict:
                return {
                    "recipe": str(path),
                    "overrides": [f"training.output_dir={path.parent / name}", *overrides],
                    **more,
                }

            alone += [run("alone"), run("cut", "training.max_steps=2")]
            two.append(run("sharded", *SHARDED, "training.per_device_train_batch_size=2"))
        assert in_ranks(alone, ranks=1, log=folder / "log") == [0], (folder / "log").read_text()
        assert in_ranks(two, ranks=2, log=folder / "log") == [0, 0], (folder / "log").read_text()
        for kind in ("lora", "full"):  # goes on after its end, and is killed while it saves step 6
            overrides = [f"training.output_dir={folder / kind / 'cut'}", "training.max_steps=8"]
            kill = {"rank": 0, "point": "complete", "call": 2}
            cut = {"recipe": str(folder / kind / "recipe.yaml"), "overrides": overrides, "kill": kill}
            assert in_ranks([cut], ranks=1, log=folder / "log") == [-9], (folder / "log").read_text()

    return built_once("exported", build)


def exported(checkpoint: Path, to: Path, *more: str, dtype: str = "float32") -> Path:
    """The folder that the script leaves."""
    export.main([str(checkpoint), "--output", str(to), "--dtype", dtype, *more])
    return to


def velocity(transformer: torch.nn.Module) -> Tensor:
    """What a transformer makes of fixed inputs: a target of 4 x 4 tokens, a source of 2 x 4, a prompt of 5."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return transformer.eval()(
            hidden_states=torch.randn(1, 24, 64, generator=generator),
            encoder_hidden_states=torch.randn(1, 5, 96, generator=generator),
            encoder_hidden_states_mask=None,
            timestep=torch.tensor([0.5]),
            img_shapes=[[(1, 4, 4), (1, 2, 4)]],
            guidance=None,
            return_dict=False,
        )[0]


def as_trained(run: Path) -> torch.nn.Module:
    """The model with the weights of a run, wrapped as training wraps it."""
    PartialState()  # what builds models wants to log
    model = build_model(load_recipe(run / "recipe.yaml"))
    load_weights(model, run)
    return model


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)  # float32 sums in another order


def test_a_sharded_checkpoint_is_scored_as_the_model_that_was_trained(done):
    run = done / "full" / "sharded"
    model = build_model(load_recipe(run / "recipe.yaml")).requires_grad_(False)
    put_weights(model, find_trained(run / "checkpoint-4").folder)
    assert torch.equal(velocity(model), velocity(as_trained(run)))  # whose last weights are those of step 4
    assert {path.suffix for path in weight_files(run / "checkpoint-4")} == {".distcp", ""}  # and .metadata


# --- a LoRA ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["alone", "sharded"])
def test_every_form_of_a_lora_gives_what_the_trained_model_gives(done, tiny, tmp_path, run):
    run = done / "lora" / run
    wanted, base = velocity(as_trained(run)), QwenImageTransformer2DModel.from_pretrained(tiny() / "transformer")
    assert (wanted - velocity(base)).abs().max() > 0.01, "else nothing is compared"
    pipeline = QwenImageEditPlusPipeline.from_pretrained(tiny())
    pipeline.load_lora_weights(exported(run, tmp_path / "lora", "--to", "lora"))
    same(velocity(pipeline.transformer), wanted)
    merged = exported(run, tmp_path / "merged", "--to", "merged")
    same(velocity(QwenImageTransformer2DModel.from_pretrained(merged)), wanted)
    whole = QwenImageEditPlusPipeline.from_pretrained(exported(run, tmp_path / "pipeline", "--to", "pipeline"))
    same(velocity(whole.transformer), wanted)
    comfyui = load_file(exported(run, tmp_path / "comfyui", "--to", "comfyui") / f"{run.name}.safetensors")
    weights = base.state_dict()
    for key, tensor in weights.items():  # the rule of ComfyUI's loader
        at = f"diffusion_model.{key.removesuffix('.weight')}"
        if f"{at}.lora_up.weight" in comfyui:
            up, down, alpha = (comfyui.pop(f"{at}.{part}") for part in ("lora_up.weight", "lora_down.weight", "alpha"))
            tensor += alpha / down.shape[0] * up @ down
    assert not comfyui, "a key that ComfyUI does not know is left out with a warning"
    base.load_state_dict(weights)
    same(velocity(base), wanted)


def test_diffusers_reads_comfyuis_file_too(done, tiny, tmp_path):
    run = done / "lora" / "alone"
    pipeline = QwenImageEditPlusPipeline.from_pretrained(tiny())
    pipeline.load_lora_weights(exported(run, tmp_path / "to", "--to", "comfyui"), weight_name="alone.safetensors")
    same(velocity(pipeline.transformer), velocity(as_trained(run)))


def test_a_lora_is_bfloat16_unless_told_and_a_merged_one_is_rounded_once(done, tiny, tmp_path):
    run = done / "lora" / "alone"
    export.main([str(run), "--output", str(tmp_path / "lora")])
    ours, theirs = load_file(tmp_path / "lora" / LORA_FILE), load_file(run / LORA_FILE)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key].bfloat16()) for key in theirs)
    merged = load_file(exported(run, tmp_path / "bf16", "--to", "merged", dtype="bfloat16") / formats.WEIGHTS_FILE)
    exact = load_file(exported(run, tmp_path / "fp32", "--to", "merged") / formats.WEIGHTS_FILE)
    assert all(torch.equal(merged[key], exact[key].bfloat16()) for key in exact)


# --- a whole transformer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["alone", "alone/checkpoint-4", "sharded", "sharded/checkpoint-4"])
def test_full_weights_are_those_of_the_run_bit_for_bit(done, tmp_path, run):
    """Those of a checkpoint of sharded state are put together from its shards."""
    wanted = load_file(done / "full" / run.partition("/")[0] / "transformer" / formats.WEIGHTS_FILE)
    assert (done / "full" / run / "transformer").is_dir() == (run != "sharded/checkpoint-4")
    merged = load_file(exported(done / "full" / run, tmp_path / "to") / formats.WEIGHTS_FILE)
    assert merged.keys() == wanted.keys()
    assert all(torch.equal(merged[key], wanted[key]) for key in wanted)


def test_a_pipeline_is_the_base_but_for_its_transformer(done, tiny, tmp_path):
    to = exported(done / "full" / "sharded" / "checkpoint-2", tmp_path / "to", "--to", "pipeline")
    whole = QwenImageEditPlusPipeline.from_pretrained(to)
    same(velocity(whole.transformer), velocity(QwenImageTransformer2DModel.from_pretrained(to / "transformer")))
    base = {path.relative_to(tiny()) for path in tiny().rglob("*") if path.is_file()}
    assert {path.relative_to(to) for path in to.rglob("*") if path.is_file()} == base | {Path("README.md")}
    for path in base:
        if path.parts[0] != "transformer" and path.name != "model_index.json":
            assert (to / path).read_bytes() == (tiny() / path).read_bytes()


def test_a_large_model_is_cut_into_files_that_diffusers_joins(done, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "SHARD_BYTES", 500_000)
    run = done / "lora" / "alone"
    merged = exported(run, tmp_path / "to", "--to", "merged")
    files = sorted(merged.glob("*.safetensors"))
    assert [path.name for path in files] == [
        f"diffusion_pytorch_model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    assert all(path.stat().st_size < 510_000 for path in files)
    same(velocity(QwenImageTransformer2DModel.from_pretrained(merged)), velocity(as_trained(run)))


def test_values_that_were_rounded_before_are_named(done, tmp_path, caplog):
    run = shutil.copytree(done / "full" / "alone", tmp_path / "run")
    path = run / "transformer" / formats.WEIGHTS_FILE
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    exported(run, tmp_path / "rounded", dtype="bfloat16")
    assert "holds" not in caplog.text
    exported(run, tmp_path / "to")
    assert f"{run} holds rounded values; checkpoints of the run may hold float32 ones" in caplog.text
    caplog.clear()
    exported(run / "checkpoint-4", tmp_path / "exact")
    assert "holds" not in caplog.text


# --- which weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_of_an_interrupted_run_the_last_whole_checkpoint_is_taken(done, tmp_path, kind, caplog):
    """Not the weights beside it, which the run left where it first ended, nor those of the step that was cut off."""
    run = done / kind / "cut"
    (weights,) = run.glob("*.safetensors") if kind == "lora" else run.glob("transformer/*.safetensors")
    assert (run / "checkpoint-6").is_dir()
    exported(run, tmp_path / "to")
    assert "checkpoint-6 is skipped" in caplog.text
    ours = load_file(tmp_path / "to" / weights.name)
    wanted = load_file(run / "checkpoint-4" / weights.relative_to(run))
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(ours[key], wanted[key]) for key in wanted)
    assert any(not torch.equal(ours[key], tensor) for key, tensor in load_file(weights).items())
    with pytest.raises(InputError, match=r"checkpoint-6: the checkpoint is incomplete, its complete\.json cannot be"):
        exported(run / "checkpoint-6", tmp_path / "six")
    assert not (tmp_path / "six").exists()


def test_a_run_alone_exports_what_it_trained_into_its_own_folder(done, tmp_path):
    for kind, file in (("lora", f"lora/{LORA_FILE}"), ("full", f"merged/{formats.WEIGHTS_FILE}")):
        run = shutil.copytree(done / kind / "alone", tmp_path / kind)
        export.main([str(run)])
        assert (run / "export" / file).is_file()
    export.main([str(run / "checkpoint-2")])
    assert (run / "export" / "merged-2" / formats.WEIGHTS_FILE).is_file()


# --- what is refused -------------------------------------------------------------------------------------------------


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class ByName:
    """Pickled as Python up to 3.11.3 pickles the member of an enum: by `getattr`."""

    def __init__(self, kind, name):
        self.kind, self.name = kind, name

    def __reduce__(self):
        return getattr, (self.kind, self.name)


def test_a_member_of_torchs_enum_may_come_by_name_and_nothing_else():
    member = _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    assert Restricted(io.BytesIO(pickle.dumps(ByName(_MEM_FORMAT_ENCODING, member.name)))).load() is member
    for kind, name in ((_MEM_FORMAT_ENCODING, "__init__"), (torch.Size, "__class__")):
        with pytest.raises(pickle.UnpicklingError, match=r"it asks for builtins\.getattr"):
            Restricted(io.BytesIO(pickle.dumps(ByName(kind, name)))).load()


def test_the_base_is_of_the_commit_that_the_run_recorded(done, tmp_path):
    run = shutil.copytree(done / "lora" / "alone", tmp_path / "run")
    record = json.loads((run / "run.json").read_text()) | {"commit": "0123abcd"}
    (run / "run.json").write_text(json.dumps(record))
    assert find_trained(run).recipe.revision == "0123abcd"
    assert find_trained(done / "lora" / "alone").recipe.revision is None  # a base that is a folder has no commit


def test_a_relative_base_is_looked_for_where_training_was_started(done, tiny, tmp_path, monkeypatch):
    """In another folder, and under a running event loop, as in a notebook."""
    run = shutil.copytree(done / "lora" / "alone", tmp_path / "run")
    record, recipe = json.loads((run / "run.json").read_text()), (run / "recipe.yaml").read_text()
    assert record["started_in"] == str(Path.cwd())
    (run / "run.json").write_text(json.dumps(record | {"started_in": str(tmp_path / "project")}))
    assert f"model: {tiny()}\n" in recipe
    (run / "recipe.yaml").write_text(recipe.replace(f"model: {tiny()}\n", "model: checkpoints/base\n"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    told = f"{run}/recipe.yaml: model: 'checkpoints/base' is not found from {tmp_path}/project, where training was "
    with pytest.raises(InputError, match=rf"^{re.escape(told)}started, nor from {tmp_path}/elsewhere; "):
        export.main([str(run)])
    (tmp_path / "project" / "checkpoints").mkdir(parents=True)
    (tmp_path / "project" / "checkpoints" / "base").symlink_to(tiny())

    async def cell():
        export.main([str(run), "--to", "merged"])

    asyncio.run(cell())
    assert (run / "export" / "merged" / "config.json").is_file()


def test_a_relative_base_that_is_found_from_here_stays_as_it_was_written(done, tiny, tmp_path, monkeypatch):
    run = shutil.copytree(done / "lora" / "alone", tmp_path / "run")
    record, recipe = json.loads((run / "run.json").read_text()), (run / "recipe.yaml").read_text()
    (run / "run.json").write_text(json.dumps(record | {"started_in": str(tmp_path)}))
    (run / "recipe.yaml").write_text(recipe.replace(f"model: {tiny()}\n", "model: base\n"))
    (tmp_path / "base").symlink_to(tiny())
    monkeypatch.chdir(tmp_path)
    assert find_trained(run).recipe.model == "base"  # the code on its card is to run here


def test_values_of_a_checkpoint_are_those_of_what_trained_not_of_what_is_frozen(done, tmp_path, caplog):
    run = shutil.copytree(done / "full" / "alone", tmp_path / "run")
    path = run / "transformer" / formats.WEIGHTS_FILE
    tensors = load_file(path)
    mixed = {name: tensor if ".1." in name else tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(mixed, path, metadata={"format": "pt"})
    exported(run, tmp_path / "to")
    assert "holds" not in caplog.text


def test_a_lora_without_its_alpha_is_refused(done, tmp_path):
    run = shutil.copytree(done / "lora" / "alone", tmp_path / "run")
    save_file(load_file(run / LORA_FILE), run / LORA_FILE)
    with pytest.raises(InputError, match=r"has no rank and alpha, which train\.py writes"):
        exported(run, tmp_path / "to")


def tampered(done: Path, tmp_path: Path, change) -> Path:
    """A copy of a sharded checkpoint whose metadata went through `change`; its complete.json says that it is whole."""
    run = shutil.copytree(done / "full" / "sharded", tmp_path / "run")
    path = run / "checkpoint-4" / "pytorch_model_fsdp_0" / ".metadata"
    with path.open("rb") as file:
        changed = change(pickle.load(file))
    path.write_bytes(pickle.dumps(changed))
    (run / "checkpoint-4" / COMPLETE).unlink()
    mark_complete(run / "checkpoint-4", step=4, ranks=2, identity={}, settings={})
    return run / "checkpoint-4"


def hostile_planner(metadata, command):
    metadata.planner_data = Hostile(command)
    return metadata


def test_metadata_that_would_run_a_command_are_refused_and_run_nothing(done, tmp_path):
    command = f"touch {tmp_path / 'ran'}"
    checkpoint = tampered(done, tmp_path, lambda metadata: hostile_planner(metadata, command))
    with pytest.raises(InputError, match=r"\.metadata: is refused, it asks for (posix|nt)\.system, which no"):
        exported(checkpoint, tmp_path / "to")
    assert not (tmp_path / "ran").exists()
    pickle.loads((checkpoint / "pytorch_model_fsdp_0" / ".metadata").read_bytes())
    assert (tmp_path / "ran").exists(), "else it was never dangerous"


def leads_out(metadata):
    stored = next(iter(metadata.storage_data.values()))
    stored.relative_path = "../optimizer_0/__0_0.distcp"
    return metadata


def of_no_file(metadata):
    next(iter(metadata.storage_data.values())).relative_path = ".."
    return metadata


def of_another_kind(metadata):
    metadata.storage_data[next(iter(metadata.storage_data))] = "__0_0.distcp"
    return metadata


def no_tensor(metadata):
    metadata.state_dict_metadata[next(iter(metadata.state_dict_metadata))] = BytesStorageMetadata()
    return metadata


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (leads_out, r"it leads to \.\./optimizer_0/__0_0\.distcp"),
        (of_no_file, r"it leads to \.\."),
        (of_another_kind, "is refused"),
        (no_tensor, "linear_1.weight is not a tensor"),
        (lambda metadata: metadata.storage_data, "is refused"),
    ],
)
def test_metadata_that_would_open_other_files_or_unpickle_more_are_refused(done, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        sharded_tensors(tampered(done, tmp_path, change))


def test_a_shard_that_would_run_a_command_is_refused_and_runs_nothing(done, tmp_path):
    folder = tmp_path / "run" / "checkpoint-4" / "pytorch_model_fsdp_0"
    code = io.BytesIO()
    torch.save(Hostile(f"touch {tmp_path / 'ran'}"), code)

    def put_at_the_end(metadata):
        stored = next(iter(metadata.storage_data.values()))
        with (folder / stored.relative_path).open("ab") as file:
            stored.offset, stored.length = file.tell(), len(code.getvalue())
            file.write(code.getvalue())
        return metadata

    checkpoint = tampered(done, tmp_path, put_at_the_end)
    with pytest.raises(InputError, match=r"is refused, its shards are .* hold more than numbers \(UnpicklingError\)"):
        exported(checkpoint, tmp_path / "to")
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_weights_alone_is_exported_once_it_is_named(done, tmp_path):
    run = shutil.copytree(
        done / "lora" / "alone", tmp_path / "run", ignore=shutil.ignore_patterns("*_4", "optimizer*")
    )
    for name in ("trainer_state.json", "checkpoint-2/scheduler.pt", "checkpoint-4/scheduler.pt"):
        (run / name).unlink()
    for step in (2, 4):
        (run / f"checkpoint-{step}" / COMPLETE).unlink()
        mark_complete(run / f"checkpoint-{step}", step=step, ranks=1, identity={}, settings={})
    with pytest.raises(InputError, match=r"name a checkpoint-N that holds weights alone"):
        exported(run, tmp_path / "to")
    exported(run / "checkpoint-2", tmp_path / "to")
    ours, theirs = (load_file(folder / LORA_FILE) for folder in (tmp_path / "to", run / "checkpoint-2"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("to", ["lora", "comfyui", "merged"])
def test_a_file_that_was_not_written_as_meant_is_noticed(done, tmp_path, to, monkeypatch):
    def damaged(tensors, path, metadata=None):
        name = max(tensors, key=lambda key: tensors[key].numel())
        save_file(tensors | {name: tensors[name] * 1.001}, path, metadata=metadata)

    monkeypatch.setattr(formats, "save_file", damaged)
    monkeypatch.setattr("safetensors.torch.save_file", damaged)  # as diffusers finds it
    with pytest.raises((AssertionError, InputError), match=r"is not what was written|differs by"):
        exported(done / "lora" / "alone", tmp_path / "to", "--to", to)
    assert not list(tmp_path.iterdir()), "nothing is left that looks like an export"


def another_base(done: Path, folder: Path, model: str) -> Path:
    run = shutil.copytree(done / "lora" / "alone", folder / "run")
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(f"model: {model}\n" + recipe.partition("\n")[2])
    return run


@pytest.mark.parametrize("name", ["trainer_state.json", "run.json"])
def test_a_record_of_a_run_that_is_no_object_is_named(done, tmp_path, name):
    run = shutil.copytree(done / "lora" / "alone", tmp_path / "run")
    (run / name).write_text("[]")
    with pytest.raises(InputError, match=rf"{name}: cannot be read \(expected a JSON object\)"):
        exported(run, tmp_path / "to")


def test_a_pipeline_has_the_folders_within_the_parts_of_its_base_and_no_code(done, tiny, tmp_path):
    base = shutil.copytree(tiny(), tmp_path / "base")
    (base / "processor" / "additional_chat_templates").mkdir()
    for name in ("additional_chat_templates/short.jinja", "code.py"):
        (base / "processor" / name).write_text("{{ messages }}")
    to = exported(another_base(done, tmp_path, str(base)), tmp_path / "to", "--to", "pipeline")
    assert (to / "processor" / "additional_chat_templates" / "short.jinja").is_file()
    assert not (to / "processor" / "code.py").exists()


def test_of_a_quantised_base_the_lora_is_exported_and_nothing_merged(done, tiny, tmp_path):
    base = shutil.copytree(tiny(), tmp_path / "int8")
    config = json.loads((base / "transformer" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "torchao"}
    (base / "transformer" / "config.json").write_text(json.dumps(config))
    run = another_base(done, tmp_path, str(base))
    exported(run, tmp_path / "to")
    for to in ("merged", "pipeline"):
        with pytest.raises(InputError, match=r"is quantised \(torchao\), so nothing can be merged into its weights"):
            exported(run, tmp_path / "not", "--to", to)


def test_what_cannot_be_exported_is_told_by_name(done, tmp_path):
    lora, full = done / "lora" / "alone", done / "full" / "alone"
    with pytest.raises(InputError, match=r"nowhere: not found; expected training.output_dir of a run"):
        exported(tmp_path / "nowhere", tmp_path / "to")
    with pytest.raises(InputError, match=r"has no recipe.yaml, which train.py leaves there"):
        exported(tmp_path, tmp_path / "to")
    with pytest.raises(
        InputError, match=r"comfyui: .* has trained the transformer's own weights, so there is no LoRA"
    ):
        exported(full, tmp_path / "to", "--to", "comfyui")
    with pytest.raises(InputError, match=r"recipe.yaml: model: 'no/where' is not found from "):
        exported(another_base(done, tmp_path, "no/where"), tmp_path / "to", "--to", "merged")
    with pytest.raises(InputError, match="--public: nothing is pushed"):
        exported(lora, tmp_path / "to", "--public")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(InputError, match="full exists and is not empty; remove it, or name another folder"):
        exported(lora, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]
    run = shutil.copytree(
        lora, tmp_path / "begun", ignore=shutil.ignore_patterns("checkpoint-*", "trainer_state.json")
    )
    with pytest.raises(InputError, match="has no complete checkpoint, and its run has not ended"):
        exported(run, tmp_path / "to")


def test_a_shard_that_is_missing_is_told_by_name(done, tmp_path):
    folder = shutil.copytree(done / "full" / "alone" / "transformer", tmp_path / "transformer")
    index = {"weight_map": {"a": "there.safetensors", "b": "gone.safetensors"}}
    (folder / f"{formats.WEIGHTS_FILE}.index.json").write_text(json.dumps(index))
    (folder / formats.WEIGHTS_FILE).rename(folder / "there.safetensors")
    with pytest.raises(InputError, match=r"the weights cannot be read .*gone\.safetensors"):
        saved_tensors(folder)


def test_help_imports_no_torch(root):
    command = [sys.executable, "-X", "importtime", str(root / "hf_qie" / "export.py"), "--help"]
    asked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert asked.returncode == 0
    assert "--push_to_hub" in asked.stdout
    assert not [line for line in asked.stderr.splitlines() if line.endswith("| torch")]
