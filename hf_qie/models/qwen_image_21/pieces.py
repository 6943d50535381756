"""Two autograd functions for packed rows: scale tokens by their noise level's factors, and slice overlapping spans.

Beside what they return, neither takes memory for more than one row, forward or backward: indexing would repeat the
factors for each token, and autograd would fill the gradient of each slice of keys and values up with zeros.

Letters: T tokens, W width of a token.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function


class Piece(NamedTuple):
    """Tokens in `num_levels` parts of one length; the first has the factors `[first_level]`, the next those behind."""

    num_tokens: int
    first_level: int
    num_levels: int


class ScaleByLevel(Function):
    """Tokens times the row of factors of their noise level, which is not repeated for each of them."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, factors: Tensor, pieces: Sequence[Piece]) -> Tensor:
        """`[1, T, W]` of `tokens[1, T, W]`, which are `pieces` in order, and `factors[levels, W]`."""
        ctx.pieces = pieces
        ctx.save_for_backward(tokens if ctx.needs_input_grad[1] else None, factors)
        return _scaled(tokens, factors, pieces)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """Of tokens, and of factors where these have one."""
        tokens, factors = ctx.saved_tensors
        factor_gradient = None
        if tokens is not None:
            factor_gradient = torch.zeros_like(factors)
            parts = zip(_parts(tokens, ctx.pieces), _parts(gradient, ctx.pieces), ctx.pieces, strict=True)
            for part, part_gradient, piece in parts:
                _factors_of(factor_gradient, piece).add_((part * part_gradient).sum(dim=(0, 2)))
        return _scaled(gradient, factors, ctx.pieces), factor_gradient, None


def _scaled(tokens: Tensor, factors: Tensor, pieces: Sequence[Piece]) -> Tensor:
    product = torch.empty_like(tokens)
    for part, out, piece in zip(_parts(tokens, pieces), _parts(product, pieces), pieces, strict=True):
        torch.mul(part, _factors_of(factors, piece)[:, None], out=out)
    return product


def _parts(tokens: Tensor, pieces: Sequence[Piece]) -> list[Tensor]:
    """Of each piece `[1, num_levels, tokens, W]`."""
    split = tokens.split([piece.num_tokens for piece in pieces], dim=1)
    return [part.unflatten(1, (piece.num_levels, -1)) for part, piece in zip(split, pieces, strict=True)]


def _factors_of(factors: Tensor, piece: Piece) -> Tensor:
    return factors[piece.first_level : piece.first_level + piece.num_levels]


class SliceSpans(Function):
    """Slices that may overlap; their gradients are added in place, where autograd would fill each up with zeros."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, spans: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
        """`[1, end - start, ...]` of `tokens[1, T, ...]` for each `(start, end)` of `spans`.

        From the last to the first, each is in front of those behind it or lies in them; together they are all tokens.
        """
        ctx.spans, ctx.shape = spans, tokens.shape
        return tuple(tokens[:, start:end] for start, end in spans)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The sum."""
        total, begun = gradients[0].new_empty(ctx.shape), ctx.shape[1]  # there is a gradient from `begun` on
        for (start, end), gradient in zip(reversed(ctx.spans), reversed(gradients), strict=True):
            if end <= begun:
                total[:, start:end].copy_(gradient)
                begun = start
            else:
                total[:, start:end].add_(gradient)
        return total, None
