"""Texts -> token lists, kept in two flat arrays, and on disk so that the next run need not tokenise again."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from unolora.atomic import write_bytes
from unolora.errors import InputError

log = logging.getLogger(__name__)

KEPT_FROM = 10_000
"""Rows from which on tokens are kept on disk; fewer take less than a second."""
FIELDS = {"input_ids": "ids", "token_type_ids": "type_ids"}
"""What a tokenizer returns -> what its backend calls it."""


class Ragged(Sequence[list[int]]):
    """Lists of different lengths in two arrays: a fraction of the memory of lists of Python's numbers.

    Args:
        flat: All numbers, one list after the other.
        ends: Where each list ends [N].
    """

    def __init__(self, flat: NDArray[np.int32], ends: NDArray[np.int64]) -> None:
        self.flat, self.ends = flat, ends
        self._ends = [0, *ends.tolist()]

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> Ragged:
        """Copy lists."""
        ends = np.cumsum([len(numbers) for numbers in lists], dtype=np.int64)
        flat = np.fromiter(itertools.chain.from_iterable(lists), np.int32, count=int(ends[-1]) if len(ends) else 0)
        return cls(flat, ends)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, at: int) -> list[int]: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[list[int]]: ...
    def __getitem__(self, at: int | slice) -> list[int] | Sequence[list[int]]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        if not -len(self) <= at < len(self):
            raise IndexError(at)
        at %= len(self)
        return self.flat[self._ends[at] : self._ends[at + 1]].tolist()

    def lengths(self) -> list[int]:
        """Return the length of each list."""
        return np.diff(self.ends, prepend=0).tolist()


def tokenize(
    tokenizer: Any, first: Sequence[str], second: Sequence[str] | None, max_length: int, folder: Path
) -> dict[str, Ragged]:
    """Tokenize texts, or pairs of them, cut to `max_length` tokens.

    Args:
        tokenizer: The backbone's.
        first: Texts [N].
        second: Their other halves [N], if any.
        max_length: Tokens kept of a row.
        folder: Where the tokens of many rows are kept, under a hash of tokenizer and texts.

    Returns:
        What the tokenizer gives beside the mask, each N lists.
    """
    texts: list[Any] = list(first) if second is None else list(zip(first, second, strict=True))

    def by(texts: list[Any]) -> Any:
        """Call the tokenizer itself."""
        parts = (texts, None) if second is None else tuple(map(list, zip(*texts, strict=True)))
        return tokenizer(*parts, truncation=True, max_length=max_length, return_attention_mask=False)

    if not texts:
        return {"input_ids": Ragged.of([])}
    row = by(texts[:1])  # which also sets the backend's truncation
    if len(texts) == 1:
        return {name: Ragged.of(found) for name, found in row.items()}
    names = list(row)
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not hasattr(backend, "encode_batch_fast") or not set(names) <= set(FIELDS):
        return {name: Ragged.of(found) for name, found in by(texts).items()}
    path = None
    if len(texts) >= KEPT_FROM:
        path = folder / f"{_key(backend.to_str(), names, texts)}.safetensors"
        if (kept := _read(path, names, len(texts))) is not None:
            return kept
    # The tokenizer's own way also finds where in the text each token came from, which takes half of its time.
    rows = backend.encode_batch_fast(texts)
    found = {name: Ragged.of([getattr(row, FIELDS[name]) for row in rows]) for name in names}
    if path is not None:
        _write(path, found)
    return found


def _key(tokenizer: str, names: Sequence[str], texts: Sequence[Any]) -> str:
    return hashlib.blake2b(json.dumps([tokenizer, names, texts]).encode(), digest_size=16).hexdigest()


def _read(path: Path, names: Sequence[str], rows: int) -> dict[str, Ragged] | None:
    try:
        found = load_file(path)
        kept = {name: Ragged(found[name], found["ends"]) for name in names}
        whole = len(found["ends"]) == rows and all(len(k.flat) == k.ends[-1] for k in kept.values())
    except (OSError, SafetensorError, KeyError):
        return None  # it is made again
    return kept if whole else None


def _write(path: Path, found: dict[str, Ragged]) -> None:
    ends = next(iter(found.values())).ends
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, save({"ends": ends, **{name: ragged.flat for name, ragged in found.items()}}))
    except (OSError, InputError) as error:
        log.warning("the tokens are not kept for the next run: %s", error)
