"""The two low-rank products of `layer.py`, and dropout, with gradients in closed form.

    down(x, A, p) = A dropout(x)         up(y, h, B) = y + B h         Dropout(p)(x) = dropout(x)

They give what the formulas give. What they change is the cost of a training step on a processor:

- torch draws a dropout mask one element after the other, which takes as long as half a projection of width 768, and
  keeps it, and the masked input, for the backward. Here four elements share one 64-bit random number, so p is rounded
  to a multiple of 2^-16, and only the generator's seed is kept: the mask is drawn again, chunk by chunk in the cache.
- Products with a side as short as the rank are fast in one order of their factors and slow in the other.

On other devices and under `torch.compile` the plain formulas run.

Axes: N rows (samples x tokens), D width, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK = 2**16
"""Elements that are masked at a time: input, mask and random numbers of a chunk stay in the second-level cache."""
LEVELS = 2**16
"""Dropout probabilities are multiples of 1 / LEVELS."""


def down(x: Tensor, A: Tensor, p: float) -> Tensor:
    """Return A dropout(x).

    Args:
        x: [..., D].
        A: [R, D].
        p: Probability that an element of x is left out; the others are divided by 1 - p.

    Returns:
        [..., R].
    """
    dropped = round(p * LEVELS)
    if not 0 < dropped < LEVELS or not _here(x):
        return F.linear(F.dropout(x, p), A) if p else F.linear(x, A)
    x, A = _cast(x, A)
    with torch.autocast(x.device.type, enabled=False):
        return _Down.apply(x, A, dropped, torch.randint(2**63 - 1, ()).item())


def up(y: Tensor, h: Tensor, B: Tensor) -> Tensor:
    """Return y + B h for y [..., D], h [..., R] and B [D, R]."""
    if not _here(y):
        return y + F.linear(h, B)
    h, B = _cast(h, B)
    with torch.autocast(y.device.type, enabled=False):
        return y + _Up.apply(h, B)


class Dropout(nn.Dropout):
    """`nn.Dropout` with the masks of this module."""

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements of x in training."""
        dropped = round(self.p * LEVELS)
        if not self.training or self.inplace or not 0 < dropped < LEVELS or not _here(x):
            return super().forward(x)
        return _Dropout.apply(x, dropped, torch.randint(2**63 - 1, ()).item())


def replace_dropout(model: nn.Module) -> None:
    """Let a model that is trained here draw its masks by this module's `Dropout`."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Dropout:
                setattr(parent, name, Dropout(child.p, child.inplace).train(child.training))


def _here(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _cast(*tensors: Tensor) -> list[Tensor]:
    """Do what autocast does to the arguments of a product."""
    if not torch.is_autocast_enabled("cpu"):
        return list(tensors)
    dtype = torch.get_autocast_dtype("cpu")
    return [tensor.to(dtype) for tensor in tensors]


def chunks(rows: int, width: int, dropped: int, seed: int) -> Iterator[tuple[slice, Tensor]]:
    """Draw the mask of an input [rows, width], a chunk of rows at a time.

    Args:
        rows: Of the input.
        width: Of the input.
        dropped: How many of `LEVELS` levels are left out.
        seed: Of the generator. The same seed gives the same mask.

    Yields:
        The rows, and their mask: 0 where an element is left out, else 1, int16 [some rows, width].
    """
    size = max(CHUNK // width, 1)
    generator = np.random.SFC64(seed)
    for start in range(0, rows, size):
        some = min(size, rows - start)
        words = torch.from_numpy(generator.random_raw(-(-some * width // 4)).view(np.int16))
        yield slice(start, start + some), words[: some * width].view(some, width).ge_(dropped - LEVELS // 2)


class _Down(torch.autograd.Function):
    """A dropout(x), keeping x and the seed of the mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, dropped: int, seed: int) -> Tensor:
        ctx.save_for_backward(x, A)
        ctx.mask = dropped, seed
        rows = x.reshape(-1, x.shape[-1])  #                                  [N, D]
        h = x.new_empty(len(A), len(rows))  #                                 [R, N]
        A = A * (LEVELS / (LEVELS - dropped))
        buffer = _buffer(rows)
        for at, mask in chunks(len(rows), x.shape[-1], dropped, seed):
            masked = buffer[: len(mask)].copy_(mask).mul_(rows[at])
            torch.mm(A, masked.t(), out=h[:, at])
        return h.t().view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, A = ctx.saved_tensors
        dropped, seed = ctx.mask
        rows = x.reshape(-1, x.shape[-1])  #                                  [N, D]
        grad = grad.reshape(-1, grad.shape[-1]) * (LEVELS / (LEVELS - dropped))  # [N, R]
        dx = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        dA = torch.zeros_like(A, dtype=torch.promote_types(A.dtype, torch.float32)) if ctx.needs_input_grad[1] else None
        masks, masked = _buffer(rows), _buffer(rows)
        for at, mask in chunks(len(rows), x.shape[-1], dropped, seed):
            kept = masks[: len(mask)].copy_(mask)
            if dA is not None:
                dA += grad[at].t() @ torch.mul(kept, rows[at], out=masked[: len(mask)])
            if dx is not None:
                torch.mm(grad[at], A, out=dx[at]).mul_(kept)
        return None if dx is None else dx.view(x.shape), None if dA is None else dA.to(A.dtype), None, None


class _Up(torch.autograd.Function):
    """B h, its gradients by products that read the long side in order."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, B: Tensor) -> Tensor:
        ctx.save_for_backward(h, B)
        return F.linear(h, B)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        h, B = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])  #                            [N, D]
        dh = F.linear(rows, B.t().contiguous())  #                            [N, R]
        dB = (h.reshape(-1, h.shape[-1]).t() @ rows).t()  #                   [D, R]
        return dh.view(h.shape), dB


class _Dropout(torch.autograd.Function):
    """dropout(x), keeping the seed of the mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: int, seed: int) -> Tensor:
        ctx.mask = dropped, seed
        return _masked(x, dropped, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _masked(grad, *ctx.mask), None, None


def _masked(x: Tensor, dropped: int, seed: int) -> Tensor:
    column = x.reshape(-1, 1)
    out = torch.empty_like(column)
    for at, mask in chunks(len(column), 1, dropped, seed):
        out[at].copy_(mask).mul_(column[at]).mul_(LEVELS / (LEVELS - dropped))
    return out.view(x.shape)


def _buffer(rows: Tensor) -> Tensor:
    return rows.new_empty(max(CHUNK // rows.shape[-1], 1), rows.shape[-1])
