"""Training on GLUE's real lengths, and what comes before the first step: tokens, files, imports."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unolora.bench import models
from unolora.bench.timing import Line, in_turns, interleaved, line, paired
from unolora.errors import InputError

GLUE = Path("../shared/data/glue")
"""JSON lines of GLUE, a folder a task, seen from the project's folder."""
STEPS = 4
"""Optimiser steps of 32 rows in a round."""
LONGEST, LONGEST_ANSWER = 512, 64
"""What the authors pad inputs and targets to, tokens."""
ROWS = 400_000
"""Rows that are tokenised."""

Batches = Iterable[dict[str, Tensor]]


def glue(text: bool = False) -> list[Any]:
    """Read the first 2,000 training rows of each GLUE task.

    Raises:
        InputError: They are not there.
    """
    from unolora.tasks import resolve
    from unolora.tasks.rows import load

    if not GLUE.is_dir():
        raise InputError(f"{GLUE}: no such folder; GLUE is read from there as JSON lines, a folder a task")
    tasks = [task.as_text() if text else task for task in resolve(["glue"])]
    return [load(task, root=GLUE, limit=2000, evaluation_limit=64) for task in tasks]


def micro_batches(splits: list[Any], tokenizer: Any, parts: int, batch_size: int = 32) -> Iterator[dict[str, Tensor]]:
    """Yield the micro-batches of a run as its trainer would: `parts` a step, each of rows of like length."""
    from unolora.data import Collator, TaskRows, TrainingBatches
    from unolora.sampling import Sampler

    sampler = Sampler([len(split) for split in splits], batch_size=batch_size)
    batches = TrainingBatches(sampler, [split.lengths() for split in splits], 10**6, lambda: 0, accumulation=parts)
    rows, collate = TaskRows(splits), Collator(tokenizer)
    for batch in batches:
        yield collate([rows[where] for where in batch])


def padding(batches: Batches) -> int:
    """Count the padding tokens of batches."""
    return sum(int((batch["attention_mask"] == 0).sum()) for batch in batches)


def lengths(rounds: int) -> list[Line]:
    """Train MiniLM on GLUE's rows: a run as it is here, beside PEFT LoRA on random batches."""
    from unolora import runs
    from unolora.fused import Dropout
    from unolora.heads import Moments
    from unolora.settings import from_dict

    data = glue()
    moments = {d.task.name: Moments.of(d.splits["train"].targets) for d in data if d.task.kind == "regression"}
    settings = from_dict({"backbone": "minilm", "tasks": ["glue"]})
    steps: dict[str, Callable[[], None]] = {}
    ours, theirs = "training on GLUE's lengths, UnoLoRA*", "PEFT LoRA, random batches padded to their longest"
    both = {ours: ("unolora", 8), theirs: ("lora-shared", 1)}
    for name, (method, parts) in both.items():
        model, tokenizer = runs.build(settings, method, [d.task for d in data], moments)
        if method == "lora-shared":
            _swap(model, Dropout, torch.nn.Dropout)
        splits = [runs.encode_rows(model, row, d.splits["train"], tokenizer, 128) for row, d in enumerate(data)]
        steps[name] = _steps(model, micro_batches(splits, tokenizer, parts), parts)
    counted = [padding(itertools.islice(micro_batches(splits, tokenizer, n), 50 * n)) for _, n in both.values()]
    times = interleaved(steps, rounds)
    note = f"examples/s; MiniLM, all GLUE tasks, {STEPS} steps of 32 rows a round"
    return [
        line(times, ours, theirs, ">= 1.5", note, faster=True),
        Line("padding tokens of 50 steps, 8 micro-batches by length", "random batches", counted[0] / counted[1]),
    ]


def recipe(rounds: int) -> list[Line]:
    """Train T5-small's shapes on GLUE's rows as text: a run as it is here, beside the authors' fixed padding."""
    from unolora import runs
    from unolora.heads import Moments
    from unolora.methods import METHODS
    from unolora.settings import from_dict
    from unolora.text import Answers, TextModel

    data = glue(text=True)
    settings = from_dict({"backbone": "minilm", "tasks": ["glue"]})
    moments = {d.task.name: Moments.of(d.splits["train"].targets) for d in data if d.task.kind == "regression"}
    _, tokenizer = runs.load_backbone("minilm")  # T5's own can't be had everywhere; a word is about as many tokens
    tokenizer.eos_token = tokenizer.sep_token
    tasks, end = [d.task for d in data], tokenizer.eos_token_id
    host = models.backbone(
        "t5-base", d_model=512, d_ff=2048, num_layers=6, num_heads=8, vocab_size=len(tokenizer), eos_token_id=end
    )
    answers = Answers(tasks, tokenizer, moments, continues=False)
    model = TextModel(METHODS["unolora"](models.twin(host), [task.name for task in tasks], settings), answers)
    splits = [runs.encode_rows(model, row, d.splits["train"], tokenizer, 128, train=True) for row, d in enumerate(data)]
    plain = models.lora(host, "t5-base")
    ours, theirs = "training on GLUE's lengths, UnoLoRA*, T5-small's shapes", "padded to 512 and 64, as the authors do"
    wide = _widened(micro_batches(splits, tokenizer, 1))
    fixed = _steps(lambda **batch: {"loss": plain(**batch).loss}, wide, 1, plain, steps=1)
    times = interleaved({ours: _steps(model, micro_batches(splits, tokenizer, 8), 8, steps=1), theirs: fixed}, rounds)
    return [line(times, ours, theirs, ">= 12", "examples/s; a step of 32 rows a round", faster=True)]


def _widened(batches: Batches) -> Iterator[dict[str, Tensor]]:
    """Pad as the authors do, the loss counting the padding."""
    for batch in batches:
        ids, mask, answers = batch["input_ids"], batch["attention_mask"], batch["answers"].clamp(min=0)
        more, further = LONGEST - ids.shape[1], LONGEST_ANSWER - answers.shape[1]
        pad = torch.nn.functional.pad
        yield {
            "input_ids": pad(ids, (0, more)),
            "attention_mask": pad(mask, (0, more)),
            "labels": pad(answers, (0, further)),
        }


def _steps(
    model: Any, batches: Iterator[dict[str, Tensor]], parts: int, module: Any = None, steps: int = STEPS
) -> Callable[[], None]:
    """Return some training steps of `parts` micro-batches each, on batches that go on from call to call."""
    module = module or model
    module.train()
    optimizer = torch.optim.AdamW(models.trained(module), fused=True)

    def run() -> None:
        for _ in range(steps):
            for batch in itertools.islice(batches, parts):
                (model(**batch)["loss"] / parts).backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def _swap(model: Any, old: type[torch.nn.Dropout], new: type[torch.nn.Dropout]) -> None:
    """Give a backbone that `runs` loaded torch's own dropout back."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, old):
                setattr(parent, name, new(child.p))


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


def preprocessing(rounds: int) -> list[Line]:
    """Tokenise 400,000 rows, and read them again, beside `datasets.map` in one process."""
    import datasets

    from unolora import runs
    from unolora.tokens import tokenize

    _, tokenizer = runs.load_backbone("minilm")
    texts = [text for d in glue() for row in d.splits["train"].texts for text in row]
    first = [f"{texts[i % len(texts)]} {i}" for i in range(ROWS)]
    table = datasets.Dataset.from_dict({"text": first})
    datasets.disable_progress_bars()
    number = itertools.count()

    def theirs(folder: Path) -> None:
        def encode(rows: Mapping[str, Any]) -> Any:
            return tokenizer(rows["text"], truncation=True, max_length=128, return_attention_mask=False)

        file = str(folder / f"{next(number)}.arrow")
        table.map(encode, batched=True, remove_columns=["text"], cache_file_name=file)

    names = "tokenising 400,000 rows", "`datasets.map`, fast tokenizer", "the same again, kept from the first run"
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
    note = "MiniLM's tokenizer, GLUE's texts, one thread"
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
        help_: ["-c", program.format("import unolora_cli; unolora_cli.main(['--help'])")],
    }
    in_turns(commands, 1)  # what is read the first time comes from the disk
    found = in_turns(commands, rounds)
    seconds = float(np.median([value["s"] for value in found[help_]]))
    return [
        paired(found, "s", ours, peft, "<= 1.1"),
        Line(help_, "a second", seconds, "<= 0.5", note="beside the interpreter's own start"),
    ]
