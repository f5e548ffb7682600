"""Tables from files and from the hub, with text kept as text: "007", "NA" and "" arrive as they were written.

| ending   | read as                                                                                        |
|----------|------------------------------------------------------------------------------------------------|
| .jsonl   | one JSON object a line                                                                         |
| .csv     | commas, "quotes" where needed; the first row names the columns                                 |
| .tsv     | tabs, no quoting: a quote mark is a quote mark; the first row names the columns                |
| .parquet | as stored                                                                                      |

Delimited files are read by the standard `csv` module: pandas fills a row that is too short without a word.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unolora.errors import InputError, did_you_mean


@dataclass(frozen=True)
class Table:
    """Columns of equal length, and what to call their place in an error."""

    where: str
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(next(iter(self.columns.values()), []))


def read_file(path: Path) -> Table:
    """Read a .jsonl, .csv, .tsv or .parquet file.

    Raises:
        InputError: The file is missing, empty, has another ending, is not UTF-8 or is malformed.
    """
    reader = {".jsonl": _jsonl, ".csv": _csv, ".tsv": _tsv, ".parquet": _parquet}.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: files end in .jsonl, .csv, .tsv or .parquet, not {path.suffix or 'nothing'!r}")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise InputError(f"{path} does not exist, nor does its folder") from None
        near = did_you_mean(path.name, [other.name for other in path.parent.iterdir()])
        raise InputError(f"{path} does not exist{near}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    if not data.strip():
        raise InputError(f"{path} is empty")
    return Table(str(path), reader(data, str(path)))


SAVE_IT = "save the rows as .jsonl, .csv or .parquet and name the file as train"


def read_hub(hub: str, subset: str | None, split: str, *, otherwise: str = SAVE_IT) -> Table:
    """Read one split of a hub data set; no code of the data set is run.

    Args:
        hub: Its id.
        subset: Its configuration.
        split: The split.
        otherwise: What to do without the hub, for the error.

    Raises:
        InputError: The hub cannot be reached, or knows no such data set, configuration or split.
    """
    data, where = open_hub(hub, subset, split, otherwise=otherwise)
    return Table(where, dict(data[:]))


def open_hub(hub: str, subset: str | None, split: str, *, otherwise: str = SAVE_IT) -> tuple[Any, str]:
    """Open one split of a hub data set, which is downloaded once and then lies on the disk; see `read_hub`."""
    import datasets

    where = f"{hub}{f' ({subset})' if subset else ''}, split {split!r}"
    try:
        return datasets.load_dataset(hub, subset, split=split), f"hub data set {where}"
    except Exception as error:  # the loader raises a dozen unrelated types, from ValueError to those of the HTTP client
        raise InputError(
            f"hub data set {where} cannot be read ({one_line(error)}); check the names and the connection, or "
            f"{otherwise}"
        ) from error


def open_parquet(pattern: Path) -> tuple[Any, str]:
    """Open .parquet files as one table on the disk; returns a `datasets.Dataset` and what to call it in an error.

    The rows are laid out once in the cache of `datasets`, as many bytes again, from where any row is read alone.

    Raises:
        InputError: No file fits the pattern, or one can't be read.
    """
    import datasets

    files = sorted(map(str, pattern.parent.glob(pattern.name)))
    if not files:
        raise InputError(f"{pattern}: no such file")
    try:
        return datasets.load_dataset("parquet", data_files=files, split="train"), str(pattern)
    except Exception as error:  # as in `read_hub`
        raise InputError(f"{pattern} can't be read ({one_line(error)})") from error


def one_line(error: object, length: int = 200) -> str:
    """Return the text of an error on one line, cut to `length` characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= length else text[: length - 3] + "..."


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def _jsonl(data: bytes, where: str) -> dict[str, list[Any]]:
    rows = []
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for line ends.
    for number, line in enumerate(_text(data, where).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: line {number} is not JSON ({one_line(getattr(error, 'msg', error))})") from None
        if not isinstance(row, dict):
            raise InputError(f'{where}: line {number} must be one JSON object, such as {{"text": ...}}')
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _csv(data: bytes, where: str) -> dict[str, list[Any]]:
    return delimited(_text(data, where), where, delimiter=",", quoting=csv.QUOTE_MINIMAL)


def _tsv(data: bytes, where: str) -> dict[str, list[Any]]:
    return delimited(_text(data, where), where, delimiter="\t", quoting=csv.QUOTE_NONE)


def delimited(text: str, where: str, *, delimiter: str, quoting: int) -> dict[str, list[Any]]:
    """Read delimited text whose first row names the columns.

    Raises:
        InputError: A column named twice, a row longer or shorter than the first, a quote left open.
    """
    rows = _records(text, where, delimiter, quoting)
    header = next(rows, [])
    counts = Counter(header)
    twice = next((name for name in header if counts[name] > 1), None)
    if twice is not None:
        raise InputError(f"{where}: column {twice!r} is named twice in the first row")
    columns: dict[str, list[Any]] = {name: [] for name in header}
    for row in rows:
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)
    return columns


def _records(text: str, where: str, delimiter: str, quoting: int) -> Iterator[list[str]]:
    """Yield the rows of delimited text, blank lines left out, all as long as the first."""
    limit = csv.field_size_limit(2**31 - 1)  # the usual limit, 131,072 characters, is shorter than a long document
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)  # type: ignore[arg-type]
    width = 0
    try:
        for row in filter(None, reader):
            width = width or len(row)
            if len(row) != width:
                raise InputError(f"{where}: line {reader.line_num} has {len(row)} fields, the first row has {width}")
            yield row
    except csv.Error as error:
        raise InputError(f"{where}: malformed at line {reader.line_num} ({error}); is a quote left open?") from None
    finally:
        csv.field_size_limit(limit)


def _parquet(data: bytes, where: str) -> dict[str, list[Any]]:
    import pandas as pd

    try:
        frame = pd.read_parquet(
            io.BytesIO(data), dtype_backend="numpy_nullable"
        )  # whole numbers stay whole beside nulls
    except Exception as error:  # pyarrow's errors share no base class
        raise InputError(f"{where} is not a readable parquet file ({one_line(error)})") from None
    frame = frame.astype(object)
    return {str(name): frame[name].where(frame[name].notna(), None).tolist() for name in frame.columns}
