"""The adapter's settings, one spelling from YAML to checkpoint."""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from peft import PeftConfig
from safetensors import SafetensorError, safe_open

from unolora.errors import CheckpointError, InputError, unknown

PEFT_TYPE = "UNOLORA"
WEIGHTS_NAME = "adapter_model.safetensors"
QUERY_VALUE = "query-value"
"""In `target_modules`: the query and value projections, whatever the backbone's family calls them."""

Conditioning = Literal["none", "task", "task+sample", "text"]
ScaleInit = Literal["one", "paper"]


@dataclass
class UnoLoraConfig(PeftConfig):
    """Settings of one UnoLoRA adapter; pass it to `peft.get_peft_model`.

    Args:
        tasks: Names of the tasks; task t owns row t of the task embedding. May be empty when `conditioning` is "none".
        r: Rank of the shared pair A [r, d_in], B [d_out, r].
        alpha: The update is multiplied by alpha / r.
        use_rslora: Multiply by alpha / sqrt(r) instead, so that a larger rank does not mean smaller steps
            (Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA").
        dropout: Dropout on the input of A, during training.
        target_modules: Names (suffixes) or a regular expression of the projections to adapt, "all-linear", or
            "query-value": the query and value projections, as the paper and PEFT's LoRA have them. By default these
            too, but for BERT: there the second maps of the feed-forward parts, which did better (docs/method.md).
        exclude_modules: Names or a regular expression of projections to leave alone.
        layers_to_transform: Indices of the blocks to adapt; all by default.
        modules_to_save: Modules beside the adapter that are trained and saved whole.
        conditioning: What the rank-wise scale s depends on: "none" (UnoLoRA, s = 1), "task" (static per task, can be
            merged), "task+sample" (UnoLoRA*) or "text" (static per task, from its description; see
            `UnoLoraModel.describe`).
        embedding_dim: Width d_e of the task and position embeddings.
        bottleneck_dim: Width d_b of the bottleneck MLP on the sample encoding.
        sample_dim: Width d_s of the sample encoding: the width of the backbone's input embeddings, found by itself;
            a number given here is checked against it.
        scale_init: "one": s = 1 + S(e_t), which starts around 1 and differs between tasks. "paper": s = S(e_t), which
            starts near zero.
        scale_gate: Bound the scale: s = 1 + tanh(S(e_t)), or tanh(S(e_t)) with `scale_init="paper"`.
        shared_scale_map: One map S for all projections, told apart by their positions alone, instead of one for each.
        mask_padding: Whether the sample encoding leaves out padding. Without, as in the paper's code, a sample's scale
            depends on how far its batch was padded.
        num_positions: Rows of the position embedding. By default one for each adapted projection; fewer rows are shared
            modulo their number, as the paper's code does with 48 rows for T5-base's 72 projections.

    Raises:
        InputError: A value makes no sense; the message says which and what would.
    """

    tasks: list[str] = field(default_factory=list)
    r: int = 8
    alpha: float = 16
    use_rslora: bool = False
    dropout: float = 0.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    modules_to_save: list[str] | None = None
    conditioning: Conditioning = "task+sample"
    embedding_dim: int = 8
    bottleneck_dim: int = 16
    sample_dim: int | None = None
    scale_init: ScaleInit = "one"
    scale_gate: bool = False
    shared_scale_map: bool = False
    mask_padding: bool = True
    num_positions: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        self.tasks = task_names(self.tasks)
        check_adapter(self)
        if self.conditioning != "none" and not self.tasks:
            raise InputError(f"conditioning {self.conditioning!r} needs `tasks`: the names, one for each row")
        named = self.target_modules == QUERY_VALUE
        if isinstance(self.target_modules, str) and not named and self.layers_to_transform is not None:
            raise InputError(
                f"`layers_to_transform` goes with a list of names in `target_modules`, got {self.target_modules!r}; "
                "say the layers in the expression"
            )
        if isinstance(self.modules_to_save, str):
            raise InputError(f"`modules_to_save` must be a list of names, got {self.modules_to_save!r}")
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # as PEFT's own configs do
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]

    @classmethod
    def paper(cls, tasks: list[str], **overrides: Any) -> UnoLoraConfig:
        """Return UnoLoRA* as in the paper's code: on query and value, 48 shared positions, s from zero, dropout 0.1.

        On T5-base with 10 task rows it has 904,176 trainable parameters; with one position for each of the 72
        projections (`num_positions=None`) it has 904,368, that is 24 more rows of 8.
        """
        theirs = {"target_modules": QUERY_VALUE, "dropout": 0.1, "scale_init": "paper", "num_positions": 48}
        return cls(tasks=tasks, **{**theirs, **overrides})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Load the settings; weights beside them are checked to be whole before anything is built from them.

        Raises:
            CheckpointError: The weight file is truncated or not UnoLoRA's.
        """
        file = Path(os.fspath(pretrained_model_name_or_path), subfolder or "", WEIGHTS_NAME)
        if file.is_file():
            check_weights_file(file)
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)


def check_adapter(settings: Any) -> None:
    """Refuse adapter settings that make no sense.

    Args:
        settings: Anything with the adapter fields of `UnoLoraConfig`.

    Raises:
        InputError: With the field, what was expected and what came.
    """
    for name in ("r", "embedding_dim", "bottleneck_dim", "sample_dim", "num_positions"):
        value = getattr(settings, name)
        if value is None and name in ("sample_dim", "num_positions"):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"`{name}` must be a whole number of at least 1, got {value!r}")
    if not isinstance(settings.alpha, int | float) or not math.isfinite(settings.alpha) or settings.alpha <= 0:
        raise InputError(f"`alpha` must be a positive number, got {settings.alpha!r}")
    if not isinstance(settings.dropout, int | float) or not 0 <= settings.dropout < 1:
        raise InputError(f"`dropout` must be at least 0 and below 1, got {settings.dropout!r}")
    for name in ("use_rslora", "scale_gate", "shared_scale_map", "mask_padding"):
        if not isinstance(getattr(settings, name), bool):
            raise InputError(f"`{name}` must be true or false, got {getattr(settings, name)!r}")
    if settings.conditioning not in get_args(Conditioning):
        raise unknown("conditioning", settings.conditioning, get_args(Conditioning))
    if settings.scale_init not in get_args(ScaleInit):
        raise unknown("scale_init", settings.scale_init, get_args(ScaleInit))


def check_weights_file(path: Path) -> None:
    """Check that an adapter's weight file is a whole safetensors file with UnoLoRA's tensors in it.

    Raises:
        CheckpointError: It is missing, truncated, not safetensors, or another method's.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; an adapter folder holds adapter_config.json and {WEIGHTS_NAME}")
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {_what_is_broken(path)} ({error})") from error
    if not any(".uno_" in key for key in keys):
        raise CheckpointError(
            f"{path}: expected UnoLoRA's tensors (uno_A, uno_B), found {len(keys)} others such as {keys[:2]}; "
            "this file belongs to another method"
        )


def _what_is_broken(path: Path) -> str:
    """Say how a file that safetensors refuses differs from a whole one, from the length in its first 8 bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 0 < length <= 100_000_000:
            return f"not a safetensors file ({size} bytes); copy it again from where it was trained"
        try:
            tensors = json.loads(file.read(length))
            expected = 8 + length + max(t["data_offsets"][1] for name, t in tensors.items() if name != "__metadata__")
        except (ValueError, KeyError, TypeError, AttributeError):
            expected = 8 + length
    return f"truncated or damaged: expected {expected} bytes, found {size}; copy it again from where it was trained"


def task_names(tasks: Any) -> list[str]:
    """Return names of tasks as a list.

    Raises:
        InputError: They are no list of names, or one of them comes twice.
    """
    if isinstance(tasks, str) or not all(isinstance(task, str) and task for task in tasks):
        raise InputError(f"`tasks` must be a list of names, got {tasks!r}")
    names = list(tasks)
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InputError(f"`tasks` names {', '.join(map(repr, repeated))} more than once; each task owns one row")
    return names
