"""One trainer for every method, and the run folder that it writes.

All that a step depends on is a function of (seed, step): its batch, its dropout and its learning rate. So a checkpoint
holds weights and optimiser moments, nothing is replayed when a run goes on, and it ends as if it had never stopped.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from unolora import metrics, quantise, runs, scoring
from unolora.atomic import explained, new_folder, write_json, write_text
from unolora.card import model_card
from unolora.data import Collator, Encoded, TaskRows, TrainingBatches
from unolora.errors import CheckpointError, InputError
from unolora.heads import Moments
from unolora.methods import label
from unolora.sampling import Sampler
from unolora.settings import Settings, flat, to_dict
from unolora.tasks import Task, rows

logger = logging.getLogger(__name__)


class Interrupted(Exception):  # noqa: N818  # nothing went wrong
    """Training stopped on a signal, after writing a checkpoint; `folder` is the run to resume."""

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__(f"stopped at step {step}; {runs.how_to_go_on(folder)}")
        self.folder, self.step = folder, step


ONE_BEFORE = "delete its folder to resume from the one before"
"""What to do with a damaged checkpoint."""

Splits = Mapping[str, Mapping[int, Encoded]]
"""Split -> task row -> its tokens."""


def train(settings: Settings, *, root: Path | None = None, resume: bool = False, progress: Any = None) -> Path:
    """Train a method, and the baselines that the settings name, and write the run folder.

    Args:
        settings: The run.
        root: Folder that relative data files start from, where `data.root` is not set.
        resume: Go on with the run that is in the output folder.
        progress: Called as progress(label, trainer) for each method; gives a Trainer callback that shows it.

    Returns:
        The run folder.

    Raises:
        InputError: Something given can't be used; nothing was written.
        Interrupted: A signal stopped it; the checkpoint to go on from was written.
    """
    folder = Path(settings.output or "runs/run")
    _check_folder(folder, settings, resume)
    _check_integrations(settings)
    data = load_data(settings, root)
    model, tokenizer = _build(settings, settings.method, data)  # what can't be built or read is known before
    splits = _encode(settings, data, model, tokenizer)  #         anything is written
    _prepare_folder(folder, settings, root, resume)
    built = {settings.method: model}
    for method in [settings.method, *settings.baselines]:
        own = folder if method == settings.method else folder / "baselines" / method
        if (own / "results.json").is_file():  # it was finished before the run was stopped
            shutil.rmtree(own / "checkpoints", ignore_errors=True)
            continue
        model = built.pop(method) if method in built else _build(settings, method, data)[0]
        stopped = _train_method(settings, method, model, data, splits, Collator(tokenizer), own, progress)
        if stopped is not None:
            raise Interrupted(folder, stopped)
    from unolora.report import write_report

    write_report(folder)
    return folder


def load_data(settings: Settings, root: Path | None = None) -> list[rows.TaskData]:
    """Resolve the tasks of a run and read their rows.

    Raises:
        InputError: A task, a file or a row can't be used.
    """
    from unolora.tasks import resolve

    start = Path(settings.data.root) if settings.data.root else root
    text = runs.form(settings) == "text"
    found = [task.as_text() if text else task for task in resolve(settings.tasks)]
    limit, fewer = settings.data.limit, settings.data.evaluation_limit
    return [rows.load(task, root=start, limit=limit, evaluation_limit=fewer) for task in found]


def _check_folder(folder: Path, settings: Settings, resume: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; choose another `output`")
    if resume:
        _check_settings(folder, _fingerprint(runs.read_settings(folder)), settings)
    elif not folder.is_dir() or not any(folder.iterdir()):
        return
    elif not (folder / "config.yaml").is_file():
        raise InputError(f"{folder} holds other files and no run; it is not overwritten, choose another `output`")
    elif not settings.overwrite:
        raise InputError(
            f"{folder} already holds a run; choose another `output`, set `overwrite`, or {runs.how_to_go_on(folder)}"
        )


def _check_integrations(settings: Settings) -> None:
    from transformers.integrations import get_available_reporting_integrations

    here = get_available_reporting_integrations()
    for name in settings.training.report_to:
        if name not in here:
            raise InputError(
                f"`training.report_to` names {name!r}, which is not known or not installed; installed are: "
                f"{', '.join(here) or 'none'}"
            )


def _prepare_folder(folder: Path, settings: Settings, root: Path | None, resume: bool) -> None:
    if resume:
        write_json(folder / "environment.json", runs.environment())
        return
    start = Path(settings.data.root or root or ".").resolve()  # the run is read from other working folders as well
    settings = replace(settings, data=replace(settings.data, root=str(start)))
    config = yaml.safe_dump(to_dict(settings), sort_keys=False, allow_unicode=True)
    # An empty folder is filled, not replaced: it may be a mount point, or the working folder.
    empty = folder.is_dir() and not any(folder.iterdir())
    with nullcontext(folder) if empty else new_folder(folder) as inside:
        write_json(inside / "environment.json", runs.environment())
        write_text(inside / "config.yaml", config)


def _build(settings: Settings, method: str, data: Sequence[rows.TaskData]) -> tuple[runs.Model, Any]:
    moments = {d.task.name: Moments.of(d.splits["train"].targets) for d in data if d.task.kind == "regression"}
    model, tokenizer = runs.build(settings, method, [d.task for d in data], moments)
    quantise.check_trainable(model)
    return model, tokenizer


def _encode(settings: Settings, data: Sequence[rows.TaskData], model: runs.Model, tokenizer: Any) -> Splits:
    splits: dict[str, dict[int, Encoded]] = {"train": {}, "validation": {}, "test": {}}
    for row, d in enumerate(data):
        try:
            for name in splits:
                splits[name][row] = runs.encode_rows(
                    model, row, d.splits[name], tokenizer, settings.data.max_length, train=name == "train"
                )
        except InputError as error:
            raise InputError(f"task {d.task.name!r}: {error}") from error
    return splits


def _train_method(
    settings: Settings,
    method: str,
    model: runs.Model,
    data: Sequence[rows.TaskData],
    splits: Splits,
    collate: Collator,
    folder: Path,
    progress: Any,
) -> int | None:
    """Train one method and write its folder; if a signal stopped it, return the step."""
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    tasks = [d.task for d in data]
    trainer = MultiTaskTrainer(model, settings, tasks, splits, collate, folder)
    if progress is not None:
        trainer.add_callback(progress(label(method, settings.adapter), trainer))
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        (folder / "metrics.jsonl").unlink(missing_ok=True)  # of a start that did not get to its first checkpoint
    best = fit(trainer, checkpoint)
    if best is None:
        return int(trainer.state.global_step)
    found = scoring.predictions(model, splits["test"], collate, settings.scoring)
    scores = {"validation": best["validation"], "test": scoring.scored(tasks, splits["test"], found)}
    runs.save_adapter(model, settings, method, tasks, folder / "adapter")
    results = results_of(trainer, method, data, scores, best["step"], scoring.unparsed(tasks, found))
    write_text(folder / "adapter" / "README.md", model_card(settings, tasks, results))
    results["parameters"]["file_bytes"] = sum(p.stat().st_size for p in (folder / "adapter").rglob("*") if p.is_file())
    write_json(folder / "results.json", results)
    shutil.rmtree(folder / "checkpoints")
    return None


def fit(trainer: MultiTaskTrainer, checkpoint: Path | None = None) -> dict[str, Any] | None:
    """Train to the end, from a checkpoint if one is given, and load the best weights.

    Returns:
        Their `step` and `validation` scores; None if a signal stopped the training.
    """
    with _stop_on_signal(trainer):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if trainer.stopped:
        return None
    weights = runs.load_tensors(trainer.best / "weights.safetensors", ONE_BEFORE)
    runs.load_state(trainer.model, weights, trainer.best)
    return _read_json(trainer.best / "state.json", "step", "validation")


class MultiTaskTrainer(Trainer):
    """The Trainer on stateless batches, scored per task, with checkpoints free of pickle.

    Args:
        model: Adapted encoder and heads.
        settings: The run.
        tasks: In the order of their rows.
        splits: For "train" and "validation" each task row's tokens.
        collate: Pads a batch.
        folder: The run folder.
    """

    control: Any  # what the Trainer does after a step

    def __init__(
        self,
        model: runs.Model,
        settings: Settings,
        tasks: Sequence[Task],
        splits: Splits,
        collate: Collator,
        folder: Path,
    ) -> None:
        t = settings.training
        args = TrainingArguments(
            output_dir=str(folder),
            use_cpu=not torch.accelerator.is_available(),  # else bf16 is refused on a processor
            max_steps=t.steps,
            per_device_train_batch_size=t.batch_size // t.gradient_accumulation,
            gradient_accumulation_steps=t.gradient_accumulation,
            learning_rate=t.learning_rate,
            weight_decay=t.weight_decay,
            warmup_steps=t.warmup_steps,
            lr_scheduler_type={"constant": "constant_with_warmup"}.get(t.schedule, t.schedule),
            max_grad_norm=t.max_grad_norm,
            seed=t.seed,
            bf16=t.precision == "bf16",
            eval_strategy="steps",
            eval_steps=t.evaluate_every,
            save_strategy="steps",
            save_steps=t.checkpoint_every or t.evaluate_every,
            logging_steps=t.log_every,
            metric_for_best_model="average",
            greater_is_better=True,
            ignore_data_skip=True,
            remove_unused_columns=False,
            disable_tqdm=True,
            report_to=t.report_to or "none",
        )
        trained, validated = (TaskRows(list(splits[name].values())) for name in ("train", "validation"))
        super().__init__(model, args, data_collator=collate, train_dataset=trained, eval_dataset=validated)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.settings, self.tasks, self.splits, self.folder = settings, list(tasks), splits, folder
        self.sampler = Sampler(
            [len(split) for split in splits["train"].values()],
            batch_size=t.batch_size,
            seed=t.seed,
            strategy=settings.sampling.strategy,
            temperature=settings.sampling.temperature,
            limit=settings.sampling.limit,
            mixed=settings.sampling.mixed,
        )
        self.model_accepts_loss_kwargs = False
        self.best = folder / "checkpoints" / "best"
        self.stopped = False
        self.train_seconds = self.evaluation_seconds = 0.0  # of the parts of this run that are over
        self._started: float | None = None
        self._micro = 0
        self._since_log = np.zeros((2, len(tasks)))  # summed loss and rows of each task since the last line

    # --- a step is a function of (seed, step) ----------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return this rank's micro-batches from the current step on; they are sharded here, not by Accelerate."""
        batches = TrainingBatches(
            self.sampler,
            [split.lengths() for split in self.splits["train"].values()],
            self.args.max_steps,
            lambda: self.state.global_step,
            accumulation=self.args.gradient_accumulation_steps,
            rank=self.args.process_index,
            world_size=self.args.world_size,
        )
        return DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Take one forward and backward, with dropout keyed by (seed, step, micro-batch, rank)."""
        self._micro = (self._micro + 1) % self.args.gradient_accumulation_steps
        key = [self.args.seed, self.state.global_step, self._micro, self.args.process_index]
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Return the mean loss of the batch, and keep each task's share of it for the log.

        Raises:
            InputError: A loss is not finite.
        """
        out = model(**inputs)
        rows_of, losses = inputs["tasks"].cpu().numpy(), out["losses"].detach().float().cpu().numpy()
        if not np.isfinite(losses).all():
            name = self.tasks[rows_of[~np.isfinite(losses)][0]].name
            raise InputError(
                f"the loss of task {name!r} is not finite at step {self.state.global_step + 1}: training diverged; "
                "try a lower `training.learning_rate`"
            )
        np.add.at(self._since_log[0], rows_of, losses)
        np.add.at(self._since_log[1], rows_of, 1)
        return out["loss"]

    # --- what is measured --------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, and write a line of metrics.jsonl for the training loss."""
        super().log(logs, *args, **kwargs)
        if "loss" not in logs:
            return
        loss, seen = self._since_log
        self._write_line(
            kind="train",
            step=self.state.global_step,
            loss=float(loss.sum() / seen.sum()),
            learning_rate=logs["learning_rate"],
            seconds=round(self.seconds(), 3),
            examples=self.state.global_step * self.settings.training.batch_size,
            seen=self.seen(),
            task_loss={t.name: float(a / n) for t, a, n in zip(self.tasks, loss, seen, strict=True) if n},
        )
        self._since_log[:] = 0

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Score the validation splits; the average decides which weights are kept."""
        started = time.perf_counter()
        how = self.settings.scoring
        found = scoring.evaluate(self.model, self.tasks, self.splits["validation"], self.data_collator, how)
        spent = time.perf_counter() - started
        self.evaluation_seconds += spent
        self.train_seconds -= spent
        scores = {name: next(iter(values.values())) for name, values in found.items()}
        average = metrics.average(found)
        if self.state.best_metric is None or average > self.state.best_metric:
            self._write_best(found)
        self._write_line(
            kind="evaluation",
            step=self.state.global_step,
            split="validation",
            average=average,
            scores=scores,
            metrics=found,
        )
        logs = {"eval_average": average, **{f"eval_{name}": score for name, score in scores.items()}}
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    def seen(self) -> dict[str, int]:
        """Return how many rows of each task the steps so far have used."""
        counts = self.sampler.counts(self.state.global_step)
        return {task.name: int(n) for task, n in zip(self.tasks, counts, strict=True)}

    def seconds(self) -> float:
        """Return the time spent in training so far without evaluations, over all parts of a run, in seconds."""
        return self.train_seconds + (0.0 if self._started is None else time.perf_counter() - self._started)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, from a checkpoint if one is given."""
        self._started = time.perf_counter()
        out = super().train(*args, **kwargs)
        self.train_seconds, self._started = self.seconds(), None
        return out

    def _write_line(self, **values: Any) -> None:
        if self.args.should_save:
            path = self.folder / "metrics.jsonl"
            with explained(path), path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values, allow_nan=False) + "\n")

    # --- checkpoints: safetensors and JSON ---------------------------------------------------------------------------

    def _write_best(self, scores: Mapping[str, Mapping[str, float]]) -> None:
        if not self.args.should_save:
            return
        with new_folder(self.best) as folder:
            runs.save_tensors(runs.state(self.model), folder / "weights.safetensors")
            write_json(folder / "state.json", {"step": self.state.global_step, "validation": scores})

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step = self.state.global_step
        moments = self.optimizer.state_dict()["state"]
        log = self.folder / "metrics.jsonl"
        with new_folder(self.folder / "checkpoints" / f"step-{step:06d}") as folder:
            runs.save_tensors(runs.state(self.model), folder / "weights.safetensors")
            runs.save_tensors(
                {f"{i}.{name}": value for i, values in moments.items() for name, value in values.items()},
                folder / "optimizer.safetensors",
            )
            self.state.save_to_json(str(folder / "trainer_state.json"))
            write_json(
                folder / "state.json",
                {
                    "step": step,
                    "log_bytes": log.stat().st_size if log.exists() else 0,
                    "since_log": self._since_log.tolist(),
                    "train_seconds": self.seconds(),
                    "evaluation_seconds": self.evaluation_seconds,
                    "settings": _fingerprint(self.settings),
                },
            )
        for old in _checkpoints(self.folder)[: -self.settings.training.keep_checkpoints]:
            shutil.rmtree(old, ignore_errors=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        kept = _read_json(
            folder / "state.json", "settings", "log_bytes", "since_log", "train_seconds", "evaluation_seconds"
        )
        _read_json(folder / "trainer_state.json", "global_step")  # the Trainer reads it next
        _check_settings(folder, kept["settings"], self.settings)
        runs.load_state(self.model, runs.load_tensors(folder / "weights.safetensors", ONE_BEFORE), folder)
        self._since_log = np.array(kept["since_log"])
        self.train_seconds, self.evaluation_seconds = kept["train_seconds"], kept["evaluation_seconds"]
        log = self.folder / "metrics.jsonl"
        if log.exists():
            os.truncate(log, min(kept["log_bytes"], log.stat().st_size))  # later lines are written again

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        found = self.optimizer.state_dict()
        found["state"] = {}
        for name, value in runs.load_tensors(Path(checkpoint) / "optimizer.safetensors", ONE_BEFORE).items():
            i, _, key = name.partition(".")
            found["state"].setdefault(int(i), {})[key] = value
        self.optimizer.load_state_dict(found)
        schedule, step = self.lr_scheduler, self.state.global_step
        schedule.last_epoch, schedule._step_count = step - 1, step + 1  # (the count is for a warning only)
        schedule.step()  # the learning rate is a function of the step

    def _load_rng_state(self, checkpoint: str | None) -> None:
        pass  # there is none: `training_step` seeds each step


class _Steps(TrainerCallback):
    """Evaluates after the last step, and ends training after the running one when a signal came."""

    def __init__(self, trainer: MultiTaskTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the switches for what follows this step."""
        if state.global_step == state.max_steps:
            control.should_evaluate = control.should_log = True
            self.trainer.stopped = False  # a signal now comes too late to stop anything
        elif self.trainer.stopped:
            control.should_save = control.should_training_stop = True


@contextmanager
def _stop_on_signal(trainer: MultiTaskTrainer) -> Iterator[None]:
    """Turn the first Ctrl-C (or SIGTERM) into a checkpoint and a clean end; a second one interrupts at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        trainer.stopped = True
        logger.warning("stopping after this step; once more to stop at once")
        for name, handler in before.items():
            signal.signal(name, handler)

    trainer.add_callback(_Steps(trainer))
    before: dict[signal.Signals, Any] = {}
    try:
        for name in (signal.SIGINT, signal.SIGTERM):
            before[name] = signal.signal(name, stop)
    except ValueError:
        pass  # not the main thread: signals are somebody else's
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a run, or None."""
    found = _checkpoints(folder)
    return found[-1] if found else None


def _checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def _read_json(path: Path, *needed: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: can't be read ({error}); {ONE_BEFORE}") from error
    if not isinstance(found, dict) or not found.keys() >= set(needed):
        raise CheckpointError(f"{path}: expected {', '.join(needed)}; {ONE_BEFORE}")
    return found


def _check_settings(folder: Path, kept: Mapping[str, Any], settings: Settings) -> None:
    now = _fingerprint(settings)
    odd = sorted(name for name in now.keys() | kept.keys() if now.get(name) != kept.get(name))
    if odd:
        raise CheckpointError(
            f"{folder}: written with other settings ({', '.join(odd)}); resume with those of the run's own config.yaml"
        )


def _fingerprint(settings: Settings) -> dict[str, Any]:
    """What must be the same for a run to go on as if it had not stopped: `section.name` -> value."""
    kept = flat(settings)
    for name in ("output", "overwrite", "baselines", "data.root", "training.keep_checkpoints", "training.report_to"):
        del kept[name]
    return dict(json.loads(json.dumps(kept)))


def results_of(
    trainer: MultiTaskTrainer,
    method: str,
    data: Sequence[rows.TaskData],
    scores: Mapping[str, Mapping[str, Any]],
    best_step: int,
    unparsed: Mapping[str, int],
) -> dict[str, Any]:
    """Gather results.json: scores of both splits, what a constant scores, parameters and times."""
    settings, model = trainer.settings, trainer.model
    seen = trainer.seen()
    total = sum(p.numel() for p in model.parameters())
    heads = sum(p.numel() for p in model.heads.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    backbone = model.method.backbone_parameters
    steps = settings.training.steps
    means = {split: metrics.averages(found) for split, found in scores.items()}
    tasks = []
    for row, d in enumerate(data):
        name = d.task.name
        constant, trivial = None, {}
        for split in ("validation", "test"):
            targets = d.splits[split].targets
            constant, values = metrics.baseline(d.task, d.splits["train"].targets, len(targets))
            trivial[split] = metrics.score(d.task, targets, values)
        tasks.append(
            {
                "name": name,
                "kind": d.task.kind,
                "score_metric": d.task.metrics[0],
                "labels": list(d.task.labels),
                "rows": {split: len(found.targets) for split, found in d.splits.items()},
                "sampling": {"planned": float(trainer.sampler.probabilities[row]), "seen": seen[name]},
                "metrics": {split: scores[split][name] for split in ("validation", "test")},
                "baseline": {"name": constant, "metrics": trivial},
                "unparsed": unparsed[name],  # test predictions that are no answer, and count as wrong
            }
        )
    return {
        "name": trainer.folder.resolve().name,
        "method": method,
        "label": label(method, settings.adapter),
        "backbone": settings.backbone,
        "base": dict(model.method.base),
        "seed": settings.training.seed,
        "steps": steps,
        "best_step": best_step,
        "batch_size": settings.training.batch_size,
        "tasks": tasks,
        "averages": {name: {split: values[name] for split, values in means.items()} for name in means["test"]},
        "parameters": {
            "total": total,
            "trainable": trainable,
            "adapter": trainable - heads,
            "heads": heads,
            "trainable_percent": 100 * trainable / total,
            "per_task_percent": 100 * (trainable - heads) / backbone / len(tasks),  # counted as in the paper
        },
        "time": {
            "train_seconds": round(trainer.train_seconds, 2),
            "evaluation_seconds": round(trainer.evaluation_seconds, 2),
            "examples_per_second": round(steps * settings.training.batch_size / trainer.train_seconds, 2),
        },
    }
