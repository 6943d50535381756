"""What several noises for one prefix save with the released shape of Qwen-Image-2.1, on paper.

    python tests/bench/shared_prefix.py

Operations of full fine-tuning, forward and backward, for a sample, in parts of those with one noise a prefix, by
torch's counter on the meta device. In brackets what counting tokens alone gives: (P + K T) / (K (P + T)) for P tokens
of prompt and sources and T of the target.
"""

from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_qie.models.qwen_image_21.packed import QwenImage21Transformer2DModel
from hf_qie.models.qwen_image_21.transformer import predict

NUM_LAYERS = 32  # and all else as diffusers' class has it by default
NUM_TEXT = 100  # embeddings of a prompt
SIDES, SOURCES, TIMES = (1024, 512), (0, 1, 3), (1, 2, 4, 8)


@cache
def of_layers(num_layers: int) -> torch.nn.Module:
    """The transformer without values, and with few blocks."""
    with torch.device("meta"):
        return QwenImage21Transformer2DModel(num_layers=num_layers)


def tokens(side: int, num_sources: int) -> tuple[int, int]:
    """P and T."""
    return NUM_TEXT + num_sources * (1024 // 16) ** 2, (side // 16) ** 2


@cache
def operations(side: int, num_sources: int, times: int) -> float:
    """Of a step on one row with so many noises; all blocks but the first are alike."""
    few, more = (_counted(layers, side, num_sources, times) for layers in (2, 3))
    return few + (NUM_LAYERS - 2) * (more - few)


def _counted(num_layers: int, side: int, num_sources: int, times: int) -> int:
    source, target = (1024 // 16,) * 2, (side // 16,) * 2
    with torch.device("meta"):
        batch = {
            "source_latents": torch.empty(1, num_sources * source[0] * source[1], 64),
            "prompt_embeds": torch.empty(1, NUM_TEXT, 4096),
            "prompt_lengths": [NUM_TEXT],
            "image_slots": [[5 * (1 + place) for place in range(num_sources)]],
            "grids": [target, *[source] * num_sources],
        }
        noised, sigma = torch.empty(times, target[0] * target[1], 64), torch.empty(times)
    with FlopCounterMode(display=False) as counter:
        predict(of_layers(num_layers), batch, noised, sigma).sum().backward()
    return counter.get_total_flops()


def share(side: int, num_sources: int, times: int) -> float:
    """Operations a sample, in parts of those with one noise a prefix."""
    return operations(side, num_sources, times) / times / operations(side, num_sources, 1)


def share_by_tokens(side: int, num_sources: int, times: int) -> float:
    """The same, if every token cost the same."""
    prefix, target = tokens(side, num_sources)
    return (prefix + times * target) / (times * (prefix + target))


def line(side: int, num_sources: int) -> str:
    """Of the table, for a target's side and a number of sources."""
    prefix, target = tokens(side, num_sources)
    one = operations(side, num_sources, 1) / 1e12
    shares = [f"{share(side, num_sources, k):.2f} ({share_by_tokens(side, num_sources, k):.2f})" for k in TIMES[1:]]
    return f"| {side} | {num_sources} | {prefix:,} | {target:,} | {one:,.0f} | {' | '.join(shares)} |\n"


def table() -> str:
    """The whole table, as markdown."""
    head = f"| target | sources | P | T | TFLOP, K = 1 | {' | '.join(f'K = {k}' for k in TIMES[1:])} |\n"
    lines = [line(side, num_sources) for side in SIDES for num_sources in SOURCES]
    return head + "|---" * (4 + len(TIMES)) + "|\n" + "".join(lines)


if __name__ == "__main__":
    print(table())
