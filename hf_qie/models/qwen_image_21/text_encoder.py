"""Qwen3-VL as the prompt encoder of Qwen-Image-2.1."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLModel

from hf_qie.models.prompt_encoder import PromptEncoder
from hf_qie.models.prompts import Prompt


class Encoder(PromptEncoder):
    """Its last hidden states, before the final norm."""

    full_class, base_class, config_class = Qwen3VLForConditionalGeneration, Qwen3VLModel, Qwen3VLConfig

    def prepare(self) -> None:
        """See `PromptEncoder`: the pipeline undoes the norm with a hook (pipeline_qwenimage21.py:299-316)."""
        self.model.language_model.norm = nn.Identity()

    def hidden_states(
        self, prompts: Sequence[Prompt], ids: Tensor, positions: Tensor, attention_mask: Tensor
    ) -> Tensor:
        """See `PromptEncoder`; the first layers are given features of the images' early layers too (DeepStack)."""
        embeds, outputs = self.embed(prompts, ids)
        early = {}
        if outputs is not None:
            features = [torch.cat(list(of_images)) for of_images in outputs.deepstack_features]
            early = {"visual_pos_masks": self.places(ids), "deepstack_visual_embeds": features}
        return self.model.language_model(
            inputs_embeds=embeds, position_ids=positions, attention_mask=attention_mask, use_cache=False, **early
        ).last_hidden_state

    def keep_one_of_each_layer(self) -> None:
        """See `PromptEncoder`; as many vision blocks as hand over features, which are kept to the end."""
        text, visual = self.model.language_model, self.model.visual
        num_kept = len(visual.deepstack_visual_indexes)
        text.layers, visual.blocks = text.layers[:1], visual.blocks[: max(num_kept, 1)]
        visual.deepstack_visual_indexes = list(range(num_kept))
        text._deepstack_process = with_features  # the model's own asks for places, which fake tensors do not have


def with_features(hidden: Tensor, places: Tensor, features: Tensor) -> Tensor:
    """`hidden[P, L, D]` in a copy with `features[images' tokens, D]` at `places[P, L]`: the bytes, not the numbers."""
    return hidden.masked_scatter(places[..., None], features)
