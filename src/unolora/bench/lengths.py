"""Training on GLUE's real lengths: rows of like length together, beside random batches and the authors' padding."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unolora.bench import models
from unolora.bench.timing import Line, interleaved, line
from unolora.errors import InputError

STEPS = 1
"""Optimiser steps of a round, each of other rows."""
ROWS = 32
"""Of a step."""
PARTS = 4
"""Micro-batches of a step, as in configs/quickstart.yaml."""
LONGEST, LONGEST_ANSWER = 512, 64
"""What the authors pad inputs and targets to, tokens."""

Batches = Iterable[dict[str, Tensor]]


def read_glue(folder: Path, text: bool = False, limit: int = 2000, evaluation_limit: int = 64) -> list[Any]:
    """Read the first rows of each GLUE task.

    Args:
        folder: JSON lines of GLUE, a folder a task.
        text: Whether answers are text.
        limit: Training rows of a task.
        evaluation_limit: Validation rows of a task.

    Raises:
        InputError: They are not there.
    """
    from unolora.tasks import resolve
    from unolora.tasks.rows import load

    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; pass `--data` with GLUE as JSON lines, a folder a task")
    tasks = [task.as_text() if text else task for task in resolve(["glue"])]
    return [load(task, root=folder, limit=limit, evaluation_limit=evaluation_limit) for task in tasks]


def moments_of(data: Sequence[Any]) -> dict[str, Any]:
    """Return those of each regression."""
    from unolora.heads import Moments

    return {d.task.name: Moments.of(d.splits["train"].targets) for d in data if d.task.kind == "regression"}


def micro_batches(
    splits: Sequence[Any], parts: int, *, by_length: bool, seed: int = 0, steps: int = 10**6
) -> Iterator[list[tuple[int, int]]]:
    """Yield the rows of a run's micro-batches, as (task, row).

    Args:
        splits: Of each task the training rows.
        parts: Micro-batches of a step.
        by_length: Cut a step by length, as a run here does; if not, as its rows were drawn.
        seed: Of the draws.
        steps: How many.
    """
    from unolora.data import TrainingBatches
    from unolora.sampling import Sampler

    sampler = Sampler([len(split) for split in splits], batch_size=ROWS, seed=seed)
    lengths = [split.lengths() if by_length else [0] * len(split) for split in splits]
    yield from TrainingBatches(sampler, lengths, steps, lambda: 0, accumulation=parts)


def collated(splits: Sequence[Any], rows: Iterable[list[tuple[int, int]]], tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Pad micro-batches to their longest."""
    from unolora.data import Collator, TaskRows

    data, collate = TaskRows(splits), Collator(tokenizer)
    for batch in rows:
        yield collate([data[where] for where in batch])


def padding(batches: Batches) -> int:
    """Count the padding tokens of batches."""
    return sum(int((batch["attention_mask"] == 0).sum()) for batch in batches)


# --- MiniLM, each side by its own Trainer ----------------------------------------------------------------------------


def lengths(rounds: int, glue: Path) -> list[Line]:
    """Train MiniLM on GLUE's rows: a run as it is here, beside PEFT LoRA with transformers' Trainer.

    Both train on the same rows in each step. The backbone's dropout is `fused.Dropout` on both sides, except where
    torch's is named; the adapter's is its own.
    """
    data = read_glue(glue)
    ours = f"training on GLUE's lengths, UnoLoRA*, {PARTS} micro-batches by length"
    one = "PEFT LoRA and Trainer, a random batch padded to its longest"
    same = f"PEFT LoRA and Trainer, {PARTS} random micro-batches padded to their longest"
    usual = "PEFT LoRA and Trainer, a random batch, torch's dropout"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        steps, splits, tokenizer = _ours(data, folder)
        runs = {ours: steps, one: _theirs(data, folder, 1), same: _theirs(data, folder, PARTS)}
        times = interleaved({**runs, usual: _theirs(data, folder, 1, torch_dropout=True)}, rounds)

    def padded(parts: int, by_length: bool) -> int:
        return padding(collated(splits, micro_batches(splits, parts, by_length=by_length, steps=50), tokenizer))

    note = f"examples/s; MiniLM, all GLUE tasks, fp32, a step of {ROWS} rows a round"
    most, few, cut = padded(1, False), padded(PARTS, True), padded(PARTS, False)
    return [
        line(times, ours, one, ">= 1.5", note, faster=True),
        line(times, ours, same, ">= 1.5", note, faster=True),
        line(times, ours, usual, "", note, faster=True),
        Line(f"padding tokens of 50 steps, {PARTS} micro-batches by length", "random batches", few / most),
        Line(f"padding tokens of 50 steps, {PARTS} random micro-batches", "random batches", cut / most),
    ]


def _settings(parts: int) -> Any:
    from unolora.settings import from_dict

    training = {"steps": STEPS, "batch_size": ROWS, "gradient_accumulation": parts, "evaluate_every": 10**6}
    return from_dict({"backbone": "minilm", "tasks": ["glue"], "training": training})


def _built(data: Sequence[Any], method: str, parts: int) -> tuple[Any, Any, list[Any]]:
    """Build a method, and tokenize the training rows for it."""
    from unolora import runs

    model, tokenizer = runs.build(_settings(parts), method, [d.task for d in data], moments_of(data))
    return model, tokenizer, [runs.encode_rows(model, i, d.splits["train"], tokenizer, 128) for i, d in enumerate(data)]


def _ours(data: Sequence[Any], folder: Path) -> tuple[Callable[[], None], list[Any], Any]:
    """Return some steps of `MultiTaskTrainer` (other rows each time), and what it trains on."""
    from unolora.data import Collator
    from unolora.run_folder import checkpoints_of
    from unolora.sampling import Sampler
    from unolora.trainer import MultiTaskTrainer

    model, tokenizer, splits = _built(data, "unolora", PARTS)
    settings = _settings(PARTS)
    named = {split: dict(enumerate(splits)) for split in ("train", "validation")}
    checkpoints = checkpoints_of(folder, settings, "unolora", {})
    trainer = MultiTaskTrainer(model, settings, [d.task for d in data], named, Collator(tokenizer), checkpoints)
    trainer.args.eval_strategy = trainer.args.save_strategy = "no"  # both would come at the end of each round
    seeds = itertools.count()

    def run() -> None:
        trainer.sampler = Sampler([len(split) for split in splits], batch_size=ROWS, seed=next(seeds))
        trainer.train()

    return run, splits, tokenizer


def _theirs(data: Sequence[Any], folder: Path, parts: int, torch_dropout: bool = False) -> Callable[[], None]:
    """Return some steps of transformers' Trainer, on the rows of ours as they were drawn."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    from unolora.data import Collator, TaskRows
    from unolora.fused import Dropout

    model, tokenizer, splits = _built(data, "lora-shared", parts)
    if torch_dropout:
        _swap(model, Dropout, torch.nn.Dropout)
    seeds = itertools.count()

    class Drawn(Trainer):
        def get_train_dataloader(self) -> Any:
            rows = list(micro_batches(splits, parts, by_length=False, seed=next(seeds), steps=STEPS))
            return torch.utils.data.DataLoader(TaskRows(splits), batch_sampler=rows, collate_fn=self.data_collator)

    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=STEPS,
        gradient_accumulation_steps=parts,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = Drawn(model, arguments, data_collator=Collator(tokenizer), train_dataset=TaskRows(splits))
    trainer.model_accepts_loss_kwargs = False
    trainer.remove_callback(PrinterCallback)
    return lambda: trainer.train()


def _swap(model: Any, old: type[torch.nn.Dropout], new: type[torch.nn.Dropout]) -> None:
    """Give a backbone that `runs` loaded torch's own dropout back."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, old):
                setattr(parent, name, new(child.p))


# --- T5-small's shapes, beside fixed padding -------------------------------------------------------------------------


def t5_small(data: Sequence[Any]) -> tuple[Any, Any]:
    """Make T5-small's shapes with random weights, and the answers of tasks as text.

    T5's own tokenizer can't be had everywhere, so MiniLM's is used: a word is about as many tokens.
    """
    from unolora import runs
    from unolora.text import Answers

    _, tokenizer = runs.load_backbone("minilm")
    tokenizer.eos_token = tokenizer.sep_token
    shape = {"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "vocab_size": len(tokenizer)}
    host = models.backbone("t5-base", **shape, eos_token_id=tokenizer.eos_token_id)
    return host, Answers([d.task for d in data], tokenizer, moments_of(data), continues=False)


def recipe(rounds: int, glue: Path) -> list[Line]:
    """Train T5-small's shapes on GLUE's rows as text: a run's micro-batches, beside the authors' fixed padding.

    Both sides are plain loops with as many micro-batches and the same dropout. The authors' micro-batches are all of
    one shape, so one of a step is timed and counted for all.
    """
    from unolora import runs
    from unolora.fused import replace_dropout
    from unolora.methods import METHODS
    from unolora.text import TextModel

    data = read_glue(glue, text=True)
    host, answers = t5_small(data)
    replace_dropout(host)
    names = [d.task.name for d in data]
    model = TextModel(METHODS["unolora"](models.twin(host), names, _settings(PARTS)), answers)
    tokenizer, plain = answers.tokenizer, models.lora(host, "t5-base")
    splits = [runs.encode_rows(model, i, d.splits["train"], tokenizer, 128, train=True) for i, d in enumerate(data)]
    by_length = collated(splits, micro_batches(splits, PARTS, by_length=True), tokenizer)
    wide = _widened(collated(splits, micro_batches(splits, PARTS, by_length=False), tokenizer))
    ours = f"training on GLUE's lengths, UnoLoRA*, T5-small's shapes, {PARTS} micro-batches by length"
    theirs = "PEFT LoRA, padded to 512 and 64, as the authors do"
    times = interleaved({ours: _steps(model, by_length, PARTS), theirs: _steps(plain, wide, 1)}, rounds)
    whole = times[theirs].times(PARTS)
    note = f"examples/s; a step of {ROWS} rows a round"
    return [line({ours: times[ours], theirs: whole}, ours, theirs, ">= 12", note, faster=True)]


def _widened(batches: Batches) -> Iterator[dict[str, Tensor]]:
    """Pad as the authors do, the loss counting the padding."""
    for batch in batches:
        answers = batch["answers"].clamp(min=0)
        further = LONGEST_ANSWER - answers.shape[1]
        yield {**widened(batch), "labels": torch.nn.functional.pad(answers, (0, further))}


def widened(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Pad the inputs of a batch as the authors do."""
    more = LONGEST - batch["input_ids"].shape[1]
    return {name: torch.nn.functional.pad(batch[name], (0, more)) for name in ("input_ids", "attention_mask")}


def _steps(model: Any, batches: Iterator[Mapping[str, Tensor]], parts: int) -> Callable[[], None]:
    """Return a training step of `parts` micro-batches, on batches that go on from call to call."""
    model.train()
    optimizer = torch.optim.AdamW(models.trained(model), fused=True)

    def run() -> None:
        for batch in itertools.islice(batches, parts):
            (model(**batch)["loss"] / parts).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run
