"""The HTTP server: its routes, who may ask and how much, and what it tells of itself."""

import argparse
import json
import os
import re
import shutil
import ssl
import subprocess

import httpx
import numpy as np
import openai
import pytest

import tiny
import tiny_text
from live import live
from test_engine import TEXTS, alone, mixed
from unolora import runs, training
from unolora.errors import InputError
from unolora.serving import auth, limits, server
from unolora.serving.settings import ServeSettings
from unolora_cli import COMMANDS, main

SPOKEN = {"mood": "we saw a good day", "topic": "then a cat", "heat": ["the hot fire", "it was ice"]}


@pytest.fixture(scope="module", params=tiny_text.FAMILIES)
def written(request):
    long = {"steps": 20, "learning_rate": 0.02, "evaluate_every": 20, "checkpoint_every": 20}
    run = runs.load_run(training.train(tiny_text.settings(tiny.folder() / "run", request.param, training=long)))
    with live(run) as found:
        yield found


def problem(answer, status, code):
    """Check that an answer is a problem, and return its message."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "code", "param"}
    assert error["code"] == code
    assert "\n" not in error["message"]
    return error["message"]


# --- predictions ---------------------------------------------------------------------------------------------------


def test_answers_are_those_of_predict_texts(run, site):
    inputs = mixed()
    answer = site.predict(inputs, scores=True)
    assert answer.status_code == 200
    found = answer.json()["answers"]
    for one, other in zip(found, alone(run, inputs), strict=True):
        assert one["task"] == other["task"]
        assert one.get("label") == other.get("label")
        assert one.get("value") == pytest.approx(other.get("value"), abs=1e-3)
        assert one.get("probabilities") == pytest.approx(other.get("probabilities"), abs=1e-5)
    assert {each["task"] for each in found} == {"mood", "topic", "heat"}


def test_without_scores_only_the_label_and_its_probability(site):
    (answer,) = site.predict([("mood", SPOKEN["mood"])]).json()["answers"]
    assert answer.keys() == {"task", "label", "probability"}
    (full,) = site.predict([("mood", SPOKEN["mood"])], scores=True).json()["answers"]
    assert answer["probability"] == full["probabilities"][answer["label"]] == max(full["probabilities"].values())
    (number,) = site.predict([("heat", SPOKEN["heat"])], scores=True).json()["answers"]
    assert number.keys() == {"task", "value"}


def test_columns_fill_the_template(site):
    texts = site.predict([("heat", SPOKEN["heat"]), ("mood", SPOKEN["mood"])]).json()
    first, second = SPOKEN["heat"]
    inputs = [
        {"task": "heat", "columns": {"second": second, "first": first}},
        {"task": "mood", "columns": {"text": SPOKEN["mood"]}},
    ]
    assert site.client.post("/v1/predict", json={"inputs": inputs}).json() == texts


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([{"task": "moods", "text": "a"}], "input 1: unknown task 'moods'; did you mean 'mood'?"),
        ([{"task": "mood", "text": "a"}, {"task": "heat", "text": "a"}], "input 2: task 'heat' takes two texts, got 1"),
        ([{"task": "mood"}], "input 1: give either `text` or `columns`"),
        ([{"task": "mood", "text": "a", "columns": {"text": "a"}}], "input 1: give either `text` or `columns`"),
        ([{"task": "mood", "columns": {"tex": "a"}}], "input 1: unknown column 'tex'; did you mean 'text'?"),
        ([{"task": "heat", "columns": {"first": "a"}}], "column 'second'"),
        ([{"task": "mood", "text": "a"}] * 300, "at most 256 inputs in a request, got 300"),
        ([{"task": "mood", "text": "a" * 20_001}], "input 1: at most 20000 characters in a text, got 20001"),
    ],
)
def test_inputs_that_cannot_be_used(site, inputs, message):
    assert message in problem(site.client.post("/v1/predict", json={"inputs": inputs}), 422, "invalid_input")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"inputs": []}, "inputs: List should have at least 1 item"),
        ({"inputs": [{"task": "mood", "text": "a"}], "score": True}, "score: Extra inputs are not permitted"),
        ({"inputs": [{"task": 1, "text": "a"}]}, "inputs.0.task: Input should be a valid string"),
        ({"inputs": [{"task": "mood", "text": "a"}], "timeout": 0}, "timeout: Input should be greater than 0"),
        ([], "Input should be a valid dictionary"),
        (None, "Field required"),
    ],
)
def test_bodies_that_are_no_request(site, body, message):
    assert message in problem(site.client.post("/v1/predict", json=body), 422, "invalid_request")


def test_nothing_of_a_bad_text_comes_back(site):
    body = b'{"inputs": [{"task": "mood", "text": "secret \\ud800"}]}'
    answer = site.client.post("/v1/predict", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert "secret" not in json.dumps(site.lines)


# --- tasks, scales, health -----------------------------------------------------------------------------------------


def test_the_tasks(run, site):
    found = site.client.get("/v1/tasks").json()
    assert found["method"] == "UnoLoRA* (task+sample)"
    assert found["scales"]
    assert not found["generates"]
    assert [task["name"] for task in found["tasks"]] == ["mood", "topic", "heat"]
    assert found["tasks"][1]["labels"] == ["plant", "animal", "tool"]
    assert found["tasks"][2]["columns"] == ["first", "second"]


def test_the_scales(run, site):
    inputs = [{"task": task, "text": text} for task, text in SPOKEN.items()]
    found = site.client.post("/v1/scales", json={"inputs": inputs}).json()
    wanted = site.service.engine.scales(list(SPOKEN.items()))
    assert found["positions"] == [f"encoder.layer.{block}.output.dense" for block in (0, 1)]
    for one, other in zip(found["answers"], wanted, strict=True):
        assert [len(one["scales"]), len(one["scales"][0])] == [2, 4]
        np.testing.assert_allclose(one["scales"], other.numpy(), atol=1e-6)
    assert found["answers"][0]["scales"] != found["answers"][1]["scales"]


def test_no_scales_where_the_method_has_none():
    with live(runs.load_run(tiny.trained("heads-only"))) as site:
        answer = site.client.post("/v1/scales", json={"inputs": [{"task": "mood", "text": "a"}]})
        assert "scales no ranks" in problem(answer, 422, "invalid_input")
        assert not site.client.get("/v1/tasks").json()["scales"]


def test_health(site):
    assert site.client.get("/healthz").json() == site.client.get("/readyz").json() == {"ok": True}


def test_a_dead_engine_is_neither_healthy_nor_ready(run):
    with live(run) as site:
        site.service.engine.close()
        assert site.client.get("/healthz").status_code == site.client.get("/readyz").status_code == 503
        problem(site.predict([("mood", "a")]), 503, "stopping")


def test_metrics(run):
    with live(run) as site:
        site.predict([("mood", "a"), ("mood", "b"), ("topic", "a")])
        site.predict([("moods", "a")])
        site.client.get("/made/up")
        assert site.metric("unolora_answers_total", task="mood") == 2
        assert site.metric("unolora_answers_total", task="topic", kind="predict") == 1
        assert site.metric("unolora_task_seconds_count", task="mood") == 2
        assert site.metric("unolora_batch_rows_sum") == 3
        assert site.metric("unolora_batch_rows_count") == site.metric("unolora_batch_seconds_count") >= 1
        assert site.metric("unolora_requests_total", route="/v1/predict", status="200") == 1
        assert site.metric("unolora_requests_total", route="/v1/predict", status="422") == 1
        assert site.metric("unolora_requests_total", route="other", status="404") == 1
        assert site.metric("unolora_queue_rows") == 0
        assert "made" not in site.client.get("/metrics").text


def test_the_page_and_the_openapi_page_ask_nobody_else(site):
    for path in ("/", "/docs"):
        answer = site.client.get(path)
        assert answer.status_code == 200
        assert not re.search(r"""(?:src|href|url)\s*[=(:]\s*["']?(?:https?:)?//""", answer.text)
        assert answer.headers["content-security-policy"].startswith("default-src 'self'")
    assert site.client.get("/openapi.json").json()["paths"].keys() >= {"/v1/predict", "/v1/chat/completions"}


# --- request ids and logs ------------------------------------------------------------------------------------------


def test_request_ids(site):
    assert site.client.get("/healthz", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    for wrong in ("with space", "a" * 65, '"quoted"'):
        found = site.client.get("/healthz", headers={"x-request-id": wrong}).headers["x-request-id"]
        assert re.fullmatch(r"[0-9a-f]{32}", found)


def test_logs_are_lines_of_json_without_texts(run):
    with live(run) as site:
        site.client.post(
            "/v1/predict",
            json={"inputs": [{"task": "mood", "text": "a secret sentence"}]},
            headers={"x-request-id": "one"},
        )
        site.client.post("/v1/predict", json={"inputs": [{"task": "secret", "text": "a secret sentence"}]})
        site.client.get("/secret?secret=secret")
        site.client.get("/healthz")
        lines = list(site.lines)
    assert "secret" not in json.dumps(lines)
    first = lines[0]
    assert first | {"time": 0, "ms": 0} == {
        "time": 0, "ms": 0, "level": "info", "event": "request", "id": "one", "method": "POST", "route": "/v1/predict",
        "status": 200, "inputs": 1,
    }  # fmt: skip
    assert [line.get("status") for line in lines] == [200, 422, 404]
    assert "/healthz" not in json.dumps(lines)


def test_an_error_of_ours_is_logged_by_its_place_only(run, monkeypatch):
    with live(run) as site:
        monkeypatch.setattr(site.service, "check", lambda _: (_ for _ in ()).throw(RuntimeError("secret")))
        message = problem(site.predict([("mood", "a")]), 500, "internal")
        assert "its log knows more" in message
        (line,) = [line for line in site.lines if line["level"] == "error"]
        assert line["error"] == "RuntimeError"
        assert any("app.py" in place for place in line["at"])
        assert "secret" not in json.dumps(site.lines)


# --- keys ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def keys(tmp_path):
    path = tmp_path / "keys"
    return path, auth.new_key(path, "ann"), auth.new_key(path, "root", admin=True)


def bearer(key):
    return {"authorization": f"Bearer {key}".strip()}


def test_keys(run, keys):
    path, user, admin = keys
    assert user not in path.read_text()
    assert re.fullmatch(r"ann user [0-9a-f]{64}\nroot admin [0-9a-f]{64}\n", path.read_text())
    with live(run, keys=str(path)) as site:
        for route in ("/v1/tasks", "/metrics", "/v1/models"):
            assert problem(site.client.get(route), 401, "key").startswith("a valid key is needed")
            for wrong in ("", user[:-1], user + "x", user.upper(), "ann"):
                assert site.client.get(route, headers=bearer(wrong)).status_code == 401
            assert site.client.get(route, headers={"authorization": user}).status_code == 401
            for key in (user, admin):
                assert site.client.get(route, headers=bearer(key)).status_code == 200
        for public in ("/", "/healthz", "/readyz", "/docs", "/openapi.json"):
            assert site.client.get(public).status_code == 200
        assert site.client.get("/v1/tasks").headers["www-authenticate"] == "Bearer"
        assert {line.get("caller") for line in site.lines if line.get("status") == 200} >= {"ann", "root"}
        assert user not in json.dumps(site.lines)
        assert problem(site.client.post("/v1/reload", headers=bearer(user)), 403, "admin")
        assert site.client.post("/v1/reload", headers=bearer(admin)).json()["version"] == 1


def test_reload_needs_an_admin_even_where_anybody_may_ask(site):
    problem(site.client.post("/v1/reload"), 403, "admin")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no key in it"),
        ("ann user\n", "line 1: expected `NAME user|admin SHA256`"),
        (f"a boss {'0' * 64}", "line 1"),
    ],
)
def test_files_that_hold_no_keys(tmp_path, text, message):
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(InputError, match=re.escape(message)):
        auth.Keys.read(path)
    with pytest.raises(InputError, match="can't be read"):
        auth.Keys.read(tmp_path / "absent")


def test_every_key_is_compared(keys, monkeypatch):
    """Whether an earlier one was right or not: the time says nothing of where a match is."""
    path, user, _ = keys
    found, compared = auth.Keys.read(path), []
    original = auth.hmac.compare_digest
    monkeypatch.setattr(auth.hmac, "compare_digest", lambda a, b: compared.append(1) or original(a, b))
    assert found.find(user) == auth.Caller("ann", admin=False)
    assert found.find("wrong") is None
    assert found.find("\udcff") is None
    assert len(compared) == 6


def test_new_keys(tmp_path, capsys):
    path = tmp_path / "keys"
    assert main(["serve", "--keys", str(path), "--new-key", "ann", "--admin"]) == 0
    key = capsys.readouterr().out.strip()
    assert auth.Keys.read(path).find(key) == auth.Caller("ann", admin=True)
    assert main(["serve", "--keys", str(path), "--new-key", "ann"]) == 2
    assert "a key called 'ann' is there" in capsys.readouterr().err
    assert main(["serve", "--keys", str(path), "--new-key", "two words"]) == 2
    assert main(["serve", "--new-key", "ben"]) == 2
    assert main(["serve", "--admin", "run"]) == 2


# --- limits --------------------------------------------------------------------------------------------------------


def test_rates():
    buckets = limits.Buckets(rate=2, burst=3, size=2)
    assert [buckets.take("a", now=0) for _ in range(3)] == [0, 0, 0]
    assert buckets.take("a", now=0) == pytest.approx(0.5)
    assert buckets.take("b", now=0) == 0
    assert buckets.take("a", now=0.5) == 0
    assert buckets.take("a", now=0.5) > 0
    for name in "cdefg":
        buckets.take(name, now=1)
    assert len(buckets) == 2


def test_a_rate_holds_for_each_key(run, keys):
    path, user, admin = keys
    with live(run, keys=str(path), rate=0.01) as site:
        assert site.client.get("/v1/tasks", headers=bearer(user)).status_code == 200
        answer = site.client.get("/v1/tasks", headers=bearer(user))
        problem(answer, 429, "rate")
        assert 1 <= int(answer.headers["retry-after"]) <= 100
        assert site.client.get("/v1/tasks", headers=bearer(admin)).status_code == 200
        assert site.client.get("/healthz").status_code == 200


def test_hosts(site, run):
    """A page elsewhere may point its own name at this machine."""
    for host in ("localhost", "127.0.0.1:1", "[::1]:8000"):
        assert site.client.get("/v1/tasks", headers={"host": host}).status_code == 200
    for host in ("evil.example", "localhost.evil.example", "[::1]evil", ""):
        problem(site.client.get("/v1/tasks", headers={"host": host}), 400, "host")
    with live(run, host="0.0.0.0", insecure=True) as other:
        assert other.client.get("/v1/tasks", headers={"host": "a.name.of.it"}).status_code == 200


def test_cors(run, site):
    asked = {"origin": "https://a.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in site.client.options("/v1/predict", headers=asked).headers
    with live(run, cors=("https://a.example",)) as open_:
        answer = open_.client.options("/v1/predict", headers=asked)
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        other = open_.client.options("/v1/predict", headers={**asked, "origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_tls(run, tmp_path):
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-keyout",
            key,
            "-out",
            cert,
            "-days",
            "2",
            *names,
        ],
        check=True,
        capture_output=True,
    )
    with live(run, tls_cert=str(cert), tls_key=str(key)) as site:
        trusting = httpx.Client(base_url=site.url, verify=ssl.create_default_context(cafile=cert), trust_env=False)
        with trusting:
            assert site.predict([("mood", "a")], trusting).status_code == 200
        with pytest.raises(httpx.ConnectError):
            site.client.get("/healthz")
    with pytest.raises(InputError, match="no certificate that goes with its key"):
        server._config(None, ServeSettings(tls_cert=str(key), tls_key=str(key)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"host": "0.0.0.0"}, r"0\.0\.0\.0 can be reached from other machines.*--keys FILE.*--insecure"),
        ({"host": "::"}, "can be reached from other machines"),
        ({"host": "example.org"}, "can be reached from other machines"),
        ({"tls_cert": "a"}, "belong together"),
        ({"keys": "absent"}, "absent: no such file"),
        ({"port": 70000}, "between 0 and 65535"),
        ({"workers": 0}, "`workers` must be at least 1"),
        ({"rate": 0.0}, "`rate` must be a number above 0"),
        ({"timeout": float("inf")}, "`timeout` must be a number above 0"),
        ({"max_wait_ms": -1.0}, "`max_wait_ms` must be at least 0"),
        ({"max_queue": 0}, "`max_queue` must be at least 1"),
    ],
)
def test_settings_that_make_no_sense(wrong, message):
    with pytest.raises(InputError, match=message):
        ServeSettings(**wrong)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback(host):
    assert ServeSettings(host=host).loopback


def test_flags():
    parser = argparse.ArgumentParser()
    ServeSettings.add_flags(parser)
    assert ServeSettings.from_flags(parser.parse_args([])) == ServeSettings()
    given = ["--port", "9", "--rate", "2.5", "--cors", "a", "--cors", "b", "--insecure", "--max-wait-ms", "3"]
    found = ServeSettings.from_flags(parser.parse_args(given))
    assert found == ServeSettings(port=9, rate=2.5, cors=("a", "b"), insecure=True, max_wait_ms=3.0)


def test_the_command_says_what_is_wrong(capsys, tmp_path):
    assert "serve" in COMMANDS
    assert main(["serve", str(tmp_path)]) == 2
    assert "config.yaml" in capsys.readouterr().err
    assert main(["serve", "run", "--host", "0.0.0.0"]) == 2
    assert "--insecure" in capsys.readouterr().err
    assert main(["serve"]) == 2
    assert main(["serve", "run", "--prot", "1"]) == 2
    assert "did you mean 'port'" in capsys.readouterr().err


@pytest.mark.parametrize(("before", "after"), [(None, "64"), ("7", "7")])
def test_few_shapes_are_kept_unless_the_environment_says_otherwise(before, after, monkeypatch, tmp_path):
    monkeypatch.setenv(server.SHAPES_KEPT, before or "gone")
    if before is None:
        monkeypatch.delenv(server.SHAPES_KEPT)
    found = []
    monkeypatch.setattr(server.signal, "signal", lambda *_: None)
    monkeypatch.setattr(server, "_serve_apart", lambda *_: found.append(os.environ[server.SHAPES_KEPT]))
    server.serve(tmp_path, ServeSettings(port=0), lambda url: None)
    assert found == [after]


def test_a_port_that_is_taken(site):
    with pytest.raises(InputError, match=r"can't listen on 127\.0\.0\.1:\d+ \(.*\); choose another --port"):
        server._bind(ServeSettings(port=site.port))


def test_serving_without_its_packages(monkeypatch, capsys):
    import builtins
    import sys

    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "unolora.serving.server":
            raise ModuleNotFoundError("No module named 'fastapi'", name="fastapi")
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "unolora.serving.server")
    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["serve", "run"]) == 2
    assert "serving needs fastapi, which is not installed: pip install 'unolora[serve]'" in capsys.readouterr().err


# --- OpenAI's routes -----------------------------------------------------------------------------------------------


@pytest.fixture
def official(written):
    with openai.OpenAI(base_url=f"{written.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_official_client_chats(written, official):
    text = SPOKEN["mood"]
    answer = official.chat.completions.create(model="mood", messages=[{"role": "user", "content": text}], max_tokens=5)
    template = written.service.task("mood").template[0]
    (wanted,) = written.service.engine.generate([("mood", template.format(text=text))], max_tokens=5)
    assert answer.choices[0].message.content == wanted.text
    assert answer.choices[0].finish_reason == ("stop" if wanted.ended else "length")
    assert (answer.model, answer.object) == ("mood", "chat.completion")
    assert answer.usage.prompt_tokens == wanted.prompt_tokens > 5
    assert answer.usage.completion_tokens == wanted.tokens
    pieces = official.chat.completions.create(
        model="mood", messages=[{"role": "user", "content": text}], max_completion_tokens=5, stream=True, temperature=0
    )
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == wanted.text


def test_a_part_for_each_column(written, official):
    first, second = SPOKEN["heat"]
    parts = [{"type": "text", "text": first}, {"type": "text", "text": second}]
    answer = official.chat.completions.create(model="heat", messages=[{"role": "user", "content": parts}], max_tokens=4)
    template = written.service.task("heat").template[0]
    (wanted,) = written.service.engine.generate([("heat", template.format(first=first, second=second))], max_tokens=4)
    assert answer.choices[0].message.content == wanted.text
    with pytest.raises(openai.UnprocessableEntityError, match=r"reads 2 columns \(first, second\)"):
        official.chat.completions.create(model="heat", messages=[{"role": "user", "content": first}])


def test_the_official_client_completes(written, official):
    prompts = ["mood text: we saw a good day", "then"]
    answer = official.completions.create(model="mood", prompt=prompts, max_tokens=3)
    wanted = written.service.engine.generate([("mood", prompt) for prompt in prompts], max_tokens=3)
    assert [choice.text for choice in answer.choices] == [each.text for each in wanted]
    assert answer.usage.completion_tokens == sum(each.tokens for each in wanted)
    pieces = official.completions.create(model="mood", prompt="then", max_tokens=3, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == wanted[1].text


def test_models_are_tasks(official):
    assert [model.id for model in official.models.list()] == ["mood", "topic", "heat"]


def test_what_greedy_decoding_cannot_do_is_refused(official):
    said = {"messages": [{"role": "user", "content": "a"}]}
    with pytest.raises(openai.NotFoundError, match="unknown task 'moods'; did you mean 'mood'"):
        official.chat.completions.create(model="moods", **said)
    for wrong in ({"temperature": 0.7}, {"n": 2}, {"top_p": 0.5}, {"max_tokens": 10_000}, {"max_tokens": 0}):
        with pytest.raises(openai.UnprocessableEntityError):
            official.chat.completions.create(model="mood", **said, **wrong)
    with pytest.raises(openai.UnprocessableEntityError, match="messages"):
        official.chat.completions.create(model="mood", messages=[{"role": "system", "content": "a"}, *said["messages"]])


def test_language_models_predict_as_well(written):
    run = written.service.engine.predictor.run
    inputs = [("mood", run.tasks[0].template[0].format(text=text)) for text in TEXTS["mood"][:6]]
    found = written.predict(inputs, scores=True).json()["answers"]
    assert [each["label"] for each in found] == [each["label"] for each in alone(run, inputs)]
    columns = [{"task": "mood", "columns": {"text": text}} for text in TEXTS["mood"][:6]]
    assert written.client.post("/v1/predict", json={"inputs": columns, "scores": True}).json()["answers"] == found


def test_heads_write_nothing(site):
    body = {"model": "mood", "messages": [{"role": "user", "content": "a"}]}
    problem(site.client.post("/v1/chat/completions", json=body), 404, "no_generation")
