"""A run on disk: what is built from its settings, written when it ends, and loaded again.

RUN/  config.yaml  environment.json  data.json  metrics.jsonl  results.json  report.html
      adapter/      the best average: PEFT's files, heads.safetensors, tasks.json, README.md
      checkpoints/  to resume from
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from unolora import quantise
from unolora import settings as run_settings
from unolora.atomic import new_folder, write_text
from unolora.checkpoint import Checkpoint
from unolora.config import WEIGHTS_NAME, check_weights_file
from unolora.data import Encoded, Streamed, encode
from unolora.doctor import has_bf16
from unolora.errors import CheckpointError, InputError, unknown
from unolora.fused import replace_dropout
from unolora.heads import Moments, MultiTaskModel, TaskHeads
from unolora.methods import METHODS
from unolora.methods.method import Method
from unolora.processes import spread
from unolora.settings import Settings
from unolora.tasks import Task
from unolora.tasks.files import one_line
from unolora.tasks.rows import Rows, StreamedRows, TaskData, load
from unolora.text import Answers, TextModel, encode_text
from unolora.words import positions

NO_GENERATION = "`scoring: generation` needs answers that are text; heads write nothing, so leave it out"

MOST_VALUES = 100_000
"""How many values a file of settings may hold, aliases written out."""

DATA = "data.json"
"""Digests of the rows that a run is trained and scored on."""

METHOD_WEIGHTS = "method.safetensors"
"""What a method trains that neither PEFT nor the host writes."""
FIRST_WEIGHTS = 256
"""Numbers of each tensor of a backbone that its hash reads."""


Model = MultiTaskModel | TextModel


@dataclass(frozen=True)
class Run:
    """A trained run, ready to predict.

    Args:
        folder: Where it lies.
        settings: What it was trained with.
        tasks: In the order of their rows, labels filled in.
        model: With the best weights, in evaluation mode.
        tokenizer: The backbone's.
    """

    folder: Path
    settings: Settings
    tasks: list[Task]
    model: Model
    tokenizer: Any

    def row(self, name: str) -> int:
        """Return the row of a task.

        Raises:
            InputError: The run has no such task; the message names the nearest.
        """
        names = [task.name for task in self.tasks]
        if name not in names:
            raise unknown("task", name, names)
        return names.index(name)


@dataclass(frozen=True)
class _Source:
    """Where a backbone lies, looked up and checked once: the hash of its weights takes a while."""

    name: str
    arguments: dict[str, Any]  # of `from_pretrained`
    config: Any

    @property
    def encodes(self) -> bool:
        return bool(getattr(self.config, "is_encoder_decoder", False))

    @property
    def writes(self) -> bool:
        """Whether it is a language model. A GGUF file does not name its architecture; what comes in one is one."""
        named = str(next(iter(self.config.architectures or []), ""))
        return self.encodes or "gguf_file" in self.arguments or named.endswith(("ForCausalLM", "LMHeadModel"))


def _look_up(name: str) -> _Source:
    from transformers import AutoConfig

    from unolora.tasks.download import minilm_folder, smollm2_folder

    gguf = {}
    if name == "smollm2":
        folder = smollm2_folder()
        path, gguf = str(folder), {"gguf_file": next(folder.glob("*.gguf")).name}
    else:
        path = str(minilm_folder()) if name == "minilm" else os.path.expanduser(name)
    if not Path(path).exists() and (path.startswith((".", "/")) or path.count("/") > 1):
        raise InputError(f"backbone {name!r}: no such folder; give a folder with config.json, a hub id, or 'minilm'")
    # Left out, the loaders ask on the terminal whether to run what comes with a model.
    arguments = {"pretrained_model_name_or_path": path, "trust_remote_code": False, **gguf}
    with _loading(name):
        config = AutoConfig.from_pretrained(**arguments)
        if gguf and not Path(path, "config.json").exists():  # where PEFT looks for it when it saves an adapter
            write_text(Path(path, "config.json"), config.to_json_string())
    return _Source(name, arguments, config)


def located(name: str) -> dict[str, Any]:
    """Return where a backbone lies, as the arguments of `from_pretrained`.

    Raises:
        InputError: It can't be found.
    """
    return dict(_look_up(name).arguments)


@contextmanager
def _loading(name: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the loaders raise a dozen unrelated types, from OSError to those of tokenizers
        raise InputError(
            f"backbone {name!r} can't be loaded: {one_line(error)}; give a folder, a hub id, or 'minilm'"
        ) from error


def form(settings: Settings) -> str:
    """Return whether a run's answers come from `heads` or as `text`.

    Raises:
        InputError: The backbone's configuration can't be read, or it does not fit what the settings ask for.
    """
    return _form(settings, _look_up(settings.backbone))


def _form(settings: Settings, source: _Source) -> str:
    chosen = settings.answers
    if chosen == "auto":
        chosen = "text" if source.writes else "heads"
    if source.encodes and chosen == "heads":
        raise InputError(
            f"backbone {settings.backbone!r} is an encoder-decoder, which has no place for heads; set `answers: text`"
        )
    if chosen == "heads" and settings.scoring == "generation":
        raise InputError(NO_GENERATION)
    return chosen


def load_backbone(name: str, answers: str = "heads", quantization: str = "none") -> tuple[Any, Any]:
    """Load a frozen backbone and its tokenizer.

    Args:
        name: "minilm" (an encoder, 22M parameters) or "smollm2" (a decoder, 135M), which come by pip, a folder, or a
            model on the hub. No remote code is run.
        answers: "heads" for a model that gives one state for each token, "text" for a language model.
        quantization: One of `settings.QUANTISATIONS`.

    Raises:
        InputError: It can't be found or reached, or is no such model.
    """
    return _load_backbone(_look_up(name), answers, quantization)


def _load_backbone(source: _Source, answers: str, quantization: str) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    name, more = source.name, quantise.loading(quantization)
    with _loading(name):
        kind = AutoModel if answers == "heads" else AutoModelForSeq2SeqLM if source.encodes else AutoModelForCausalLM
        tokenizer = AutoTokenizer.from_pretrained(**source.arguments)
        backbone = kind.from_pretrained(**source.arguments, config=source.config, dtype=torch.float32, **more)
    replace_dropout(backbone)
    if answers == "text":
        return backbone.requires_grad_(False), tokenizer
    if not isinstance(getattr(backbone.config, "hidden_size", None), int):
        raise InputError(f"backbone {name!r} does not say how wide its states are (`hidden_size`); choose another")
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None  # the heads take the mean over tokens
    return backbone.requires_grad_(False), tokenizer


def fingerprint(backbone: Any) -> dict[str, str]:
    """Hash what tells one backbone from another: its configuration, and the first weights of each of its tensors.

    Returns:
        `config` and `weights`, SHA-256 each. What depends on where and by which version it was loaded is left out.
    """
    passing = ("transformers_version", "dtype", "torch_dtype", "architectures", "quantization_config")
    kept = {
        name: value
        for name, value in backbone.config.to_diff_dict().items()
        if name not in passing and not name.startswith("_")
    }
    weights = hashlib.sha256()
    for name, tensor in sorted(backbone.state_dict().items()):
        if quantise.is_packed(tensor) and tensor.is_floating_point():  # torchao's own kind of tensor
            tensor = tensor.dequantize()
        first = tensor.detach().flatten()[:FIRST_WEIGHTS].to("cpu", torch.float32).contiguous()
        weights.update(f"{name} {list(tensor.shape)}".encode() + first.numpy().tobytes())
    config = json.dumps(kept, sort_keys=True, default=str)
    return {"config": hashlib.sha256(config.encode()).hexdigest(), "weights": weights.hexdigest()}


def _check_base(folder: Path, settings: Settings, found: Mapping[str, str]) -> None:
    """Refuse a backbone that is not the one that a run was trained on; runs of before this was kept are let through."""
    try:
        kept = dict(json.loads((folder / "results.json").read_text(encoding="utf-8"))["base"])
    except (OSError, ValueError, KeyError, TypeError):
        return  # loading a run does not need its results
    odd = [what for what in found if kept.get(what, found[what]) != found[what]]
    if odd:
        what = {"config": "its configuration", "weights": "its weights"}
        raise InputError(
            f"{folder}: backbone {settings.backbone!r} is not the one that the run was trained on: "
            f"{' and '.join(what[name] for name in odd)} differ; put the original back, or set `backbone` in "
            f"{folder / 'config.yaml'} to where it is (environment.json says the versions of then)"
        )


def build(settings: Settings, method: str, tasks: Sequence[Task], moments: Mapping[str, Moments]) -> tuple[Model, Any]:
    """Build a method on its backbone, with fresh weights that depend on the seed only.

    Returns:
        The model and the tokenizer.

    Raises:
        InputError: The backbone can't be loaded, or the method does not fit it.
    """
    source = _look_up(settings.backbone)
    answers = _form(settings, source)
    backbone, tokenizer = _load_backbone(source, answers, settings.quantization)
    base = fingerprint(backbone)
    torch.manual_seed(settings.training.seed)
    heads: TaskHeads | Answers
    if answers == "heads":
        heads, longest = TaskHeads(backbone.config.hidden_size, tasks, moments), 0
    elif method == "heads-only":
        raise InputError("method 'heads-only' has nothing to train where answers are text; leave it out")
    else:
        heads = Answers(tasks, tokenizer, moments, continues=not backbone.config.is_encoder_decoder)
        longest = heads.longest()  # which also says now, not at the first evaluation, whether answers can be told apart
    check_length(settings, backbone, 0 if backbone.config.is_encoder_decoder else longest)
    count = sum(parameter.numel() for parameter in backbone.parameters())
    try:
        adapted = METHODS[method](backbone, [task.name for task in tasks], settings)
    except InputError:
        raise
    except (ValueError, re.error) as error:  # of PEFT, or of a `target_modules` that is no regular expression
        raise InputError(f"method {method!r} does not fit {settings.backbone!r}: {one_line(error)}") from error
    adapted.backbone_parameters, adapted.base = count, base
    if isinstance(heads, Answers):
        return TextModel(adapted, heads), tokenizer
    return MultiTaskModel(adapted, heads), tokenizer


def encode_rows(model: Model, row: int, rows: Rows, tokenizer: Any, max_length: int, *, train: bool = False) -> Encoded:
    """Tokenize rows as a model reads them; see `encode` and `encode_text`. Streamed ones wait for their turn."""
    if isinstance(rows, StreamedRows):
        return Streamed(rows=rows, encode=lambda few: encode_rows(model, row, few, tokenizer, max_length, train=train))
    if isinstance(model, TextModel):
        return encode_text(rows, row, model.heads, max_length, train=train)
    return encode(rows, tokenizer, max_length)


def check_length(settings: Settings, backbone: Any, answer: int) -> None:
    """Refuse inputs that are, with the answer behind them, longer than the backbone's table of positions.

    Raises:
        InputError: They are.
    """
    limit = positions(backbone)
    if limit and settings.data.max_length + answer > limit:
        more = f", {answer} of them for the answer" if answer else ""
        raise InputError(
            f"`data.max_length` is {settings.data.max_length}, but {settings.backbone!r} takes {limit} tokens{more}"
        )


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what training changes: trainable parameters, and the buffers of the heads."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    heads = getattr(model, "heads", None)
    if heads is not None:
        trained |= {f"heads.{name}" for name in heads.state_dict()}
    every = model.state_dict()  # asked as a whole: a model in parts (FSDP2) then puts them in order first
    return {name: value for name, value in every.items() if name in trained}


def load_state(model: nn.Module, found: Mapping[str, torch.Tensor], source: Path) -> None:
    """Copy what `state` gave into a model of the same build.

    Raises:
        CheckpointError: The names or shapes differ.
    """
    own = state(model)
    _check_same(source, own, found)
    model.load_state_dict({name: spread(value, own[name]) for name, value in found.items()}, strict=False)


def _check_same(source: Path, own: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> None:
    odd = sorted(set(own) ^ set(found)) or [name for name in own if own[name].shape != found[name].shape]
    if odd:
        raise CheckpointError(
            f"{source}: expected the {len(own)} tensors of these settings, found {len(found)}; they differ in "
            f"{', '.join(odd[:3])}; it goes with the settings that it was written with"
        )


def save_adapter(
    model: Model,
    settings: Settings,
    method: str,
    tasks: Sequence[Task],
    folder: Path,
    since: Mapping[str, str] | None = None,
) -> None:
    """Write a trained model as `folder`, whole or not at all; `since` says when tasks came that came earlier."""
    with new_folder(folder) as temporary:
        _save_method(model.method, method, temporary)
        save_tensors(model.heads.state_dict(), temporary / "heads.safetensors")
        now = datetime.now(UTC).isoformat(timespec="seconds")
        came = {task.name: (since or {}).get(task.name, now) for task in tasks}
        rows = [asdict(task) | {"row": row, "since": came[task.name]} for row, task in enumerate(tasks)]
        (temporary / "tasks.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def load_run(folder: str | os.PathLike[str], backbone: str | None = None) -> Run:
    """Load a run with its best weights.

    Args:
        folder: What `unolora train` wrote.
        backbone: Where its backbone is, if not where the run's settings say.

    Raises:
        InputError: It is no finished run, or its files don't fit together; the message names the file.
    """
    path = Path(folder)
    settings = read_settings(path)
    settings.backbone = backbone or settings.backbone
    adapter = path if (path / "tasks.json").is_file() else path / "adapter"  # as it is on the hub, or as it was trained
    if not adapter.is_dir():
        raise InputError(f"{path}: no adapter/ in it; the run did not finish, {how_to_go_on(path)}")
    tasks = read_tasks(adapter / "tasks.json")
    heads = load_tensors(adapter / "heads.safetensors")
    model, tokenizer = build(settings, settings.method, tasks, {})
    _check_base(path, settings, model.method.base)
    try:
        model.heads.load_state_dict(heads)
    except RuntimeError as error:
        raise CheckpointError(
            f"{adapter / 'heads.safetensors'}: does not fit tasks.json beside it: {one_line(error)}"
        ) from error
    _load_method(model.method, settings.method, adapter)
    return Run(path, settings, tasks, model.eval(), tokenizer)


def _save_method(model: Method, method: str, folder: Path) -> None:
    """Write what a method trains: as PEFT or the host does where they can, else the tensors by their names."""
    from peft import PeftModel

    if isinstance(model.backbone, PeftModel) or method == "full":
        host: Any = model.backbone
        host.save_pretrained(folder)
    elif trained := state(model):
        save_tensors(trained, folder / METHOD_WEIGHTS)


def _load_method(model: Method, method: str, adapter: Path) -> None:
    from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

    encoder: Any = model.backbone
    if method == "unolora":
        path = adapter / WEIGHTS_NAME
        check_weights_file(path)
        set_peft_model_state_dict(encoder, Checkpoint(load_tensors(path), str(path)))
    elif isinstance(encoder, PeftModel):
        for name in list(encoder.peft_config):
            path = (adapter if name == "default" else adapter / name) / WEIGHTS_NAME
            found = load_tensors(path)
            _check_same(path, get_peft_model_state_dict(encoder, adapter_name=name), found)  # PEFT only warns
            set_peft_model_state_dict(encoder, found, adapter_name=name)
    elif method == "full":
        _load_full(encoder, adapter)
    elif state(model):
        load_state(model, load_tensors(adapter / METHOD_WEIGHTS), adapter / METHOD_WEIGHTS)


def _load_full(backbone: Any, folder: Path) -> None:
    path = folder / "model.safetensors"
    try:  # by the host, which may have other names on disk than in memory
        loaded, info = type(backbone).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # a dozen unrelated types
        raise CheckpointError(f"{path}: can't be read: {one_line(error)}") from error
    missing = sorted(name for name in info["missing_keys"] if name in backbone.state_dict())
    if missing:
        raise CheckpointError(f"{path}: expected the whole backbone, {len(missing)} tensors lack, such as {missing[0]}")
    backbone.load_state_dict({name: value for name, value in loaded.state_dict().items() if "pooler" not in name})


def read_settings(folder: Path) -> Settings:
    """Read a run's config.yaml.

    Raises:
        InputError: There is none, or it can't be read.
    """
    return run_settings.from_dict(read_yaml(folder / "config.yaml", what="a run folder holds config.yaml"))


def read_yaml(path: Path, what: str = "give a YAML file") -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        InputError: It is missing, not UTF-8, not YAML, or not a mapping; the message names file and place.
    """
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise InputError(f"{path}: no such file; {what}{f' (there: {near[:5]})' if near else ''}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"{path}: not YAML: {one_line(error)}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a mapping of settings, got {type(data).__name__}")
    if _spelled_out(data, {}) > MOST_VALUES:
        raise InputError(f"{path}: its aliases stand for more than {MOST_VALUES} values; write out what is meant")
    return data


def _spelled_out(data: Any, known: dict[int, float]) -> float:
    """Count the values that YAML stands for with its aliases written out; one that contains itself is endless."""
    if not isinstance(data, dict | list):
        return 1
    if id(data) not in known:
        known[id(data)] = math.inf
        items = data.values() if isinstance(data, dict) else data
        known[id(data)] = 1 + sum(_spelled_out(item, known) for item in items)
    return known[id(data)]


def read_tasks(path: Path) -> list[Task]:
    """Read tasks.json: the tasks in the order of their rows.

    Raises:
        CheckpointError: It is missing or not what `save_adapter` wrote.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        tasks = [Task.from_dict({k: v for k, v in row.items() if k not in ("row", "since")}) for row in rows]
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{path}: expected the list of tasks that a run writes: {reason}") from error
    if not tasks:
        raise CheckpointError(f"{path}: expected the list of tasks that a run writes, found none")
    return tasks


def read_since(folder: Path) -> dict[str, str]:
    """Return when each task of a run came, as ISO dates: with the run, where nothing else is said."""
    rows = json.loads((folder / "adapter" / "tasks.json").read_text(encoding="utf-8"))
    path = folder / "environment.json"
    trained = json.loads(path.read_text(encoding="utf-8")).get("date", "") if path.is_file() else ""
    return {row["name"]: row.get("since", trained) for row in rows}


def environment() -> dict[str, Any]:
    """Describe versions and machine, for environment.json."""
    return {
        **{name: version(name) for name in ("unolora", "torch", "transformers", "peft")},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def read_data(settings: Settings, task: Task) -> TaskData:
    """Read a task's rows, cut and limited as those of a run that was trained with these settings.

    Raises:
        InputError: A file or a row can't be used.
    """
    data = settings.data
    root = None if data.root is None else Path(data.root)
    return load(task, root=root, limit=data.limit, evaluation_limit=data.evaluation_limit)


def digests(data: Sequence[TaskData]) -> dict[str, dict[str, str]]:
    """Return a digest of each split of each task, for data.json."""
    return {d.task.name: {split: rows.digest() for split, rows in d.splits.items()} for d in data}


def check_data(folder: Path, now: Mapping[str, Mapping[str, str]], *splits: str) -> None:
    """Compare rows with those that a run was trained with, if it says which.

    Args:
        folder: The run.
        now: From `digests`.
        *splits: The splits to compare; all without any.

    Raises:
        CheckpointError: A split of a task holds other rows now.
    """
    path = folder / DATA
    if not path.is_file():  # written by an older version
        return
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        pairs = [(task, split, kept[task][split], now[task][split]) for task in now for split in splits or now[task]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: expected the digests of the run's data; delete it to go on unchecked"
        ) from error
    for task, split, before, after in pairs:
        if before != after:
            raise CheckpointError(
                f"{folder}: the {split} rows of task {task!r} are not those that the run began with; a split that is "
                "cut from a file changes with the file, so bring the file back, or train anew"
            )


def settled(settings: Settings) -> Settings:
    """Decide what depends on the machine, so that the run goes on alike on another one: `precision: auto`."""
    if settings.training.precision != "auto":
        return settings
    precision = "bf16" if has_bf16() else "fp32"
    return replace(settings, training=replace(settings.training, precision=precision))


def how_to_go_on(folder: Path) -> str:
    """Say the command that goes on with a run."""
    return f"go on with `unolora train --resume {shlex.quote(str(folder))}`"


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write tensors as a safetensors file, views among them."""
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)


def load_tensors(path: Path, fix: str = "copy it again from where it was trained") -> dict[str, torch.Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: It can't be read; the message names it and ends in `fix`.
    """
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: can't be read ({error}); {fix}") from error
