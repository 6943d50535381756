"""Operations on pieces of a sequence that move no more through memory than they must, backward as well.

Letters: T tokens, W width of a token.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function


class Piece(NamedTuple):
    """Tokens in `count` parts of one length, each with a row of factors: row `first`, the next, and so on."""

    num_tokens: int
    first: int
    count: int


class Scaled(Function):
    """Tokens times a row of factors, which is not repeated for each of them."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, factors: Tensor, pieces: Sequence[Piece]) -> Tensor:
        """`[1, T, W]` of `tokens[1, T, W]`, which are `pieces` in order, and `factors[rows, W]`."""
        ctx.pieces = pieces
        ctx.save_for_backward(tokens if ctx.needs_input_grad[1] else None, factors)
        return _scaled(tokens, factors, pieces)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """Of tokens, and of factors where these have one."""
        tokens, factors = ctx.saved_tensors
        of_factors = None
        if tokens is not None:
            of_factors = torch.zeros_like(factors)
            parts = zip(_parts(tokens, ctx.pieces), _parts(gradient, ctx.pieces), ctx.pieces, strict=True)
            for part, part_gradient, piece in parts:
                _rows(of_factors, piece).add_((part * part_gradient).sum(dim=(0, 2)))
        return _scaled(gradient, factors, ctx.pieces), of_factors, None


def _scaled(tokens: Tensor, factors: Tensor, pieces: Sequence[Piece]) -> Tensor:
    product = torch.empty_like(tokens)
    for part, out, piece in zip(_parts(tokens, pieces), _parts(product, pieces), pieces, strict=True):
        torch.mul(part, _rows(factors, piece)[:, None], out=out)
    return product


def _parts(tokens: Tensor, pieces: Sequence[Piece]) -> list[Tensor]:
    """Of each piece `[1, count, tokens, W]`."""
    split = tokens.split([piece.num_tokens for piece in pieces], dim=1)
    return [part.unflatten(1, (piece.count, -1)) for part, piece in zip(split, pieces, strict=True)]


def _rows(factors: Tensor, piece: Piece) -> Tensor:
    return factors[piece.first : piece.first + piece.count]


class Spans(Function):
    """Pieces that overlap; their gradients are added in place, where autograd would fill each up with zeros."""

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
