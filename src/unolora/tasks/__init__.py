"""Tasks: what they are, the built-in ones, and how a run names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from unolora.errors import InputError, unknown
from unolora.tasks import glue, quickstart
from unolora.tasks.task import Source, Task

TASKS: dict[str, Task] = {**quickstart.TASKS, **glue.TASKS}
"""The built-in tasks by name."""

GROUPS: dict[str, tuple[str, ...]] = {"glue": glue.GLUE}
"""Names that stand for several built-in tasks."""


def get(name: str) -> Task:
    """Return a built-in task; InputError with the nearest name for an unknown one."""
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name]


def resolve(tasks: Sequence[str | Mapping[str, Any]]) -> list[Task]:
    """Return the tasks of a run, in order.

    Args:
        tasks: Names of built-in tasks or of `GROUPS` of them, and mappings that spell tasks of one's own (see
            `Task.from_dict`).

    Raises:
        InputError: No task, an unknown name, a mapping that makes no sense, or two tasks of one name.
    """
    if isinstance(tasks, str | Mapping) or not tasks:
        raise InputError(f"tasks must be a list of names or mappings with at least one task, not {tasks!r}")
    found = [each for task in tasks for each in _named(task)]
    names = [task.name for task in found]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(f"task {twice[0]!r} is named twice; give one of them another name")
    return found


def _named(task: str | Mapping[str, Any]) -> list[Task]:
    if not isinstance(task, str):
        return [Task.from_dict(task)]
    if task not in TASKS and task not in GROUPS:
        raise unknown("task", task, [*TASKS, *GROUPS])
    return [TASKS[name] for name in GROUPS.get(task, (task,))]


__all__ = ["GROUPS", "TASKS", "Source", "Task", "get", "resolve"]
