"""A task's vector from its words, so that a task that nobody trained has a scale too (`conditioning="text"`).

    v      = mean over tokens of the frozen backbone's last states, of a description
    e_task = W v + c                                                            in place of a learned row

States rather than input embeddings: they know the order of the words, and need nothing beside the backbone. They are
computed once, when a task gets its words, and saved with the adapter.

Axes: B batch, T tokens, D width of the states, d width of e_task, C directions, K tasks, N descriptions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unolora.errors import InputError
from unolora.hypernetwork import encode_sample

NO_END = 10**9  # tokens; a tokenizer without a limit says more


class Descriptions(nn.Module):
    """Gives e_task [B, d] for tasks [B] that have descriptions.

    Of a state only the directions count in which the first tasks' descriptions differ: W has learned nothing of the
    others, and would answer at random. So words that are like none of theirs come near v = 0, their middle.

    In training, with gradients, each row draws one of its task's descriptions, from torch's generator. Otherwise the
    first one counts.

    Args:
        num_tasks: K.
        width: D, of the backbone's states.
        embedding_dim: d, of e_task.
    """

    vectors: Tensor  # [N, D], those of a task side by side
    counts: Tensor  # [K], how many each task has
    middle: Tensor  # [D]
    basis: Tensor  # [C, D], the directions that count
    size: Tensor  # [], with which v has entries around 1

    def __init__(self, num_tasks: int, width: int, embedding_dim: int) -> None:
        super().__init__()
        self.map = nn.Linear(width, embedding_dim)
        self.register_buffer("vectors", torch.zeros(0, width))
        self.register_buffer("counts", torch.zeros(num_tasks, dtype=torch.long))
        self.register_buffer("middle", torch.zeros(width))
        self.register_buffer("basis", torch.zeros(0, width))
        self.register_buffer("size", torch.ones(()))

    def settle(self, states: Tensor) -> None:
        """Fix middle, directions and size by the mean states [N, D] of the first tasks' descriptions."""
        self.middle = states.mean(dim=0)
        apart = states - self.middle
        _, singular, directions = torch.linalg.svd(apart, full_matrices=False)
        self.basis = directions[singular > 1e-4 * singular[0]]
        self.size = apart.square().mean().sqrt().clamp(min=1e-12)

    def standardised(self, states: Tensor) -> Tensor:
        """Turn mean states [n, D] into v [n, D]."""
        return (states - self.middle) @ self.basis.T @ self.basis / self.size

    def rows(self) -> list[Tensor]:
        """Return each task's v's, [n, D]."""
        return list(self.vectors.split(self.counts.tolist()))

    def put(self, rows: Sequence[Tensor]) -> None:
        """Replace all tasks' v's."""
        self.counts = torch.tensor([len(row) for row in rows], device=self.counts.device)
        self.vectors = torch.cat([row.to(self.middle) for row in rows])

    def forward(self, tasks: Tensor) -> Tensor:
        """Return e_task [B, d] of the tasks [B]."""
        counts = self.counts[tasks]
        chosen = self.counts.cumsum(0)[tasks] - counts  # the first
        if self.training and torch.is_grad_enabled():
            chosen = chosen + (torch.rand(len(tasks), device=tasks.device) * counts).long()
        e_task: Tensor = self.map(self.vectors[chosen])
        return e_task


def width(model: nn.Module) -> int:
    """Return D of a backbone that reads words.

    Raises:
        InputError: It reads something else, or does not say how wide its states are.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(text, "hidden_size", None)
    if getattr(model, "main_input_name", None) != "input_ids" or not isinstance(found, int):
        raise InputError(
            f"conditioning 'text' needs a transformers model that reads words, to encode descriptions, not "
            f"{type(model).__name__}; use conditioning 'task'"
        )
    return found


def positions(backbone: nn.Module) -> int | None:
    """Return how many tokens a backbone's table of positions takes, or None where it has no end."""
    limit: int | None = getattr(backbone.config, "max_position_embeddings", None)
    for name, module in backbone.named_modules():
        offset = getattr(module, "padding_idx", None)
        if limit and name.endswith("position_embeddings") and offset is not None:
            limit -= offset + 1  # RoBERTa counts from there
    return limit


@torch.no_grad()
def encode(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Return the mean last state of each text [N, D], in float32. Adapters and dropout are for the caller to turn off.

    Raises:
        InputError: A text has no tokens.
    """
    limit = min(tokenizer.model_max_length, positions(model) or NO_END)
    cut = {"truncation": True, "max_length": limit} if limit < NO_END else {}
    reader = model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model
    device = next(model.parameters()).device
    found = []
    for text in texts:  # one at a time: neither padding nor neighbours change a digit
        ids = torch.tensor([tokenizer(text, **cut)["input_ids"]], device=device)
        if not ids.numel():
            raise InputError(f"description {text!r} has no tokens; write what the task asks")
        states = reader(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
        found.append(encode_sample(states.hidden_states[-1]).float()[0])
    return torch.stack(found)
