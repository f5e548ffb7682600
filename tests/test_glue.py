"""GLUE: the table of its tasks, the paper's splits of it, and its files.

Everything is shown on small made-up files in the layout of the real ones. Where the real ones lie in
`shared/data/glue` beside the checkout, the same holds for them, and their splits are pinned.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from unolora.errors import InputError
from unolora.settings import Data, Settings
from unolora.tasks import TASKS, Source, Task, resolve
from unolora.tasks.glue import GLUE
from unolora.tasks.glue import TASKS as NINE
from unolora.tasks.rows import load, order
from unolora.training import load_data

REAL = Path(__file__).parents[2] / "shared" / "data" / "glue"
FOLDERS = {
    "cola": "CoLA", "sst2": "SST-2", "mrpc": "MRPC", "qqp": "QQP", "stsb": "STS-B", "mnli": "MNLI", "qnli": "QNLI",
    "rte": "RTE", "wnli": "WNLI",
}  # fmt: skip
LARGE = ("sst2", "qqp", "mnli", "qnli")  # 10,000 training rows and more


def held(name):
    """The split of the hub that the held-out rows come from."""
    return "validation_matched" if name == "mnli" else "validation"


def read(root, name, split):
    text = (root / FOLDERS[name] / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def made_up(name, split, count):
    """Rows in the columns of the hub; those of another split end in another word."""
    task = NINE[name]
    rows = []
    for n in range(count):
        label = n % len(task.labels) if task.labels else n % 26 / 5
        rows.append({**{c: f"{c} {n} of {split}" for c in task.columns}, "label": label, "idx": n})
    return rows


def write(root, name, split, rows):
    folder = root / FOLDERS[name]
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Made-up files: 60 training rows and 21 held-out ones, 3 of which are training rows again."""
    root = tmp_path_factory.mktemp("glue")
    for name in NINE:
        train, other = made_up(name, "train", 60), made_up(name, "held", 21)
        for place in (2, 9, 20):
            other[place] = {**train[3 * place - 1], "idx": place}
        write(root, name, "train", train)
        write(root, name, held(name), other)
    return root


@pytest.fixture(params=["made up", "real"])
def root(request):
    if request.param == "made up":
        return request.getfixturevalue("small")
    if not REAL.is_dir():
        pytest.skip("the real GLUE files are not in shared/data/glue beside the checkout")
    return REAL


def load_texts(root, name, split):
    columns = NINE[name].columns
    return [tuple(row[column] for column in columns) for row in read(root, name, split)]


def texts(data):
    return {split: set(rows.texts) for split, rows in data.splits.items()}


# The table ------------------------------------------------------------------------------------------------------------


def test_glue_is_the_eight_tasks_of_the_paper():
    assert list(NINE) == list(FOLDERS)
    assert GLUE == ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte")
    assert [task.name for task in resolve(["glue"])] == list(GLUE)
    assert all(TASKS[name] is NINE[name] for name in NINE)


@pytest.mark.parametrize(
    ("name", "labels", "metrics", "prompt"),
    [
        ("cola", "unacceptable acceptable", "matthews", "cola sentence: {sentence}"),
        ("sst2", "negative positive", "accuracy", "sst2 sentence: {sentence}"),
        ("mrpc", "not_equivalent equivalent", "accuracy f1", "mrpc sentence1: {sentence1} sentence2: {sentence2}"),
        ("qqp", "not_duplicate duplicate", "accuracy f1", "qqp question1: {question1} question2: {question2}"),
        ("stsb", "", "pearson spearman", "stsb sentence1: {sentence1} sentence2: {sentence2}"),
        (
            "mnli",
            "entailment neutral contradiction",
            "accuracy",
            "mnli hypothesis: {hypothesis} premise: {premise}",
        ),
        ("qnli", "entailment not_entailment", "accuracy", "qnli question: {question} sentence: {sentence}"),
        ("rte", "entailment not_entailment", "accuracy", "rte sentence1: {sentence1} sentence2: {sentence2}"),
        ("wnli", "not_entailment entailment", "accuracy", "wnli sentence1: {sentence1} sentence2: {sentence2}"),
    ],
)
def test_labels_metrics_and_prompts(name, labels, metrics, prompt):
    task = NINE[name]
    assert task.labels == tuple(labels.split())
    assert task.metrics == tuple(metrics.split())
    assert task.as_text().template == (prompt,)
    assert task.text_step == (0.2 if name == "stsb" else None)
    assert task.source == Source(
        test=held(name),
        hub="nyu-mll/glue",
        subset=name,
        folder=FOLDERS[name],
        validation_from="train" if name in LARGE else "test",
    )


@pytest.mark.parametrize("name", NINE)
def test_a_task_survives_its_file(name):
    for task in (NINE[name], NINE[name].as_text()):
        assert Task.from_dict(json.loads(json.dumps(dataclasses.asdict(task)))) == task


# Rows and splits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NINE)
def test_rows_are_those_of_the_files(root, name):
    task, data = NINE[name], load(NINE[name], root=root)
    rows = read(root, name, "train") + read(root, name, held(name))
    known = {(*(str(row[column]) for column in task.columns), float(row["label"])) for row in rows}
    for split in data.splits.values():
        assert {(*text, float(target)) for text, target in zip(split.texts, split.targets, strict=True)} <= known
        assert split.targets.dtype == (np.float64 if name == "stsb" else np.int64)
    assert len(np.unique(data.splits["train"].targets)) == len(task.labels) or name == "stsb"
    prompts = load(task.as_text(), root=root)
    assert all(text[0].startswith(f"{name} ") for text in prompts.splits["test"].texts)
    assert {split: len(rows) for split, rows in prompts.splits.items()} == {
        split: len(rows) for split, rows in data.splits.items()
    }


@pytest.mark.parametrize("name", NINE)
def test_the_splits_are_the_papers(root, name):
    data = load(NINE[name], root=root)
    train, other = len(read(root, name, "train")), len(read(root, name, held(name)))
    sizes = {split: len(rows) for split, rows in data.splits.items()}
    if name in LARGE:
        assert sizes["test"] == other
        repeated = texts(data)["test"]
        left = sum(text not in repeated for text in load_texts(root, name, "train"))
        assert sizes["validation"] == min(1000, left // 10)
        assert sizes["train"] + sizes["validation"] + data.dropped == train
    else:
        assert sizes["validation"] + sizes["test"] == other
        assert abs(sizes["validation"] - sizes["test"]) <= 1
        assert sizes["train"] + data.dropped == train


@pytest.mark.parametrize("name", NINE)
def test_no_validation_row_is_trained_on_as_in_the_public_code_of_hyperformer(root, name):
    data = load(NINE[name], root=root)
    found = texts(data)
    assert all(found.values())
    assert not found["train"] & (found["validation"] | found["test"])
    assert not found["validation"] & found["test"]
    if root != REAL:  # the premise: the files do repeat rows, and only those are dropped
        assert len(set(load_texts(root, name, "train")) & set(load_texts(root, name, held(name)))) == 3
        assert data.dropped == 3


@pytest.mark.parametrize("name", NINE)
def test_neither_seed_nor_wording_moves_a_row(small, name):
    first = load(NINE[name], root=small)
    again = load(NINE[name], root=small, seed=7)
    assert all(first.splits[split].texts == again.splits[split].texts for split in first.splits)
    prompts = load(NINE[name].as_text(), root=small)
    assert all(np.array_equal(first.splits[s].targets, prompts.splits[s].targets) for s in first.splits)


def test_limits_are_taken_from_the_splits(small):
    for name in NINE:
        whole, some = load(NINE[name], root=small), load(NINE[name], root=small, limit=4)
        for split, rows in some.splits.items():
            assert len(rows) == 4
            assert set(rows.texts) <= set(whole.splits[split].texts)


def test_the_splits_are_the_same_on_every_machine(small):
    assert order(20, "cola", "validation")[:6].tolist() == COLA_ORDER
    assert [int(text.split()[1]) for (text,) in load(NINE["cola"], root=small).splits["validation"].texts] == COLA
    assert [int(text[0].split()[1]) for text in load(NINE["qqp"], root=small).splits["validation"].texts] == QQP


COLA_ORDER = [10, 0, 5, 6, 17, 11]
COLA = [0, 5, 4, 5, 6, 10, 11, 17, 19, 59]
QQP = [3, 27, 28, 32, 56]

# Of each task: the rows of train, validation and test, the training rows dropped, and a hash of the splits.
PINNED = {
    "cola": (8535, 522, 521, 16, "e7ac9faeefc1a1c2"),
    "sst2": (66338, 1000, 872, 11, "5af86d4a2caa0a53"),
    "mrpc": (3668, 204, 204, 0, "6860d466d32f4fa5"),
    "qqp": (8100, 899, 1000, 0, "2d58acbae215865f"),
    "stsb": (5743, 750, 750, 6, "3a946958475a1215"),
    "mnli": (8100, 899, 1000, 0, "e9cff8cb17230bf5"),
    "qnli": (18476, 1000, 5463, 0, "eab419953c3340ec"),
    "rte": (2490, 138, 139, 0, "e4f341533cede58b"),
    "wnli": (635, 35, 36, 0, "e50b132637e1be1f"),
}


@pytest.mark.parametrize("name", NINE)
def test_the_splits_of_the_real_files_are_pinned(name):
    if not REAL.is_dir():
        pytest.skip("the real GLUE files are not in shared/data/glue beside the checkout")
    data = load(NINE[name], root=REAL)
    digest = hashlib.sha256()
    for split, rows in data.splits.items():
        for text, target in zip(rows.texts, rows.targets.tolist(), strict=True):
            digest.update(json.dumps([split, *text, target]).encode())
    assert (*map(len, data.splits.values()), data.dropped, digest.hexdigest()[:16]) == PINNED[name]


def test_the_mismatched_rows_of_mnli_come_only_when_asked_for(small, tmp_path):
    mnli = NINE["mnli"]
    write(tmp_path, "mnli", "train", made_up("mnli", "train", 60))
    write(tmp_path, "mnli", "validation_matched", made_up("mnli", "matched", 12))
    write(tmp_path, "mnli", "validation_mismatched", made_up("mnli", "mismatched", 15))
    source = dataclasses.replace(mnli.source, test="validation_mismatched")
    other = dataclasses.replace(mnli, name="mnli_mismatched", source=source)
    for task, ending in ((mnli, " of matched"), (other, " of mismatched")):
        splits = load(task, root=tmp_path).splits
        assert all(text.endswith(ending) for pair in splits["test"].texts for text in pair)
        rest = [text for split in ("train", "validation") for pair in splits[split].texts for text in pair]
        assert all(text.endswith(" of train") for text in rest)


# Files and errors -----------------------------------------------------------------------------------------------------


def test_a_run_finds_the_folder_that_data_root_names(small, monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    data = load_data(Settings(tasks=["glue", "wnli"], data=Data(root=str(small), limit=5)))
    assert [each.task.name for each in data] == list(NINE)
    assert all(len(rows) == 5 for each in data for rows in each.splits.values())
    with pytest.raises(
        InputError, match=r"task 'cola': hub data set nyu-mll/glue \(cola\), split 'train' cannot be read"
    ):
        load_data(Settings(tasks=["glue"]), tmp_path)


def test_the_hub_gives_what_the_folder_does_not(monkeypatch, tmp_path):
    import datasets

    asked = []

    def fake(hub, subset, *, split):
        asked.append((hub, subset, split))
        return datasets.Dataset.from_list(made_up(subset, split, 40))

    monkeypatch.setattr(datasets, "load_dataset", fake)
    for task in NINE.values():
        assert all(len(rows) for rows in load(task, root=tmp_path).splits.values())
    assert asked == [("nyu-mll/glue", name, split) for name in NINE for split in ("train", held(name))]


def test_a_hub_out_of_reach_says_how_to_do_without(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    match = r"save this split as JSON lines in DIR/STS-B/train\.jsonl and set `--data\.root DIR`$"
    with pytest.raises(InputError, match=match) as caught:
        load(NINE["stsb"], root=tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_that_lacks_a_split(tmp_path):
    for split in ("train", "validation"):
        write(tmp_path, "mnli", split, made_up("mnli", split, 30))
    match = r"MNLI lacks validation_matched\.jsonl \(it holds train\.jsonl, validation\.jsonl\)"
    with pytest.raises(InputError, match=match):
        load(NINE["mnli"], root=tmp_path)


@pytest.mark.parametrize(("name", "label"), [("cola", -1), ("mnli", 3), ("rte", "entailed"), ("stsb", "high")])
def test_labels_that_the_table_does_not_know(tmp_path, name, label):
    """-1 is what the hub has in place of the labels of its test splits."""
    rows = made_up(name, "held", 20)
    write(tmp_path, name, "train", made_up(name, "train", 30))
    write(tmp_path, name, held(name), rows)
    assert len(load(NINE[name], root=tmp_path).splits["test"]) > 0
    write(tmp_path, name, held(name), [*rows, {**rows[0], "label": label}])
    match = (
        r"row 21, column 'label' must hold a finite number" if name == "stsb" else f"row 21: unknown label '{label}'"
    )
    with pytest.raises(InputError, match=match):
        load(NINE[name], root=tmp_path)
