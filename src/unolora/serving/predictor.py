"""A loaded run as an engine sees it: texts of any tasks in, rows; rows in, what the model has to say about them."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unolora.data import Collator
from unolora.errors import InputError
from unolora.layer import current_scales
from unolora.methods import label
from unolora.model import UnoLoraModel
from unolora.runs import Run
from unolora.scoring import Row, predict_rows, text_rows
from unolora.serving.about import About
from unolora.serving.batching import Size
from unolora.tasks import Task
from unolora.text import TextModel
from unolora.words import positions

Input = tuple[str, str | Sequence[str]]
"""The name of a task, and one text, or two for a task on pairs."""


@dataclass(frozen=True)
class Written:
    """What a language model wrote."""

    text: str
    tokens: int
    """How many tokens were written, the end token among them."""
    prompt_tokens: int
    ended: bool
    """Whether it came to its own end, and not to the limit."""


class Predictor:
    """A run that several threads may give texts to, while one of them runs the model.

    Args:
        run: From `load_run`.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.writes = isinstance(run.model, TextModel)
        self._tuner = _conditioned_tuner(run)
        self.about = About(
            run=run.folder.name,
            method=label(run.settings.method, run.settings.adapter),
            backbone=Path(run.settings.backbone).name,
            tasks={task.name: task for task in run.tasks},
            writes=self.writes,
            positions=[] if self._tuner is None else list(self._tuner.layers("default")),
        )
        self._collate = Collator(run.tokenizer)
        self._tokenizer = threading.Lock()  # a fast tokenizer that truncates can't be used by two threads at once

    @property
    def has_scales(self) -> bool:
        """Whether the run's method scales the ranks for each task or sample."""
        return self._tuner is not None

    def rows(self, inputs: Sequence[Input]) -> list[Row]:
        """Tokenize inputs of any tasks.

        Raises:
            InputError: A task is unknown, or a text can't be read.
        """
        pairs = [(task, (texts,) if isinstance(texts, str) else tuple(texts)) for task, texts in inputs]
        with self._tokenizer:
            return text_rows(self.run, pairs)

    def size(self, row: Row, steps: int = 1) -> Size:
        """Say how much work a row is; where an answer has several paths, each is a token to read at least."""
        return Size(_tokens(row) + self.run.model.heads.passes(row[0]) - 1, steps)

    def room(self, row: Row) -> int | None:
        """Return how many tokens the backbone can write behind a row; None if its positions have no end."""
        model: Any = self.run.model
        limit = None if model.encodes else positions(model.method.backbone)
        return None if limit is None else limit - _tokens(row)

    # --- one forward each; of rows of any tasks -------------------------------------------------------------------

    def predict(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Predict; of each row what `scoring.predict_texts` yields."""
        return predict_rows(self.run, rows, batch_size=len(rows))

    def write(self, rows: Sequence[Row], limits: Sequence[int]) -> list[Written]:
        """Write on from each row, greedily, at most `limits` tokens [B]."""
        model, tokenizer = self.run.model, self.run.tokenizer
        if not isinstance(model, TextModel):
            raise InputError("the run has heads, which write nothing; ask for predictions")
        batch = self._batch(rows)
        prompts = batch["attention_mask"].sum(1).tolist()
        written = model.write(batch["input_ids"], batch["attention_mask"], batch["tasks"], max(limits)).tolist()
        found = []
        for tokens, limit, prompt in zip(written, limits, prompts, strict=True):
            end = tokens.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in tokens else len(tokens) + 1
            own = tokens[: min(end, limit)]
            with self._tokenizer:
                text = tokenizer.decode(own, skip_special_tokens=True)
            found.append(Written(text, len(own), prompt, end <= limit))
        return found

    @torch.no_grad()
    def scales(self, rows: Sequence[Row]) -> list[Tensor]:
        """Return s of each row, [P, R]."""
        if self._tuner is None:
            raise InputError("the run's method scales no ranks (that is UnoLoRA* alone)")
        batch = self._batch(rows)
        tasks = batch.pop("tasks")
        with self._tuner.condition(tasks, **batch):
            scales = current_scales(self._tuner)
            assert scales is not None
            return list(scales["default"].cpu().unbind())

    def overhead(self) -> float:
        """Measure what a pass costs beside its tokens, in tokens."""
        seconds, tokens = [], []
        for words, count in ((1, 1), (24, 8)):
            rows = self.rows([_example(self.run.tasks[0], words)] * count)
            seconds.append(min(self._timed(rows) for _ in range(3)))
            tokens.append(sum(self.size(row).length + 1 for row in rows))
        a_token = max(seconds[1] - seconds[0], 1e-9) / (tokens[1] - tokens[0])
        return min(max(seconds[0] / a_token - tokens[0], 0.0), 4096.0)

    def warm_up(self) -> None:
        """Predict a text of each task.

        Raises:
            InputError: The outputs are not finite.
        """
        self.predict(self.rows([_example(task, 1) for task in self.run.tasks]))

    def _timed(self, rows: Sequence[Row]) -> float:
        begin = time.perf_counter()
        self.predict(rows)
        return time.perf_counter() - begin

    def _batch(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        device = next(self.run.model.parameters()).device
        batch = self._collate(rows)
        batch.pop("labels")
        return {name: value.to(device) for name, value in batch.items()}


def _conditioned_tuner(run: Run) -> UnoLoraModel | None:
    backbone: Any = run.model.method.backbone
    tuner = getattr(backbone, "base_model", None)
    return tuner if isinstance(tuner, UnoLoraModel) and len(tuner.uno_hypernetwork) else None


def _tokens(row: Row) -> int:
    _, split, place = row
    return len(split.inputs["input_ids"][place])


def _example(task: Task, words: int) -> Input:
    return task.name, (" ".join(["a"] * words),) * len(task.template)
