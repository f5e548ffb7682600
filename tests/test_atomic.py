"""Whole or not at all: whatever fails at whatever write, the old content stays and nothing is left over."""

import errno
import os
import stat
import threading
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import tiny
from unolora import atomic
from unolora.errors import InputError

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
MESSAGES = {
    FULL: "no space left to write .*; free some, nothing half-written was kept",
    OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)): "no space left to write ",
    PermissionError(
        errno.EACCES, "Permission denied"
    ): r"can't be written \(Permission denied\); choose another folder",
    OSError(errno.EIO, "Input/output error"): r"can't be written \(Input/output error\)",
    SafetensorError("I/O error: No space left on device (os error 28)"): "no space left to write ",
    SafetensorError("something else"): r"can't be written \(something else\)",
}


def fail(monkeypatch, function, error=FULL, at=0):
    """Let `os.function` raise at its call number `at`; returns how often it was called."""
    calls, real = [], getattr(os, function)

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == at + 1:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(os, function, failing)
    return calls


def contents(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "new\n", "é \u2028 \U0001f600"])
def test_a_file_is_replaced(tmp_path, text):
    path = tmp_path / "file.txt"
    path.write_text("old")
    atomic.write_text(path, text)
    assert path.read_bytes() == text.encode()
    assert os.listdir(tmp_path) == ["file.txt"]


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    steps = []
    for function in ("fsync", "replace"):
        real = getattr(os, function)
        monkeypatch.setattr(
            os, function, lambda *args, real=real, function=function: (steps.append(function), real(*args))[1]
        )
    atomic.write_text(tmp_path / "file.txt", "new")
    assert steps == ["fsync", "replace", "fsync"], "the content, the name, the folder that holds the name"


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("there", [True, False])
def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch, function, there):
    path = tmp_path / "file.txt"
    if there:
        path.write_text("old")
    calls = fail(monkeypatch, function)
    with pytest.raises(InputError, match=rf"no space left to write {path}; free some, nothing half-written was kept"):
        atomic.write_text(path, "new")
    assert calls
    assert contents(tmp_path) == ({"file.txt": "old"} if there else {})


def test_a_failed_sync_of_the_folder_is_told_though_the_file_is_there(tmp_path, monkeypatch):
    fail(monkeypatch, "fsync", at=1)
    with pytest.raises(InputError, match="no space left"):
        atomic.write_text(tmp_path / "file.txt", "new")
    assert contents(tmp_path) == {"file.txt": "new"}


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    path.write_text("old")
    fail(monkeypatch, "replace", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        atomic.write_text(path, "new")
    assert contents(tmp_path) == {"file.txt": "old"}


def test_half_a_text_is_never_seen(tmp_path):
    """A text that can't be encoded fails after some of it was written."""
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        atomic.write_text(path, "new" * 10_000 + "\udcff")
    assert contents(tmp_path) == {"file.txt": "old"}


def test_json_refuses_nan(tmp_path):
    atomic.write_json(tmp_path / "file.json", {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic.write_json(tmp_path / "file.json", {"a": float("nan")})
    assert contents(tmp_path) == {"file.json": '{\n "a": 1\n}\n'}


@pytest.mark.parametrize("error", MESSAGES, ids=repr)
def test_errors_are_one_line(error, tmp_path):
    with pytest.raises(InputError, match=MESSAGES[error]) as found, atomic.explained(tmp_path):
        raise error
    assert str(tmp_path) in str(found.value)
    assert "\n" not in str(found.value)


def test_a_missing_folder_is_told(tmp_path):
    with pytest.raises(InputError, match=r"file.txt can't be written \(No such file or directory\)"):
        atomic.write_text(tmp_path / "no" / "file.txt", "new")


# --- folders -------------------------------------------------------------------------------------------------------


def fill(path, *names, error=None):
    with atomic.new_folder(path) as folder:
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(name)
        if error is not None:
            raise error


def test_a_folder_is_replaced_whole(tmp_path):
    fill(tmp_path / "a" / "run", "one", "sub/two")
    assert contents(tmp_path) == {"a/run/one": "one", "a/run/sub/two": "sub/two"}
    fill(tmp_path / "a" / "run", "three")
    assert contents(tmp_path) == {"a/run/three": "three"}
    assert tiny.leftovers(tmp_path) == []


def test_nobody_sees_a_folder_half_full(tmp_path):
    fill(tmp_path / "run", "old")
    with atomic.new_folder(tmp_path / "run") as folder:
        (folder / "new").write_text("")
        assert os.listdir(tmp_path / "run") == ["old"]
    assert os.listdir(tmp_path / "run") == ["new"]


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("call", [("fsync", 0), ("fsync", 1), ("fsync", 2), ("replace", 0), ("replace", 1), None])
def test_a_failed_folder_keeps_the_old_one(tmp_path, monkeypatch, call, there):
    path = tmp_path / "run"
    if there:
        fill(path, "old", "sub/two")
    before = contents(tmp_path)
    assert bool(before) == there
    if call == ("replace", 1) and not there:
        pytest.skip("only one rename")
    calls = fail(monkeypatch, call[0], at=call[1]) if call else None
    with pytest.raises(InputError, match="no space left to write"):
        fill(path, "new", "newer", error=None if call else FULL)
    if calls is not None:
        assert len(calls) > call[1]
    monkeypatch.undo()
    assert contents(tmp_path) == before
    assert tiny.leftovers(tmp_path) == []


def test_an_interrupt_between_the_renames_brings_the_old_one_back(tmp_path, monkeypatch):
    fill(tmp_path / "run", "old")
    fail(monkeypatch, "replace", KeyboardInterrupt(), at=1)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "run", "new")
    assert contents(tmp_path) == {"run/old": "old"}
    assert tiny.leftovers(tmp_path) == []


def test_an_error_of_the_block_goes_through(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic.new_folder(tmp_path / "run"):
        _ = 1 / 0
    assert os.listdir(tmp_path) == []


def test_a_link_stays_one(tmp_path):
    """To a disk with more room, say."""
    (tmp_path / "disk").mkdir()
    fill(tmp_path / "disk" / "real", "old")
    (tmp_path / "run").symlink_to(tmp_path / "disk" / "real")
    fill(tmp_path / "run", "new")
    assert (tmp_path / "run").is_symlink()
    assert contents(tmp_path / "disk") == {"real/new": "new"}


def test_a_file_in_the_way_stays(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(InputError, match="can't be written"):
        fill(tmp_path / "run" / "checkpoint", "new")
    assert contents(tmp_path) == {"run": "a file"}


# --- permissions, and others at work -------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_permissions_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        atomic.write_text(tmp_path / "file.txt", "new")
        with atomic.new_folder(tmp_path / "run") as folder:
            save_file({"a": torch.zeros(2)}, folder / "w.safetensors")
            (folder / "sub").mkdir()
            (folder / "sub" / "file").write_text("")
        now = os.umask(mask)
    finally:
        os.umask(before)
    assert now == mask
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert len(modes) == 5
    for path, mode in modes.items():
        assert mode == (0o777 if path.is_dir() else 0o666) & ~mask, path


def together(*functions):
    """Run all at once, and return what they raised."""
    gate, errors = threading.Barrier(len(functions)), []

    def run(function):
        gate.wait()
        try:
            function()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_of_several_writers_of_a_file_one_wins_and_readers_see_whole_texts(tmp_path):
    path = tmp_path / "file.txt"
    texts = [letter * 50_000 for letter in "abcd"]
    atomic.write_text(path, texts[0])
    seen = set()

    def write(text):
        for _ in range(10):
            atomic.write_text(path, text)

    def read():
        for _ in range(200):
            seen.add(path.read_text())

    assert together(*(lambda text=text: write(text) for text in texts), read) == []
    assert seen <= set(texts)
    assert path.read_text() in texts
    assert os.listdir(tmp_path) == ["file.txt"]


def test_of_several_writers_of_a_folder_the_last_whole_one_stays(tmp_path):
    """One that was overtaken in the middle says so; folders are never mixed."""
    names = "abcd"

    def write(name):
        for _ in range(10):
            fill(tmp_path / "run", f"{name}1", f"{name}2")

    for error in together(*(lambda name=name: write(name) for name in names)):
        assert isinstance(error, InputError), error
    assert sorted(os.listdir(tmp_path / "run")) in [[f"{name}1", f"{name}2"] for name in names]
    assert [path for path in Path(tmp_path).iterdir() if path.name != "run"] == []
