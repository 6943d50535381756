"""Qwen2.5-VL as the prompt encoder: one pass per source set gives the embeddings of all its captions.

Letters: P prompts of a batch, L tokens of the longest, D width of the encoder.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from hf_qie.models.base import Prompt, PromptEmbeddings


class Encoder:
    """The base model without its language head: the head's logits would be the larger part of the arithmetic."""

    def __init__(self, model: str, *, revision: str | None, dtype: torch.dtype, device: torch.device):
        full = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            model,
            subfolder="text_encoder",
            revision=revision,
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
        )
        self.model = full.model.to(device).eval().requires_grad_(False)
        self.width: int = full.config.text_config.hidden_size
        self.device = self.model.device  # with its index, which a process that runs alone does not name

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[Prompt]) -> list[PromptEmbeddings]:
        """Embeddings of each prompt's images and captions, on the encoder's device."""
        packed = [pack(prompt) for prompt in prompts]
        length = max(len(ids) for ids, _ in packed)
        ids = torch.zeros(len(prompts), length, dtype=torch.long)
        branch = torch.full((len(prompts), length), -1)
        positions = torch.zeros(3, len(prompts), length, dtype=torch.long)
        for i, (prompt, (tokens, numbers)) in enumerate(zip(prompts, packed, strict=True)):
            ids[i, : len(tokens)] = tokens
            branch[i, : len(tokens)] = numbers
            positions[:, i, : len(tokens)] = self.positions(prompt)
        hidden = self.model.language_model(
            inputs_embeds=self.embed(prompts, ids.to(self.device)),
            position_ids=positions.to(self.device),
            attention_mask={"full_attention": visible(branch.to(self.device))[:, None]},
            use_cache=False,
        ).last_hidden_state
        return [unpack(prompt, row) for prompt, row in zip(prompts, hidden, strict=True)]

    def embed(self, prompts: Sequence[Prompt], ids: Tensor) -> Tensor:
        """Token embeddings `[P, L, D]` with the images' features in their places; each image is seen once."""
        embeds = self.model.get_input_embeddings()(ids)
        seen = [prompt.vision for prompt in prompts if prompt.vision]
        if not seen:
            return embeds
        features = self.model.get_image_features(
            *(torch.cat([one[name] for one in seen]).to(self.device) for name in ("pixel_values", "image_grid_thw"))
        ).pooler_output
        places = (ids == self.model.config.image_token_id)[..., None]
        return embeds.masked_scatter(places, torch.cat(list(features)).to(embeds.dtype))

    def positions(self, prompt: Prompt) -> Tensor:
        """M-RoPE positions `[3, tokens]`; each branch counts on from the end of the shared part."""
        shared = torch.tensor([prompt.shared])
        is_image = (shared == self.model.config.image_token_id).int()
        # without token types the model falls back to 1-D positions, in silence
        start, _ = self.model.get_rope_index(
            shared, mm_token_type_ids=is_image, image_grid_thw=prompt.vision.get("image_grid_thw")
        )
        first = int(start.max()) + 1 if prompt.shared else 0
        rest = [torch.arange(len(tokens)).expand(3, -1) + first for tokens in prompt.branches]
        return torch.cat([start[:, 0], *rest], dim=1)


def pack(prompt: Prompt) -> tuple[Tensor, Tensor]:
    """Tokens of the shared part and all branches in a row, and for each the number of its branch, 0 for shared."""
    parts = [prompt.shared, *prompt.branches]
    tokens = torch.tensor([token for part in parts for token in part])
    return tokens, torch.arange(len(parts)).repeat_interleave(torch.tensor([len(part) for part in parts]))


def visible(branch: Tensor) -> Tensor:
    """Attention mask `[P, L, L]`: a token sees what stands before it in the shared part and in its own branch.

    `branch[P, L]` is 0 for shared tokens and -1 for padding, which sees itself: no row of the softmax may be empty.
    """
    query, key = branch[:, :, None], branch[:, None, :]
    causal = torch.ones(branch.shape[1], branch.shape[1], dtype=torch.bool, device=branch.device).tril()
    own = torch.eye(branch.shape[1], dtype=torch.bool, device=branch.device)
    return (causal & ((key == 0) | (key == query)) & (query >= 0)) | own


def unpack(prompt: Prompt, hidden: Tensor) -> PromptEmbeddings:
    """Cut `hidden[L, D]` of a packed prompt into images and captions, without the system text."""
    cut = len(prompt.shared)
    shared, rest = hidden[:cut], hidden[cut : prompt.num_tokens]
    branches = rest.split([len(tokens) for tokens in prompt.branches])
    return PromptEmbeddings(
        image=shared[prompt.drop : prompt.split],
        texts=[torch.cat([shared, branch])[prompt.split :] for branch in branches],
    )
