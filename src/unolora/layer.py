"""UnoLoRA, part 1: one low-rank pair per projection, shared by all tasks, its ranks scaled for each sample.

    y = W x + (alpha / r) B diag(s) A x                                              (paper, eq. 9)

                  ┌──────────────── W (frozen) ────────────────┐
    x [N, T, D] ──┤                                            + ── y [N, T, D_out]
                  └─ A ── h [N, T, R] ── * s [N, 1, R] ── B * alpha/r ─┘

With s = 1 this is LoRA (eq. 1). The scale comes from the hypernetwork (`hypernetwork.py`), which runs once a batch for
all projections together; a layer only multiplies. So any mix of tasks in a batch costs one task's time, and a scale
that does not depend on the sample can be merged into W. `fused.py` has the two products, A x and y + B h, with
gradients that cost less than torch's own.

Axes: B samples of a batch, N rows of a layer's input (B, or B x beams), T tokens, D width, R rank, P positions.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from unolora.errors import InputError
from unolora.fused import down, up


class _Current(threading.local):
    """The scales of the forward that runs in this thread: adapter name -> [B, P, R]."""

    def __init__(self) -> None:  # once in each thread
        self.scales: Mapping[str, Tensor] | None = None
        self.owner: object | None = None


_current = _Current()


@contextmanager
def scaled_by(scales: Mapping[str, Tensor], owner: object | None = None) -> Iterator[None]:
    """Let every layer that runs inside use these scales, in this thread only; what was set before comes back after.

    Args:
        scales: For each conditioned adapter, s for every sample and position, [B, P, R].
        owner: The model that they belong to.
    """
    before = _current.scales, _current.owner
    _current.scales, _current.owner = scales, owner
    try:
        yield
    finally:
        _current.scales, _current.owner = before


def current_scales(owner: object | None = None) -> Mapping[str, Tensor] | None:
    """Return the scales set by `scaled_by` in this thread, or None; with `owner`, only if they belong to it."""
    return _current.scales if owner is None or _current.owner is owner else None


class UnoLoraLayer(nn.Module):
    """A frozen projection with the shared low-rank pairs of one or more adapters beside it.

    Args:
        base_layer: The projection W x + b, an `nn.Linear` or transformers' `Conv1D` (whose weight is transposed).
        d_in, d_out: Its widths.
    """

    def __init__(self, base_layer: nn.Module, d_in: int, d_out: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.d_in, self.d_out = d_in, d_out
        self.transposed = not isinstance(base_layer, nn.Linear)
        self.uno_A = nn.ParameterDict()
        self.uno_B = nn.ParameterDict()
        self.uno_dropout = nn.ModuleDict()
        self.scaling: dict[str, float] = {}  # alpha / r, or alpha / sqrt(r)
        self.position: dict[str, int] = {}  # p, for the adapters that have a scale

    def add(self, name: str, *, r: int, alpha: float, use_rslora: bool = False, dropout: float = 0.0) -> None:
        """Add the pair of the adapter `name`: A Kaiming-uniform, B zero, so that the output does not change yet."""
        self.uno_A[name] = nn.Parameter(torch.empty(r, self.d_in))
        self.uno_B[name] = nn.Parameter(torch.zeros(self.d_out, r))
        nn.init.kaiming_uniform_(self.uno_A[name], a=math.sqrt(5))
        self.uno_dropout[name] = nn.Dropout(dropout)
        self.scaling[name] = scaling(alpha, r, use_rslora)

    def applied(self) -> list[str]:
        """Return the names of the adapters that take part in the forward."""
        return list(self.uno_A)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Map x [N, T, D_in] (or [N, D_in]) to y [N, T, D_out]."""
        y: Tensor = self.base_layer(x, *args, **kwargs)  #     [N, T, D_out]
        dtype = y.dtype
        for name in self.applied():
            y = up(y, self.reduced(name, x), self.uno_B[name])
        return y.to(dtype)

    def reduced(self, name: str, x: Tensor) -> Tensor:
        """Compute (alpha / r) diag(s) A x, with dropout on x in training, for the rows of x."""
        A, dropout = self.uno_A[name], cast(nn.Dropout, self.uno_dropout[name])
        h = down(x.to(A.dtype), A, dropout.p if dropout.training else 0.0) * self.scaling[name]  # [N, T, R]
        if name in self.position:
            h = h * _rows(self.scale(name), h).to(h.dtype)
        return h

    def scale(self, name: str) -> Tensor:
        """Return this projection's s for the forward that runs, [B, R].

        Raises:
            InputError: No scales are set: the layer was called outside the model's forward.
        """
        scales = current_scales()
        if scales is None or name not in scales:
            raise InputError(
                f"the scale of adapter {name!r} is not known here: a layer was called outside the model's forward; "
                "wrap the call in `with model.condition(tasks=..., input_ids=...):`"
            )
        return scales[name][:, self.position[name]]

    def delta_weight(self, name: str) -> Tensor:
        """Return (alpha / r) B diag(s) A as W is stored: [D_out, D_in], or transposed for `Conv1D`.

        Raises:
            InputError: The scale differs between samples, so that one weight cannot stand for it.
        """
        A, B = self.uno_A[name], self.uno_B[name]
        if name in self.position:
            s = self.scale(name)
            if len(s) != 1:
                raise InputError(f"one weight needs one scale, got {len(s)} rows; merge one task at a time")
            B = B * s.to(B.dtype)
        delta = B @ A * self.scaling[name]
        return delta.T if self.transposed else delta


def scaling(alpha: float, r: int, use_rslora: bool) -> float:
    """Return what an update is multiplied by: alpha / r, or, rank-stabilised, alpha / sqrt(r)."""
    return alpha / (math.sqrt(r) if use_rslora else r)


def _rows(s: Tensor, h: Tensor) -> Tensor:
    """Align s [B, R] with the rows of h [N, ..., R]: beams and flattened tokens repeat each sample in turn."""
    B, N = len(s), len(h)
    if N % B:
        raise InputError(
            f"a projection got {N} rows for a batch of {B} samples, which is no multiple of it; a projection whose "
            "input is not laid out by sample (shared by all, as DeBERTa's relative positions, or routed, as a mixture "
            "of experts) can't have a scale for each sample: leave it out of `target_modules`"
        )
    if B not in (1, N):
        s = s.repeat_interleave(N // B, dim=0)
    return s.reshape(len(s), *[1] * (h.dim() - 2), s.shape[-1])
