"""What a run is made of: the YAML file, the flags and the Python call share these dataclasses.

Each field's docstring is its `--help`. A value that makes no sense is refused here, before anything is read or written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from unolora.errors import InputError, unknown
from unolora.sampling import STRATEGIES

SCHEDULES = ("constant", "linear", "cosine")
PRECISIONS = ("fp32", "bf16", "auto")
FORMS = ("auto", "heads", "text")
SCORINGS = ("labels", "generation")
QUANTISATIONS = ("none", "int8", "int4", "bnb-8bit", "bnb-4bit")


@dataclass
class Adapter:
    """The adapter, in the names of `UnoLoraConfig`; methods without a part of it leave that part alone."""

    r: int = 8
    """rank of the shared pair"""
    alpha: float = 16
    """the update is multiplied by alpha / r"""
    use_rslora: bool = False
    """multiply it by alpha / sqrt(r) instead"""
    dropout: float = 0.0
    """dropout on the input of A, during training"""
    target_modules: list[str] | str | None = None
    """projections to adapt (suffixes, a regular expression, 'all-linear' or 'query-value'); by default BERT's second
    feed-forward maps, of other backbones query and value"""
    conditioning: str = "task+sample"
    """what the rank-wise scale depends on: none (UnoLoRA), task, task+sample (UnoLoRA*), or text (the task's words)"""
    embedding_dim: int = 8
    """width of the task and position embeddings"""
    bottleneck_dim: int = 16
    """width of the bottleneck on the sample encoding"""
    scale_init: str = "one"
    """one: s = 1 + S(e); paper: s = S(e)"""
    scale_gate: bool = False
    """bound the scale: tanh(S(e)) in the place of S(e)"""
    shared_scale_map: bool = False
    """one map S for all projections instead of one for each"""
    mask_padding: bool = True
    """whether the sample encoding leaves out padding, which the paper's code counts"""
    num_positions: int | None = None
    """rows of the position embedding; by default one for each adapted projection"""
    sample_dim: int | None = None
    """width of the sample encoding; by default that of the backbone's input embeddings"""

    def __post_init__(self) -> None:
        from unolora.config import check_adapter

        _check_types(self)
        check_adapter(self)


@dataclass
class Rivals:
    """What only rivals have, by default as their papers choose it for T5-base."""

    hyperformer_dim: int = 24
    """HyperFormer++: width of its adapters"""
    hyperformer_embedding_dim: int = 64
    """HyperFormer++: width of what its hypernetwork maps to an adapter's weights"""
    mtl_lora_ups: int = 3
    """MTL-LoRA: how many B's share an A"""
    mtl_lora_temperature: float = 0.5
    """MTL-LoRA: temperature of the softmax that mixes them"""
    poly_skills: int = 4
    """Poly and C-Poly: LoRAs that a task mixes"""
    prompt_tokens: int = 100
    """multitask prompt tuning: tokens in front of the input"""

    def __post_init__(self) -> None:
        _check_types(self)
        names = ("hyperformer_dim", "hyperformer_embedding_dim", "mtl_lora_ups", "poly_skills", "prompt_tokens")
        _at_least(self, 1, *names)
        _above_zero(self, "mtl_lora_temperature")


@dataclass
class Data:
    """How rows become tokens."""

    root: str | None = None
    """folder that relative file names start from; by default the folder of the YAML file"""
    max_length: int = 128
    """tokens kept of an input; longer ones are cut"""
    limit: int | None = None
    """at most this many rows of each split, for trying things out"""
    evaluation_limit: int | None = None
    """at most this many rows of the validation and test splits; by default `limit`"""

    def __post_init__(self) -> None:
        _check_types(self)
        _at_least(self, 4, "max_length")
        _at_least(self, 1, "limit", "evaluation_limit")


@dataclass
class Sampling:
    """Which task the rows of a batch come from."""

    strategy: str = "temperature"
    """proportional (to the number of rows), temperature, or equal"""
    temperature: float = 10.0
    """p ~ n^(1/temperature): 1 is proportional, large is equal"""
    limit: int | None = None
    """a task counts as having at most this many rows (K of the paper)"""
    mixed: bool = True
    """whether a batch mixes tasks, or holds one"""

    def __post_init__(self) -> None:
        _check_types(self)
        if self.strategy not in STRATEGIES:
            raise unknown("sampling.strategy", self.strategy, STRATEGIES)
        _above_zero(self, "temperature")
        _at_least(self, 1, "limit")


@dataclass
class Training:
    """The optimiser and its schedule, the same for every method."""

    steps: int = 1000
    """optimiser steps"""
    batch_size: int = 32
    """rows of an optimiser step, over all processes and accumulation steps"""
    learning_rate: float = 1e-3
    """peak learning rate of AdamW"""
    b_rate_ratio: float = 1.0
    """learning rate of the B's of UnoLoRA and LoRA, in multiples of learning_rate (LoRA+)"""
    hypernetwork_rate_ratio: float = 1.0
    """learning rate of the hypernetwork of UnoLoRA* or HyperFormer++, in multiples of learning_rate"""
    weight_decay: float = 0.01
    """decoupled weight decay, not on biases and norms"""
    warmup_steps: int = 0
    """steps over which the learning rate rises from zero"""
    schedule: str = "cosine"
    """constant, linear or cosine decay after the warm-up"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to at most this norm"""
    gradient_accumulation: int = 1
    """parts that a step's batch is cut into, to save memory"""
    evaluate_every: int = 100
    """steps between evaluations on the validation splits"""
    log_every: int = 10
    """steps between lines of metrics.jsonl"""
    conflict_every: int | None = None
    """steps between lines of metrics.jsonl with the cosines between the tasks' gradients; by default none"""
    checkpoint_every: int | None = None
    """steps between checkpoints to resume from; by default evaluate_every"""
    keep_checkpoints: int = 2
    """how many of them stay"""
    average_last: int = 1
    """in the end, also try the mean of the weights of this many last checkpoints, and keep it if it validates better"""
    seed: int = 0
    """of the weights, the batches and dropout"""
    precision: str = "fp32"
    """fp32, bf16 (autocast), or auto: bf16 where the device has instructions for it"""
    max_skipped: int = 5
    """a step whose loss or gradient is not finite is skipped; training stops after so many in a row"""
    test: bool = True
    """score the test split in the end; a run that settings are chosen by leaves it alone"""
    deterministic: bool = False
    """use only operations that give the same bits each time, also on a GPU, where they may be slower"""
    report_to: list[str] = field(default_factory=list)
    """the Trainer's integrations to log to as well, e.g. tensorboard, wandb, mlflow, trackio"""

    def __post_init__(self) -> None:
        _check_types(self)
        names = ("steps", "batch_size", "gradient_accumulation", "evaluate_every", "log_every", "keep_checkpoints")
        _at_least(self, 1, *names, "checkpoint_every", "max_skipped", "conflict_every", "average_last")
        _at_least(self, 0, "warmup_steps", "seed", "weight_decay")
        _above_zero(self, "learning_rate", "max_grad_norm", "b_rate_ratio", "hypernetwork_rate_ratio")
        if self.seed >= 2**32:
            raise InputError(f"`training.seed` must be below 2^32, which is all that NumPy takes, got {self.seed}")
        if self.schedule not in SCHEDULES:
            raise unknown("training.schedule", self.schedule, SCHEDULES)
        if self.precision == "fp16":
            raise InputError(
                "`training.precision` can't be fp16: T5, and others that were trained in bf16, overflow its largest "
                "number, 65504, and give NaN; use bf16, which is as fast and has fp32's range, or fp32"
            )
        if self.precision not in PRECISIONS:
            raise unknown("training.precision", self.precision, PRECISIONS)
        if self.average_last > self.keep_checkpoints:
            raise InputError(
                f"`training.average_last` {self.average_last} needs as many checkpoints, and "
                f"`training.keep_checkpoints` keeps {self.keep_checkpoints}; raise it"
            )
        if self.batch_size % self.gradient_accumulation:
            raise InputError(
                f"`training.batch_size` {self.batch_size} can't be cut into {self.gradient_accumulation} equal parts; "
                "choose a `gradient_accumulation` that divides it"
            )


@dataclass
class Settings:
    """One run: a backbone, a method, tasks."""

    backbone: str = "minilm"
    """minilm (comes by pip, no hub), a folder, or a model on the hub"""
    quantization: str = "none"
    """bits of the frozen backbone: none, int8 or int4 (torchao), bnb-8bit or bnb-4bit (bitsandbytes)"""
    method: str = "unolora"
    """what is trained: unolora, or a rival (`unolora.methods.METHODS`)"""
    tasks: list[Any] = field(default_factory=list)
    """names of built-in tasks, or mappings that define one (see examples/two_csv)"""
    answers: str = "auto"
    """heads: a head for each task on an encoder; text: a language model reads a prompt and writes the answer; auto:
    text for encoder-decoders and language models, else heads"""
    scoring: str = "labels"
    """how answers of text are found: labels (every possible one scored in one pass) or generation (token by token)"""
    baselines: list[str] = field(default_factory=list)
    """methods to train beside it with the same settings, for the report"""
    adapter: Adapter = field(default_factory=Adapter)
    """the adapter"""
    rivals: Rivals = field(default_factory=Rivals)
    """what only rivals have"""
    data: Data = field(default_factory=Data)
    """the data"""
    sampling: Sampling = field(default_factory=Sampling)
    """the batches"""
    training: Training = field(default_factory=Training)
    """the optimiser"""
    output: str | None = None
    """run folder to write; by default runs/NAME of the YAML file"""
    overwrite: bool = False
    """replace the run that is in the output folder"""

    def __post_init__(self) -> None:
        from unolora.methods import METHODS

        _check_types(self)
        for method in [self.method, *self.baselines]:
            if method not in METHODS:
                raise unknown("method", method, METHODS)
        if self.quantization not in QUANTISATIONS:
            raise unknown("quantization", self.quantization, QUANTISATIONS)
        full = [method for method in [self.method, *self.baselines] if method.startswith("full")]
        if self.quantization != "none" and full:
            raise InputError(
                f"method {full[0]!r} trains the backbone's own weights, which a `quantization` of "
                f"{self.quantization!r} replaces; leave one of the two out"
            )
        if self.answers not in FORMS:
            raise unknown("answers", self.answers, FORMS)
        if self.scoring not in SCORINGS:
            raise unknown("scoring", self.scoring, SCORINGS)
        if not self.tasks:
            raise InputError("`tasks` is empty; name at least one (`unolora tasks` lists the built-in ones)")


SECTIONS: dict[str, type[Any]] = {
    "adapter": Adapter,
    "rivals": Rivals,
    "data": Data,
    "sampling": Sampling,
    "training": Training,
}


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {  # its Table 2, and its code where that says more
        "method": "unolora",
        "adapter": {
            "r": 8,
            "alpha": 16,
            "dropout": 0.1,
            "target_modules": "query-value",
            "conditioning": "task+sample",
            "embedding_dim": 8,
            "bottleneck_dim": 16,
            "num_positions": 48,
            "scale_init": "paper",
        },
        "scoring": "generation",
        "data": {"max_length": 512},
        "sampling": {"strategy": "temperature", "temperature": 10, "mixed": False},
        "training": {
            "steps": 262_144,
            "batch_size": 32,
            "learning_rate": 1e-4,
            "weight_decay": 0.01,
            "warmup_steps": 1000,
            "schedule": "cosine",
            "evaluate_every": 29_535,
        },
    }
}
"""What a file or a flag `preset` starts from, in the place of the defaults."""


def merged(settings: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with some replaced, section by section."""
    both = dict(settings)
    for name, value in own.items():
        below = both.get(name, {})
        sections = name in SECTIONS and isinstance(below, dict) and isinstance(value, dict)
        both[name] = {**below, **value} if sections else value
    return both


def preset(name: Any) -> dict[str, Any]:
    """Return the settings of a preset.

    Raises:
        InputError: There is none of that name.
    """
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return PRESETS[name]


def to_dict(settings: Settings) -> dict[str, Any]:
    """Return the settings as plain data, for YAML."""
    return asdict(settings)


def flat(settings: Settings) -> dict[str, Any]:
    """Return the settings as `section.name` -> value."""
    found: dict[str, Any] = {}
    for name, value in to_dict(settings).items():
        found |= {f"{name}.{key}": v for key, v in value.items()} if name in SECTIONS else {name: value}
    return found


def from_dict(data: dict[str, Any]) -> Settings:
    """Build settings from plain data; a `preset` in it stands for its settings, of which those beside it win.

    Raises:
        InputError: A key is not known (with the nearest one), a section is not a mapping, or a value makes no sense.
    """
    check_keys(data)
    if "preset" in data:
        data = merged(preset(data["preset"]), {name: value for name, value in data.items() if name != "preset"})
    return Settings(**{k: SECTIONS[k](**v) if k in SECTIONS else v for k, v in data.items()})


def check_keys(data: dict[str, Any]) -> None:
    """Refuse names that no setting has.

    Raises:
        InputError: With the nearest name, or a section that is not a mapping.
    """
    _check(Settings, data, "")
    for name, section in SECTIONS.items():
        if name in data:
            _check(section, data[name], f"{name}.")


def _check(cls: type[Any], data: Any, where: str) -> None:
    if not isinstance(data, dict):
        raise InputError(f"`{where.rstrip('.')}` must be a mapping of names to values, got {data!r}")
    known = [f"{where}{f.name}" for f in fields(cls)] + ["preset"] * (cls is Settings)
    for key in data:
        if f"{where}{key}" not in known:
            raise unknown("setting", f"{where}{key}", known)


def _check_types(settings: Any) -> None:
    """Refuse a value of another type than its field's: YAML's `fast` or `[1]` where a number belongs."""
    hints = get_type_hints(type(settings))
    for name in (f.name for f in fields(settings)):
        value, hint = getattr(settings, name), hints[name]
        if not _fits(value, hint):
            spelled = (
                hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")
            )
            raise InputError(f"{_spell(settings, name)} must be of type {spelled}, got {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(item, get_args(hint)[0]) for item in value)
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return hint is Any or isinstance(value, hint)


def _at_least(settings: Any, least: int, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and not least <= value < math.inf:
            raise InputError(f"{_spell(settings, name)} must be at least {least}, got {value!r}")


def _above_zero(settings: Any, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if not 0 < value < math.inf:  # written so that NaN is refused too
            raise InputError(f"{_spell(settings, name)} must be a number above 0, got {value!r}")


def _spell(settings: Any, name: str) -> str:
    section = type(settings).__name__.lower()
    return f"`{section}.{name}`" if section in SECTIONS else f"`{name}`"
