"""The examples that are scripts."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

import tiny
from test_engine import alone, mixed
from unolora import InputError

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_image_tasks_on_a_vit(tmp_path):
    images = example("images")
    train, test = images.rows()
    seen = {row["pixel_values"].numpy().tobytes() for row in train}
    assert len(train) + len(test) == 2 * 1797
    assert sum(row["pixel_values"].numpy().tobytes() in seen for row in test) < 10, "the data repeats a few itself"
    accuracies = images.main(steps=60, output=str(tmp_path))
    assert set(accuracies) == {"upright", "turned"}
    assert min(accuracies.values()) > 0.6, accuracies
    model = images.adapted()
    with pytest.raises(InputError, match="unknown task 'turn'; did you mean 'turned'"):
        model(pixel_values=test[0]["pixel_values"].unsqueeze(0), tasks="turn")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (pip install 'ray[serve]')")
def test_ray_serve_answers_as_the_engine(run, tmp_path):
    """Two replicas of a local Ray share the requests; mixed batches are answered as without it, and Ctrl-C stops it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, EXAMPLES / "ray_serve.py", tiny.trained(), "--replicas", "2", "--cpus", "0.5"]
    # A busy machine takes longer to start Ray's proxy than the 5 s that Ray waits for it.
    patient = {f"RAY_SERVE_PROXY_{check}_CHECK_TIMEOUT_S": "60" for check in ("READY", "HEALTH")}
    environment = {**os.environ, **patient, "RAY_USAGE_STATS_ENABLED": "0"}
    log = tmp_path / "log"
    with log.open("w") as out:
        ray = subprocess.Popen([*command, "--port", str(port)], stdout=out, stderr=out, env=environment)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            until_ready(client, ray, log)
            inputs = mixed()[:30]
            wanted = alone(run, inputs)
            for size in (1, 5):
                for start in range(0, 30, size):
                    part = [{"task": task, "text": text} for task, text in inputs[start : start + size]]
                    answers = client.post("/v1/predict", json={"inputs": part, "scores": True}).json()["answers"]
                    for found, other in zip(answers, wanted[start : start + size], strict=True):
                        assert found["task"] == other["task"]
                        assert found.get("value") == pytest.approx(other.get("value"), abs=1e-3)
                        assert found.get("probabilities") == pytest.approx(other.get("probabilities"), abs=1e-5)
            pages = {answered(client.get("/metrics").text) for _ in range(40)}  # each of the replica that is asked
        assert max(pages) < 60, "one replica has answered all"
        assert sum(pages) == 60 or 2 * max(pages) == 60
        ray.send_signal(signal.SIGINT)
        ray.wait(60)
    finally:
        ray.kill()


def until_ready(client, process, log):
    for _ in range(360):
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            if client.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError(log.read_text()[-2000:])


def answered(page):
    return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith("unolora_answers_total{"))
