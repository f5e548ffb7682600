"""Does a description give an unseen task a good scale? Each quickstart task is left out once.

    python scripts/zero_shot.py results/zero-shot --runs runs/zero-shot      # goes on where it was stopped

A run with `conditioning: text` is trained on the other five tasks. Then the backbone with its adapter encodes the
task's rows under several scales, all else alike: that of the task's description, the mean of the five, each of the five
(the nearest of them is the one with the least leave-one-out error on the examples, as `add-task` finds it), that of a
task vector trained on the examples, and without the adapter. On each, a linear head is fitted on the same few training
rows and scored on the test rows. So what is compared is what the scale does for states that a head reads. It is no
zero-shot prediction: a head needs examples.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import measured
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from unolora import compare, grow, metrics, runs, training
from unolora.atomic import write_text
from unolora.data import Collator
from unolora.hypernetwork import encode_sample
from unolora.layer import scaled_by
from unolora.settings import from_dict
from unolora.tasks import Task, get
from unolora.tasks.rows import in_turns, load, order

TASKS = ("spam", "questions", "movies", "products", "tweets", "editorials")
SETTINGS: dict[str, Any] = {
    "backbone": "minilm",
    "adapter": {"conditioning": "text", "target_modules": "query-value"},
    "data": {"max_length": 64, "evaluation_limit": 64},  # of the five, whose own scores are of no interest here
    "training": {
        "steps": 80,
        "batch_size": 32,
        "gradient_accumulation": 4,
        "learning_rate": 3e-3,
        "evaluate_every": 80,
    },
}
EXAMPLES = (16, 128)
DRAWS = 3
TEST = 300
VECTOR_STEPS, VECTOR_RATE = 30, 0.02
"""Of the training of a task vector on the examples, with a head beside it."""


def main() -> None:
    """Run what is missing, and write scores.json and table.md."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", choices=TASKS, nargs="+", default=TASKS)
    options = parser.parse_args()
    measured.quiet()
    scores: dict[str, Any] = measured.read(options.output)
    for seed in options.seeds:
        for name in options.only:
            if f"{name} {seed}" not in scores:
                scores[f"{name} {seed}"] = left_out(get(name), seed, options.runs / f"{name}-{seed}")
                measured.write(options.output, scores)
                print(name, seed, summary(scores[f"{name} {seed}"]), flush=True)
    write_text(options.output / "table.md", table(scores))


def left_out(task: Task, seed: int, folder: Path) -> dict[str, dict[str, list[float]]]:
    """Examples -> scale -> score of each draw."""
    if not (folder / "results.json").is_file():
        others = [name for name in TASKS if name != task.name]
        settings = SETTINGS | {"tasks": others, "output": str(folder)}
        settings |= {"training": SETTINGS["training"] | {"seed": seed}}
        training.train(from_dict(settings), resume=(folder / "config.yaml").is_file())
    run = runs.load_run(folder)
    network = run.model.method.backbone.base_model.uno_hypernetwork["default"]
    data = load(task)
    train = runs.encode_rows(run.model, 0, data.splits["train"], run.tokenizer, 64)
    test = runs.encode_rows(run.model, 0, data.splits["test"], run.tokenizer, 64)
    places = {draw: examples(task, data.splits["train"].targets, draw) for draw in range(DRAWS)}
    used = sorted({row for rows in places.values() for row in rows})
    at = {row: i for i, row in enumerate(used)}
    tested = list(range(min(TEST, len(test))))
    with torch.no_grad():
        own = network(torch.arange(len(run.tasks)))  # [K, P, R]
        embedding = network.task_embedding
        words = run.model.method.backbone.base_model.described(task.wordings, run.tokenizer)[:1]
        vector = embedding.map(words)[0]
        scales = {"description": scale(network, vector), "mean": own.mean(0, keepdim=True), "no adapter": None}
    scales |= {f"old {each.name}": own[row : row + 1] for row, each in enumerate(run.tasks)}
    states = {key: (pooled(run, train, used, s), pooled(run, test, tested, s)) for key, s in scales.items()}
    targets = train.targets, test.targets[tested]
    found: dict[str, dict[str, list[float]]] = {str(n): {} for n in EXAMPLES}
    for draw, rows in places.items():
        few = rows[: EXAMPLES[0]]
        trained = scale(network, trained_vector(run, network, task, train, few, embedding.map.bias.detach(), draw))
        own_states = {"trained on 16": (pooled(run, train, rows, trained), pooled(run, test, tested, trained))}
        nearest = min(
            (f"old {each.name}" for each in run.tasks),
            key=lambda key: probe(task, states[key][0][[at[row] for row in few]], targets[0][few]),
        )
        for key, (left, right) in (states | own_states).items():
            seen = left if key == "trained on 16" else left[[at[row] for row in rows]]
            for n in EXAMPLES:
                score = headed(task, seen[:n], targets[0][rows[:n]], right, targets[1])
                found[str(n)].setdefault(key, []).append(score)
                if key == nearest:
                    found[str(n)].setdefault("nearest", []).append(score)
    return found


def examples(task: Task, targets: Any, draw: int) -> list[int]:
    """Rows of a draw: a few of its own, as even over the labels as they come, then those that all draws have."""
    few = in_turns(targets, order(len(targets), "zero-shot", draw), task.kind)[: EXAMPLES[0]]
    more = [int(row) for row in order(len(targets), "zero-shot", "more") if row not in few]
    return few + more[: EXAMPLES[-1] - len(few)]


def scale(network: Any, vector: torch.Tensor) -> torch.Tensor:
    """Return s [1, P, R] of a task vector [d]."""
    with torch.no_grad(), given(network, vector):
        s: torch.Tensor = network(torch.zeros(1, dtype=torch.long))
    return s


@contextmanager
def given(network: Any, vector: torch.Tensor) -> Iterator[None]:
    """Let the hypernetwork take this vector [d] for any task."""
    hook = network.task_embedding.register_forward_hook(lambda _module, inputs, _: vector.expand(len(inputs[0]), -1))
    try:
        yield
    finally:
        hook.remove()


def states_of(run: runs.Run, rows: Any, places: Any, s: torch.Tensor | None) -> torch.Tensor:
    batch = Collator(run.tokenizer)([(0, rows, i) for i in places])
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "tasks")}
    backbone: Any = run.model.method.backbone
    if s is None:
        with backbone.disable_adapter():
            out = backbone(**inputs)
    else:
        with scaled_by({"default": s.expand(len(batch["tasks"]), -1, -1)}, backbone.base_model):
            out = backbone(**inputs)
    return encode_sample(out.last_hidden_state, inputs["attention_mask"])


def pooled(run: runs.Run, rows: Any, places: Any, s: torch.Tensor | None) -> Any:
    """States [N, D] of rows under a scale."""
    by_length = sorted(range(len(places)), key=lambda i: len(rows.inputs["input_ids"][places[i]]))
    found = np.zeros((len(places), run.model.method.backbone.config.hidden_size))
    with torch.no_grad():
        for start in range(0, len(places), 32):
            part = by_length[start : start + 32]
            found[part] = states_of(run, rows, [places[i] for i in part], s).numpy()
    return found


def trained_vector(
    run: runs.Run, network: Any, task: Task, rows: Any, few: list[int], start: torch.Tensor, draw: int
) -> torch.Tensor:
    """Train a task vector [d] and a head on a few rows; all else is frozen. It starts from the middle of the words."""
    torch.manual_seed(draw)
    run.model.requires_grad_(False)
    vector = start.clone().requires_grad_(True)
    head = torch.nn.Linear(run.model.method.backbone.config.hidden_size, len(task.labels) or 1)
    targets = torch.from_numpy(rows.targets[few])
    if targets.is_floating_point():
        targets = ((targets - targets.mean()) / targets.std()).float().unsqueeze(1)
    optimiser = torch.optim.AdamW([vector, *head.parameters()], lr=VECTOR_RATE, weight_decay=0.01)
    for _ in range(VECTOR_STEPS):
        with given(network, vector):
            s = network(torch.zeros(1, dtype=torch.long))
        out = head(states_of(run, rows, few, s))
        loss = F.cross_entropy(out, targets) if task.labels else F.mse_loss(out, targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return vector.detach()


def probe(task: Task, states: Any, targets: Any) -> float:
    """Leave-one-out error of a linear map on the examples, as `add-task` compares old tasks."""
    wanted = torch.from_numpy(np.asarray(targets))
    if task.labels:
        return grow.leave_one_out(torch.from_numpy(states), F.one_hot(wanted, len(task.labels)).double())
    scaled = (wanted.double() - wanted.double().mean()) / wanted.double().std()
    return grow.leave_one_out(torch.from_numpy(states), scaled.unsqueeze(1))


def headed(task: Task, states: Any, targets: Any, test_states: Any, test_targets: Any) -> float:
    """Fit a linear head on states and return its score on the test rows."""
    scaler = StandardScaler().fit(states)
    head: Any = LogisticRegression(C=0.1, max_iter=1000) if task.labels else Ridge(alpha=states.shape[1] / 4)
    head.fit(scaler.transform(states), targets)
    predicted = head.predict(scaler.transform(test_states))
    scored = metrics.score(task, test_targets, predicted.astype(float))
    return round(float(scored[task.metrics[0]]), 6)


def columns(scores: dict[str, list[float]]) -> dict[str, list[float]]:
    """What the table shows of one task, seed and number of examples: of each draw."""
    old = np.array([values for key, values in scores.items() if key.startswith("old ")])
    return {
        "description": scores["description"],
        "mean scale": scores["mean"],
        "nearest task": scores["nearest"],
        "vector trained on 16": scores["trained on 16"],
        "best of the old tasks, by test rows": [old.mean(1).max()],
        "worst": [old.mean(1).min()],
        "no adapter": scores["no adapter"],
    }


def summary(found: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    return {n: {key: round(float(np.mean(v)), 3) for key, v in columns(of_n).items()} for n, of_n in found.items()}


def table(scores: dict[str, Any]) -> str:
    """Return means over draws and seeds, a line for each task and number of examples.

    Then, over tasks, how far the description is ahead of each other scale, with 95 % intervals.
    """
    tasks = [task for task in TASKS if any(key.startswith(f"{task} ") for key in scores)]
    means: dict[tuple[str, str], dict[str, float]] = {}
    for task in tasks:
        for n in map(str, EXAMPLES):
            shown = [columns(found[n]) for key, found in scores.items() if key.startswith(f"{task} ")]
            means[task, n] = {name: float(np.mean([np.mean(found[name]) for found in shown])) for name in shown[0]}
    names = list(next(iter(means.values())))
    lines = [f"| task left out, examples of the head | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
    for (task, n), found in means.items():
        lines.append(f"| {task}, {n} | {' | '.join(f'{value:.3f}' for value in found.values())} |")
    for n in map(str, EXAMPLES):
        apart = [compare.interval([means[t, n][names[0]] - means[t, n][name] for t in tasks]) for name in names[1:]]
        cells = [f"{each.mean:+.3f} ± {each.half:.3f}" for each in apart if each and each.half is not None]
        if cells:
            lines.append(f"| description ahead of it, {n} | {' | '.join([compare.NOTHING, *cells])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
