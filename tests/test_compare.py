"""compare.py: results.json of several runs in, one table out, whose statistics are SciPy's."""

import csv
import io
import json

import pytest
import scipy.stats
import yaml

import tiny
import unolora_cli
from unolora import compare
from unolora.errors import InputError
from unolora.settings import from_dict, to_dict

SCORES = {"cola": {"matthews": 0.5}, "mrpc": {"accuracy": 0.75, "f1": 0.8}}
GLUE = {
    "cola": ("matthews",), "sst2": ("accuracy",), "mrpc": ("accuracy", "f1"), "qqp": ("accuracy", "f1"),
    "stsb": ("pearson", "spearman"), "mnli": ("accuracy",), "qnli": ("accuracy",), "rte": ("accuracy",),
}  # fmt: skip


def document(label="UnoLoRA", seed=0, shift=0.0, scores=None, rows=(100, 10, 20), **changes):
    """What results.py gathers, as far as it is compared: scores moved by `shift`."""
    scores = {t: {m: v + shift for m, v in found.items()} for t, found in (scores or SCORES).items()}
    first = [next(iter(found.values())) for found in scores.values()]
    return {
        "name": "run", "method": "unolora", "label": label, "backbone": "minilm", "seed": seed, "steps": 240,
        "batch_size": 32,
        "tasks": [
            {
                "name": task, "score_metric": next(iter(found)),
                "rows": dict(zip(("train", "validation", "test"), rows, strict=True)),
                "metrics": {"validation": {m: v - 0.1 for m, v in found.items()}, "test": found},
            }
            for task, found in scores.items()
        ],
        "averages": {
            "mean_of_first_metrics": {"validation": sum(first) / len(first) - 0.1, "test": sum(first) / len(first)},
        },
        "parameters": {"trainable_percent": 0.8, "per_task_percent": 0.13, "file_bytes": 190_000},
        "time": {"train_seconds": 150.0},
        **changes,
    }  # fmt: skip


def write(folder, settings=None, **changes):
    """Write a run; `settings` (section -> values) become its config.yaml."""
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(document(**changes)), encoding="utf-8")
    if settings is not None:
        whole = to_dict(from_dict({"tasks": ["spam"], **settings}))
        (folder / "config.yaml").write_text(yaml.safe_dump(whole), encoding="utf-8")
    return folder


def rows(*folders, **options):
    return compare.rows(compare.read(folders)[0], **options)


def cells(table):
    """Column title -> its values."""
    return {column.title: column.values for column in table}


# --- read ----------------------------------------------------------------------------------------------------------


def test_a_run_and_its_baselines(tmp_path):
    run = write(tmp_path / "run", label="ours")
    write(run / "baselines" / "full", label="theirs")
    found, notes = compare.read([run])
    assert [(f["label"], f["folder"]) for f in found] == [("ours", run), ("theirs", run / "baselines" / "full")]
    assert notes == []
    assert [f["label"] for f in compare.read([run / "baselines" / "full"])[0]] == ["theirs"]


def test_a_folder_of_runs_is_searched_one_level_deep(tmp_path):
    for name in ("b", "a"):
        write(tmp_path / name, label=name)
    write(tmp_path / "deep" / "er", label="deep")
    (tmp_path / "table.md").write_text("")
    (tmp_path / "going on").mkdir()
    (tmp_path / "going on" / "config.yaml").write_text("")
    found, notes = compare.read([tmp_path])
    assert [f["label"] for f in found] == ["a", "b"]
    assert notes == [
        f"{tmp_path}/going on is left out, it is not finished; "
        f"go on with `unolora train --resume '{tmp_path}/going on'`."
    ]
    assert notes[0] in compare.compare([tmp_path])[1]


def test_a_run_given_twice_counts_once(tmp_path):
    run = write(tmp_path / "run")
    assert len(compare.read([run, tmp_path, tmp_path / ".." / tmp_path.name / "run"])[0]) == 1


def test_what_is_no_run(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text("")
    for name, message in {
        "nowhere": "nowhere: no such folder; give folders that `unolora train` wrote",
        "file": "file: no such folder",
        "empty": "empty: no finished run, and none in its folders",
        "begun": "begun: no results.json, the run is not finished; go on with `unolora train --resume .*begun`",
    }.items():
        with pytest.raises(InputError, match=message):
            compare.read([tmp_path / name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("label"), "no key 'label'"),
        (lambda d: d.pop("averages"), "no key 'averages'"),
        (lambda d: d["parameters"].pop("file_bytes"), "no key 'file_bytes'"),
        (lambda d: d["parameters"].pop("per_task_percent"), "no key 'per_task_percent'"),
        (lambda d: d["tasks"][0].pop("rows"), "no key 'rows'"),
        (lambda d: d["tasks"][0]["metrics"].pop("test"), "no key 'test'"),
        (lambda d: d["tasks"][0]["metrics"]["test"].update(matthews=None), "None in the place of a number"),
        (lambda d: d["tasks"][0]["metrics"]["test"].update(matthews="high"), "'high' in the place of a number"),
        (lambda d: d.update(tasks=[]), "no tasks"),
        (lambda d: d.update(time=3), "not subscriptable"),
    ],
)
def test_results_of_another_version(tmp_path, change, message):
    run = write(tmp_path / "run")
    assert compare.read([run])
    found = document()
    change(found)
    (run / "results.json").write_text(json.dumps(found))
    with pytest.raises(InputError, match=rf"run/results\.json: expected what this version .*{message}.*train the run"):
        compare.read([run])


@pytest.mark.parametrize("text", ["", "{", "[]", "nonsense"])
def test_results_that_are_no_json(tmp_path, text):
    run = write(tmp_path / "run")
    (run / "results.json").write_text(text)
    with pytest.raises(InputError, match=r"run/results\.json: expected what this version"):
        compare.read([run])


def test_settings_that_can_t_be_read_are_named(tmp_path):
    run = write(tmp_path / "run")
    (run / "config.yaml").write_text("tasks: [spam]\nadaptr: {r: 4}\n")
    with pytest.raises(InputError, match=r"run/config\.yaml: unknown setting 'adaptr'; did you mean 'adapter'"):
        compare.read([run])


# --- statistics ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [[0.1, 0.4], [0.7, 0.72, 0.69], [0.5, 0.5, 0.5], [0.3, -0.2, 0.9, 0.1, 0.0]])
def test_intervals_are_students(values):
    found = compare.interval(values)
    n = len(values)
    assert found.mean == pytest.approx(sum(values) / n)
    if len(set(values)) == 1:
        assert found.half == 0
        return
    low, high = scipy.stats.t.interval(0.95, n - 1, sum(values) / n, scipy.stats.sem(values))
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))


def test_one_value_has_no_interval_and_none_has_no_mean():
    assert compare.interval([0.25]) == (0.25, None)
    assert compare.interval([]) is None


def test_seeds_form_a_row_and_differences_are_paired(tmp_path):
    ours, theirs = {0: 0.00, 1: 0.10, 2: -0.05}, {2: -0.07, 0: -0.01, 1: 0.06}
    folders = [write(tmp_path / f"a{s}", label="A", seed=s, shift=v) for s, v in ours.items()]
    folders += [write(tmp_path / f"b{s}", label="B", seed=s, shift=v) for s, v in theirs.items()]
    reference, row = rows(*folders)
    assert (reference["label"], row["label"]) == ("A", "B")
    assert row["seeds"] == row["pairs"] == [0, 1, 2]
    assert reference["difference"] is None
    pairs = [[0.625 + found[s] for s in (0, 1, 2)] for found in (theirs, ours)]
    wanted = scipy.stats.ttest_rel(*pairs).confidence_interval(0.95)
    mean, half = row["difference"]
    assert (mean - half, mean + half) == pytest.approx(tuple(wanted))
    alone = scipy.stats.ttest_ind(*pairs).confidence_interval(0.95)
    assert half < (alone.high - alone.low) / 4  # the pairs matter
    assert row["scores"]["mrpc f1"].mean == pytest.approx(0.8 - 0.02 / 3)
    assert row["average"] == compare.interval(pairs[0])


def test_only_common_seeds_are_paired(tmp_path):
    a = [write(tmp_path / f"a{s}", label="A", seed=s, shift=s / 10) for s in (0, 1, 2)]
    b = [write(tmp_path / f"b{s}", label="B", seed=s, shift=s / 5) for s in (1, 2, 3)]
    c = [write(tmp_path / "c7", label="C", seed=7)]
    _, row, stranger = found = rows(*a, *b, *c)
    assert row["pairs"] == [1, 2]
    assert row["difference"].mean == pytest.approx(0.15)
    assert (stranger["pairs"], stranger["difference"]) == ([], None)
    notes = compare.notes(found, "test", "mean_of_first_metrics")
    assert "B: seeds paired with those of A: 1, 2." in notes
    assert "C: seeds paired with those of A: none." in notes
    assert len([note for note in notes if "paired with" in note]) == 2


def test_the_reference_can_be_chosen(tmp_path):
    folders = [write(tmp_path / name, label=name, shift=v) for name, v in {"one": 0.0, "two": 0.25}.items()]
    assert [row["difference"] for row in rows(*folders)] == [None, (0.25, None)]
    assert [row["difference"] for row in rows(*folders, against="two")] == [(-0.25, None), None]
    with pytest.raises(InputError, match=r"unknown row 'tow'; did you mean 'two'\? \(known: one, two\)"):
        rows(*folders, against="tow")


def test_the_split_decides(tmp_path):
    run = write(tmp_path / "run")
    assert rows(run)[0]["average"].mean == 0.625
    assert rows(run, split="validation")[0]["average"].mean == pytest.approx(0.525)
    assert rows(run, split="validation")[0]["scores"]["cola matthews"].mean == pytest.approx(0.4)


def test_an_average_that_is_not_there(tmp_path):
    averages = {"mean_of_metrics": {"validation": 0.5, "test": 0.6}}
    new = write(tmp_path / "new", averages=averages)
    assert rows(new, average="mean_of_metrics")[0]["average"].mean == 0.6
    old = write(tmp_path / "old", seed=1)
    with pytest.raises(InputError, match="old: its results have no mean_of_metrics, only mean_of_first_metrics; "):
        rows(old, average="mean_of_metrics")


# --- which runs form a row -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        {"training": {"seed": 1}, "output": "elsewhere", "overwrite": True, "baselines": ["full"]},
        {"data": {"root": "/else/where"}},
        {"adapter": {"alpha": 16.0}},
        {"training": {"log_every": 3, "checkpoint_every": 7, "keep_checkpoints": 1}},
    ],
)
def test_settings_that_do_not_part_runs(tmp_path, other):
    found = rows(write(tmp_path / "a", {}), write(tmp_path / "b", other, seed=1))
    assert [(row["label"], row["seeds"]) for row in found] == [("UnoLoRA", [0, 1])]


def test_settings_that_part_runs_are_in_the_label(tmp_path):
    a = write(tmp_path / "a", {"adapter": {"r": 8}})
    b = write(tmp_path / "b", {"adapter": {"r": 4}, "training": {"learning_rate": 0.01}}, seed=1)
    c = write(tmp_path / "c", {"adapter": {"r": 2}}, label="another")
    labels = [row["label"] for row in rows(a, b, c)]
    assert labels == ["UnoLoRA, r=8, learning_rate=0.001", "UnoLoRA, r=4, learning_rate=0.01", "another"]
    assert rows(a, b, c, against=labels[1])[0]["reference"] == labels[1]


def test_a_baseline_has_the_settings_of_its_run(tmp_path):
    folders = []
    for seed in (0, 1):
        run = write(tmp_path / str(seed), {"training": {"seed": seed}, "baselines": ["full"]}, seed=seed)
        write(run / "baselines" / "full", seed=seed, label="full", method="full")
        folders.append(run)
    assert [(row["label"], row["seeds"]) for row in rows(*folders)] == [("UnoLoRA", [0, 1]), ("full", [0, 1])]
    alone = write(tmp_path / "alone", {"method": "full"}, seed=2, label="full", method="full")
    assert rows(*folders, alone)[1]["seeds"] == [0, 1, 2]


def test_the_same_run_in_two_places(tmp_path):
    a, b = write(tmp_path / "a", {}), write(tmp_path / "b", {})
    with pytest.raises(InputError, match=r"b and .*a are the same method, settings and seed; leave one out"):
        rows(a, b)


# --- one protocol --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": "bert"}, "backbone: bert instead of minilm"),
        ({"steps": 100}, "steps: 100 instead of 240"),
        ({"batch_size": 16}, "batch size: 16 instead of 32"),
        ({"rows": (90, 10, 20)}, "task cola: matthews on 90/10/20 rows instead of matthews on 100/10/20 rows"),
        ({"scores": {"cola": {"matthews": 0.5}}}, "task mrpc: none instead of accuracy and f1 on 100/10/20 rows"),
        ({"scores": {**SCORES, "rte": {"accuracy": 0.5}}}, "task rte: accuracy on 100/10/20 rows instead of none"),
    ],
)
def test_other_protocols_are_refused(tmp_path, change, message):
    a, b = write(tmp_path / "a", label="A"), write(tmp_path / "b", label="B")
    assert "differs in" not in cells(compare.compare([a, b])[0])
    c = write(tmp_path / "c", label="C", **change)
    with pytest.raises(InputError, match=f"c and .*a differ in {message}; .*--loose"):
        compare.compare([a, b, c])
    table = cells(compare.compare([a, b, c], loose=True)[0])
    name, _, values = message.partition(": ")
    theirs = values.split(" instead of ")[0]
    assert f"{name} {theirs}" in table["differs in"][2]
    assert f"{name} {theirs}" not in table["differs in"][0]
    same_tasks = "scores" not in change
    assert [d is None for d in table["difference to A"]] == [True, False, not same_tasks]
    if not same_tasks:
        missing = [title for title in ("mrpc f1", "rte accuracy") if table.get(title, [0, 0, 0])[2] is None]
        assert bool(missing) == ("rte" not in change["scores"])


# --- the paper -----------------------------------------------------------------------------------------------------


def like_the_paper(**changes):
    scores = {task: dict.fromkeys(metrics, 0.75) for task, metrics in GLUE.items()}
    found = document(scores=scores, backbone="google-t5/t5-base", steps=262_144)
    for task in found["tasks"]:
        train, test = compare.PAPER_ROWS[task["name"]]
        task["rows"] = {"train": train, "validation": 7, "test": test - (task["name"] == "cola")}
    found["averages"]["mean_of_metrics"] = {"validation": 0.7, "test": 0.75}
    return {**found, **changes}


def put(folder, found):
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(found))
    return folder


def test_the_paper_s_average_is_the_mean_of_its_metrics():
    for _, _, average, scores in compare.PAPER[-2:]:
        assert round(sum(scores) / len(compare.PAPER_SCORES), 2) == average
        assert len(scores) == 11


def test_the_paper_stands_beside_its_own_protocol(tmp_path):
    run = put(tmp_path / "run", like_the_paper())
    columns, notes = compare.compare([run], average="mean_of_metrics")
    table = cells(columns)
    assert table["method"] == ["UnoLoRA", *(f"{label} (paper)" for label, *_ in compare.PAPER)]
    assert table["mean of metrics"] == [
        (0.75, None),
        *((round(average / 100, 4), None) for _, _, average, _ in compare.PAPER),
    ]
    assert table["cola matthews"][-1] == (0.5611, None)
    assert table["rte accuracy"][-2:] == [(0.777, None), (0.7626, None)]
    assert table["mrpc f1"][1:] == [None] * 6  # theirs is another F1
    assert table["trained % a task, without heads"][-1] == 0.05
    assert not any("not shown" in note for note in notes)
    assert any("micro-averaged" in note for note in notes)
    columns, notes = compare.compare([run])
    assert cells(columns)["mean of first metrics"][1:] == [None] * 6
    assert "The paper's average is the mean of metrics: --average mean_of_metrics." in notes


@pytest.mark.parametrize(
    ("change", "split", "why"),
    [
        ({"backbone": "google/t5-v1_1-base"}, "test", "backbone google/t5-v1_1-base, not T5-base"),
        ({"steps": 1000}, "test", "1,000 steps, not 262,144"),
        ({"batch_size": 64}, "test", "batches of 64, not 32"),
        ({"tasks": like_the_paper()["tasks"][1:]}, "test", "other tasks than GLUE's eight"),
        ({}, "validation", "the validation split, not the test split"),
    ],
)
def test_why_the_paper_is_not_beside_others(tmp_path, change, split, why):
    run = put(tmp_path / "run", like_the_paper(**change))
    columns, notes = compare.compare([run], split=split)
    assert cells(columns)["method"] == ["UnoLoRA"]
    assert f"The paper's Table 1 is not shown beside these, its protocol is another: {why}." in notes


def test_parts_of_the_data_are_another_protocol(tmp_path):
    found = like_the_paper()
    for task in found["tasks"]:
        task["rows"]["test"] = min(task["rows"]["test"], 1000)
    notes = compare.compare([put(tmp_path / "run", found)])[1]
    assert "its protocol is another: not all rows of qqp, mnli, qnli." in notes[-1]


# --- columns and text ----------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    """Two methods with two seeds each, and one with characters that formats must escape."""
    found = [write(tmp_path / f"a{s}", label="UnoLoRA*", seed=s, shift=s / 10) for s in (0, 1)]
    found += [write(tmp_path / f"b{s}", label="LoRA", seed=s, shift=-s / 8) for s in (0, 1)]
    return [*found, write(tmp_path / "c", label="a|b_c & 50% {x} $y #1 ~^\\", steps=240)]


def test_columns(folders):
    table = cells(compare.compare(folders)[0])
    assert list(table) == [
        "method", "cola matthews", "mrpc accuracy", "mrpc f1", "mean of first metrics", "difference to UnoLoRA*",
        "trained %, with heads", "trained % a task, without heads", "adapter file", "steps", "training time", "seeds",
    ]  # fmt: skip
    assert table["adapter file"] == [190_000] * 3
    assert table["training time"] == [150.0] * 3
    assert table["seeds"] == ["0, 1", "0, 1", "0"]
    first = cells(compare.compare(folders, metrics="first")[0])
    assert table.keys() - first.keys() == {"mrpc f1"}
    assert "difference to UnoLoRA*" not in cells(compare.compare(folders[:2])[0])


def test_costs_are_means_over_seeds(tmp_path):
    a = write(tmp_path / "a", time={"train_seconds": 100.0})
    b = write(tmp_path / "b", seed=1, time={"train_seconds": 300.0})
    assert cells(compare.compare([a, b])[0])["training time"] == [200.0]


def test_markdown(folders):
    table, notes = compare.compare(folders)
    text = compare.as_markdown(table, notes)
    lines = text.splitlines()
    head, rule, *body = [line for line in lines if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in (head, rule, *body)}) == 1
    assert rule.split("|")[1:-1] == [" --- ", *[" ---: "] * 10, " --- "]
    assert [row.replace("\\|", "/").split("|")[1].strip() for row in body] == [
        "UnoLoRA\\*", "LoRA", "a/b_c & 50% {x} $y #1 ~^\\",
    ]  # fmt: skip
    half = compare.interval([0.625, 0.725]).half
    assert f"| 0.6750 ± {half:.4f} |" in body[0]
    assert "| -0.1125 ± " in body[1]
    assert "| 0.500 | 0.750 | 0.800 | 0.6250 | +0.0000 |" in body[2]
    assert "| 0.800 | 0.130 | 190 kB | 240 | 2.5 min | 0 |" in body[2]
    assert [line for line in lines if line and not line.startswith("|")] == notes
    assert "± half of the 95 % interval (Student's t); differences are paired by seed." in notes[0]


def test_one_seed_says_so(folders):
    assert compare.compare(folders[-1:])[1][0] == "Scores on the test split, one seed each, so no intervals."


def test_latex(folders):
    table, notes = compare.compare(folders)
    lines = compare.as_latex(table, notes).splitlines()
    assert [line for line in lines if line.startswith("%")] == [f"% {note}" for note in notes]
    start = lines.index(r"\begin{tabular}{lrrrrrrrrrrl}")
    assert lines[start + 1 :: 2][:2] == [r"\toprule", r"\midrule"]
    assert lines[-2:] == [r"\bottomrule", r"\end{tabular}"]
    body = lines[start + 4 : -2]
    assert [row.replace(r"\&", "").count("&") for row in body] == [11] * 3
    assert all(row.endswith(r" \\") for row in body)
    assert body[2].startswith(
        r"a|b\_c \& 50\% \{x\} \$y \#1 \textasciitilde{}\textasciicircum{}\textbackslash{} & 0.500 & 0.750"
    )
    assert r"$-$0.1125 $\pm$ " in body[1]
    assert " & -- & " in body[0]
    assert r"trained \%, with heads" in lines[start + 2]


def test_csv_keeps_every_digit(folders):
    table, notes = compare.compare(folders)
    found = list(csv.DictReader(io.StringIO(compare.as_csv(table, notes))))
    assert [row["method"] for row in found] == table[0].values
    for row, average, gain in zip(found, table[4].values, table[5].values, strict=True):
        assert float(row["mean of first metrics"]) == average.mean
        assert row["mean of first metrics ±"] == ("" if average.half is None else repr(average.half))
        assert row["difference to UnoLoRA*"] == ("" if gain is None else repr(gain.mean))
    assert [row["adapter file [bytes]"] for row in found] == ["190000.0"] * 3
    assert {row["training time [s]"] for row in found} == {"150.0"}


def test_text_is_aligned_and_methods_stand_across(folders):
    table, notes = compare.compare(folders)
    text = compare.as_text(table, notes)
    body, _, rest = text.partition("\n\n")
    lines = body.splitlines()
    assert [line.split("  ")[0] for line in lines] == [column.title for column in table]
    assert len({len(line) for line in lines}) == 1
    assert rest.splitlines() == notes


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        ("percent", 0.0, "0.00"), ("percent", 100.0, "100"), ("percent", 0.049, "0.0490"), ("percent", 12.5, "12.5"),
        ("bytes", 999, "999 B"), ("bytes", 90_868_000, "90.9 MB"), ("bytes", 3e9, "3 GB"),
        ("duration", 5.83, "5.8 s"), ("duration", 90, "1.5 min"), ("duration", 5400, "1 h 30 min"),
        ("duration", 3599, "1 h 0 min"), ("count", 262144, "262,144"),
        ("gain", compare.Interval(0.002, 0.001), "+0.0020 ± 0.0010"), ("score", None, "\u2013"),
    ],
)  # fmt: skip
def test_how_values_are_shown(show, value, text):
    assert compare._cell(value, show) == text


# --- a real run, and the command -----------------------------------------------------------------------------------


def test_a_real_run():
    run = tiny.trained()
    results = tiny.results(run)
    size = sum(path.stat().st_size for path in (run / "adapter").iterdir())
    assert size > 4 * results["parameters"]["trainable"]
    assert results["parameters"]["file_bytes"] == size
    for average in compare.AVERAGES:
        table = cells(compare.compare([run], average=average, split="validation")[0])
        assert table[average.replace("_", " ")] == [(results["averages"][average]["validation"], None)]
    assert table["adapter file"] == [size]
    assert table["steps"] == [12]


def test_the_command(folders, capsys):
    table, notes = compare.compare(folders)
    for form, function in compare.FORMATS.items():
        assert unolora_cli.main(["compare", *map(str, folders), "--format", form]) == 0
        out, err = capsys.readouterr()
        assert out == function(table, notes)
        assert err == ("\n".join(notes) + "\n" if form == "csv" else "")
    assert unolora_cli.main(["compare", *map(str, folders)]) == 0
    assert capsys.readouterr().out == compare.as_text(table, notes)


def test_the_options_of_the_command(tmp_path, capsys):
    run = put(tmp_path / "run", like_the_paper())
    other = put(tmp_path / "other", like_the_paper(label="other", steps=7))
    flags = ["--average", "mean_of_metrics", "--metrics", "first", "--split", "validation", "--against", "other"]
    assert unolora_cli.main(["compare", str(run), str(other), *flags]) == 2
    assert "differ in steps: 7 instead of 262144; compare runs of one protocol, or give --loose" in (
        capsys.readouterr().err
    )
    assert unolora_cli.main(["compare", str(run), str(other), *flags, "--loose", "--format", "csv"]) == 0
    found = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["mean of metrics"] for row in found] == ["0.7", "0.7"]
    assert [row["difference to other"] for row in found] == ["0.0", ""]
    assert "mrpc f1" not in found[0]
    assert [row["differs in"] for row in found] == ["steps 262144", "steps 7"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: the following arguments are required: run; see `unolora compare --help`\n"),
        (["nowhere"], "error: nowhere: no such folder; give folders that `unolora train` wrote\n"),
        (["nowhere", "--format", "html"], "error: argument --format: invalid choice: 'html'"),
        (["nowhere", "--averge", "x"], "did you mean 'average'"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    assert unolora_cli.main(["compare", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err


def test_a_setting_that_was_left_alone_is_called_default():
    settings = [{"adapter.target_modules": None}, {"adapter.target_modules": "query-value"}]
    labels = compare.told_apart(["a", "a"], settings)
    assert labels == ["a, target_modules=default", "a, target_modules=query-value"]
