"""Which task of a run inputs belong to, where nobody says: the one whose training rows they look like.

The frozen backbone, without the adapter, turns a text into the mean of its last states. A task is the mean of that over
some of its training rows, and inputs, all of one task, are nearest to one of these by their cosine, once the mean of
all tasks is taken off. Labels are not looked at.

Axes: B batch, D width, K tasks, N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from unolora import runs
from unolora.data import Collator, Encoded
from unolora.errors import InputError
from unolora.hypernetwork import encode_sample
from unolora.runs import Run
from unolora.scoring import read_split
from unolora.tasks.rows import Rows, order
from unolora.text import TextModel

EXAMPLES = 128
"""Training rows that stand for a task."""


class Picker:
    """Tells the tasks of a run apart.

    Args:
        run: Of the method `unolora`, whose training rows can be read.

    Raises:
        InputError: It is another method's, or its data can't be read any more.
    """

    def __init__(self, run: Run) -> None:
        if run.settings.method != "unolora":
            raise InputError(
                f"{run.folder}: its method is {run.settings.method!r}; task 'auto' is for runs of 'unolora'"
            )
        self.run = run
        found = []
        for row, task in enumerate(run.tasks):
            rows = read_split(run, row, "train")
            few = order(len(rows), task.name, "auto")[:EXAMPLES].tolist()
            found.append(encoded(run, row, rows, few).mean(dim=0))
        self.tasks = torch.stack(found)  # [K, D]

    def cosines(self, states: Tensor) -> Tensor:
        """Compare the mean of encodings [N, D] with each task, [K]."""
        middle = self.tasks.mean(dim=0)
        return F.cosine_similarity(self.tasks - middle, (states.mean(dim=0) - middle).unsqueeze(0))

    def pick(self, inputs: Sequence[tuple[str, ...]]) -> str:
        """Return the name of the task that inputs [N], all of one task, belong to.

        Args:
            inputs: Of each row one text, or two of a pair.

        Raises:
            InputError: No task takes that many texts, or there are no inputs.
        """
        tasks = self.run.tasks
        if not inputs:
            raise InputError("task 'auto' needs at least one input to tell the task by")
        fitting = [row for row, task in enumerate(tasks) if all(len(task.template) == len(texts) for texts in inputs)]
        if not fitting:
            raise InputError(f"no task of {self.run.folder} takes {len(inputs[0])} texts; name one with --task")
        length = self.run.settings.data.max_length
        given = Rows(list(inputs), np.zeros(len(inputs)))
        rows = runs.encode_rows(self.run.model, fitting[0], given, self.run.tokenizer, length)
        cosines = self.cosines(encoded(self.run, fitting[0], rows, range(len(rows))))
        return tasks[max(fitting, key=lambda row: float(cosines[row]))].name


@torch.no_grad()
def encoded(run: Run, row: int, rows: Encoded, places: Sequence[int]) -> Tensor:
    """Return the mean last states of rows under the bare backbone, [N, D]."""
    backbone: Any = run.model.method.backbone
    collate, device = Collator(run.tokenizer), next(run.model.parameters()).device
    found = []
    for start in range(0, len(places), 64):
        batch = collate([(row, rows, i) for i in places[start : start + 64]])
        inputs = {k: v.to(device) for k, v in batch.items() if k not in ("labels", "answers", "tasks")}
        with backbone.disable_adapter():
            if not isinstance(run.model, TextModel):
                states = backbone(**inputs).last_hidden_state  #                               [B, T, D]
            elif run.model.encodes:
                states = backbone.get_base_model().get_encoder()(**inputs).last_hidden_state
            else:
                states = backbone(**inputs, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]
        found.append(encode_sample(states, inputs["attention_mask"]))
    return torch.cat(found)
