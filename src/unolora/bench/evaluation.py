"""Evaluation of GLUE's validation rows as text: label scoring, beside generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from unolora.bench.lengths import LONGEST_ANSWER, read_glue, t5_small, widened
from unolora.bench.timing import Line, interleaved, line

BATCH = 16
"""Rows of a forward."""
ROWS = 16
"""Validation rows of a task, so that generation reads a task a batch."""
WIDE = 8
"""Rows that are timed of those padded to 512 tokens: all of them take the same."""

Row = tuple[int, Any, int]


class Forced(LogitsProcessor):
    """Lets each row write its answer, then the end token, as a trained model would.

    Args:
        answers: Tokens, negative behind shorter ones [B, L].
        end: The end token.
    """

    def __init__(self, answers: Tensor, end: int) -> None:
        self.answers, self.end = answers.masked_fill(answers < 0, end), end

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Leave the next token of each row's answer the only one."""
        place = input_ids.shape[1] - 1  # the start token is there already
        there = place < self.answers.shape[1]
        ids = self.answers[:, place : place + 1] if there else torch.full_like(input_ids[:, :1], self.end)
        return torch.full_like(scores, -torch.inf).scatter(1, ids, 0.0)


def generated(host: Any, batch: dict[str, Tensor], most: int) -> Tensor:
    """Write the answers of a batch, greedily, until all rows have ended or `most` tokens are written."""
    forced = Forced(batch["answers"], host.config.eos_token_id)
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    out: Tensor = host.generate(**given, max_new_tokens=most, do_sample=False, logits_processor=[forced])
    return out


def scoring(rounds: int, glue: Path) -> list[Line]:
    """Evaluate GLUE's validation rows on T5-small's shapes: label scoring as a run does it, beside generation.

    What is generated is forced to be the right answer, so generation ends as early as it can. Generation reads the
    tasks one after the other, in the order of their files.
    """
    from unolora import runs
    from unolora.data import Collator
    from unolora.methods.method import Method
    from unolora.scoring import outputs
    from unolora.text import TextModel

    data = read_glue(glue, text=True, evaluation_limit=ROWS)
    host, answers = t5_small(data)
    model, collate = TextModel(Method(host.eval()), answers).eval(), Collator(answers.tokenizer)
    splits = [
        runs.encode_rows(model, i, d.splits["validation"], answers.tokenizer, 128, train=True)
        for i, d in enumerate(data)
    ]
    rows = [(task, split, i) for task, split in enumerate(splits) for i in range(len(split))]
    few = rows[:: len(rows) // WIDE][:WIDE]
    ours = "evaluation of GLUE, label scoring, sorted by length"
    plain = "generation to the end token, a task a batch, padded to its longest"
    wide = "the authors': padded to 512, up to 64 tokens"
    times = interleaved(
        {
            ours: lambda: outputs(model, rows, collate, BATCH),
            plain: _generation(host, rows, collate),
            wide: _generation(host, few, collate, wide=True),
        },
        rounds,
    )
    times[wide] = times[wide].times(len(rows) / len(few))
    note = f"times as fast; {len(rows)} rows of {len(splits)} tasks, batches of {BATCH}"
    return [
        line(times, ours, plain, ">= 1.5", note, faster=True),
        line(
            times, ours, wide, ">= 10", f"{note}; {WIDE} rows of the authors' timed, and counted for all", faster=True
        ),
    ]


def _generation(host: Any, rows: Sequence[Row], collate: Any, wide: bool = False) -> Callable[[], None]:
    @torch.no_grad()
    def run() -> None:
        for batch in batches(rows, collate, wide=wide):
            generated(host, batch, LONGEST_ANSWER if wide else batch["answers"].shape[1])

    return run


def batches(rows: Sequence[Row], collate: Any, *, wide: bool) -> Iterator[dict[str, Tensor]]:
    """Yield batches of rows as they come, padded to their longest, or to what the authors pad to."""
    for start in range(0, len(rows), BATCH):
        batch = collate(rows[start : start + BATCH])
        yield {**batch, **widened(batch)} if wide else batch
