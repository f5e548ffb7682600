"""Checkpoints that are not whole are told apart; a run goes on from the last good one, whenever it was killed."""

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import tiny
import unolora_cli
from unolora import recovery, runs, training
from unolora.errors import CheckpointError, InputError

FILES = ["manifest.json", "metrics.jsonl", "optimizer.safetensors", "state.json", "trainer_state.json",
         "weights.safetensors"]  # fmt: skip
EVERY = {"log_every": 1, "evaluate_every": 3, "checkpoint_every": 2}  # a line, a best or a checkpoint at most steps


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Without the report and the waits for the disk, which are tested elsewhere."""
    monkeypatch.setattr("unolora.report.write_report", lambda folder: folder)
    monkeypatch.setattr("os.fsync", lambda _: None)


def stop_at(step):
    return lambda label, trainer: tiny.Watch(lambda now: signal.raise_signal(signal.SIGINT) if now == step else None)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run with checkpoints 6 and 7 and the best of step 3 or 6, stopped at 7."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(training.Interrupted):
        training.train(tiny.settings(run, training=EVERY), progress=stop_at(7))
    assert [path.name for path in recovery.found(run)] == ["step-000006", "step-000007"]
    assert sorted(path.name for path in recovery.found(run)[1].iterdir()) == FILES
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same run, never stopped."""
    return training.train(tiny.settings(tmp_path_factory.mktemp("whole") / "run", training=EVERY))


def resumed(run, **more):
    found = runs.read_settings(run)
    found.output = str(run)
    return training.train(found, resume=True, **more)


def same(run, whole):
    found, wanted = tiny.parts(run), tiny.parts(whole)
    found["results.json"]["name"] = wanted["results.json"]["name"]
    assert found.keys() == wanted.keys()
    for name in found:
        assert found[name] == wanted[name], name
    assert tiny.leftovers(run.parent) == []


# --- checkpoints that are not whole --------------------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def remove(path):
    path.unlink()


@pytest.mark.parametrize("spoil", [cut, halve, empty, lengthen, flip, remove], ids=lambda f: f.__name__)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(stopped, tmp_path, caplog, file, spoil):
    run = tiny.copied(stopped, tmp_path)
    before, last = recovery.found(run)
    spoil(last / file)
    settings = runs.read_settings(stopped)
    checkpoints = recovery.Checkpoints(run, identity_of(last if file != "state.json" else before, settings))
    with caplog.at_level(logging.WARNING):
        assert checkpoints.last_good() == before
    (record,) = caplog.records
    assert str(last / file) in record.getMessage() or (file == "manifest.json" and str(last) in record.getMessage())
    assert record.getMessage().endswith("going on from step-000006")
    assert recovery.found(run) == [before], "the damaged one is out of the way"
    assert (run / "checkpoints" / "step-000007.damaged").is_dir()


def identity_of(checkpoint, settings):
    state = json.loads((checkpoint / "state.json").read_text())
    return {name: state[name] for name in ("settings", "method", "data")}


@pytest.mark.parametrize("spoil", [flip, remove], ids=lambda f: f.__name__)
def test_a_run_goes_on_from_the_one_before_to_the_same_end(stopped, whole, tmp_path, spoil):
    run = tiny.copied(stopped, tmp_path)
    spoil(recovery.found(run)[1] / "weights.safetensors")
    same(resumed(run), whole)


def test_damaged_best_weights_spoil_the_checkpoint_that_needs_them(stopped, whole, tmp_path, caplog):
    """They can't be trained again from there; from before them they can."""
    run = tmp_path / "run"
    settings = tiny.settings(run, training={**EVERY, "keep_checkpoints": 9})
    with pytest.raises(training.Interrupted):
        training.train(settings, progress=stop_at(7))
    best = json.loads((recovery.found(run)[-1] / "trainer_state.json").read_text())["best_global_step"]
    earlier = [path for path in recovery.found(run) if int(path.name[5:]) < best]
    assert earlier
    flip(run / "checkpoints" / f"best-{best:06d}" / "weights.safetensors")
    resumed(run)
    assert f"best-{best:06d}/weights.safetensors: damaged" in caplog.text
    assert f"going on from {earlier[-1].name}" in caplog.text
    found, wanted = tiny.parts(run), tiny.parts(whole)
    assert {**found, "config.yaml": 0} == {**wanted, "config.yaml": 0}


def test_without_a_good_checkpoint_nothing_is_begun_anew(stopped, tmp_path):
    run = tiny.copied(stopped, tmp_path)
    for path in recovery.found(run):
        flip(path / "optimizer.safetensors")
    before = tiny_files(run)
    with pytest.raises(CheckpointError, match=r"step-000007/optimizer.safetensors: damaged.*; no good checkpoint is l"):
        resumed(run)
    after = tiny_files(run)
    after.pop("environment.json"), before.pop("environment.json")
    assert after == before


def tiny_files(run):
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_checkpoint_of_another_run_is_put_aside(stopped, whole, tmp_path, caplog):
    """Of another seed; its files are whole."""
    other = tmp_path / "other"
    with pytest.raises(training.Interrupted):
        training.train(tiny.settings(other, training={**EVERY, "seed": 1}), progress=stop_at(8))
    run = tiny.copied(stopped, tmp_path)
    shutil.copytree(recovery.found(other)[-1], run / "checkpoints" / "step-000008")
    recovery.check(run / "checkpoints" / "step-000008")
    same(resumed(run), whole)
    assert "step-000008: written with other settings (training.seed)" in caplog.text


@pytest.mark.parametrize("what", ["method", "data"])
def test_a_checkpoint_of_another_method_or_other_data_is_put_aside(stopped, tmp_path, caplog, what):
    run = tiny.copied(stopped, tmp_path)
    before, last = recovery.found(run)
    state = json.loads((last / "state.json").read_text())
    state[what] = "lora-shared" if what == "method" else {}
    (last / "state.json").write_text(json.dumps(state))
    (last / "manifest.json").unlink()
    recovery.seal(last)
    assert recovery.Checkpoints(run, identity_of(before, None)).last_good() == before
    assert "step-000007: of another run, trained on other data or by another method" in caplog.text


@pytest.mark.parametrize("name", ["step-", "step-x", "step-000009.damaged", "step--3", "best-000009x"])
def test_other_names_are_no_checkpoints(tmp_path, name):
    (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert recovery.found(tmp_path) == []


def manifest(files):
    """One that fits itself."""
    return json.dumps({"files": files, "sha256": recovery._sha256_of(files)}).encode()


MANIFESTS = [
    b"",
    b"[]",
    b"{}",
    b"\xff",
    b"[" * 99999,
    b'{"files": []}',
    b'{"files": {}}',
    b'{"files": {"state.json": 3}}',
    b'{"files": {"state.json": {}}, "sha256": ""}',
    manifest({}),
    manifest([]),
    manifest({"state.json": 3}),
    manifest({"../../config.yaml": {"bytes": 1, "sha256": ""}}),
    manifest({"/etc/passwd": {}}),
]


@pytest.mark.parametrize("data", MANIFESTS)
def test_manifests_that_are_none_are_refused(stopped, tmp_path, data):
    run = tiny.copied(stopped, tmp_path)
    last = recovery.found(run)[-1]
    (last / "manifest.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"manifest.json: (damaged|expected|can't be read)"):
        recovery.check(last)


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_change_of_any_byte_is_seen(stopped, data):
    last = recovery.found(stopped)[-1]
    path = last / data.draw(st.sampled_from([name for name in FILES if name != "manifest.json"]))
    whole = path.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    try:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ data.draw(st.integers(1, 255))]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match=f"{path.name}: damaged"):
            recovery.check(last)
    finally:
        path.write_bytes(whole)
    recovery.check(last)


def test_a_crafted_checkpoint_is_an_error_not_a_crash(stopped, tmp_path):
    """Its manifest fits, its contents do not."""
    for number, (file, data) in enumerate(
        [
            ("trainer_state.json", b'{"global_step": 7, "best_global_step": null, "surprise": 1}'),
            ("trainer_state.json", b'{"global_step": "7", "best_global_step": "../.."}'),
            ("state.json", b"{}"),
            ("weights.safetensors", b"\xff" * 64),
            ("optimizer.safetensors", (2**62).to_bytes(8, "little") + b"{}"),
        ]
    ):
        run = tiny.copied(stopped, tmp_path / str(number))
        for path in recovery.found(run):
            (path / file).write_bytes(data)
            recovery.seal(path)
        with pytest.raises(InputError, match=file):
            resumed(run)


def test_tensors_of_another_shape_are_refused(stopped, tmp_path):
    run = tiny.copied(stopped, tmp_path)
    for path in recovery.found(run):
        tensors = load_file(path / "weights.safetensors")
        name = next(iter(tensors))
        save_file({**tensors, name: torch.zeros(99)}, path / "weights.safetensors")
        recovery.seal(path)
    with pytest.raises(CheckpointError, match=r"expected the .* tensors of these settings"):
        resumed(run)


# --- the log -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log", ["", "{", None], ids=["emptied", "torn", "gone"])
def test_the_log_comes_back_from_the_checkpoint(stopped, whole, tmp_path, log):
    run = tiny.copied(stopped, tmp_path)
    if log is None:
        (run / "metrics.jsonl").unlink()
    else:
        (run / "metrics.jsonl").write_text(log)
    same(resumed(run), whole)


# --- the data ------------------------------------------------------------------------------------------------------


def own_data(tmp_path):
    shutil.copytree(tiny.data(), tmp_path / "data")
    return {"root": str(tmp_path / "data")}


def test_data_that_changed_are_refused(tmp_path):
    """With other rows in the file the cut is another, and test rows would have been trained on."""
    data, run = own_data(tmp_path), tmp_path / "run"
    with pytest.raises(training.Interrupted):
        training.train(tiny.settings(run, data=data, method="heads-only"), progress=stop_at(7))
    file = tmp_path / "data" / "mood.jsonl"
    rows = file.read_text()
    file.write_text(rows + rows.splitlines()[0] + "\n")
    with pytest.raises(
        CheckpointError, match=r"run: the train rows of task 'mood' are not those that the run began wi"
    ):
        resumed(run)
    file.write_text(rows)
    resumed(run)
    assert unolora_cli.main(["evaluate", str(run)]) == 0
    file.write_text(rows + rows.splitlines()[0] + "\n")
    assert unolora_cli.main(["evaluate", str(run)]) == 2
    (run / "data.json").unlink()  # as an older version left it
    assert unolora_cli.main(["evaluate", str(run)]) == 0


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"mood": 1}', b"\xff"])
def test_digests_that_are_none_are_refused(tmp_path, data):
    (tmp_path / "data.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"data.json: expected the digests of the run's data"):
        runs.check_data(tmp_path, {"mood": {"train": "x"}})


@given(
    st.lists(st.tuples(st.text(max_size=4), st.text(max_size=4)), min_size=1, max_size=3),
    st.lists(st.tuples(st.text(max_size=4), st.text(max_size=4)), min_size=1, max_size=3),
)
@settings(max_examples=200, deadline=None)
def test_digests_tell_rows_apart(one, other):
    from unolora.tasks.rows import Rows

    digests = [Rows(texts, torch.arange(len(texts)).numpy()).digest() for texts in (one, other)]
    assert (digests[0] == digests[1]) == (one == other)
    assert Rows(one, torch.ones(len(one)).numpy()).digest() != digests[0]


# --- killed --------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import conftest, tiny
from unolora import runs, training
from unolora.settings import from_dict
import unolora.report, yaml
unolora.report.write_report = lambda folder: folder
config = yaml.safe_load(open(sys.argv[2]))
place, resume = sys.argv[3], sys.argv[4] == "resume"
left = [int(sys.argv[5])]
def die(function, before=True):
    def dying(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0 and before:
            os.kill(os.getpid(), signal.SIGKILL)
        out = function(*args, **kwargs)
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return out
    return dying
progress = None
if place == "step":
    progress = lambda *_: tiny.Watch(lambda step: die(lambda: None)())
else:
    setattr(os, place, die(getattr(os, place)))
settings = from_dict(config)
training.train(settings, resume=resume, progress=progress)
"""


def killed(tmp_path, run, config, place, count, resume=False):
    """Train in a process of its own that kills itself (SIGKILL) at its `count`-th step, fsync or replace."""
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({**config, "output": str(run)}))
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    arguments = [str(Path(__file__).parent), str(file), place, "resume" if resume else "new", str(count)]
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return done


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "place", "count"),
    [
        ("unolora", "step", 0),
        ("lora-per-task", "step", 6),
        ("full", "step", 11),
        ("unolora", "replace", 3),  # in the middle of a checkpoint
        ("unolora", "fsync", 9),
        ("poly", "replace", 12),
    ],
)
def test_a_run_killed_at_any_moment_goes_on_to_the_same_end(method, place, count, tmp_path):
    config = tiny.spelled(method=method, training=EVERY)
    run = tmp_path / "run"
    killed(tmp_path, run, config, place, count)
    assert run.is_dir()
    assert (run / ".lock").exists(), "nobody could remove it"
    resumed(run)
    whole = training.train(tiny.settings(tmp_path / "whole" / "run", method=method, training=EVERY))
    same(run, whole)


class Power(BaseException):
    """The machine loses power: nothing is tidied up after it."""


@given(method=st.sampled_from(tiny.METHODS), steps=st.lists(st.integers(1, 11), min_size=1, max_size=2, unique=True))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_run_cut_off_at_random_steps_is_uninterrupted(tmp_path_factory, method, steps):
    def cut_off(step):
        def do(now):
            if now == step:
                raise Power

        return lambda label, trainer: tiny.Watch(do)

    run = tmp_path_factory.mktemp("cut") / "run"
    settings = tiny.settings(run, method=method)
    for number, step in enumerate(sorted(steps)):
        with pytest.raises(Power):
            training.train(settings, resume=number > 0, progress=cut_off(step))
    same(training.train(settings, resume=True), tiny.trained(method))


# --- writes that are cut off ---------------------------------------------------------------------------------------


def cut_write(monkeypatch, name, share, error):
    """Let the write of a file stop with an error when a share of it is on the disk."""
    hit = []
    real = recovery.save_tensors

    def save(tensors, path):
        real(tensors, path)
        if path.name == name and path.parent.name.startswith(".step-000004"):
            hit.append(path)
            with path.open("rb+") as file:
                file.truncate(int(share * path.stat().st_size))
            raise error

    monkeypatch.setattr(recovery, "save_tensors", save)
    return hit


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("share", [0, 0.5, 0.999])
@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors"])
def test_a_cut_write_keeps_the_checkpoint_before(tmp_path, monkeypatch, name, share, number):
    run = tmp_path / "run"
    settings = tiny.settings(run, method="heads-only", training=EVERY)
    hit = cut_write(monkeypatch, name, share, OSError(number, os.strerror(number)))
    words = "no space left to write" if number in (errno.ENOSPC, errno.EDQUOT) else "can't be written"
    with pytest.raises(InputError, match=rf"{words}.*step-000004|step-000004.*{words}"):
        training.train(settings)
    assert hit
    monkeypatch.undo()
    assert [path.name for path in recovery.found(run)] == ["step-000002"]
    recovery.check(recovery.found(run)[0])
    assert tiny.leftovers(run) == []


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("at", range(0, 40, 5))
def test_power_lost_at_any_write_is_recovered(tmp_path, monkeypatch, function, at, whole):
    """Nothing is tidied up: what lies there half-written is what a kill would leave."""
    run = tmp_path / "run"
    calls, real = [], getattr(os, function)

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) > at:
            raise Power  # and so does every later one: nothing is written after a power cut
        return real(*args, **kwargs)

    def tidy(real):
        return lambda *args, **kwargs: None if len(calls) > at else real(*args, **kwargs)

    monkeypatch.setattr(os, function, failing)
    for module, name in ((shutil, "rmtree"), (Path, "unlink"), (Path, "rmdir"), (os, "unlink")):
        monkeypatch.setattr(module, name, tidy(getattr(module, name)))
    settings = tiny.settings(run, training=EVERY)
    try:
        training.train(settings)
    except Power:
        pass
    else:
        assert len(calls) <= at, "there were not so many writes"
    monkeypatch.undo()
    monkeypatch.setattr("unolora.report.write_report", lambda folder: folder)
    begun = (run / "config.yaml").is_file()
    same(training.train(settings, resume=begun), whole)


# --- resuming late -------------------------------------------------------------------------------------------------


def test_resuming_late_replays_nothing(tmp_path, monkeypatch):
    """Only the batches that are left are drawn."""
    from unolora.sampling import Sampler

    run = tmp_path / "run"
    settings = tiny.settings(run, method="heads-only", training={**EVERY, "steps": 10})
    with pytest.raises(training.Interrupted):
        training.train(settings, progress=stop_at(8))
    drawn = []
    real = Sampler.batch
    monkeypatch.setattr(Sampler, "batch", lambda self, step: drawn.append(step) or real(self, step))
    resumed(run)
    assert sorted(set(drawn)) == [8, 9]
