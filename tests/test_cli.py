"""The command line from end to end on the tiny run."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import tiny
import unolora_cli
from unolora import cli, run_folder, runs, training
from unolora.arguments import read_lines, train_settings
from unolora.settings import Adapter, Data, Sampling, Settings, Training
from unolora.tasks import TASKS

PROGRAM = [sys.executable, "-m", "unolora"]


@pytest.fixture
def call(capsys):
    """Run a command in this process; returns what it wrote, after checking that it went well."""

    def run(*arguments, code=0, error=""):
        capsys.readouterr()
        assert unolora_cli.main([str(argument) for argument in arguments]) == code
        out, err = capsys.readouterr()
        assert err == error
        return out

    return run


@pytest.fixture
def stdin(monkeypatch):
    def give(data):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    return give


def answers(text):
    return [json.loads(line) for line in text.splitlines()]


# --- the process ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "active"}, "None")],
    ids=["by default", "the count is given", "a policy is given"],
)
def test_how_long_threads_spin_is_said_before_torch_is_loaded(given, expected):
    code = (
        "import os, sys, unolora_cli\n"
        "assert 'torch' not in sys.modules\n"
        "seen = []\n"
        "sys.addaudithook(lambda event, args: seen.append(os.environ.get('GOMP_SPINCOUNT'))\n"
        "    if event == 'import' and args[0] == 'torch' else None)\n"
        "assert unolora_cli.main(['doctor']) == 0\n"
        "assert 'torch' in sys.modules\n"
        "print(seen[0])\n"
    )
    env = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env | given)
    assert done.stdout.splitlines()[-1] == expected


# --- help ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], ["--version"], ["nonsense"]])
def test_help_loads_nothing_heavy(arguments):
    code = (
        "import sys, unolora_cli\n"
        f"code = unolora_cli.main({arguments})\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'rich', 'jsonargparse', 'unolora'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "raise SystemExit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == (2 if arguments == ["nonsense"] else 0), done.stderr
    assert len((done.stderr if done.returncode else done.stdout).splitlines()) >= 1


def test_help_names_every_command(call):
    text = call("--help")
    for command, summary in unolora_cli.COMMANDS.items():
        assert re.search(rf"^  {command} +{re.escape(summary)}$", text, re.MULTILINE)


def test_every_command_has_its_function_and_no_other_has():
    functions = {name for name, value in vars(cli).items() if callable(value) and value.__module__ == cli.__name__}
    named = {name.rstrip("_").replace("_", "-") for name in functions if not name.startswith("_")}  # import_, a keyword
    assert named == set(unolora_cli.COMMANDS)


@pytest.mark.parametrize("command", unolora_cli.COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        unolora_cli.main([command, "--help"])
    assert stop.value.code == 0
    out, err = capsys.readouterr()
    assert unolora_cli.COMMANDS[command].split()[0] in out
    assert f"unolora {command}" in out
    assert err == ""


def test_the_help_of_train_explains_every_setting(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit):
        unolora_cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for section, cls in {"": Settings, "adapter.": Adapter, "data.": Data, "sampling.": Sampling}.items():
        for name in cls.__dataclass_fields__:
            assert f"--{section}{name}" in text
    for name in Training.__dataclass_fields__:
        assert f"--training.{name}" in text
    for line in ("rank of the shared pair", "peak learning rate of AdamW", "what is trained: unolora, or a rival"):
        assert line in text


def test_version(call):
    import unolora

    assert call("--version") == f"unolora {unolora.__version__}\n"


# --- train ---------------------------------------------------------------------------------------------------------


def test_train_writes_a_run_and_says_where(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tiny.write_yaml(tmp_path / "quick.yaml", baselines=["heads-only"])
    text = call("train", config, "--training.steps", "4", "--adapter.r=2", "--training.evaluate_every", "2")
    run = tmp_path / "runs" / "quick"
    results = [tiny.results(run), tiny.results(run / "baselines" / "heads-only")]
    for found in results:
        assert found["steps"] == 4
        for task in found["tasks"]:
            assert f"{task['metrics']['test'][task['score_metric']]:.3f}" in text
        assert f"{found['averages']['mean_of_first_metrics']['test']:.3f}" in text
    assert "report   runs/quick/report.html" in text
    assert "adapter  runs/quick/adapter" in text
    assert (run / "report.html").is_file()
    assert runs.read_settings(run).adapter.r == 2
    assert [line.split("step ")[1].split()[0] for line in text.splitlines() if "step " in line][:2] == ["2/4", "4/4"]


@pytest.mark.parametrize("spelling", ["first", "--config", "--config="])
def test_the_file_gives_root_and_name(spelling, tmp_path):
    config = tiny.write_yaml(tmp_path / "mine.yaml", data={"root": None})
    arguments = {"first": [str(config)], "--config": ["--config", str(config)], "--config=": [f"--config={config}"]}
    settings, root, resume = train_settings(arguments[spelling])
    assert (settings.output, root, resume) == (str(Path("runs", "mine")), tmp_path, False)
    assert settings.data.root is None


def test_a_file_called_config_is_named_after_its_folder(tmp_path, monkeypatch):
    (tmp_path / "suite").mkdir()
    tiny.write_yaml(tmp_path / "suite" / "config.yaml")
    assert train_settings([str(tmp_path / "suite" / "config.yaml")])[0].output == str(Path("runs", "suite"))
    monkeypatch.chdir(tmp_path / "suite")
    assert train_settings(["config.yaml"])[0].output == str(Path("runs", "suite"))


def test_flags_win_over_the_file_and_the_rest_has_its_defaults(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("tasks: [spam]\ntraining: {steps: 7, learning_rate: 1e-4}\n")
    settings, _, _ = train_settings(
        [str(config), "--training.steps", "9", "--tasks", "[movies, {name: x}]", "--training.report_to", "[wandb]"]
    )
    assert settings == Settings(
        tasks=["movies", {"name": "x"}],
        training=Training(steps=9, learning_rate=1e-4, report_to=["wandb"]),
        output=str(Path("runs", "mine")),
    )


def test_a_run_of_flags_alone():
    settings, root, _ = train_settings(["--tasks", "[spam]"])
    assert settings == Settings(tasks=["spam"], output=str(Path("runs", "run")))
    assert root is None


def test_checkpoints_follow_the_evaluations(tmp_path):
    """Also where only a flag moves those."""
    config = tiny.spelled(tmp_path / "run", training={"checkpoint_every": None})
    del config["training"]["checkpoint_every"]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    settings, root, _ = train_settings([str(tmp_path / "mine.yaml"), "--training.evaluate_every", "2"])
    seen = []
    look = tiny.Watch(lambda step: seen.append((step, run_folder.last_checkpoint(tmp_path / "run"))))
    training.train(settings, root=root, progress=lambda label, trainer: look)
    assert [path and path.name for step, path in seen if step < 6] == [None, None, *["step-000002"] * 2, "step-000004"]


def test_the_data_beside_the_file_are_found_from_anywhere(call, tmp_path, monkeypatch):
    folder = tmp_path / "suite"
    folder.mkdir()
    for path in tiny.data().iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = tiny.write_yaml(folder / "mine.yaml", tmp_path / "run", method="heads-only", data={"root": None})
    monkeypatch.chdir(tmp_path)
    call("train", config)
    assert runs.read_settings(tmp_path / "run").data.root == str(folder)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert "mood" in call("evaluate", "../run")


def test_overwriting_replaces_the_run(call, tmp_path):
    config = tiny.write_yaml(tmp_path / "mine.yaml", tmp_path / "run", method="heads-only", training={"steps": 2})
    call("train", config)
    (tmp_path / "run" / "baselines").mkdir()
    before = tiny.results(tmp_path / "run")
    call("train", config, "--overwrite", "true", "--training.seed", "1")
    after = tiny.results(tmp_path / "run")
    assert (before["seed"], after["seed"]) == (0, 1)
    assert not (tmp_path / "run" / "baselines").exists()
    assert tiny.leftovers(tmp_path) == []


def test_an_empty_folder_is_filled_and_stays_itself(call, tmp_path, monkeypatch):
    """It may be a mount point, or the working folder."""
    (tmp_path / "run").mkdir()
    number = (tmp_path / "run").stat().st_ino
    config = tiny.write_yaml(tmp_path / "mine.yaml", method="heads-only", training={"steps": 2})
    monkeypatch.chdir(tmp_path / "run")
    call("train", config, "--output", ".")
    assert (tmp_path / "run").stat().st_ino == number
    assert tiny.results(tmp_path / "run")["name"] == "run"


# --- stopping ------------------------------------------------------------------------------------------------------


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_ctrl_c_writes_a_checkpoint_and_resume_goes_on(call, tmp_path):
    """In a process of its own, as a person would."""
    training_settings = {"steps": 120, "log_every": 5, "evaluate_every": 60, "checkpoint_every": 60}
    config = tiny.write_yaml(tmp_path / "mine.yaml", tmp_path / "run", method="heads-only", training=training_settings)
    run, log = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*PROGRAM, "train", str(config)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=env
    ) as it:
        try:
            wait_for(lambda: (log.exists() and log.read_bytes().count(b"\n") >= 2) or it.poll() is not None)
            it.send_signal(signal.SIGINT)
            _, error = it.communicate(timeout=120)
        finally:
            it.kill()
    assert it.returncode == 130, error
    last = error.decode().strip().splitlines()[-1]
    step = int(re.fullmatch(rf"stopped at step (\d+); go on with `unolora train --resume {run}`", last)[1])
    assert 0 < step < 120
    assert run_folder.last_checkpoint(run).name == f"step-{step:06d}"
    assert not (run / "results.json").exists()
    call("train", "--resume", run)
    whole = training.train(tiny.settings(tmp_path / "whole" / "run", method="heads-only", training=training_settings))
    assert tiny.parts(run) == tiny.parts(whole)


def test_an_interrupt_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    """A second Ctrl-C, or one outside of training: what there is to go on with is named."""
    config = tiny.write_yaml(tmp_path / "mine.yaml", tmp_path / "a run", method="heads-only")

    def interrupt(_):
        raise KeyboardInterrupt

    real = training.load_data
    monkeypatch.setattr(training, "load_data", lambda *_: interrupt(0))
    assert unolora_cli.main(["train", str(config)]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert not (tmp_path / "a run").exists()
    monkeypatch.setattr(training, "load_data", real)
    monkeypatch.setattr("unolora.progress.Bar.on_step_end", lambda *_, **__: interrupt(0))
    assert unolora_cli.main(["train", str(config)]) == 130
    assert capsys.readouterr().err == f"interrupted; go on with `unolora train --resume '{tmp_path}/a run'`\n"
    monkeypatch.undo()
    assert unolora_cli.main(["train", "--resume", str(tmp_path / "a run")]) == 0


@pytest.mark.parametrize("spelling", [["--resume", "RUN"], ["--resume=RUN"]])
def test_resume_takes_the_run_alone(call, tmp_path, spelling):
    run = tiny.copied(tiny.trained("heads-only"), tmp_path)
    before = tiny.parts(run)
    text = call("train", *(word.replace("RUN", str(run)) for word in spelling))
    assert f"report   {run}/report.html" in text
    assert tiny.parts(run) == before


def test_an_interrupt_of_another_command(capsys, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "doctor", interrupt)
    assert unolora_cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    "arguments",
    [["doctor"], pytest.param(["predict", "RUN", "--task", "mood", "good", "bad"], marks=pytest.mark.slow)],
    ids=["table", "lines"],
)
def test_a_reader_that_has_had_enough_is_no_error(arguments):
    """As `| head -0` does: the pipe is closed before anything is written."""
    arguments = [str(tiny.trained()) if word == "RUN" else word for word in arguments]
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        done = subprocess.run([*PROGRAM, *arguments], stdout=pipe, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_errors_of_the_program_itself_are_not_hidden(monkeypatch):
    def crash(_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli, "doctor", crash)
    with pytest.raises(RuntimeError, match="a bug"):
        unolora_cli.main(["doctor"])


def test_the_terminal_is_given_back_after_an_error(tmp_path, monkeypatch):
    stopped = []
    monkeypatch.setattr("unolora.progress.Bar.stop", lambda bar: stopped.append(bar.label))
    monkeypatch.setattr("unolora.progress.Bar.on_log", lambda *_, **__: 1 / 0)
    config = tiny.write_yaml(tmp_path / "mine.yaml", tmp_path / "run", method="heads-only")
    with pytest.raises(ZeroDivisionError):
        unolora_cli.main(["train", str(config)])
    assert stopped == ["frozen backbone, heads only"]


# --- evaluate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["validation", "test"])
def test_evaluate_gives_what_the_results_say(call, split):
    results = tiny.results(tiny.trained())
    found = json.loads(call("evaluate", tiny.trained(), "--split", split, "--json"))
    assert found == {
        "split": split,
        "scores": {task["name"]: task["metrics"][split] for task in results["tasks"]},
        **{name: values[split] for name, values in results["averages"].items()},
    }
    assert {"mean_of_first_metrics", "mean_of_metrics", "mean_of_task_means"} < set(found)


def test_evaluate_draws_a_table(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = call("evaluate", tiny.trained())
    for task in tiny.results(tiny.trained())["tasks"]:
        metrics = "  ".join(f"{name} {value:.4f}" for name, value in task["metrics"]["test"].items())
        row = next(line for line in text.splitlines() if f" {task['name']} " in line)
        assert metrics in row
        assert f" {task['rows']['test']} " in row
    assert "test split" in text
    for name, values in tiny.results(tiny.trained())["averages"].items():
        row = next(line for line in text.splitlines() if f" {name.replace('_', ' ')} " in line)
        assert f" {values['test']:.4f} " in row


def test_evaluate_on_the_training_rows(call):
    found = json.loads(call("evaluate", tiny.trained(), "--split", "train", "--json"))
    assert found["split"] == "train"
    assert set(found["scores"]) == set(tiny.NAMES)


# --- predict -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wanted():
    from unolora.scoring import predict_texts

    run = runs.load_run(tiny.trained())
    return lambda task, *inputs: list(predict_texts(run, task, list(inputs)))


@pytest.mark.parametrize("order", ["--task mood A B", "A B --task mood", "A --task mood B", "A B --task=mood"])
def test_predict_arguments(call, wanted, order):
    texts = {"A": "a good day", "B": "bad"}
    found = answers(call("predict", tiny.trained(), *(texts.get(word, word) for word in order.split())))
    assert found == wanted("mood", ("a good day",), ("bad",))
    assert [answer["label"] in ("bad", "good") for answer in found] == [True, True]


def test_predict_pairs_and_numbers(call, wanted):
    found = answers(call("predict", tiny.trained(), "--task", "heat", "hot fire\tice", "cold\tcold"))
    assert found == wanted("heat", ("hot fire", "ice"), ("cold", "cold"))
    assert all(answer.keys() == {"task", "value"} for answer in found)


def test_a_tab_parts_only_pairs(call, wanted):
    assert answers(call("predict", tiny.trained(), "--task", "mood", "good\tday")) == wanted("mood", ("good\tday",))


def test_predict_texts_that_begin_with_a_dash(call, wanted):
    found = answers(call("predict", tiny.trained(), "--task", "mood", "--", "-5 bad", "--good"))
    assert found == wanted("mood", ("-5 bad",), ("--good",))


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
@pytest.mark.parametrize("way", ["stdin", "file"])
def test_predict_lines(call, wanted, stdin, tmp_path, way, end):
    """One answer a line, also for an empty one; other line ends than the newline are text."""
    lines = ["\ufeffgood", "bad\u2028sad", "", "été \U0001f600"]
    data = (("\r\n" if end == "\r\n" else "\n").join(lines) + end).encode()
    more = []
    if way == "stdin":
        stdin(data)
    else:
        (tmp_path / "texts.txt").write_bytes(data)
        more = ["--file", tmp_path / "texts.txt"]
    found = answers(call("predict", tiny.trained(), "--task", "mood", *more))
    assert found == wanted("mood", ("good",), *((line,) for line in lines[1:]))


def test_the_mark_of_the_byte_order_is_no_text(tmp_path, stdin):
    (tmp_path / "texts.txt").write_bytes(b"\xef\xbb\xbfgood\nbad\n")
    assert read_lines(tmp_path / "texts.txt") == ["good", "bad"]
    stdin((tmp_path / "texts.txt").read_bytes())
    assert read_lines(None) == ["good", "bad"]


@pytest.mark.parametrize("ending", [".jsonl", ".JSONL", ".csv", ".tsv", ".parquet"])
@pytest.mark.parametrize("task", ["mood", "heat"])
def test_predict_tables(call, wanted, tmp_path, ending, task):
    rows = tiny.rows(task, 5)
    for row in rows:
        del row["label" if task == "mood" else "degrees"]  # the answer need not be there
    path = tmp_path / f"table{ending}"
    if ending.lower() == ".jsonl":
        tiny.write_rows(path, rows)
    elif ending == ".parquet":
        import pandas as pd

        pd.DataFrame(rows).to_parquet(path)
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if ending == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    found = answers(call("predict", tiny.trained(), "--task", task, "--file", path, "--batch-size", "2"))
    assert len(found) == 5
    for answer, row, other in zip(found, rows, wanted(task, *(tuple(row.values()) for row in rows)), strict=True):
        assert answer["task"] == task
        assert answer.get("label") == other.get("label"), row
        assert answer.get("value", 0) == pytest.approx(other.get("value", 0), abs=1e-3)


def test_answers_keep_their_letters(call, tmp_path):
    """JSON lines are UTF-8, not escapes."""
    rows = [{**row, "label": {"bad": "schlecht", "good": "schön"}[row["label"]]} for row in tiny.rows("mood")]
    tiny.write_rows(tmp_path / "mood.jsonl", rows)
    config = tiny.write_yaml(
        tmp_path / "mine.yaml", tmp_path / "run", method="heads-only", tasks=tiny.tasks("mood"),
        data={"root": str(tmp_path)}, training={"steps": 2},
    )  # fmt: skip
    call("train", config)
    assert "schön" in call("predict", tmp_path / "run", "--task", "mood", "good")


# --- tasks, report, doctor -----------------------------------------------------------------------------------------


def test_tasks_lists_the_built_in_ones(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    text = call("tasks")
    for name, task in TASKS.items():
        assert f" {name} " in text
        assert task.kind in text


def test_tasks_of_a_run(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = call("tasks", tiny.trained())
    assert "plant, animal, tool" in text
    assert "bad, good" in text
    assert "a number" in text


def test_text_is_no_markup(call, tmp_path, monkeypatch):
    """Labels, descriptions and paths may hold what rich takes for colours, emoji or an unopened tag."""
    monkeypatch.setenv("COLUMNS", "300")
    task = {**tiny.tasks("mood")[0], "labels": ["[/b]", "[red]"], "description": "A [bold]thing[/bold] :smile:"}
    labels = {"bad": "[/b]", "good": "[red]"}
    tiny.write_rows(tmp_path / "mood.jsonl", [{**row, "label": labels[row["label"]]} for row in tiny.rows("mood")])
    run = tmp_path / "[red]run[/red]"
    config = tiny.write_yaml(
        tmp_path / "mine.yaml", run, method="heads-only", tasks=[task], data={"root": str(tmp_path)},
        training={"steps": 2},
    )  # fmt: skip
    assert f"adapter  {run}/adapter" in call("train", config)
    text = call("tasks", run)
    assert "[/b], [red]" in text
    assert "A [bold]thing[/bold] :smile:" in text
    assert "[red]run[/red]" in call("evaluate", run)


def test_report_writes_the_page_again(call, tmp_path):
    run = tiny.copied(tiny.trained(), tmp_path)
    before = (run / "report.html").read_text(encoding="utf-8")
    (run / "report.html").unlink()
    assert call("report", run) == f"{run}/report.html\n"
    assert (run / "report.html").read_text(encoding="utf-8") == before


def test_doctor(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    found = json.loads(call("doctor", "--json"))
    table = call("doctor")
    for name, value in found.items():
        assert f" {name} " in table
        if name not in ("free space",):
            assert value in table, name
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "fastapi (pip install 'unolora[serve]')" in call("doctor")
