"""What a server needs to know of a run beside its answers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

from unolora.tasks import Task


@dataclass(frozen=True)
class About:
    """A run in words."""

    run: str
    """Name of its folder."""
    method: str
    backbone: str
    """Name of its folder."""
    tasks: dict[str, Task]
    writes: bool
    """Whether it is a language model, which writes."""
    positions: list[str]
    """The adapted projections that have scales [P]; none where the method scales no ranks."""

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` takes."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Self:
        """Build what `to_json` returned, before or after it was JSON."""
        return cls(**{**found, "tasks": {name: Task.from_dict(task) for name, task in found["tasks"].items()}})
