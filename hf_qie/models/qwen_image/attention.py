"""Joint attention of prompts and latents, row by row where the prompts of a batch are unequal.

diffusers masks the padding behind prompts, and under a mask SDPA does not take flash attention. Without one a row
attends to its own tokens alone, and nothing is computed on padding; with thousands of tokens a row fills a GPU.

Letters: B rows, L tokens of the longest prompt, S latent tokens, H heads, E width of a head, W = H E.
"""

from collections.abc import Sequence

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0, apply_rotary_emb_qwen
from torch import Tensor, nn
from torch.nn.functional import pad


class PromptRows:
    """Tokens of the prompt of each row, known on the host; an object, as torch.compile makes a graph for each number.

    A transformer with `RowAttention` is given it as `attention_kwargs={"rows": rows}`.
    """

    def __init__(self, lengths: Sequence[int]):
        self.lengths = lengths


class RowAttention(QwenDoubleStreamAttnProcessor2_0):
    """diffusers' processor, which also takes `rows` in place of a mask."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        rows: PromptRows | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What latents `hidden_states[B, S, W]` and prompts `encoder_hidden_states[B, L, W]` become, as they are.

        Rotary factors, `[S, E / 2]` and `[L, E / 2]`, are complex.
        """
        if rows is None:
            given = encoder_hidden_states, encoder_hidden_states_mask, attention_mask, image_rotary_emb
            return super().__call__(attn, hidden_states, *given)
        of_latents, of_prompts = image_rotary_emb
        latents = _heads(
            attn, hidden_states, of_latents, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k)
        )
        prompts = _heads(
            attn,
            encoder_hidden_states,
            of_prompts,
            (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
            (attn.norm_added_q, attn.norm_added_k),
        )
        outputs = self._attend_rows(latents, prompts, rows)
        image, text = (each.flatten(2).type_as(latents[0]) for each in outputs)
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)

    @torch.compiler.disable  # it would be compiled anew for every length of a prompt
    def _attend_rows(
        self, latents: Sequence[Tensor], prompts: Sequence[Tensor], rows: PromptRows
    ) -> tuple[Tensor, Tensor]:
        """Outputs `[B, S, H, E]` and `[B, L, H, E]`, zero at padding, of each stream's query, key and value."""
        longest, images, texts = prompts[0].shape[1], [], []
        # unbound, as the gradient of a slice of a batch would be as large as the batch
        by_row = zip(*(each.unbind() for each in (*prompts, *latents)), strict=True)
        for length, parts in zip(rows.lengths, by_row, strict=True):
            joint = [torch.cat([parts[i][:length], parts[i + 3]])[None] for i in range(3)]
            (mixed,) = dispatch_attention_fn(*joint, backend=self._attention_backend)
            text, image = mixed.tensor_split([length])
            texts.append(pad(text, (0, 0, 0, 0, 0, longest - length)))
            images.append(image)
        return torch.stack(images), torch.stack(texts)


def _heads(
    attn: nn.Module, states: Tensor, rotary: Tensor, layers: Sequence[nn.Module], norms: Sequence[nn.Module]
) -> list[Tensor]:
    """Query, key and value `[B, tokens, H, E]`, as `QwenDoubleStreamAttnProcessor2_0` makes them of one stream."""
    query, key, value = (layer(states).unflatten(-1, (attn.heads, -1)) for layer in layers)
    query, key = (norm(each) for norm, each in zip(norms, (query, key), strict=True))
    return [apply_rotary_emb_qwen(each, rotary, use_real=False) for each in (query, key)] + [value]
