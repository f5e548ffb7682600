"""Label scoring beside generation that stops at the end token: `python scripts/bench_scoring.py GLUE_FOLDER [rounds]`.

T5-small's shapes with random weights, MiniLM's tokenizer, GLUE's validation rows (up to 64 of a task), batches of one
task, sorted by length and padded to their longest. What is generated is forced to be the right answer, as a trained
model would write it, so both read the same batches and generation ends as early as it can. The encoder, which both run,
is timed alone as well: scoring that took no time beside it would be 1 / its share as fast. All take turns; medians over
rounds.
"""

import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from transformers import LogitsProcessor, T5Config, T5ForConditionalGeneration

from unolora.data import Collator
from unolora.heads import Moments
from unolora.methods.method import Method
from unolora.runs import encode_rows, load_backbone
from unolora.tasks import resolve
from unolora.tasks.rows import load
from unolora.text import Answers, TextModel

SIZES = (1, 8, 32)
"""Rows of a batch."""


class Forced(LogitsProcessor):
    """Lets each row write its answer [B, L], then the end token."""

    def __init__(self, answers, end):
        self.answers, self.end = answers.masked_fill(answers < 0, end), end

    def __call__(self, input_ids, scores):
        """Leave the next token of each row's answer the only one."""
        place = input_ids.shape[1] - 1  # the start token is there already
        ids = self.answers[:, place : place + 1] if place < self.answers.shape[1] else input_ids[:, :1] * 0 + self.end
        return torch.full_like(scores, -torch.inf).scatter(1, ids, 0.0)


def generate(model, batch, end):
    forced = Forced(batch["answers"], end)
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return model.generate(**given, max_new_tokens=batch["answers"].shape[1], do_sample=False, logits_processor=[forced])


def main():
    root, rounds = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 7
    _, tokenizer = load_backbone("minilm")
    tokenizer.eos_token = tokenizer.sep_token
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    host = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer), d_model=512, d_ff=2048, num_layers=6, num_heads=8, eos_token_id=end,
            pad_token_id=tokenizer.pad_token_id, decoder_start_token_id=tokenizer.pad_token_id,
        )
    ).eval()  # fmt: skip
    data = [load(task.as_text(), root=root, evaluation_limit=64, limit=200) for task in resolve(["glue"])]
    tasks = [d.task for d in data]
    answers = Answers(tasks, tokenizer, {"stsb": Moments(2.5, 1, 0, 5)}, continues=False)
    model = TextModel(Method(host), answers).eval()
    splits = [encode_rows(model, row, d.splits["validation"], tokenizer, 128, train=True) for row, d in enumerate(data)]
    for size in SIZES:
        report(size, measure(model, cut(splits, size, Collator(tokenizer)), rounds), answers)


def cut(splits, size, collate):
    """Return batches of `size` rows of one task, at least two batches each: [(task, batch)]."""
    batches = []
    for row, split in enumerate(splits):
        order = sorted(range(min(len(split), max(8, 2 * size))), key=split.lengths().__getitem__)
        batches += [
            (row, collate([(row, split, i) for i in order[at : at + size]])) for at in range(0, len(order), size)
        ]
    return batches


@torch.no_grad()
def measure(model, batches, rounds):
    """Return the seconds of each round, way and task: [{way: {task: seconds}}]."""
    host, found = model.method.backbone, []
    ways = {
        "labels": lambda batch: model(batch["input_ids"], batch["attention_mask"], batch["tasks"]),
        "generation": lambda batch: generate(host, batch, host.config.eos_token_id),
        "encoder": lambda batch: host.encoder(batch["input_ids"], attention_mask=batch["attention_mask"]),
    }
    for _ in range(rounds + 1):
        seconds = {way: Counter() for way in ways}
        for row, batch in batches:
            for way, run in ways.items():
                start = time.perf_counter()
                run(batch)
                seconds[way][row] += time.perf_counter() - start
        found.append(seconds)
    return found[1:]  # the first one warmed up


def report(size, found, answers):
    """Print ratios of the times for batches of `size` rows."""

    def ratio(way, other, rows):
        return statistics.median(sum(s[way][r] for r in rows) / sum(s[other][r] for r in rows) for s in found)

    every = range(len(answers.tasks))
    print(
        f"batches of {size}: generation takes {ratio('generation', 'labels', every):.2f} times as long as scoring, "
        f"the encoder alone takes {ratio('encoder', 'generation', every):.2f} of generation"
    )
    for row in every:
        longest = max(len(ids) for ids in answers.tokens(answers.words(row)))
        times = ratio("generation", "labels", [row])
        print(f"  {answers.tasks[row].name:6} {times:.2f}  ({longest} tokens, {answers.passes(row)} paths)")


if __name__ == "__main__":
    main()
