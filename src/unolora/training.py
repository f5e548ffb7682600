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
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
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

from unolora import gradients, lock, metrics, processes, quantise, rates, recovery, runs, scoring
from unolora.atomic import explained, is_temporary, new_folder, sweep, write_json, write_text
from unolora.card import model_card
from unolora.data import Collator, Encoded, TaskRows, TrainingBatches, check_parts
from unolora.errors import InputError
from unolora.heads import Moments
from unolora.methods import label
from unolora.recovery import Checkpoints
from unolora.sampling import Sampler
from unolora.settings import Settings, to_dict
from unolora.tasks import Task, rows

logger = logging.getLogger(__name__)


class Interrupted(Exception):  # noqa: N818  # nothing went wrong
    """Training stopped on a signal, after writing a checkpoint; `folder` is the run to resume."""

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__(f"stopped at step {step}; {runs.how_to_go_on(folder)}")
        self.folder, self.step = folder, step


BEFORE_CONFIG = ("environment.json", runs.DATA)
"""What is written into a run folder before the config.yaml that makes it a run."""
WORST, LONGEST = 8, 400
"""Rows of a task whose texts predictions.json keeps, and characters of a text."""

Digests = Mapping[str, Mapping[str, str]]
"""Task -> split -> digest of its rows; see `runs.digests`."""

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
        ProcessLostError: Another process of the run failed or is gone.
    """
    processes.start()
    folder = Path(settings.output or "runs/run")
    with processes.watched(runs.how_to_go_on(folder)):
        _train(settings, folder, root, resume, progress)
    return folder


def _train(settings: Settings, folder: Path, root: Path | None, resume: bool, progress: Any) -> None:
    settings = runs.settled(settings)
    processes.first(lambda: _check_folder(folder, settings, resume))
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        raise InputError(
            "DeepSpeed alone can write its part of a checkpoint, and does so with pickle; use DDP or FSDP2"
        )
    check_parts(settings.training.batch_size, settings.training.gradient_accumulation, processes.count())
    _check_integrations(settings)
    data = load_data(settings, root)
    model, tokenizer = _build(settings, settings.method, data)  # what can't be built or read is known before
    splits = _encode(settings, data, model, tokenizer)  #         anything is written
    collate, digests = Collator(tokenizer), runs.digests(data)
    with ExitStack() as held:
        processes.first(lambda: _claim(held, folder, settings, root, digests, resume))
        if settings.training.deterministic:
            held.enter_context(_deterministic())
        built = {settings.method: model}
        for method in [settings.method, *settings.baselines]:
            own = folder if method == settings.method else folder / "baselines" / method
            if processes.first(lambda own=own: _is_finished(own)):  # type: ignore[misc]
                continue
            model = built.pop(method) if method in built else _build(settings, method, data)[0]
            stopped = _train_method(settings, method, model, data, digests, splits, collate, own, progress)
            if stopped is not None:
                raise Interrupted(folder, stopped)
        processes.first(lambda: _analyse(folder, settings))
        from unolora.report import write_report

        processes.first(lambda: write_report(folder) and None)


def _analyse(folder: Path, settings: Settings) -> None:
    """Write what was learned, by the run and by those beside it, where they have an A and a B."""
    from unolora import analysis

    own = {method: folder / "baselines" / method for method in settings.baselines} | {settings.method: folder}
    found = [own[method] for method in (settings.method, *settings.baselines) if method in analysis.WITH_PAIRS]
    if found:
        analysis.write(analysis.analyze(found), folder / "analysis")


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
        kept = recovery.fingerprint(runs.read_settings(folder))
        recovery.check_settings(folder, kept, recovery.fingerprint(settings))
    elif not folder.is_dir() or _is_empty(folder):
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


def _is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing, beside what a start that was killed may have left."""
    left = (lock.NAME, *BEFORE_CONFIG)
    return all(path.name in left or is_temporary(path) for path in folder.iterdir())


def _claim(
    held: ExitStack,
    folder: Path,
    settings: Settings,
    root: Path | None,
    digests: Digests,
    resume: bool,
) -> None:
    """Hold the run folder until `held` is left, and write what the run is made of into it."""
    held.callback(_remove_if_not_begun, folder, not folder.exists())
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    own = held.enter_context(lock.locked(folder))
    _check_folder(folder, settings, resume)  # once more, now that nobody else changes it
    environment = {**runs.environment(), "processes": processes.count()}
    sweep(folder)
    if resume:
        runs.check_data(folder, digests)
        write_json(folder / "environment.json", environment)
        return
    start = Path(settings.data.root or root or ".").resolve()  # the run is read from other working folders as well
    settings = replace(settings, data=replace(settings.data, root=str(start)))
    # An empty folder is filled, not replaced: it may be a mount point, or the working folder. What has no config.yaml,
    # which comes last, is no run.
    with nullcontext(folder) if _is_empty(folder) else new_folder(folder) as inside:
        if inside != folder:
            own.also(inside)
        write_json(inside / "environment.json", environment)
        write_json(inside / runs.DATA, digests)
        write_text(inside / "config.yaml", yaml.safe_dump(to_dict(settings), sort_keys=False, allow_unicode=True))


def _remove_if_not_begun(folder: Path, new: bool) -> None:
    if folder.is_dir() and _is_empty(folder):
        with suppress(OSError):
            for name in BEFORE_CONFIG:
                (folder / name).unlink(missing_ok=True)
            if new:
                folder.rmdir()


def _is_finished(folder: Path) -> bool:
    """Whether a method was trained to its end before the run was stopped."""
    if not (folder / "results.json").is_file():
        return False
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return True


@contextmanager
def _deterministic() -> Iterator[None]:
    """Let torch refuse, for as long as the context lasts, what does not give the same bits each time."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _build(settings: Settings, method: str, data: Sequence[rows.TaskData]) -> tuple[runs.Model, Any]:
    moments = {d.task.name: Moments.of(d.splits["train"].targets) for d in data if d.task.kind == "regression"}
    model, tokenizer = runs.build(settings, method, [d.task for d in data], moments)
    if method == "unolora" and settings.adapter.conditioning == "text":
        tuner: Any = model.method.backbone.base_model
        tuner.describe({d.task.name: d.task.wordings for d in data}, tokenizer)
    quantise.check_trainable(model)
    if not model.method.mixes and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise InputError(
            f"method {method!r} runs a batch task by task, so ranks would ask for each other's parts of the weights "
            "(FSDP) at different times; use DDP"
        )
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
    digests: Digests,
    splits: Splits,
    collate: Collator,
    folder: Path,
    progress: Any,
) -> int | None:
    """Train one method and write its folder; if a signal stopped it, return the step."""
    tasks = [d.task for d in data]
    checkpoints = checkpoints_of(folder, settings, method, digests)
    trainer = MultiTaskTrainer(model, settings, tasks, splits, collate, checkpoints)
    if progress is not None:
        trainer.add_callback(progress(label(method, settings.adapter), trainer))
    checkpoint = processes.first(lambda: _begin(checkpoints))
    best = fit(trainer, checkpoint)
    if best is None:
        return int(trainer.state.global_step)
    scores, predicted, unparsed = {"validation": best["validation"]}, None, dict.fromkeys((t.name for t in tasks), 0)
    if settings.training.test:
        answers = scoring.answers(model, tasks, splits["test"], collate, settings.scoring)
        found = {row: values for row, (values, _) in answers.items()}
        scores["test"] = scoring.scored(tasks, splits["test"], found)
        predicted, unparsed = _predictions(data, answers), scoring.unparsed(tasks, found)
    results = results_of(trainer, method, data, scores, best["step"], unparsed)
    kept = checkpoints.best(best["step"])
    processes.first(lambda: _finish(model, settings, method, data, kept, checkpoints, results, predicted))
    return None


def checkpoints_of(folder: Path, settings: Settings, method: str, digests: Digests) -> Checkpoints:
    """Return the checkpoints of one method's training in a folder, and what they must go with."""
    identity = {"settings": recovery.fingerprint(settings), "method": method, "data": digests}
    return Checkpoints(folder, identity, settings.training.keep_checkpoints)


def fit(trainer: MultiTaskTrainer, checkpoint: str | None = None) -> dict[str, Any] | None:
    """Train to the end, from a checkpoint if one is given, and load the best weights.

    Returns:
        Their `step` and `validation` scores; None if a signal stopped the training.
    """
    with _stop_on_signal(trainer):
        trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.stopped:
        return None
    trainer.try_average()
    best = trainer.checkpoints.best(trainer.state.best_global_step)
    processes.first(lambda: recovery.check(best))
    runs.load_state(trainer.model, runs.load_tensors(best / "weights.safetensors"), best)
    return recovery.read_json(best / "state.json", "step", "validation")


def _begin(checkpoints: Checkpoints) -> str | None:
    """Make a method's folder and find the checkpoint to go on from; without one the log starts anew."""
    with explained(checkpoints.run):
        checkpoints.run.mkdir(parents=True, exist_ok=True)
        sweep(checkpoints.run)
    checkpoint = checkpoints.last_good()
    if checkpoint is None:
        (checkpoints.run / recovery.LOG).unlink(missing_ok=True)
        return None
    checkpoints.restore_log(checkpoint)
    return str(checkpoint)


def _finish(
    model: runs.Model,
    settings: Settings,
    method: str,
    data: Sequence[rows.TaskData],
    best: Path,
    checkpoints: Checkpoints,
    results: dict[str, Any],
    predicted: dict[str, Any] | None,
) -> None:
    """Write what a method leaves: its adapter, then its results, which say that it is finished."""
    if processes.sharded(model):  # here is only a part of it
        model = _build(settings, method, data)[0]
        runs.load_state(model, runs.load_tensors(best / "weights.safetensors"), best)
    adapter = checkpoints.run / "adapter"
    runs.save_adapter(model, settings, method, [d.task for d in data], adapter)
    write_text(adapter / "README.md", model_card(settings, [d.task for d in data], results))
    results["parameters"]["file_bytes"] = sum(p.stat().st_size for p in adapter.rglob("*") if p.is_file())
    if predicted is not None:
        write_json(checkpoints.run / "predictions.json", predicted)
    write_json(checkpoints.run / "results.json", results)
    shutil.rmtree(checkpoints.folder)


class MultiTaskTrainer(Trainer):
    """The Trainer on stateless batches, scored per task, with checkpoints free of pickle.

    Args:
        model: Adapted encoder and heads.
        settings: The run.
        tasks: In the order of their rows.
        splits: For "train" and "validation" each task row's tokens.
        collate: Pads a batch.
        checkpoints: Those of the run, whose folder also gets the log.
    """

    control: Any  # what the Trainer does after a step

    def __init__(
        self,
        model: runs.Model,
        settings: Settings,
        tasks: Sequence[Task],
        splits: Splits,
        collate: Collator,
        checkpoints: Checkpoints,
    ) -> None:
        t = settings.training
        args = TrainingArguments(
            output_dir=str(checkpoints.run),
            use_cpu=not torch.accelerator.is_available(),  # else bf16 is refused on a processor
            max_steps=t.steps,
            per_device_train_batch_size=max(1, t.batch_size // t.gradient_accumulation // processes.count()),
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
            logging_nan_inf_filter=False,  # it waits for the device at each micro-batch; such steps are skipped here
            ddp_find_unused_parameters=not model.method.mixes,  # a rank's rows may lack a task, and so its parameters
        )
        model._no_split_modules = processes.layers(model)  # type: ignore[assignment]  # where Accelerate looks for it
        trained, validated = (TaskRows(list(splits[name].values())) for name in ("train", "validation"))
        super().__init__(model, args, data_collator=collate, train_dataset=trained, eval_dataset=validated)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.settings, self.tasks, self.splits = settings, list(tasks), splits
        self.checkpoints, self.folder = checkpoints, checkpoints.run
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
        self.stopped = False
        self.train_seconds = self.evaluation_seconds = 0.0  # of the parts of this run that are over
        self._started: float | None = None
        self._micro = 0
        # Of each task in the current step, on the device: the sum of the finite losses, their rows, and the other rows
        self._step = torch.zeros(3, len(tasks), dtype=_exact(args.device), device=args.device)
        self._since_log = torch.zeros_like(self._step[:2])  # the first two since the last line, of this rank
        self.skips = Skips()
        self._pulls: dict[int, Tensor] = {}  # the running step's gradient of each task, where it is to be logged

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make AdamW, with learning rates apart where the settings say so."""
        new = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if new:
            t = self.settings.training
            rates.part(optimizer, self.model if model is None else model, t.b_rate_ratio, t.hypernetwork_rate_ratio)
        return optimizer

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
        """Return the mean loss of the batch, and keep each task's share of it on the device."""
        out = model(**inputs)
        losses = out["losses"].detach().to(self._step.dtype)
        own = inputs["tasks"] == torch.arange(len(self.tasks), device=losses.device).unsqueeze(1)  # [K, B]
        finite = own & losses.isfinite()
        self._step[0] += torch.where(finite, losses, 0).sum(1)
        self._step[1] += finite.sum(1)
        self._step[2] += (own & ~finite).sum(1)
        if self._conflict_is_due():
            parameters = gradients.shared(self.model)
            for row, gradient in gradients.of_tasks(out["losses"], inputs["tasks"], parameters).items():
                self._pulls[row] = self._pulls.get(row, 0) + gradient
        return out["loss"]

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip the gradients, and skip the step if a loss or a gradient of any rank is not finite.

        Without gradients the optimiser leaves weights and moments as they are. Looking at the norm is the one time in
        a step that the host waits for the device.
        """
        norm = super()._clip_grad_norm(model)
        odd = torch.cat([self._step[2] > 0, ~processes.whole(norm.detach()).isfinite().reshape(1)]).float()
        *of_tasks, of_norm = processes.largest(odd).tolist()
        if of_norm or any(of_tasks):
            for parameter in model.parameters():
                parameter.grad = None
            self._skip([task.name for task, bad in zip(self.tasks, of_tasks, strict=True) if bad])
        else:
            self._since_log += self._step[:2]
            self.skips.in_a_row = 0
        self._step.zero_()
        return norm

    def _skip(self, tasks: list[str]) -> None:
        """Count a step that is not taken, and stop after too many in a row.

        Raises:
            InputError: It was one too many.
        """
        self.skips.count(tasks)
        step, most = self.state.global_step + 1, self.settings.training.max_skipped
        what = f"the loss of task {tasks[0]!r}" if tasks else "a gradient"
        logger.warning("step %d is skipped: %s is not finite", step, what)
        if self.skips.in_a_row < most:
            self._write_line(kind="skipped", step=step, tasks=tasks)
            return
        path = self.folder / "not-finite.json"
        processes.first(lambda: write_json(path, self._rows_of_step(step - 1)))
        raise InputError(
            f"{what} is not finite at step {step}, the {most}. in a row: training diverged; try a lower "
            f"`training.learning_rate` (the rows of the step are in {path})"
        )

    def _rows_of_step(self, step: int) -> list[dict[str, Any]]:
        """Describe the global batch of a step, for a person to look at."""
        decode = self.data_collator.tokenizer.decode
        found = []
        for task, row in self.sampler.batch(step):
            _, split, place = self.train_dataset[task, row]
            tokens = split.inputs["input_ids"][place]
            found.append(
                {
                    "task": self.tasks[task].name,
                    "row": row,
                    "target": float(split.targets[place]),
                    "tokens": list(tokens),
                    "text": decode(tokens),
                }
            )
        return found

    def _conflict_is_due(self) -> bool:
        every = self.settings.training.conflict_every
        return every is not None and (self.state.global_step + 1) % every == 0 and self.model.training

    def log_conflict(self) -> None:
        """Write the cosines between the gradients of the step's tasks, if they were due, as a line of metrics.jsonl."""
        if not self._pulls:
            return
        names = [self.tasks[row].name for row in sorted(self._pulls)]
        cosines = gradients.cosines([self._pulls[row] for row in sorted(self._pulls)])
        self._pulls = {}
        table = {
            name: {other: round(value, 4) for other, value in zip(names, row, strict=True) if other != name}
            for name, row in zip(names, cosines, strict=True)
        }
        self._write_line(kind="conflict", step=self.state.global_step, cosines=table)

    # --- what is measured --------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, and write a line of metrics.jsonl for the training loss."""
        if "loss" not in logs:
            super().log(logs, *args, **kwargs)
            return
        loss, seen = np.array(processes.summed(self._since_log).tolist())
        self._since_log.zero_()
        if not seen.any():  # all steps since the last line were skipped
            return
        logs["loss"] = float(loss.sum() / seen.sum())  # the Trainer's own counts skipped steps
        super().log(logs, *args, **kwargs)
        self._write_line(
            kind="train",
            step=self.state.global_step,
            loss=logs["loss"],
            learning_rate=logs["learning_rate"],
            seconds=round(self.seconds(), 3),
            examples=self.state.global_step * self.settings.training.batch_size,
            seen=self.seen(),
            task_loss={t.name: float(a / n) for t, a, n in zip(self.tasks, loss, seen, strict=True) if n},
        )

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
            weights, step = self._weights(), self.state.global_step
            processes.first(lambda: self.checkpoints.write_best(step, weights, found))
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

    def try_average(self) -> None:
        """Score the mean of the last checkpoints' weights, if asked for; it is kept if it is better than the best."""
        many, before = self.settings.training.average_last, self.state.best_metric
        if many == 1:
            return
        paths = recovery.found(self.folder)[-many:]
        states = [runs.load_tensors(path / "weights.safetensors") for path in paths]
        mean = {
            name: torch.stack([state[name] for state in states]).mean(0) if value.is_floating_point() else value
            for name, value in states[-1].items()
        }
        runs.load_state(self.model, mean, paths[-1])
        average = self.evaluate()["eval_average"]
        if before is None or average > before:
            self.state.best_metric, self.state.best_global_step = average, self.state.global_step

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

    def _weights(self) -> dict[str, Tensor]:
        return {name: processes.whole(value) for name, value in runs.state(self.model).items()}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        weights = self._weights()
        moments = {
            f"{i}.{name}": processes.whole(value)
            for i, values in self.optimizer.state_dict()["state"].items()
            for name, value in values.items()
        }
        state = {
            "since_log": processes.summed(self._since_log).tolist(),
            "skips": vars(self.skips),
            "train_seconds": self.seconds(),
            "evaluation_seconds": self.evaluation_seconds,
        }
        step, save = self.state.global_step, self.state.save_to_json
        processes.first(lambda: self.checkpoints.write(step, weights, moments, state, save))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        kept = recovery.read_json(folder / "state.json", "since_log", "skips", "train_seconds", "evaluation_seconds")
        runs.load_state(self.model, runs.load_tensors(folder / "weights.safetensors"), folder)
        if processes.rank() == 0:  # it is a sum over ranks
            self._since_log = torch.tensor(kept["since_log"], dtype=self._step.dtype, device=self._step.device)
        self.skips = Skips(**kept["skips"])
        self.train_seconds, self.evaluation_seconds = kept["train_seconds"], kept["evaluation_seconds"]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        found = self.optimizer.state_dict()
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        found["state"] = {}
        for name, value in runs.load_tensors(Path(checkpoint) / "optimizer.safetensors").items():
            i, _, key = name.partition(".")
            cut = processes.spread(value, parameters[int(i)]) if value.dim() else value  # a number is a step count
            found["state"].setdefault(int(i), {})[key] = cut
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
        self.trainer.log_conflict()
        asked = torch.tensor(float(self.trainer.stopped), device=args.device)
        self.trainer.stopped = bool(processes.largest(asked))  # a signal may reach the ranks at different steps
        if state.global_step == state.max_steps:
            control.should_evaluate = control.should_log = True
            self.trainer.stopped = False  # a signal now comes too late to stop anything
        elif self.trainer.stopped:
            control.should_save = control.should_training_stop = True


@dataclass
class Skips:
    """The steps that were not taken, since something in them was not finite."""

    steps: int = 0
    in_a_row: int = 0
    tasks: dict[str, int] = field(default_factory=dict)
    """Of each task whose loss was not finite, in how many of them; in the others only the gradient was not."""

    def count(self, tasks: Sequence[str]) -> None:
        """Count one more."""
        self.steps, self.in_a_row = self.steps + 1, self.in_a_row + 1
        for task in tasks:
            self.tasks[task] = self.tasks.get(task, 0) + 1


def _exact(device: torch.device) -> torch.dtype:
    """The widest numbers that a device adds up."""
    return torch.float32 if device.type == "mps" else torch.float64


@contextmanager
def _stop_on_signal(trainer: MultiTaskTrainer) -> Iterator[None]:
    """Turn the first Ctrl-C (or SIGTERM) into a checkpoint and a clean end; a second one interrupts at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        trainer.stopped = True
        if processes.count() > 1:  # the launcher passes on what the terminal has sent already, and kills in the end
            return
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
    """Return the newest checkpoint of a run, or None."""
    paths = recovery.found(folder)
    return paths[-1] if paths else None


def _peak_bytes() -> int:
    """Return the most memory held so far: of the accelerator, or else of this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _predictions(data: Sequence[rows.TaskData], answers: Mapping[int, tuple[Any, Any]]) -> dict[str, Any]:
    """Gather predictions.json: of the test split all predictions, and the texts of the worst ones."""
    tasks = {}
    for row, d in enumerate(data):
        values, confidence = answers[row]
        split = d.splits["test"]
        worst = metrics.worst(d.task, split.targets, values, confidence)[:WORST]
        tasks[d.task.name] = {
            "targets": split.targets.tolist(),
            "predictions": [None if np.isnan(value) else round(value, 6) for value in values.tolist()],
            "confidence": [None if np.isnan(value) else round(value, 4) for value in confidence.tolist()],
            "worst": [
                {"row": place, "texts": [text[:LONGEST] + "…" * (len(text) > LONGEST) for text in split.texts[place]]}
                for place in worst
            ],
        }
    return {"split": "test", "tasks": tasks}


def results_of(
    trainer: MultiTaskTrainer,
    method: str,
    data: Sequence[rows.TaskData],
    scores: Mapping[str, Mapping[str, Any]],
    best_step: int,
    unparsed: Mapping[str, int],
) -> dict[str, Any]:
    """Gather results.json: scores of the splits that were scored, what a constant scores, parameters and times."""
    settings, model = trainer.settings, trainer.model
    total = sum(p.numel() for p in model.parameters())
    heads = sum(p.numel() for p in model.heads.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    backbone = model.method.backbone_parameters
    steps = settings.training.steps
    means = {split: metrics.averages(found) for split, found in scores.items()}
    return {
        "name": trainer.folder.resolve().name,
        "method": method,
        "label": label(method, settings.adapter),
        "backbone": settings.backbone,
        "base": dict(model.method.base),
        "seed": settings.training.seed,
        "steps": steps,
        "best_step": best_step,
        "skipped": {"steps": trainer.skips.steps, "tasks": trainer.skips.tasks},
        "batch_size": settings.training.batch_size,
        "tasks": entries(trainer, data, scores, unparsed),
        "averages": {name: {split: values[name] for split, values in means.items()} for name in means["validation"]},
        "parameters": {
            "total": total,
            "trainable": trainable,
            "adapter": trainable - heads,
            "heads": heads,
            "trainable_percent": 100 * trainable / total,
            "per_task_percent": 100 * (trainable - heads) / backbone / len(data),  # counted as in the paper
        },
        "memory": {"peak_bytes": _peak_bytes()},
        "time": {
            "train_seconds": round(trainer.train_seconds, 2),
            "evaluation_seconds": round(trainer.evaluation_seconds, 2),
            "examples_per_second": round(steps * settings.training.batch_size / trainer.train_seconds, 2),
        },
    }


def entries(
    trainer: MultiTaskTrainer,
    data: Sequence[rows.TaskData],
    scores: Mapping[str, Mapping[str, Any]],
    unparsed: Mapping[str, int],
) -> list[dict[str, Any]]:
    """Describe the tasks of a training as results.json does."""
    seen = trainer.seen()
    tasks = []
    for row, d in enumerate(data):
        name = d.task.name
        constant, trivial = None, {}
        for split in scores:
            targets = d.splits[split].targets
            constant, values = metrics.baseline(d.task, d.splits["train"].targets, len(targets))
            trivial[split] = metrics.score(d.task, targets, values)
        tasks.append(
            {
                "name": name,
                "kind": d.task.kind,
                "score_metric": d.task.metrics[0],
                "labels": list(d.task.labels),
                "rows": {split: len(found) for split, found in d.splits.items()},
                "sampling": {"planned": float(trainer.sampler.probabilities[row]), "seen": seen[name]},
                "metrics": {split: found[name] for split, found in scores.items()},
                "baseline": {"name": constant, "metrics": trivial},
                "unparsed": unparsed[name],  # test predictions that are no answer, and count as wrong
            }
        )
    return tasks
