"""One task of a run as files that need no `unolora`: a plain PEFT LoRA, the backbone with the task merged in, or ONNX.

    (alpha / r) B diag(s) A  =  (alpha / r) B' A          B' = B diag(s)

Where s depends on the task alone, or is 1, this is exact. Where it depends on the sample as well, no B' can stand for
all samples: the mean scale over calibration rows is exported, or one distilled from there, and what that costs is
measured.

Axes: P positions, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from unolora import howto, metrics, onnx_graph, runs, scoring
from unolora.atomic import new_folder, write_json, write_text
from unolora.config import WEIGHTS_NAME
from unolora.data import Collator, Encoded
from unolora.errors import InputError, unknown
from unolora.heads import MultiTaskModel
from unolora.methods.method import Method
from unolora.quantise import is_packed
from unolora.runs import Run
from unolora.static_scale import ADAPTER, distilled_scale, mean_scale
from unolora.tasks import Task
from unolora.tasks.files import read_file
from unolora.tasks.rows import Rows, fill
from unolora.text import TextModel

FORMATS = ("peft-lora", "merged", "onnx")
QUANTISED = "backbone {!r} is quantised, which a merged one can't be; export it as peft-lora"


@dataclass(frozen=True)
class Exported:
    """What was written, and how good it is."""

    task: str
    folder: Path
    calibrated_on: int = 0
    """Rows that the exported scale is the mean of; 0 where the export is exact."""
    distilled: bool = False
    """Whether that scale was then trained on the model's answers to those rows."""
    scores: dict[str, dict[str, float]] | None = None
    """Where it is not exact: `model` and `exported`, the task's metrics on its validation rows."""

    @property
    def exact(self) -> bool:
        """Whether it computes what the run's model does, up to rounding."""
        return self.calibrated_on == 0


def export(
    run: Run,
    task: str,
    folder: Path,
    format: str = "peft-lora",
    calibration: Path | None = None,
    distill: bool = False,
) -> Exported:
    """Write one task as a folder, whole or not at all.

    Args:
        run: A run of the method `unolora`.
        task: The task's name.
        folder: What to write: PEFT's adapter files, the host's or model.onnx; `heads.safetensors`, `tasks.json`,
            README.md with a script that predicts.
        format: "peft-lora"; "merged", the backbone with the task in its weights; "onnx", the same as a graph.
        calibration: Table (.jsonl .csv .tsv .parquet) with the columns of the task's template, over whose rows a scale
            that depends on the sample is averaged; by default the validation rows of the task.
        distill: Train that average further, on the model's own answers to those rows.

    Raises:
        InputError: The task or the format is not known, the run is another method's, the folder holds something, or the
            calibration rows can't be read.
    """
    _check(run, format, folder, distill)
    row = run.row(task)
    with new_folder(folder) as temporary:
        return replace(_write(run, row, temporary, format, calibration, distill), folder=folder)


def export_all(run: Run, folder: Path, distill: bool = False) -> list[Exported]:
    """Write every task of a run as a plain PEFT LoRA, FOLDER/TASK/, with a README that says how servers take them.

    Raises:
        InputError: The run is another method's, or the folder holds something.
    """
    _check(run, "peft-lora", folder, distill)
    with new_folder(folder) as temporary:
        done = []
        for row, task in enumerate(run.tasks):
            (temporary / task.name).mkdir()
            done.append(_write(run, row, temporary / task.name, "peft-lora", None, distill))
        write_text(temporary / "README.md", howto.readme_of_all(run))
    return [replace(each, folder=folder / each.task) for each in done]


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
        rows = torch.tensor([known.index(task)], device=hypernetwork.scale_weight.device)
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
        use_rslora=config.use_rslora,
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


def _check(run: Run, format: str, folder: Path, distill: bool) -> None:
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    if run.settings.method != "unolora":
        raise InputError(
            f"{run.folder}: its method is {run.settings.method!r}; export takes runs of 'unolora', the others' own "
            "files are in adapter/"
        )
    if format == "onnx":
        onnx_graph.check_installed()
    if distill:
        _check_sampled(run, "distillation is")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; choose another folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty; it is not overwritten, choose another folder")


def _check_sampled(run: Run, what: str) -> None:
    conditioning = run.settings.adapter.conditioning
    if conditioning != "task+sample":
        raise InputError(
            f"{what} for a scale that depends on the sample; this run's `adapter.conditioning` is {conditioning!r}, "
            "whose export is exact: leave it out"
        )


def _write(run: Run, row: int, folder: Path, format: str, calibration: Path | None, distill: bool) -> Exported:
    """Fill a folder."""
    task, adapted = run.tasks[row], run.model.method.backbone
    done = Exported(task.name, folder)
    if calibration is not None:
        _check_sampled(run, "calibration rows are")
    if run.settings.adapter.conditioning == "task+sample":
        validation = scoring.read_split(run, row, "validation")
        rows = validation if calibration is None else _read(run, row, calibration)
        scale = mean_scale(run, row, rows)
        if distill:
            scale = distilled_scale(run, row, rows, scale)[0]
        lora, tensors = as_lora(adapted, scale)
        scores = {
            "model": _score(run, run.model, row, validation),
            "exported": _score(run, _plain(run, lora, tensors), row, validation),
        }
        done = replace(done, calibrated_on=len(rows), distilled=distill, scores=scores)
    else:
        lora, tensors = as_lora(adapted, task_scale(adapted, task.name))
    if format == "peft-lora":
        write_lora(lora, tensors, folder)
    else:
        merged = _merged(run, lora, tensors)
        if format == "onnx":
            _save_graph(run, row, merged, folder)
        else:
            merged.save_pretrained(folder)
        run.tokenizer.save_pretrained(folder)
    if format != "onnx" and isinstance(run.model, MultiTaskModel):
        runs.save_tensors(_head(run, row), folder / "heads.safetensors")
    write_json(folder / "tasks.json", [asdict(task) | {"row": 0}])
    write_text(folder / "README.md", howto.readme(run, task, format, _exactness(done, task)))
    return done


def _exactness(done: Exported, task: Task) -> str:
    if done.scores is None:
        return "It computes what the run's model does, up to rounding."
    metric = task.metrics[0]
    more = ", trained further on the model's answers to them" if done.distilled else ""
    return (
        f"The run's scale depends on the sample; this has its mean over {done.calibrated_on} rows{more}. On the "
        f"validation rows the run's model has a {metric} of {done.scores['model'][metric]:.4f}, this "
        f"{done.scores['exported'][metric]:.4f}."
    )


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
    adapted = get_peft_model(runs.load_backbone(run.settings.backbone, answers, run.settings.quantization)[0], lora)
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


def _merged(run: Run, lora: LoraConfig, tensors: dict[str, Tensor]) -> Any:
    """Merge into the backbone's weights; a file such as GGUF's was unpacked as it was read, and so it is written."""
    if run.settings.quantization != "none":
        raise InputError(QUANTISED.format(run.settings.backbone))
    merged = _with_lora(run, lora, tensors).merge_and_unload()
    if getattr(merged, "hf_quantizer", None) is not None:
        if any(is_packed(parameter) for parameter in merged.parameters()):
            raise InputError(QUANTISED.format(run.settings.backbone))
        merged.hf_quantizer = None
        if hasattr(merged.config, "quantization_config"):
            del merged.config.quantization_config
    return merged


def _save_graph(run: Run, row: int, merged: Any, folder: Path) -> None:
    ids = torch.tensor([[1, 1, 1], [1, 1, 1]])
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model: nn.Module
    if isinstance(run.model, TextModel):
        model = onnx_graph.Logits(merged)
        if run.model.encodes:
            example["decoder_input_ids"] = ids[:, :2]
    else:
        head, own = _head(run, row), f"linear.task_{run.tasks[row].name}."
        regression = run.tasks[row].kind == "regression"
        moments = (head["mean"], head["std"]) if regression else ()
        model = onnx_graph.WithHead(merged, head[f"{own}weight"], head[f"{own}bias"], *moments)
        if "token_type_ids" in run.tokenizer("a", "b"):
            example["token_type_ids"] = torch.zeros_like(ids)
    onnx_graph.write_onnx(model, example, folder / "model.onnx")


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
