"""The measurement of serving, on a tiny run: what it returns, and that its load is a load."""

import asyncio
import json

import pytest

import tiny
from live import live
from test_engine import mixed
from unolora.bench import load, serve
from unolora.serving import Engine
from unolora_cli import main


def test_the_load_asks_all_and_keeps_its_clients_apart(run):
    bodies = [json.dumps({"inputs": [{"task": task, "text": text}]}).encode() for task, text in mixed()]
    with live(run) as site:
        found = asyncio.run(load.load(site.port, bodies, clients=7, requests=100))
        assert found["statuses"] == {"200": 100}
        assert len(found["latencies"]) == 100
        assert 0 < sum(found["latencies"]) <= 7 * found["seconds"]
        assert site.metric("unolora_answers_total") == 100
        bad = asyncio.run(load.load(site.port, [b"{", bodies[0]], clients=2, requests=10))
        assert bad["statuses"] == {"400": 5, "200": 5}


def test_the_rivals_answer_the_same_rows(run):
    """PEFT's ways give each row the same, whether alone or in a mixed batch; the batches are those of the engine."""
    with Engine(run) as engine:
        rows = engine.predictor.rows(mixed()[:40])
        batches = list(serve._batches(engine.predictor, rows, engine))
    assert sorted(id(row) for batch in batches for row in batch) == sorted(map(id, rows))
    assert max(map(len, batches)) > 4
    peft = serve._PeftLoras(run)
    for name in peft.names:  # so that the adapters differ
        for key, value in peft.model.named_parameters():
            if f"lora_B.{name}." in key:
                value.data.normal_(std=0.5)
    batch = next(batch for batch in batches if len({row[0] for row in batch}) == 3)
    mixed_answers = peft.mixed(batch)
    for row, answer in zip(batch, mixed_answers, strict=True):
        assert peft.one(row) == pytest.approx(answer, abs=1e-4)
    other = [((row[0] + 1) % 3, *row[1:]) for row in batch]
    assert peft.mixed(other)[0] != pytest.approx(mixed_answers[0], abs=1e-4)


@pytest.mark.slow
def test_a_measurement(capsys):
    command = ["bench", "serve", str(tiny.trained()), "--rows", "40", "--requests", "300", "--clients", "5"]
    assert main([*command, "--rounds", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tasks"] == 3
    assert found["rows_per_second"].keys() == {"engine", "http", "peft_set_adapter", "peft_adapter_names"}
    assert all(len(rates) == 2 and min(rates) > 0 for rates in found["rows_per_second"].values())
    assert found["cpu_ms_per_row"].keys() == found["rows_per_second"].keys()
    assert min(found["cpu_ms_per_row"].values()) > 0
    assert found["to_engine"].keys() == {"http", "peft_set_adapter", "peft_adapter_names"}
    assert 0 < found["latency"]["p50"] <= found["latency"]["p99"] <= found["latency"]["most"]
    assert found["memory"]["requests"] == 300
    assert found["memory"]["at_the_end"] > 10**8


def test_names_of_measurements(capsys):
    assert main(["bench", "nothing"]) == 2
    assert "serve" in capsys.readouterr().err
