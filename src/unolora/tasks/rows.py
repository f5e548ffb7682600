"""From a task to rows ready for tokenizing: fill the templates, turn targets into ids or numbers, cut the splits.

A task that names only training rows gives away 10 % of them for validation and 10 % for testing. Who goes where is a
pure function of (task name, seed, number of rows): nothing is stored, and every machine cuts alike.

A source with `validation_from` follows the paper instead (Zhang et al., 2020), with a fixed seed. Such splits share no
text: training rows whose texts a validation or test row repeats are dropped, since the held-out sets of CoLA and STS-B
repeat some.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from unolora.errors import InputError, unknown
from unolora.tasks import quickstart
from unolora.tasks.files import Table, open_hub, open_parquet, read_file, read_hub
from unolora.tasks.task import Source, Task, parse_template

Integers = npt.NDArray[np.int64]
CUT = ("validation", "test")
SAMPLE = 10_000  # rows that stand for all, where there are too many to look at
FEWEST = 10  # rows from which a tenth is still a row
GIVEN_AWAY = 1000  # training rows that become validation rows, of tasks of 10,000 and more


@dataclass(frozen=True)
class Rows:
    """One split of one task. N is its number of rows."""

    texts: list[tuple[str, ...]]
    """The filled templates, one or two texts a row. [N]"""
    targets: npt.NDArray[Any]
    """Label ids (int64) of a classification, numbers (float64) of a regression. [N]"""

    def __len__(self) -> int:
        """Return N."""
        return len(self.texts)

    def digest(self) -> str:
        """Return the SHA-256 of the rows, in their order."""
        found = hashlib.sha256(self.targets.tobytes())
        for text in (text for texts in self.texts for text in texts):
            data = text.encode("utf-8", "surrogatepass")
            found.update(len(data).to_bytes(8, "little") + data)
        return found.hexdigest()

    def take(self, index: Integers) -> Rows:
        """Return the rows at `index`, in that order."""
        return Rows([self.texts[row] for row in index], self.targets[index])


@dataclass(frozen=True)
class StreamedRows(Rows):
    """Training rows that stay on the disk; `texts` and `targets` are those of a sample. N is the number of rows."""

    task: Task
    data: Any
    """A `datasets.Dataset`. [N]"""
    where: str
    """What to call it in an error."""

    @classmethod
    def of(cls, task: Task, data: Any, where: str) -> Self:
        """Look at at most 10,000 of the rows, evenly spaced: what is known of all of them.

        Raises:
            InputError: A row does not fit the task.
        """
        sample = _read(task, data, where, evenly(len(data), SAMPLE))
        return cls(sample.texts, sample.targets, task, data, where)

    def __len__(self) -> int:
        """Return N."""
        return len(self.data)

    def digest(self) -> str:
        """Return N and the SHA-256 of the sample."""
        return f"{len(self)} rows, of a sample {super().digest()}"

    def take(self, index: Integers) -> Rows:
        """Read the rows at `index`.

        Raises:
            InputError: A row does not fit the task.
        """
        return _read(self.task, self.data, self.where, index)


def _read(task: Task, data: Any, where: str, index: Integers) -> Rows:
    table = Table(f"{where}, from row {index[0] + 1} on", dict(data[index]))
    return Rows(fill(task, table), targets(task, table))


def evenly(count: int, most: int) -> Integers:
    """Return at most `most` of the numbers 0..count-1, evenly spaced."""
    fewer = min(count, most)
    return np.arange(fewer, dtype=np.int64) * count // fewer


@dataclass(frozen=True)
class TaskData:
    """A task with its rows."""

    task: Task
    """The task, `labels` filled in."""
    splits: dict[str, Rows]
    """`train`, `validation` and `test`; `train` may be `StreamedRows`."""
    dropped: int = 0
    """Training rows left out because a validation or test row has the same texts (see `Source.validation_from`)."""


def load(
    task: Task,
    *,
    root: Path | None = None,
    seed: int = 0,
    limit: int | None = None,
    evaluation_limit: int | None = None,
) -> TaskData:
    """Read the rows of a task and cut the splits that its source does not name.

    Args:
        task: The task.
        root: Folder that relative file names start from (the working folder when left out), and that may hold the
            source's `folder`, which is then read in place of the hub.
        seed: Seed of the cut and of `limit`. The embedded tables are always cut with seed 0, and `validation_from`
            does not depend on it.
        limit: Keep at most this many rows of each split, for smoke runs.
        evaluation_limit: The same for validation and test; by default `limit`.

    Raises:
        InputError: The rows cannot be read, or a row does not fit the task.
    """
    try:
        for most in (limit, evaluation_limit):
            if most is not None and most < 1:
                raise InputError(f"limit must be at least 1, not {most}")
        task, splits, dropped = _splits(task, root, seed)
        for name, rows in splits.items():
            most = limit if name == "train" or evaluation_limit is None else evaluation_limit
            if most is not None and len(rows) > most:
                few = (
                    evenly(len(rows), most)
                    if isinstance(rows, StreamedRows)
                    else order(len(rows), task.cut_as or task.name, seed, "limit", name)[:most]
                )
                splits[name] = rows.take(np.sort(few))
    except InputError as error:
        raise InputError(f"task {task.name!r}: {error}") from error
    return TaskData(task, splits, dropped)


def _splits(task: Task, root: Path | None, seed: int) -> tuple[Task, dict[str, Rows], int]:
    if task.source.stream:
        return task, _streamed(task, root), 0
    groups: Integers | None = None
    key: tuple[object, ...] = (task.cut_as or task.name, seed)
    if task.source.bundled:
        table, groups = quickstart.read(task.source.bundled)
        tables, key = {"train": table}, (task.source.bundled, 0)
    else:
        tables = _tables(task, root)
    if task.kind == "classification" and not task.labels:
        task = dataclasses.replace(task, labels=_derived_labels(task, tables["train"]))
    splits = {name: Rows(fill(task, table), targets(task, table)) for name, table in tables.items()}
    dropped = 0
    if task.source.validation_from:
        splits, dropped = _held_out(task, splits["train"], splits["test"])
    else:
        train = splits["train"]
        absent = [name for name in CUT if name not in splits]
        parts = cut(np.arange(len(train)) if groups is None else groups, absent, *key)
        splits |= {name: train.take(index) for name, index in parts.items()}
    if task.kind == "classification" and len(np.unique(splits["train"].targets)) < 2:
        only = task.labels[splits["train"].targets[0]]
        raise InputError(f"every training row has the label {only!r}; a classification needs two or more")
    return task, {name: splits[name] for name in ("train", *CUT)}, dropped


def _streamed(task: Task, root: Path | None) -> dict[str, Rows]:
    """Open the training rows where they are, and read the others."""
    source = task.source
    if task.kind == "classification" and not task.labels:
        raise InputError("name its labels: rows that are streamed are not all looked at for them")
    if source.hub:
        data, where = open_hub(source.hub, source.subset, source.train or "train")
    else:
        data, where = open_parquet((root or Path()) / Path(str(source.train)).expanduser())
    if not len(data):
        raise InputError(f"{where} has no rows")
    splits: dict[str, Rows] = {"train": StreamedRows.of(task, data, where)}
    for name, table in _tables(task, root, CUT).items():
        splits[name] = Rows(fill(task, table), targets(task, table))
    return splits


def _held_out(task: Task, train: Rows, test: Rows) -> tuple[dict[str, Rows], int]:
    """Make the validation rows from the test or the training rows, so that no text is in two splits.

    Returns:
        The three splits, and how many training rows were dropped.
    """
    count = len(train)
    train = train.take(np.flatnonzero(~_repeats(train, test)))
    given_away = 0
    if task.source.validation_from == "train":
        given_away = min(GIVEN_AWAY, len(train) // FEWEST)
        chosen = order(len(train), task.cut_as or task.name, "validation")[:given_away]
        validation = train.take(np.sort(chosen))
        train = train.take(np.flatnonzero(~_repeats(train, validation)))
    else:
        half = test.take(order(len(test), task.cut_as or task.name, "validation")[: len(test) // 2])
        repeats = _repeats(test, half)  # with the rows of the other half that repeat one of this half
        validation, test = test.take(np.flatnonzero(repeats)), test.take(np.flatnonzero(~repeats))
    splits = {"train": train, "validation": validation, "test": test}
    for name, rows in splits.items():
        if not len(rows):
            raise InputError(
                f"no row is left for the {name} split: validation rows are made from the {task.source.validation_from} "
                "rows, and texts that two splits share are kept in one; give more rows"
            )
    return splits, count - len(train) - given_away


def _repeats(rows: Rows, others: Rows) -> npt.NDArray[np.bool_]:
    """Return, for each of the N rows, whether one of the others has the same texts."""
    texts = set(others.texts)
    return np.array([row in texts for row in rows.texts], bool)


def _tables(task: Task, root: Path | None, which: Sequence[str] = ("train", *CUT)) -> dict[str, Table]:
    source = task.source
    if source.empty:
        raise InputError("its source names no rows; give a file as train, a hub data set as hub, or a bundled table")
    names = {"train": source.train or "train", "validation": source.validation, "test": source.test}
    tables = {split: _table(source, root, name) for split, name in names.items() if name and split in which}
    for table in tables.values():
        if len(table) == 0:
            raise InputError(f"{table.where} has no rows")
    return tables


def _table(source: Source, root: Path | None, name: str) -> Table:
    """Read one file or hub split, or the file that stands in for the split."""
    if not source.hub:
        return read_file((root or Path()) / Path(name).expanduser())
    if not source.folder:
        return read_hub(source.hub, source.subset, name)
    folder = root and root / source.folder
    if folder and folder.is_dir():
        if not (folder / f"{name}.jsonl").is_file():
            here = ", ".join(sorted(file.name for file in folder.iterdir())) or "nothing"
            raise InputError(f"{folder} lacks {name}.jsonl (it holds {here})")
        return read_file(folder / f"{name}.jsonl")
    otherwise = f"save this split as JSON lines in DIR/{source.folder}/{name}.jsonl and set `--data.root DIR`"
    return read_hub(source.hub, source.subset, name, otherwise=otherwise)


def order(count: int, *key: object) -> Integers:
    """Return a permutation of 0..count-1 that depends on `key` alone.

    It sorts the raw stream of a Philox counter, which NumPy promises never to change for a given key; it makes no such
    promise for `Generator.permutation`.
    """
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    stream = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    return np.argsort(stream.random_raw(count), kind="stable")


def in_turns(targets: npt.NDArray[Any], drawn: Iterable[int], kind: str) -> list[int]:
    """Order the rows of a draw so that the first few, however many, are as even over the labels as they come.

    Args:
        targets: Of all rows; numbers of a regression are not told apart.
        drawn: Rows in the order of the draw, as `order` gives them.
        kind: Of the task.
    """
    turns: dict[Any, int] = {}  # label -> how many of it were drawn
    keys = []
    for place, row in enumerate(drawn):
        label = targets[row] if kind == "classification" else None
        turns[label] = turns.get(label, 0) + 1
        keys.append((turns[label], place, int(row)))
    return [row for *_, row in sorted(keys)]


def cut(groups: Integers, absent: Sequence[str], *key: object) -> dict[str, Integers]:
    """Cut a tenth of the rows for each absent split; the rest is `train`.

    Args:
        groups: Group of each row, 0..G-1; rows of one group stay together. [N]
        absent: Names of the splits to cut.
        *key: What the cut depends on, beside the groups.

    Returns:
        Row numbers, ascending, of each absent split and of `train`.

    Raises:
        InputError: There are fewer than 10 rows.
    """
    if absent and len(groups) < FEWEST:
        what = " and ".join(absent)
        raise InputError(f"{len(groups)} training rows are too few to cut {what} rows from; give 10, or name {what}")
    names = [*absent, "train"]
    sizes = np.bincount(groups)
    turn = order(len(sizes), *key)
    start = np.cumsum(sizes[turn]) - sizes[turn]  # rows dealt before each group's turn
    part = np.empty_like(turn)
    part[turn] = np.minimum(start // max(len(groups) // FEWEST, 1), len(absent))
    return {name: np.flatnonzero(part[groups] == number) for number, name in enumerate(names)}


def _column(table: Table, name: str) -> list[Any]:
    if name not in table.columns:
        raise InputError(f"{table.where}: {unknown('column', name, table.columns)}")
    return table.columns[name]


def fill(task: Task, table: Table) -> list[tuple[str, ...]]:
    """Fill the task's templates with each row of a table.

    Raises:
        InputError: The table lacks a column, or a row lacks a value or holds something other than text or a number.
    """
    columns = {name: _spelled(table, name) for name in task.columns}
    sides = []
    for template in task.template:
        pieces = parse_template(template)
        parts = [columns[column] if column is not None else [""] * len(table) for _, column in pieces]
        literals = [literal for literal, _ in pieces]
        sides.append(["".join(a + b for a, b in zip(literals, row, strict=True)) for row in zip(*parts, strict=True)])
    return list(zip(*sides, strict=True))


def _spelled(table: Table, name: str) -> list[str]:
    """Return a column as texts; a missing value has none, so it is refused, while an empty text is kept."""
    texts = []
    for number, value in enumerate(_column(table, name), start=1):
        if value is None or (isinstance(value, float) and math.isnan(value)):
            raise InputError(f"{table.where}: row {number} has no value in column {name!r}")
        if isinstance(value, bytes | list | dict | np.ndarray):
            what = type(value).__name__
            raise InputError(f"{table.where}: row {number}, column {name!r} must hold text or a number, not {what}")
        texts.append(spell(value))
    return texts


def spell(value: object) -> str:
    """Return the text of a value: 2.0 as "2" (a whole number beside gaps is stored so), true as JSON writes it."""
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _derived_labels(task: Task, table: Table) -> tuple[str, ...]:
    """Return the distinct labels of the training rows, whole numbers in the order of their size."""
    labels = set(_labels(task, table))
    if len(labels) == 1:
        raise InputError(f"{table.where}: every row has the label {labels.pop()!r}; a classification needs two or more")
    return tuple(sorted(labels, key=int if _numeric(labels) else None))


def _labels(task: Task, table: Table) -> list[str]:
    labels = _spelled(table, task.target)
    for row, label in enumerate(labels, start=1):
        if not label.strip():
            raise InputError(f"{table.where}: row {row} has no label in column {task.target!r}")
    return labels


def _numeric(labels: Iterable[str]) -> bool:
    return all(re.fullmatch(r"-?\d+", label) for label in labels)


def targets(task: Task, table: Table) -> npt.NDArray[Any]:
    """Return the targets of a table, [N]: label ids (int64) or numbers (float64).

    Whole numbers 0..n-1 are ids when the task names n labels that are not numbers themselves.

    Raises:
        InputError: The table lacks the column, or a row holds an unknown label or no finite number.
    """
    if task.kind == "regression":
        values = _column(table, task.target)
        return np.array([_number(value, table, task.target, row) for row, value in enumerate(values, 1)], np.float64)
    ids = {label: number for number, label in enumerate(task.labels)}
    if not _numeric(task.labels):
        ids |= {str(number): number for number in range(len(ids))}
    found = np.empty(len(table), np.int64)
    for row, label in enumerate(_labels(task, table)):
        if label not in ids:
            raise InputError(f"{table.where}: row {row + 1}: {unknown('label', label, task.labels)}")
        found[row] = ids[label]
    return found


def _number(value: Any, table: Table, column: str, row: int) -> float:
    try:
        # float() reads "12_3" as 123, and True as 1: neither is a number that anybody wrote as one.
        number = math.nan if isinstance(value, bool) or "_" in str(value) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{table.where}: row {row}, column {column!r} must hold a finite number, not {value!r}")
    return number
