"""What serving costs: the engine alone, the same over HTTP, and the same backbone under PEFT's LoRAs.

All take turns within a round, on the same rows of all tasks in the same order; the ratios are medians over rounds. Over
HTTP, a second process asks on loopback, each of its clients for one row at a time. The server is a process of its own,
as is what it is compared with by its memory only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from unolora.bench import load
from unolora.data import Collator
from unolora.errors import InputError
from unolora.heads import Moments
from unolora.methods.baselines import lora_config
from unolora.runs import Run, build, load_backbone, load_run, save_adapter
from unolora.scoring import Row
from unolora.serving import Engine
from unolora.serving.batching import choose
from unolora.serving.predictor import Predictor
from unolora.settings import Settings, from_dict, to_dict
from unolora.tasks import TASKS, resolve
from unolora.tasks.rows import load as load_rows

EIGHT = ["spam", "questions", "movies", "products", "tweets", "editorials", "spam", "questions"]
WARM = 10  # the server's memory is looked at after a tenth of the requests, and at the end
LONGEST = 1000  # characters of a text; one of spam's rows is a whole file, which the server would refuse
FEWER = 4  # PEFT with an adapter for each request gets a fraction of the rows: it is slow


def measure(
    run: Path | None = None,
    *,
    rows: int = 2000,
    requests: int = 20_000,
    clients: int = 64,
    rounds: int = 3,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure a run's serving.

    Args:
        run: A run with heads, whose data is at hand. By default one of eight tasks on MiniLM is made, untrained, which
            takes as long as a trained one.
        rows: Rows of a round.
        requests: Requests over HTTP in all, for the memory.
        clients: Connections that ask at the same time.
        rounds: How often all take their turn.
        seed: Of the rows' order.

    Returns:
        Rates in rows a second, one for each round; medians of their ratios; processor time for a row, which also says
        something on a machine that does other work; latencies in seconds; memory in bytes.

    Raises:
        InputError: The run can't be used.
    """
    with tempfile.TemporaryDirectory(prefix="unolora-bench-") as temporary:
        folder = run or _untrained(Path(temporary) / "run")
        loaded = load_run(folder)
        inputs = _inputs(loaded, rows, seed)
        bodies = [json.dumps({"inputs": [{"task": task, "text": list(texts)}]}) for task, texts in inputs]
        found: dict[str, Any] = {"tasks": len(loaded.tasks), "clients": clients, "rows": rows, "rounds": rounds}
        rates: dict[str, list[float]] = {}
        work: dict[str, list[float]] = {}
        with Engine(loaded) as engine, _server(folder) as (port, process):
            found["overhead_tokens"] = round(engine.overhead, 1)
            ways = _ways(engine, inputs)
            answered = max(clients, requests // WARM)
            _ask(port, bodies, clients, answered)
            before, http = _memory(process), []
            for _ in range(rounds):
                for name, (way, count) in ways.items():
                    begin, worked = time.perf_counter(), time.process_time()
                    way(count)
                    rates.setdefault(name, []).append(count / (time.perf_counter() - begin))
                    work.setdefault(name, []).append((time.process_time() - worked) / count)
                worked = _work(process)
                http.append(_ask(port, bodies, clients, rows))
                rates.setdefault("http", []).append(rows / http[-1]["seconds"])
                work.setdefault("http", []).append((_work(process) - worked) / rows)
                answered += rows
            if requests > answered:
                _ask(port, bodies, clients, requests - answered)
            after = _memory(process)
    found["rows_per_second"] = {name: [round(rate, 1) for rate in values] for name, values in rates.items()}
    found["to_engine"] = {name: _ratio(values, rates["engine"]) for name, values in rates.items() if name != "engine"}
    found["cpu_ms_per_row"] = {name: round(1000 * statistics.median(values), 3) for name, values in work.items()}
    found["latency"] = _latency([each["latencies"] for each in http])
    found["memory"] = {"after_a_tenth": before, "at_the_end": after, "requests": max(requests, answered)}
    return found


def main(arguments: Sequence[str]) -> int:
    """Measure, and print the result as JSON."""
    parser = argparse.ArgumentParser(prog="unolora bench serve", description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, nargs="?", help="run folder; by default eight tasks on MiniLM, untrained")
    for name, value in {"rows": 2000, "requests": 20_000, "clients": 64, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="default: %(default)s")
    options = parser.parse_args(arguments)
    sys.stdout.write(json.dumps(measure(**vars(options)), indent=1) + "\n")
    return 0


def _untrained(folder: Path) -> Path:
    """Write a run of eight tasks that was not trained."""
    spelled = [
        name if name not in EIGHT[:place] else _renamed(name, f"{name}-again") for place, name in enumerate(EIGHT)
    ]
    settings = from_dict({"backbone": "minilm", "tasks": spelled, "data": {"max_length": 64}})
    tasks = [load_rows(task, limit=16).task for task in resolve(spelled)]
    model, _ = build(settings, settings.method, tasks, {task.name: Moments() for task in tasks})
    folder.mkdir()
    (folder / "config.yaml").write_text(json.dumps(to_dict(settings)), encoding="utf-8")  # JSON is YAML
    save_adapter(model, settings, settings.method, tasks, folder / "adapter")
    return folder


def _renamed(name: str, other: str) -> dict[str, Any]:
    task = TASKS[name]
    return {
        "name": other,
        "kind": task.kind,
        "template": list(task.template),
        "target": task.target,
        "source": {"bundled": task.source.bundled},
    }


def _inputs(run: Run, count: int, seed: int) -> list[tuple[str, tuple[str, ...]]]:
    """Take rows of all tasks alike, shuffled."""
    random = np.random.default_rng(seed)
    root = None if run.settings.data.root is None else Path(run.settings.data.root)
    found: list[tuple[str, tuple[str, ...]]] = []
    for task in run.tasks:
        texts = load_rows(task, root=root).splits["test"].texts
        found += [(task.name, texts[place]) for place in random.integers(len(texts), size=-(-count // len(run.tasks)))]
    order = random.permutation(len(found))[:count]
    return [(found[place][0], tuple(text[:LONGEST] for text in found[place][1])) for place in order]


@contextmanager
def _server(folder: Path) -> Iterator[tuple[int, int]]:
    command = [sys.executable, "-m", "unolora", "serve", str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if " on http://" not in line:
                raise InputError(f"{folder}: the server did not start; try `unolora serve {folder}`")
            yield int(line.split(" on http://")[1].split()[0].rpartition(":")[2]), process.pid
        finally:
            process.terminate()


def _family(process: int) -> list[int]:
    """Return a process and its children, where the system shows them as Linux does."""
    try:
        return [process, *map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split())]
    except OSError:
        return [process]


def _work(process: int) -> float:
    """Return the processor time that a server has used in seconds, or 0 where the system does not show it."""
    try:
        stats = [Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split() for each in _family(process)]
    except OSError:
        return 0.0
    return sum(int(fields[11]) + int(fields[12]) for fields in stats) / os.sysconf("SC_CLK_TCK")


def _memory(process: int) -> int | None:
    """Return the resident memory of a server in bytes, what its processes share counted once, where Linux shows it."""
    try:
        pages = [Path(f"/proc/{each}/smaps_rollup").read_text() for each in _family(process)]
    except OSError:
        return None
    return 1024 * sum(int(page.split("\nPss:", 1)[1].split()[0]) for page in pages)


def _ask(port: int, bodies: Sequence[str], clients: int, requests: int) -> dict[str, Any]:
    command = [sys.executable, load.__file__, str(port), str(clients), str(requests)]
    done = subprocess.run(command, input="\n".join(bodies), capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    if set(found["statuses"]) != {"200"}:
        raise InputError(f"the server answered {found['statuses']}; there must be 200 only")
    return found


# --- what is compared ------------------------------------------------------------------------------------------------


def _ways(engine: Engine, inputs: list[tuple[str, tuple[str, ...]]]) -> dict[str, tuple[Callable[[int], Any], int]]:
    """Return the ways to answer the rows without HTTP: for each a function of how many, and how many."""
    predictor = engine.predictor
    ways: dict[str, tuple[Callable[[int], Any], int]] = {
        "engine": (lambda count: engine.predict(inputs[:count]), len(inputs))
    }
    if predictor.writes:
        return ways
    peft = _PeftLoras(predictor.run)

    def one_by_one(count: int) -> None:  # each tokenized when it comes, as by the engine
        for each in inputs[:count]:
            peft.one(*predictor.rows([each]))

    def mixed(count: int) -> None:
        for batch in _batches(predictor, predictor.rows(inputs[:count]), engine):
            peft.mixed(batch)

    ways["peft_set_adapter"] = one_by_one, len(inputs) // FEWER
    ways["peft_adapter_names"] = mixed, len(inputs)
    for way, _ in ways.values():
        way(min(8, len(inputs)))
    return ways


def _batches(predictor: Predictor, rows: Sequence[Row], engine: Engine) -> Iterator[list[Row]]:
    """Cut rows into batches just as the engine does."""
    left = list(rows)
    while left:
        sizes = [predictor.size(row) for row in left[: 2 * engine.max_rows]]
        places = choose(sizes, max_rows=engine.max_rows, max_tokens=engine.max_tokens, overhead=engine.overhead)
        yield [left[place] for place in places]
        chosen = set(places)
        left = [row for place, row in enumerate(left) if place not in chosen]


class _PeftLoras:
    """A LoRA of PEFT's and a head for each task, on the run's backbone, with its rank and targets."""

    def __init__(self, run: Run) -> None:
        from peft import get_peft_model

        settings: Settings = run.settings
        backbone, tokenizer = load_backbone(settings.backbone)
        self.names = [f"task_{task.name}" for task in run.tasks]
        config = lora_config(backbone, settings.adapter)
        self.model: Any = get_peft_model(backbone, config, adapter_name=self.names[0])
        for name in self.names[1:]:
            self.model.add_adapter(name, config)
        width = backbone.config.hidden_size
        self.heads = nn.ModuleList(nn.Linear(width, max(1, len(task.labels))) for task in run.tasks)
        self.collate = Collator(tokenizer)
        self.model.eval()

    @torch.no_grad()
    def one(self, row: Row) -> list[float]:
        """Answer one row, its adapter switched on before."""
        self.model.set_adapter(self.names[row[0]])
        return self._answers([row])[0]

    @torch.no_grad()
    def mixed(self, rows: Sequence[Row]) -> list[list[float]]:
        """Answer rows of several tasks in one batch."""
        return self._answers(rows, adapter_names=[self.names[row[0]] for row in rows])

    def _answers(self, rows: Sequence[Row], **more: Any) -> list[list[float]]:
        batch = self.collate(rows)
        tasks, mask = batch.pop("tasks").tolist(), batch["attention_mask"].unsqueeze(-1)
        batch.pop("labels")
        states = self.model(**batch, **more).last_hidden_state  # [B, T, D]
        pooled = (states * mask).sum(1) / mask.sum(1)
        return [self.heads[task](own).tolist() for task, own in zip(tasks, pooled, strict=True)]


# --- what is said of it ----------------------------------------------------------------------------------------------


def _ratio(values: Sequence[float], others: Sequence[float]) -> float:
    return round(statistics.median(one / other for one, other in zip(values, others, strict=True)), 4)


def _latency(rounds: Sequence[Sequence[float]]) -> dict[str, float]:
    """Medians over rounds of the quantiles of each."""
    quantiles = np.array([np.quantile(each, [0.5, 0.95, 0.99, 1.0]) for each in rounds])  # [rounds, 4]
    p50, p95, p99, most = np.median(quantiles, axis=0).tolist()
    ratio = float(np.median(quantiles[:, 2] / quantiles[:, 0]))
    return {
        "p50": round(p50, 4), "p95": round(p95, 4), "p99": round(p99, 4), "most": round(most, 4),
        "p99_to_p50": round(ratio, 3),
    }  # fmt: skip
