"""What a task loses without a rank, without a layer's adapter, without the sample.

Whatever is switched off is put back when the block ends, also by an exception, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unolora import scoring
from unolora.analysis.collect import block_of, encoded, factors
from unolora.data import Collator
from unolora.errors import InputError, unknown
from unolora.runs import Run

Row = dict[str, Any]


def ups(run: Run) -> dict[str, list[Tensor]]:
    """Return the B's [D_out, R] of a run's adapters (one, or one for each task) by projection.

    Raises:
        InputError: The method has none.
    """
    of_adapters = factors(run.model.method.backbone, "B")
    found = {name: list(each.values()) for name, each in of_adapters.items()}
    if not found:
        raise InputError(
            f"{run.folder}: method {run.settings.method!r} has no A and B whose ranks could be switched off"
        )
    return found


@contextmanager
def without(run: Run, *, rank: int | None = None, layer: str | None = None) -> Iterator[None]:
    """Switch off a rank, a layer's adapters, or a rank of a layer, for as long as the block lasts.

    Args:
        run: From `load_run`.
        rank: Its number; all ranks when None.
        layer: The block's name in the backbone, such as "encoder.layer.0"; all of them when None.

    Raises:
        InputError: There is no such rank or layer.
    """
    all_of_them = ups(run)
    layers = sorted({block_of(name) for name in all_of_them})
    if layer is not None and layer not in layers:
        raise unknown("layer", layer, layers)
    chosen = [up for name, each in all_of_them.items() if layer in (None, block_of(name)) for up in each]
    ranks = max(up.shape[1] for up in chosen)
    if rank is not None and not 0 <= rank < ranks:
        raise InputError(f"unknown rank {rank}: the ranks are 0 to {ranks - 1}")
    before = [up.detach().clone() for up in chosen]
    try:
        with torch.no_grad():
            for up in chosen:
                up[:, slice(None) if rank is None else rank] = 0
        yield
    finally:
        with torch.no_grad():
            for up, value in zip(chosen, before, strict=True):
                up.copy_(value)


@contextmanager
def without_sample(run: Run, evaluate: Callable[[], object]) -> Iterator[None]:
    """Give every sample the mean of what the bottleneck makes of all samples, for as long as the block lasts.

    The mean, not zero, which the hypernetwork has never seen.

    Args:
        run: Of UnoLoRA* with the sample in its scale.
        evaluate: Runs the rows to average over through the model.

    Raises:
        InputError: The run's scale does not depend on the sample.
    """
    bottleneck = _bottleneck(run)
    if bottleneck is None:
        raise InputError(f"{run.folder}: its scales do not depend on the sample; give a run with 'task+sample'")
    seen: list[Tensor] = []
    hook = bottleneck.register_forward_hook(lambda _, inputs, b: seen.append(b.detach()))
    try:
        evaluate()
    finally:
        hook.remove()
    mean = torch.cat(seen).mean(dim=0)  # [d]
    hook = bottleneck.register_forward_hook(lambda _, inputs, b: mean.expand_as(b))
    try:
        yield
    finally:
        hook.remove()


def _bottleneck(run: Run) -> nn.Module | None:
    backbone: Any = run.model.method.backbone
    networks = getattr(getattr(backbone, "base_model", None), "uno_hypernetwork", {})
    return next((network.bottleneck for network in networks.values()), None)


def ablations(run: Run, *, split: str = "validation", limit: int | None = None) -> list[Row]:
    """Score a run whole, then without each rank (in all layers), each layer's adapters, and the sample.

    Ranks of the same number have nothing to do with each other across layers; `without` takes both for one alone.

    Args:
        run: From `load_run`; it is left as it was.
        split: Scored on.
        limit: At most that many rows of each task.

    Returns:
        A row for each ablation and task: without ("nothing", "rank 3", "encoder.layer.0", "sample"), task, metric,
        score, and change against the whole.

    Raises:
        InputError: The method has no ranks, or the data can't be read any more.
    """
    all_of_them = ups(run)
    splits, collate = encoded(run, split, limit), Collator(run.tokenizer)

    def evaluate() -> dict[str, dict[str, float]]:
        return scoring.evaluate(run.model, run.tasks, splits, collate, run.settings.scoring)

    whole = evaluate()
    found = _rows("nothing", whole, whole)
    for rank in range(max(up.shape[1] for each in all_of_them.values() for up in each)):
        with without(run, rank=rank):
            found += _rows(f"rank {rank}", evaluate(), whole)
    for layer in sorted({block_of(name) for name in all_of_them}):
        with without(run, layer=layer):
            found += _rows(layer, evaluate(), whole)
    if _bottleneck(run) is not None:
        with without_sample(run, evaluate):
            found += _rows("sample", evaluate(), whole)
    return found


def _rows(what: str, scores: Mapping[str, Mapping[str, float]], whole: Mapping[str, Mapping[str, float]]) -> list[Row]:
    found = []
    for task, metrics in scores.items():
        metric, score = next(iter(metrics.items()))
        change = score - whole[task][metric]
        found.append({"without": what, "task": task, "metric": metric, "score": score, "change": change})
    return found
