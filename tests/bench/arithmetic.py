"""Point 1: arithmetic of extraction, counted on the meta device with the released 7B encoder's shapes.

Ours is the encoder as it runs: one packed pass over images, captions and the drop caption, without the language
head. The usual way is what the official pipeline's `encode_prompt` does for each prompt: the whole model, logits
included, over system text, images and one caption. Images are 392 x 392 pixels, as a square one becomes.
"""

from functools import cache
from pathlib import Path

import torch
from figures import AFTER_TOKENS, CAPTION_TOKENS, DROP_TOKENS, IMAGE_TOKENS, SYSTEM_TOKENS, Figure, at_most
from released import ENCODER
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from hf_qie.models.prompts import Prompt
from hf_qie.models.qwen_image.text_encoder import Encoder

GRID = 28  # patches of 14 pixels along the side of an image, four of them to a token
PATCH_VALUES = 3 * 2 * 14 * 14


@cache
def whole_model() -> Qwen2_5_VLForConditionalGeneration:
    """The 7B model without memory."""
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**ENCODER))
    return model.to(torch.bfloat16).eval()


class EncoderOnPaper(Encoder):
    """The encoder over a model without values, which has to be told what it would read from images' grids."""

    def __init__(self):
        self.model, self.device = whole_model().model, torch.device("meta")

    def embed(self, prompts: list[Prompt], ids: Tensor) -> tuple[Tensor, None]:
        """Embeddings of tokens; the images are seen, and nothing of them is kept."""
        for prompt in prompts:
            see_images(prompt)
        return self.model.get_input_embeddings()(ids), None


def see_images(prompt: Prompt) -> None:
    """The vision tower over all images of a prompt."""
    if prompt.vision:
        pixel_values, grids = prompt.vision["pixel_values"], prompt.vision["image_grid_thw"]
        places = torch.empty(len(pixel_values), 2, dtype=torch.long, device="meta")
        whole_model().model.visual(pixel_values, grids, position_ids=places)


def prompt_of(num_sources: int, branches: list[int]) -> Prompt:
    """A prompt with that many images and branches of those lengths."""
    image = [whole_model().config.image_token_id] * (GRID * GRID // 4)
    around = IMAGE_TOKENS - len(image)
    vision_start = whole_model().config.vision_start_token_id
    one = [1] * (around - 2) + [vision_start, *image, 1]
    shared = [1] * SYSTEM_TOKENS + one * num_sources
    return Prompt(
        shared=shared,
        branches=[[1] * length for length in branches],
        drop=SYSTEM_TOKENS,
        split=len(shared),
        vision={
            "pixel_values": torch.empty(num_sources * GRID * GRID, PATCH_VALUES, dtype=torch.bfloat16, device="meta"),
            "image_grid_thw": torch.tensor([[1, GRID, GRID]] * num_sources),
        },
    )


@cache
def ours(num_sources: int, *branches: int) -> int:
    """Operations of one packed pass."""
    with FlopCounterMode(display=False) as counter:
        EncoderOnPaper()([prompt_of(num_sources, list(branches))])
    return counter.get_total_flops()


@cache
def usual(num_sources: int, branch: int) -> int:
    """Operations of one pass of the whole model for one prompt."""
    model, prompt = whole_model(), prompt_of(num_sources, [branch])
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        see_images(prompt)
        ids = torch.empty(1, prompt.num_tokens, dtype=torch.long, device="meta")
        positions = torch.empty(3, 1, prompt.num_tokens, dtype=torch.long, device="meta")
        embeds = model.get_input_embeddings()(ids)
        model(inputs_embeds=embeds, position_ids=positions, use_cache=False, output_hidden_states=True)
    return counter.get_total_flops()


def measure(folder: Path) -> list[Figure]:
    """Three captions at one and at three sources, as they are, with an inverse, and with the drop caption."""
    three, drop = [CAPTION_TOKENS + AFTER_TOKENS] * 3, DROP_TOKENS + AFTER_TOKENS
    cases = [
        ("1 source", 1, three, 1, 0.42),
        ("3 sources", 3, three, 1, 0.38),
        ("1 source, and its inverse", 1, three, 2, 0.42),
        ("1 source, and the drop caption", 1, [*three, drop], 1, 0.42),
    ]
    return [
        at_most(
            limit,
            point="1",
            what=f"arithmetic to encode 3 captions of 50 tokens, {name}",
            ours=directions * ours(num_sources, *branches) / 1e12,
            usual=directions * sum(usual(num_sources, branch) for branch in branches) / 1e12,
            unit="TFLOP",
        )
        for name, num_sources, branches, directions, limit in cases
    ]
