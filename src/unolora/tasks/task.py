"""A task is data: a name, a template over the columns, a target column, and where the rows come from.

A YAML mapping spells one in about ten lines, so a task of one's own needs no code:

    name: tickets
    kind: classification
    template: ["{subject}", "{body}"]      # one string, or two for a pair
    target: topic
    source: {train: tickets.csv}
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any, Self

from unolora.errors import InputError, unknown

DEFAULT_METRICS: dict[str, tuple[str, ...]] = {
    "classification": ("matthews", "accuracy", "f1"),
    "regression": ("pearson", "spearman"),
}
"""The metrics of a task that names none; the first one is its score."""

METRIC_NAMES: dict[str, tuple[str, ...]] = {
    "classification": ("accuracy", "f1", "f1_macro", "f1_micro", "matthews"),
    "regression": ("pearson", "spearman", "rmse"),
}
"""The metrics that fit each kind of task."""


def parse_template(template: str) -> list[tuple[str, str | None]]:
    """Split a template into (literal text, column that follows it or None).

    Only plain columns are fields: no attribute, index, conversion or format, so filling a template runs nothing
    and a column may be called "a.b". ``{{`` and ``}}`` are braces.

    Raises:
        InputError: A brace is left open, or a field is empty or more than a column's name.
    """
    try:
        pieces = list(Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"template {template!r} cannot be read ({error}); write {{{{ and }}}} for braces") from None
    if any(column is not None and (not column or form or convert) for _, column, form, convert in pieces):
        raise InputError(f"template {template!r}: a field is the plain name of a column, such as {{text}}")
    return [(literal, column) for literal, column, _, _ in pieces]


def _columns(*templates: str) -> tuple[str, ...]:
    """Return the columns that templates read, each once."""
    pieces = [piece for template in templates for piece in parse_template(template)]
    return tuple(dict.fromkeys(column for _, column in pieces if column is not None))


def _check_keys(cls: type, what: str, mapping: object) -> None:
    """Refuse what is not a mapping, has a key that is no field of the dataclass, or lacks a required one."""
    if not isinstance(mapping, Mapping):
        raise InputError(f"{what} must be a mapping of keys to values, not {mapping!r}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in mapping:
        if key not in fields:
            raise InputError(f"{what}: {unknown('key', key, fields)}")
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in mapping:
            raise InputError(f"{what} lacks the key {name!r}")


@dataclass(frozen=True)
class Source:
    """Where the rows of a task come from: files, a hub data set, or an embedded table."""

    train: str | None = None
    """File (.jsonl .csv .tsv .parquet) or, with `hub`, the split to read ("train" when left out)."""
    validation: str | None = None
    """The same for the validation rows; left out, they are cut from the training rows."""
    test: str | None = None
    """The same for the test rows; left out, they are cut from the training rows."""
    hub: str | None = None
    """Hub data set, such as "nyu-mll/glue"."""
    subset: str | None = None
    """Configuration of the hub data set, such as "sst2"."""
    bundled: str | None = None
    """Name of an embedded quickstart table."""
    folder: str | None = None
    """Folder inside `data.root` that, where it is there, holds the hub's splits as SPLIT.jsonl and stands in for it."""
    validation_from: str | None = None
    """Make the validation rows from those of another split, and keep the splits apart by their texts (see
    `rows.load`): "test" halves the test rows, "train" takes 1,000 training rows (a tenth of fewer than 10,000). The
    choice does not depend on the seed."""

    stream: bool = False
    """Leave the training rows on the disk, and read each when its turn comes: for more rows than memory holds. `train`
    is then a pattern of .parquet files, or a split of the hub data set."""

    def __post_init__(self) -> None:
        if not isinstance(self.stream, bool):
            raise InputError(f"source: stream must be true or false, not {self.stream!r}")
        names = [f.name for f in dataclasses.fields(self) if f.name != "stream"]
        given = [name for name in names if getattr(self, name) is not None]
        for key in given:
            if not isinstance(getattr(self, key), str) or not getattr(self, key):
                raise InputError(f"source: {key} must be text, not {getattr(self, key)!r}")
        if self.bundled and len(given) > 1:
            raise InputError(f"source: a bundled table has its own splits; leave out {', '.join(given[:-1])}")
        if self.subset and not self.hub:
            raise InputError("source: subset belongs to a hub data set; name it as hub")
        if (self.validation or self.test) and not (self.train or self.hub):
            raise InputError("source: validation or test came without training rows; name their file as train")
        if self.folder and not self.hub:
            raise InputError("source: folder stands in for a hub data set; name it as hub")
        if self.validation_from:
            self._check_validation_from(self.validation_from)
        if self.stream:
            self._check_stream()

    def _check_stream(self) -> None:
        if self.bundled or self.folder or self.validation_from:
            raise InputError("source: stream goes with .parquet files or a hub data set alone")
        if not self.hub and not str(self.train).endswith(".parquet"):
            raise InputError(f"source: stream reads .parquet files, such as shards/*.parquet, not {self.train!r}")
        if not (self.validation and self.test):
            raise InputError("source: stream cuts no splits; name validation and test rows")

    def _check_validation_from(self, split: str) -> None:
        if split not in ("train", "test"):
            raise InputError(f"source: validation_from must be train or test, not {split!r}")
        if self.validation or not self.test:
            raise InputError("source: validation_from goes with a test split and without a validation split")

    @property
    def empty(self) -> bool:
        """Whether it names neither a file nor a hub data set nor a bundled table."""
        return not (self.train or self.hub or self.bundled)

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Self:
        """Build a source from a YAML mapping; InputError for an unknown key or a mapping that names no rows."""
        _check_keys(cls, "source", mapping)
        source = cls(**mapping)
        if source.empty:
            raise InputError("source names no rows; give a file as train, a hub data set as hub, or a bundled table")
        return source


@dataclass(frozen=True)
class Task:
    """One task of a run; `InputError` says at once what makes no sense in it."""

    name: str
    """Letters, digits, `_` and `-`; it is a row of the task embedding, a flag and a checkpoint key."""
    kind: str
    """`classification` or `regression`."""
    template: tuple[str, ...]
    """One or two texts over the columns, such as "{text}", or "{sentence1}" and "{sentence2}" for a pair."""
    target: str
    """Column with the label or the number."""
    labels: tuple[str, ...] = ()
    """Classification: label names in the order of their ids; left out, the sorted values of the training rows."""
    metrics: tuple[str, ...] = ()
    """What is measured; the first one is the task's score. Left out, the kind's `DEFAULT_METRICS`."""
    source: Source = Source()
    """Where the rows come from."""
    description: str = ""
    """What the task asks, in plain words."""
    prompt: str = ""
    """The input of a text-to-text model, over the columns. Left out, it is spelled as T5's: the task's name, then each
    column after its own name, as in "mrpc sentence1: {sentence1} sentence2: {sentence2}"."""
    text_step: float | None = None
    """Regression: a text-to-text model writes the target rounded to a multiple of this, and needs it; heads do not."""
    cut_as: str = ""
    """The name that its rows are cut into splits by; left out, its own. A renamed task keeps its splits by this."""
    descriptions: tuple[str, ...] = ()
    """What the task asks in a sentence, and in other wordings of it: what `conditioning: text` goes by. Left out, the
    `description`."""

    def __post_init__(self) -> None:
        for key in ("name", "kind", "target", "description", "prompt", "cut_as"):
            if not isinstance(getattr(self, key), str):
                raise InputError(f"task {self.name!r}: {key} must be text, not {getattr(self, key)!r}")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise InputError(f"task name {self.name!r} must be letters, digits, _ and - only")
        if self.kind not in DEFAULT_METRICS:
            raise InputError(f"task {self.name!r}: {unknown('kind', self.kind, DEFAULT_METRICS)}")
        for key in ("template", "labels", "metrics", "descriptions"):
            object.__setattr__(self, key, self._texts(key, getattr(self, key)))
        object.__setattr__(self, "metrics", self.metrics or DEFAULT_METRICS[self.kind])
        try:
            self._check_template()
            object.__setattr__(self, "prompt", self.prompt or self._derived_prompt())
            self._check_prompt()
            self._check_labels()
            self._check_metrics()
            self._check_text_step()
        except InputError as error:
            raise InputError(f"task {self.name!r}: {error}") from None

    def _texts(self, key: str, value: Any) -> tuple[str, ...]:
        """Take one text or a list of them; whole numbers are texts too, since YAML reads `[0, 1]` as numbers."""
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or not all(type(item) in (str, int) for item in items):
            raise InputError(
                f"task {self.name!r}: {key} must be a list of texts, not {value!r} (YAML reads yes and no as true and "
                "false unless they are quoted)"
            )
        return tuple(str(item) for item in items)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the template reads, each once."""
        return _columns(*self.template)

    @property
    def wordings(self) -> tuple[str, ...]:
        """What the task asks, in one or more wordings.

        Raises:
            InputError: Nothing says it.
        """
        if not any(self.descriptions or (self.description,)):
            raise InputError(
                f"task {self.name!r} says nowhere what it asks, which `conditioning: text` goes by; add "
                "`descriptions`, a list of one sentence or more"
            )
        return self.descriptions or (self.description,)

    def as_text(self) -> Self:
        """Return a copy that feeds the model its one `prompt`, as a text-to-text model needs it."""
        return dataclasses.replace(self, template=(self.prompt,))

    def _derived_prompt(self) -> str:
        return " ".join([self.name, *(f"{column}: {{{column}}}" for column in self.columns)])

    def _check_template(self) -> None:
        if not 1 <= len(self.template) <= 2:
            raise InputError(f"template must be one text, or two for a pair, not {len(self.template)}")
        if not self.columns:
            raise InputError(f"template {' / '.join(self.template)!r} reads no column; write one as {{text}}")
        if self.target in self.columns:
            raise InputError(f"template reads the target column {self.target!r}, which gives the answer away")

    def _check_prompt(self) -> None:
        columns = _columns(self.prompt)
        if not columns:
            raise InputError(f"prompt {self.prompt!r} reads no column; write one as {{text}}")
        if self.target in columns:
            raise InputError(f"prompt reads the target column {self.target!r}, which gives the answer away")

    def _check_text_step(self) -> None:
        step = self.text_step
        if step is None:
            return
        if self.kind != "regression":
            raise InputError("text_step belongs to a regression; a classification writes its labels")
        if isinstance(step, bool) or not isinstance(step, int | float) or not 0 < step < math.inf:
            raise InputError(f"text_step must be a number above 0, not {step!r}")

    def _check_labels(self) -> None:
        if self.labels and self.kind == "regression":
            raise InputError("labels belong to a classification; a regression has none")
        if len(self.labels) == 1:
            raise InputError(f"a task with one class, {self.labels[0]!r}, has nothing to learn; name every label")
        twice = [label for label in self.labels if self.labels.count(label) > 1]
        if twice:
            raise InputError(f"label {twice[0]!r} is named twice; label names must differ")

    def _check_metrics(self) -> None:
        fitting = METRIC_NAMES[self.kind]
        every = [name for names in METRIC_NAMES.values() for name in names]
        for metric in self.metrics:
            if metric not in every:
                raise unknown("metric", metric, fitting)
            if metric not in fitting:
                raise InputError(f"metric {metric!r} does not fit a {self.kind} (these do: {', '.join(fitting)})")

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Self:
        """Build a task from a YAML mapping, whose keys are the fields of `Task` and, under `source`, of `Source`.

        Raises:
            InputError: An unknown or missing key, a value that makes no sense, or a source without rows.
        """
        what = f"task {mapping['name']!r}" if isinstance(mapping, Mapping) and "name" in mapping else "a task"
        _check_keys(cls, what, mapping)
        try:
            source = Source.from_dict(mapping.get("source", {}))
        except InputError as error:
            raise InputError(f"{what}: {error}") from None
        return cls(**{**mapping, "source": source})
