"""Qwen2.5-VL as the prompt encoder of Qwen-Image."""

from collections.abc import Sequence

from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel

from hf_qie.models.prompt_encoder import PromptEncoder
from hf_qie.models.prompts import Prompt


class Encoder(PromptEncoder):
    """Its last hidden states, behind the final norm."""

    full_class, base_class = Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel
    config_class = Qwen2_5_VLConfig

    def hidden_states(
        self, prompts: Sequence[Prompt], ids: Tensor, positions: Tensor, attention_mask: Tensor
    ) -> Tensor:
        """See `PromptEncoder`."""
        return self.model.language_model(
            inputs_embeds=self.embed(prompts, ids)[0],
            position_ids=positions,
            attention_mask={"full_attention": attention_mask},
            use_cache=False,
        ).last_hidden_state

    def keep_one_of_each_layer(self) -> None:
        """See `PromptEncoder`; vision blocks see windows or all of an image."""
        text, visual = self.model.language_model, self.model.visual
        text.layers, visual.blocks, visual.fullatt_block_indexes = text.layers[:1], visual.blocks[:2], [1]
