"""report.py: one run folder in, one page out, whose tables hold the numbers of the run."""

import json
import math
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from unolora import charts, report
from unolora.errors import InputError

KINDS = {
    "spam": ("classification", "matthews", ("matthews", "accuracy", "f1"), ["ham", "spam"], 3869, 0.93),
    "questions": ("classification", "matthews", ("matthews", "accuracy", "f1"), ["ABBR", "DESC", "ENTY"], 4305, 0.86),
    "movies": ("regression", "pearson", ("pearson", "spearman"), [], 8484, 0.71),
    "products": ("regression", "pearson", ("pearson", "spearman"), [], 2966, 0.58),
    "tweets": ("regression", "pearson", ("pearson", "spearman"), [], 3360, 0.79),
    "editorials": ("regression", "pearson", ("pearson", "spearman"), [], 4152, 0.47),
}
METHODS = {
    "unolora": ("UnoLoRA* (task+sample)", 1.0, 190_000),
    "frozen": ("heads only", 0.62, 10_000),
    "lora": ("LoRA, one for all", 0.97, 175_000),
}
MISSING = "\u2013not available"
ENVIRONMENT = {
    "unolora": "0.1.0", "python": "3.11.9", "torch": "2.13.0", "transformers": "5.13.0", "peft": "0.21.2",
    "platform": "Linux-6.1-x86_64", "processor": "x86_64", "threads": 2, "date": "2026-05-04",
}  # fmt: skip


def wobble(*key):
    """Return a number in -0.5..0.5 that depends on the key alone."""
    seed = sum(ord(letter) * (index + 3) for index, letter in enumerate(repr(key)))
    return math.sin(seed * 12.9898) / 2


def task_entry(name, spec, method):
    kind, score, metrics, labels, rows, level = spec
    quality = METHODS[method][1]
    values = {
        split: {m: level * quality + 0.03 * wobble(name, method, split, m) for m in metrics}
        for split in ("validation", "test")
    }
    share = {"spam": 0.17, "movies": 0.18}.get(name, 0.1625)
    return {
        "name": name, "kind": kind, "score_metric": score, "labels": labels,
        "rows": {"train": rows, "validation": rows // 8, "test": rows // 8},
        "sampling": {"planned": share, "seen": round(7680 * (share + 0.01 * wobble(name, "seen")))},
        "metrics": values,
        "baseline": {
            "name": "majority class" if kind == "classification" else "mean",
            "metrics": {s: {m: 0.87 if m == "accuracy" else 0.0 for m in metrics} for s in ("validation", "test")},
        },
    }  # fmt: skip


def write_run(folder, tasks=KINDS, method="unolora"):
    """Write the four files of a run as a training does and return its results."""
    label, _, adapter = METHODS[method]
    entries = [task_entry(name, spec, method) for name, spec in tasks.items()]
    means = {s: sum(e["metrics"][s][e["score_metric"]] for e in entries) / len(entries) for s in ("validation", "test")}
    share = 100 * adapter / 22_800_000
    results = {
        "name": "quickstart", "method": method, "label": label, "backbone": "minilm", "seed": 0, "steps": 240,
        "best_step": 180, "batch_size": 32, "tasks": entries, "averages": {"mean_of_first_metrics": means},
        "parameters": {
            "total": 22_800_000 + adapter, "trainable": adapter, "adapter": adapter - 10_000, "heads": 10_000,
            "trainable_percent": share, "per_task_percent": share / len(entries),
        },
        "memory": {"peak_bytes": 2_500_000_000},
        "time": {"train_seconds": 150.1, "evaluation_seconds": 20.2, "examples_per_second": 51.1},
    }  # fmt: skip
    lines = []
    for step in range(20, 241, 20):
        loss = 0.35 + 0.9 * math.exp(-step / 70) + 0.06 * wobble(step, method)
        lines.append({"kind": "train", "step": step, "loss": loss, "learning_rate": 1e-3, "seconds": step * 0.62})
        if step % 40 == 20 or step == 240:
            scores = {
                e["name"]: e["metrics"]["validation"][e["score_metric"]] * (1 - math.exp(-step / 50))
                + 0.03 * wobble(step, method, e["name"])
                for e in entries
            }
            average = sum(scores.values()) / len(scores)
            lines.append(
                {"kind": "evaluation", "step": step, "split": "validation", "average": average, "scores": scores}
            )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "config.yaml").write_text(
        "name: quickstart\nbackbone: minilm\nadapter:\n  r: 8\n  alpha: 16\n  conditioning: task+sample\n",
        encoding="utf-8",
    )
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT), encoding="utf-8")
    return results


def write_suite(folder, tasks=KINDS, rivals=("frozen", "lora")):
    """Write a run with its rivals; return the results by folder name, the run's own under "run"."""
    found = {"run": write_run(folder, tasks)}
    return found | {rival: write_run(folder / "baselines" / rival, tasks, method=rival) for rival in rivals}


def edit(path, change):
    """Change a JSON file in place."""
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")


class Page(HTMLParser):
    """What the tests ask of a page: its tables as numbers and text, its attributes, its scripts."""

    VOID = ("meta", "link", "br", "img", "input")

    def __init__(self, path):
        super().__init__()
        self.tables, self.attributes, self.scripts, self.open, self.texts = {}, [], [], [], []
        self.heads, self.strong, self.figures, self.notes = [], [], [], []
        self.noted = 0
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.attributes += [(tag, name, value) for name, value in attributes.items()]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.caption, self.rows = "", []
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            if tag == "th":
                self.heads.append(attributes)
        elif tag == "data":
            self.rows[-1][-1] = float(attributes["value"])
        elif tag == "strong":
            self.strong.append((self.caption, len(self.rows) - 2, len(self.rows[-1]) - 1))
        elif tag == "script":
            self.scripts.append([attributes, ""])
        elif tag == "figure":
            self.figures.append({"plots": [], "tables": [], "details": False})
        elif tag == "div" and attributes.get("role") == "note":
            self.noted = len(self.open)
        elif tag == "details" and "figure" in self.open:
            self.figures[-1]["details"] = True

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another tag near line {self.getpos()[0]}"
        if self.noted > len(self.open):
            self.noted = 0
        if tag == "table":
            self.tables.setdefault(self.caption, []).append(self.rows)
            if "figure" in self.open:
                self.figures[-1]["tables"].append(self.rows)
        elif tag == "script" and "figure" in self.open:
            self.figures[-1]["plots"].append(json.loads(self.scripts[-1][1]))

    def handle_data(self, data):
        if not self.open:
            return
        if self.open[-1] == "script":
            self.scripts[-1][1] += data
            return
        self.texts.append(data)
        if self.noted and self.open[-1] == "li":
            self.notes.append(data)
        if self.open[-1] == "caption":
            self.caption += data
        elif {"td", "th"} & set(self.open) and isinstance(self.rows[-1][-1], str):
            self.rows[-1][-1] += data

    def table(self, caption):
        (rows,) = self.tables[caption]
        return rows[0], rows[1:]


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """Return a run of six tasks with two rivals: (its folder, its results, its page)."""
    folder = tmp_path_factory.mktemp("suite")
    results = write_suite(folder)
    return folder, results, Page(report.write_report(folder))


def scores(results, split):
    """Return the scores of every task, then their average."""
    tasks = [task["metrics"][split][task["score_metric"]] for task in results["tasks"]]
    return [*tasks, results["averages"]["mean_of_first_metrics"][split]]


@pytest.mark.parametrize("split", ["test", "validation"])
def test_score_table_holds_the_numbers_of_the_runs(suite, split):
    _, results, page = suite
    head, rows = page.table(f"Scores on the {split} split")
    assert head[3:7] == ["majority class / mean", "heads only", "LoRA, one for all", "UnoLoRA* (task+sample)"]
    assert [row[0] for row in rows] == [*KINDS, "average"]
    assert [row[1] for row in rows] == [*(spec[1] for spec in KINDS.values()), "mean"]
    sizes = [task["rows"][split] for task in results["run"]["tasks"]]
    assert [row[2] for row in rows] == [*sizes, sum(sizes)]
    columns = list(zip(*rows, strict=True))
    assert list(columns[3]) == [0.0] * 7
    for column, run in ((4, "frozen"), (5, "lora"), (6, "run")):
        assert list(columns[column]) == scores(results[run], split)
    assert list(columns[7]) == scores(results["run"], split)  # the floor is 0
    best_other = [max(pair) for pair in zip(columns[4], columns[5], strict=True)]
    assert columns[8] == pytest.approx([ours - other for ours, other in zip(columns[6], best_other, strict=True)])


def test_best_of_a_row_is_bold(suite):
    _, _, page = suite
    _, rows = page.table("Scores on the test split")
    expected = {(index, 3 + row[3:7].index(max(row[3:7]))) for index, row in enumerate(rows)}
    assert len({column for _, column in expected}) > 1  # not always the same method
    assert {(row, column) for caption, row, column in page.strong if caption == "Scores on the test split"} == expected


def test_other_metrics_and_averages_are_in_the_second_table(tmp_path):
    write_suite(tmp_path, rivals=("lora",))
    for folder in (tmp_path, tmp_path / "baselines" / "lora"):
        edit(folder / "results.json", lambda r: r["averages"].update(mean_of_all_metrics={"test": 0.625}))
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    _, rows = Page(report.write_report(tmp_path)).table("Other metrics on the test split")
    others = [(t["name"], m, v) for t in results["tasks"] for m, v in list(t["metrics"]["test"].items())[1:]]
    assert [(row[0], row[1], row[-1]) for row in rows[:-1]] == others
    assert rows[-1] == ["average", "mean of all metrics", MISSING, 0.625, 0.625]


def test_cost_sampling_and_environment_tables(suite):
    _, results, page = suite
    _, rows = page.table("Parameters")
    assert [row[1:5] for row in rows] == [
        [22_800_000, 0, 10_000, 10_000],
        [22_800_000, 165_000, 10_000, 175_000],
        [22_800_000, 180_000, 10_000, 190_000],
    ]
    parameters = results["run"]["parameters"]
    assert rows[-1][5:] == [parameters["trainable_percent"], parameters["per_task_percent"]]
    assert page.table("Time and memory")[1][-1] == ["UnoLoRA* (task+sample)", 240, 180, 150.1, 20.2, 51.1, 2.5e9]
    _, rows = page.table("Batches: what was planned and what was seen")
    seen = [task["sampling"]["seen"] for task in results["run"]["tasks"]]
    assert [row[4] for row in rows] == seen
    assert [row[3] for row in rows] == pytest.approx([count / sum(seen) for count in seen])
    assert [row[5] for row in rows] == pytest.approx([count / row[1] for count, row in zip(seen, rows, strict=True)])
    assert page.table("Environment")[1] == [[key, str(value)] for key, value in ENVIRONMENT.items()]
    assert any("conditioning: task+sample" in text for text in page.texts)


def test_summary_says_what_the_numbers_say(suite):
    _, results, page = suite
    text = " ".join(page.texts)
    average = results["run"]["averages"]["mean_of_first_metrics"]["test"]
    other = results["lora"]["averages"]["mean_of_first_metrics"]["test"]
    assert f"on 6 tasks for 240 steps (2 min 30 s) and reaches {average:.3f} on average over the test splits" in text
    assert f"LoRA, one for all {other:.3f}" in text
    assert "best of the trained methods on 5 of 6 tasks" in text


def test_every_figure_is_valid_and_has_its_numbers_in_a_table(suite):
    graph_objects = pytest.importorskip("plotly.graph_objects")
    _, _, page = suite
    assert [len(figure["plots"]) for figure in page.figures] == [1, 7, 1, 1]
    for figure in page.figures:
        assert figure["details"]
        for plot, (head, *rows) in zip(figure["plots"], figure["tables"], strict=True):
            graph_objects.Figure(plot)  # raises on a name or value that plotly does not know
            assert len(head) == len(plot["data"]) + 1
            for column, trace in enumerate(plot["data"], start=1):
                keys, values = (trace["y"], trace["x"]) if trace["type"] == "bar" else (trace["x"], trace["y"])
                assert [[row[0], row[column]] for row in rows] == [list(p) for p in zip(keys, values, strict=True)]


def test_curves_are_those_of_the_log(suite):
    folder, _, page = suite
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    average, spam = (plot["data"][-1] for plot in page.figures[1]["plots"][:2])
    assert average["x"] == [line["step"] for line in evaluations]
    assert average["y"] == [line["average"] for line in evaluations]
    assert spam["y"] == [line["scores"]["spam"] for line in evaluations]
    loss = page.figures[2]["plots"][0]["data"][-1]
    assert loss["y"] == [line["loss"] for line in lines if line["kind"] == "train"]


def test_after_a_resumed_run_the_later_line_of_a_step_holds(tmp_path):
    write_run(tmp_path)
    log = tmp_path / "metrics.jsonl"
    again = json.dumps({"kind": "train", "step": 40, "loss": 0.125})
    log.write_text(log.read_text(encoding="utf-8") + again + "\n", encoding="utf-8")
    loss = Page(report.write_report(tmp_path)).figures[2]["plots"][0]["data"][0]
    assert loss["x"] == sorted(set(loss["x"]))
    assert loss["y"][loss["x"].index(40)] == 0.125


def test_page_asks_nothing_of_a_network(suite):
    _, _, page = suite
    loading = ("src", "srcset", "href", "data", "action", "poster", "background", "xlink:href")
    targets = [value for _, name, value in page.attributes if name in loading]
    assert "#scores" in targets
    ids = {value for _, name, value in page.attributes if name == "id"}
    assert all(target.startswith("#") and target[1:] in ids for target in targets)
    style = page.source[page.source.index("<style>") : page.source.index("</style>")]
    assert "--series-1" in style
    assert not re.search(r"url\(|@import", style)
    assert "link" not in {tag for tag, _, _ in page.attributes}
    policy = [value for tag, name, value in page.attributes if tag == "meta" and "default-src" in value]
    assert policy
    assert policy[0].startswith("default-src 'none'")
    without_plotly = page.source.replace({a.get("id"): t for a, t in page.scripts}["plotly"], "")
    assert not re.search(r"https?:", without_plotly)


def test_tables_and_landmarks_are_for_screen_readers(suite):
    _, _, page = suite
    assert page.open == []
    assert len(page.heads) > 50
    assert all(head.get("scope") in ("col", "row") for head in page.heads)
    assert all(page.tables)  # every table has a caption
    names = [tag for tag, name, _ in page.attributes if name == "aria-labelledby"]
    assert names == ["section"] * 7
    plots = [name for tag, name, value in page.attributes if (name, value) == ("role", "img")]
    labels = [value for tag, name, value in page.attributes if tag == "div" and name == "aria-label" and value]
    assert len(plots) == 10
    assert len(labels) >= len(plots)
    assert ("html", "lang", "en") in page.attributes


def test_text_of_users_is_escaped(tmp_path):
    bad = "</script><script>alert(1)</script><b>&\"'"
    spec = ("classification", "matthews", ("matthews",), [bad, "ham"], 100, 0.5)
    write_suite(tmp_path, {"spam": spec}, rivals=("lora",))
    for folder in (tmp_path, tmp_path / "baselines" / "lora"):
        edit(folder / "results.json", lambda r: r.update(label=bad, name=bad, backbone=bad))
    edit(tmp_path / "results.json", lambda r: r["tasks"][0]["baseline"].update(name=bad))
    edit(tmp_path / "environment.json", lambda e: e.update({bad: bad, "date": bad}))
    (tmp_path / "config.yaml").write_text(f"label: {bad}\n</code></pre>{bad}", encoding="utf-8")
    page = Page(report.write_report(tmp_path))
    assert page.open == []
    assert len(page.scripts) == 2 + sum(len(figure["plots"]) for figure in page.figures)
    assert "<script>alert" not in page.source
    assert {tag for tag, _, _ in page.attributes}.isdisjoint({"b"})
    assert bad in page.table("Environment")[1][-1]
    assert page.table("Tasks")[1][0][2] == f"{bad}, ham"
    assert bad in page.table("Scores on the test split")[0]
    # plotly.js itself reads a little HTML in names, so there they are escaped once more
    names = {trace["name"] for trace in page.figures[0]["plots"][0]["data"]}
    assert all("<" not in name and "&lt;b&gt;" in name for name in names)


def test_without_plotly_the_tables_stay(suite, tmp_path, monkeypatch):
    _, _, full = suite
    write_suite(tmp_path)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    page = Page(report.write_report(tmp_path))
    assert page.tables == full.tables
    assert any(script.get("id") == "plotly" for script, _ in full.scripts)
    assert not any(script.get("id") == "plotly" for script, _ in page.scripts)
    assert page.source.count("pip install &#39;unolora[report]&#39;") == 5  # at the top and at each figure


@pytest.mark.parametrize(("count", "rivals"), [(1, ()), (1, ("lora",)), (6, ()), (30, ("frozen", "lora"))])
def test_any_number_of_tasks_and_rivals(tmp_path, count, rivals):
    specs = list(KINDS.values())
    tasks = {f"task-{index}": specs[index % len(specs)] for index in range(count)}
    write_suite(tmp_path, tasks, rivals)
    page = Page(report.write_report(tmp_path))
    head, rows = page.table("Scores on the test split")
    assert [row[0] for row in rows] == [*tasks, "average"]
    assert len(head) == 3 + 1 + len(rivals) + 1 + (2 if rivals else 1)
    assert len(page.figures[1]["plots"]) == count + 1


def test_page_stays_small_with_long_logs(tmp_path):
    specs = list(KINDS.values())
    tasks = {f"task-{index}": specs[index % len(specs)] for index in range(30)}
    write_suite(tmp_path, tasks)
    for folder in (tmp_path, tmp_path / "baselines" / "frozen", tmp_path / "baselines" / "lora"):
        values = dict.fromkeys(tasks, 1 / 3)
        log = [{"kind": "train", "step": step, "loss": 1 / 3} for step in range(1, 5001)]
        log += [
            {"kind": "evaluation", "split": "validation", "step": step, "average": 1 / 3, "scores": values}
            for step in range(1, 2000)
        ]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, log)), encoding="utf-8")
    path = report.write_report(tmp_path)
    assert path.stat().st_size < 6_000_000
    figures = Page(path).figures
    for figure, last in ((figures[1], 1999), (figures[2], 5000)):
        steps = figure["plots"][0]["data"][-1]["x"]
        assert 100 <= len(steps) <= 201
        assert (steps[0], steps[-1]) == (1, last)


def test_missing_numbers_are_shown_as_missing(tmp_path):
    write_suite(tmp_path)

    def spoil(results):
        results["tasks"][0]["metrics"]["test"]["matthews"] = math.nan
        results["tasks"][1]["metrics"] = {}
        results["tasks"][2]["sampling"] = {"planned": None, "seen": None}
        results["tasks"][3]["baseline"]["metrics"]["test"]["pearson"] = math.inf
        results["averages"]["mean_of_first_metrics"] = {"validation": None}
        results["parameters"]["total"] = None
        results["time"]["train_seconds"] = None
        results["best_step"] = None

    edit(tmp_path / "results.json", spoil)
    log = tmp_path / "metrics.jsonl"
    log.write_text(log.read_text(encoding="utf-8") + '{"kind":"train","step":260,"loss":NaN}\n', encoding="utf-8")
    page = Page(report.write_report(tmp_path))
    _, rows = page.table("Scores on the test split")
    assert rows[0][6:] == [MISSING] * 3
    assert rows[1][6] == MISSING
    assert rows[3][3] == rows[6][3] == MISSING  # without one task there is no average of the floor
    assert isinstance(rows[3][8], float)
    assert page.figures[2]["plots"][0]["data"][-1]["y"][-1] is None
    assert "NaN" not in "".join(page.texts)
    assert "None" not in "".join(page.texts)


def test_without_a_log_the_curves_are_left_out(tmp_path):
    write_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("\n", encoding="utf-8")
    page = Page(report.write_report(tmp_path))
    assert len(page.figures) == 2
    assert any("neither evaluations nor losses" in text for text in page.texts)


def test_lower_is_better_for_an_error(tmp_path):
    spec = ("regression", "rmse", ("rmse",), [], 100, 0.5)
    write_suite(tmp_path, {"sentiment": spec}, rivals=("frozen",))
    floor = {split: {"rmse": 2.0} for split in ("validation", "test")}
    edit(tmp_path / "results.json", lambda r: r["tasks"][0]["baseline"].update(metrics=floor))
    page = Page(report.write_report(tmp_path))
    _, (row, average) = page.table("Scores on the test split")
    assert row[4] < row[5] < row[3] == 2.0  # the rival is best here
    assert row[6] == average[6] == pytest.approx(2.0 - row[5])
    assert row[7] == average[7] == pytest.approx(row[4] - row[5])
    assert {(r, c) for caption, r, c in page.strong if caption == "Scores on the test split"} == {(0, 4), (1, 4)}


@pytest.mark.parametrize(
    ("file", "text", "note"),
    [
        ("results.json", None, r"results\.json: expected the results of a run, but No such file"),
        ("metrics.jsonl", None, r"metrics\.jsonl: expected the log of a run, but No such file"),
        ("config.yaml", None, r"config\.yaml: expected the configuration of a run, but No such file"),
        ("environment.json", None, r"environment\.json: expected the environment of a run, but No such file"),
        (
            "baselines/lora/metrics.jsonl",
            None,
            r"one for all: .*metrics\.jsonl: expected the log of a run",
        ),
        ("results.json", "{", r"results\.json: expected JSON, got Expecting property name"),
        ("results.json", "[1]", r"results\.json: expected a JSON object, got list"),
        ("results.json", "{}", r"results\.json: tasks is missing"),
        ("results.json", '{"tasks": [7]}', r"results\.json: label is missing"),
        (
            "baselines/lora/results.json",
            "{}",
            r"lora is left out, since only one of the two runs has spam",
        ),
        ("metrics.jsonl", '{"kind": "train"', r"metrics\.jsonl, line 1: expected JSON"),
        (
            "metrics.jsonl",
            '\n{"kind": "train", "step": 1, "loss": "x"}',
            r"line 2: left out, 'x' in the place",
        ),
        ("metrics.jsonl", '{"kind": "train", "step": null, "loss": 1}', r"line 1: left out, int\(\) argument"),
        ("metrics.jsonl", '{"kind": "train", "step": Infinity, "loss": 1}', r"line 1: left out, cannot convert float"),
        ("metrics.jsonl", '{"kind": "train", "step": 7, "loss": NaN}', r"the loss at step 7 is no number"),
        ("environment.json", '"x"', r"environment\.json: expected a JSON object, got str"),
        ("config.yaml", b"\xff\xfe\xfa", r"config\.yaml: expected .* but it is not UTF-8 text"),
        ("predictions.json", "[]", r"predictions\.json: expected a JSON object, got list"),
        ("predictions.json", '{"tasks": {"spam": {}}}', r"predictions\.json: spam is left out, it has no 'targets'"),
        ("analysis/about.json", "{}", r"analysis: expected the numbers that `unolora analyze` writes"),
    ],
)
def test_what_is_wrong_is_said_and_the_rest_is_shown(tmp_path, file, text, note):
    write_suite(tmp_path, {"spam": KINDS["spam"]}, rivals=("lora",))
    (tmp_path / file).parent.mkdir(exist_ok=True)
    if text is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    page = Page(report.write_report(tmp_path))
    assert [line for line in page.notes if re.search(note, line)]
    assert page.open == []
    assert "Parameters" in page.tables
    shown = " ".join(page.texts)
    assert "None" not in shown.replace("NoneType", "")
    assert "nan" not in shown.lower().split()


def test_a_sound_run_has_no_notes(suite):
    _, _, page = suite
    assert page.notes == []


def test_a_half_finished_run_shows_how_far_it_is(tmp_path):
    results = write_run(tmp_path)
    (tmp_path / "results.json").unlink()
    page = Page(report.write_report(tmp_path))
    assert any("is not finished: there are no test scores" in note for note in page.notes)
    assert any("is not finished: at step 240 it reaches" in text for text in page.texts)
    _, rows = page.table("Scores on the validation split")
    assert [row[0] for row in rows] == [*(task["name"] for task in results["tasks"]), "average"]
    assert all(isinstance(row[-2], float) for row in rows)
    assert any(figure["plots"][0]["data"][-1]["x"][-1] == 240 for figure in page.figures if figure["plots"])


def test_a_run_without_a_seed(tmp_path):
    write_run(tmp_path)
    edit(tmp_path / "results.json", lambda r: r.pop("seed"))
    page = Page(report.write_report(tmp_path))
    assert any("seed is missing" in note for note in page.notes)
    assert "seed" not in [text.strip()[:4] for text in page.texts]


@pytest.mark.parametrize(("folder", "message"), [("none", "no such folder"), ("", r"results\.json: expected")])
def test_what_is_no_run_is_refused(tmp_path, folder, message):
    with pytest.raises(InputError, match=message) as caught:
        report.write_report(tmp_path / folder)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_rivals_with_other_tasks_are_left_out(tmp_path):
    write_run(tmp_path, {name: KINDS[name] for name in ("spam", "movies")})
    write_run(tmp_path / "baselines" / "lora", {"spam": KINDS["spam"]}, method="lora")
    page = Page(report.write_report(tmp_path))
    assert page.notes == ["LoRA, one for all is left out, since only one of the two runs has movies (pearson)."]
    assert "LoRA, one for all" not in page.table("Scores on the test split")[0]


# --- mistakes ------------------------------------------------------------------------------------------------------


def write_predictions(folder, tasks):
    (folder / "predictions.json").write_text(json.dumps({"split": "test", "tasks": tasks}), encoding="utf-8")


SPAM = {
    "targets": [0, 0, 1, 1, 1, 0],
    "predictions": [0, 1, 1, -1, 0, 0],
    "confidence": [0.9, 0.8, 0.7, None, 0.99, 0.6],
    "worst": [{"row": 4, "texts": ["<b>win</b> a prize"]}, {"row": 1, "texts": ["lunch?", "at one"]}],
}
MOVIES = {
    "targets": [1.0, -2.0, 3.0, 0.5],
    "predictions": [1.5, None, 2.0, 0.25],
    "confidence": [None] * 4,
    "worst": [{"row": 1, "texts": ["so bad"]}],
}


def test_mistakes_are_drawn_and_quoted(tmp_path):
    write_run(tmp_path, {name: KINDS[name] for name in ("spam", "movies")})
    write_predictions(tmp_path, {"spam": SPAM, "movies": MOVIES})
    page = Page(report.write_report(tmp_path))
    (figure,) = [each for each in page.figures if each["plots"] and each["plots"][0]["data"][0]["type"] == "heatmap"]
    matrix, scatter = (plot["data"][0] for plot in figure["plots"])
    assert matrix["x"] == ["ham", "spam", "no answer"]
    assert matrix["z"] == [[2, 1, 0], [1, 1, 1]]
    assert scatter["x"] == [1.0, 3.0, 0.5]  # an answer that is no number has no place
    assert scatter["y"] == [1.5, 2.0, 0.25]
    text = " ".join(page.texts)
    assert "row 4: spam, predicted ham (99 % sure)" in text
    assert "<b>win</b> a prize" in text
    assert "row 1: \u22122.00, predicted no answer" in text


def test_scores_have_the_interval_of_a_bootstrap(tmp_path):
    write_run(tmp_path, {"movies": KINDS["movies"]})
    random = np.random.default_rng(0)
    targets = random.standard_normal(200)
    guesses = targets + random.standard_normal(200)
    write_predictions(
        tmp_path,
        {"movies": {"targets": list(targets), "predictions": list(guesses), "confidence": [None] * 200, "worst": []}},
    )
    score = float(np.corrcoef(targets, guesses)[0, 1])
    edit(tmp_path / "results.json", lambda r: r["tasks"][0]["metrics"]["test"].update(pearson=score))
    page = Page(report.write_report(tmp_path))
    texts = " ".join(page.texts)
    low, high = map(float, re.search(r"(0\.\d{3}) to (0\.\d{3})", texts).groups())
    expected = scipy.stats.bootstrap(
        (targets, guesses), lambda a, b: np.corrcoef(a, b)[0, 1], paired=True, method="percentile", random_state=0,
        vectorized=False, n_resamples=1000,
    ).confidence_interval  # fmt: skip
    assert low < score < high
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.02)


# --- several runs --------------------------------------------------------------------------------------------------


def write_seeds(folder, methods=("unolora", "lora"), seeds=(0, 1, 2)):
    """Write runs of some methods and seeds, as `unolora train` does; return their folders."""
    found = []
    for method in methods:
        for seed in seeds:
            path = folder / f"{method}-{seed}"
            write_run(path, method=method)

            def change(results, seed=seed, method=method):
                results["seed"] = seed
                results["parameters"]["file_bytes"] = 1000
                for task in results["tasks"]:
                    for split in ("validation", "test"):
                        task["metrics"][split] = {
                            m: v + 0.02 * wobble(seed, method, m) for m, v in task["metrics"][split].items()
                        }
                results["averages"]["mean_of_first_metrics"] = {
                    split: sum(t["metrics"][split][t["score_metric"]] for t in results["tasks"]) / len(results["tasks"])
                    for split in ("validation", "test")
                }

            edit(path / "results.json", change)
            (path / "config.yaml").write_text(f"method: lora-shared\ntasks: [spam]\ntraining: {{seed: {seed}}}\n")
            found.append(path)
    return found


def test_a_comparison_averages_over_seeds(tmp_path):
    folders = write_seeds(tmp_path)
    page = Page(report.write_comparison(folders, tmp_path / "out.html"))
    _, rows = page.table("Average over tasks")
    assert [row[0] for row in rows] == ["UnoLoRA* (task+sample)", "LoRA, one for all"]
    averages = [
        json.loads((f / "results.json").read_text())["averages"]["mean_of_first_metrics"]["test"] for f in folders
    ]
    ours, other = np.array(averages[:3]), np.array(averages[3:])
    assert [row[1] for row in rows] == pytest.approx([ours.mean(), other.mean()])
    assert rows[1][2] == pytest.approx((other - ours).mean())
    half = scipy.stats.t.ppf(0.975, 2) * scipy.stats.sem(ours)
    assert f"± {half:.3f}" in " ".join(page.texts)
    (curves,) = [f for f in page.figures if len(f["plots"]) == 7 and f["plots"][0]["data"][0].get("fill")]
    band, line = curves["plots"][0]["data"][0], curves["plots"][0]["data"][2]
    assert len(band["x"]) == 2 * len(line["x"])
    assert page.notes == []
    assert page.open == []
    assert "nothing to analyse" in " ".join(page.texts)


def test_a_comparison_says_what_it_leaves_out(tmp_path):
    folders = write_seeds(tmp_path, seeds=(0,))
    half = tmp_path / "half"
    write_run(half)
    (half / "results.json").unlink()
    no_seed = tmp_path / "no-seed"
    write_run(no_seed)
    edit(no_seed / "results.json", lambda r: r.pop("seed"))
    other = write_run(tmp_path / "other", {"spam": KINDS["spam"]}, method="frozen")
    assert len(other["tasks"]) == 1
    edit(tmp_path / "other" / "results.json", lambda r: r["parameters"].update(file_bytes=10))
    (tmp_path / "other" / "config.yaml").unlink()
    log = folders[0] / "metrics.jsonl"
    log.write_text(log.read_text() + '{"kind": "train", "step": 500, "loss": NaN}\n')
    page = Page(report.write_comparison([*folders, half, no_seed, tmp_path / "other"], tmp_path / "out.html"))
    text = " ".join(page.notes)
    for said in ("half: no results.json, the run is not finished", "no key 'seed'", "differ in task movies",
                 "one seed only", "the loss at step 500 is no number"):  # fmt: skip
        assert said in text
    assert len(page.table("Average over tasks")[1]) == 3
    with pytest.raises(InputError, match="the run is not finished"):
        report.write_comparison([half], tmp_path / "no.html")
    with pytest.raises(InputError, match="unknown row 'UnoLoRB'"):
        report.write_comparison(folders, tmp_path / "no.html", against="UnoLoRB")
    assert not (tmp_path / "no.html").exists()


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_page(tmp_path, monkeypatch, function):
    write_run(tmp_path)
    path = report.write_report(tmp_path)
    old = path.read_bytes()
    edit(tmp_path / "results.json", lambda r: r.update(name="another"))
    before = sorted(tmp_path.iterdir())

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        with pytest.raises(InputError, match=r"can't be written .disk full.; choose another folder"):
            report.write_report(tmp_path)
    assert path.read_bytes() == old
    assert sorted(tmp_path.iterdir()) == before
    assert report.write_report(tmp_path).read_bytes() != old


def test_the_same_run_gives_the_same_page(tmp_path):
    write_suite(tmp_path, {"spam": KINDS["spam"]}, rivals=("lora",))
    assert report.write_report(tmp_path).read_bytes() == report.write_report(tmp_path).read_bytes()


def luminance(colour):
    """Return the relative luminance of "#rrggbb" as WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    """Return the contrast ratio of two colours, 1 to 21."""
    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_colours_pass_wcag_aa(theme):
    assets = Path(charts.__file__).parent / "assets"
    style = "".join((assets / name).read_text(encoding="utf-8") for name in ("colours.css", "report.css"))
    pairs = re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", style)
    colours = {name: pair[theme] for name, *pair in pairs}
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for ground in ("page", "panel"):
        for text in ("ink", "muted", "link", "better", "worse"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    series = [name for name in colours if name.startswith("series-")]
    assert len(series) == len(charts.DASHES) == len(charts.MARKERS) == 8
    for name in [*series, "high", "low"]:
        assert contrast(colours[name], colours["page"]) >= 3, name
