"""The model card of an adapter, from the results of its run: tasks, scores, data, how to use it, and its limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from unolora.metrics import scored_on
from unolora.settings import Settings
from unolora.tasks import Task


def model_card(settings: Settings, tasks: Sequence[Task], results: Mapping[str, Any]) -> str:
    """Write a card in Markdown, with the header that the hub reads.

    Args:
        settings: Of the run.
        tasks: In the order of their rows.
        results: What results.json holds.
    """
    unolora = results["method"] == "unolora"
    split = scored_on(results["averages"])
    heads = "; `heads.safetensors` holds the heads" if results["parameters"]["heads"] else ""
    usage = _USAGE.format(first=tasks[0].name) if unolora else "`unolora.runs.load_run(FOLDER)` reads it.\n"
    return (
        f"---\nlibrary_name: peft\ntags: [unolora, multi-task]\n---\n\n# {results['label']} on {settings.backbone}\n\n"
        f"One adapter for {len(tasks)} tasks: {results['parameters']['adapter']:,} trained parameters, and "
        f"{results['parameters']['heads']:,} in heads. Trained for {results['steps']} steps of {results['batch_size']} "
        f"rows with seed {results['seed']}; the weights are those of step {results['best_step']}, which have the best "
        f"average on the validation splits.\n\n## Scores\n\n{_scores(results)}\n"
        f"A constant is the most frequent label, or the mean. The mean of first metrics on the {split} splits is "
        f"{results['averages']['mean_of_first_metrics'][split]:.4f}.\n\n"
        f"## Tasks and data\n\n{_tasks(tasks, results)}\n"
        f"`tasks.json` says all of it{heads}.\n\n## Use\n\n{usage}\n"
        f"## Limits\n\n{_limits(settings, results)}"
    )


_USAGE = """```python
import unolora                                        # registers the method with PEFT
from peft import PeftModel

model = PeftModel.from_pretrained(backbone, FOLDER)   # or the name of this repository
states = model(**batch, tasks="{first}")
```

`unolora.runs.load_run(FOLDER)` gives backbone, adapter and heads in one, and
`unolora predict FOLDER --task {first} "..."` answers.
"""


def _scores(results: Mapping[str, Any]) -> str:
    split = scored_on(results["averages"])
    splits = list(dict.fromkeys(("validation", split)))
    lines = [
        f"| task | metric | {' | '.join(splits)} | a constant, {split} |",
        "|---|---|" + "---|" * len(splits) + "---|",
    ]
    for task in results["tasks"]:
        for metric, constant in task["baseline"]["metrics"][split].items():
            values = [task["metrics"][name][metric] for name in splits]
            lines.append(f"| {task['name']} | {metric} | " + " | ".join(f"{v:.4f}" for v in (*values, constant)) + " |")
    return "\n".join(lines) + "\n"


def _tasks(tasks: Sequence[Task], results: Mapping[str, Any]) -> str:
    lines = [
        "| row | task | answers | rows: training, validation, test | source | what it is |",
        "|---|---|---|---|---|---|",
    ]
    for row, (task, found) in enumerate(zip(tasks, results["tasks"], strict=True)):
        counts = ", ".join(str(found["rows"][split]) for split in ("train", "validation", "test"))
        source = task.source.hub or task.source.bundled or "files"
        answers = ", ".join(task.labels) or "a number"
        lines.append(f"| {row} | {task.name} | {answers} | {counts} | {source} | {task.description} |")
    return "\n".join(lines) + "\n"


def _limits(settings: Settings, results: Mapping[str, Any]) -> str:
    split = scored_on(results["averages"])
    below = [
        task["name"]
        for task in results["tasks"]
        if task["metrics"][split][task["score_metric"]] <= task["baseline"]["metrics"][split][task["score_metric"]]
    ]
    lines = [
        "- One seed: another may differ by more than two methods do.",
        f"- Inputs are cut to {settings.data.max_length} tokens.",
        "- The scores hold for rows like those of the data named above; nothing else was measured.",
    ]
    if below:
        lines.append(f"- No better than a constant on the {split} split: {', '.join(below)}.")
    return "\n".join(lines) + "\n"
