"""Tasks: what they are, the built-in ones, and how a run names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from unolora.errors import InputError, unknown
from unolora.tasks import quickstart
from unolora.tasks.task import Source, Task

TASKS: dict[str, Task] = dict(quickstart.TASKS)
"""The built-in tasks by name."""


def get(name: str) -> Task:
    """Return a built-in task; InputError with the nearest name for an unknown one."""
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name]


def resolve(tasks: Sequence[str | Mapping[str, Any]]) -> list[Task]:
    """Return the tasks of a run, in order.

    Args:
        tasks: Names of built-in tasks, and mappings that spell tasks of one's own (see `Task.from_dict`).

    Raises:
        InputError: No task, an unknown name, a mapping that makes no sense, or two tasks of one name.
    """
    if isinstance(tasks, str | Mapping) or not tasks:
        raise InputError(f"tasks must be a list of names or mappings with at least one task, not {tasks!r}")
    found = [get(task) if isinstance(task, str) else Task.from_dict(task) for task in tasks]
    names = [task.name for task in found]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(f"task {twice[0]!r} is named twice; give one of them another name")
    return found


__all__ = ["TASKS", "Source", "Task", "get", "resolve"]
