"""How the cost grows with tasks, rank, length and layers: counts, and figures of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from unolora.bench import models
from unolora.bench.timing import Line

TASKS = (1, 10, 100, 1000)
RANKS = (1, 4, 8, 16, 64)
LENGTHS = (16, 64, 128, 256, 512)
LAYERS = (6, 12, 24, 48)


def cost(tasks: int = 8, r: int = 8, tokens: int = 128, layers: int = 6, rows: int = 1) -> dict[str, float]:
    """Count what UnoLoRA* adds to a forward on MiniLM's shapes.

    Returns:
        `flops`: of a forward, by the bare backbone's. `parameters`: of the adapter, by the backbone's. `per_task`:
        the same, of one task.
    """
    base = models.backbone("minilm", num_hidden_layers=layers)
    base.set_attn_implementation("eager")  # whose products are all counted
    inputs = {"input_ids": torch.ones(rows, tokens, dtype=torch.long)}
    size = sum(parameter.numel() for parameter in base.parameters())
    bare = _flops(base, inputs)
    model = models.unolora(base, "minilm", tasks, r)
    adapter = sum(parameter.numel() for parameter in models.trained(model))
    flops = _flops(model, {**inputs, "tasks": torch.zeros(rows, dtype=torch.long)})
    return {"flops": flops / bare, "parameters": adapter / size, "per_task": adapter / size / tasks}


def _flops(model: Any, inputs: dict[str, Any]) -> int:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.eval()(**inputs)
    return counter.get_total_flops()


def curves() -> dict[str, tuple[tuple[int, ...], list[dict[str, float]]]]:
    """Count `cost` along each axis, the others at their defaults: axis -> (values, costs)."""
    axes = {"tasks": TASKS, "r": RANKS, "tokens": LENGTHS, "layers": LAYERS}
    return {name: (values, [cost(**{name: value}) for value in values]) for name, values in axes.items()}


def growth(rounds: int) -> list[Line]:
    """Count the flops of a forward and the adapter's parameters, from the smallest to the largest of each axis."""
    lines = []
    for name, (values, costs) in curves().items():
        for value, found in zip(values, costs, strict=True):
            more, each = 100 * found["parameters"], 100 * found["per_task"]
            note = f"parameters {more:.3f} % of the backbone's, {each:.4f} % a task"
            lines.append(Line(f"flops of a forward, {name} = {value}", "the bare backbone", found["flops"], note=note))
    return lines


def write_figures(path: Path) -> None:
    """Draw `curves` as one page that opens without a network."""
    from plotly import graph_objects as go
    from plotly.subplots import make_subplots

    from unolora.atomic import write_text

    found = curves()
    figure = make_subplots(rows=2, cols=len(found), subplot_titles=list(found), vertical_spacing=0.12)
    for column, (name, (values, costs)) in enumerate(found.items(), 1):
        for row, (key, title) in enumerate(
            (("flops", "flops of a forward, by the backbone's"), ("parameters", "parameters, by the backbone's")), 1
        ):
            y = [one[key] for one in costs]
            trace = go.Scatter(x=list(values), y=y, mode="lines+markers", name=f"{name}, {key}", showlegend=False)
            figure.add_trace(trace, row=row, col=column)
            figure.update_xaxes(type="log", title=name, row=row, col=column)
            figure.update_yaxes(rangemode="tozero", title=title if column == 1 else None, row=row, col=column)
    figure.update_layout(template="plotly_white", height=640, title="How the cost of UnoLoRA* grows, MiniLM's shapes")
    write_text(path, figure.to_html(include_plotlyjs=True, full_html=True))
