"""One process at a time on a run folder: `RUN/.lock` names its holder.

The lock is the kernel's (`flock`), so that it goes with the process, however that ends; the file says who holds it. A
kernel knows only its own processes, and some network file systems lock for one machine only. So the holder also touches
the file now and then: one that another machine has touched lately is taken for held. Times are compared by the file
system's clock, not by the machines'.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from unolora.atomic import explained
from unolora.errors import InputError

logger = logging.getLogger(__name__)

NAME = ".lock"
TOUCH_SECONDS = 10.0
STALE_SECONDS = 60.0
"""A lock of another machine that was not touched for so long is stale."""


class Lock:
    """A held lock; see `locked`."""

    def __init__(self, folder: Path) -> None:
        self._files = [_take(folder / NAME)]

    def also(self, folder: Path) -> None:
        """Hold another folder too: one that is about to replace the first."""
        self._files.append(_take(folder / NAME))

    def touch(self) -> None:
        """Show that the holder lives."""
        for file in self._files:
            os.utime(file)

    def release(self, folder: Path) -> None:
        """Remove the file, and let go."""
        for file in self._files:
            with suppress(OSError):
                if os.path.samestat(os.stat(folder / NAME), os.fstat(file)):
                    os.unlink(folder / NAME)
            os.close(file)


@contextmanager
def locked(folder: Path) -> Iterator[Lock]:
    """Hold a folder for as long as the context lasts.

    Raises:
        InputError: Another process holds it; the message says which, on which machine.
    """
    lock, over = Lock(folder), threading.Event()

    def touch() -> None:
        while not over.wait(TOUCH_SECONDS):
            with suppress(OSError):
                lock.touch()

    thread = threading.Thread(target=touch, name="run lock", daemon=True)
    thread.start()
    try:
        yield lock
    finally:
        over.set()
        thread.join()
        lock.release(folder)


def _take(path: Path) -> int:
    """Take a lock and write who holds it; returns the open file."""
    while True:
        with explained(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            known = _flock(descriptor, path)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.stat(path), os.fstat(descriptor)):  # else its holder has just removed it
                    _refuse_if_fresh(descriptor, path, known)
                    with explained(path):
                        _write(descriptor)
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _flock(descriptor: int, path: Path) -> bool:
    """Ask the kernel for the lock; returns whether it could tell."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _held(path, _holder(descriptor)) from None
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            return False
        raise InputError(f"{path} can't be locked ({error.strerror}); choose another folder") from error
    return True


def _refuse_if_fresh(descriptor: int, path: Path, known: bool) -> None:
    """Look at what an earlier holder wrote, if it left anything."""
    holder = _holder(descriptor)
    if not holder:
        return
    if not known or holder.get("host") != socket.gethostname():
        before = os.fstat(descriptor).st_mtime
        probe = path.with_name(f"{NAME}.{os.getpid()}")
        with explained(path):
            probe.touch()
            now = probe.stat().st_mtime
            probe.unlink()
        if now - before < STALE_SECONDS:
            raise _held(path, holder, f" (its lock is free {STALE_SECONDS:.0f} s after that process ends)")
    logger.warning("%s: process %s on %s held it and is gone", path, holder.get("pid"), holder.get("host"))


def _holder(descriptor: int) -> dict[str, Any]:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _held(path: Path, holder: dict[str, Any], more: str = "") -> InputError:
    who = f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'an unknown machine')}"
    return InputError(f"{path.parent} is in use by {who}{more}; wait for it, stop it, or choose another `output`")


def _write(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
