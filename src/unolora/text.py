"""Tasks as text: the model reads a prompt and writes a label word or a number, as T5 does it (Raffel et al. 2020).

Scoring. A task's possible answers form a prefix tree of tokens, each ended by the end token:

    (start) --- not --- _ --- duplicate --- end        Only at a node with several branches is there anything to
       |                                               decide. The nodes of a task are read in one pass of the decoder,
       +------- duplicate --- end                      and where several paths lead to them, the rest from its cache.

log p(answer) is the sum, over the nodes on its way, of log p(its branch | node), among the branches of that node. The
prediction goes down the likeliest branch from node to node: what greedy generation writes wherever that is an answer.

Axes: B batch, T tokens, L tokens of an answer, R paths of the tree, V vocabulary, W tokens that a task's answers
part with, K tasks, C answers of a task.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from unolora.data import IGNORED, Encoded, check_unicode, tokens_folder
from unolora.errors import InputError
from unolora.heads import Moments
from unolora.methods.method import Method
from unolora.metrics import UNPARSED
from unolora.tasks import Task
from unolora.tasks.rows import Rows
from unolora.tokens import Ragged, tokenize
from unolora.vocabulary import logits_of

CUE = "\nanswer:"
"""Ends the prompt of a decoder-only model, whose answer goes right behind it."""


@dataclass(frozen=True)
class Node:
    """A place in the tree where answers part."""

    path: int
    """Which of the tree's paths goes through it."""
    depth: int
    """Tokens of the path before it."""
    columns: Tensor
    """The tokens that may follow, as places in the tree's `tokens` [m]."""
    taken: Tensor
    """Of each answer the branch that it takes, -1 if it does not pass here [C]."""


@dataclass(frozen=True)
class Tree:
    """The answers of a task, ready for scoring."""

    paths: list[tuple[int, ...]]
    """Token sequences that lead through every node; usually one, which is empty."""
    nodes: list[Node]
    size: int
    """Number of answers: C of the task."""
    tokens: Tensor
    """What answers part with, from the lowest [W]."""
    longest: int
    """Tokens of the longest answer, its end token among them."""

    @classmethod
    def of(cls, answers: Sequence[tuple[int, ...]]) -> Tree:
        """Build the tree of distinct token sequences, none of which begins another."""
        branches: dict[tuple[int, ...], list[int]] = {}
        for answer in answers:
            for depth, token in enumerate(answer):
                following = branches.setdefault(answer[:depth], [])
                if token not in following:
                    following.append(token)
        forks = [prefix for prefix, following in branches.items() if len(following) > 1]
        paths = [fork for fork in forks if not any(other[: len(fork)] == fork and other != fork for other in forks)]
        tokens = torch.tensor([token for fork in forks for token in branches[fork]]).unique()
        nodes = []
        for fork in forks:
            path = next(i for i, path in enumerate(paths) if path[: len(fork)] == fork)
            taken = [branches[fork].index(a[len(fork)]) if a[: len(fork)] == fork else -1 for a in answers]
            columns = torch.searchsorted(tokens, torch.tensor(branches[fork]))
            nodes.append(Node(path, len(fork), columns, torch.tensor(taken)))
        return cls(paths, nodes, len(answers), tokens, max(map(len, answers)))

    @property
    def depth(self) -> int:
        """Tokens of the longest path."""
        return max(len(path) for path in self.paths)


class Answers(nn.Module):
    """What each task may be answered with, as tokens. It takes the place of heads, and has no parameters.

    Args:
        tasks: In the order of their rows, with labels; a regression has a `text_step`.
        tokenizer: The backbone's.
        moments: Of each regression, for the range of its training targets; numbers outside are never predicted.
        continues: Whether an answer goes right behind the prompt, as for a decoder-only model.

    Raises:
        InputError: The tokenizer has no end token, or a regression has no step.
    """

    low: Tensor  # [K] least training target of a regression
    high: Tensor  # [K]

    def __init__(
        self, tasks: Sequence[Task], tokenizer: Any, moments: Mapping[str, Moments], *, continues: bool
    ) -> None:
        super().__init__()
        if tokenizer.eos_token_id is None:
            raise InputError("the backbone's tokenizer has no end token, which ends an answer; choose another backbone")
        for task in tasks:
            if task.kind == "regression" and task.text_step is None:
                raise InputError(
                    f"task {task.name!r}: a regression as text needs `text_step`, to which numbers are rounded (0.2 "
                    "for STS-B); or set `answers: heads` with an encoder"
                )
        self.tasks, self.tokenizer, self.continues = list(tasks), tokenizer, continues
        found = [moments.get(task.name, Moments()) for task in tasks]
        self.register_buffer("low", torch.tensor([m.low for m in found], dtype=torch.float64))
        self.register_buffer("high", torch.tensor([m.high for m in found], dtype=torch.float64))
        self._trees: dict[tuple[int, float, float], Tree] = {}

    def words(self, row: int) -> list[str]:
        """Return the answers of a task as texts, in the order of their ids or from low to high [C]."""
        task = self.tasks[row]
        if task.kind == "classification":
            return list(task.labels)
        return [self.number(row, value) for value in self.values(row)]

    def values(self, row: int) -> list[float]:
        """Return the numbers that a regression may be answered with: the multiples of its step in range [C]."""
        step = float(self.tasks[row].text_step or 1)
        first, last = (round(float(bound[row]) / step) for bound in (self.low, self.high))
        return [count * step for count in range(first, max(last, first + 1) + 1)]

    def number(self, row: int, value: float) -> str:
        """Spell a number: rounded to the task's step, with as many decimals as the step has."""
        step = float(self.tasks[row].text_step or 1)
        decimals = max(len(repr(step).partition(".")[2].rstrip("0")), 1)
        return f"{round(value / step) * step + 0.0:.{decimals}f}"

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenize answers, each ended by the end token."""
        space = " " if self.continues else ""
        out = self.tokenizer([space + text for text in texts], add_special_tokens=False)["input_ids"]
        return [[*ids, self.tokenizer.eos_token_id] for ids in out]

    def targets(self, row: int, values: np.ndarray[Any, Any]) -> list[list[int]]:
        """Return the tokens of the right answers of a task's rows, from label ids or numbers [N]."""
        labels = self.tasks[row].labels
        texts = [labels[int(value)] if labels else self.number(row, float(value)) for value in values]
        spelled = dict.fromkeys(texts)
        tokens = dict(zip(spelled, self.tokens(list(spelled)), strict=True)) if texts else {}
        return [tokens[text] for text in texts]

    def tree(self, row: int) -> Tree:
        """Return the prefix tree of a task's answers.

        Raises:
            InputError: The tokenizer can't tell two of them apart.
        """
        key = (row, float(self.low[row]), float(self.high[row]))
        if key not in self._trees:
            words = self.words(row)
            answers = [tuple(ids) for ids in self.tokens(words)]
            for place, ids in enumerate(answers):
                if (first := answers.index(ids)) != place:
                    raise InputError(
                        f"task {self.tasks[row].name!r}: the backbone's tokenizer gives {words[first]!r} and "
                        f"{words[place]!r} the same tokens; choose other label words"
                    )
            self._trees[key] = Tree.of(answers)
        return self._trees[key]

    def longest(self, *rows: int) -> int:
        """Tokens of the longest answer of these tasks, of all by default, the end token among them; see `tree`."""
        return max(self.tree(row).longest for row in rows or range(len(self.tasks)))

    def passes(self, row: int) -> int:
        """How many rows of the decoder one row of this task takes: R."""
        return len(self.tree(row).paths)

    def read(self, row: int, text: str) -> float:
        """Turn a generated text into a label id or a number; `UNPARSED` or NaN if it is neither."""
        task, text = self.tasks[row], text.strip()
        if task.kind == "classification":
            return float(task.labels.index(text)) if text in task.labels else float(UNPARSED)
        try:
            value = math.nan if "_" in text else float(text)
        except ValueError:
            return math.nan
        return value if math.isfinite(value) else math.nan


def encode_text(rows: Rows, row: int, answers: Answers, max_length: int, *, train: bool) -> Encoded:
    """Tokenize prompts, cut to `max_length` tokens in all; for training, the right answers as well.

    Args:
        rows: Of one task, whose template is its prompt.
        row: The task's row.
        answers: Of all tasks.
        max_length: Tokens kept of a prompt.
        train: Whether the answers are wanted.

    Raises:
        InputError: A text is not valid Unicode.
    """
    check_unicode(rows)
    tokenizer = answers.tokenizer
    cue: list[int] = tokenizer(CUE, add_special_tokens=False)["input_ids"] if answers.continues else []
    texts = [text for (text,) in rows.texts]
    out: Sequence[list[int]] = tokenize(tokenizer, texts, None, max_length - len(cue), tokens_folder())["input_ids"]
    if answers.continues:  # an end token there would part the prompt from its answer
        end = tokenizer.eos_token_id
        out = [[*(ids[:-1] if ids and ids[-1] == end else ids), *cue] for ids in out]
    return Encoded({"input_ids": Ragged.of(out)}, rows.targets, answers.targets(row, rows.targets) if train else None)


class TextModel(nn.Module):
    """An adapted language model whose tasks are text to text; what the trainer sees, whatever the method.

    Args:
        method: Over an encoder-decoder or a decoder-only language model.
        answers: Of the tasks.
    """

    def __init__(self, method: Method, answers: Answers) -> None:
        super().__init__()
        self.method = method
        self.heads = answers
        config = method_config(method)
        self.encodes = bool(getattr(config, "is_encoder_decoder", False))
        self.start = int(config.decoder_start_token_id) if self.encodes else -1

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        tasks: Tensor,
        labels: Tensor | None = None,
        answers: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Run a batch of any mix of tasks.

        Args:
            input_ids: Prompts, padded on the right [B, T].
            attention_mask: [B, T].
            tasks: Rows of the tasks [B].
            labels: Label ids or numbers [B]; not used, the answers say the same.
            answers: Tokens of the right answers, `IGNORED` where shorter [B, L].

        Returns:
            With answers `losses` [B], the mean over an answer's tokens of -log p, and their mean, `loss`. Without,
            `logits` [B, C], log p of each answer (-inf beyond a task's own), and `answers` [B], label ids or numbers.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if answers is not None:
            losses = self.method.run(tasks, inputs, lambda model, given, at: self._losses(model, given, answers[at]))
            return {"loss": losses.mean(), "losses": losses}
        found = self.method.run(tasks, inputs, lambda model, given, at: self._scores(model, given, tasks[at]))
        return {"logits": found[:, 1:], "answers": found[:, 0]}

    def _losses(self, model: Any, inputs: dict[str, Any], answers: Tensor) -> Tensor:
        there = answers != IGNORED  #                                                        [B, L]
        tokens = answers.masked_fill(~there, 0)
        if self.encodes:
            start = torch.full_like(tokens[:, :1], self.start)
            logits = model(**inputs, decoder_input_ids=torch.cat([start, tokens[:, :-1]], 1)).logits  # [B, L, V]
        else:
            logits = self._continued(model, inputs, tokens, there)  #                        [B, L, V]
        entropy = F.cross_entropy(logits.float().transpose(1, 2), tokens, reduction="none")  # [B, L]
        return (entropy * there).sum(1) / there.sum(1)

    def _continued(self, model: Any, inputs: dict[str, Any], tokens: Tensor, there: Tensor) -> Tensor:
        """Return the logits of a decoder that predict each token of the answers, put right behind the prompts."""
        mask = inputs["attention_mask"]
        B, L = tokens.shape
        ends = mask.sum(1, keepdim=True)  #                                                  [B, 1]
        places = ends + torch.arange(L, device=tokens.device)  #                             [B, L]
        more = mask.new_zeros(B, L)
        longer = torch.cat([mask, more], 1).scatter(1, places, there.to(mask.dtype))  #      [B, T + L]
        given: dict[str, Any] = {"attention_mask": longer}
        if "inputs_embeds" in inputs:
            embedded = model.get_input_embeddings()(tokens).to(inputs["inputs_embeds"].dtype)  # [B, L, D]
            room = embedded.new_zeros(embedded.shape)
            width = embedded.shape[-1]
            where = places.unsqueeze(-1).expand(-1, -1, width)
            given["inputs_embeds"] = torch.cat([inputs["inputs_embeds"], room], 1).scatter(1, where, embedded)
        else:
            given["input_ids"] = torch.cat([inputs["input_ids"], more.to(tokens.dtype)], 1).scatter(1, places, tokens)
        return self._logits_at(model, given, places - 1)

    @staticmethod
    def _logits_at(model: Any, given: dict[str, Any], places: Tensor) -> Tensor:
        """Run a decoder and return its logits at places [B, L] only: over all tokens they are its largest tensor."""
        wanted, inverse = places.unique(return_inverse=True)
        logits = model(**given, logits_to_keep=wanted).logits  #                             [B, wanted, V]
        return logits.gather(1, inverse.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))

    # --- scoring all answers in one pass --------------------------------------------------------------------------

    def _scores(self, model: Any, inputs: dict[str, Any], tasks: Tensor) -> Tensor:
        """Return the predicted answer and log p of all answers, side by side [B, 1 + C]."""
        trees = {row: self.heads.tree(row) for row in tasks.unique().tolist()}
        R, L = max(len(tree.paths) for tree in trees.values()), max(tree.depth for tree in trees.values())
        table = torch.zeros(len(tasks), R, L, dtype=torch.long)
        for row, tree in trees.items():
            for place, path in enumerate(tree.paths):
                table[tasks.cpu() == row, place, : len(path)] = torch.tensor(path, dtype=torch.long)
        read = self._read_encoded if self.encodes else self._read_decoder
        paths, wanted = table.to(tasks.device), [tree.tokens.to(tasks.device) for tree in trees.values()]
        logits = logits_of(model, wanted, lambda: read(model, inputs, paths))  #             [B, R, L + 1, sum of W]
        columns = logits.split([len(own) for own in wanted], -1)
        C = max(self.heads.tree(row).size for row in range(len(self.heads.tasks)))
        found = torch.full((len(tasks), 1 + C), -torch.inf, dtype=torch.float64, device=tasks.device)
        for (row, tree), own in zip(trees.items(), columns, strict=True):
            rows = (tasks == row).nonzero().squeeze(1)
            chosen, scores = _walk(tree, own[rows])
            if self.heads.tasks[row].kind == "regression":
                chosen = torch.tensor(self.heads.values(row), dtype=torch.float64, device=chosen.device)[chosen]
            found[rows, 0] = chosen.double()
            found[rows, 1 : 1 + scores.shape[1]] = scores.double()
        return found

    def _read_encoded(self, model: Any, inputs: dict[str, Any], paths: Tensor) -> Tensor:
        """Decode the path in one pass; where there are several, the start token first, and the paths from its cache."""
        B, R, L = paths.shape
        start = torch.full((B, 1), self.start, device=paths.device)
        if R == 1:
            return model(**inputs, decoder_input_ids=torch.cat([start, paths[:, 0]], 1)).logits.unsqueeze(1)
        out = model(**inputs, decoder_input_ids=start, use_cache=True)
        cache = out.cache  # with the keys and values of the input, which are most of the work
        cache.batch_repeat_interleave(R)
        more = model(
            encoder_outputs=BaseModelOutput(out.encoder_last_hidden_state.repeat_interleave(R, 0)),
            attention_mask=inputs["attention_mask"].repeat_interleave(R, 0),
            decoder_input_ids=paths.reshape(B * R, L),
            cache=cache,
        ).logits.view(B, R, L, -1)
        return torch.cat([out.logits.unsqueeze(1).expand(-1, R, -1, -1), more], 2)

    def _read_decoder(self, model: Any, inputs: dict[str, Any], paths: Tensor) -> Tensor:
        """Read the prompt once; where words part later than at their first token, go on from its cache."""
        B, R, L = paths.shape
        mask = inputs["attention_mask"]
        ends = mask.sum(1)  #                                                                [B]
        if L == 0:
            return self._logits_at(model, inputs, ends.unsqueeze(1) - 1).unsqueeze(1)
        out = model(**inputs, use_cache=True)
        first = out.logits[torch.arange(B, device=ends.device), ends - 1]  #                 [B, V]
        cache = out.cache
        cache.batch_repeat_interleave(R)
        more = model(
            input_ids=paths.reshape(B * R, L),
            attention_mask=torch.cat([mask, mask.new_ones(B, L)], 1).repeat_interleave(R, 0),
            position_ids=(ends.unsqueeze(1) + torch.arange(L, device=ends.device)).repeat_interleave(R, 0),
            cache=cache,
        ).logits.view(B, R, L, -1)
        return torch.cat([first.view(B, 1, 1, -1).expand(-1, R, -1, -1), more], 2)

    # --- generation ------------------------------------------------------------------------------------------------

    def generate(self, input_ids: Tensor, attention_mask: Tensor, tasks: Tensor) -> tuple[Tensor, list[str]]:
        """Write the answers token by token, greedily, as the paper scores them.

        Returns:
            Label ids or numbers, `UNPARSED` or NaN where what was written is no answer [B], and what was written.
        """
        lengths = torch.tensor([self.heads.longest(row) for row in tasks.tolist()], device=tasks.device)  # [B]
        tokenizer, longest = self.heads.tokenizer, int(lengths.max())
        tokens = self.write(input_ids, attention_mask, tasks, longest)  #                    [B, longest]
        beyond = torch.arange(longest, device=tokens.device) >= lengths.unsqueeze(1)  # another task's need
        texts = tokenizer.batch_decode(tokens.masked_fill(beyond, tokenizer.pad_token_id), skip_special_tokens=True)
        values = [self.heads.read(row, text) for row, text in zip(tasks.tolist(), texts, strict=True)]
        return torch.tensor(values, dtype=torch.float64), texts

    @torch.no_grad()
    def write(self, input_ids: Tensor, attention_mask: Tensor, tasks: Tensor, max_tokens: int) -> Tensor:
        """Write on, greedily, until the end token or `max_tokens` tokens.

        Returns:
            The tokens, padding behind the end token [B, max_tokens].
        """
        if not self.encodes:  # a decoder goes on at the end of the tensor
            shift = (1 - attention_mask).sum(1, keepdim=True)
            index = (torch.arange(input_ids.shape[1], device=input_ids.device) - shift) % input_ids.shape[1]
            input_ids, attention_mask = input_ids.gather(1, index), attention_mask.gather(1, index)
        tokenizer = self.heads.tokenizer

        def write(model: Any, given: dict[str, Any], at: Tensor) -> Tensor:
            out = model.generate(
                **given,
                max_new_tokens=max_tokens,
                do_sample=False,
                num_beams=1,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            out = out[:, 1:] if self.encodes else out[:, given["input_ids"].shape[1] if "input_ids" in given else 0 :]
            return F.pad(out, (0, max_tokens - out.shape[1]), value=tokenizer.pad_token_id)  # [b, max_tokens]

        return self.method.run(tasks, {"input_ids": input_ids, "attention_mask": attention_mask}, write)


def _walk(tree: Tree, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Go through a tree: the greedily chosen answer [b], and log p of all [b, C], from logits [b, R, L + 1, W]."""
    scores = logits.new_zeros(len(logits), tree.size, dtype=torch.float32)
    greedy = torch.ones(len(logits), tree.size, dtype=torch.bool, device=logits.device)
    for node in tree.nodes:
        among = logits[:, node.path, node.depth, node.columns.to(logits.device)].float().log_softmax(1)  # [b, m]
        taken = node.taken.to(logits.device)
        passing = (taken >= 0).nonzero().squeeze(1)
        scores[:, passing] += among[:, taken[passing]]
        greedy[:, passing] &= among.argmax(1, keepdim=True) == taken[passing]
    return greedy.int().argmax(1), scores


def method_config(method: Method) -> Any:
    """Return the backbone's own configuration, whatever is wrapped around it."""
    backbone: Any = method.backbone
    own = [module.config for module in backbone.modules() if hasattr(module, "config")]
    return next(config for config in own if hasattr(config, "is_encoder_decoder"))
