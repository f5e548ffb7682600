"""The engine in a process of its own: it answers as the engine does, and the server lives and ends with it."""

import asyncio
import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import torch

import tiny
import tiny_text
from test_engine import alone, mixed, poison
from test_serve import bearer
from test_serve_faults import Process, cut, probability, scaled, until
from unolora import runs, training
from unolora.bench.serve import _family
from unolora.errors import InputError
from unolora.serving import (
    ClosedError,
    DeadlineError,
    Engine,
    EngineError,
    FailedError,
    QueueFullError,
    auth,
    engine_process,
)
from unolora.serving.engine_process import EngineProcess

ONE = [("mood", "a good day")]


@asynccontextmanager
async def started(run, *, died=lambda: None, batches=None, **options):
    """An engine in a process of its own, spawned: this one has threads."""
    observe = (lambda batch: None) if batches is None else batches.append
    engine = await asyncio.to_thread(lambda: EngineProcess(run, observe=observe, died=died, **options))
    await engine.start()
    try:
        yield engine
    finally:
        await asyncio.to_thread(engine.close, 20)
        assert not engine.alive


@pytest.fixture(autouse=True)
def spawned(monkeypatch):
    monkeypatch.setattr(engine_process, "_context", lambda: multiprocessing.get_context("spawn"))


def test_all_of_a_life():
    """Predictions, scales, errors, deadlines, a full queue, and the end; of one process, which takes long to start."""
    run = runs.load_run(tiny.trained())
    batches = []

    async def live():
        async with started(run.folder, batches=batches, max_queue=64) as engine:
            await answers_and_numbers(run, engine, batches)
            await errors(engine)
            await cancelled(engine, batches)
            pending = [asyncio.create_task(engine.apredict(ONE)) for _ in range(5)]
            await asyncio.sleep(0)
            assert engine.unanswered == 5
            assert await asyncio.to_thread(engine.close, 20)  # what was accepted is answered
            assert [len(await each) for each in pending] == [1] * 5
            assert not engine.accepts
            assert not engine.lost
            with pytest.raises(ClosedError):
                await engine.apredict(ONE)

    asyncio.run(live())


async def answers_and_numbers(run, engine, batches):
    inputs = mixed()[:40]
    found, wanted = await engine.apredict(inputs), alone(run, inputs)
    for one, other in zip(found, wanted, strict=True):
        assert one["task"] == other["task"]
        assert one.get("value") == pytest.approx(other.get("value"), abs=1e-3)
        assert one.get("probabilities") == pytest.approx(other.get("probabilities"), abs=1e-5)
    while sum(len(batch.tasks) for batch in batches) < 40:  # told after the answers
        await asyncio.sleep(0.001)
    assert sum(len(batch.tasks) for batch in batches) == 40
    assert {task for batch in batches for task in batch.tasks} == {"mood", "topic", "heat"}
    assert all(min(batch.waited) >= 0 and batch.tokens > 0 for batch in batches)
    with Engine(run) as other:
        assert engine.about == other.about
        for one, two in zip(await engine.ascales(inputs[:6]), other.scales(inputs[:6]), strict=True):
            torch.testing.assert_close(one, two, atol=1e-6, rtol=0)
    assert await engine.apredict([]) == []
    together = await asyncio.gather(*(engine.apredict([each]) for each in inputs))  # each to its caller
    assert [one["task"] for (one,) in together] == [task for task, _ in inputs]
    assert [one.get("label") for (one,) in together] == [other.get("label") for other in wanted]
    assert engine.unanswered == 0


async def errors(engine):
    with pytest.raises(InputError, match="did you mean 'mood'"):
        await engine.apredict([("moods", "a")])
    with pytest.raises(InputError, match="task 'heat' takes two texts, got 1"):
        await engine.apredict([("heat", "a")])
    with pytest.raises(InputError):
        await engine.apredict([("mood", "secret \ud800")])
    with pytest.raises(InputError, match="which write nothing"):
        await engine.agenerate(ONE, max_tokens=3)
    with pytest.raises(QueueFullError) as full:
        await engine.apredict(ONE * 65)
    assert full.value.retry_after >= 0.1
    with pytest.raises(DeadlineError, match="within 1e-05 s"):
        await engine.apredict(ONE * 60, timeout=1e-5)
    assert len(await engine.apredict(ONE)) == 1


async def cancelled(engine, batches):
    """What nobody waits for is not computed."""
    before = sum(len(batch.tasks) for batch in batches)
    task = asyncio.create_task(engine.apredict(ONE * 64))
    while not engine.unanswered:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.unanswered == 0
    await engine.apredict(ONE)
    assert sum(len(batch.tasks) for batch in batches) - before < 65


def test_a_language_model_writes():
    long = {"steps": 20, "learning_rate": 0.02, "evaluate_every": 20, "checkpoint_every": 20}
    run = runs.load_run(training.train(tiny_text.settings(tiny.folder() / "run", "t5", training=long)))

    async def write():
        async with started(run.folder) as engine:
            assert engine.about.writes
            return await engine.agenerate([("mood", "mood text: a good day"), ("mood", "a")], max_tokens=3)

    with Engine(run) as engine:
        assert asyncio.run(write()) == engine.generate([("mood", "mood text: a good day"), ("mood", "a")], max_tokens=3)


def test_reloading(tmp_path):
    run = tiny.copied(tiny.trained(), tmp_path)

    async def live():
        async with started(run) as engine:
            (old,) = await engine.apredict(ONE)
            scaled(run, 0.5)
            assert await engine.apredict(ONE) == [old]
            await engine.areload()
            (new,) = await engine.apredict(ONE)
            assert new["probabilities"] != old["probabilities"]
            cut(run)
            with pytest.raises(InputError):
                await engine.areload()
            assert await engine.apredict(ONE) == [new]

    asyncio.run(live())


def test_a_process_that_dies(caplog):
    """Nobody waits for ever, and whoever must know is told."""
    told = []

    async def live():
        async with started(tiny.trained(), died=lambda: told.append(True)) as engine:
            os.kill(engine._process.pid, signal.SIGSTOP)  # so that nothing is answered before it dies
            waiting = asyncio.create_task(engine.apredict(ONE))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            engine._process.kill()
            with pytest.raises(ClosedError, match="has ended"):
                await waiting
            assert not engine.alive
            assert not engine.accepts
            assert engine.lost
            with pytest.raises(ClosedError):
                await engine.apredict(ONE)

    asyncio.run(live())
    assert told == [True]
    assert "the engine's process has ended" in caplog.text


def test_runs_that_cannot_be_used(tmp_path):
    with pytest.raises(InputError, match="no such file; a run folder"):
        EngineProcess(tmp_path / "none", observe=lambda _: None, died=lambda: None)


def test_a_process_that_ends_before_it_says_anything(capfd):
    with pytest.raises(EngineError, match="see above"):
        EngineProcess(tiny.trained(), observe=lambda _: None, died=lambda: None, no_such_option=1)
    assert "no_such_option" in capfd.readouterr().err


def test_only_the_caller_of_a_poisoned_input_gets_the_error(run, caplog):
    """The engine's side of the socket pair, in a thread of this process, where a model can be made to fail."""
    ours, theirs = socket.socketpair()
    with ours, theirs, Engine(run) as engine:
        poison(engine.predictor, "poor")
        reader = threading.Thread(
            target=lambda: engine_process._answer_all(
                engine, theirs, lambda kind, what: theirs.sendall(engine_process._line(kind, what))
            )
        )
        reader.start()
        for number, text in enumerate(["a good day", "poor", "a cat"]):
            asked = {"inputs": [["mood", text]], "max_tokens": None}
            ours.sendall(engine_process._line("predict", [number, asked]))
        messages = engine_process._messages(ours)
        found = {number: (kind, answer) for kind, (number, answer) in (next(messages) for _ in range(3))}
        ours.sendall(engine_process._line("close", 20))
        reader.join(20)
        assert not reader.is_alive()
    assert {number: kind for number, (kind, _) in found.items()} == {0: "answer", 1: "error", 2: "answer"}
    name, message = found[1][1]
    with pytest.raises(FailedError, match="failed on this input"):
        raise engine_process.RAISED[name](message)
    assert "the model failed on an input" in caplog.text


# --- with its server -------------------------------------------------------------------------------------------------


def children(server):
    return _family(server.process.pid)[1:]


def gone(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.slow
def test_a_server_ends_with_its_engine_and_an_engine_with_its_server():
    server = Process(tiny.trained())
    server.ready()
    (engine,) = children(server)
    os.kill(engine, signal.SIGTERM)  # as a service manager tells all processes of a service
    time.sleep(0.5)
    assert server.ready().status_code == 200
    os.kill(engine, signal.SIGKILL)
    assert server.wait() == 1
    assert [line["code"] for line in server.lines() if line["event"] == "the engine's process has ended"] == [-9]

    server = Process(tiny.trained())
    server.ready()
    (engine,) = children(server)
    server.process.kill()
    server.wait()
    until(lambda: gone(engine))


@pytest.mark.slow
def test_the_model_is_in_one_process_and_the_server_in_another(tmp_path):
    """What a server answers, reloads and counts over the socket pair."""
    run = tiny.copied(tiny.trained(), tmp_path)
    key = auth.new_key(tmp_path / "keys", "root", admin=True)
    server = Process(run, "--keys", str(tmp_path / "keys"))
    try:
        with httpx.Client(base_url=server.url, timeout=30, trust_env=False, headers=bearer(key)) as client:
            assert len(children(server)) == 1
            body = {"inputs": [{"task": task, "text": text} for task, text in mixed()[:9]], "scores": True}
            old = client.post("/v1/predict", json=body)
            assert old.status_code == 200
            scaled(run, 0.5)
            assert client.post("/v1/reload", json={}).json()["version"] == 1
            assert probability(client.post("/v1/predict", json=body)) != probability(old)
            cut(run)
            assert client.post("/v1/reload", json={}).status_code == 409
            assert "unolora_batch_rows_sum 18.0" in client.get("/metrics").text
            assert client.get("/v1/tasks").json()["version"] == 1
    finally:
        server.process.send_signal(signal.SIGINT)
        assert server.wait() == 130
    assert [line["all_answered"] for line in server.lines() if line["event"] == "stopped"] == [True]
    assert "a good day" not in json.dumps(server.log)
