"""Qwen-Image-2.1's transformer over packed rows: prompts of any length, several noised targets behind one prefix.

diffusers takes layout and positions of a batch from its first row, so rows whose prompts differ in length come out
wrong, and it has one target a row. Here the rows of a batch, each its prefix (text and sources as the prompt has them)
and its K noised targets, lie one behind the other in one sequence; attention alone keeps them apart. With
`causal_condition` nothing in the prefix depends on a target or its noise level, so K targets share it, and every
number is that of K passes. Each block is called once, so that its weights are gathered, streamed or expanded once.

Letters: B rows, K noised targets of each, S target tokens, R source tokens, L prompt tokens, T tokens of all rows with
their targets, C width of a latent, D width of the encoder, W width of the transformer, H heads.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Any

import diffusers
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers import transformer_qwenimage21
from diffusers.models.transformers.transformer_qwenimage21 import apply_rotary_emb_qwen
from torch import Tensor, nn

from hf_qie.models.base import Grid


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


class Packing:
    """Where the rows of a batch lie in the packed sequence, with `num_targets` targets each."""

    def __init__(self, rows: Sequence[RowLayout], *, num_targets: int, causal: bool, device: torch.device):
        """`causal`: the prefix is modulated at noise level 0."""
        self.rows, self.num_targets, self.causal = rows, num_targets, causal
        # of the parts that have one noise level: of each row the prefix, then its targets
        self.lengths = [n for row in rows for n in (row.num_prefix, *[row.num_target] * num_targets)]
        # by row and segment of its prefix: which keys its queries see, None for all up to its end
        self.masks = [list(self._masks(row, device)) for row in rows]

    @staticmethod
    def _masks(row: RowLayout, device: torch.device) -> Iterator[Tensor | None]:
        end = 0
        for length, grid in row.segments:
            start, end = end, end + length
            causal = not grid and length > 1
            mask = torch.ones(length, end, dtype=torch.bool, device=device).tril(start) if causal else None
            yield mask if mask is None else mask[None, None]

    def per_token(self, levels: Tensor) -> Tensor:
        """`[1, T, width]` of `levels[B x K + 1, width]`, one for each target, and the last for prefixes.

        Where the prefix follows its target's noise level, `levels` has no such last one.
        """
        count, of = self.num_targets, []
        for i in range(len(self.rows)):
            mine = levels[i * count : (i + 1) * count].unbind()
            of += [levels[-1] if self.causal else mine[0], *mine]
        return torch.cat([one.expand(n, -1) for one, n in zip(of, self.lengths, strict=True)])[None]

    def pack(self, text: Sequence[Tensor], sources: Tensor, targets: Tensor) -> Tensor:
        """`[1, T, W]` of `text[L, W]` of each row, `sources[B, R, W]` and `targets[B x K, S, W]`."""
        parts = []
        for i, row in enumerate(self.rows):
            words = iter(text[i].split([length for length, grid in row.segments if not grid]))
            images = iter(sources[i].split([length for length, grid in row.segments if grid]))
            parts += [next(images if grid else words) for _, grid in row.segments]
            parts += targets[i * self.num_targets : (i + 1) * self.num_targets].unbind()
        return torch.cat(parts)[None]

    def targets(self, packed: Tensor) -> Tensor:
        """`[B x K, S, width]` of `packed[1, T, width]`."""
        parts = packed[0].split(self.lengths)
        return torch.stack([part for place, part in enumerate(parts) if place % (1 + self.num_targets)])


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
        """Outputs `[1, T, H, W / H]`; no row sees another."""
        outputs, at = [], 0
        for row, masks in zip(packing.rows, packing.masks, strict=True):
            length = row.num_prefix + packing.num_targets * row.num_target
            of_row = (each[:, at : at + length] for each in (query, key, value))
            outputs += self._attend(*of_row, row, masks, packing.num_targets)
            at += length
        return torch.cat(outputs, dim=1)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        row: RowLayout,
        masks: Sequence[Tensor | None],
        num_targets: int,
    ) -> Iterator[Tensor]:
        """Outputs `[1, tokens, H, W / H]` of the segments of a row: each sees what is before it and itself."""
        end = 0
        for (length, _), mask in zip(row.segments, masks, strict=True):
            start, end = end, end + length
            yield self._dispatch(query[:, start:end], key[:, :end], value[:, :end], mask)
        targets = [each[0, end:].unflatten(0, (num_targets, -1)) for each in (query, key, value)]
        if num_targets > 1:  # else the keys are in one piece already
            key, value = (
                torch.cat([before[:, :end].expand(num_targets, -1, -1, -1), own], dim=1)
                for before, own in ((key, targets[1]), (value, targets[2]))
            )
        yield self._dispatch(targets[0], key, value, None).flatten(0, 1)[None]

    def _dispatch(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return dispatch_attention_fn(query, key, value, attn_mask=mask, backend=self._attention_backend)


class QwenImage21TransformerBlock(transformer_qwenimage21.QwenImage21TransformerBlock):
    """diffusers' block, with a noise level for each target; under its name, by which others look for blocks."""

    def forward(self, hidden_states: Tensor, modulation: Tensor, rotary_emb: Tensor, packing: Packing) -> Tensor:
        """`[1, T, W]` of `hidden_states[1, T, W]`; `modulation[B x K + 1, 4 W]` has a row for each noise level."""
        scale1, gate1, scale2, gate2 = modulation.chunk(4, dim=-1)
        scaled = self.img_norm1(hidden_states) * (1 + packing.per_token(scale1))
        mixed = self.attn(scaled, rotary_emb=rotary_emb, packing=packing)
        hidden_states = hidden_states + packing.per_token(gate1).tanh() * mixed
        scaled = self.img_norm2(hidden_states) * (1 + packing.per_token(scale2))
        hidden_states = hidden_states + packing.per_token(gate2).tanh() * self.img_mlp(scaled)
        if hidden_states.dtype == torch.float16:
            hidden_states = hidden_states.clip(-65504, 65504)
        return hidden_states


class QwenImage21Transformer2DModel(diffusers.QwenImage21Transformer2DModel):
    """diffusers' transformer with another forward; under its name, which stands in the config of what is saved."""

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
        packing = Packing(rows, num_targets=num_targets, causal=causal, device=device)
        images = torch.cat([source_latents.flatten(0, 1), hidden_states.flatten(0, 1)])
        sources, targets = self.img_in(images).split([source_latents[..., 0].numel(), hidden_states[..., 0].numel()])
        lengths = [row.num_text for row in rows]
        words = torch.cat([prompt[:n] for prompt, n in zip(encoder_hidden_states, lengths, strict=True)])
        text = self.txt_in(words).split(lengths)
        packed = packing.pack(
            text,
            sources.unflatten(0, source_latents.shape[:2]),
            targets.unflatten(0, hidden_states.shape[:2]),
        )
        timestep = timestep.to(packed.dtype)
        if causal:
            timestep = torch.cat([timestep, timestep.new_zeros(1)])
        temb = self.time_text_embed(timestep, packed)
        modulation = self.modulation(temb)
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
