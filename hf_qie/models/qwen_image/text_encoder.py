"""Qwen2.5-VL as the prompt encoder: one pass per source set gives the embeddings of all its captions.

Letters: P prompts of a batch, L tokens of the longest, D width of the encoder.
"""

import logging
import math
from collections.abc import Sequence

import torch
from accelerate import cpu_offload
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel

from hf_qie.models.base import ForwardMemory
from hf_qie.models.prompts import Prompt, PromptEmbeddings
from hf_qie.runtime.memory_tracker import fake, forward_peak, num_bytes

logger = logging.getLogger(__name__)


class Encoder:
    """The base model without its language head: the head's logits would be the larger part of the arithmetic."""

    def __init__(
        self,
        model: str,
        *,
        revision: str | None,
        dtype: torch.dtype,
        device: torch.device,
        room_bytes: float = math.inf,
    ):
        """With at most `room_bytes` of weights on `device`; layers beyond it wait in CPU memory, numbers are the same.

        The least is `encoder_memory(...).least_weights`.
        """
        self.model = self.load(model, revision=revision, dtype=dtype)
        self.width: int = self.model.config.text_config.hidden_size
        self.place(device, room_bytes)
        self.device = self.model.visual.device  # with its index, which a process that runs alone does not name

    def load(self, model: str, *, revision: str | None, dtype: torch.dtype) -> Qwen2_5_VLModel:
        """The weights of the checkpoint, on the CPU."""
        full = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            model,
            subfolder="text_encoder",
            revision=revision,
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
        )
        return full.model.eval().requires_grad_(False)

    def place(self, device: torch.device, room_bytes: float) -> None:
        """Put the weights on `device`; of those beyond `room_bytes` the token embeddings and the last layers stay.

        Embeddings are then looked up on the CPU. accelerate's hooks copy the layers in, matrix by matrix, for each
        pass; encoder and VAE in turn would not do, as the encoder alone is nearly as large as a 16 GB card.
        """
        base, text = self.model, self.model.language_model
        if num_bytes(base) <= room_bytes:
            base.to(device)
            return
        table, layers = text.embed_tokens, text.layers
        fixed, layer = num_bytes(base) - num_bytes(table) - num_bytes(layers), num_bytes(layers[0])
        num_here = min(int((room_bytes - fixed) / layer) - 1, len(layers))  # less one for the copies
        assert num_here >= 0, "refused before anything was loaded"
        others = [part for part in (*base.children(), *text.children()) if part not in (text, table, layers)]
        for part in (*others, *layers[:num_here]):
            part.to(device)
        for part in layers[num_here:]:
            cpu_offload(part, execution_device=device)
        logger.info(
            "encoder: %d of %d layers on %s, %d in CPU memory, copied in for each batch; with the token embeddings, "
            "which are looked up there, %.1f GB of CPU memory",
            *(num_here, len(layers), device, len(layers) - num_here),
            (num_bytes(table) + (len(layers) - num_here) * layer) / 1e9,
        )

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
        table = self.model.get_input_embeddings()
        embeds = table(ids.to(table.weight.device)).to(ids.device)
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


class FakeEncoder(Encoder):
    """Of the checkpoint's config, with fake weights."""

    def load(self, model: str, *, revision: str | None, dtype: torch.dtype) -> Qwen2_5_VLModel:
        """See `Encoder`."""
        config = Qwen2_5_VLConfig.from_pretrained(model, subfolder="text_encoder", revision=revision)
        with torch.device("meta"):
            return fake(Qwen2_5_VLModel._from_config(config, dtype=dtype, attn_implementation="sdpa"))

    def place(self, device: torch.device, room_bytes: float) -> None:
        """They stay fake."""


def encoder_memory(
    model: str, *, revision: str | None, dtype: torch.dtype, prompts: Sequence[Prompt]
) -> ForwardMemory:
    """What a pass over `prompts` takes on its device; no weight is read."""
    encoder = FakeEncoder(model, revision=revision, dtype=dtype, device=torch.device("cpu"))
    text, visual, weights = encoder.model.language_model, encoder.model.visual, num_bytes(encoder.model)
    least = weights - num_bytes(text.embed_tokens) - num_bytes(text.layers) + num_bytes(text.layers[0])
    # without gradients every layer leaves one tensor behind: one of each kind has the peak of all
    text.layers, visual.blocks, visual.fullatt_block_indexes = text.layers[:1], visual.blocks[:2], [1]
    return ForwardMemory(weights=weights, least_weights=least, activations=forward_peak(encoder, prompts))


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
        shared=shared[prompt.drop : prompt.split],
        texts=[torch.cat([shared, branch])[prompt.split :] for branch in branches],
    )
