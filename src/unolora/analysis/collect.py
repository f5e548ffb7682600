"""A's, B's and scales of a run, in the order of the network."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unolora.config import WEIGHTS_NAME
from unolora.data import Collator
from unolora.errors import InputError
from unolora.layer import current_scales
from unolora.runs import Run, encode_rows, how_to_go_on, load_tensors
from unolora.tasks.rows import Rows, load

Array = np.ndarray[Any, Any]

SHARED = ("unolora", "lora-shared", "lora-matched")
PER_TASK = "lora-per-task"
KINDS = {"q": ("q", "query"), "k": ("k", "key"), "v": ("v", "value"), "qkv": ("c_attn", "wqkv", "qkv")}


@dataclass(frozen=True)
class Pair:
    """A [R, D_in] and B [D_out, R] of a projection."""

    A: Array
    B: Array


@dataclass(frozen=True)
class Adapter:
    """The pairs of one adapter.

    Args:
        run: Folder of its run.
        label: The method, as tables name it.
        method: Its name in the settings.
        backbone: What it adapts.
        seed: Of the run.
        task: The one task that it serves, or "" where all tasks share it.
        pairs: By the projection's name in the backbone, in the order of the network.
    """

    run: str
    label: str
    method: str
    backbone: str
    seed: int
    task: str
    pairs: dict[str, Pair]


def adapters_of(folder: Path) -> list[Adapter]:
    """Read the adapters of a finished run, or of a baseline in it; the backbone is not needed.

    Args:
        folder: What `unolora train` wrote, or `RUN/baselines/METHOD`.

    Returns:
        One adapter, or one for each task in the order of their rows.

    Raises:
        InputError: It is no run, not finished, or its method has no pairs A and B.
    """
    results = _results(folder)
    method, label = str(results["method"]), str(results["label"])
    if method not in (*SHARED, PER_TASK):
        raise InputError(
            f"{folder}: a run of {label!r}, which has no A and B for each projection; give runs of "
            f"{', '.join(SHARED)} or {PER_TASK}"
        )
    names = [str(task["name"]) for task in results["tasks"]] if method == PER_TASK else [""]
    found = []
    for task in names:
        path = folder / "adapter" / (f"task_{task}" if task else "") / WEIGHTS_NAME
        pairs = _pairs(load_tensors(path), path)
        found.append(Adapter(str(folder), label, method, str(results["backbone"]), int(results["seed"]), task, pairs))
    return found


def _results(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give folders that `unolora train` wrote")
    path = folder / "results.json"
    if not path.is_file():
        if (folder / "config.yaml").is_file():
            raise InputError(f"{folder}: no results.json, the run is not finished; {how_to_go_on(folder)}")
        raise InputError(f"{folder}: no run in it; give folders that `unolora train` wrote")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        names = [task["name"] for task in found["tasks"]]
        wrong = [key for key in ("method", "label", "backbone", "seed") if key not in found]
        int(found.get("seed", 0))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: expected the results that `unolora train` writes; train the run again") from error
    if wrong or not names:
        lacks = ", ".join(wrong) or "tasks"
        raise InputError(f"{path}: expected the results that `unolora train` writes, it lacks {lacks}; train it again")
    return dict(found)


def _pairs(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Pair]:
    found: dict[str, dict[str, Array]] = {}
    for key, value in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.(?:lora|uno)_([AB])(?:\.weight)?", key)
        if match:
            found.setdefault(match[1], {})[match[2]] = value.to(torch.float32).numpy()
    if not found or any(len(pair) < 2 for pair in found.values()):
        raise InputError(f"{path}: expected an A and a B for each projection; copy it again from where it was trained")
    for name, pair in found.items():
        if not all(np.isfinite(matrix).all() for matrix in pair.values()):
            raise InputError(f"{path}: the adapter of {name} is not finite: training diverged; train it again")
    positions = _positions(tensors)
    order = positions if set(positions) == set(found) else sorted(found, key=network_order)
    return {name: Pair(**found[name]) for name in order}


def _positions(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the projections in the order that a hypernetwork keeps with its weights; empty without one."""
    for key, value in tensors.items():
        if key.startswith("base_model.uno_hypernetwork.") and key.endswith(".rows"):
            return [str(name) for name in json.loads(bytes(value.tolist()))["positions"]]
    return []


def network_order(name: str) -> tuple[Any, ...]:
    """Sort names of projections as the network runs: the encoder before the decoder, numbers as numbers."""
    parts = [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
    return ("decoder" in name.split("."), parts)


def layer_of(projection: str) -> int:
    """Return the block that a projection belongs to, the first number in its name; -1 without one."""
    return next((int(part) for part in projection.split(".") if part.isdigit()), -1)


def block_of(projection: str) -> str:
    """Return the name of the block that a projection belongs to, up to the first number ("encoder.layer.0")."""
    match = re.match(r"(?:.*?\.)??\d+(?=\.|$)", projection)
    return match[0] if match else projection


def kind_of(projection: str) -> str:
    """Return "q", "k", "v" or "qkv", or else the last part of a projection's name."""
    last = projection.split(".")[-1]
    plain = re.sub(r"_(proj|lin)$", "", last.lower())
    return next((kind for kind, names in KINDS.items() if plain in names), last)


# ---------------------------------------------------------------- scales


def scales(run: Run, *, split: str = "validation", limit: int = 32) -> dict[str, Array]:
    """Compute the scales that a run of UnoLoRA* gives to rows of each of its tasks.

    Args:
        run: From `load_run`.
        split: Where the rows come from.
        limit: At most that many of each task, the first ones.

    Returns:
        Task -> s [N, P, R], positions in the order of the network.

    Raises:
        InputError: The run has no scales, or its data can't be read any more.
    """
    if run.settings.method != "unolora" or run.settings.adapter.conditioning == "none":
        raise InputError(f"{run.folder}: its ranks have no scale; give a run of UnoLoRA*")
    data = run.settings.data
    root = None if data.root is None else Path(data.root)
    collate, found = Collator(run.tokenizer), {}
    for row, task in enumerate(run.tasks):
        loaded = load(task, root=root, limit=data.limit, evaluation_limit=data.evaluation_limit).splits[split]
        found[task.name] = _of_rows(run, row, loaded.take(np.arange(min(limit, len(loaded)))), collate)
    return found


@torch.no_grad()
def _of_rows(run: Run, row: int, rows: Rows, collate: Collator) -> Array:
    split = encode_rows(run.model, row, rows, run.tokenizer, run.settings.data.max_length)
    device = next(run.model.parameters()).device
    parts = []
    for start in range(0, len(split), 32):
        batch = collate([(row, split, i) for i in range(start, min(start + 32, len(split)))])
        inputs = {name: value.to(device) for name, value in batch.items() if name in ("input_ids", "attention_mask")}
        with run.model.method.condition(batch["tasks"].to(device), inputs):
            (s,) = (current_scales() or {}).values()  # of the one adapter that a run has
        parts.append(s.float().cpu().numpy())
    return np.concatenate(parts)
