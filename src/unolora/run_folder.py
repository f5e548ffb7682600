"""The folder of a run that is being trained: claimed by one process, begun, gone on with, and finished.

What is in it and how it is read again is in `runs.py`; the checkpoints are in `recovery.py`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from unolora import lock, processes, recovery, runs
from unolora.atomic import explained, is_temporary, new_folder, sweep, write_json, write_text
from unolora.card import model_card
from unolora.errors import InputError
from unolora.recovery import Checkpoints
from unolora.settings import Settings, to_dict
from unolora.tasks import Task

BEFORE_CONFIG = ("environment.json", runs.DATA)
"""What is written into a run folder before the config.yaml that makes it a run."""

Digests = Mapping[str, Mapping[str, str]]
"""Task -> split -> digest of its rows; see `runs.digests`."""


def check(folder: Path, settings: Settings, resume: bool) -> None:
    """Check that a run may begin in a folder, or go on in it; nothing is changed.

    Raises:
        InputError: The folder holds something else, or a run of other settings.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; choose another `output`")
    if resume:
        kept = recovery.fingerprint(runs.read_settings(folder))
        recovery.check_settings(folder, kept, recovery.fingerprint(settings))
    elif not folder.is_dir() or _is_empty(folder):
        return
    elif not (folder / "config.yaml").is_file():
        raise InputError(f"{folder} holds other files and no run; it is not overwritten, choose another `output`")
    elif not settings.overwrite:
        raise InputError(
            f"{folder} already holds a run; choose another `output`, set `overwrite`, or {runs.how_to_go_on(folder)}"
        )


def _is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing, beside what a start that was killed may have left."""
    left = (lock.NAME, *BEFORE_CONFIG)
    return all(path.name in left or is_temporary(path) for path in folder.iterdir())


def claim(
    held: ExitStack,
    folder: Path,
    settings: Settings,
    root: Path | None,
    digests: Digests,
    resume: bool,
) -> None:
    """Hold the run folder until `held` is left, and write what the run is made of into it.

    Args:
        held: What releases it again; a new folder in which no run has begun by then is removed.
        folder: The run's.
        settings: The run.
        root: Folder that relative data files start from, where `data.root` is not set.
        digests: Of its rows, to be written, or compared with those that the run began with.
        resume: Go on with the run that is in the folder.

    Raises:
        InputError: Another process holds it, it can't be written, or `check` or `runs.check_data` refuses.
    """
    held.callback(_remove_if_not_begun, folder, not folder.exists())
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    own = held.enter_context(lock.locked(folder))
    check(folder, settings, resume)  # once more, now that nobody else changes it
    environment = {**runs.environment(), "processes": processes.count()}
    sweep(folder)
    if resume:
        runs.check_data(folder, digests)
        write_json(folder / "environment.json", environment)
        return
    start = Path(settings.data.root or root or ".").resolve()  # the run is read from other working folders as well
    settings = replace(settings, data=replace(settings.data, root=str(start)))
    # An empty folder is filled, not replaced: it may be a mount point, or the working folder. What has no config.yaml,
    # which comes last, is no run.
    with nullcontext(folder) if _is_empty(folder) else new_folder(folder) as inside:
        if inside != folder:
            own.also(inside)
        write_json(inside / "environment.json", environment)
        write_json(inside / runs.DATA, digests)
        write_text(inside / "config.yaml", yaml.safe_dump(to_dict(settings), sort_keys=False, allow_unicode=True))


def _remove_if_not_begun(folder: Path, new: bool) -> None:
    if folder.is_dir() and _is_empty(folder):
        with suppress(OSError):
            for name in BEFORE_CONFIG:
                (folder / name).unlink(missing_ok=True)
            if new:
                folder.rmdir()


def is_finished(folder: Path) -> bool:
    """Whether a method was trained to its end before the run was stopped."""
    if not (folder / "results.json").is_file():
        return False
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return True


def checkpoints_of(folder: Path, settings: Settings, method: str, digests: Digests) -> Checkpoints:
    """Return the checkpoints of one method's training in a folder, and what they must go with."""
    identity = {"settings": recovery.fingerprint(settings), "method": method, "data": digests}
    return Checkpoints(folder, identity, settings.training.keep_checkpoints)


def begin(checkpoints: Checkpoints) -> str | None:
    """Make a method's folder and find the checkpoint to go on from; without one the log starts anew."""
    with explained(checkpoints.run):
        checkpoints.run.mkdir(parents=True, exist_ok=True)
        sweep(checkpoints.run)
    checkpoint = checkpoints.last_good()
    if checkpoint is None:
        (checkpoints.run / recovery.LOG).unlink(missing_ok=True)
        return None
    checkpoints.restore_log(checkpoint)
    return str(checkpoint)


def finish(
    model: runs.Model,
    settings: Settings,
    method: str,
    tasks: Sequence[Task],
    checkpoints: Checkpoints,
    results: dict[str, Any],
    predicted: dict[str, Any] | None,
) -> None:
    """Write what a method leaves: its adapter, then its results, which say that it is finished.

    Args:
        model: With the best weights, whole.
        settings: The run.
        method: Its name.
        tasks: In the order of their rows.
        checkpoints: Those of the method, which are removed.
        results: What results.json holds but for the size of the adapter's files, which is added.
        predicted: What predictions.json holds, if it is written.

    Raises:
        InputError: A file can't be written.
    """
    adapter = checkpoints.run / "adapter"
    runs.save_adapter(model, settings, method, tasks, adapter)
    write_text(adapter / "README.md", model_card(settings, tasks, results))
    results["parameters"]["file_bytes"] = sum(p.stat().st_size for p in adapter.rglob("*") if p.is_file())
    if predicted is not None:
        write_json(checkpoints.run / "predictions.json", predicted)
    write_json(checkpoints.run / "results.json", results)
    shutil.rmtree(checkpoints.folder)


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint of a run, or None."""
    paths = recovery.found(folder)
    return paths[-1] if paths else None
