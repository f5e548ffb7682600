"""The logits of a few tokens, without those of all others.

A language model ends in a product [..., D] x [D, V] over V tens of thousands of tokens. Who chooses among label words
needs a few columns of it. Within `logits_of` the model's output layer computes those only, a product for each group of
tokens: a group's last bits then do not depend on which others are asked for beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

_wanted: ContextVar[Sequence[Tensor] | None] = ContextVar("wanted", default=None)  # of this thread


class OutputLayer(nn.Linear):
    """What a backbone's output layer becomes, with its own weights; outside `logits_of` it is as it was."""

    narrows: bool | None = None
    """Whether the model's logits are the same when only some are computed; None until it was tried."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of all tokens [..., V], or of the wanted ones [..., W], from x [..., D]."""
        wanted = _wanted.get()
        if wanted is None:
            return super().forward(x)
        bias = self.bias
        return torch.cat([F.linear(x, self.weight[w], None if bias is None else bias[w]) for w in wanted], -1)


def logits_of(model: Any, wanted: Sequence[Tensor], read: Callable[[], Tensor]) -> Tensor:
    """Return the logits of some tokens.

    The first batch is read both ways: a model that does something of its own with the logits of all tokens (BART adds a
    vector to them) goes on computing all. So does one whose output layer is no plain `nn.Linear`.

    Args:
        model: A language model; while it trains, all logits are computed, since dropout makes no two passes alike.
        wanted: Groups of tokens, W in all.
        read: Calls the model and returns its logits, or what was picked from them by place, not by token [..., V].

    Returns:
        [..., W], one group behind the other.
    """
    tokens = torch.cat(list(wanted))
    layer = model.get_output_embeddings()
    if type(layer) is nn.Linear:
        layer.__class__ = OutputLayer  # in place: whoever holds the layer, or its weights, notices nothing
    if not isinstance(layer, OutputLayer) or layer.narrows is False or layer.training:
        return read()[..., tokens]
    if layer.narrows is None:
        whole = read()[..., tokens]
        layer.narrows = _agrees(whole, wanted, read)
        if not layer.narrows:
            return whole
    return _narrow(wanted, read)


def _narrow(wanted: Sequence[Tensor], read: Callable[[], Tensor]) -> Tensor:
    token = _wanted.set(wanted)
    try:
        return read()
    finally:
        _wanted.reset(token)


def _agrees(whole: Tensor, wanted: Sequence[Tensor], read: Callable[[], Tensor]) -> bool:
    try:
        few = _narrow(wanted, read)
    except (IndexError, RuntimeError):  # it wanted all V of them
        return False
    rounding = max(1e-4, 4 * torch.finfo(whole.dtype).eps) * float(whole.abs().max())  # sums in any order
    return few.shape == whole.shape and bool(((few - whole).abs() <= rounding).all())
