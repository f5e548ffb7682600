"""What comes before and after the first step: precision, tokens, files, imports."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unolora.bench import models
from unolora.bench.lengths import read_glue
from unolora.bench.timing import Line, in_turns, interleaved, line, paired

ROWS = 400_000
"""Rows that are tokenised."""


def bf16(rounds: int) -> list[Line]:
    """Train and run MiniLM's shapes under bf16 autocast, as `precision: bf16` does, beside fp32."""
    from unolora.bench.steps import SHAPES, forward, mixed, step
    from unolora.fused import replace_dropout

    base = models.backbone("minilm")
    replace_dropout(base)
    model, inputs = models.unolora(base, "minilm"), mixed(models.batch("minilm", **SHAPES["minilm"]), 32)

    def half(run: Callable[[], None]) -> Callable[[], None]:
        def inside() -> None:
            with torch.autocast("cpu", torch.bfloat16):
                run()

        return inside

    def evaluating() -> None:
        forward(model, inputs)()
        model.train()

    train = step(model, inputs)
    runs_of = {
        "training step, bf16 autocast": half(train),
        "training step, fp32": train,
        "inference, bf16 autocast": half(evaluating),
        "inference, fp32": evaluating,
    }
    times = interleaved(runs_of, rounds)
    trained, trained_32, run, run_32 = runs_of
    note = "times as fast; MiniLM's shapes, 32 rows of 32 tokens"
    return [
        line(times, trained, trained_32, ">= 1.5", note, faster=True),
        line(times, run, run_32, ">= 1.5", note, faster=True),
    ]


def preprocessing(rounds: int, glue: Path) -> list[Line]:
    """Tokenise 400,000 rows, and read them again, beside `datasets.map` in one process."""
    import datasets

    from unolora import runs
    from unolora.tokens import tokenize

    _, tokenizer = runs.load_backbone("minilm")
    texts = [text for d in read_glue(glue) for row in d.splits["train"].texts for text in row]
    first = [f"{texts[i % len(texts)]} {i}" for i in range(ROWS)]
    table = datasets.Dataset.from_dict({"text": first})
    datasets.disable_progress_bars()
    number = itertools.count()

    def theirs(folder: Path) -> None:
        def encode(rows: Mapping[str, Any]) -> Any:
            return tokenizer(rows["text"], truncation=True, max_length=128, return_attention_mask=False)

        file = str(folder / f"{next(number)}.arrow")
        table.map(encode, batched=True, remove_columns=["text"], cache_file_name=file)

    names = f"tokenising {ROWS:,} rows", "`datasets.map`, fast tokenizer", "the same again, kept from the first run"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokenize(tokenizer, first, None, 128, folder / "kept")
        times = interleaved(
            {
                names[0]: lambda: tokenize(tokenizer, first, None, 128, folder / str(next(number))),
                names[1]: lambda: theirs(folder),
                names[2]: lambda: tokenize(tokenizer, first, None, 128, folder / "kept"),
            },
            rounds,
        )
    note = "MiniLM's tokenizer, GLUE's texts"
    return [line(times, names[0], names[1], "<= 1", note), line(times, names[2], names[0], "", note)]


def file(rounds: int) -> list[Line]:
    """Count the bytes of an adapter's file for 1,000 tasks beside those of one LoRA."""
    lines = []
    for name in ("t5-base", "minilm"):
        base = models.backbone(name)
        sizes = []
        for model in (models.unolora(base, name, tasks=1000), models.lora(base, name)):
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                sizes.append(sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")))
        reach = "<= 1.1" if name == "t5-base" else ""
        lines.append(
            Line("adapter file, 1,000 tasks", "one LoRA of the same rank", sizes[0] / sizes[1], reach, note=name)
        )
    return lines


def imports(rounds: int) -> list[Line]:
    """Time `import unolora` and `unolora --help` in processes of their own."""
    program = "import time, json; s = time.perf_counter(); {}; print(json.dumps({{'s': time.perf_counter() - s}}))"
    ours, peft, help_ = "import unolora", "import peft", "unolora --help"
    commands = {
        ours: ["-c", program.format("import unolora")],
        peft: ["-c", program.format("import peft")],
        help_: ["-c", "import unolora_cli; unolora_cli.main(['--help']); print('{}')"],
    }
    in_turns(commands, 1)  # what is read the first time comes from the disk
    found = in_turns(commands, rounds)
    seconds = float(np.median([value["wall"] for value in found[help_]]))
    return [
        paired(found, "s", ours, peft, "<= 1.1"),
        Line(help_, "a second", seconds, "<= 0.5", note="the whole process"),
    ]
