"""What every test shares: no network, few threads, tiny checkpoints built once, real photos where there are any."""

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# the machine's proxies, and its user's token and settings of accelerate, are not for tests
os.environ.pop("HF_TOKEN", None)
os.environ["no_proxy"] = "*"
os.environ["NO_PROXY"] = "*"
os.environ["HF_HOME"] = str(Path(__file__).resolve().parent.parent / ".pytest_cache" / "huggingface")
# else MKL picks a kernel by where a matrix lies in memory, and two processes differ in the last bit
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")

import numpy as np
import pytest
import torch
from filelock import FileLock
from hub import Hub
from PIL import Image
from synthetic_edits import synthetic_edits

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)  # two workers on two cores; one thread gives the same bits on every machine


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A test that reaches for another machine fails, whatever library it does it through."""
    connect = socket.socket.connect

    def refuse(sock, address):
        if sock.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test reached for {address}; build what it needs in hf_qie/demo/tiny.py instead")
        return connect(sock, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session")
def root() -> Path:
    """The top of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def built_once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """`built_once(name, build)` -> a folder that `build(folder)` filled once for all workers of the run."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "built_once"
    shared.mkdir(exist_ok=True)

    def get(name: str, build: Callable[[Path], object]) -> Path:
        with FileLock(shared / f"{name}.lock"):
            if not (shared / f"{name}.done").exists():
                shutil.rmtree(shared / name, ignore_errors=True)  # of a build that failed
                build(shared / name)
                (shared / f"{name}.done").touch()
        return shared / name

    return get


@pytest.fixture(scope="session")
def tiny(built_once) -> Callable[[str], Path]:
    """`tiny(kind)` -> the tiny checkpoint of that kind; read only, since every test shares it."""
    from hf_qie.demo.tiny import tiny_checkpoint

    return lambda kind="edit_plus": built_once(kind, lambda folder: tiny_checkpoint(folder, kind=kind))


@pytest.fixture(scope="session")
def edits(built_once) -> Path:
    """A folder with 24 synthetic rows a task (`edit.jsonl`, `combine.jsonl`, `text_to_image.jsonl`); read only."""
    return built_once("edits", lambda folder: synthetic_edits(folder, rows=24))


@pytest.fixture
def loopback_hub(tmp_path) -> Iterator[Hub]:
    """A small Hub of this test's own; see tests/hub.py."""
    with Hub(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture(scope="session")
def photos(built_once) -> Path:
    """A folder with `portrait_edit.jsonl`, `portrait_multi.jsonl`, `portrait_t2i.jsonl` and `images/`; read only.

    Real photos from $HF_QIE_PHOTOS, or from ../shared/data where there is one; else images of smooth noise in the
    same sizes and files, so that no test has to skip.
    """
    for folder in (os.environ.get("HF_QIE_PHOTOS"), ROOT.parent / "shared" / "data"):
        if folder and (Path(folder) / "portrait_edit.jsonl").exists():
            return Path(folder)
    return built_once("photos", noise_photos)


def noise_photos(folder: Path) -> None:
    """What the `photos` fixture describes: smooth noise for images, sizes and shape of the rows as in the photos."""
    source_sizes_px = [(500, 896), (896, 669), (896, 671), (598, 896), (669, 896)]
    target_sizes_px = [(500, 896), (896, 678), (896, 678), (597, 896), (678, 896)]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(10):
        for role, sizes_px in (("source", source_sizes_px), ("target", target_sizes_px)):
            coarse = Image.fromarray(rng.integers(0, 256, (12, 9, 3), dtype=np.uint8))
            photo = coarse.resize(sizes_px[i % 5], Image.Resampling.BICUBIC)
            photo.save(folder / "images" / f"{role}_{i + 1:02d}.jpg")

    def row(i: int, sources: list[str], **more: str) -> dict:
        images = [f"images/{source}.jpg" for source in sources]
        words = "Change the background to light blue with natural lighting. The face shows a smile. "
        return {
            "source_image": images[0] if len(images) == 1 else images or None,
            "target_image": f"images/target_{i:02d}.jpg",
            "instruction": words * (2 + i % 3),
            "instruction_cn": "将背景换为带自然光效的浅蓝色。面部微笑。" * (2 + i % 3),
        } | more

    undo = {"inverse_instruction": "Undo the edit: bring back the background.", "inverse_instruction_cn": "撤销编辑。"}
    several = {i: [f"source_{i:02d}", f"target_{i + 1:02d}", f"source_{i + 2:02d}"] for i in range(1, 9)}
    files = {
        "portrait_edit": [row(i, [f"source_{i:02d}"], **undo) for i in range(1, 11)],
        "portrait_multi": [row(i, names[: 2 if i < 6 else 3]) for i, names in several.items()],
        "portrait_t2i": [row(i, []) for i in range(1, 11)],
    }
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
