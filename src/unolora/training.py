"""A run from its settings to its report: build each method, train it, score it, and write what it leaves."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from unolora import processes, quantise, recovery, run_folder, runs, scoring
from unolora.data import Collator, Encoded, check_parts
from unolora.errors import InputError
from unolora.heads import Moments
from unolora.methods import label
from unolora.recovery import Checkpoints
from unolora.results import predictions_of, results_of
from unolora.run_folder import Digests
from unolora.settings import Settings
from unolora.tasks import rows
from unolora.trainer import MultiTaskTrainer, Splits, Steps

logger = logging.getLogger(__name__)


class Interrupted(Exception):  # noqa: N818  # nothing went wrong
    """Training stopped on a signal, after writing a checkpoint; `folder` is the run to resume."""

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__(f"stopped at step {step}; {runs.how_to_go_on(folder)}")
        self.folder, self.step = folder, step


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
    processes.first(lambda: run_folder.check(folder, settings, resume))
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        raise InputError(
            "DeepSpeed alone can write its part of a checkpoint, and does so with pickle; use DDP or FSDP2"
        )
    check_parts(settings.training.batch_size, settings.training.gradient_accumulation, processes.count())
    _check_integrations(settings)
    data = load_data(settings, root)
    model, tokenizer = build(settings, settings.method, data)  # what can't be built or read is known before
    splits = _encode(settings, data, model, tokenizer)  #         anything is written
    collate, digests = Collator(tokenizer), runs.digests(data)
    with ExitStack() as held:
        processes.first(lambda: run_folder.claim(held, folder, settings, root, digests, resume))
        if settings.training.deterministic:
            held.enter_context(_deterministic())
        built = {settings.method: model}
        for method in [settings.method, *settings.baselines]:
            own = folder if method == settings.method else folder / "baselines" / method
            if processes.first(lambda own=own: run_folder.is_finished(own)):  # type: ignore[misc]
                continue
            model = built.pop(method) if method in built else build(settings, method, data)[0]
            stopped = _train_method(settings, method, model, data, digests, splits, collate, own, progress)
            if stopped is not None:
                raise Interrupted(folder, stopped)
        processes.first(lambda: write_analysis(folder, settings))
        from unolora.report import write_report

        processes.first(lambda: write_report(folder) and None)


def write_analysis(folder: Path, settings: Settings) -> None:
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


def _check_integrations(settings: Settings) -> None:
    from transformers.integrations import get_available_reporting_integrations

    here = get_available_reporting_integrations()
    for name in settings.training.report_to:
        if name not in here:
            raise InputError(
                f"`training.report_to` names {name!r}, which is not known or not installed; installed are: "
                f"{', '.join(here) or 'none'}"
            )


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


def build(settings: Settings, method: str, data: Sequence[rows.TaskData]) -> tuple[runs.Model, Any]:
    """Build a method to be trained on these rows, with fresh weights that depend on the seed only.

    Returns:
        The model and the tokenizer.

    Raises:
        InputError: The backbone can't be loaded, or the method does not fit it or how it is to be trained.
    """
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
    checkpoints = run_folder.checkpoints_of(folder, settings, method, digests)
    trainer = MultiTaskTrainer(model, settings, tasks, splits, collate, checkpoints)
    if progress is not None:
        trainer.add_callback(progress(label(method, settings.adapter), trainer))
    checkpoint = processes.first(lambda: run_folder.begin(checkpoints))
    best = fit(trainer, checkpoint)
    if best is None:
        return int(trainer.state.global_step)
    scores, predicted, unparsed = {"validation": best["validation"]}, None, dict.fromkeys((t.name for t in tasks), 0)
    if settings.training.test:
        answers = scoring.answers(model, tasks, splits["test"], collate, settings.scoring)
        found = {row: values for row, (values, _) in answers.items()}
        scores["test"] = scoring.scored(tasks, splits["test"], found)
        predicted, unparsed = predictions_of(data, answers), scoring.unparsed(tasks, found)
    results = results_of(trainer, method, data, scores, best["step"], unparsed)
    kept = checkpoints.best(best["step"])
    processes.first(lambda: _finish(model, settings, method, data, kept, checkpoints, results, predicted))
    return None


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

    trainer.add_callback(Steps(trainer))
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
    """Write what a method leaves, by the process that writes."""
    if processes.sharded(model):  # here is only a part of it
        model = build(settings, method, data)[0]
        runs.load_state(model, runs.load_tensors(best / "weights.safetensors"), best)
    run_folder.finish(model, settings, method, [d.task for d in data], checkpoints, results, predicted)
