"""Files and folders that are there whole or not at all: write under a temporary name, fsync, rename."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from unolora.errors import InputError


def write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8) that replaces what was there in one step.

    Raises:
        InputError: There is no space, or the folder can't be written.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file that replaces what was there in one step.

    Raises:
        InputError: There is no space, or the folder can't be written.
    """
    with explained(path):
        temporary = _beside(path)
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


def write_json(path: Path, data: Any) -> None:
    """Write data as JSON; a NaN is refused, since not every reader takes it."""
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes `path` when the block ends well, and vanishes when it doesn't.

    A folder that is there already is replaced as a whole.

    Raises:
        InputError: There is no space, or the folder can't be written.
    """
    with explained(path):
        path = path.resolve()  # what a link points to is replaced, not the link
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, old = _beside(path), _beside(path)
        try:
            temporary.mkdir()
            yield temporary
            readable = temporary.stat().st_mode & 0o666  # as the umask has it; safetensors keeps its files private
            for file in [*temporary.rglob("*"), temporary]:
                if file.is_file():
                    file.chmod(readable)
                sync(file)
            if path.exists():
                os.replace(path, old)
            os.replace(temporary, path)
        except BaseException:
            if old.exists() and not path.exists():
                os.replace(old, path)
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
        sync(path.parent)


def sweep(folder: Path) -> None:
    """Remove what a process that was killed left half-written in a folder; nobody else may be writing to it."""
    for path in folder.glob(".*"):
        if is_temporary(path):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def is_temporary(path: Path) -> bool:
    """Whether a name is one that something is written under before it gets its own."""
    return re.fullmatch(r"\..+\.[0-9a-f]{8}", path.name) is not None


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what keeps a block from writing `path` into one line that says what to do.

    Raises:
        InputError: There is no space, or it can't be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        found = re.search(r"os error (\d+)", str(error))  # how safetensors spells one
        number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
        if is_full(number):
            raise InputError(f"no space left to write {path}; free some, nothing half-written was kept") from error
        reason = os.strerror(number) if number else " ".join(str(error).split())
        raise InputError(f"{path} can't be written ({reason}); choose another folder") from error


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def is_full(number: int | None) -> bool:
    """Whether an `errno` says that a disk, or a quota, is full."""
    return number in (errno.ENOSPC, errno.EDQUOT)


def sync(path: Path) -> None:
    """Have a file or a folder on the disk: a power cut must not leave a name without its content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
