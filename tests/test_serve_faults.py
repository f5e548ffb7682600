"""What goes wrong around a server: clients that leave, stall or lie, broken adapters, being told to stop."""

import gc
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress

import httpx
import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from schemathesis.specs.openapi.checks import ignored_auth, positive_data_acceptance

import tiny
import tiny_text
from live import live
from test_engine import Held, mixed, poison
from test_serve import bearer, problem
from unolora import runs, training
from unolora.serving import auth
from unolora.serving.engine import settle

INPUT = [("mood", "a good day")]


class Gate:
    """Holds the model of a server until it is opened."""

    def __init__(self) -> None:
        self.sign, self.running = threading.Event(), threading.Event()
        self.sign.set()

    def __call__(self, service):
        Held.hold(self, service.engine.predictor)

    _waiting = Held._waiting

    def shut(self, site, pool):
        """Close it, and give the model a row to wait with."""
        self.sign.clear()
        self.running.clear()
        future = pool.submit(site.predict, INPUT)
        assert self.running.wait(30)
        return future


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.sign.set()


def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def raw(site, data=b""):
    """A bare connection."""
    found = socket.create_connection(("127.0.0.1", site.port), timeout=20)
    found.sendall(data)
    return found


def request(body: bytes, length=None) -> bytes:
    length = len(body) if length is None else length
    head = f"POST /v1/predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {length}"
    return head.encode() + b"\r\n\r\n" + body


def everything(connection) -> bytes:
    found = b""
    with suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            found += piece
    return found


BODY = json.dumps({"inputs": [{"task": "mood", "text": "a good day"}] * 3}).encode()


# --- clients that leave --------------------------------------------------------------------------------------------


def test_what_a_client_asked_that_went_away_is_not_computed(run, gate):
    with live(run, gate) as site, ThreadPoolExecutor() as pool:
        busy = gate.shut(site, pool)
        leaving = raw(site, request(BODY))
        staying = pool.submit(site.predict, INPUT)
        until(lambda: site.service.engine.waiting == 4)
        leaving.close()
        until(lambda: site.service.engine.waiting == 1)
        gate.sign.set()
        assert busy.result().status_code == staying.result().status_code == 200
        until(lambda: any(line.get("status") == 499 for line in site.lines))
        assert site.metric("unolora_answers_total") == 2


def test_a_client_that_goes_away_while_its_batch_runs(run, gate):
    with live(run, gate) as site, ThreadPoolExecutor() as pool:
        gate.shut(site, pool)
        leaving = raw(site, request(BODY))
        until(lambda: site.service.engine.waiting == 3)
        gate.running.clear()
        gate.sign.set()
        assert gate.running.wait(20)
        leaving.close()
        assert site.predict(INPUT).status_code == 200
        assert site.service.engine.alive


def test_a_client_that_goes_away_in_the_middle_of_its_body(run):
    with live(run) as site:
        raw(site, request(BODY[:20], len(BODY))).close()
        until(lambda: any(line.get("status") == 0 for line in site.lines))
        assert site.predict(INPUT).status_code == 200


# --- full queues, deadlines, poison --------------------------------------------------------------------------------


def test_a_full_queue_is_answered_429(run, gate):
    with live(run, gate, max_queue=3) as site, ThreadPoolExecutor() as pool:
        waiting = [gate.shut(site, pool), pool.submit(site.predict, INPUT * 3)]
        until(lambda: site.service.engine.waiting == 3)
        answer = site.predict(INPUT)
        assert "the queue is full" in problem(answer, 429, "queue_full")
        assert int(answer.headers["retry-after"]) >= 1
        gate.sign.set()
        assert [future.result().status_code for future in waiting] == [200, 200]
        assert site.predict(INPUT).status_code == 200


def test_more_than_the_queue_holds_never_fits(run):
    with live(run, max_queue=3) as site:
        problem(site.predict(INPUT * 4), 429, "queue_full")


def test_a_deadline_is_answered_504(run, gate):
    with live(run, gate) as site, ThreadPoolExecutor() as pool:
        gate.shut(site, pool)
        assert "within 0.05 s" in problem(site.predict(INPUT, timeout=0.05), 504, "deadline")
        assert site.service.engine.waiting == 0
        gate.sign.set()


def test_a_server_has_a_deadline_of_its_own(run, gate):
    with live(run, gate, timeout=0.2) as site, ThreadPoolExecutor() as pool:
        first = gate.shut(site, pool)
        assert "within 0.2 s" in problem(site.predict(INPUT, timeout=100), 504, "deadline")
        problem(first.result(), 504, "deadline")
        gate.sign.set()


def test_only_the_caller_of_a_poisoned_input_gets_the_error(run, gate):
    def prepare(service):
        poison(service.engine.predictor, "poor")
        gate(service)

    with live(run, prepare) as site, ThreadPoolExecutor(20) as pool:
        gate.shut(site, pool)
        good = [(task, text) for task, text in mixed() if "poor" not in str(text)][:12]
        asked = [pool.submit(site.predict, [each]) for each in good]
        bad = pool.submit(site.predict, [("mood", "a poor secret")])
        until(lambda: site.service.engine.waiting == 13)
        gate.sign.set()
        assert problem(bad.result(), 500, "failed") == "the model failed on this input"
        assert [future.result().status_code for future in asked] == [200] * 12
        assert site.metric("unolora_failures_total") == 1
        (line,) = [line for line in site.lines if line["level"] == "error"]
        assert line["error"] == "RuntimeError"
        assert "secret" not in json.dumps(site.lines)


# --- slow and oversized --------------------------------------------------------------------------------------------


def test_a_head_that_does_not_come(run):
    """Slow-loris: connections that send nothing, or a byte now and then, are closed; others are served meanwhile."""
    with live(run, receive_timeout=0.4) as site:
        silent = [raw(site) for _ in range(20)]
        halves = [raw(site, b"POST /v1/predict HTTP/1.1\r\nhost: localhost\r\nx-a: ") for _ in range(20)]
        for _ in range(4):
            for connection in halves:
                connection.sendall(b"a")
            assert site.predict(INPUT).status_code == 200
        for connection in silent + halves:
            with closing(connection):
                assert everything(connection) == b""


def test_a_second_head_that_does_not_come(run):
    with live(run, receive_timeout=0.4) as site, closing(raw(site, request(BODY))) as connection:
        assert b"200 OK" in connection.recv(65536)
        connection.sendall(b"GET /healthz HTTP/1.1\r\nhost:")
        assert everything(connection) == b""


def test_a_body_that_does_not_come(run):
    with live(run, receive_timeout=0.3) as site, closing(raw(site, request(BODY[:20], len(BODY)))) as connection:
        found = everything(connection)
        assert found.startswith(b"HTTP/1.1 408 ")
        assert b'"code":"slow"' in found
        assert site.metric("unolora_refused_total", reason="slow") == 1


def test_an_answer_may_take_longer_than_a_request(run, gate):
    with live(run, gate, receive_timeout=0.2) as site, ThreadPoolExecutor() as pool:
        asked = gate.shut(site, pool)
        time.sleep(0.6)
        gate.sign.set()
        assert asked.result().status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_that_are_too_large(run, chunked):
    with live(run, max_body=1000) as site:
        body = json.dumps({"inputs": [{"task": "mood", "text": "a" * 2000}]}).encode()
        content = iter([body[:700], body[700:]]) if chunked else body
        answer = site.client.post("/v1/predict", content=content, headers={"content-type": "application/json"})
        assert "larger than 1000 bytes" in problem(answer, 413, "too_large")
        assert site.predict(INPUT).status_code == 200
        assert site.metric("unolora_refused_total", reason="size") == 1


def test_a_body_without_end_is_cut_off(run, monkeypatch):
    monkeypatch.setattr("unolora.serving.limits.LINGER", 0.2)
    with live(run, max_body=1000) as site:
        connection = raw(site, request(b"", 10**12))

        def pour():
            while True:
                connection.sendall(b"a" * 65536)

        with closing(connection):
            begin = time.monotonic()
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                pour()
            assert time.monotonic() - begin < 15
        assert site.predict(INPUT).status_code == 200


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"", "application/json", 422),
        (b"{", "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b'{"inputs": [{"task": "mood", "text": "\\ud800"}]}', "application/json", 422),
        (b'{"inputs": [{"task": "mood", "text": NaN}]}', "application/json", 422),
        (b'{"inputs": ' + b"9" * 10_000 + b"}", "application/json", 400),
        (b'{"inputs": [{"task": "mood", "columns": {"text": 1e999}}]}', "application/json", 422),
        (BODY, "text/plain", 422),
        (BODY, "application/x-www-form-urlencoded", 422),
    ],
)
def test_malformed_bodies(run, content, kind, status):
    with live(run) as site:
        answer = site.client.post("/v1/predict", content=content, headers={"content-type": kind})
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "data",
    [b"GARBAGE\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00", b"POST /v1/predict HTTP/1.1\r\n\r\n"],
)
def test_what_is_no_http(run, data):
    with live(run, receive_timeout=0.5) as site:
        with closing(raw(site, data)) as connection:
            assert everything(connection)[:12] in (b"", b"HTTP/1.1 400")
        assert site.predict(INPUT).status_code == 200


def test_heads_that_are_too_large(run):
    with live(run, receive_timeout=600) as site:  # so that it is the length that ends it
        with closing(raw(site, b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 200_000)) as connection:
            assert everything(connection)[:12] in (b"", b"HTTP/1.1 400")
        assert site.predict(INPUT).status_code == 200


# --- keys ----------------------------------------------------------------------------------------------------------


def test_a_thousand_wrong_keys(run, tmp_path):
    """They are refused, counted and slowed down; the right key is answered in their midst."""
    path = tmp_path / "keys"
    key = auth.new_key(path, "ann")
    with live(run, keys=str(path)) as site:
        statuses = []
        for number in range(1000):
            statuses.append(site.client.get("/v1/tasks", headers=bearer(f"{key[:-4]}{number:04}")).status_code)
            if number % 250 == 200:
                assert site.client.get("/v1/tasks", headers=bearer(key)).status_code == 200
        assert set(statuses) == {401, 429}
        assert statuses[:20] == [401] * 20
        assert statuses.count(429) > 900
        answer = site.client.get("/metrics", headers=bearer(key)).text
        assert 'unolora_refused_total{reason="key"} 1000.0' in answer


# --- reloading -----------------------------------------------------------------------------------------------------


@pytest.fixture
def reloadable(tmp_path):
    """A server of a copy of the run, its folder, and the header of its admin."""
    folder, path = tiny.copied(tiny.trained(), tmp_path), tmp_path / "keys"
    key = auth.new_key(path, "root", admin=True)
    with live(runs.load_run(folder), keys=str(path)) as site:
        site.client.headers.update(bearer(key))
        yield site, folder


def scaled(folder, factor):
    """Another adapter, as a training would leave it."""
    path = folder / "adapter" / "heads.safetensors"
    save_file({name: value * factor for name, value in load_file(path).items()}, path)


def test_reloading_drops_nothing(reloadable):
    site, folder = reloadable
    inputs = mixed()[:6]
    old = site.predict(inputs, scores=True).json()
    scaled(folder, -1.0)
    new = runs.load_run(folder)
    found, stop = [], threading.Event()

    def ask():
        with httpx.Client(base_url=site.url, timeout=30, trust_env=False, headers=site.client.headers) as client:
            while not stop.is_set():
                found.append(site.predict(inputs, client, scores=True))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    until(lambda: len(found) > 6)
    assert site.client.post("/v1/reload").json() == {"version": 1, "tasks": ["mood", "topic", "heat"]}
    count = len(found)
    until(lambda: len(found) > count + 12)
    stop.set()
    for thread in threads:
        thread.join()
    assert {answer.status_code for answer in found} == {200}
    seen = [[round(each.get("probability", each.get("value")), 3) for each in a.json()["answers"]] for a in found]
    before = [round(each.get("probability", each.get("value")), 3) for each in old["answers"]]
    assert before in seen
    assert seen[-1] != before
    assert len({str(each) for each in seen}) == 2, "an answer mixed two adapters"
    assert site.client.get("/v1/tasks").json()["version"] == 1
    assert new.tasks


def cut(folder):
    path = folder / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def gone(folder):
    shutil.rmtree(folder / "adapter")


def not_finite(folder):
    scaled(folder, torch.nan)


def no_json(folder):
    (folder / "adapter" / "tasks.json").write_text("{")


def no_settings(folder):
    (folder / "config.yaml").write_text("backbone: /nowhere\n")


@pytest.mark.parametrize("spoil", [cut, gone, not_finite, no_json, no_settings])
def test_a_broken_adapter_does_not_take_over(reloadable, spoil):
    site, folder = reloadable
    old = site.predict(mixed()[:9], scores=True).json()
    spoil(folder)
    message = problem(site.client.post("/v1/reload"), 409, "reload")
    assert message.startswith("the old adapter stays: ")
    assert site.predict(mixed()[:9], scores=True).json() == old
    assert site.client.get("/v1/tasks").json()["version"] == 0
    assert site.metric("unolora_reloads_total", result="failed") == 1
    assert site.client.get("/readyz").status_code == 200


def test_a_replaced_adapter_goes_though_the_collector_is_kept_away(reloadable):
    """What `settle` hides from the garbage collector is freed once nothing refers to it."""
    site, _ = reloadable
    assert site.client.post("/v1/reload").status_code == 200  # the first one is held by this test
    settle()
    try:
        assert gc.get_freeze_count() > 100_000
        replaced = weakref.ref(site.service.engine.predictor.run.model)
        assert site.client.post("/v1/reload").status_code == 200
        assert site.predict(INPUT).status_code == 200  # the engine lets go of its last batch
        assert replaced() is None
    finally:
        gc.unfreeze()


def test_keys_are_read_again(reloadable, tmp_path):
    site, _ = reloadable
    key = auth.new_key(tmp_path / "keys", "new")
    assert site.client.get("/v1/tasks", headers=bearer(key)).status_code == 401
    assert site.client.post("/v1/reload").status_code == 200
    assert site.client.get("/v1/tasks", headers=bearer(key)).status_code == 200


def test_one_reload_at_a_time(reloadable, monkeypatch):
    site, _ = reloadable
    sign, begun = threading.Event(), threading.Event()
    original = site.service.engine.reload

    def slow():
        begun.set()
        assert sign.wait(20)
        original()

    monkeypatch.setattr(site.service.engine, "reload", slow)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(site.client.post, "/v1/reload")
        assert begun.wait(20)
        problem(site.client.post("/v1/reload"), 409, "reloading")
        assert site.predict(INPUT).status_code == 200
        sign.set()
        assert first.result().status_code == 200


# --- stopping ------------------------------------------------------------------------------------------------------


class Process:
    """`unolora serve` as a process of its own."""

    def __init__(self, run, *arguments) -> None:
        command = [sys.executable, "-m", "unolora", "serve", str(run), "--port", "0", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        assert " on http://127.0.0.1:" in line, self.process.stderr.read()
        self.url = line.split(" on ")[1].split()[0]
        self.log: list[str] = []
        self._reader = threading.Thread(target=lambda: self.log.extend(self.process.stderr))
        self._reader.start()

    def ready(self):
        with httpx.Client(base_url=self.url, trust_env=False) as client:
            end = time.monotonic() + 120
            while True:
                try:
                    return client.get("/readyz").raise_for_status()
                except httpx.TransportError:
                    assert time.monotonic() < end
                    time.sleep(0.05)

    def lines(self):
        return [json.loads(line) for line in self.log if line.startswith("{")]

    def wait(self):
        code = self.process.wait(60)
        self._reader.join()
        self.process.stdout.close()
        self.process.stderr.close()
        return code


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_told_to_stop_under_load(workers):
    """What a server has read it answers, whole, before it goes; what it has not, it has not begun."""
    server = Process(tiny.trained(), "--workers", str(workers))
    server.ready()
    stop, answered, refused = threading.Event(), [], []

    def ask(number):
        with httpx.Client(base_url=server.url, timeout=30, trust_env=False) as client:
            while not stop.is_set():
                name = f"{number}-{len(answered)}-{time.monotonic_ns()}"
                body = {"inputs": [{"task": task, "text": text} for task, text in mixed(seed=number)[:4]]}
                try:
                    answer = client.post("/v1/predict", json=body, headers={"x-request-id": name})
                except httpx.TransportError as error:
                    refused.append(error)
                    return
                answered.append((answer.headers["x-request-id"], answer.status_code, len(answer.json()["answers"])))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    until(lambda: len(answered) > 60)
    server.process.send_signal(signal.SIGTERM)
    code = server.wait()
    stop.set()
    for thread in threads:
        thread.join()
    assert code == 0
    assert {(status, count) for _, status, count in answered} == {(200, 4)}
    lines = server.lines()
    done = {line["id"] for line in lines if line["event"] == "request" and line["route"] == "/v1/predict"}
    assert done == {name for name, _, _ in answered}
    assert [line["all_answered"] for line in lines if line["event"] == "stopped"] == [True] * workers
    assert len(refused) <= 12


def probability(answer):
    return answer.json()["answers"][0]["probability"]


@pytest.mark.slow
def test_workers_count_together_and_follow_a_reload(tmp_path):
    run, keys = tiny.copied(tiny.trained(), tmp_path), tmp_path / "keys"
    key = auth.new_key(keys, "root", admin=True)
    server = Process(run, "--workers", "2", "--keys", str(keys))
    server.ready()

    def ask(path, **more):  # on a connection of its own, so that either worker may take it
        with httpx.Client(base_url=server.url, timeout=30, trust_env=False, headers=bearer(key)) as client:
            return client.post(path, **more) if more else client.get(path)

    body = {"inputs": [{"task": "mood", "text": "a good day"}]}
    try:
        until(lambda: ask("/v1/predict", json=body).status_code == 200)
        old = [probability(ask("/v1/predict", json=body)) for _ in range(20)]
        assert len(set(old)) == 1
        page = ask("/metrics").text
        total = sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith("unolora_answers_total"))
        assert total >= 21
        scaled(run, 0.5)
        assert ask("/v1/reload", json={}).json()["version"] == 1
        until(
            lambda: old[0] not in [ask("/v1/predict", json=body).json()["answers"][0]["probability"] for _ in range(9)]
        )
    finally:
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0


# --- requests made from the OpenAPI document -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def writing():
    long = {"steps": 20, "learning_rate": 0.02, "evaluate_every": 20, "checkpoint_every": 20}
    return runs.load_run(training.train(tiny_text.settings(tiny.folder() / "run", "t5", training=long)))


@pytest.fixture(scope="module")
def described(writing, tmp_path_factory):
    """The document of a server of a language model, with an admin's key, so that every route does something."""
    path = tmp_path_factory.mktemp("keys") / "keys"
    key = auth.new_key(path, "root", admin=True)
    with live(writing, keys=str(path), max_tokens=8) as site:
        schema = schemathesis.openapi.from_url(f"{site.url}/openapi.json")
        schema.described_by = site, key
        yield schema


# Made, not found, by the example: what a route says of itself must hold for requests that fit it and for others.
ROUTES = [
    ("POST", "/v1/predict"), ("POST", "/v1/scales"), ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"),
    ("POST", "/v1/reload"), ("GET", "/v1/tasks"), ("GET", "/v1/models"), ("GET", "/healthz"), ("GET", "/readyz"),
    ("GET", "/metrics"),
]  # fmt: skip


# The first asks again without a key, but with our header; the second does not know which tasks there are.
BESIDE_THE_POINT = [ignored_auth, positive_data_acceptance]
REPEATABLE = {"deadline": None, "derandomize": True, "database": None}


def test_every_route_is_tried(described):
    found = {(each.ok().method.upper(), each.ok().path) for each in described.get_all_operations()}
    assert found == set(ROUTES)


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_no_request_brings_the_server_down(described, method, path):
    """By schemathesis: no 5xx, and only the statuses, types and bodies that the OpenAPI document names."""
    site, key = described.described_by
    sense = st.sampled_from([None, *tiny.NAMES])  # a task that is there, in place of what is made up

    @settings(suppress_health_check=list(HealthCheck), max_examples=4 if path == "/v1/reload" else 60, **REPEATABLE)
    @given(case=described[path][method].as_strategy(), task=sense)
    def ask(case, task):
        body = case.body if isinstance(case.body, dict) else {}
        for each in [body, *(body["inputs"] if isinstance(body.get("inputs"), list) else [])]:
            for name in {"task", "model"} & set(each if isinstance(each, dict) else ()):
                each[name] = task or each[name]
                if task and name == "task" and not each.get("columns"):
                    each["text"] = each.get("text") or "a"
        response = case.call(headers=bearer(key))
        case.validate_response(response, excluded_checks=BESIDE_THE_POINT)
        statuses.add(response.status_code)

    statuses = set()
    ask()
    assert 200 in statuses
    assert site.service.engine.alive
