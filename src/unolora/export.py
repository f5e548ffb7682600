"""One task of a run as files that need no `unolora`: a plain PEFT LoRA, or the backbone with the task merged in.

    (alpha / r) B diag(s) A  =  (alpha / r) B' A          B' = B diag(s)

Where s depends on the task alone, or is 1, this is exact. Where it depends on the sample as well, no B' can stand for
all samples: the mean scale over calibration rows is exported, and what that costs is measured.

Axes: B batch, P positions, R rank.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from unolora import metrics, runs, scoring
from unolora.atomic import new_folder
from unolora.config import WEIGHTS_NAME
from unolora.data import Collator, Encoded
from unolora.errors import InputError, unknown
from unolora.heads import MultiTaskModel
from unolora.layer import current_scales
from unolora.methods.method import Method
from unolora.runs import Run
from unolora.tasks import Task
from unolora.tasks.files import read_file
from unolora.tasks.rows import Rows, fill
from unolora.text import CUE, TextModel

FORMATS = ("peft-lora", "merged")
ADAPTER = "default"


@dataclass(frozen=True)
class Exported:
    """What was written, and how good it is."""

    task: str
    folder: Path
    calibrated_on: int = 0
    """Rows that the exported scale is the mean of; 0 where the export is exact."""
    scores: dict[str, dict[str, float]] | None = None
    """Where it is not exact: `model` and `exported`, the task's metrics on its validation rows."""

    @property
    def exact(self) -> bool:
        """Whether it computes what the run's model does, up to rounding."""
        return self.calibrated_on == 0


def export(run: Run, task: str, folder: Path, format: str = "peft-lora", calibration: Path | None = None) -> Exported:
    """Write one task as a folder, whole or not at all.

    Args:
        run: A run of the method `unolora`.
        task: The task's name.
        folder: What to write: PEFT's adapter files or the host's, `heads.safetensors`, `tasks.json`, README.md.
        format: "peft-lora", or "merged": the backbone with the task in its weights.
        calibration: Table (.jsonl .csv .tsv .parquet) with the columns of the task's template, over whose rows a scale
            that depends on the sample is averaged; by default the validation rows of the task.

    Raises:
        InputError: The task or the format is not known, the run is another method's, the folder holds something, or the
            calibration rows can't be read.
    """
    _check(run, format, folder)
    row = run.row(task)
    with new_folder(folder) as temporary:
        done = _write(run, row, temporary, format, calibration)
    return Exported(task, folder, *done)


def export_all(run: Run, folder: Path) -> list[Exported]:
    """Write every task of a run as a plain PEFT LoRA, FOLDER/TASK/, with a README that says how servers take them.

    Raises:
        InputError: The run is another method's, or the folder holds something.
    """
    _check(run, "peft-lora", folder)
    with new_folder(folder) as temporary:
        done = []
        for row, task in enumerate(run.tasks):
            (temporary / task.name).mkdir()
            done.append(_write(run, row, temporary / task.name, "peft-lora", None))
        (temporary / "README.md").write_text(_readme_of_all(run), encoding="utf-8")
    return [Exported(task.name, folder / task.name, *each) for task, each in zip(run.tasks, done, strict=True)]


def task_scale(model: Any, task: str, adapter_name: str = ADAPTER) -> Tensor | None:
    """Return the scale of a task that does not depend on the sample, [P, R]; None where there is no scale.

    Args:
        model: A `PeftModel` with a UnoLoRA adapter.
        task: The task's name.
        adapter_name: The adapter.

    Raises:
        InputError: The task is not known, or the scale depends on the sample.
    """
    tuner = model.base_model
    known = tuner.peft_config[adapter_name].tasks
    if adapter_name not in tuner.uno_hypernetwork:
        return None
    if task not in known:
        raise unknown("task", task, known)
    hypernetwork = tuner.uno_hypernetwork[adapter_name]
    if hypernetwork.bottleneck is not None:
        raise InputError(f"the scale of task {task!r} depends on the sample; export the mean over calibration rows")
    with torch.no_grad():
        rows = torch.tensor([known.index(task)], device=hypernetwork.task_embedding.weight.device)
        scale: Tensor = hypernetwork(rows)[0]
    return scale


def as_lora(model: Any, scale: Tensor | None, adapter_name: str = ADAPTER) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Fold a scale into an adapter, which leaves a plain LoRA.

    Args:
        model: A `PeftModel` with a UnoLoRA adapter.
        scale: s, [P, R], or None for 1.
        adapter_name: The adapter.

    Returns:
        PEFT's settings, and its tensors under the keys of its files: A [R, D_in] and B' [D_out, R] of each projection.
    """
    tuner = model.base_model
    config = tuner.peft_config[adapter_name]
    layers = tuner.layers(adapter_name)
    tensors = {}
    for position, (name, layer) in enumerate(layers.items()):
        A, B = layer.uno_A[adapter_name].detach(), layer.uno_B[adapter_name].detach()
        B = B if scale is None else B * scale[position].to(B.dtype)
        tensors[f"base_model.model.{name}.lora_A.weight"] = A.cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = B.cpu().contiguous()
    lora = LoraConfig(
        base_model_name_or_path=config.base_model_name_or_path,
        task_type=config.task_type,
        inference_mode=True,
        r=config.r,
        lora_alpha=config.alpha,
        target_modules=_targets(tuner.model, list(layers)),
        fan_in_fan_out=any(isinstance(layer.base_layer, Conv1D) for layer in layers.values()),
    )
    return lora, tensors


def write_lora(lora: LoraConfig, tensors: dict[str, Tensor], folder: Path) -> None:
    """Write what `as_lora` gave as PEFT's adapter_config.json and adapter_model.safetensors."""
    lora.save_pretrained(str(folder))
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})


def _targets(backbone: Any, names: Sequence[str]) -> list[str]:
    """Name projections by their last parts, as servers like it, or in full where others end alike."""
    ends = sorted({name.rpartition(".")[2] for name in names})
    others = {
        name for name, _ in backbone.named_modules() if name.rpartition(".")[2] in ends and name not in set(names)
    }
    return sorted(names) if others else ends


def _check(run: Run, format: str, folder: Path) -> None:
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    if run.settings.method != "unolora":
        raise InputError(
            f"{run.folder}: its method is {run.settings.method!r}; export takes runs of 'unolora', the others' own "
            "files are in adapter/"
        )
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; choose another folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty; it is not overwritten, choose another folder")


def _write(
    run: Run, row: int, folder: Path, format: str, calibration: Path | None
) -> tuple[int, dict[str, dict[str, float]] | None]:
    """Fill a folder; return what `Exported` says of it beyond task and folder."""
    task, adapted = run.tasks[row], run.model.method.backbone
    sampled = run.settings.adapter.conditioning == "task+sample"
    if calibration is not None and not sampled:
        raise InputError(
            "calibration rows are for a scale that depends on the sample; this run's "
            f"`adapter.conditioning` is {run.settings.adapter.conditioning!r}, whose export is exact: leave them out"
        )
    count, scores = 0, None
    if sampled:
        validation = scoring.read_split(run, row, "validation")
        rows = validation if calibration is None else _read(run, row, calibration)
        count, scale = len(rows), mean_scale(run, row, rows)
        lora, tensors = as_lora(adapted, scale)
        scores = {
            "model": _score(run, run.model, row, validation),
            "exported": _score(run, _plain(run, lora, tensors), row, validation),
        }
    else:
        lora, tensors = as_lora(adapted, task_scale(adapted, task.name))
    if format == "peft-lora":
        write_lora(lora, tensors, folder)
    else:
        _save_merged(run, lora, tensors, folder)
        run.tokenizer.save_pretrained(folder)
    runs.save_tensors(_head(run, row), folder / "heads.safetensors")
    (folder / "tasks.json").write_text(json.dumps([asdict(task) | {"row": 0}], indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_readme(run, task, format, count, scores), encoding="utf-8")
    return count, scores


@torch.no_grad()
def mean_scale(run: Run, row: int, rows: Encoded, batch_size: int = 64) -> Tensor:
    """Average the scale of a task over rows, [P, R]."""
    collate, device = Collator(run.tokenizer), next(run.model.parameters()).device
    found = []
    for start in range(0, len(rows), batch_size):
        batch = collate([(row, rows, i) for i in range(start, min(start + batch_size, len(rows)))])
        inputs = {k: v.to(device) for k, v in batch.items() if k not in ("labels", "answers", "tasks")}
        with run.model.method.condition(batch["tasks"].to(device), inputs):
            scales = current_scales()
            assert scales is not None
            found.append(scales[ADAPTER].double())  # [B, P, R]
    return torch.cat(found).mean(dim=0)


def _read(run: Run, row: int, path: Path) -> Encoded:
    texts = fill(run.tasks[row], read_file(path))
    if not texts:
        raise InputError(f"{path}: no rows to average the scale over; give some of the task's inputs")
    rows = Rows(texts, np.zeros(len(texts)))
    return runs.encode_rows(run.model, row, rows, run.tokenizer, run.settings.data.max_length)


def _score(run: Run, model: runs.Model, row: int, rows: Encoded) -> dict[str, float]:
    found = scoring.predictions(model, {row: rows}, Collator(run.tokenizer), run.settings.scoring)
    return metrics.score(run.tasks[row], rows.targets, found[row])


def _with_lora(run: Run, lora: LoraConfig, tensors: dict[str, Tensor]) -> Any:
    """Put a plain LoRA on the backbone, loaded anew."""
    answers = "text" if isinstance(run.model, TextModel) else "heads"
    adapted = get_peft_model(runs.load_backbone(run.settings.backbone, answers)[0], lora)
    set_peft_model_state_dict(adapted, tensors)
    return adapted.eval()


def _plain(run: Run, lora: LoraConfig, tensors: dict[str, Tensor]) -> runs.Model:
    """Build the model that whoever loads the export has; its heads are those of the run."""
    method = Method(_with_lora(run, lora, tensors))
    model: runs.Model
    if isinstance(run.model, TextModel):
        model = TextModel(method, run.model.heads)
    else:
        model = MultiTaskModel(method, run.model.heads)
    return model.to(next(run.model.parameters()).device).eval()


def _save_merged(run: Run, lora: LoraConfig, tensors: dict[str, Tensor], folder: Path) -> None:
    """Merge and let the host write it; a file such as GGUF's was unpacked as it was read, and so it is written."""
    merged = _with_lora(run, lora, tensors).merge_and_unload()
    if getattr(merged, "hf_quantizer", None) is not None:
        if not all(parameter.is_floating_point() for parameter in merged.parameters()):
            raise InputError(
                f"backbone {run.settings.backbone!r} is quantised, which a merged one can't be; export it as peft-lora"
            )
        merged.hf_quantizer = None
        if hasattr(merged.config, "quantization_config"):
            del merged.config.quantization_config
    merged.save_pretrained(folder)


def _head(run: Run, row: int) -> dict[str, Tensor]:
    """Return the tensors of one task's head, under the keys of a run with that task alone."""
    own = f"linear.task_{run.tasks[row].name}."
    found = {}
    for name, value in run.model.heads.state_dict().items():
        if name.startswith(own):
            found[name] = value
        elif not name.startswith("linear."):
            found[name] = value[row : row + 1]
    return found


# --- how to use what was written -----------------------------------------------------------------------------------

CLASSES = {"heads": "AutoModel", "decoder": "AutoModelForCausalLM", "encoder-decoder": "AutoModelForSeq2SeqLM"}


def _kind(run: Run) -> str:
    if not isinstance(run.model, TextModel):
        return "heads"
    return "encoder-decoder" if run.model.encodes else "decoder"


def _base(run: Run) -> str:
    """Spell the arguments with which `from_pretrained` finds the backbone."""
    found = runs.located(run.settings.backbone)
    path = found.pop("pretrained_model_name_or_path")
    return ", ".join([repr(path), *(f"{name}={value!r}" for name, value in found.items())])


def _readme(run: Run, task: Task, format: str, count: int, scores: dict[str, dict[str, float]] | None) -> str:
    what = "a plain PEFT LoRA" if format == "peft-lora" else "the backbone with this task merged in"
    exact = "It computes what the run's model does, up to rounding."
    if scores is not None:
        metric = task.metrics[0]
        exact = (
            f"The run's scale depends on the sample; this has its mean over {count} rows. On the validation rows the "
            f"run's model has a {metric} of {scores['model'][metric]:.4f}, this {scores['exported'][metric]:.4f}."
        )
    return (
        f"# {task.name}, {what}\n\nMade from a run of `unolora`, which is not needed to use it. {exact}\n"
        f"`tasks.json` says what the task is; `heads.safetensors` holds {_head_is(run)}.\n\n"
        f"```python\n{_script(run, task, format)}```\n"
    )


def _head_is(run: Run) -> str:
    if _kind(run) != "heads":
        return "the range of a regression's answers"
    return "its head: a linear map on the mean of the last states"


def _script(run: Run, task: Task, format: str) -> str:
    """Spell a Python script that predicts with an export of one task, from inside its folder."""
    kind = _kind(run)
    auto = CLASSES[kind]
    base = _base(run) if format == "peft-lora" else '"."'
    lines = ["import torch"]
    lines += ["from peft import PeftModel"] if format == "peft-lora" else []
    lines += ["from safetensors.torch import load_file"] if kind == "heads" else []
    lines += [f"from transformers import {auto}, AutoTokenizer", ""]
    lines += [f"tokenizer = AutoTokenizer.from_pretrained({base})", f"model = {auto}.from_pretrained({base})"]
    lines += ['model = PeftModel.from_pretrained(model, ".")'] if format == "peft-lora" else []
    lines += ["model.eval()", *_prediction(run, task, kind)]
    return "".join(f"{line}\n" for line in lines)


def _prediction(run: Run, task: Task, kind: str) -> list[str]:
    texts = ", ".join(repr(text) for text in task.template)
    length = run.settings.data.max_length
    lines = [f"texts = [{texts}]  # with the columns in braces filled in"]
    if kind == "heads":
        head = f"linear.task_{task.name}"
        answer = (
            f"answer = {list(task.labels)!r}[logits.argmax()]"
            if task.kind == "classification"
            else 'answer = float(logits[0, 0] * head["std"][0] + head["mean"][0])'
        )
        return [
            *lines,
            'head = load_file("heads.safetensors")',
            f'batch = tokenizer(*texts, truncation=True, max_length={length}, return_tensors="pt")',
            "with torch.no_grad():",
            "    states = model(**batch).last_hidden_state  # [1, T, D]",
            f'logits = states.mean(dim=1) @ head["{head}.weight"].T + head["{head}.bias"]  # without padding',
            answer,
        ]
    if kind == "decoder":
        lines += [
            f'cue = tokenizer({CUE!r}, add_special_tokens=False)["input_ids"]',
            f'ids = tokenizer(texts[0], truncation=True, max_length={length} - len(cue))["input_ids"]',
            "ids = ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids",
            "ids = torch.tensor([[*ids, *cue]])",
        ]
        start = "ids.shape[1]"
    else:
        lines += [f'ids = tokenizer(texts[0], truncation=True, max_length={length}, return_tensors="pt").input_ids']
        start = "1"
    assert isinstance(run.model, TextModel)
    row = run.row(task.name)
    return [
        *lines,
        "with torch.no_grad():",
        "    out = model.generate(",
        f"        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens={run.model.heads.longest(row)},",
        "        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,",
        "    )",
        f"answer = tokenizer.decode(out[0, {start}:], skip_special_tokens=True).strip()",
    ]


def _readme_of_all(run: Run) -> str:
    names, auto, r = [task.name for task in run.tasks], CLASSES[_kind(run)], run.settings.adapter.r
    path = runs.located(run.settings.backbone)["pretrained_model_name_or_path"]
    first, last = names[0], names[-1]
    modules = " ".join(f"{name}=DIR/{name}" for name in names)
    return f"""# {len(names)} tasks as plain PEFT LoRAs

A folder for each task, all on one backbone, `{run.settings.backbone}`; the README in each says how good it is and how
its head or its prompt is used. DIR is where this folder lies.

## PEFT: any mix of tasks in a batch

```python
from peft import PeftModel
from transformers import {auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({_base(run)})
model = {auto}.from_pretrained({_base(run)})
model = PeftModel.from_pretrained(model, "{first}", adapter_name="task_{first}")
for task in {names[1:]!r}:
    model.load_adapter(task, adapter_name=f"task_{{task}}")  # with a prefix, since torch keeps some names for itself
model.eval()
batch = tokenizer(["a text of {first}", "a text of {last}"], padding=True, return_tensors="pt")
out = model(**batch, adapter_names=["task_{first}", "task_{last}"])
```

## Servers of language models

vLLM (`--max-lora-rank` is {r} or the next that it knows):

    vllm serve {path} --enable-lora --max-loras {len(names)} --max-lora-rank {r} --lora-modules {modules}

A request names the task as its `model`. LoRAX:

    lorax-launcher --model-id {path}

A request says `"parameters": {{"adapter_id": "DIR/{first}", "adapter_source": "local"}}`. Both know certain models and
projections, which their pages list; an encoder with heads is for PEFT.
"""
