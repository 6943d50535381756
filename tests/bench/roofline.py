"""What H100s could do at most, on paper: operations counted on the meta device, with the released shapes.

    python tests/bench/roofline.py

prints tables of docs/performance.md, which a test holds against this file.
"""

import json
import sys
import tempfile
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import arithmetic  # noqa: E402
import torch  # noqa: E402
from figures import AFTER_TOKENS, CAPTION_TOKENS, DROP_TOKENS, IMAGE_TOKENS  # noqa: E402
from released import TRANSFORMER, WIDTH, write_released  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from hf_qie.config.recipe import load_recipe  # noqa: E402
from hf_qie.training.cost import PEAKS  # noqa: E402
from hf_qie.training.model import build_model  # noqa: E402

PEAK_FLOPS, PEAK_BYTES = 1e12 * PEAKS["H100"], 3.35e12  # of an H100 SXM a second: dense bfloat16, HBM3
SHARE = 0.4  # of the peak that a well tuned run reaches
COUNTED = 2  # blocks; all are alike, so that 60 follow from the difference of 1 and 2
PROMPT = IMAGE_TOKENS + CAPTION_TOKENS + AFTER_TOKENS
SOURCE = (64, 64)  # 1024 x 1024 pixels
TARGETS = {512: (32, 32), 1024: (64, 64)}
GPUS = (1, 8, 64)
PROMPTS = (240, 310, 390, 500)  # tokens of a batch of four rows: an image's, and captions of 40 to 300
SLOWER = (1, 1.25, 1.5, 2)  # what a kernel takes under a mask, to one without: to be measured


@cache
def blocks_flops(lora: bool, target_px: int, num_layers: int, training: bool) -> int:
    """Operations of one row through a transformer of `num_layers` blocks."""
    with tempfile.TemporaryDirectory() as folder:
        model = write_released(Path(folder) / "model")
        config = TRANSFORMER | {"num_layers": num_layers}
        (model / "transformer" / "config.json").write_text(json.dumps(config))
        recipe = {"model": str(model), "tasks": {"edit": {"embeddings": "nowhere"}}}
        recipe["trainable"] = {"lora": {"rank": 32, "target_modules": "attention"} if lora else None}
        path = Path(folder) / "recipe.yaml"
        path.write_text(json.dumps(recipe))
        transformer = torch.nn.Module.to(build_model(load_recipe(path), empty=True), torch.bfloat16)
    grids = [TARGETS[target_px], SOURCE]
    num_latents = sum(height * width for height, width in grids)
    empty = {"dtype": torch.bfloat16, "device": "meta"}
    with torch.set_grad_enabled(training), FlopCounterMode(display=False) as counter:
        (output,) = transformer(
            hidden_states=torch.empty(1, num_latents, 64, **empty),
            encoder_hidden_states=torch.empty(1, PROMPT, WIDTH, **empty),
            timestep=torch.empty(1, **empty),
            img_shapes=[[(1, *grid) for grid in grids]],
            return_dict=False,
        )
        if training:
            output.sum().backward()
    return counter.get_total_flops()


def row_flops(*, lora: bool, target_px: int, checkpointing: bool) -> float:
    """Operations to train on one row: forward, backward and, with activation checkpointing, forward once more."""

    def whole(training: bool) -> int:
        one, two = (blocks_flops(lora, target_px, layers, training) for layers in (1, COUNTED))
        return one + (TRANSFORMER["num_layers"] - 1) * (two - one)

    return whole(True) + (whole(False) if checkpointing else 0)


def stored_bytes(target_px: int) -> int:
    """Bytes of a row as training reads it: one prompt, target and source latents, float16."""
    latents = sum(height * width for height, width in (TARGETS[target_px], SOURCE))
    return 2 * (PROMPT * WIDTH + latents * 64)


def training_table() -> str:
    """Images a second of training."""
    lines = ["| target | trains | PFLOP a row | with checkpointing | MB read a row | " + heads("images/s")]
    lines.append("|---" * (5 + len(GPUS)) + "|")
    for target_px in TARGETS:
        for name, lora in (("LoRA, rank 32", True), ("all", False)):
            plain, more = (row_flops(lora=lora, target_px=target_px, checkpointing=c) for c in (False, True))
            rates = " | ".join(f"{gpus * SHARE * PEAK_FLOPS / more:.2f}" for gpus in GPUS)
            read = stored_bytes(target_px) / 1e6
            lines.append(f"| {target_px} | {name} | {plain / 1e15:.3f} | {more / 1e15:.3f} | {read:.2f} | {rates} |")
    return "\n".join(lines)


def extraction_table() -> str:
    """Rows a second of encoding prompts."""
    caption = CAPTION_TOKENS + AFTER_TOKENS
    lines = [
        "| sources | TFLOP a row | seconds to read the weights once | rows at which both are equal | "
        + heads("rows/s")
    ]
    lines.append("|---" * (4 + len(GPUS)) + "|")
    weight_s = 2 * sum(p.numel() for p in arithmetic.whole_model().model.parameters()) / PEAK_BYTES
    for sources in (1, 3):
        flops = arithmetic.ours(sources, caption, caption, DROP_TOKENS + AFTER_TOKENS)
        rates = " | ".join(f"{gpus * SHARE * PEAK_FLOPS / flops:.0f}" for gpus in GPUS)
        equal = weight_s * PEAK_FLOPS / flops
        lines.append(f"| {sources} | {flops / 1e12:.2f} | {weight_s:.4f} | {equal:.2f} | {rates} |")
    return "\n".join(lines)


def attention_flops(num_tokens: int) -> int:
    """Operations of attention to train on one row: two products, forward, once more, and twice as many backward."""
    width = TRANSFORMER["num_attention_heads"] * TRANSFORMER["attention_head_dim"]
    return 4 * TRANSFORMER["num_layers"] * 2 * 2 * num_tokens**2 * width


def unequal_table() -> str:
    """What a mask over the padding of four prompts costs, against attention row by row."""
    columns = ["target", "trains", "attention, of all operations", "padding, of attention under a mask"]
    columns += [f"step under a mask, kernel {slower:g}" for slower in SLOWER]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    rows, longest = len(PROMPTS), max(PROMPTS)
    for target_px in TARGETS:
        num_latents = sum(height * width for height, width in (TARGETS[target_px], SOURCE))
        by_row = sum(attention_flops(num_latents + prompt) for prompt in PROMPTS)
        masked = rows * attention_flops(num_latents + longest)
        for name, lora in (("LoRA, rank 32", True), ("all", False)):
            row = row_flops(lora=lora, target_px=target_px, checkpointing=True)
            linear = row - attention_flops(num_latents + PROMPT)
            linear *= rows * (num_latents + longest) / (num_latents + PROMPT)  # runs over padding, too
            steps = " | ".join(f"{(linear + slower * masked) / (linear + by_row):.2f}" for slower in SLOWER)
            parts = f"{by_row / (linear + by_row):.2f} | {1 - by_row / masked:.2f}"
            lines.append(f"| {target_px} | {name} | {parts} | {steps} |")
    return "\n".join(lines)


def heads(unit: str) -> str:
    """The last columns."""
    return " | ".join(f"{unit}, {gpus} GPU{'s' if gpus > 1 else ''}" for gpus in GPUS) + " |"


def main() -> None:
    """All tables."""
    print(f"{training_table()}\n\n{extraction_table()}\n\n{unequal_table()}")


if __name__ == "__main__":
    main()
