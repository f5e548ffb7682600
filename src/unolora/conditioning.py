"""How tasks and samples get from a call to the layers.

The backbone's `forward` and `generate` take two more arguments, `tasks` and `sample_mask`. Whoever calls them (a
`PeftModelFor*`, a plain `PeftModel`, the Trainer, a user), the hypernetwork runs once, its scales [B, P, R] are set for
this thread, and they are gone when the call ends, also by an exception. Gradient checkpointing gets them as an
argument, since its recomputation comes after the call.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from numbers import Integral, Number
from typing import Any

import torch
from torch import Tensor, nn

from unolora.config import UnoLoraConfig
from unolora.errors import InputError, unknown
from unolora.hypernetwork import encode_sample
from unolora.layer import current_scales, scaled_by
from unolora.words import Descriptions

Tasks = Tensor | Sequence[str] | Sequence[int] | str
"""Task rows [B] as a LongTensor, or their names (or rows) one for each sample, or one name for the whole batch."""

MORE_ARGUMENTS = ("tasks", "sample_mask")  # of a backbone's forward and generate
CACHES = ("cache", "past_key_values")  # the keys and values of earlier tokens, by today's name and the former
STEP_BY_STEP = (
    "when decoding step by step, wrap the loop in `with model.condition(tasks=..., input_ids=..., attention_mask=...):`"
)


class Conditioned:
    """Stands in for a backbone's `forward` or `generate`; takes `tasks` and `sample_mask` as well.

    Args:
        tuner: The `UnoLoraModel` of the backbone.
        method: What it stands in for.
        generates: Whether that is `generate`.
    """

    def __init__(self, tuner: Any, method: Callable[..., Any], *, generates: bool) -> None:
        self.tuner, self.method, self.generates = tuner, method, generates
        self.__name__, self.__doc__ = getattr(method, "__name__", ""), method.__doc__
        parameters = inspect.signature(method).parameters.values()
        self.names = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
        self.known = {*self.names, *(inspect.signature(tuner.model.forward).parameters if generates else ())}

    @property
    def __signature__(self) -> inspect.Signature:
        """The method's, and ours: the Trainer keeps the columns that it names, and so `tasks`."""
        signature = inspect.signature(self.method)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        rest = [p for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
        names = [name for name in MORE_ARGUMENTS if name not in signature.parameters]
        more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
        return signature.replace(parameters=own + more + rest)

    def __call__(self, *args: Any, tasks: Any = None, sample_mask: Any = None, **kwargs: Any) -> Any:
        """Call the method with the scales of these tasks and inputs set."""
        for name in kwargs:
            if name not in self.known:  # the backbone would swallow it silently
                for ours in MORE_ARGUMENTS:
                    if name.startswith("task") or difflib.SequenceMatcher(None, name, ours).ratio() > 0.75:
                        raise TypeError(f"unexpected argument {name!r}; did you mean {ours!r}?")
        inputs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if self.generates:
            inputs = self._of_generate(inputs)
        if tasks is not None and "tasks" in self.names:
            kwargs["tasks"] = tasks  # the backbone has a use for them too, as one with a head for each task
        with self.tuner.conditioned(tasks, sample_mask, inputs):
            return self.method(*args, **kwargs)

    def _of_generate(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Name what `generate` got as `forward` would; without a mask, leave padding out as `generate` does."""
        main = getattr(self.tuner.model, "main_input_name", "input_ids")
        if inputs.get("inputs") is not None:
            inputs = {**inputs, main: inputs["inputs"]}
        inputs = {**inputs, **dict.fromkeys(CACHES)}  # the tokens of a given cache are among the input_ids
        config = inputs.get("generation_config") or getattr(self.tuner.model, "generation_config", None)
        tokens = inputs.get("input_ids")
        if config is None or tokens is None or inputs.get("attention_mask") is not None:
            return inputs
        pad, eos = inputs.get("pad_token_id", config.pad_token_id), inputs.get("eos_token_id", config.eos_token_id)
        if pad is None or pad in (eos if isinstance(eos, list) else [eos]):
            return inputs
        return {**inputs, "attention_mask": tokens.ne(pad)}


class Checkpointed:
    """A model's checkpoint function, whose recomputation sees the scales of its own forward.

    They go in as an argument, not as part of a closure: re-entrant checkpointing gives gradients to arguments only.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoint `forward`, which gets the scales of now whenever it runs."""
        scales = current_scales()
        if not scales:
            return self.function(forward, *args, **kwargs)
        names = list(scales)

        def run(*inputs: Any) -> Any:
            with scaled_by(dict(zip(names, inputs, strict=False))):
                return forward(*inputs[len(names) :])

        return self.function(run, *scales.values(), *args, **kwargs)


def wrap_checkpointing(modules: Iterable[Any]) -> None:
    """Let the checkpoint functions of these modules, where they are on, see the scales of their own forward."""
    for module in modules:
        if module.gradient_checkpointing:
            function = module._gradient_checkpointing_func
            if not isinstance(function, Checkpointed):
                module._gradient_checkpointing_func = Checkpointed(function)


def scales_of(
    backbone: nn.Module,
    hypernetworks: Mapping[str, Any],
    configs: Mapping[str, UnoLoraConfig],
    tasks: Tasks,
    sample_mask: Tensor | None,
    inputs: dict[str, Any],
) -> dict[str, Tensor]:
    """Run the hypernetworks on the tasks and inputs of a call.

    Args:
        backbone: Whose input embeddings encode a sample.
        hypernetworks: Adapter name -> `Hypernetwork`, of the adapters to condition.
        configs: Adapter name -> its settings.
        tasks: The task of each sample.
        sample_mask: Tokens [B, T] that the sample encoding averages, if not the default ones.
        inputs: What the backbone's forward takes, by name.

    Returns:
        For each adapter, s for every sample and position, [B, P, R].

    Raises:
        InputError: Tasks are unknown or not one for each sample, an adapter has no words of its tasks yet, or the
            sample encoding has nothing to average.
    """
    batch = _batch_size(inputs)
    scales = {}
    for name, hypernetwork in hypernetworks.items():
        device = hypernetwork.scale_weight.device
        if isinstance(hypernetwork.task_embedding, Descriptions) and not len(hypernetwork.task_embedding.vectors):
            raise InputError(
                f"adapter {name!r} knows no words of its tasks yet; call "
                f"model.describe({{{configs[name].tasks[0]!r}: ['what it asks'], ...}}, tokenizer) first"
            )
        rows = task_rows(tasks, configs[name].tasks, batch).to(device)  # [B]
        sample = None
        if hypernetwork.bottleneck is not None:
            width = hypernetwork.bottleneck[0].in_features
            masked = configs[name].mask_padding
            sample = _sample_encoding(backbone, inputs, sample_mask, width, masked).to(device)  # [B, D]
        autocast = torch.amp.is_autocast_available(device.type)  # not on the meta device
        with torch.autocast(device.type, enabled=False) if autocast else nullcontext():
            scales[name] = hypernetwork(rows, sample)  #                           [B, P, R]
    return scales


def task_rows(tasks: Tasks, known: Sequence[str], batch: int | None) -> Tensor:
    """Turn tasks into rows of the task embedding.

    Args:
        tasks: See `Tasks`; one name stands for the whole batch.
        known: The names of the rows.
        batch: Number of samples that is expected, if known.

    Returns:
        LongTensor [B].

    Raises:
        InputError: A task is not known, or there is not one for each sample. Rows on an accelerator are left to the
            embedding's own check, since looking at them would wait for the device.
    """
    if isinstance(tasks, str):
        tasks = [tasks] * (batch or 1)
    if not isinstance(tasks, Tensor):
        if isinstance(tasks, Number) or not all(isinstance(task, str | Integral) for task in tasks):
            raise InputError(f"`tasks` must be names or rows, one for each sample, got {tasks!r}")
        rows = []
        for task in tasks:
            if isinstance(task, str) and task not in known:
                raise unknown("task", task, known)
            rows.append(known.index(task) if isinstance(task, str) else task)
        tasks = torch.tensor(rows, dtype=torch.long)
    if tasks.dim() != 1 or tasks.is_floating_point() or tasks.dtype == torch.bool:
        raise InputError(f"`tasks` must be a LongTensor [batch], got {tasks.dtype} of shape {list(tasks.shape)}")
    if batch is not None and len(tasks) != batch:
        raise InputError(f"`tasks` must name one task for each sample: got {len(tasks)} for a batch of {batch}")
    if tasks.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = tasks[(tasks < 0) | (tasks >= len(known))]
        if len(wrong):
            raise InputError(f"unknown task row {wrong[0].item()}: the rows are 0 to {len(known) - 1}")
    return tasks


def input_embeddings(backbone: nn.Module) -> Any:
    """Return the module that embeds tokens or patches, or None if the backbone names none."""
    try:
        return backbone.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None


def _sample_encoding(
    backbone: nn.Module, inputs: dict[str, Any], sample_mask: Tensor | None, width: int, masked: bool
) -> Tensor:
    """Average the input embeddings, [B, D]; those that are looked up here get no gradient through the scale."""
    embeddings, mask = _embedded(backbone, inputs, width)  #                            [B, T, D], [B, T]
    mask = mask if masked else None
    if sample_mask is not None:
        mask = sample_mask
    elif _decodes_only(backbone) and inputs.get("labels") is not None:
        mask = _prompt_mask(inputs["labels"], mask, embeddings)
    if mask is not None and getattr(mask, "shape", None) != embeddings.shape[:2]:
        found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(
            f"the mask of the sample encoding is {found}, the tokens are {list(embeddings.shape[:2])}; pass a "
            f"`sample_mask` [B, T], or, {STEP_BY_STEP}"
        )
    return encode_sample(embeddings, mask)


def _embedded(backbone: nn.Module, inputs: dict[str, Any], width: int) -> tuple[Tensor, Any]:
    """Return the input embeddings and the mask that comes with them, if any."""
    mask, embeddings = inputs.get("attention_mask"), inputs.get("inputs_embeds")
    past = [inputs[name] for name in CACHES if inputs.get(name) is not None]
    if _decodes_only(backbone) and past and past[0].get_seq_length():
        raise InputError(
            f"the tokens before these are in the cache, out of the sample encoding's sight; {STEP_BY_STEP}"
        )
    if embeddings is not None:
        return embeddings, mask
    lookup = input_embeddings(backbone)
    if lookup is None:
        return _features(inputs, width), mask
    name = getattr(backbone, "main_input_name", "input_ids")
    tokens = inputs.get(name)
    if tokens is None:
        raise InputError(
            f"the sample encoding needs `{name}` or `inputs_embeds`; where `encoder_outputs` are given, pass "
            f"the `{name}` that they came from as well, or use conditioning='task'"
        )
    if isinstance(lookup, nn.Embedding) and tokens.is_floating_point():
        raise InputError(f"`{name}` are no tokens, so the sample has no encoding; use conditioning='task'")
    larger = "interpolate_pos_encoding"  # images; some embeddings want to know
    more = {larger: True} if inputs.get(larger) and larger in inspect.signature(lookup.forward).parameters else {}
    with torch.no_grad():
        embeddings = lookup(tokens, **more)
    if embeddings.dim() == 4:  # a convolution's patches [B, D, H, W]
        embeddings = embeddings.flatten(2).transpose(1, 2)
    return embeddings, None if tokens.is_floating_point() else mask  # of an image, every patch counts


def _decodes_only(backbone: nn.Module) -> bool:
    """Whether the backbone is a causal language model."""
    can_generate = getattr(backbone, "can_generate", None)
    return bool(can_generate and can_generate() and not getattr(backbone.config, "is_encoder_decoder", False))


def _features(inputs: Mapping[str, Any], width: int) -> Tensor:
    """Find the input [B, T, D] or [B, D] of a backbone that embeds nothing itself."""
    for value in inputs.values():
        if (
            isinstance(value, Tensor)
            and value.is_floating_point()
            and value.dim() in (2, 3)
            and value.shape[-1] == width
        ):
            return value if value.dim() == 3 else value.unsqueeze(1)
    raise InputError(
        f"the sample encoding needs an input [B, T, {width}] or [B, {width}] (`sample_dim` is {width}); "
        "pass one, or use conditioning='task'"
    )


def _prompt_mask(labels: Tensor, mask: Any, embeddings: Tensor) -> Any:
    """Leave the targets of a causal language model out: the answer must not reach the scale."""
    if labels.shape != embeddings.shape[:2]:
        return mask
    prompt = labels == -100
    return prompt & mask.bool() if isinstance(mask, Tensor) and mask.shape == prompt.shape else prompt


def _batch_size(inputs: Mapping[str, Any]) -> int | None:
    """Return the number of samples, from the first tensor among the backbone's inputs."""
    for name in ("input_ids", "inputs_embeds", "pixel_values"):
        if inputs.get(name) is not None:
            return len(inputs[name])
    return next((len(value) for value in inputs.values() if isinstance(value, Tensor) and value.dim()), None)
