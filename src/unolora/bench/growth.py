"""How the cost grows with tasks, rank, length and layers: counts on no device, times, and a page that draws them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from unolora.bench import models
from unolora.bench.steps import forward, mixed
from unolora.bench.timing import Line, interleaved, line
from unolora.errors import InputError

AXES: dict[str, tuple[int, ...]] = {
    "tasks": (1, 10, 100, 1000),
    "r": (1, 4, 8, 16, 64),
    "tokens": (16, 64, 128, 256, 512),
    "layers": (6, 12, 24, 48),
}
"""What grows, the others at the defaults of `cost`."""
TITLES = {"tasks": "Tasks", "r": "Rank", "tokens": "Tokens of a row", "layers": "Layers"}
ROWS = 8
"""Of a forward."""
BARE = "the bare backbone"


def _models(tasks: int, r: int, layers: int) -> tuple[Any, Any]:
    base = models.backbone("minilm", num_hidden_layers=layers)
    return base, models.unolora(base, "minilm", tasks, r)


def cost(tasks: int = 8, r: int = 8, tokens: int = 32, layers: int = 6) -> dict[str, float]:
    """Count what UnoLoRA* adds to MiniLM's shapes.

    Returns:
        `flops`: of a forward, by the bare backbone's. `parameters`: of the adapter, by the backbone's. `loras`: the
        same, of a LoRA for each task.
    """
    with torch.device("meta"):
        base, model = _models(tasks, r, layers)
        lora = models.trained(models.lora(base, "minilm", r))
        inputs = {"input_ids": torch.ones(ROWS, tokens, dtype=torch.long)}
    size = sum(parameter.numel() for parameter in base.parameters())
    return {
        "flops": _flops(model, {**inputs, "tasks": ["task0"] * ROWS}) / _flops(base, inputs),
        "parameters": sum(parameter.numel() for parameter in models.trained(model)) / size,
        "loras": tasks * sum(parameter.numel() for parameter in lora) / size,
    }


def _flops(model: Any, inputs: dict[str, Any]) -> int:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.eval()(**inputs)
    return counter.get_total_flops()


def growth(rounds: int) -> list[Line]:
    """Count flops and parameters, and time forwards, as tasks, rank, length and layers grow (MiniLM's shapes)."""
    lines = []
    for axis, values in AXES.items():
        for value in values:
            found = cost(**{axis: value})
            lines += [
                Line(named("flops of a forward", axis, value), BARE, found["flops"]),
                Line(named("parameters, %", axis, value), BARE, 100 * found["parameters"]),
                Line(named("parameters of LoRAs, %", axis, value), BARE, 100 * found["loras"]),
            ]
        lines += _timed(axis, rounds)
    return lines


def _timed(axis: str, rounds: int) -> list[Line]:
    """Time forwards along one axis, all in turns."""
    runs: dict[str, Callable[[], None]] = {}
    pairs = []
    for value in AXES[axis]:
        shape = {"tasks": 8, "r": 8, "tokens": 32, "layers": 6, axis: value}
        base, model = _models(shape["tasks"], shape["r"], shape["layers"])
        inputs = models.batch("minilm", ROWS, shape["tokens"])
        bare = named(BARE, axis, value) if axis in ("tokens", "layers") else BARE  # which else is the same for all
        what = named("time of a forward", axis, value)
        runs |= {bare: forward(base, inputs), what: forward(model, mixed(inputs, shape["tasks"]))}
        pairs.append((what, bare))
    times = interleaved(runs, rounds)
    return [replace(line(times, *pair), against=BARE, note=f"{ROWS} rows") for pair in pairs]


def named(what: str, axis: str, value: int) -> str:
    """Name a line."""
    return f"{what}, {axis} = {value}"


def write_figures(kept: Mapping[str, Any], path: Path) -> None:
    """Draw what `growth` measured as a page of the report's kind, which opens without a network.

    Args:
        kept: What stands beside benchmarks.md.
        path: The HTML file to write.

    Raises:
        InputError: `growth` has not been measured.
    """
    from unolora.atomic import write_text
    from unolora.report.page import Page, Section, render

    if "growth" not in kept:
        raise InputError("how the cost grows has not been measured: run `unolora bench growth` first")
    found = {each["what"]: each["ratio"] for each in kept["growth"]["lines"]}
    page = Page(
        kicker="unolora bench",
        title="How the cost of UnoLoRA* grows",
        subtitle="growth",
        meta=[f"{key} {kept['growth']['environment'][key]}" for key in ("torch", "processor", "threads")],
        lead=(
            "MiniLM's shapes, beside the bare backbone, as one of tasks, rank, length and layers grows; the others "
            f"stay at 8 tasks, rank 8, 32 tokens and 6 layers. A forward has {ROWS} rows of mixed tasks."
        ),
        cards=[],
        sections=[
            Section("time", "A forward", [_figure(found, "A forward, by the bare backbone's", FORWARD, "score")]),
            Section(
                "size", "Parameters", [_figure(found, "Parameters, % of the backbone's", SIZE, "digits", log=True)]
            ),
        ],
    )
    write_text(path, render(page))


FORWARD = {"operations, counted": "flops of a forward", "time, median": "time of a forward"}
SIZE = {"UnoLoRA*, all tasks": "parameters, %", "a LoRA for each task": "parameters of LoRAs, %"}


def _figure(found: Mapping[str, float], title: str, curves: Mapping[str, str], how: str, log: bool = False) -> Any:
    from unolora import charts

    drawn = [found[named(what, axis, value)] for what in curves.values() for axis in AXES for value in AXES[axis]]
    same = {"range": [min(drawn) - 0.01, max(drawn) + 0.01]}  # so that panels can be compared
    panels = []
    for axis, values in AXES.items():
        series = [
            charts.Series(label, number, {value: found[named(what, axis, value)] for value in values})
            for number, (label, what) in enumerate(curves.items(), 1)
        ]
        panel = charts.lines(TITLES[axis], series, how=how, x=TITLES[axis])
        layout = panel.plot["layout"]
        layout["xaxis"] |= {"type": "log", "tickvals": list(values), "ticktext": [f"{value:,}" for value in values]}
        layout["yaxis"] = {"type": "log", "dtick": 1} if log else same
        panels.append(panel)
    keys = [(label, number) for number, label in enumerate(curves, 1)]
    return charts.Figure(title, f"{title}, as tasks, rank, length and layers grow", panels, keys, columns=2)
