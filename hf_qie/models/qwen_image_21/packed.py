"""Qwen-Image-2.1's transformer over packed rows: prompts of any length, several noised targets behind one prefix.

diffusers takes layout and positions of a batch from its first row, so rows whose prompts differ in length come out
wrong, and it has one target a row. Here the rows of a batch, each its prefix (text and sources as the prompt has them)
and its K noised targets, lie one behind the other in one sequence; attention alone keeps them apart. With
`causal_condition` nothing in the prefix depends on a target or its noise level, so K targets share it, and every
number is that of K passes. Each block is called once, so that its weights are gathered, streamed or expanded once.

Letters: B rows, K noised targets of each, S target tokens, R source tokens, L prompt tokens, T tokens of all rows with
their targets, C width of a latent, D width of the encoder, W width of the transformer, H heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers import transformer_qwenimage21
from diffusers.models.transformers.transformer_qwenimage21 import apply_rotary_emb_qwen
from torch import Tensor, nn

from hf_qie.models.base import Grid
from hf_qie.models.qwen_image_21.pieces import Piece, ScaleByLevel, SliceSpans


@dataclass(frozen=True, kw_only=True)
class RowLayout:
    """Where text, sources and targets of a row lie; of the prompt's embeddings `slots[n]` are before source n."""

    target: Grid
    sources: tuple[Grid, ...]
    num_text: int
    slots: tuple[int, ...]

    @cached_property
    def segments(self) -> list[tuple[int, Grid | None]]:
        """Lengths of the prefix's segments in order, with the grid of those that are a source."""
        found, before = [], 0
        for slot, grid in zip(self.slots, self.sources, strict=True):
            found += [(slot - before, None), (grid[0] * grid[1], grid)]
            before = slot
        found.append((self.num_text - before, None))
        return [segment for segment in found if segment[0]]

    @property
    def num_prefix(self) -> int:
        """Tokens of the prefix."""
        return sum(length for length, _ in self.segments)

    @property
    def num_target(self) -> int:
        """S."""
        return self.target[0] * self.target[1]

    def num_pairs(self, num_targets: int) -> int:
        """Pairs of a query and a key that attention computes, masked ones included."""
        pairs, end = num_targets * self.num_target * (self.num_prefix + self.num_target), 0
        for length, _ in self.segments:
            end += length
            pairs += length * end
        return pairs

    def positions(self, num_targets: int, device: torch.device) -> Tensor:
        """Positions `[3, tokens]` (frame, height, width) of the prefix and `num_targets` targets.

        Text moves on along all three; an image stays at one frame, its grid centred on 0, and the text behind it goes
        on after its longer side (transformer_qwenimage21.py, QwenImage21Rope).
        """
        found, at = [], 0
        for length, grid in self.segments:
            if grid:
                found.append(_grid_positions(at, grid, device))
                at += max(grid)
            else:
                found.append(torch.arange(at, at + length, device=device).expand(3, -1))
                at += length
        return torch.cat([*found, *[_grid_positions(at, self.target, device)] * num_targets], dim=1)


def _grid_positions(frame: int, grid: Grid, device: torch.device) -> Tensor:
    """`[3, height x width]` of an image at a frame."""
    height, width = grid
    rows = torch.arange(-(height - height // 2), height // 2, device=device)
    columns = torch.arange(-(width - width // 2), width // 2, device=device)
    frames = torch.full((height * width,), frame, device=device)
    return torch.stack([frames, rows[:, None].expand(grid).flatten(), columns.expand(grid).flatten()])


class AttentionCall(NamedTuple):
    """Queries that attend together, which follow those of the call before, and the keys that they see."""

    query_length: int
    # `(start, end)` in the packed sequence: one; of several targets the prefix, which all see, and then their own
    key_spans: list[tuple[int, int]]
    mask: Tensor | None  # what is added to scores; None where all queries see all keys


class Packing:
    """Where the rows of a batch lie in the packed sequence, with `num_targets` targets each."""

    def __init__(
        self, rows: Sequence[RowLayout], *, num_targets: int, causal: bool, dtype: torch.dtype, device: torch.device
    ):
        """`causal`: the prefix is modulated at noise level 0; `dtype` is that of queries and keys."""
        self.rows, self.num_targets = rows, num_targets
        # of each row its prefix and its targets, with their noise levels
        self.pieces: list[Piece] = []
        # of each row the segments of its prefix, then its targets
        self.attention_calls: list[AttentionCall] = []
        start = 0
        for number, row in enumerate(rows):
            level, of_targets = number * num_targets, num_targets * row.num_target
            prefix_level = len(rows) * num_targets if causal else level
            self.pieces.append(Piece(num_tokens=row.num_prefix, first_level=prefix_level, num_levels=1))
            self.pieces.append(Piece(num_tokens=of_targets, first_level=level, num_levels=num_targets))
            prefix_end = start
            for length, grid in row.segments:
                prefix_end += length
                mask = None if grid or length == 1 else _causal_mask(length, prefix_end - start, dtype, device)
                self.attention_calls.append(AttentionCall(length, [(start, prefix_end)], mask))
            end = prefix_end + of_targets
            spans = [(start, end)] if num_targets == 1 else [(start, prefix_end), (prefix_end, end)]
            self.attention_calls.append(AttentionCall(of_targets, spans, None))
            start = end

    @property
    def query_lengths(self) -> list[int]:
        """Of all calls of attention, in order; together they are all tokens."""
        return [call.query_length for call in self.attention_calls]

    @property
    def key_spans(self) -> list[tuple[int, int]]:
        """Of all calls of attention, in order."""
        return [span for call in self.attention_calls for span in call.key_spans]

    def scale(self, tokens: Tensor, factors: Tensor) -> Tensor:
        """`tokens[1, T, W]` times those of `factors[B x K + 1, W]` that belong to their noise level.

        There is a row for each target, and the last for prefixes. Where these follow the noise level of their target,
        there is no such last one.
        """
        return ScaleByLevel.apply(tokens, factors, self.pieces)

    def pack(self, text: Tensor, images: Tensor) -> Tensor:
        """`[1, T, W]` of all rows' text, `[., W]`, and images, `[., W]`: all sources, then all targets."""
        segments = [segment for row in self.rows for segment in row.segments]
        text_tokens = iter(text.split([length for length, grid in segments if not grid]))
        of_sources = [length for length, grid in segments if grid]
        images = images.split([*of_sources, *(self.num_targets * row.num_target for row in self.rows)])
        sources, parts = iter(images), []
        for row, targets in zip(self.rows, images[len(of_sources) :], strict=True):
            parts += [next(sources if grid else text_tokens) for _, grid in row.segments]
            parts.append(targets)
        return torch.cat(parts)[None]

    def targets(self, packed: Tensor) -> Tensor:
        """`[B x K, S, width]` of `packed[1, T, width]`."""
        parts = packed.split([piece.num_tokens for piece in self.pieces], dim=1)[1::2]
        return torch.cat(parts, dim=1).unflatten(1, (len(self.rows) * self.num_targets, -1)).squeeze(0)


def _causal_mask(num_queries: int, num_keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`[1, 1, num_queries, num_keys]` for queries that are the last of the keys."""
    full = torch.full((1, 1, num_queries, num_keys), -torch.inf, dtype=dtype, device=device)
    return full.triu(num_keys - num_queries + 1)


class PackedAttention:
    """What `QwenImage21AttnProcessor` computes, of rows that lie one behind the other."""

    _attention_backend = _parallel_config = None  # diffusers asks for them

    def __call__(self, attn: nn.Module, hidden_states: Tensor, *, rotary_emb: Tensor, packing: Packing) -> Tensor:
        """`[1, T, W]` of `hidden_states[1, T, W]`; `rotary_emb[T, W / H / 2]` is complex."""
        query, key, value = (
            project(hidden_states).unflatten(-1, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = (
            apply_rotary_emb_qwen(norm(each).to(value.dtype), rotary_emb, use_real=False)
            for norm, each in ((attn.norm_q, query), (attn.norm_k, key))
        )
        mixed = self._attend_rows(query, key, value, packing)
        return attn.to_out[1](attn.to_out[0](mixed.flatten(2).type_as(query)))

    @torch.compiler.disable  # it would be compiled anew for every length of a prompt
    def _attend_rows(self, query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> Tensor:
        """Outputs `[1, T, H, W / H]`: segments and targets see what is before them in their row, and themselves."""
        queries = query.split(packing.query_lengths, dim=1)
        keys, values = (_key_slices(each, packing) for each in (key, value))
        outputs = [
            self._attend(*parts, packing.num_targets)
            for parts in zip(packing.attention_calls, queries, keys, values, strict=True)
        ]
        return torch.cat(outputs, dim=1)

    def _attend(
        self, call: AttentionCall, query: Tensor, keys: list[Tensor], values: list[Tensor], num_targets: int
    ) -> Tensor:
        """Outputs `[1, queries, H, W / H]` of a call; no target sees another."""
        if len(call.key_spans) == 1:
            return self._dispatch(query, *keys, *values, call.mask)
        query, own_key, own_value = (
            each.unflatten(1, (num_targets, -1)).squeeze(0) for each in (query, keys[1], values[1])
        )
        key, value = (
            torch.cat([prefix.expand(num_targets, -1, -1, -1), own], dim=1)
            for prefix, own in ((keys[0], own_key), (values[0], own_value))
        )
        return self._dispatch(query, key, value, None).flatten(0, 1)[None]

    def _dispatch(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        mask = mask if mask is None else mask.to(query.dtype)  # a copy only where layers differ in dtype
        return dispatch_attention_fn(query, key, value, attn_mask=mask, backend=self._attention_backend)


def _key_slices(tokens: Tensor, packing: Packing) -> list[list[Tensor]]:
    """Keys or values of each call of attention, one for each of its spans."""
    slices = iter(SliceSpans.apply(tokens, packing.key_spans))
    return [[next(slices) for _ in call.key_spans] for call in packing.attention_calls]


class QwenImage21TransformerBlock(transformer_qwenimage21.QwenImage21TransformerBlock):
    """diffusers' block, with a noise level for each target; under its name, by which others look for blocks."""

    def forward(self, hidden_states: Tensor, modulation: Tensor, rotary_emb: Tensor, packing: Packing) -> Tensor:
        """`[1, T, W]` of `hidden_states[1, T, W]`; `modulation[B x K + 1, 4 W]` has four factors for a noise level."""
        scale1, gate1, scale2, gate2 = modulation.chunk(4, dim=-1)
        scaled = packing.scale(self.img_norm1(hidden_states), scale1)
        mixed = self.attn(scaled, rotary_emb=rotary_emb, packing=packing)
        hidden_states = hidden_states + packing.scale(mixed, gate1)
        scaled = packing.scale(self.img_norm2(hidden_states), scale2)
        hidden_states = hidden_states + packing.scale(self.img_mlp(scaled), gate2)
        if hidden_states.dtype == torch.float16:
            hidden_states = hidden_states.clip(-65504, 65504)
        return hidden_states


class QwenImage21Transformer2DModel(diffusers.QwenImage21Transformer2DModel):
    """diffusers' transformer with another forward; under its name, which stands in the config of what is saved."""

    # diffusers takes the keys of a config from the signature of `__init__` (ConfigMixin._get_init_keys): with *args
    # and **kwargs alone it would ignore a checkpoint's config and build a transformer of the default shape
    @wraps(diffusers.QwenImage21Transformer2DModel.__init__)
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for block in self.transformer_blocks:
            block.__class__ = QwenImage21TransformerBlock
        self.set_attn_processor(PackedAttention())
        self.frequencies: dict[torch.device, list[Tensor]] = {}

    def forward(
        self,
        hidden_states: Tensor,
        source_latents: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        rows: Sequence[RowLayout],
    ) -> Tensor:
        """The velocity `[B x K, S, C]` in noised targets `hidden_states[B x K, S, C]` at `timestep[B x K]`, 0 to 1.

        `source_latents[B, R, C]` are clean; of `encoder_hidden_states[B, L, D]`, the prompts' text alone, each row has
        `num_text` and padding behind.
        """
        causal, device = self.config.causal_condition, hidden_states.device
        num_targets = len(hidden_states) // len(rows)
        assert causal or num_targets == 1, "the prefix depends on the noise level"
        images = self.img_in(torch.cat([source_latents.flatten(0, 1), hidden_states.flatten(0, 1)]))
        text_tokens = [prompt[: row.num_text] for prompt, row in zip(encoder_hidden_states, rows, strict=True)]
        packing = Packing(rows, num_targets=num_targets, causal=causal, dtype=images.dtype, device=device)
        packed = packing.pack(self.txt_in(torch.cat(text_tokens)), images)
        timestep = timestep.to(packed.dtype)
        if causal:
            timestep = torch.cat([timestep, timestep.new_zeros(1)])
        temb = self.time_text_embed(timestep, packed)
        scale1, gate1, scale2, gate2 = self.modulation(temb).chunk(4, dim=-1)  # of all blocks
        modulation = torch.cat([1 + scale1, gate1.tanh(), 1 + scale2, gate2.tanh()], dim=-1)
        rotary_emb = self.rotary(rows, num_targets, device)
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                packed = self._gradient_checkpointing_func(block, packed, modulation, rotary_emb, packing)
            else:
                packed = block(packed, modulation, rotary_emb, packing)
        targets = packing.targets(packed)
        return self.proj_out(self.norm_out(targets, temb[: len(targets)]))

    def rotary(self, rows: Sequence[RowLayout], num_targets: int, device: torch.device) -> Tensor:
        """Rotary factors `[T, W / H / 2]`, complex, computed on the device: diffusers looks them up on the host."""
        positions = torch.cat([row.positions(num_targets, device) for row in rows], dim=1)
        angles = [torch.outer(axis, each) for axis, each in zip(positions, self._frequencies(device), strict=True)]
        angles = torch.cat(angles, dim=-1)
        return torch.polar(torch.ones_like(angles), angles)

    def _frequencies(self, device: torch.device) -> list[Tensor]:
        """By axis, made on the CPU as diffusers makes them: one bit more or less is a thousandth at far positions.

        transformer_qwenimage21.py, QwenImage21Rope.rope_params.
        """
        if device not in self.frequencies:
            halves = ((dim, torch.arange(0, dim, 2, device="cpu").float()) for dim in self.pos_embed.axes_dim)
            found = [1.0 / torch.pow(self.pos_embed.theta, half.div(dim)) for dim, half in halves]
            self.frequencies[device] = [each.to(device) for each in found]
        return self.frequencies[device]
