"""Label scoring beside generation that stops at the end token: `python scripts/bench_scoring.py GLUE_FOLDER [rounds]`.

T5-small's shapes with random weights, MiniLM's tokenizer, GLUE's validation rows (64 of a task), batches of one task,
sorted by length and padded to their longest. What is generated is forced to be the right answer, as a trained model
would write it, so both read the same batches and generation ends as early as it can. The two take turns; medians over
rounds.
"""

import statistics
import sys
import time
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
    collate, batches = Collator(tokenizer), []
    for row, d in enumerate(data):
        split = encode_rows(model, row, d.splits["validation"], tokenizer, 128, train=True)
        order = sorted(range(len(split)), key=split.lengths().__getitem__)
        batches += [(row, collate([(row, split, i) for i in order[at : at + 32]])) for at in range(0, len(order), 32)]
    times = {"labels": {}, "generation": {}}
    with torch.no_grad():
        for at in range(rounds + 1):  # the first one warms up
            for row, batch in batches:
                for how in times:
                    start = time.perf_counter()
                    if how == "labels":
                        model(batch["input_ids"], batch["attention_mask"], batch["tasks"])
                    else:
                        generate(host, batch, end)
                    if at:
                        times[how].setdefault((at, row), []).append(time.perf_counter() - start)
    total = [
        sum(sum(v) for (at, _), v in times["generation"].items() if at == n)
        / sum(sum(v) for (at, _), v in times["labels"].items() if at == n)
        for n in range(1, rounds + 1)
    ]
    print(f"all of GLUE: generation takes {statistics.median(total):.2f} times as long as label scoring")
    for row, task in enumerate(tasks):
        ratio = [sum(times["generation"][n, row]) / sum(times["labels"][n, row]) for n in range(1, rounds + 1)]
        longest = max(len(ids) for ids in answers.tokens(answers.words(row)))
        print(f"{task.name:6} {statistics.median(ratio):.2f}  ({longest} tokens, {answers.passes(row)} paths)")


if __name__ == "__main__":
    main()
