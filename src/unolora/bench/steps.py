"""A training step and a forward, beside PEFT's LoRA, the bare backbone and the floor."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from unolora.bench import models
from unolora.bench.timing import Line, in_turns, interleaved, line, paired
from unolora.fused import replace_dropout
from unolora.model import named_targets

SHAPES = {"minilm": {"rows": 32, "tokens": 32}, "t5-base": {"rows": 16, "tokens": 32}}
FLOOR = "the floor: frozen forward, backward through activations only"
FEED_FORWARD = named_targets(None, {"model_type": "bert"})
MEMORY = "MiniLM's shapes, 16 rows of 128 tokens; memory beyond that of the process with the model in it"
PLACES: dict[str, tuple[Any, int]] = {  # with their rank in configs/arena-ablations.yaml: as many parameters
    "query and value, r = 16": (models.TARGETS["minilm"], 16),
    "both maps into the residual stream, r = 10": (["output.dense"], 10),
    "the second feed-forward maps, r = 14": (FEED_FORWARD, 14),
}


def step(model: Any, inputs: dict[str, Tensor]) -> Callable[[], None]:
    """Return a training step: forward, backward, AdamW."""
    model.train()
    optimizer = None
    if trained := models.trained(model):
        optimizer = torch.optim.AdamW(trained, fused=True)

    def run() -> None:
        models.loss(model(**inputs)).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return run


def forward(model: Any, inputs: dict[str, Any]) -> Callable[[], None]:
    """Return a forward without gradients."""
    model.eval()

    @torch.inference_mode()
    def run() -> None:
        model(**inputs)

    return run


def mixed(inputs: dict[str, Tensor], tasks: int) -> dict[str, Tensor]:
    """Give the rows of a batch tasks in turn."""
    return {**inputs, "tasks": torch.arange(len(inputs["input_ids"])) % tasks}


def _shape(name: str) -> str:
    shape = SHAPES[name]
    return f"{name}'s shapes, {shape['rows']} rows of {shape['tokens']} tokens"


def _training_step(name: str, rounds: int, default: Any = None) -> list[Line]:
    base, inputs = models.backbone(name), models.batch(name, **SHAPES[name])
    lora, ours = "PEFT LoRA", "training step, UnoLoRA*, 32 tasks mixed"
    in_a_run = "the same as a run takes it, the backbone's dropout by `fused.Dropout`"
    in_run = models.twin(base)
    replace_dropout(in_run)
    runs_of = {
        ours: step(models.unolora(base, name), mixed(inputs, 32)),
        in_a_run: step(models.unolora(in_run, name), mixed(inputs, 32)),
        lora: step(models.lora(base, name), inputs),
        FLOOR: step(models.floor(base), inputs),
    }
    at_default = "the same on its own default projections, not LoRA's"
    if default is not None:
        runs_of[at_default] = step(models.unolora(base, name, targets=default), mixed(inputs, 32))
    times = interleaved(runs_of, rounds)
    note = _shape(name)
    return [
        line(times, ours, lora, "<= 0.93", note),
        line(times, ours, FLOOR, "<= 1.05", note),
        line(times, lora, FLOOR, "", note),
        line(times, in_a_run, lora, "", note),
        *([] if default is None else [line(times, at_default, lora, "", note)]),
    ]


def step_minilm(rounds: int) -> list[Line]:
    """Time a training step on MiniLM's shapes."""
    return _training_step("minilm", rounds, FEED_FORWARD)


def step_t5(rounds: int) -> list[Line]:
    """Time a training step on T5-base's shapes."""
    return _training_step("t5-base", rounds)


def places(rounds: int) -> list[Line]:
    """Time a training step of UnoLoRA* by what is adapted, on MiniLM's shapes, and compare the peaks of its memory."""
    base, inputs = models.backbone("minilm"), mixed(models.batch("minilm", **SHAPES["minilm"]), 32)
    times = interleaved(
        {
            f"training step, {place}": step(models.unolora(base, "minilm", r=r, targets=names), inputs)
            for place, (names, r) in PLACES.items()
        },
        rounds,
    )
    found = in_turns({f"peak memory, {place}": ["-m", "unolora.bench.steps", place] for place in PLACES}, rounds)
    (step_of_first, *steps), (peak_of_first, *peaks) = times, found
    return [
        *(line(times, name, step_of_first, "", _shape("minilm")) for name in steps),
        *(paired(found, "bytes", name, peak_of_first, "", MEMORY) for name in peaks),
    ]


def inference(rounds: int) -> list[Line]:
    """Time a forward of 32 tasks mixed."""
    name = "minilm"
    base, inputs = models.backbone(name), models.batch(name, **SHAPES[name])
    star, task_only = models.unolora(base, name), models.unolora(base, name, conditioning="task")
    merged = models.unolora(models.backbone(name), name, conditioning="task")  # whose weights it changes
    merged = merged.merge_and_unload(tasks="task0")
    ours, one, bare = "inference, UnoLoRA*, 32 tasks mixed", "one task", "the bare backbone"
    fixed, alone = "inference, UnoLoRA with a scale for each task, 32 tasks mixed", "one task, merged"
    times = interleaved(
        {
            ours: forward(star, mixed(inputs, 32)),
            one: forward(star, mixed(inputs, 1)),
            fixed: forward(task_only, mixed(inputs, 32)),
            alone: forward(merged, inputs),
            bare: forward(base, inputs),
        },
        rounds,
    )
    note = _shape(name)
    return [
        line(times, ours, one, "<= 1.03", note),
        line(times, ours, bare, "<= 1.05", note),
        line(times, fixed, bare, "<= 1.05", note),
        line(times, alone, bare, "= 1 ± 0.02", note),
    ]


def many_tasks(rounds: int) -> list[Line]:
    """Time a forward of 32 rows with 32 of 256 tasks, and count the adapters' bytes."""
    name, tasks = "minilm", 256
    base, inputs = models.backbone(name), models.batch(name, **SHAPES[name])
    star, lora = models.unolora(base, name, tasks), models.loras(base, name, tasks)
    rows = torch.arange(32) * 8
    ours, theirs = "inference, UnoLoRA*, 256 tasks", "PEFT with 256 LoRAs, `adapter_names`"
    names = [f"task{row}" for row in rows.tolist()]
    times = interleaved(
        {
            ours: forward(star, {**inputs, "tasks": rows}),
            theirs: forward(lora, {**inputs, "adapter_names": names}),
            "the bare backbone": forward(base, inputs),
        },
        rounds,
    )
    note = f"{_shape(name)}, 32 of the tasks in a batch"
    return [
        line(times, ours, theirs, "<= 1", note),
        line(times, theirs, "the bare backbone", "", note),
        Line(
            "memory of the adapter, 256 tasks",
            "256 LoRAs",
            _bytes(star) / _bytes(lora),
            "<= 0.01",
            note=f"{name}, r = 8",
        ),
    ]


def _bytes(model: Any) -> int:
    """Count the bytes of what an adapter adds: parameters and buffers that the backbone does not have."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return sum(tensor.nbytes for key, tensor in tensors if "uno_" in key or "lora_" in key)


def memory(rounds: int) -> list[Line]:
    """Compare the peak memory of a process that takes two training steps."""
    programs = {"peak memory of training, UnoLoRA*, 32 tasks mixed": "unolora", "PEFT LoRA": "lora", FLOOR: "floor"}
    commands = {what: ["-m", "unolora.bench.steps", kind] for what, kind in programs.items()}
    found = in_turns(commands, rounds)
    ours, lora, _ = programs
    return [
        paired(found, "bytes", ours, lora, "<= 0.95", MEMORY),
        paired(found, "bytes", ours, FLOOR, "", MEMORY),
    ]


def peak_bytes(kind: str) -> int:
    """Take two steps and return by how many bytes the peak of the process rose."""
    name = "minilm"
    base, inputs = models.backbone(name), models.batch(name, rows=16, tokens=128)
    if kind == "unolora" or kind in PLACES:
        names, r = PLACES.get(kind, (None, 8))
        run = step(models.unolora(base, name, r=r, targets=names), mixed(inputs, 32))
    else:
        run = step(models.lora(base, name) if kind == "lora" else models.floor(base), inputs)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        run()
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def main(arguments: Sequence[str]) -> None:
    """Print the peak of one kind of model: what `memory` runs in a process of its own."""
    sys.stdout.write(f'{{"bytes": {peak_bytes(arguments[0])}}}\n')


if __name__ == "__main__":
    main(sys.argv[1:])
