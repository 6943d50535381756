"""The embedding set: its columns are frozen, its numbers come back as they went in, and misfits are named."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value, load_from_disk

from hf_qie.config.data import SET_COLUMNS
from hf_qie.data.embedding_sets import open_set
from hf_qie.data.provenance import (
    PROVENANCE,
    check_compat,
    checkpoint_compat,
    fingerprint,
    read_provenance,
)
from hf_qie.data.schema import COLUMNS, set_features, to_table
from hf_qie.errors import InputError
from hf_qie.models.base import read_family
from hf_qie.models.qwen_image.family import EDIT, EDIT_PLUS, TEXT_TO_IMAGE

STATES, LATENTS = List(List(Value("float16"), length=96)), List(List(Value("float16"), length=64))
GRID, GRIDS = List(Value("int32"), length=2), List(List(Value("int32"), length=2))
FORWARD = {
    "row": Value("int64"),
    "source_image": List(Value("string")),
    "target_image": Value("string"),
    "instruction": Value("string"),
    "instruction_cn": Value("string"),
    "num_sources": Value("int8"),
    "image_embeds": STATES,
    "text_embeds_instruction": STATES,
    "text_embeds_instruction_cn": STATES,
    "text_embeds_drop": STATES,
    "target_latents": LATENTS,
    "target_grid": GRID,
    "source_latents": LATENTS,
    "source_grids": GRIDS,
}
INVERSE = {
    "inverse_image_embeds": STATES,
    "inverse_text_embeds_undo": STATES,
    "inverse_text_embeds_drop": STATES,
}
INVERSE_LATENTS = {
    "inverse_target_latents": LATENTS,
    "inverse_target_grid": GRID,
    "inverse_source_latents": LATENTS,
    "inverse_source_grids": GRIDS,
}


def features(*, inverse=("undo",), inverse_latents=True) -> Features:
    return set_features(
        width=96,
        latent_width=64,
        captions=("instruction", "instruction_cn"),
        inverse_captions=inverse,
        inverse_latents=inverse_latents,
    )


def matrix(seed: int, num_tokens: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num_tokens, width)).astype(np.float16)


def rows() -> list[dict]:
    """One with everything, one that is text-to-image without the second caption."""
    full = {
        "row": 3,
        "source_image": ["a.png", "图.png"],
        "target_image": "b.png",
        "instruction": "Paint it red.",
        "instruction_cn": "涂成红色。",
        "num_sources": 2,
        "target_grid": (4, 6),
        "source_grids": [(2, 3), (4, 4)],
        "inverse_target_grid": (2, 3),
        "inverse_source_grids": [(4, 6)],
        "source_latents": matrix(0, 22, 64),
    }
    full |= {
        name: matrix(i, 5 + i, feature.feature.length)
        for i, (name, feature) in enumerate((FORWARD | INVERSE | INVERSE_LATENTS).items())
        if feature in (STATES, LATENTS) and name not in full
    }
    bare = {"row": 4, "source_image": [], "target_image": "c.png", "instruction": "A boat.", "num_sources": 0}
    bare |= {"image_embeds": matrix(0, 0, 96), "source_latents": matrix(0, 0, 64), "source_grids": []}
    bare |= {"text_embeds_instruction": matrix(50, 7, 96), "text_embeds_drop": matrix(51, 6, 96)}
    bare |= {"target_latents": matrix(52, 6, 64), "target_grid": (2, 3)}
    return [full, bare]


def assert_holds(data: Dataset, wanted: list[dict]) -> None:
    """The values of `data` are bit for bit those of `wanted`, null where a row has none."""
    assert len(data) == len(wanted)
    for got, row in zip(data, wanted, strict=True):
        for name, value in got.items():
            if isinstance(row.get(name), np.ndarray):
                assert np.array(value, np.float16).reshape(row[name].shape).tobytes() == row[name].tobytes(), name
            else:
                assert json.dumps(value) == json.dumps(row.get(name)), name


def test_the_columns_of_a_set_and_their_order_are_frozen():
    for inverse, inverse_latents, expected in [
        (("undo",), True, FORWARD | INVERSE | INVERSE_LATENTS),
        (("undo",), False, FORWARD | INVERSE),
        ((), True, FORWARD),
        ((), False, FORWARD),
    ]:
        got = features(inverse=inverse, inverse_latents=inverse_latents)
        assert list(got.items()) == list(expected.items())


def test_a_caption_may_have_no_name_that_the_set_has_for_itself():
    own = {column.name for column in COLUMNS if "{caption}" not in column.name}
    assert own - {"text_embeds_drop"} | {"drop"} == SET_COLUMNS


def test_a_table_holds_nulls_empty_matrices_and_every_bit():
    table = to_table(rows(), features())
    assert table.schema.equals(features().arrow_schema, check_metadata=False)
    assert_holds(Dataset(table), rows())


def test_rows_in_any_company_are_the_same():
    full, bare = rows()
    for given in ([], [bare], [bare, full, bare], [full] * 3):
        assert_holds(Dataset(to_table(given, features())), given)


def test_a_matrix_of_another_width_is_refused():
    full, _ = rows()
    with pytest.raises(Exception, match=r"[Ll]ength"):
        Dataset(to_table([full | {"image_embeds": matrix(0, 3, 95)}], features()))


def test_float16_is_exact_for_bfloat16_from_2_to_the_minus_17_to_65504():
    bits = torch.arange(2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.bfloat16)
    values = values[values.isfinite()]
    stored = values.to(torch.float16)
    inside = (values == 0) | ((values >= 2**-17) & (values.float() <= 65504))
    assert (stored[inside].to(torch.bfloat16) == values[inside]).all()
    assert inside.sum() == 33 * 128 + 1  # powers of two from -17 to 15 of 128 steps each, and 0
    below = (values > 0) & (values < 2**-17)
    assert (stored[below].double() - values[below].double()).abs().max() == 2**-25
    assert stored[~inside & ~below].isinf().all()


@pytest.fixture(scope="session")
def parquet(built_once):
    """A folder with a set, as `data` on disk and as `train.parquet`."""

    def build(folder):
        data = Dataset(to_table(rows(), features()))
        data.save_to_disk(folder / "data")
        data.to_parquet(folder / "train.parquet")

    return built_once("parquet", build)


READER = """
import sys
import numpy as np, torch
from datasets import load_dataset
ds = load_dataset("parquet", data_files=sys.argv[1], split="train", cache_dir=sys.argv[2])
np.savez(sys.argv[3], **{
    f"{name} {i}": np.array(row[name], np.float16)
    for i, row in enumerate(ds) for name in ds.column_names if "embeds" in name or "latents" in name
    if row[name] is not None
})
ds = ds.with_format("torch", columns=["image_embeds", "text_embeds_instruction"], dtype=torch.float16)
assert [ds[0][name].dtype for name in ("image_embeds", "text_embeds_instruction")] == [torch.float16] * 2
assert ds[0]["image_embeds"].shape == (11, 96) and ds[1]["text_embeds_instruction"].shape == (7, 96)
assert set(ds[0]) == {"image_embeds", "text_embeds_instruction"}
assert not [name for name in sys.modules if name.startswith("hf_qie")]
"""


def test_parquet_gives_the_same_values_to_a_reader_without_us(parquet, tmp_path):
    read = tmp_path / "read.npz"
    arguments = [parquet / "train.parquet", tmp_path / "cache", read]
    subprocess.run([sys.executable, "-c", READER, *map(str, arguments)], check=True, cwd=tmp_path)
    wanted = {f"{k} {i}": v for i, row in enumerate(rows()) for k, v in row.items() if isinstance(v, np.ndarray)}
    got = np.load(read)
    assert set(got) == set(wanted)
    assert all(got[name].tobytes() == value.tobytes() for name, value in wanted.items())


def test_parquet_has_the_features_of_the_set(parquet, tmp_path):
    data = Dataset.from_parquet(str(parquet / "train.parquet"), cache_dir=str(tmp_path))
    assert data.features == features()
    assert_holds(data, rows())
    assert_holds(load_from_disk(parquet / "data"), rows())


# --- provenance


def compat_of(model, **more):
    found = checkpoint_compat(str(model), revision=None, family=read_family(str(model)))
    return found | {"vae_area_px": 1024 * 1024, "drop_caption": " "} | more


def checkpoint_compat_only(compat):
    """What the checkpoint decides of a `compat`."""
    return {field: value for field, value in compat.items() if field not in ("vae_area_px", "drop_caption")}


def provenances(**compats):
    return {task: {"compat": compat, "record": {"model": "tiny"}} for task, compat in compats.items()}


@pytest.fixture
def copy(tiny, tmp_path):
    """`copy(kind)` -> a copy of a tiny checkpoint that a test may change."""
    return lambda kind="edit_plus": shutil.copytree(tiny(kind), tmp_path / kind)


def test_a_checkpoint_and_its_copy_are_the_same(tiny, copy):
    one, other = compat_of(tiny("edit_plus")), compat_of(copy())
    assert one == other and fingerprint(one) == fingerprint(other)
    check_compat(provenances(a=one, b=other), checkpoint_compat_only(other), model="copy")


def test_the_transformer_does_not_matter_to_a_set(tiny):
    """Sets of 2509 train 2511, whose encoder and VAE are the same files."""
    one, other = tiny("edit_plus"), tiny("edit_plus_2511")
    assert (one / "transformer/config.json").read_bytes() != (other / "transformer/config.json").read_bytes()
    assert compat_of(one) == compat_of(other)


CHANGES = {
    "text_encoder/model.safetensors": "encoder (text_encoder/model.safetensors)",
    "text_encoder/config.json": "encoder (text_encoder/config.json)",
    "vae/diffusion_pytorch_model.safetensors": "vae (vae/diffusion_pytorch_model.safetensors)",
    "processor/processor_config.json": "processor (processor/processor_config.json)",
    "tokenizer/tokenizer.json": "processor (tokenizer/tokenizer.json)",
}


@pytest.mark.parametrize(("file", "named"), CHANGES.items())
def test_a_changed_file_of_the_checkpoint_is_named(tiny, copy, file, named):
    made_from, model = compat_of(tiny("edit_plus")), copy()
    content = bytearray((model / file).read_bytes())
    content[-1] ^= 1
    (model / file).write_bytes(content)
    checkpoint = checkpoint_compat_only(compat_of(model))
    with pytest.raises(InputError) as error:
        check_compat(provenances(faces=made_from), checkpoint, model="org/new")
    assert str(error.value) == (
        f"tasks.faces: its embedding set does not fit the checkpoint org/new: {named} differ; it was made from tiny. "
        "Extract it again, or train without it"
    )


@pytest.mark.parametrize(
    "change", [{"drop_caption": ""}, {"vae_area_px": 512 * 512}, {"vlm_area_px": 1}, {"positions": "1-d"}]
)
def test_a_set_that_does_not_fit_its_fellows_is_named_with_the_fields(tiny, change):
    compat = compat_of(tiny("edit_plus"))
    with pytest.raises(InputError) as error:
        check_compat(provenances(a=compat, b=compat | change), {}, model="org/model")
    assert str(error.value).startswith(
        f"tasks.b: its embedding set does not fit the set of task a: {next(iter(change))} differ; "
    )


def test_a_set_of_another_family_is_refused_by_name(tiny):
    first = compat_of(tiny("edit_plus"))  # from before sets named their family
    assert "family" not in first
    newer = first | {"family": "Qwen-Image-2.1"}
    for made, model, named in (
        (first, newer, "made for Qwen-Image-Edit, {} is of Qwen-Image-2.1"),
        (newer, first, "made for Qwen-Image-2.1, {} is of Qwen-Image-Edit"),
    ):
        rest = "; extract it again for that family, or train without it"
        with pytest.raises(InputError) as error:
            check_compat(provenances(a=made), checkpoint_compat_only(model), model="org/model")
        named_here = named.format("the checkpoint org/model")
        assert str(error.value) == f"tasks.a: its embedding set was {named_here}{rest}"
        with pytest.raises(InputError) as error:
            check_compat(provenances(b=model, a=made), checkpoint_compat_only(model), model="org/model")
        assert str(error.value) == f"tasks.a: its embedding set was {named_here}{rest}"
    check_compat(provenances(a=newer), checkpoint_compat_only(newer), model="org/model")


def test_templates_belong_to_what_has_to_fit(tiny):
    edit_plus, edit = (compat_of(tiny(kind)) for kind in ("edit_plus", "edit"))
    with pytest.raises(InputError, match=r"the set of task a: .*templates, vlm_area_px differ"):
        check_compat(provenances(a=edit_plus, b=edit), {}, model="org/model")


def test_weights_that_are_not_at_hand_are_not_compared(tiny, copy):
    made_from, model = compat_of(tiny("edit_plus")), copy()
    (model / "text_encoder/model.safetensors").unlink()
    check_compat(provenances(faces=made_from), checkpoint_compat_only(compat_of(model)), model="org/new")


def test_what_git_leaves_in_place_of_weights_is_named(copy):
    model = copy()
    path = model / "text_encoder/model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 16000000000\n")
    with pytest.raises(InputError) as error:
        compat_of(model)
    assert str(error.value) == f"model: {path} is not a safetensors file; fetch it again"


def test_a_missing_part_of_the_checkpoint_is_named(copy):
    model = copy()
    shutil.rmtree(model / "processor")
    with pytest.raises(InputError) as error:
        compat_of(model)
    assert str(error.value) == f"model: {model} has no folder processor; it has to be in diffusers layout"


def test_a_folder_without_provenance_is_no_finished_set(parquet):
    with pytest.raises(InputError, match=r"data: no finished embedding set; run hf_qie/extract\.py with this recipe"):
        open_set(parquet / "data")


def test_a_set_of_another_format_is_refused(tmp_path):
    (tmp_path / PROVENANCE).write_text(json.dumps({"compat": {"format": 2}, "record": {}}))
    with pytest.raises(InputError, match=r"the set has format 2, this hf_qie reads 1$"):
        read_provenance(tmp_path)


def test_only_a_family_of_two_resizes_takes_another_source_size():
    for same in (EDIT_PLUS.with_source_size(None), EDIT_PLUS.with_source_size(1024)):
        assert same == EDIT_PLUS and same.vae_area_px == 1024 * 1024
    assert EDIT.with_source_size(1024) == EDIT
    smaller = EDIT_PLUS.with_source_size(512)
    assert (smaller.vae_area_px, smaller.vlm_area_px) == (512 * 512, EDIT_PLUS.vlm_area_px)
    with pytest.raises(InputError) as error:
        EDIT.with_source_size(512)
    assert str(error.value) == (
        "extract.source_sample_size: 512: QwenImageEditPipeline hands one image of 1,048,576 pixels to encoder and "
        "VAE; leave it null"
    )
    with pytest.raises(InputError, match=r"512: QwenImagePipeline takes no sources; leave it null$"):
        TEXT_TO_IMAGE.with_source_size(512)
