"""What all methods have in common: a backbone, and what the tasks of a batch change while it runs.

Axes: B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unolora.errors import InputError


class Method(nn.Module):
    """A backbone under a method. As it stands, it does the same for every task.

    A method with a part for each task overrides `condition`; one that puts tokens in front of the input, `embed`.

    Args:
        backbone: The (adapted) backbone, whose trainable parameters are those of the method.
    """

    mixes = True
    """Whether one pass of the backbone takes rows of several tasks; if not, a batch is run task by task."""
    base: Mapping[str, str] = {}
    """Hashes of the backbone as it was loaded, see `runs.fingerprint`."""

    backbone_parameters = 0
    """How many parameters the backbone had before the method changed it; `runs.build` says."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    @contextmanager
    def condition(self, tasks: Tensor, inputs: dict[str, Any]) -> Iterator[Any]:
        """Give the backbone to run, in a context in which it knows the tasks.

        Inside, it may be run several times and in parts (encoder, then decoder), on B rows or on B x copies in
        `repeat_interleave` order.

        Args:
            tasks: Rows of the tasks [B]; all the same where the method does not mix.
            inputs: `input_ids` and `attention_mask` [B, T], without what `embed` puts in front.
        """
        yield self.backbone

    def embed(self, tasks: Tensor, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs of the backbone; tokens of the method's own go in front, masked in.

        Args:
            tasks: Rows of the tasks [B].
            inputs: `input_ids`, `attention_mask` [B, T] and what else the tokenizer gives.
        """
        return inputs

    def run(
        self, tasks: Tensor, inputs: dict[str, Tensor], call: Callable[[Any, dict[str, Any], Tensor], Tensor]
    ) -> Tensor:
        """Run a batch of any mix of tasks: at once, or task by task where the method can't mix.

        Args:
            tasks: Rows of the tasks [B].
            inputs: What the tokenizer gives, [B, T] each.
            call: call(backbone, inputs, places) -> [b, ...] on the rows `places` [b] of the batch.

        Returns:
            The results in the order of the batch [B, ...].
        """
        places = torch.arange(len(tasks), device=tasks.device)
        groups = [places] if self.mixes else [places[tasks == task] for task in tasks.unique()]
        parts = []
        for group in groups:
            own = inputs if len(groups) == 1 else {name: value[group] for name, value in inputs.items()}
            with self.condition(tasks[group], own) as backbone:
                parts.append(call(backbone, self.embed(tasks[group], own), group))
        return parts[0] if len(parts) == 1 else torch.cat(parts)[torch.cat(groups).argsort()]

    def forward(self, tasks: Tensor, **inputs: Tensor) -> Tensor:
        """Return the last hidden states [B, T, D] of the input's tokens."""
        length = inputs["input_ids"].shape[1]
        return self.run(tasks, inputs, lambda backbone, given, _: backbone(**given).last_hidden_state[:, -length:])


def tasks_of_rows(x: Tensor, tasks: Tensor) -> Tensor:
    """Return the task of each row of a layer's input or output.

    Args:
        x: [N, ...], N = B or B x copies (beams) in `repeat_interleave` order.
        tasks: Rows of the tasks [B].

    Returns:
        [N].

    Raises:
        InputError: The rows are not copies of the batch's.
    """
    copies, rest = divmod(len(x), len(tasks))
    if rest:
        raise InputError(
            f"a layer got {len(x)} rows for a batch of {len(tasks)}; inside `condition`, run its rows or equally many "
            "copies of each"
        )
    return tasks if copies == 1 else tasks.repeat_interleave(copies)


@contextmanager
def adding(updates: Iterable[tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]], tasks: Tensor) -> Iterator[None]:
    """Add to what projections give, for as long as the context lasts.

    Args:
        updates: Projections, and for each a function of its input [N, T, D_in] and the tasks of the rows [N] that
            returns what is added [N, T, D_out].
        tasks: Rows of the tasks [B].
    """

    def hook(update: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
        return lambda _, inputs, y: y + update(inputs[0], tasks_of_rows(y, tasks)).to(y.dtype)

    with ExitStack() as hooks:
        for projection, update in updates:
            hooks.callback(projection.register_forward_hook(hook(update)).remove)
        yield
