"""Several processes on one run: who writes, what all agree on, and what happens when one fails.

With one process everything here is a plain call. With several (torchrun, `accelerate launch`, Slurm, Ray) each process
is a rank; rank 0 writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from unolora.errors import InputError

T = TypeVar("T")


class ProcessLostError(RuntimeError):
    """Another process of the run failed or is gone."""


def start() -> None:
    """Join the other processes, if this one was started as one of several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        from accelerate import PartialState

        PartialState(cpu=not torch.accelerator.is_available())


def stop() -> None:
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def watched(how_to_go_on: str) -> Iterator[None]:
    """Say in one line that another process is gone, which the communication libraries tell at length.

    Raises:
        ProcessLostError: One is.
    """
    try:
        yield
    except RuntimeError as error:
        if count() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            reason = " ".join(str(error).split())[:200]
            raise ProcessLostError(f"another process of the run is gone; {how_to_go_on} ({reason})") from error
        raise


def rank() -> int:
    """Return the number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """Return how many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def first(function: Callable[[], T]) -> T:
    """Call a function on rank 0 alone; the others wait and get its result, which is plain data.

    Raises:
        InputError: Rank 0 raised one; all ranks raise it alike.
        ProcessLostError: On the other ranks, where rank 0 failed otherwise.
    """
    if count() == 1:
        return function()
    found: list[Any] = [None, None, False]
    failure: Exception | None = None
    if rank() == 0:
        try:
            found[0] = function()
        except Exception as error:
            failure = error
            found[1:] = [" ".join(str(error).split()), isinstance(error, InputError)]
    dist.broadcast_object_list(found, src=0)
    if failure is not None:
        raise failure
    if found[1] is not None:
        raise InputError(found[1]) if found[2] else ProcessLostError(f"process 0 failed: {found[1]}")
    return found[0]


def summed(values: Tensor) -> Tensor:
    """Return the sum over all ranks of a tensor, elementwise."""
    return _reduced(values, dist.ReduceOp.SUM)


def largest(values: Tensor) -> Tensor:
    """Return the maximum over all ranks of a tensor, elementwise."""
    return _reduced(values, dist.ReduceOp.MAX)


def layers(model: nn.Module) -> list[str]:
    """Return the classes of a model's layers, which FSDP2 takes as its units.

    They are what stands in a list and the host calls indivisible. An embedding is also called so, but a method may read
    it from outside.
    """
    whole = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or []}
    stacked = {
        type(item).__name__ for module in model.modules() if isinstance(module, nn.ModuleList) for item in module
    }
    return sorted(whole & stacked)


def sharded(model: nn.Module) -> bool:
    """Return whether the ranks hold parts of a model's weights (FSDP2)."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole(value: Tensor) -> Tensor:
    """Return all of a tensor of which this rank may hold a part; all ranks must call it."""
    return value.full_tensor().clone() if isinstance(value, DTensor) else value


def spread(value: Tensor, like: Tensor) -> Tensor:
    """Return a tensor that all ranks hold, cut as another one is."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _reduced(values: Tensor, how: Any) -> Tensor:
    if count() > 1:
        values = values.clone()
        dist.all_reduce(values, op=how)
    return values


def gathered(own: Sequence[T]) -> list[T]:
    """Return what all ranks hold, rank by rank."""
    if count() == 1:
        return list(own)
    parts: list[Any] = [None] * count()
    dist.all_gather_object(parts, list(own))
    return [item for part in parts for item in part]
