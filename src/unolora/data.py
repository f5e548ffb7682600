"""Rows -> tokens -> batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.data import Sampler as TorchSampler

from unolora.errors import InputError
from unolora.sampling import Sampler
from unolora.tasks.download import cache_folder
from unolora.tasks.rows import Rows
from unolora.tokens import Ragged, tokenize

IGNORED = -100
"""What stands behind an answer that is shorter than the longest of its batch."""


@dataclass(frozen=True)
class Encoded:
    """One split of one task as token lists.

    Args:
        inputs: What the tokenizer gives (`input_ids`, maybe `token_type_ids`), each N lists, unpadded.
        targets: Label ids or numbers [N].
        answers: Text-to-text training: tokens of the right answers, N lists.
    """

    inputs: Mapping[str, Ragged]
    targets: np.ndarray[Any, Any]
    answers: list[list[int]] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def lengths(self) -> Sequence[int]:
        """Tokens of each row."""
        return self.inputs["input_ids"].lengths()

    def at(self, row: int) -> tuple[Encoded, int]:
        """Return where the tokens of a row lie: in which split, at which place."""
        return self, row


@dataclass(frozen=True)
class Streamed(Encoded):
    """A split whose rows are read and tokenized when their turn comes; it holds none.

    Args:
        rows: What is read.
        encode: Tokenizes rows.
    """

    inputs: Mapping[str, Ragged] = field(default_factory=dict, init=False)
    targets: np.ndarray[Any, Any] = field(default_factory=lambda: np.empty(0), init=False)
    answers: None = field(default=None, init=False)
    rows: Rows = field(kw_only=True)
    encode: Callable[[Rows], Encoded] = field(kw_only=True)

    def __len__(self) -> int:
        return len(self.rows)

    def lengths(self) -> Sequence[int]:
        """Zero for each row: unknown until it is read, so that rows of a step keep their order. It takes no memory."""
        zeros: Any = np.broadcast_to(np.int64(0), len(self))
        return zeros

    def at(self, row: int) -> tuple[Encoded, int]:
        """Read a row."""
        return self.encode(self.rows.take(np.array([row]))), 0


def encode(rows: Rows, tokenizer: Any, max_length: int) -> Encoded:
    """Tokenize the rows; a row of two texts becomes a pair. Longer inputs are cut to `max_length` tokens.

    Raises:
        InputError: A text holds half a surrogate pair, as a cut emoji or a byte that is not UTF-8 leaves behind.
    """
    check_unicode(rows)
    first = [texts[0] for texts in rows.texts]
    second = [texts[1] for texts in rows.texts] if rows.texts and len(rows.texts[0]) == 2 else None
    return Encoded(tokenize(tokenizer, first, second, max_length, tokens_folder()), rows.targets)


def tokens_folder() -> Path:
    """Return where tokens are kept from run to run."""
    return cache_folder() / "tokens"


def check_unicode(rows: Rows) -> None:
    """Refuse what a tokenizer can't read.

    Raises:
        InputError: A text holds half a surrogate pair, as a cut emoji or a byte that is not UTF-8 leaves behind.
    """
    for text in (text for texts in rows.texts for text in texts):
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise InputError(f"a text is not valid Unicode: {text[:60]!r}; save it as UTF-8")


class Collator:
    """Pad rows to the longest of the batch, and no further.

    Padding goes to the right whatever the tokenizer says: on the left it would shift the positions of decoders such as
    GPT-2, and so depend on the neighbours in the batch.

    Args:
        tokenizer: The backbone's; it knows the padding token.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        if tokenizer.pad_token is None:  # decoder-only models often have none; the mask hides what it is
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)

    def __call__(self, rows: Sequence[tuple[int, Encoded, int]]) -> dict[str, Tensor]:
        """Make one batch.

        Args:
            rows: Of each row the task's row, its split, and its place there.

        Returns:
            `input_ids` and `attention_mask` [B, T], `tasks` [B], `labels` [B] (ids and numbers alike as float32), what
            else the tokenizer gives, and `answers` [B, L], `IGNORED` behind shorter ones, where the split has them.
        """
        names = rows[0][1].inputs
        batch = self.tokenizer.pad(
            {name: [split.inputs[name][i] for _, split, i in rows] for name in names},
            padding_side="right",
            return_tensors="pt",
        )
        batch["tasks"] = torch.tensor([task for task, _, _ in rows])
        batch["labels"] = torch.tensor([float(split.targets[i]) for _, split, i in rows])
        answers = [split.answers[i] for _, split, i in rows if split.answers is not None]
        if answers:
            longest = max(map(len, answers))
            batch["answers"] = torch.tensor([[*ids, *[IGNORED] * (longest - len(ids))] for ids in answers])
        return dict(batch)


class TaskRows(Dataset[Any]):
    """One split of all tasks, addressed by (task row, row)."""

    def __init__(self, splits: Sequence[Encoded]) -> None:
        self.splits = splits

    def __len__(self) -> int:
        return sum(map(len, self.splits))

    def __getitem__(self, where: tuple[int, int]) -> tuple[int, Encoded, int]:
        task, row = where
        return task, *self.splits[task].at(row)


def check_parts(batch_size: int, accumulation: int, world_size: int) -> None:
    """Check that a step's batch can be cut into equal parts.

    Raises:
        InputError: It can't; unequal parts would weigh rows differently.
    """
    if batch_size % (accumulation * world_size):
        raise InputError(
            f"`training.batch_size` {batch_size} can't be cut into equal parts for {world_size} processes with a "
            f"`gradient_accumulation` of {accumulation}; choose a multiple of {accumulation * world_size}"
        )


class TrainingBatches(TorchSampler[list[tuple[int, int]]]):
    """This rank's micro-batches from a given step on, each computed from (seed, step) and never remembered.

    The rows of a step are cut into micro-batches by length, so that a long row pads only its like.

    Args:
        sampler: Gives the global batch of a step.
        lengths: Of each task the tokens of its rows.
        steps: Optimiser steps in all.
        start: Function that returns the step to begin at; asked when iteration begins.
        accumulation: Micro-batches of a step.
        rank, world_size: This process among all.

    Raises:
        InputError: A step's batch can't be cut into equal parts; unequal ones would weigh rows differently.
    """

    def __init__(
        self,
        sampler: Sampler,
        lengths: Sequence[Sequence[int]],
        steps: int,
        start: Callable[[], int],
        *,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.sampler, self.lengths, self.steps, self.start = sampler, lengths, steps, start
        self.accumulation, self.rank, self.world_size = accumulation, rank, world_size
        check_parts(sampler.batch_size, accumulation, world_size)

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start(), self.steps):
            rows = self.sampler.local_batch(step, self.rank, self.world_size)
            rows.sort(key=lambda row: self.lengths[row[0]][row[1]])
            size = len(rows) // self.accumulation
            for part in range(self.accumulation):
                yield rows[part * size : (part + 1) * size]
