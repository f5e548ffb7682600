"""One product for the projections of an adapter that read the same input, as query and value of a self-attention do.

    [A_q; A_v] dropout(x) = [A_q dropout(x); A_v dropout(x)]

Most of the cost is the mask and the way through x (`fused.py`), so two products in one take half the time of two. They
have one mask then, where PEFT's LoRA draws two; for each by itself it is the same dropout. Without dropout, and where
the plain formulas run, each projection computes its own.

Which projections may read the same input can be seen in a model; whether they do, only when they are called. So the
first one computes for all, and the parts of the others are held, in this thread, until they are called. With the same
tensor, a projection takes its part. With another, as in a cross-attention, it computes anew, for those that are still
to come too. A wrong guess costs a few rows in a product that is made anyway. It is not remembered: what is drawn would
depend on what ran before, and neither a resumed run nor the recomputation of a checkpointed block would repeat it.

To autograd the outputs of one product are one operation: a backward through one of them frees what the others need, and
a checkpointed block has to hold all of them or none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unolora.fused import down, down_each, here


class _Part(NamedTuple):
    """A dropout(x), computed for a projection that is still to be called."""

    h: Tensor
    x: Tensor
    A: Tensor
    terms: tuple[Any, ...]


class _Held(threading.local):
    def __init__(self) -> None:  # once in each thread
        self.parts: dict[int, _Part] = {}  # by the identity of A


_held = _Held()


def down_together(x: Tensor, A: Tensor, p: float, siblings: Callable[[], Sequence[Tensor]]) -> Tensor:
    """Return A dropout(x), computed together with that of its siblings.

    Args:
        x: [..., D].
        A: [R, D], whose type the product has.
        p: Probability that an element of x is left out.
        siblings: Gives the other A's [R, D] that may be asked for next with the same x and p.

    Returns:
        [..., R].
    """
    if not p or not here(x) or not _is_plain(x) or not _is_plain(A):
        return down(x.to(A.dtype), A, p)
    part = _held.parts.pop(id(A), None)
    if part is not None and part.x is x and part.terms == _terms(x, A, p):
        return part.h
    others = [B for B in siblings() if _is_plain(B) and (B.dtype, B.device) == (A.dtype, A.device)]
    if part is None:  # the first of its siblings; what others have left is for nobody
        _held.parts = {key: left for key, left in _held.parts.items() if left.x is x}
    else:
        others = [B for B in others if id(B) in _held.parts]
    h, *parts = down_each(x.to(A.dtype), [A, *others], p)
    for B, of_B in zip(others, parts, strict=True):
        _held.parts[id(B)] = _Part(of_B, x, B, _terms(x, B, p))
    if others and h.grad_fn is not None:
        h.grad_fn.register_prehook(forget)  # after its backward no part is of use
    return h


def forget(*_: object) -> None:
    """Drop the parts that nobody took in this thread: at the end of a forward, also by an exception."""
    _held.parts = {}


def _is_plain(tensor: Tensor) -> bool:
    """Whether this is a tensor whose changes are counted, and none that is sharded or packed."""
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_inference()


def _terms(x: Tensor, A: Tensor, p: float) -> tuple[Any, ...]:
    """Return all beside x and A themselves that A dropout(x) depends on."""
    autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    return x._version, A._version, A.requires_grad, p, torch.is_grad_enabled(), autocast
