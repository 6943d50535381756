"""A vision-language model as the prompt encoder: one pass per source set gives the embeddings of all its captions.

Letters: P prompts of a batch, L tokens of the longest, D width of the encoder.
"""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from accelerate import cpu_offload
from torch import Tensor

from hf_qie.models.base import ForwardMemory
from hf_qie.models.prompts import Prompt, PromptEmbeddings
from hf_qie.runtime.memory_tracker import fake, forward_peak, num_bytes

logger = logging.getLogger(__name__)


class PromptEncoder(ABC):
    """The base model without its language head: the head's logits would be the larger part of the arithmetic.

    It has a `language_model` of `embed_tokens`, `layers` and others, a `visual`, and positions by `get_rope_index`.
    """

    full_class: ClassVar[Any]  # with the language head, as a checkpoint has it
    base_class: ClassVar[Any]
    config_class: ClassVar[Any]

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
        self.prepare()
        self.width: int = self.model.config.text_config.hidden_size
        self.place(device, room_bytes)
        self.device = self.model.visual.device  # with its index, which a process that runs alone does not name

    def load(self, model: str, *, revision: str | None, dtype: torch.dtype) -> Any:
        """The weights of the checkpoint, on the CPU."""
        full = self.full_class.from_pretrained(
            model,
            subfolder="text_encoder",
            revision=revision,
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
        )
        return full.model.eval().requires_grad_(False)

    def prepare(self) -> None:  # noqa: B027, most need nothing
        """Change the model to give what the pipeline takes."""

    @abstractmethod
    def hidden_states(
        self, prompts: Sequence[Prompt], ids: Tensor, positions: Tensor, attention_mask: Tensor
    ) -> Tensor:
        """What the pipeline takes as embeddings, `[P, L, D]`, of tokens `ids[P, L]` and the images of `prompts`.

        `positions[3, P, L]`; `attention_mask[P, 1, L, L]` says which tokens (last) each token sees.
        """

    @abstractmethod
    def keep_one_of_each_layer(self) -> None:
        """Leave no more layers than have the peak of all in a pass without gradients."""

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
        attention_mask = visible(branch.to(self.device))[:, None]
        hidden = self.hidden_states(prompts, ids.to(self.device), positions.to(self.device), attention_mask)
        return [unpack(prompt, row) for prompt, row in zip(prompts, hidden, strict=True)]

    def embed(self, prompts: Sequence[Prompt], ids: Tensor) -> tuple[Tensor, Any]:
        """Token embeddings `[P, L, D]` with the images' features in their places, and what the vision part gives.

        Each image is encoded once; without any there is None.
        """
        table = self.model.get_input_embeddings()
        embeds = table(ids.to(table.weight.device)).to(ids.device)
        vision = [prompt.vision for prompt in prompts if prompt.vision]
        if not vision:
            return embeds, None
        outputs = self.model.get_image_features(
            *(torch.cat([one[name] for one in vision]).to(self.device) for name in ("pixel_values", "image_grid_thw"))
        )
        features = torch.cat(list(outputs.pooler_output)).to(embeds.dtype)
        return embeds.masked_scatter(self.places(ids)[..., None], features), outputs

    def places(self, ids: Tensor) -> Tensor:
        """Which of the tokens `ids` stand for a part of an image."""
        return ids == self.model.config.image_token_id

    def positions(self, prompt: Prompt) -> Tensor:
        """M-RoPE positions `[3, tokens]`; each branch counts on from the end of the shared part."""
        shared = torch.tensor([prompt.shared])
        is_image = self.places(shared).int()
        # without token types the model falls back to 1-D positions, in silence
        start, _ = self.model.get_rope_index(
            shared, mm_token_type_ids=is_image, image_grid_thw=prompt.vision.get("image_grid_thw")
        )
        first = int(start.max()) + 1 if prompt.shared else 0
        rest = [torch.arange(len(tokens)).expand(3, -1) + first for tokens in prompt.branches]
        return torch.cat([start[:, 0], *rest], dim=1)


def encoder_memory(
    kind: type[PromptEncoder], model: str, *, revision: str | None, dtype: torch.dtype, prompts: Sequence[Prompt]
) -> ForwardMemory:
    """What a pass of an encoder of that kind over `prompts` takes on its device; no weight is read."""

    class FakeEncoder(kind):
        """Of the checkpoint's config, with fake weights, which stay where they are."""

        def load(self, model: str, *, revision: str | None, dtype: torch.dtype) -> Any:
            config = self.config_class.from_pretrained(model, subfolder="text_encoder", revision=revision)
            with torch.device("meta"):
                return fake(self.base_class._from_config(config, dtype=dtype, attn_implementation="sdpa"))

        def place(self, device: torch.device, room_bytes: float) -> None:
            pass

    encoder = FakeEncoder(model, revision=revision, dtype=dtype, device=torch.device("cpu"))
    text, weights = encoder.model.language_model, num_bytes(encoder.model)
    least = weights - num_bytes(text.embed_tokens) - num_bytes(text.layers) + num_bytes(text.layers[0])
    encoder.keep_one_of_each_layer()
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
    """Cut `hidden[L, D]` of a packed prompt into what is shared and captions, without the system text."""
    cut = len(prompt.shared)
    shared, rest = hidden[:cut], hidden[cut : prompt.num_tokens]
    branches = rest.split([len(tokens) for tokens in prompt.branches])
    before = shared[prompt.drop : prompt.split]
    if prompt.image_token is not None:
        tokens = enumerate(prompt.shared[prompt.drop : prompt.split])
        kept = [place for place, token in tokens if token != prompt.image_token]
        before = before[torch.tensor(kept, dtype=torch.long, device=before.device)]
    return PromptEmbeddings(
        shared=before,
        texts=[torch.cat([shared, branch])[prompt.split :] for branch in branches],
        slots=prompt.slots,
    )
