"""Whatever a recipe, a row or an image may be: a message or a bad row, never a traceback, and no row is lost."""

import json
from functools import cache
from io import BytesIO

import numpy as np
import pytest
import yaml
from datasets import load_from_disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from metadata import ORIENTATION, RESOLUTION, SIZES, SOFTWARE, UNIT, with_exif
from PIL import Image
from small_recipes import write_recipe

from hf_qie.config.recipe import Task, as_dict, load_recipe, override, save_recipe
from hf_qie.data.images import BadImage, header_size, read_image
from hf_qie.data.samples import read_rows
from hf_qie.errors import InputError
from hf_qie.extract import main
from hf_qie.extraction.run import TOO_MANY_BAD
from hf_qie.runtime.yaml_io import read_yaml


def examples(quick: int, full: int):
    """So many by default, so many in `make faults`; always the same ones."""
    return pytest.mark.parametrize("number", [quick, pytest.param(full, marks=pytest.mark.faults)])


def hold(law, strategy: st.SearchStrategy, number: int) -> None:
    """See that `law` holds for `number` examples."""
    checks = settings(
        max_examples=number, derandomize=True, deadline=None, database=None, suppress_health_check=[*HealthCheck]
    )
    checks(given(strategy)(law))()


# --- recipes ---------------------------------------------------------------------------------------------------------

WORDS = ["", " ", "auto", "bfloat16", "no", "1e-4", "a/b", "~", "<<", "=", "édit", "编辑"]
TEXT = st.text(max_size=12) | st.sampled_from(WORDS)
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, -(2**63), 2**64, 1e308, -0.0, 2**31, 0, 1, -1])
SCALARS = st.none() | st.booleans() | NUMBERS | TEXT
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT | st.integers(), inner, max_size=3),
    max_leaves=6,
)
TASKS = {"portraits": {"data": "pairs.jsonl"}, "faces": {"data": ["a.jsonl", "b.jsonl"], "t2i": True}}


def addresses(section: dict, at: tuple = ()) -> list[tuple]:
    return [
        address
        for key, value in section.items()
        for address in [(*at, key), *(addresses(value, (*at, key)) if isinstance(value, dict) else ())]
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    """A recipe with every key."""
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(yaml.safe_dump({"tasks": TASKS, "trainable": {"lora": {}}}))
    return as_dict(load_recipe(path)) | {"sampling": {}}


@st.composite
def mutated(draw, recipe: dict) -> str:
    """The text of a recipe with some values replaced, taken away or added, and perhaps cut or spliced as text."""
    name = draw(st.sampled_from(sorted(recipe)))  # the section; without the others, as YAML is slow to read
    recipe = json.loads(json.dumps({"tasks": TASKS, name: recipe[name]}))
    known = addresses({name: recipe[name]})
    training = ["optim", "fsdp", "fsdp_config", "lr_scheduler_kwargs", "eval_steps", "accelerator_config", "report_to"]
    if name == "training":
        known += [("training", key) for key in training] + [("training", "fsdp_config", "min_num_params")]
    for _ in range(draw(st.sampled_from([1, 1, 1, 1, 2, 3]))):
        section, (*parents, last) = recipe, draw(st.sampled_from(known))
        for key in parents:
            section = section.get(key) if isinstance(section, dict) else None
        if not isinstance(section, dict):
            continue
        deed = draw(st.sampled_from(["replace", "replace", "replace", "drop", "add"]))
        if deed == "drop":
            section.pop(last, None)
        else:
            number = deed == "replace" and isinstance(section.get(last), int | float)
            section[last if deed == "replace" else draw(TEXT)] = draw(NUMBERS if number else VALUES)
    text = yaml.safe_dump(recipe, allow_unicode=draw(st.booleans()))
    if draw(st.integers(0, 3)) == 0:
        place = draw(st.integers(0, len(text)))
        odd = st.sampled_from(
            ["{", "]", "- ", ": ", "\t", "&a ", "*a", "!!python/name:os.system ", "? ", "---\n", "[" * 2000]
        )
        text = text[:place] + draw(odd | TEXT) + text[place + draw(st.integers(0, 9)) :]
    return text


@examples(250, 10_000)
def test_any_recipe_loads_or_is_refused_with_a_message(whole, tmp_path, number):
    path, again = tmp_path / "recipe.yaml", tmp_path / "again.yaml"

    def law(text: str) -> None:
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            recipe = load_recipe(path)
        except InputError as error:
            assert str(error).startswith(str(path))
        else:
            save_recipe(recipe, again)
            assert as_dict(load_recipe(again)) == as_dict(recipe)

    hold(law, mutated(whole), number)


@examples(150, 2_000)
def test_any_override_is_taken_or_refused_with_a_message(whole, number):
    keys = st.sampled_from([".".join(map(str, address)) for address in addresses(whole)])
    texts = st.tuples(keys, TEXT | VALUES.map(json.dumps)).map("=".join) | st.text(max_size=20)

    def law(text: str) -> None:
        try:
            override(json.loads(json.dumps(whole)), text)
        except InputError as error:
            assert str(error).startswith("override ")

    hold(law, texts, number)


@examples(150, 2_000)
def test_any_bytes_are_yaml_or_refused_with_a_message(number):
    def law(content: bytes) -> None:
        try:
            read_yaml(content, "recipe.yaml")
        except InputError as error:
            assert str(error).startswith("recipe.yaml")

    signs = st.text(alphabet="{}[]:,-?&*!|>'\"%@`#ab1.\n \t", max_size=40)
    hold(law, st.binary(max_size=60) | signs.map(str.encode), number)


# --- rows ------------------------------------------------------------------------------------------------------------

GOOD = {"source_image": "a.png", "target_image": "b.png", "instruction": "Make it blue."}
CELLS = VALUES | st.sampled_from(["a.png", "b.png", ["a.png", "b.png"], [], "['a.png']", '["a.png"]', "\0", "/"])
CELLS |= st.sampled_from(["http://", "https://[", "http://user:pw@x/", "file:///etc/passwd", "x" * 5000, "\ud800"])


@st.composite
def lines(draw) -> bytes:
    """A line of JSONL, mostly a good row with one or two cells replaced."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(st.binary(max_size=30)).replace(b"\n", b"")
    if kind == 1:
        return json.dumps(draw(VALUES)).encode()
    row = dict(GOOD)
    for _ in range(draw(st.integers(0, 2))):
        row[draw(st.sampled_from([*GOOD, "instruction_cn", "inverse_instruction"]) | TEXT)] = draw(CELLS)
    return json.dumps(row, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")


@examples(150, 2_000)
def test_any_line_of_jsonl_is_a_row_or_refused_with_a_message(tmp_path, number):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    file = tmp_path / "rows.jsonl"
    task = Task(name="faces", data=(str(file),))

    def law(line: bytes) -> None:
        file.write_bytes(line + b"\n" + json.dumps(GOOD).encode())
        try:
            rows = read_rows(task, folder=tmp_path)
        except InputError as error:
            assert str(error).startswith((str(file), "tasks.faces."))
        else:
            assert rows.table["row"][:] == list(range(1 + bool(line.removeprefix(b"\xef\xbb\xbf").strip())))

    hold(law, lines(), number)


# --- images ----------------------------------------------------------------------------------------------------------


@cache
def image_contents() -> list[bytes]:
    """One of each of the formats that people have, with what may stand in a header."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 4), dtype=np.uint8)
    image, contents = Image.fromarray(noise), []
    exif = Image.Exif()
    exif[0x0112] = 6
    for mode, name, options in [
        ("RGB", "JPEG", {"exif": exif}),
        ("L", "JPEG", {"progressive": True}),
        ("CMYK", "JPEG", {}),
        ("RGBA", "PNG", {"exif": exif}),
        ("P", "PNG", {}),
        ("I;16", "PNG", {}),
        ("RGB", "WEBP", {"exif": exif}),
        ("RGBA", "WEBP", {"lossless": True}),
        ("P", "GIF", {}),
        ("RGB", "BMP", {}),
        ("RGB", "TIFF", {"compression": "tiff_lzw"}),
        ("RGB", "TIFF", {"exif": exif}),
        ("RGB", "PPM", {}),
        ("RGB", "TGA", {}),
        ("RGB", "JPEG2000", {}),
        ("RGB", "AVIF", {}),
        ("RGBA", "ICO", {}),
    ]:
        file = BytesIO()
        image.convert("L" if mode == "I;16" else mode).convert(mode).save(file, name, **options)
        contents.append(file.getvalue())
    return contents


@st.composite
def broken(draw) -> bytes:
    """An image that is cut, has bytes changed, put in or taken out, mostly in its header."""
    content = bytearray(draw(st.sampled_from(image_contents())))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, min(64, len(content))) | st.integers(0, len(content)))
        deed = draw(st.sampled_from(["flip", "flip", "set", "insert", "remove", "cut"]))
        if deed == "flip" and place < len(content):
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif deed == "set":
            content[place : place + 4] = draw(st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"]))
        elif deed == "insert":
            content[place:place] = draw(st.binary(max_size=8))
        elif deed == "remove":
            del content[place : place + draw(st.integers(1, 16))]
        else:
            del content[place:]
    return bytes(content)


@examples(200, 500)
@pytest.mark.filterwarnings("ignore")  # Pillow's, on damage that it reads all the same
def test_any_image_is_read_whole_or_bad_with_a_reason(tmp_path, number):
    file = tmp_path / "image"

    def law(content: bytes) -> None:
        file.write_bytes(content)
        for read in (read_image, header_size):
            try:
                result = read(file)
            except BadImage as error:
                json.dumps(str(error), ensure_ascii=False).encode()  # as bad_rows.jsonl has it
            else:
                assert read is header_size or (result.mode == "RGB" and result.tobytes())

    hold(law, broken(), number)


@st.composite
def entries(draw) -> list[tuple[int, int, bytes]]:
    """EXIF entries whose values have any type, whatever their tags want."""
    tags = st.sampled_from([ORIENTATION, RESOLUTION, UNIT, SOFTWARE, 0x8769, 0x8825, 0x02BC]) | st.integers(0, 65535)
    found = []
    for tag in draw(st.sets(tags, min_size=1, max_size=6)):
        kind = draw(st.sampled_from(sorted(SIZES)))
        size = SIZES[kind] * draw(st.integers(0, 3))
        small = st.integers(0, 9).map(lambda number, size=size: number.to_bytes(size or 1, "little")[:size])
        found.append((tag, kind, draw(small | st.binary(min_size=size, max_size=size))))
    return found


@examples(150, 4_000)
@pytest.mark.filterwarnings("ignore")  # Pillow's, on what it cannot read
def test_no_metadata_make_an_image_bad_or_differ_from_its_header(number):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8))

    def law(given) -> None:
        name, told = given
        file = BytesIO(with_exif(image, name, told))
        assert header_size(file) == read_image(file).size in ((32, 24), (24, 32))

    hold(law, st.tuples(st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF"]), entries()), number)


@examples(24, 500)
@pytest.mark.filterwarnings("ignore")
def test_every_row_with_a_broken_image_is_in_the_set_or_among_the_bad_ones(tiny, tmp_path, number):
    rows, contents = [], []
    hold(lambda content: contents.append(content), broken(), number)
    Image.new("RGB", (32, 24)).save(tmp_path / "good.png")
    for place, content in enumerate(contents):
        (tmp_path / f"{place}").write_bytes(content)
        names = [f"{place}", "good.png"][:: 1 if place % 2 else -1]
        rows.append({"source_image": names[0], "target_image": names[1], "instruction": "Mend it."})
    path = write_recipe(tmp_path, tiny(), {"task": rows}, extract={"batch_size": 4, "inverse": False})
    assert main([str(path)]) in (0, TOO_MANY_BAD)
    folder = tmp_path / "sets" / "task"
    bad = [json.loads(line)["row"] for line in (folder / "bad_rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert bad and len(contents) == number
    assert sorted([*load_from_disk(folder)["row"], *bad]) == list(range(len(rows)))
