"""`make memory-table`: what a LoRA takes on cards of several sizes, forecast, as a table in recipes/README.md.

Each cell is the recipe lora_one_gpu.yaml, with the first of the fewest changes that make it fit the card.
"""

import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from accelerate import PartialState
from released import write_released
from tqdm import tqdm

from hf_qie.config.recipe import Recipe, load_recipe
from hf_qie.data.largest import Shape
from hf_qie.training.fit import fewest_changes, usable_bytes
from hf_qie.training.forecast import Run, forecast

ROOT = Path(__file__).resolve().parent.parent
CARDS_GB, SIZES_PX, NUM_SOURCES = (16, 24, 32, 48, 80), (512, 768, 1024), (0, 1, 3)
CAPTION_TOKENS, IMAGE_TOKENS = 100, 205  # of a caption with its suffix, and of a source: 384 x 384 and "Picture 1: "
START, END = "<!-- make memory-table -->\n", "<!-- end -->\n"
SHORT = {"memory.": "", "training.": "", "=true": "", "quantization=": "", "optim=": ""}


def recipe_of(model: Path, *overrides: str) -> Recipe:
    """The recipe with a checkpoint that has configs alone."""
    return load_recipe(ROOT / "recipes" / "lora_one_gpu.yaml", [f"model={model}", *overrides])


def shape_of(size_px: int, num_sources: int) -> Shape:
    """One row of square images; sources are as the pipeline has them."""
    side = size_px // 16
    tokens = CAPTION_TOKENS + IMAGE_TOKENS * num_sources
    return Shape(grids=((side, side), *[(64, 64)] * num_sources), num_tokens=tokens)


def row(model: Path, size_px: int, num_sources: int) -> list[str]:
    """The cells of one shape, a card each."""
    PartialState(cpu=True)
    run = Run(recipe=recipe_of(model), shape=shape_of(size_px, num_sources))
    whole, cells = forecast(run), []
    for card in CARDS_GB:
        limit, changes, found = usable_bytes(card), (), whole
        if found.needed > limit:
            changes, found = fewest_changes(run, lambda more: replace(run, recipe=recipe_of(model, *more)), limit)[0]
        assert found.needed <= limit, (card, size_px, num_sources)
        settings = " ".join(changes)
        for long, short in SHORT.items():
            settings = settings.replace(long, short)
        host = f" + {found.host / 1e9:.0f}" if found.host > 5e8 else ""
        cells.append(f"{f'`{settings}`: ' if settings else ''}{found.peak / 1e9:.1f}{host}")
    return cells


def table() -> str:
    """The whole table, as markdown."""
    shapes = [(size, sources) for size in SIZES_PX for sources in NUM_SOURCES]
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(max_workers=2) as pool:
        cells = pool.map(partial(row, write_released(Path(folder, "model"))), *zip(*shapes, strict=True))
        rows = list(tqdm(cells, total=len(shapes)))
    head = ["target", "sources", *(f"{card} GB" for card in CARDS_GB)]
    lines = [head, ["---"] * len(head)]
    lines += [[f"{size} px", str(sources), *cells] for (size, sources), cells in zip(shapes, rows, strict=True)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    page = ROOT / "recipes" / "README.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    page.write_text(before + START + table() + END + after, encoding="utf-8")
