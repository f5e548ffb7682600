"""One process at a time on a run folder, whoever dies how."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

import tiny
from unolora import lock, run_folder, training
from unolora.errors import InputError

HOLD = """
import sys, time
from pathlib import Path
from unolora import lock
with lock.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_free_folder_is_held_and_left_clean(tmp_path):
    with lock.locked(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text()) == {"host": socket.gethostname(), "pid": os.getpid()}
        with pytest.raises(
            InputError, match=rf"{tmp_path} is in use by process {os.getpid()} on {socket.gethostname()}"
        ):
            lock.Lock(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with lock.locked(tmp_path):
        pass


def test_the_second_process_is_told_who_holds_it(holder, tmp_path):
    with pytest.raises(InputError, match=rf"in use by process {holder.pid} on {socket.gethostname()}; wait for it"):
        lock.Lock(tmp_path)
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == holder.pid


def test_the_lock_of_a_killed_process_is_stale(holder, tmp_path, caplog):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / ".lock").exists()
    with lock.locked(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert f"process {holder.pid} on {socket.gethostname()} held it and is gone" in caplog.text
    assert list(tmp_path.iterdir()) == []


def write(tmp_path, age, **holder):
    path = tmp_path / ".lock"
    path.write_text(json.dumps(holder))
    now = path.stat().st_mtime
    os.utime(path, (now - age, now - age))


def test_a_lock_that_another_machine_touched_lately_is_held(tmp_path):
    """Its kernel's lock may not be seen here."""
    write(tmp_path, lock.STALE_SECONDS - 20, host="elsewhere", pid=7)
    with pytest.raises(InputError, match=r"in use by process 7 on elsewhere \(its lock is free 60 s after"):
        lock.Lock(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_lock_that_another_machine_left_is_stale(tmp_path, caplog):
    write(tmp_path, lock.STALE_SECONDS + 20, host="elsewhere", pid=7)
    with lock.locked(tmp_path):
        assert "process 7 on elsewhere held it and is gone" in caplog.text


@pytest.mark.parametrize("age", [0, 600])
def test_a_file_system_without_locks_goes_by_touches_alone(tmp_path, monkeypatch, age):
    def unknown(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unknown)
    write(tmp_path, age, host=socket.gethostname(), pid=7)
    if age:
        with lock.locked(tmp_path):
            pass
    else:
        with pytest.raises(InputError, match="in use by process 7"):
            lock.Lock(tmp_path)


@pytest.mark.parametrize("data", [b"", b"[1]", b"{", b"\xff\xff", b"{}"])
def test_a_lock_file_that_says_nothing_is_taken(tmp_path, data):
    (tmp_path / ".lock").write_bytes(data)
    with lock.locked(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_the_holder_touches_it(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "TOUCH_SECONDS", 0.01)
    with lock.locked(tmp_path):
        path = tmp_path / ".lock"
        os.utime(path, (0, 0))
        for _ in range(1000):
            if path.stat().st_mtime > 0:
                break
            lock.threading.Event().wait(0.01)
        assert path.stat().st_mtime > 0


def test_a_lock_follows_a_folder_that_is_replaced(tmp_path):
    folder, new = tmp_path / "folder", tmp_path / "new"
    folder.mkdir(), new.mkdir()
    with lock.locked(folder) as held:
        held.also(new)
        os.replace(folder / ".lock", tmp_path / "old")
        folder.rmdir()
        os.replace(new, folder)
        with pytest.raises(InputError, match="in use by"):
            lock.Lock(folder)
    assert list(folder.iterdir()) == []


# --- on runs -------------------------------------------------------------------------------------------------------


def test_two_processes_on_one_run_are_refused(tmp_path):
    """New, overwriting, and resuming; the first one goes on as if nothing had been."""
    refused = []

    def second(step):
        if step == 5:
            for more in ({}, {"overwrite": True}):
                settings = tiny.settings(tmp_path / "run", method="heads-only", **more)
                with pytest.raises(InputError) as error:
                    training.train(settings, resume=not more)
                refused.append(str(error.value))

    settings = tiny.settings(tmp_path / "run", method="heads-only")
    training.train(settings, progress=lambda *_: tiny.Watch(second))
    assert len(refused) == 2
    assert all(f"is in use by process {os.getpid()} on {socket.gethostname()}" in line for line in refused)
    assert tiny.parts(tmp_path / "run") == tiny.parts(tiny.trained("heads-only"))
    assert tiny.leftovers(tmp_path) == []


def test_a_folder_that_is_made_for_nothing_goes_again(tmp_path, monkeypatch):
    def full(*_):
        raise InputError("no space left")

    monkeypatch.setattr(run_folder, "write_json", full)
    with pytest.raises(InputError, match="no space left"):
        training.train(tiny.settings(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_start_left_is_no_obstacle(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    write(run, 0, host=socket.gethostname(), pid=7)
    (run / "environment.json").write_text("{}")
    training.train(tiny.settings(run, method="heads-only"))
    assert tiny.parts(run) == tiny.parts(tiny.trained("heads-only"))
