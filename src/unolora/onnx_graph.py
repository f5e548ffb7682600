"""A backbone with one task merged in, as an ONNX graph that runs without torch.

    heads             input_ids, attention_mask, ...                     -> logits [B, C], or the number [B, 1]
    decoder           input_ids, attention_mask                          -> logits [B, T, V]
    encoder-decoder   input_ids, attention_mask, decoder_input_ids       -> logits [B, L, V]

Batch and lengths are free. A graph of a language model has no cache: each token is a pass over all before it, which
suits answers of a few tokens.

Axes: B batch, T tokens, L tokens of the answer, D width, C outputs of the head, V vocabulary.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unolora.errors import InputError
from unolora.hypernetwork import encode_sample

LARGEST = 1_800_000_000
"""Bytes of weights that go into the graph's own file, which can't be larger than 2 GiB; more go beside it."""


def check_installed() -> None:
    """Refuse to start where the exporter's packages are missing.

    Raises:
        InputError: With what to install.
    """
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise InputError(
            f"format 'onnx' needs {' and '.join(missing)}, not installed here: pip install 'unolora[onnx]'"
        )


def write_onnx(model: nn.Module, example: Mapping[str, Tensor], path: Path) -> None:
    """Trace a model and write its graph.

    Args:
        model: Called with the example's tensors by name, in their order; returns one tensor.
        example: Inputs [B, T] with at least two rows and two tokens, since a 1 would be taken for fixed.
        path: The file; weights that don't fit into it go beside it.
    """
    free = tuple({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for _ in example)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it tells of packages that no text model needs
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own, about torch's internals
            torch.onnx.export(
                _ByPlace(model.eval(), list(example)),
                tuple(example.values()),
                str(path),
                input_names=list(example),
                output_names=["out"],
                dynamic_shapes=(free,),
                dynamo=True,
                external_data=size > LARGEST,
                verbose=False,
            )
    finally:
        logger.setLevel(level)


class WithHead(nn.Module):
    """An encoder and the head of one task on the mean of its last states.

    Args:
        encoder: With the task merged in.
        weight: [C, D].
        bias: [C].
        mean, std: Of the training targets of a regression, [1]; None for a classification.
    """

    def __init__(
        self, encoder: nn.Module, weight: Tensor, bias: Tensor, mean: Tensor | None = None, std: Tensor | None = None
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(weight.shape[1], weight.shape[0])
        # Of a regression, the way back to its own units becomes part of the map.
        with torch.no_grad():
            self.head.weight.copy_(weight if std is None else weight * std)
            self.head.bias.copy_(bias if std is None or mean is None else bias * std + mean)

    def forward(self, **inputs: Tensor) -> Tensor:
        """Return logits [B, C], or the number [B, 1]."""
        states = self.encoder(**inputs).last_hidden_state  # [B, T, D]
        out: Tensor = self.head(encode_sample(states, inputs["attention_mask"]))
        return out


class Logits(nn.Module):
    """A language model that returns its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        """Return logits [B, T, V], or [B, L, V] of an encoder-decoder."""
        logits: Tensor = self.model(**inputs, use_cache=False).logits
        return logits


class _ByPlace(nn.Module):
    """Takes by place what a model takes by name, as the tracer gives it."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, list(names)

    def forward(self, *tensors: Tensor) -> Any:
        return self.model(**dict(zip(self.names, tensors, strict=True)))
