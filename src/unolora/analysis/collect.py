"""A's, B's and scales of a run, in the order of the network."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unolora import gradients
from unolora.config import WEIGHTS_NAME
from unolora.data import Collator, Encoded
from unolora.errors import InputError
from unolora.layer import current_scales
from unolora.runs import Run, build, encode_rows, how_to_go_on, load_tensors, read_data, read_settings, read_tasks

Array = np.ndarray[Any, Any]

SHARED = ("unolora", "lora-shared", "lora-matched")
PER_TASK = "lora-per-task"
KINDS = {"q": ("q", "query"), "k": ("k", "key"), "v": ("v", "value"), "qkv": ("c_attn", "wqkv", "qkv")}


@dataclass(frozen=True)
class Pair:
    """A [R, D_in] and B [D_out, R] of a projection, and A as it was before training, where that is known."""

    A: Array
    B: Array
    start: Array | None = None

    @property
    def moved(self) -> Array:
        """What training added to A [R, D_in]; B starts at zero, so that B is what training added to it."""
        assert self.start is not None
        return self.A - self.start


@dataclass(frozen=True)
class Adapter:
    """The pairs of one adapter.

    Args:
        folder: Of its run.
        run: A short name of it.
        label: The method, as tables name it.
        method: Its name in the settings.
        backbone: What it adapts.
        seed: Of the run.
        tasks: Names of the run's tasks.
        task: The one task that it serves, or "" where all tasks share it.
        pairs: By the projection's name in the backbone, in the order of the network.
    """

    folder: Path
    run: str
    label: str
    method: str
    backbone: str
    seed: int
    tasks: tuple[str, ...]
    task: str
    pairs: dict[str, Pair]

    @property
    def name(self) -> str:
        """Its run, and its task where it serves one only."""
        return f"{self.run}:{self.task}" if self.task else self.run

    @property
    def started(self) -> bool:
        """Whether it is known where its A's started."""
        return all(pair.start is not None for pair in self.pairs.values())


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
    tasks = tuple(str(task["name"]) for task in results["tasks"])
    names = tasks if method == PER_TASK else [""]
    found = []
    for task in names:
        path = folder / "adapter" / (f"task_{task}" if task else "") / WEIGHTS_NAME
        pairs = _pairs(load_tensors(path), path)
        seed, backbone = int(results["seed"]), str(results["backbone"])
        found.append(Adapter(folder, str(folder), label, method, backbone, seed, tasks, task, pairs))
    return found


def short_names(folders: Sequence[Path]) -> list[str]:
    """Return the ends of the folders' paths, as long as it takes to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [str(folder) for folder in folders]


def with_starts(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Add to the adapters of one run where their A's started: building it again gives the same weights.

    The adapters come back as they are where the run's settings are not at hand.
    """
    folder = adapters[0].folder
    baseline = folder.parent.name == "baselines"
    home = folder.parent.parent if baseline else folder
    if not (home / "config.yaml").is_file():
        return list(adapters)
    settings = read_settings(home)
    model, _ = build(settings, adapters[0].method, read_tasks(folder / "adapter" / "tasks.json"), {})
    downs = factors(model.method.backbone, "A")
    found = []
    for adapter in adapters:
        name = f"task_{adapter.task}" if adapter.task else "default"
        pairs = {at: replace(p, start=downs[at][name].detach().float().numpy()) for at, p in adapter.pairs.items()}
        found.append(replace(adapter, pairs=pairs))
    return found


def factors(backbone: Any, matrix: str) -> dict[str, dict[str, Tensor]]:
    """Return the A's [R, D_in] or the B's [D_out, R] of an adapted backbone: projection -> adapter -> weight."""
    inside = getattr(getattr(backbone, "base_model", None), "model", nn.Module())
    found: dict[str, dict[str, Any]] = {}
    for name, module in inside.named_modules():
        if isinstance(own := getattr(module, f"uno_{matrix}", None), nn.ParameterDict):
            found[name] = dict(own.items())
        elif isinstance(lora := getattr(module, f"lora_{matrix}", None), nn.ModuleDict) and len(lora):
            found[name] = {adapter: linear.weight for adapter, linear in lora.items()}
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
    """Return "q", "k", "v" or "qkv", or else the last part of a projection's name, of BERT's `dense` what is before."""
    last = projection.split(".")[-1]
    if last == "dense":
        return re.sub(r".*\.\d+\.", "", projection)
    plain = re.sub(r"_(proj|lin)$", "", last.lower())
    return next((kind for kind, names in KINDS.items() if plain in names), last)


# ---------------------------------------------------------------- of rows


def encoded(run: Run, split: str, limit: int | None, *, answers: bool = False) -> dict[int, Encoded]:
    """Read and encode the first rows of each task.

    Args:
        run: From `load_run`.
        split: Where they come from.
        limit: At most that many of each task.
        answers: Whether what is to be written is encoded as well, which a loss needs.

    Returns:
        Task row -> its rows.

    Raises:
        InputError: The data can't be read any more.
    """
    found = {}
    for row, task in enumerate(run.tasks):
        rows = read_data(run.settings, task).splits[split]
        few = rows if limit is None else rows.take(np.arange(min(limit, len(rows))))
        found[row] = encode_rows(run.model, row, few, run.tokenizer, run.settings.data.max_length, train=answers)
    return found


def _batches(run: Run, row: int, split: Encoded) -> Iterator[dict[str, Tensor]]:
    """Yield the rows of a task as batches on the model's device."""
    collate, device = Collator(run.tokenizer), next(run.model.parameters()).device
    for start in range(0, len(split), 32):
        batch = collate([(row, split, i) for i in range(start, min(start + 32, len(split)))])
        yield {name: value.to(device) for name, value in batch.items()}


@torch.no_grad()
def scales(run: Run, splits: Mapping[int, Encoded]) -> dict[str, Array]:
    """Compute the scales that a run of UnoLoRA* gives to rows of each of its tasks.

    Args:
        run: From `load_run`.
        splits: From `encoded`.

    Returns:
        Task -> s [N, P, R], positions in the order of the network.

    Raises:
        InputError: The run has no scales.
    """
    if run.settings.method != "unolora" or run.settings.adapter.conditioning == "none":
        raise InputError(f"{run.folder}: its ranks have no scale; give a run of UnoLoRA*")
    found = {}
    for row, task in enumerate(run.tasks):
        parts = []
        for batch in _batches(run, row, splits[row]):
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            with run.model.method.condition(batch["tasks"], inputs):
                (s,) = (current_scales() or {}).values()  # of the one adapter that a run has
            parts.append(s.float().cpu().numpy())
        found[task.name] = np.concatenate(parts)
    return found


def gradient_cosines(run: Run, splits: Mapping[int, Encoded]) -> Array:
    """Compute how alike the tasks' gradients are at the weights of a run.

    Args:
        run: From `load_run`.
        splits: From `encoded`, with answers.

    Returns:
        Cosines [K, K] of the gradients of the tasks' mean losses by the weights that they share.
    """
    parameters = gradients.shared(run.model)
    found = []
    for row in range(len(run.tasks)):
        sums = []
        for batch in _batches(run, row, splits[row]):
            sums.append(gradients.of_tasks(run.model(**batch)["losses"], batch["tasks"], parameters)[row])
        found.append(torch.stack(sums).sum(dim=0))
    return np.array(gradients.cosines(found))
