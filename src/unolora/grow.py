"""Tasks that come, go or change their names after training, each time as a new run folder.

    A, B, hypernetwork   frozen, so that the outputs of the tasks that stay are the same bit for bit
    task embedding       + a row, learned           - its row         the row under another name
    heads                + a head, learned          - its head        the head under another name

A task that is added is trained alone: no other task's row or head is there to be changed, by weight decay for example.
With `tune` more is trained, on rows of all tasks in the run's own mix, and what that does to each old task is measured.

Axes: N rows, D width of the pooled states, d width of the task embedding, C outputs of a head.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
import yaml
from torch import Tensor

from unolora import metrics, quantise, recovery, runs, scoring
from unolora.atomic import new_folder, write_json, write_text
from unolora.card import model_card
from unolora.data import Collator, Encoded
from unolora.errors import InputError, unknown
from unolora.heads import Moments, MultiTaskModel, TaskHeads
from unolora.hypernetwork import encode_sample
from unolora.results import entries
from unolora.run_folder import checkpoints_of
from unolora.runs import Model, Run
from unolora.settings import Settings, to_dict
from unolora.tasks import TASKS, Task, get
from unolora.tasks.rows import TaskData, in_turns, order
from unolora.text import Answers, TextModel
from unolora.trainer import MultiTaskTrainer
from unolora.training import fit

STARTS = ("nearest", "mean", "scratch")
TUNES = ("row", "hypernetwork", "all")
NEAREST_EXAMPLES = 64
"""Rows on which the old tasks' embeddings are tried."""
RIDGE = 1e-2
"""Penalty of the probe that stands in for a head not yet learned, in units of the mean squared norm of a row."""


@dataclass(frozen=True)
class Lesson:
    """What is trained on when a task is added: that task, and with replay the old ones before it."""

    data: list[TaskData]
    splits: dict[str, dict[int, Encoded]]
    start: str | None
    """Where the new row starts."""


@dataclass(frozen=True)
class Part:
    """What a model has for one task."""

    task: Task
    vector: Tensor
    """Row of the task embedding [d], or vectors of its descriptions [n, D]; empty where there is neither."""
    linear: dict[str, Tensor]
    """`weight` [C, D] and `bias` [C] of its head; empty where answers are text."""
    buffers: dict[str, Tensor]
    """Mean and standard deviation, or the range, of its training targets."""


def read_task(name: str) -> tuple[Task, Path | None]:
    """Read a task from a YAML file that spells one, or by its built-in name.

    Returns:
        The task, and the folder that its files start from.

    Raises:
        InputError: There is no such file or task, or the file makes no sense.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml") and not path.is_file():
        if path.parent == Path() and name in TASKS:
            return get(name), None
        raise InputError(f"{unknown('task', name, TASKS)}; or give a YAML file that spells one")
    found = runs.read_yaml(path, what="give a YAML file that spells one task")
    if set(found) == {"tasks"} and isinstance(found["tasks"], list) and len(found["tasks"]) == 1:
        found = found["tasks"][0]
    try:
        return Task.from_dict(found), path.parent
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def add_task(
    folder: Path,
    task: Task,
    output: Path,
    *,
    root: Path | None = None,
    start: str | None = None,
    tune: str = "row",
    examples: int | None = None,
    steps: int | None = None,
    learning_rate: float | None = None,
    progress: Any = None,
) -> Path:
    """Teach a run one more task and write the whole as a new run.

    Args:
        folder: The run, of the method `unolora`.
        task: The new task.
        output: Run folder to write.
        root: Folder that the task's relative files start from.
        start: Where its row of the task embedding starts: "nearest" (the old task with the least loss on a few of its
            examples), "mean" (of the old tasks) or "scratch" (random); by default "nearest". A run with conditioning
            "text" has no such rows: there the task's descriptions say its scale.
        tune: What is trained: "row" (of the new task, and its head; the old tasks' outputs stay as they are, bit for
            bit), "hypernetwork" (and every head) or "all" (A and B too). The last two replay the old tasks' rows.
        examples: Learn from that many training rows, as evenly over the labels as they come; all by default.
        steps: Of its training; by default those of the run. 0 with conditioning "text" and answers of text, where
            nothing is left to be learned: the new task's rows are for scoring alone.
        learning_rate: Of its training; by default that of the run.
        progress: Called as progress(label, trainer); gives a Trainer callback that shows it.

    Returns:
        `output`.

    Raises:
        InputError: The task is there already, its rows can't be used, or there is nothing to learn.
        KeyboardInterrupt: A signal stopped it; nothing was written.
    """
    if start is not None and start not in STARTS:
        raise unknown("start", start, STARTS)
    if tune not in TUNES:
        raise unknown("tune", tune, TUNES)
    if examples is not None and examples < 1:
        raise InputError(f"`examples` must be at least 1, got {examples}")
    settings = _settings(folder, output)
    names = [each.name for each in runs.read_tasks(folder / "adapter" / "tasks.json")]
    if task.name in names:
        raise InputError(f"{folder}: task {task.name!r} is there already; give the new one another name, or remove it")
    text = runs.form(settings) == "text"
    if settings.adapter.conditioning == "none" and tune == "hypernetwork":
        raise InputError(f"{folder}: with `adapter.conditioning` none there is no hypernetwork; tune row or all")
    if text and settings.adapter.conditioning == "none" and tune == "row":
        raise InputError(
            f"{folder}: with `adapter.conditioning` none and answers of text, nothing of the model belongs to a task, "
            "so there is nothing to learn; tune all, or train a run with conditioning task or task+sample"
        )
    zero_shot = _is_zero_shot(folder, settings, text, start, tune, steps)
    own = settings if zero_shot else _shortened(settings, steps, learning_rate)
    results = _results(folder)
    full = runs.read_data(own, _rooted(task.as_text() if text else task, root))
    data = _fewer(full, examples, own.training.seed)
    run = runs.load_run(folder)
    quantise.check_trainable(run.model)
    parts = _parts(run.model, run.tasks)
    lesson = _prepare(run, parts, own, data, start or "nearest", tune)
    tasks = [each.task for each in lesson.data]
    with new_folder(output) as temporary:
        checkpoints = checkpoints_of(temporary, own, "unolora", runs.digests(lesson.data))
        trainer = MultiTaskTrainer(run.model, own, tasks, lesson.splits, Collator(run.tokenizer), checkpoints)
        best = _untrained(trainer) if zero_shot else _trained(trainer, task, temporary, progress)
        change = {
            "added": task.name,
            "start": lesson.start,
            "tune": tune,
            "examples": 0 if zero_shot else len(data.splits["train"]),
            "steps": 0 if zero_shot else own.training.steps,
            "learning_rate": own.training.learning_rate,
            "best_step": best["step"],
        }
        *again, entry = _entries(trainer, lesson.data, best)
        if again:
            change["old_tasks"] = _moved(results["tasks"], again)
            results["tasks"] = [_rescored(*pair) for pair in zip(results["tasks"], again, strict=True)]
        results["tasks"].append(entry)
        shutil.rmtree(checkpoints.folder, ignore_errors=True)
        learned = _parts(run.model, tasks)
        whole = learned if again else [*parts, *learned]
        _write(run, whole, output, temporary, results, change, runs.digests([full]))
    return output


def remove_task(folder: Path, name: str, output: Path) -> Path:
    """Write a run without one of its tasks.

    Raises:
        InputError: The run has no such task, or no other.
    """
    _settings(folder, output)
    run = runs.load_run(folder)
    row = run.row(name)
    if len(run.tasks) == 1:
        raise InputError(f"{folder}: {name!r} is its only task; delete the folder instead")
    parts = _parts(run.model, run.tasks)
    results = _results(folder)
    results["tasks"] = [entry for entry in results["tasks"] if entry["name"] != name]
    with new_folder(output) as temporary:
        _write(run, parts[:row] + parts[row + 1 :], output, temporary, results, {"removed": name})
    return output


def rename_task(folder: Path, name: str, new_name: str, output: Path) -> Path:
    """Write a run in which one of the tasks has another name; its rows stay in the splits that they are in.

    Raises:
        InputError: The run has no such task, or the new name is taken or can't be one.
    """
    _settings(folder, output)
    run = runs.load_run(folder)
    row = run.row(name)
    if new_name in [task.name for task in run.tasks]:
        raise InputError(f"{folder}: task {new_name!r} is there already; choose another name")
    old = run.tasks[row]
    task = replace(old, name=new_name, cut_as=old.cut_as or name)
    parts = _parts(run.model, run.tasks)
    parts[row] = replace(parts[row], task=task)
    results = _results(folder)
    results["tasks"] = [e | {"name": new_name} if e["name"] == name else e for e in results["tasks"]]
    with new_folder(output) as temporary:
        _write(run, parts, output, temporary, results, {"renamed": name, "to": new_name})
    return output


# --- a model as parts ----------------------------------------------------------------------------------------------


def _parts(model: Model, tasks: Sequence[Task]) -> list[Part]:
    """Take a model's tasks apart; the copies share nothing with it."""
    tuner: Any = model.method.backbone.base_model
    vectors = tuner.task_vectors() or [torch.zeros(0)] * len(tasks)
    heads = model.heads.state_dict()
    parts = []
    for row, task in enumerate(tasks):
        own = f"linear.task_{task.name}."
        linear = {name.removeprefix(own): value.clone() for name, value in heads.items() if name.startswith(own)}
        buffers = {name: value[row].clone() for name, value in heads.items() if not name.startswith("linear.")}
        parts.append(Part(task, vectors[row], linear, buffers))
    return parts


def _assemble(model: Model, parts: Sequence[Part]) -> None:
    """Give a model the tasks of these parts and no others."""
    tuner: Any = model.method.backbone.base_model
    tasks = [part.task for part in parts]
    tuner.set_tasks([task.name for task in tasks], [part.vector for part in parts])
    _set_heads(model, tasks, {})
    state = {name: torch.stack([part.buffers[name] for part in parts]) for name in parts[0].buffers}
    for part in parts:
        state |= {f"linear.task_{part.task.name}.{name}": value for name, value in part.linear.items()}
    model.heads.load_state_dict(state)


def _embedding(model: Model) -> Any:
    """Return the task embedding, or None where the scale is 1 for all or comes from words."""
    tuner: Any = model.method.backbone.base_model
    found = [network.task_embedding for network in tuner.uno_hypernetwork.values()]
    return found[0] if found and isinstance(found[0], torch.nn.Embedding) else None


def _set_heads(model: Model, tasks: Sequence[Task], moments: Mapping[str, Moments]) -> None:
    """Give a model fresh heads."""
    device = next(model.method.parameters()).device
    if isinstance(model, TextModel):
        old = model.heads
        model.heads = Answers(tasks, old.tokenizer, moments, continues=old.continues).to(device)
    else:
        (width, *_) = {value.shape[1] for name, value in model.heads.state_dict().items() if name.endswith(".weight")}
        model.heads = TaskHeads(width, tasks, moments).to(device)


# --- what is learned, and from what ----------------------------------------------------------------------------------


def _shortened(settings: Settings, steps: int | None, learning_rate: float | None) -> Settings:
    """Return a run's settings for the training of one more task."""
    own = settings.training
    steps = own.steps if steps is None else steps
    training = replace(
        own,
        steps=steps,
        learning_rate=own.learning_rate if learning_rate is None else learning_rate,
        warmup_steps=min(own.warmup_steps, steps),
        evaluate_every=min(own.evaluate_every, steps),
        checkpoint_every=steps + 1,
        report_to=[],
    )
    return replace(settings, training=training)


def _rooted(task: Task, root: Path | None) -> Task:
    """Write out where a task's files are: the run has another folder that relative names start from."""
    if task.source.hub or task.source.bundled:
        return task
    start = (root or Path()).resolve()
    names = {split: getattr(task.source, split) for split in ("train", "validation", "test")}
    full: Any = {split: str(start / Path(name).expanduser()) for split, name in names.items() if name}
    return replace(task, source=replace(task.source, **full))


def _fewer(data: TaskData, examples: int | None, seed: int) -> TaskData:
    """Keep `examples` of the training rows, as evenly over the labels as they come."""
    task, train = data.task, data.splits["train"]
    if examples is None or examples >= len(train):
        return data
    drawn = order(len(train), task.name, seed, "examples")
    chosen = np.array(sorted(in_turns(train.targets, drawn, task.kind)[:examples]))
    return replace(data, splits={**data.splits, "train": train.take(chosen)})


def _prepare(run: Run, parts: Sequence[Part], settings: Settings, data: TaskData, start: str, tune: str) -> Lesson:
    """Leave the model with the tasks that are trained on, and with gradients where something is learned."""
    model, longest = run.model, 0
    if isinstance(model, TextModel) and model.heads.continues:
        longest = model.heads.longest()
    part = _new_part(run, data, settings)
    _assemble(model, [part])
    if isinstance(model, TextModel) and model.heads.continues:
        runs.check_length(settings, model.method.backbone, max(longest, model.heads.longest()))
    chosen = None
    if _embedding(model) is not None:
        rows = runs.encode_rows(model, 0, data.splits["train"], run.tokenizer, settings.data.max_length, train=True)
        vector, chosen = _start(run, part, parts, rows, start)
        part = replace(part, vector=vector)
    elif settings.adapter.conditioning == "text":
        chosen = "description"
    old = [] if tune == "row" else list(parts)
    _assemble(model, [*old, part])
    everything = [*(runs.read_data(settings, each.task) for each in old), data]
    splits: dict[str, dict[int, Encoded]] = {}
    for name in data.splits:
        splits[name] = {
            row: runs.encode_rows(
                model, row, d.splits[name], run.tokenizer, settings.data.max_length, train=name == "train"
            )
            for row, d in enumerate(everything)
        }
    _thaw(model, tune)
    return Lesson(everything, splits, chosen)


def _thaw(model: Model, tune: str) -> None:
    """Let gradients reach what is learned and nothing else."""
    tuner: Any = model.method.backbone.base_model
    model.requires_grad_(False)
    model.heads.requires_grad_(True)
    if tune == "row":
        if _embedding(model) is not None:
            _embedding(model).requires_grad_(True)
        return
    tuner.uno_hypernetwork.requires_grad_(True)
    if tune == "all":
        for name, parameter in model.named_parameters():
            if ".uno_A." in name or ".uno_B." in name:
                parameter.requires_grad_(True)


def _new_part(run: Run, data: TaskData, settings: Settings) -> Part:
    """Make the part of a new task: a random row or its words, a random head, what is known of its training targets."""
    model = run.model
    tuner: Any = model.method.backbone.base_model
    torch.manual_seed(settings.training.seed)
    targets = data.splits["train"].targets
    _set_heads(model, [data.task], {data.task.name: Moments.of(targets)} if data.task.kind == "regression" else {})
    (part,) = _parts(model, [data.task])  # with the first task's row
    if settings.adapter.conditioning == "text":
        return replace(part, vector=tuner.described(data.task.wordings, run.tokenizer))
    return replace(part, vector=torch.randn_like(part.vector))  # as an `nn.Embedding` starts


def _start(run: Run, part: Part, olds: Sequence[Part], rows: Encoded, start: str) -> tuple[Tensor, str]:
    """Return the row [d] that a new task starts from, and how to call it."""
    if start == "scratch":
        return part.vector, "scratch"
    if start == "mean":
        return torch.stack([old.vector for old in olds]).mean(dim=0), "mean"
    few = order(len(rows), part.task.name, "nearest")[:NEAREST_EXAMPLES].tolist()
    losses = []
    for old in olds:
        _assemble(run.model, [replace(part, vector=old.vector)])
        losses.append(_loss(run, rows, few))
    nearest = olds[int(np.argmin(losses))]
    return nearest.vector, f"nearest: {nearest.task.name}"


@torch.no_grad()
def _loss(run: Run, rows: Encoded, few: Sequence[int]) -> float:
    """Return the loss of the model's one task on a few rows; heads count as well as any on its states could be."""
    model, collate = run.model.eval(), Collator(run.tokenizer)
    device = next(model.parameters()).device
    found = []
    for place in range(0, len(few), 16):
        batch = collate([(0, rows, i) for i in few[place : place + 16]])
        batch = {name: value.to(device) for name, value in batch.items()}
        if isinstance(model, MultiTaskModel):
            inputs = {name: value for name, value in batch.items() if name not in ("tasks", "labels")}
            states = model.method(batch["tasks"], **inputs)  #              [b, T, D]
            found.append(encode_sample(states, batch["attention_mask"]))  # [b, D]
        else:
            found.append(model(**batch)["losses"])
    values = torch.cat(found).double().cpu()
    if isinstance(model, TextModel):
        return float(values.mean())
    targets = torch.from_numpy(rows.targets[list(few)])
    if targets.is_floating_point():
        return leave_one_out(values, ((targets - targets.mean()) / targets.std().clamp(min=1e-9)).unsqueeze(1))
    return leave_one_out(values, F.one_hot(targets).double())


def leave_one_out(pooled: Tensor, targets: Tensor) -> float:
    """Return the mean squared error of a linear map with a small penalty, each row predicted from the others.

    Args:
        pooled: [N, D].
        targets: [N, C].
    """
    centred = pooled - pooled.mean(dim=0)
    K = centred @ centred.T + 1  #                                      [N, N]; the 1 is a bias
    penalty = RIDGE * K.diagonal().mean() * torch.eye(len(K), dtype=K.dtype)
    H = torch.linalg.solve(K + penalty, K)  #                           what fitting does to the targets
    errors = (targets - H @ targets) / (1 - H.diagonal()).unsqueeze(1)  # [N, C]
    return float(errors.square().mean())


def _is_zero_shot(
    folder: Path, settings: Settings, text: bool, start: str | None, tune: str, steps: int | None
) -> bool:
    """Whether a task comes by its words alone; refuse what does not go with words, or with none to learn from."""
    if settings.adapter.conditioning != "text":
        return False
    if start is not None:
        raise InputError(
            f"{folder}: with `adapter.conditioning` text a task's descriptions say its scale; leave out start"
        )
    if tune != "row":
        return False
    if not text:
        if steps == 0:
            raise InputError(f"{folder}: the new task's head must be learned, so `steps` must be at least 1")
        return False
    if steps:
        raise InputError(
            f"{folder}: the new task's scale comes from its descriptions and its answers are text, so there is nothing "
            "to learn: give 0 steps, or tune hypernetwork or all"
        )
    return True


def _trained(trainer: MultiTaskTrainer, task: Task, folder: Path, progress: Any) -> dict[str, Any]:
    if progress is not None:
        trainer.add_callback(progress(f"task {task.name}", trainer))
    best = fit(trainer)
    if best is None:
        raise KeyboardInterrupt
    (folder / "metrics.jsonl").replace(folder / f"metrics-{task.name}.jsonl")
    return best


def _untrained(trainer: MultiTaskTrainer) -> dict[str, Any]:
    how = trainer.settings.scoring
    found = scoring.evaluate(trainer.model, trainer.tasks, trainer.splits["validation"], trainer.data_collator, how)
    return {"step": 0, "validation": found}


def _entries(trainer: MultiTaskTrainer, data: Sequence[TaskData], best: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Score the tasks trained on and describe them as results.json does."""
    test, tasks = trainer.splits["test"], [each.task for each in data]
    found = scoring.predictions(trainer.model, test, trainer.data_collator, trainer.settings.scoring)
    scores = {"validation": best["validation"], "test": scoring.scored(tasks, test, found)}
    described = entries(trainer, data, scores, scoring.unparsed(tasks, found))
    described[-1]["sampling"]["planned"] = None  # it had no share of the first training's batches
    return described


def _rescored(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    return {**old, "metrics": new["metrics"], "unparsed": new["unparsed"]}


def _moved(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what each old task scored on the test split before and after."""
    return {
        before["name"]: {
            "metric": before["score_metric"],
            "before": before["metrics"]["test"][before["score_metric"]],
            "after": after["metrics"]["test"][before["score_metric"]],
        }
        for before, after in zip(old, new, strict=True)
    }


# --- run folders -----------------------------------------------------------------------------------------------------


def _settings(folder: Path, output: Path) -> Settings:
    """Read a run's settings; refuse what is no UnoLoRA run, and an output that would replace something."""
    settings = runs.read_settings(folder)
    if settings.method != "unolora":
        raise InputError(
            f"{folder}: its method is {settings.method!r}; only tasks of a run of 'unolora' come and go, train again"
        )
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file; choose another output")
    if output.is_dir() and any(output.iterdir()):
        raise InputError(f"{output} is not empty; it is not overwritten, choose another output")
    return settings


def _results(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found["tasks"] = [entry | {"name": str(entry["name"])} for entry in found["tasks"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: expected the results of a finished run ({error}); copy it again") from error
    if any("test" not in entry["metrics"] for entry in found["tasks"]):
        raise InputError(
            f"{folder}: it has no test scores, so what a change costs its tasks could not be told; train it again "
            "without `training.test: false`"
        )
    return found


def _write(
    run: Run,
    parts: Sequence[Part],
    output: Path,
    folder: Path,
    results: dict[str, Any],
    change: dict[str, Any],
    digests: Mapping[str, Any] | None = None,
) -> None:
    """Fill a folder with a run that has these tasks."""
    _assemble(run.model, parts)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    tasks = [part.task for part in parts]
    names = {change["renamed"]: change["to"]} if "renamed" in change else {}
    since = {names.get(name, name): date for name, date in runs.read_since(run.folder).items()}
    settings = replace(run.settings, tasks=[spelled(task) for task in tasks], baselines=[], output=str(output))
    runs.save_adapter(
        run.model, settings, "unolora", tasks, folder / "adapter", {t.name: since.get(t.name, now) for t in tasks}
    )
    write_json(folder / "environment.json", runs.environment())
    if (path := run.folder / runs.DATA).is_file():
        kept = {names.get(name, name): of_splits for name, of_splits in recovery.read_json(path).items()}
        kept |= digests or {}
        write_json(folder / runs.DATA, {task.name: kept[task.name] for task in tasks if task.name in kept})
    write_text(folder / "config.yaml", yaml.safe_dump(to_dict(settings), sort_keys=False, allow_unicode=True))
    for path in sorted(run.folder.glob("metrics*.jsonl")):
        name = path.stem.removeprefix("metrics-")
        to = folder / f"metrics-{names[name]}.jsonl" if name in names else folder / path.name
        write_text(to, _renamed(path.read_text(encoding="utf-8"), names))
    scores = {
        split: {entry["name"]: entry["metrics"][split] for entry in results["tasks"]}
        for split in ("validation", "test")
    }
    means = {split: metrics.averages(found) for split, found in scores.items()}
    results |= {
        "name": output.resolve().name,
        "averages": {name: {split: means[split][name] for split in means} for name in means["test"]},
        "parameters": _parameters(run.model, len(tasks), folder / "adapter"),
        "changes": [*results.get("changes", []), {"date": now, "from": run.folder.resolve().name, **change}],
    }
    write_text(folder / "adapter" / "README.md", model_card(settings, tasks, results))
    write_json(folder / "results.json", results)
    from unolora.report import write_report

    write_report(folder)


def spelled(task: Task) -> dict[str, Any]:
    """Spell a task as a YAML file does, without what is empty."""

    def filled(data: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in data.items() if value not in (None, "", [], {})}

    found: dict[str, Any] = json.loads(json.dumps(asdict(task)))
    return filled(found | {"source": filled(found["source"])})


def _renamed(log: str, names: Mapping[str, str]) -> str:
    """Give the tasks in the lines of a metrics.jsonl their new names."""
    if not names:
        return log
    lines = []
    for line in map(json.loads, log.splitlines()):
        for key in ("seen", "task_loss", "scores", "metrics"):
            if key in line:
                line[key] = {names.get(name, name): value for name, value in line[key].items()}
        lines.append(json.dumps(line) + "\n")
    return "".join(lines)


def _parameters(model: Model, tasks: int, adapter: Path) -> dict[str, Any]:
    """Count parameters as `results.results_of` does."""
    total = sum(p.numel() for p in model.parameters())
    heads = sum(p.numel() for p in model.heads.parameters())
    own = sum(p.numel() for name, p in model.named_parameters() if ".uno_" in name)
    return {
        "total": total,
        "trainable": own + heads,
        "adapter": own,
        "heads": heads,
        "trainable_percent": 100 * (own + heads) / total,
        "per_task_percent": 100 * own / model.method.backbone_parameters / tasks,
        "file_bytes": sum(path.stat().st_size for path in adapter.rglob("*") if path.is_file()),
    }
