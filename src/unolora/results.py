"""What results.json and predictions.json say of a training: scores, those of a constant, parameters, times, texts."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from unolora import metrics
from unolora.methods import label
from unolora.tasks import rows
from unolora.trainer import MultiTaskTrainer

WORST, LONGEST = 8, 400
"""Rows of a task whose texts predictions.json keeps, and characters of a text."""


def results_of(
    trainer: MultiTaskTrainer,
    method: str,
    data: Sequence[rows.TaskData],
    scores: Mapping[str, Mapping[str, Any]],
    best_step: int,
    unparsed: Mapping[str, int],
) -> dict[str, Any]:
    """Gather results.json: scores of the splits that were scored, what a constant scores, parameters and times."""
    settings, model = trainer.settings, trainer.model
    total = sum(p.numel() for p in model.parameters())
    heads = sum(p.numel() for p in model.heads.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    backbone = model.method.backbone_parameters
    steps = settings.training.steps
    means = {split: metrics.averages(found) for split, found in scores.items()}
    return {
        "name": trainer.folder.resolve().name,
        "method": method,
        "label": label(method, settings.adapter),
        "backbone": settings.backbone,
        "base": dict(model.method.base),
        "seed": settings.training.seed,
        "steps": steps,
        "best_step": best_step,
        "skipped": {"steps": trainer.skips.steps, "tasks": trainer.skips.tasks},
        "batch_size": settings.training.batch_size,
        "tasks": entries(trainer, data, scores, unparsed),
        "averages": {name: {split: values[name] for split, values in means.items()} for name in means["validation"]},
        "parameters": {
            "total": total,
            "trainable": trainable,
            "adapter": trainable - heads,
            "heads": heads,
            "trainable_percent": 100 * trainable / total,
            "per_task_percent": 100 * (trainable - heads) / backbone / len(data),  # counted as in the paper
        },
        "memory": {"peak_bytes": _peak_bytes()},
        "time": {
            "train_seconds": round(trainer.train_seconds, 2),
            "evaluation_seconds": round(trainer.evaluation_seconds, 2),
            "examples_per_second": round(steps * settings.training.batch_size / trainer.train_seconds, 2),
        },
    }


def entries(
    trainer: MultiTaskTrainer,
    data: Sequence[rows.TaskData],
    scores: Mapping[str, Mapping[str, Any]],
    unparsed: Mapping[str, int],
) -> list[dict[str, Any]]:
    """Describe the tasks of a training as results.json does."""
    seen = trainer.seen()
    tasks = []
    for row, d in enumerate(data):
        name = d.task.name
        constant, trivial = None, {}
        for split in scores:
            targets = d.splits[split].targets
            constant, values = metrics.baseline(d.task, d.splits["train"].targets, len(targets))
            trivial[split] = metrics.score(d.task, targets, values)
        tasks.append(
            {
                "name": name,
                "kind": d.task.kind,
                "score_metric": d.task.metrics[0],
                "labels": list(d.task.labels),
                "rows": {split: len(found) for split, found in d.splits.items()},
                "sampling": {"planned": float(trainer.sampler.probabilities[row]), "seen": seen[name]},
                "metrics": {split: found[name] for split, found in scores.items()},
                "baseline": {"name": constant, "metrics": trivial},
                "unparsed": unparsed[name],  # test predictions that are no answer, and count as wrong
            }
        )
    return tasks


def predictions_of(data: Sequence[rows.TaskData], answers: Mapping[int, tuple[Any, Any]]) -> dict[str, Any]:
    """Gather predictions.json: of the test split all predictions, and the texts of the worst ones."""
    tasks = {}
    for row, d in enumerate(data):
        values, confidence = answers[row]
        split = d.splits["test"]
        worst = metrics.worst(d.task, split.targets, values, confidence)[:WORST]
        tasks[d.task.name] = {
            "targets": split.targets.tolist(),
            "predictions": [None if np.isnan(value) else round(value, 6) for value in values.tolist()],
            "confidence": [None if np.isnan(value) else round(value, 4) for value in confidence.tolist()],
            "worst": [
                {"row": place, "texts": [text[:LONGEST] + "…" * (len(text) > LONGEST) for text in split.texts[place]]}
                for place in worst
            ],
        }
    return {"split": "test", "tasks": tasks}


def _peak_bytes() -> int:
    """Return the most memory held so far: of the accelerator, or else of this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
