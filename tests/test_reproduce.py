"""scripts/reproduce.py: a suite is trained some runs at a time, goes on where it stopped, and leaves numbers only."""

import dataclasses
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

import tiny
from unolora import compare, runs, settings, training
from unolora.errors import InputError

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "scripts"))
import reproduce  # noqa: E402

METHODS = {
    "heads": {"method": "heads-only", "training": {"learning_rate": 0.02}},
    "uno": {"method": "unolora", "adapter": {"conditioning": "none"}},
}

# Stands in for Python where a test is about the driver: `-m unolora train` in a moment, told what to do by files.
PROGRAM = """#!{python}
import json, os, shutil, signal, sys, time
from pathlib import Path
import yaml
resumed = sys.argv[4] == "--resume"
config = Path(sys.argv[5], "config.yaml") if resumed else Path(sys.argv[4])
settings = yaml.safe_load(config.read_text())
run, here = Path(settings["output"]), Path({here!r})
text = config.read_text()
shutil.copytree({template!r}, run, ignore=lambda *_: ["results.json", "adapter"], dirs_exist_ok=True)
(run / "config.yaml").write_text(text)
line = json.dumps([run.name, resumed, os.environ["OMP_NUM_THREADS"]])
(here / "calls").open("a").write(line + "\\n")
if (here / f"fail-{{run.name}}").exists():
    sys.stderr.write("error: it did not fit\\n")
    raise SystemExit(2)
if (here / f"diverge-{{run.name}}").exists():
    (run / "not-finite.json").write_text("[]")
    raise SystemExit(2)
def stop(*_):
    (here / "stopped").open("a").write(run.name + "\\n")
    raise SystemExit(130)
signal.signal(signal.SIGINT, stop)
(here / f"began-{{run.name}}").touch()
while (here / "wait").exists():
    time.sleep(0.01)
time.sleep(0.05)
results = json.loads(Path({template!r}, "results.json").read_text())
results |= {{"name": run.name, "label": run.name[:-6], "seed": settings["training"]["seed"]}}
results |= {{"backbone": settings["backbone"], "steps": settings["training"]["steps"]}}
if not settings["training"]["test"]:
    best = json.loads((here / "best").read_text())[settings["method"]]
    reached = 1 - abs(settings["training"]["learning_rate"] - best)
    results["averages"] = {{name: {{"validation": reached}} for name in results["averages"]}}
    for task in results["tasks"]:
        del task["metrics"]["test"]
(run / "results.json").write_text(json.dumps(results))
(here / "calls").open("a").write(json.dumps([run.name, "end", ""]) + "\\n")
"""


def write_suite(path, methods=METHODS, seeds=(0, 1), tune=None, **changes):
    """Write a suite on the tiny backbone and its tasks."""
    shared = tiny.spelled(**changes)
    del shared["output"], shared["data"]["root"]
    suite = {"settings": shared, "seeds": list(seeds), "methods": methods}
    if tune is not None:
        suite["tune"] = tune
    path.write_text(yaml.safe_dump(suite, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture
def suite(tmp_path):
    return write_suite(tmp_path / "suite.yaml")


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Put PROGRAM in the place of Python; gives the folder of its files."""
    here = tmp_path / "here"
    here.mkdir()
    path = here / "python"
    path.write_text(PROGRAM.format(python=sys.executable, here=str(here), template=str(tiny.trained())))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(reproduce.sys, "executable", str(path))
    return here


@pytest.fixture
def call(tmp_path, suite, capsys):
    """Run the suite; returns what was written, after checking the exit code."""

    def run(*flags, code=0):
        arguments = [suite, tmp_path / "out", "--work", tmp_path / "work", "--data-root", tiny.data(), *flags]
        assert reproduce.main([str(argument) for argument in arguments]) == code
        return capsys.readouterr()

    return run


def calls(here):
    return [json.loads(line) for line in (here / "calls").read_text().splitlines()]


def files(folder):
    """Every file below a folder and when it was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def in_a_while(here, do):
    """Do something as soon as both runs of seed 0 have begun, from another thread."""
    both = [here / f"began-{method}-seed0" for method in METHODS]

    def watch():
        end = time.monotonic() + 60
        while not all(path.exists() for path in both) and time.monotonic() < end:
            time.sleep(0.01)
        do()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


# --- the order of things -------------------------------------------------------------------------------------------


def test_seeds_are_outermost_and_cores_are_shared(call, program, monkeypatch):
    monkeypatch.setattr(reproduce.os, "cpu_count", lambda: 7)
    text = call("--jobs", "2").out
    begun = [name for name, kind, _ in calls(program) if kind != "end"]
    assert {frozenset(begun[:2]), frozenset(begun[2:])} == {
        frozenset({f"{method}-seed{seed}" for method in METHODS}) for seed in (0, 1)
    }
    assert begun[0].endswith("0")
    assert {threads for _, kind, threads in calls(program) if kind != "end"} == {"3"}
    lines = text.splitlines()
    assert re.fullmatch(r"4 of 4 runs to train in \S+/work, 2 at a time", lines[0])
    seen = [re.fullmatch(r"(\S+): done in 0 min \d+ s, validation \S+ \[(\d) of 4, .* so far, .*]", x) for x in lines]
    assert sorted(found[1] for found in seen if found) == sorted(begun)
    assert [found[2] for found in seen if found] == ["1", "2", "3", "4"]


def test_one_at_a_time(call, program):
    call()
    kinds = [kind for _, kind, *_ in calls(program)]
    assert kinds == [False, "end"] * 4


def test_two_at_a_time(call, program):
    (program / "wait").touch()
    thread = in_a_while(program, (program / "wait").unlink)
    call("--jobs", "2")
    thread.join()
    kinds = [kind for _, kind, *_ in calls(program)]
    assert kinds[:3] == [False, False, "end"]
    assert all(kinds[:n].count(False) - kinds[:n].count("end") <= 2 for n in range(1, 9))


def test_what_is_finished_is_not_touched(call, program, tmp_path):
    call()
    before = files(tmp_path / "work")
    assert len([path for path in before if path.name == "results.json"]) == 4
    shutil.rmtree(tmp_path / "work" / "uno-seed0")
    (program / "calls").unlink()
    call()
    assert [name for name, kind, _ in calls(program) if kind != "end"] == ["uno-seed0"]
    now = files(tmp_path / "work")
    assert now.keys() == before.keys()
    assert {p.parent.name for p in now if now[p] != before[p] and p.parent.parent.name == "work"} == {"uno-seed0"}


def test_time_left_is_what_methods_took(tmp_path):
    found = reproduce.read_suite(
        write_suite(tmp_path / "suite.yaml", seeds=(0, 1, 2)), tmp_path / "work", tiny.data()
    ).runs
    for run, seconds in zip(found[:2], (10.0, 100.0), strict=True):
        run.folder.mkdir(parents=True)
        time_taken = {"time": {"train_seconds": seconds, "evaluation_seconds": 1.0}}
        (run.folder / "results.json").write_text(json.dumps(time_taken))
    assert [run.name for run in found[:2]] == ["heads-seed0", "uno-seed0"]
    assert reproduce.seconds_left(found[2:], found[:2]) == 2 * (11 + 101)
    assert reproduce.seconds_left(found[2:], found[:1]) == 4 * 11
    assert reproduce.seconds_left(found, []) == 0


# --- stopping and failing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_all_and_the_next_call_goes_on(call, program, tmp_path, number, request):
    (program / "wait").touch()
    if signal.getsignal(number) is signal.SIG_IGN:  # as under nohup, where a hang-up is rightly let be
        signal.signal(number, signal.SIG_DFL)
        request.addfinalizer(lambda: signal.signal(number, signal.SIG_IGN))
    before = signal.getsignal(number)
    thread = in_a_while(program, lambda: os.kill(os.getpid(), number))
    out, err = call("--jobs", "2", code=130)
    thread.join()
    assert signal.getsignal(number) is before
    assert err == "stopped; the same command goes on\n"
    assert sorted((program / "stopped").read_text().split()) == ["heads-seed0", "uno-seed0"]
    assert len(re.findall(r"ended with code 130 after .*\[0 of 4, 0 min \d+ s so far]", out)) == 2
    assert not list((tmp_path / "work").glob("*/results.json"))
    assert not (tmp_path / "out").exists()
    (program / "wait").unlink()
    (program / "calls").unlink()
    call("--jobs", "2")
    again = {name: kind for name, kind, *_ in calls(program) if kind != "end"}
    assert again == {"heads-seed0": True, "uno-seed0": True, "heads-seed1": False, "uno-seed1": False}


def test_a_failure_is_told_and_the_others_go_on(call, program, tmp_path):
    (program / "fail-heads-seed0").touch()
    text = call(code=1).out
    assert re.search(r"heads-seed0: ended with code 2 after .*, see .*heads-seed0\.log: error: it did not fit \[", text)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "heads-seed1", "table.md", "uno-seed0", "uno-seed1",
    ]  # fmt: skip
    assert "3 of 4 runs are in" in text
    (program / "fail-heads-seed0").unlink()
    assert "4 of 4 runs are in" in call().out


def test_a_suite_of_precision_auto_goes_on(call, suite, program, tmp_path):
    """A run's own file says what it came to."""
    write_suite(suite, training={"precision": "auto"})
    call()
    for path in (tmp_path / "work").glob("*/config.yaml"):
        found = settings.from_dict(yaml.safe_load(path.read_text()))
        assert found.training.precision == "auto", "the stand-in writes what it was given"
        path.write_text(yaml.safe_dump(settings.to_dict(runs.settled(found))))
    (program / "calls").unlink()
    shutil.rmtree(tmp_path / "work" / "uno-seed1")
    call()
    assert [name for name, kind, _ in calls(program) if kind != "end"] == ["uno-seed1"]
    kept = yaml.safe_load((tmp_path / "out" / "uno-seed0" / "config.yaml").read_text())["training"]["precision"]
    assert kept in ("bf16", "fp32")


def test_one_driver_at_a_time(call, program, tmp_path):
    """Also while only a run of a driver that was killed goes on."""
    with reproduce.locked(tmp_path / "work") as lock:
        child = subprocess.Popen(["sleep", "60"], pass_fds=[lock])
    try:
        _, err = call(code=2)
        assert f"error: {tmp_path}/work: runs are in training there; wait for them, or choose another --work\n" == err
    finally:
        child.kill()
        child.wait()
    assert not (program / "calls").exists()
    call()


# --- learning rates ------------------------------------------------------------------------------------------------

TUNE = {"seed": 7, "learning_rates": [0.25, 0.5, 0.75], "of": {"heads": [1.25, 1.5, 1.75]}}
TRIALS = [f"heads-rate{rate}" for rate in TUNE["of"]["heads"]] + [f"uno-rate{rate}" for rate in TUNE["learning_rates"]]
FINAL = [f"{method}-seed{seed}" for seed in (0, 1) for method in METHODS]


@pytest.fixture
def tuned(suite, program):
    """A suite that chooses learning rates, in which the best ones are known; gives the folder of the files."""
    write_suite(suite, tune=TUNE)
    (program / "best").write_text(json.dumps({"heads-only": 1.6, "unolora": 0.3}))
    return program


def begun(program):
    """The runs that were started, in that order; forgets them."""
    found = [name for name, kind, _ in calls(program) if kind != "end"]
    (program / "calls").unlink()
    return found


def rate(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())["training"]["learning_rate"]


def test_the_rate_with_the_best_validation_average_is_chosen(call, tuned, tmp_path):
    text = call().out
    assert begun(tuned) == TRIALS + FINAL
    assert f"6 of 6 trials of learning rates to train in {tmp_path}/work, 1 at a time" in text
    assert f"4 of 4 runs are in {tmp_path}/out/table.md" in text
    work, out = tmp_path / "work", tmp_path / "out"
    for trial in TRIALS:
        config = yaml.safe_load((work / trial / "config.yaml").read_text())["training"]
        assert (config["test"], config["seed"]) == (False, 7), trial
        assert config["learning_rate"] == float(trial.partition("rate")[2])
        assert not (out / trial).exists()
    for name in FINAL:
        assert rate(work / name) == rate(out / name) == {"heads": 1.5, "uno": 0.25}[name[: name.index("-")]]
        assert yaml.safe_load((out / name / "config.yaml").read_text())["training"]["test"] is True
    tuning = json.loads((out / "tuning.json").read_text())
    assert (tuning["seed"], tuning["methods"]["heads"]["chosen"]) == (7, 1.5)
    assert tuning["methods"]["uno"]["chosen"] == 0.25
    assert tuning["methods"]["uno"]["validation"] == pytest.approx({"0.25": 0.95, "0.5": 0.8, "0.75": 0.55})
    assert set(tuning["methods"]["uno"]["trials"].values()) == {"done"}
    assert set(tuning["methods"]["uno"]["tasks"]["0.5"]) == set(tiny.NAMES)


def test_tuning_goes_on_where_it_stopped(call, tuned, tmp_path):
    (tuned / "fail-uno-rate0.5").touch()
    text = call(code=1).out
    assert begun(tuned) == [*TRIALS, "heads-seed0", "heads-seed1"]
    assert "2 of 4 runs are in" in text
    tuning = json.loads((tmp_path / "out" / "tuning.json").read_text())["methods"]["uno"]
    assert (tuning["chosen"], tuning["trials"]["uno-rate0.5"]) == (None, "not trained")
    (tuned / "fail-uno-rate0.5").unlink()
    shutil.rmtree(tmp_path / "work" / "heads-seed1")
    call()
    assert begun(tuned) == ["uno-rate0.5", "uno-seed0", "heads-seed1", "uno-seed1"]
    call()
    assert not (tuned / "calls").exists()


def test_a_rate_that_diverges_is_a_trial_too(call, tuned, tmp_path):
    (tuned / "diverge-uno-rate0.25").touch()
    assert "uno-rate0.25: diverged in 0 min" in call().out
    assert begun(tuned) == TRIALS + FINAL
    tuning = json.loads((tmp_path / "out" / "tuning.json").read_text())["methods"]["uno"]
    assert (tuning["chosen"], tuning["validation"]["0.25"]) == (0.5, None)
    assert tuning["trials"]["uno-rate0.25"] == "diverged"
    call()
    assert not (tuned / "calls").exists()


def test_a_part_of_a_suite(call, tuned, tmp_path):
    text = call("--methods", "uno", "--tune-only").out
    assert begun(tuned) == TRIALS[3:]
    assert "0 of 4 runs are in" in text
    assert not (tmp_path / "out" / "table.md").exists()
    call("--methods", "uno")
    assert begun(tuned) == ["uno-seed0", "uno-seed1"]
    call()
    assert begun(tuned) == [*TRIALS[:3], "heads-seed0", "heads-seed1"]
    assert "unknown method of the suite 'un'; did you mean 'uno'" in call("--methods", "un", code=2).err


def test_tuning_needs_a_section(call, suite, program):
    assert f"{suite} has no section `tune`" in call("--tune-only", code=2).err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (3, "`tune` must be a mapping of seed, learning_rates, of, got 3"),
        ({"learning_rate": [1]}, "unknown key of `tune` 'learning_rate'; did you mean 'learning_rates'"),
        ({"of": {"un": [1]}}, "unknown method in `tune` 'un'; did you mean 'uno'"),
        ({"seed": 1}, "`tune` needs a list of different learning rates for 'heads', got None"),
        ({"learning_rates": [0.1, 0.1]}, "`tune` needs a list of different learning rates for 'heads', got [0.1, 0.1]"),
        ({"learning_rates": ["x"]}, "a learning rate of 'heads' must be a number, got 'x'"),
        ({"learning_rates": [-1.0]}, "method 'heads': `training.learning_rate` must be a number above 0, got -1.0"),
        (
            {"learning_rates": [0.1, 0.2], "of": {"uno": [0.1]}},
            "`tune` tries 2 learning rates of 'heads' and 1 of 'uno'; give every method as many",
        ),
    ],
)
def test_bad_tuning(call, suite, program, tmp_path, change, message):
    found = yaml.safe_load(suite.read_text())
    suite.write_text(yaml.safe_dump({**found, "tune": change}))
    err = call(code=2).err
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "work").exists()


def test_a_suite_about_validation(tmp_path):
    suite = reproduce.read_suite(
        write_suite(tmp_path / "suite.yaml", training={"test": False}), tmp_path / "work", tiny.data()
    )
    assert suite.split == "validation"
    assert reproduce.read_suite(write_suite(tmp_path / "suite.yaml"), tmp_path / "work", tiny.data()).split == "test"


@pytest.mark.slow
def test_rates_are_chosen_by_the_real_program(tmp_path):
    methods = {"uno": {"method": "unolora"}}
    tune = {"learning_rates": [1e-6, 1e-2]}
    steps = {"steps": 30, "evaluate_every": 30, "checkpoint_every": 30}
    suite = write_suite(tmp_path / "suite.yaml", methods, (3,), tune, training={**steps, "test": True})
    places = [suite, tmp_path / "out", "--work", tmp_path / "work", "--data-root", tiny.data(), "--jobs", "2"]
    assert reproduce.main([str(place) for place in places]) == 0
    tuning = json.loads((tmp_path / "out" / "tuning.json").read_text())["methods"]["uno"]
    assert tuning["validation"]["0.01"] > tuning["validation"]["1e-06"]
    assert tuning["chosen"] == rate(tmp_path / "out" / "uno-seed3") == 0.01
    assert (
        "test"
        not in json.loads((tmp_path / "work" / "uno-rate0.01" / "results.json").read_text())["averages"][
            "mean_of_first_metrics"
        ]
    )
    assert not (tmp_path / "work" / "uno-rate0.01" / "predictions.json").exists()
    assert (tmp_path / "work" / "uno-seed3" / "predictions.json").exists()


# --- what is kept --------------------------------------------------------------------------------------------------


def test_what_is_kept_has_numbers_and_no_places(call, program, tmp_path):
    call()
    out = tmp_path / "out"
    names = {str(path.relative_to(out)) for path in files(out)}
    kept = ("config.yaml", "environment.json", "metrics.jsonl", "results.json")
    assert names == {
        "table.md",
        *(f"{method}-seed{seed}/{name}" for method in METHODS for seed in (0, 1) for name in kept),
    }
    backbone = Path(tiny.backbone())
    for path in files(out):
        assert str(tmp_path) not in path.read_text(), path
        assert str(backbone.parent) not in path.read_text(), path
        assert str(tiny.data()) not in path.read_text(), path
    for method, own in METHODS.items():
        folder, work = out / f"{method}-seed1", tmp_path / "work" / f"{method}-seed1"
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert (config["backbone"], config["output"], config["data"]["root"]) == (backbone.name, None, None)
        assert (config["method"], config["training"]["seed"]) == (own["method"], 1)
        settings.from_dict(config)
        assert json.loads((folder / "results.json").read_text()) == (
            json.loads((work / "results.json").read_text()) | {"backbone": backbone.name}
        )
        versions = json.loads((folder / "environment.json").read_text())
        assert set(versions) == {"unolora", "torch", "transformers", "peft", "python"}
        assert (folder / "metrics.jsonl").read_bytes() == (work / "metrics.jsonl").read_bytes()


def test_the_table_is_that_of_compare(call, program, tmp_path):
    call()
    folders = [tmp_path / "out" / f"{method}-seed{seed}" for method in METHODS for seed in (0, 1)]
    table, notes = compare.compare(folders, metrics="first")
    text = (tmp_path / "out" / "table.md").read_text()
    assert text == compare.as_markdown(table, notes)
    assert re.findall(r"^\| (heads|uno) .*\| 0, 1 \|$", text, re.M) == ["heads", "uno"]


def test_a_suite_may_compare_numbers_of_steps(call, program, suite, tmp_path):
    write_suite(suite, METHODS | {"half": {"training": {"steps": 6}}})
    call()
    folders = [tmp_path / "out" / f"{method}-seed0" for method in ("heads", "half")]
    with pytest.raises(InputError, match="differ in steps"):
        compare.compare(folders)
    text = (tmp_path / "out" / "table.md").read_text()
    assert re.findall(r"^\| (half|heads|uno) ", text, re.M) == ["heads", "uno", "half"]


def test_gathering_again_changes_nothing(call, program, tmp_path):
    call()
    before = {path: path.read_bytes() for path in files(tmp_path / "out")}
    (program / "calls").unlink()
    shutil.rmtree(tmp_path / "work" / "uno-seed1")
    text = call("--collect").out
    assert "3 of 4 runs are in" in text
    assert not (program / "calls").exists()
    assert before == {path: path.read_bytes() for path in files(tmp_path / "out")}


def test_a_suite_goes_on_from_what_was_gathered_elsewhere(call, tuned, suite, tmp_path):
    (tuned / "diverge-uno-rate0.25").touch()
    call("--tune-only")
    call("--methods", "heads")
    out, work = tmp_path / "out", tmp_path / "work"
    kept = {path: path.read_bytes() for path in files(out)}
    assert begun(tuned) == [*TRIALS, "heads-seed0", "heads-seed1"]
    assert (out / "trials" / "uno-rate0.25" / "not-finite.json").read_text() == "[]\n"

    shutil.rmtree(work)
    shutil.copytree(out, tmp_path / "kept")
    (out / "heads-seed1" / "results.json").unlink()  # gathering was cut off there
    call("--restore", "--methods", "heads")
    assert begun(tuned) == ["heads-seed1"]
    shutil.rmtree(work)
    shutil.rmtree(out)
    shutil.copytree(tmp_path / "kept", out)
    call("--restore", "--collect")
    assert not (tuned / "calls").exists()
    assert {path: path.read_bytes() for path in files(out)} == kept
    call("--restore")
    assert begun(tuned) == ["uno-seed0", "uno-seed1"]
    again = {path: path.read_bytes() for path in files(out)}
    assert {path: again[path] for path in kept if path.name != "table.md"} == (
        {path: data for path, data in kept.items() if path.name != "table.md"}
    )

    shutil.rmtree(work)
    found = yaml.safe_load(suite.read_text())
    found["methods"]["uno"]["adapter"]["r"] = 2
    suite.write_text(yaml.safe_dump(found, sort_keys=False))
    assert "uno-rate0.25 was trained with other settings (adapter.r)" in call("--restore", code=2).err


def test_without_being_told_to_a_suite_does_not_believe_what_was_gathered(call, program, tmp_path):
    call()
    (program / "calls").unlink()
    shutil.rmtree(tmp_path / "work")
    call()
    assert {run for run, _, _ in calls(program)} == {f"{method}-seed{seed}" for method in METHODS for seed in (0, 1)}


def test_gathering_nothing(call):
    assert "none of the suite's runs is finished; train them without --collect" in call("--collect", code=2).err


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": {}}, "unknown key of a suite 'method'; did you mean 'methods'"),
        ({"seeds": []}, "`seeds` must be a list of different numbers, got []"),
        ({"seeds": [1, 1]}, "`seeds` must be a list of different numbers, got [1, 1]"),
        ({"seeds": 3}, "`seeds` must be a list of different numbers, got 3"),
        ({"seeds": ["x"]}, "method 'heads': `training.seed` must be of type int, got 'x'"),
        ({"methods": {}}, "`methods` must be a mapping with something in it, got {}"),
        ({"methods": None}, "`methods` must be a mapping with something in it, got None"),
        ({"methods": {"a/b": {}}}, "method 'a/b' names folders: letters, digits and _.+- only"),
        ({"methods": {"a": {"method": "lora-shard"}}}, "method 'a': unknown method 'lora-shard'; did you mean"),
        ({"methods": {"a": {"adapter": {"rank": 4}}}}, "method 'a': unknown setting 'adapter.rank'"),
        ({"methods": {"a": {"training": 4}}}, "method 'a': `training` must be a mapping of names to values, got 4"),
        ({"methods": {"a": 4}}, "method 'a': expected a mapping of settings, got 4"),
        ({"methods": {"a": {"training": {"seed": 4}}}}, "method 'a': `training.seed` is not a suite's to say"),
        ({"methods": {"a": {"output": "x"}}}, "method 'a': `output` is not a suite's to say"),
        ({"methods": {"a": {"data": {"root": "x"}}}}, "method 'a': `data.root` is not a suite's to say"),
        ({"methods": {"a": {"baselines": ["full"]}}}, "method 'a': `baselines` is not a suite's to say"),
        ({"settings": None}, "`settings` must be a mapping with something in it, got None"),
    ],
)
def test_bad_suites(call, suite, program, tmp_path, change, message):
    found = yaml.safe_load(suite.read_text())
    suite.write_text(yaml.safe_dump({**found, **change}))
    err = call(code=2).err
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "work").exists()


def test_a_method_without_settings_of_its_own(tmp_path):
    path = write_suite(tmp_path / "suite.yaml", methods={"plain": None}, seeds=(3,))
    (run,) = reproduce.read_suite(path, tmp_path / "work").runs
    assert (run.name, run.settings.method, run.settings.data.root) == ("plain-seed3", "unolora", str(tmp_path))


def test_bad_arguments(call, tmp_path):
    assert call("--jobs", "0", code=2).err == "error: --jobs must be at least 1, got 0\n"
    assert call("--data-root", tmp_path / "no", code=2).err == f"error: --data-root {tmp_path}/no: no such folder\n"


@pytest.mark.parametrize("flags", [[], ["--collect"]])
def test_runs_of_other_settings_are_not_taken_for_the_suite_s(call, program, suite, flags):
    call()
    found = yaml.safe_load(suite.read_text())
    found["methods"]["uno"]["adapter"]["r"] = 2
    found["settings"]["training"]["steps"] = 13
    suite.write_text(yaml.safe_dump(found, sort_keys=False))
    err = call(*flags, code=2).err
    assert re.search(r"heads-seed0 was trained with other settings \(training\.steps\); delete it, or choose", err)


SUITES = [path for path in (ROOT / "configs").glob("*.yaml") if "methods" in yaml.safe_load(path.read_text())]


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_the_suites_that_come_along(path, tmp_path):
    suite = reproduce.read_suite(path, tmp_path)
    found = [*suite.runs, *(trial for trials in suite.trials.values() for trial in trials)]
    assert len({run.name for run in found}) == len(found) > 1


# --- the real program ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_stopped_suite_ends_as_if_it_had_not_stopped(tmp_path):
    """Ctrl-C in the first two runs, and the same command again."""
    steps = {"steps": 60, "evaluate_every": 30, "checkpoint_every": 30}
    suite = write_suite(tmp_path / "suite.yaml", seeds=(0,), training=steps)
    work, out = tmp_path / "work", tmp_path / "out"
    places = [suite, out, "--work", work, "--data-root", tiny.data(), "--jobs", "2"]
    command = [sys.executable, ROOT / "scripts" / "reproduce.py", *places]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen([str(c) for c in command], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as it:
        try:
            logs = [work / f"{method}-seed0" / "metrics.jsonl" for method in METHODS]
            end = time.monotonic() + 120
            while not all(log.exists() for log in logs):
                assert time.monotonic() < end, "waited in vain"
                assert it.poll() is None, it.communicate()
                time.sleep(0.01)
            it.send_signal(signal.SIGINT)
            stdout, stderr = it.communicate(timeout=120)
        finally:
            it.kill()
    assert it.returncode == 130, stderr
    assert stderr.decode() == "stopped; the same command goes on\n"
    steps = [int(step) for step in re.findall(r"stopped at step (\d+)", stdout.decode())]
    assert steps, stdout
    assert all(0 < step < 60 for step in steps)
    finished = [path for path in files(work) if path.name == "results.json"]
    assert len(finished) == 2 - len(steps)

    assert reproduce.main([str(place) for place in places]) == 0
    for run in reproduce.read_suite(suite, work, tiny.data()).runs:
        own = runs.read_settings(run.folder)
        whole = training.train(dataclasses.replace(own, output=str(tmp_path / "whole" / run.name)))
        assert tiny.parts(run.folder) == tiny.parts(whole)
    assert "frozen backbone, heads only" in (out / "table.md").read_text()
