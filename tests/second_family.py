"""A made-up family of models: another template, latents of 8 channels, and the target behind the sources."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_qie.models.qwen_image.attention import PromptRows
from hf_qie.models.qwen_image.family import QwenImage
from hf_qie.models.templates import IMAGE_TOKEN, Template

SEEN: list[tuple[Tensor, Any]] = []  # latents and shapes of every call of its transformers
TEMPLATE = Template(before="<|im_start|>painter\n", picture=f"<{IMAGE_TOKEN}>", after=" please<|im_end|>", drop=6)


@dataclass(frozen=True, kw_only=True)
class Painter(QwenImage):
    """Sources first, then the target."""

    def load_transformer(self, model: str, **options: Any) -> nn.Module:
        transformer = QwenImage.load_transformer(model, **options)
        transformer.register_forward_pre_hook(note, with_kwargs=True)
        return transformer

    def predict(self, model: nn.Module, batch: dict[str, Any], noised: Tensor, sigma: Tensor) -> Tensor:
        target, *sources = [(1, height, width) for height, width in batch["grids"]]
        (output,) = model(
            hidden_states=torch.cat([batch["source_latents"].float(), noised.float()], dim=1),
            encoder_hidden_states=batch["prompt_embeds"].float(),
            attention_kwargs={"rows": PromptRows(batch["prompt_lengths"])},
            timestep=sigma.float(),
            img_shapes=[[*sources, target]] * len(noised),
            return_dict=False,
        )
        return output[:, -noised.shape[1] :]


def note(module: nn.Module, args: tuple, inputs: dict[str, Any]) -> None:
    SEEN.append((inputs["hidden_states"].detach().clone(), inputs["img_shapes"]))


PAINTER = Painter(
    pipeline="PainterPipeline",
    text_to_image_pipeline="PainterPipeline",
    edit=TEMPLATE,
    max_sources=None,
    vlm_area_px=112 * 112,
    vae_area_px=128 * 128,
    latent_width=32,
)
