"""What an adapter's file must hold, and errors that say which file does not.

A file is checked twice: that it is whole, before anything is built (`config.check_weights_file`), and that it fits the
adapter in every task, projection and shape, before anything is copied (`check_state`).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME
from torch import Tensor

from unolora.config import PEFT_TYPE, WEIGHTS_NAME, check_weights_file
from unolora.errors import CheckpointError


class Checkpoint(dict[str, Tensor]):
    """The tensors of a weight file under PEFT's keys; remembers the file, so that an error can name it."""

    def __init__(self, tensors: Mapping[str, Tensor], source: str) -> None:
        super().__init__(tensors)
        self.source = source

    def copy(self) -> Checkpoint:
        """Return a copy of the same file."""
        return Checkpoint(self, self.source)

    def __missing__(self, key: str) -> Tensor:  # PEFT looks up the modules_to_save before it asks the tuner
        raise CheckpointError(
            f"{self.source}: other modules_to_save: expected {key}, found none; use the settings that it was trained "
            "with"
        )


def adapter_state(tuner: Any, adapter_name: str) -> dict[str, Tensor]:
    """Return all tensors of an adapter, by their keys in a `PeftModel`'s state."""
    state: dict[str, Tensor] = {}
    for name, layer in tuner.layers(adapter_name).items():
        state[f"base_model.model.{name}.uno_A.{adapter_name}"] = layer.uno_A[adapter_name].detach()
        state[f"base_model.model.{name}.uno_B.{adapter_name}"] = layer.uno_B[adapter_name].detach()
    if adapter_name in tuner.uno_hypernetwork:
        for name, value in tuner.uno_hypernetwork[adapter_name].state_dict().items():
            state[f"base_model.uno_hypernetwork.{adapter_name}.{name}"] = value
    return state


def check_state(tuner: Any, adapter_name: str, state: Mapping[str, Tensor], *, source: str) -> None:
    """Check that a checkpoint fits an adapter in every key, shape and row, before anything is copied.

    Args:
        tuner: The `UnoLoraModel` that the checkpoint is loaded into.
        adapter_name: Its adapter.
        state: The tensors under the model's keys.
        source: The file, for the message.

    Raises:
        CheckpointError: Another conditioning, other tasks, other targets, another rank or another width.
    """
    own = adapter_state(tuner, adapter_name)
    prefix = f"base_model.uno_hypernetwork.{adapter_name}."

    def refuse(what: str, expected: object, found: object, fix: str) -> CheckpointError:
        return CheckpointError(f"{source}: {what}: expected {expected}, found {found}; {fix}")

    conditionings = _conditioning(own), _conditioning(state)
    if conditionings[0] != conditionings[1]:
        raise refuse("another conditioning", *conditionings, "use the settings that it was trained with")
    if f"{prefix}rows" in state:
        expected, found = (json.loads(bytes(keys[f"{prefix}rows"].tolist())) for keys in (own, state))
        for what, fix in (("tasks", "give the same tasks in the same order"), ("positions", "use the same targets")):
            if expected[what] != found[what]:
                raise refuse(f"other {what}", *_difference(expected[what], found[what]), fix)
    missing, extra = own.keys() - state.keys(), state.keys() - own.keys() - _passengers(tuner, adapter_name)
    if missing or extra:
        raise refuse(
            "other targets or modules_to_save",
            f"{len(own)} tensors" + (f" with {min(missing)}" if missing else ""),
            f"{len(state)}" + (f" with {min(extra)}" if extra else ""),
            "use the settings that it was trained with",
        )
    for key, tensor in own.items():
        shapes = list(tensor.shape), list(state[key].shape)
        if shapes[0] != shapes[1]:
            rank = ".uno_A." in key and shapes[0][0] != shapes[1][0]
            what = "another rank" if rank else "another width"
            raise refuse(f"{what} of {key}", *shapes, "use the backbone and the settings that it was trained with")


def naming_the_file(load: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """Wrap PEFT's reading of a weight file: nobody else knows the file when the checks come.

    Other methods' folders are read as before.
    """

    @functools.wraps(load)
    def load_peft_weights(model_id: str, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        folder = Path(model_id, kwargs.get("subfolder") or "")
        file = folder / WEIGHTS_NAME
        if folder.is_dir():
            settings = folder / CONFIG_NAME
            if not settings.is_file() or json.loads(settings.read_text("utf-8")).get("peft_type") != PEFT_TYPE:
                return load(model_id, *args, **kwargs)
            check_weights_file(file)
        state = load(model_id, *args, **kwargs)
        return Checkpoint(state, str(file)) if any(".uno_" in key for key in state) else state

    return load_peft_weights


def _conditioning(state: Mapping[str, Tensor]) -> str:
    """Tell the conditioning from the hypernetwork's keys."""
    keys = [key for key in state if key.startswith("base_model.uno_hypernetwork.")]
    if not keys:
        return "none"
    if any(key.endswith(".task_embedding.vectors") for key in keys):
        return "text"
    return "task+sample" if any(key.endswith(".bottleneck.0.weight") for key in keys) else "task"


def _passengers(tuner: Any, adapter_name: str) -> set[str]:
    """Return the keys that may travel with an adapter: its modules_to_save, and resized embeddings."""
    keys = {f"base_model.{key}" for key in tuner.state_dict() if f".modules_to_save.{adapter_name}." in key}
    embeddings = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        with suppress(AttributeError, NotImplementedError):
            embeddings.append(getattr(tuner.model, getter)())
    for name, module in tuner.model.named_modules():
        if any(module is each for each in embeddings):
            keys |= {f"base_model.model.{name}.{key}" for key in module.state_dict()}
    return keys


def _difference(expected: Sequence[str], found: Sequence[str]) -> tuple[str, str]:
    """Describe where two lists of names first differ."""
    row = next(i for i, pair in enumerate(zip_longest(expected, found)) if pair[0] != pair[1])
    return tuple(  # type: ignore[return-value]
        f"{len(names)} with {names[row]!r} at row {row}" if row < len(names) else f"{len(names)}"
        for names in (expected, found)
    )
