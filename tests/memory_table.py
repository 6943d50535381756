"""`make memory-table`: what a LoRA takes on cards of several sizes, forecast, as a table in recipes/README.md.

Each cell is the recipe lora_one_gpu.yaml with the first change that makes it fit the card, of those that change no
number: none, offload_activations, stream_blocks.
"""

import math
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from accelerate import PartialState
from released import write_released
from tqdm import tqdm

from hf_qie.config.memory import NUM_SLOTS
from hf_qie.config.recipe import Recipe, load_recipe
from hf_qie.data.largest import Shape
from hf_qie.runtime.memory_tracker import UNSEEN_SHARE
from hf_qie.training.fit import usable_bytes
from hf_qie.training.forecast import Forecast, Run, forecast, streamed

ROOT = Path(__file__).resolve().parent.parent
CARDS_GB, SIZES_PX, NUM_SOURCES, BASES = (16, 24, 32, 48, 80), (512, 768, 1024), (0, 1, 3), ("null", "int8")
CAPTION_TOKENS, IMAGE_TOKENS = 100, 205  # of a caption with its suffix, and of a source: 384 x 384 and "Picture 1: "
NUM_BLOCKS = 60
START, END = "<!-- make memory-table -->\n", "<!-- end -->\n"


def recipe_of(model: Path, *overrides: str) -> Recipe:
    """The recipe with a checkpoint that has configs alone."""
    return load_recipe(ROOT / "recipes" / "lora_one_gpu.yaml", [f"model={model}", *overrides])


def shape_of(size_px: int, num_sources: int, *, image_tokens: int = IMAGE_TOKENS, draws_per_row: int = 1) -> Shape:
    """One row of square images; sources are as the pipeline has them, with `image_tokens` in the prompt."""
    side = size_px // 16
    tokens = CAPTION_TOKENS + image_tokens * num_sources
    return Shape(grids=((side, side), *[(64, 64)] * num_sources), num_tokens=tokens, draws_per_row=draws_per_row)


def row(model: Path, base: str, size_px: int, num_sources: int) -> list[str]:
    """The cells of one shape, a card each."""
    PartialState(cpu=True)
    plain, offloaded = (
        forecast(
            Run(recipe=recipe_of(model, f"memory.quantization={base}", *more), shape=shape_of(size_px, num_sources))
        )
        for more in ((), ["memory.offload_activations=true"])
    )
    return [cell(plain, offloaded, usable_bytes(card)) for card in CARDS_GB]


def cell(plain: Forecast, offloaded: Forecast, limit: float) -> str:
    """The change and the peak, and after + what waits in CPU memory, in GB."""
    over = math.ceil((plain.needed - limit) / (1 + UNSEEN_SHARE) / plain.block)
    count = NUM_SLOTS + max(over, 1)
    ways = {"": plain, "`offload_activations`: ": offloaded, f"`stream_blocks={count}`: ": streamed(plain, count)}
    name, found = next((name, way) for name, way in ways.items() if way.needed <= limit)
    assert count <= NUM_BLOCKS or not name.startswith("`stream")
    return f"{name}{found.peak / 1e9:.1f}" + (f" + {found.host / 1e9:.0f}" if found.host else "")


def table() -> str:
    """The whole table, as markdown."""
    shapes = [(base, size, sources) for base in BASES for size in SIZES_PX for sources in NUM_SOURCES]
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(max_workers=2) as pool:
        cells = pool.map(partial(row, write_released(Path(folder, "model"))), *zip(*shapes, strict=True))
        rows = list(tqdm(cells, total=len(shapes)))
    head = ["quantization", "target", "sources", *(f"{card} GB" for card in CARDS_GB)]
    lines = [head, ["---"] * len(head)]
    lines += [[base, f"{size} px", str(n), *cells] for (base, size, n), cells in zip(shapes, rows, strict=True)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    page = ROOT / "recipes" / "README.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    page.write_text(before + START + table() + END + after, encoding="utf-8")
