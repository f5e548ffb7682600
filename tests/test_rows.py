"""Rows from files and the hub: what arrives, what is refused, and who goes to which split."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
import yaml
from hypothesis import given, reject
from hypothesis import strategies as st

from unolora import tasks
from unolora.errors import InputError
from unolora.tasks import Source, Task, quickstart
from unolora.tasks.files import Table, read_file, read_hub
from unolora.tasks.rows import Rows, _held_out, cut, fill, load, order, targets

GOLDEN = [5, 8, 6, 9, 0, 2, 4, 1, 7, 3]
WORDS = [{"text": f"message {n}", "label": ("ham", "spam", "ham")[n % 3], "score": n / 2} for n in range(40)]


def write(path, rows):
    """Write dictionaries in the format of the ending."""
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        pd.DataFrame(rows).to_csv(path, index=False, sep="," if path.suffix == ".csv" else "\t")
    return path


def task_of(path, kind="classification", **changes):
    source = changes.pop("source", Source(train=str(path)))
    target = "label" if kind == "classification" else "score"
    return Task(
        **{"name": "mail", "kind": kind, "template": ("{text}",), "target": target, "source": source, **changes}
    )


def refused(match, call, *arguments, **options):
    with pytest.raises(InputError, match=match) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".tsv", ".parquet", ".CSV"])
def test_every_format_brings_the_same_rows(tmp_path, ending):
    data = load(task_of(write(tmp_path / f"mail{ending.lower()}", WORDS).rename(tmp_path / f"mail{ending}")))
    assert data.task.labels == ("ham", "spam")
    assert {name: len(rows) for name, rows in data.splits.items()} == {"train": 32, "validation": 4, "test": 4}
    seen = {
        text: int(target)
        for rows in data.splits.values()
        for (text,), target in zip(rows.texts, rows.targets, strict=True)
    }
    assert seen == {row["text"]: ["ham", "spam"].index(row["label"]) for row in WORDS}
    assert data.splits["train"].targets.dtype == np.int64
    numbers = load(task_of(tmp_path / f"mail{ending}", "regression"))
    assert numbers.splits["train"].targets.dtype == np.float64
    assert sorted(np.concatenate([rows.targets for rows in numbers.splits.values()])) == [n / 2 for n in range(40)]


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_text_stays_text(tmp_path, ending):
    texts = [
        "007",
        "",
        "NA",
        "null",
        "nan",
        "1e5",
        "True",
        " spaced ",
        'say "hi", twice',
        "two\nlines",
        "\u2028",
        "żółw 🐢",
    ]
    table = read_file(write(tmp_path / f"a{ending}", [{"text": text, "n": 1} for text in texts]))
    assert table.columns["text"] == texts


def test_a_tab_separated_quote_is_a_quote(tmp_path):
    (tmp_path / "a.tsv").write_text('text\tlabel\n"open\t1\nclose"\t0\n', encoding="utf-8")
    assert read_file(tmp_path / "a.tsv").columns == {"text": ['"open', 'close"'], "label": ["1", "0"]}


def test_csv_from_spreadsheets(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext,label\r\n\r\nhello,1\r\n" + b"x" * 200_000 + b",0\r\n")
    table = read_file(tmp_path / "a.csv")
    assert table.columns["label"] == ["1", "0"]
    assert len(table.columns["text"][1]) == 200_000


def test_whole_numbers_beside_gaps_stay_whole(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"a": [2**53 + 1, None], "b": ["x", None]}), tmp_path / "a.parquet")
    assert read_file(tmp_path / "a.parquet").columns == {"a": [2**53 + 1, None], "b": ["x", None]}


def test_json_rows_may_leave_out_keys(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"b": 2}\n', encoding="utf-8")
    assert read_file(tmp_path / "a.jsonl").columns == {"a": [1, None], "b": [None, 2]}


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a\.jsonl: line 2 is not JSON \(Expecting value\)"),
        ("a.jsonl", b'{"a": 1}\n\n[1]\n', r"a\.jsonl: line 3 must be one JSON object"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}", r"line 1 is not JSON \(Exceeds the limit"),
        ("a.jsonl", b'{"a": "\xff"}', r"a\.jsonl is not UTF-8 text \(byte 7\)"),
        ("a.csv", "a,b\ncaf\u00e9,1\n".encode("latin-1"), r"a\.csv is not UTF-8 text \(byte 7\); save it as UTF-8"),
        ("a.csv", "a,b\n".encode("utf-16"), r"is not UTF-8 text \(byte 0\)"),
        ("a.csv", b"a,b\n1,2\n3\n", r"a\.csv: line 3 has 1 fields, the first row has 2"),
        ("a.csv", b"a,b\n1,2,\n", r"line 2 has 3 fields, the first row has 2"),
        ("a.csv", b'a,b\n1,2\n"3,4\n5,6\n', r"a\.csv: malformed at line 4 \(unexpected end of data\)"),
        ("a.csv", b'a,b\n"1" x,2\n', r"malformed at line 2 \(',' expected after '\"'\)"),
        ("a.csv", b"a,b,a\n1,2,3\n", r"column 'a' is named twice in the first row"),
        ("a.csv", b"", r"a\.csv is empty"),
        ("a.jsonl", b" \n\n", r"a\.jsonl is empty"),
        ("a.parquet", b"", r"a\.parquet is empty"),
        ("a.parquet", b"PAR1 but no more", r"a\.parquet is not a readable parquet file"),
        ("a.json", b"[]", r"files end in \.jsonl, \.csv, \.tsv or \.parquet, not '\.json'"),
        ("a", b"a,b\n", r"files end in .*, not 'nothing'"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    message = refused(match, read_file, tmp_path / name)
    assert str(tmp_path / name) in message


def test_missing_files(tmp_path):
    write(tmp_path / "tickets.csv", WORDS)
    refused(r"ticket\.csv does not exist; did you mean 'tickets\.csv'", read_file, tmp_path / "ticket.csv")
    assert "did you mean" not in refused("does not exist", read_file, tmp_path / "zebra.csv")
    refused("does not exist, nor does its folder", read_file, tmp_path / "no" / "tickets.csv")
    (tmp_path / "folder.csv").mkdir()
    refused(r"folder\.csv cannot be read \(Is a directory\)", read_file, tmp_path / "folder.csv")


# The hub --------------------------------------------------------------------------------------------------------------


def test_hub_rows(monkeypatch):
    import datasets

    asked = []

    def fake(hub, subset, *, split):
        asked.append((hub, subset, split))
        return datasets.Dataset.from_list(WORDS)

    monkeypatch.setattr(datasets, "load_dataset", fake)
    data = load(task_of(None, source=Source(hub="some/mail", subset="en", validation="dev")))
    assert asked == [("some/mail", "en", "train"), ("some/mail", "en", "dev")]
    assert {name: len(rows) for name, rows in data.splits.items()} == {"train": 36, "validation": 40, "test": 4}


def test_a_hub_out_of_reach(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    refused(
        r"hub data set some/mail \(en\), split 'train' cannot be read \(.*\); check the names and the connection",
        read_hub,
        "some/mail",
        "en",
        "train",
    )


def test_a_hub_error_of_many_lines_becomes_one(monkeypatch):
    import datasets

    def fail(*_, **__):
        raise ValueError("BuilderConfig 'sst' not found.\nAvailable:\n['sst2']" + " and more" * 100)

    monkeypatch.setattr(datasets, "load_dataset", fail)
    message = refused(r"\(BuilderConfig 'sst' not found\. Available: \['sst2'\]", read_hub, "a/b", "sst", "train")
    assert len(message) < 450


# Templates and targets ------------------------------------------------------------------------------------------------


def test_templates_are_filled():
    table = Table("t", {"a.b": ["x", ""], "n": [1, 2.0], "flag": [True, False]})
    task = Task("t", "regression", ("{{{a.b}}} of {n}", "{flag}"), "score")
    assert fill(task, table) == [("{x} of 1", "true"), ("{} of 2", "false")]


def test_filling_runs_nothing():
    table = Table("t", {"text": ["{label.__class__}"], "text.__class__": ["plain"]})
    assert fill(Task("t", "regression", ("{text} {text.__class__}",), "score"), table) == [("{label.__class__} plain",)]


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (None, "mail: row 2 has no value in column 'text'"),
        (float("nan"), "mail: row 2 has no value in column 'text'"),
        ([1], "mail: row 2, column 'text' must hold text or a number, not list"),
        (b"x", "mail: row 2, column 'text' must hold text or a number, not bytes"),
        (np.zeros(2), "mail: row 2, column 'text' must hold text or a number, not ndarray"),
    ],
)
def test_values_that_fill_no_template(value, match):
    refused(match, fill, task_of(None), Table("mail", {"text": ["fine", value]}))


def test_columns_that_are_not_there(tmp_path):
    path = write(tmp_path / "mail.csv", WORDS)
    refused(
        r"task 'mail': .*mail\.csv: unknown column 'txt'; did you mean 'text'\? \(known: text, label, score\)",
        load,
        task_of(path, template=("{txt}",)),
    )
    refused(r"mail\.csv: unknown column 'lable'; did you mean 'label'", load, task_of(path, target="lable"))


@pytest.mark.parametrize(
    ("labels", "values", "expected"),
    [
        (("no", "yes"), [0, 1, 1], [0, 1, 1]),  # whole numbers are ids, as in GLUE
        (("no", "yes"), ["0", "1", "1"], [0, 1, 1]),  # and csv writes them as texts
        (("no", "yes"), [0.0, 1.0, 1.0], [0, 1, 1]),  # a column that once had gaps
        (("no", "yes"), ["yes", "no", "yes"], [1, 0, 1]),
        (("1", "2"), [1, 2, 2], [0, 1, 1]),  # labels that are numbers are names
        (("1", "0"), ["0", "1", "1"], [1, 0, 0]),
        (("false", "true"), [True, False, True], [1, 0, 1]),
    ],
)
def test_labels_become_ids(labels, values, expected):
    assert targets(task_of(None, labels=labels), Table("t", {"label": values})).tolist() == expected


@pytest.mark.parametrize(
    ("labels", "value", "match"),
    [
        (("billing", "other"), "biling", r"mail: row 2: unknown label 'biling'; did you mean 'billing'\? \(known: bil"),
        (("no", "yes"), 2, r"mail: row 2: unknown label '2' \(known: no, yes\)"),
        (("no", "yes"), -1, "mail: row 2: unknown label '-1'"),
        (("1", "2"), 0, "mail: row 2: unknown label '0'"),
        (("no", "yes"), 0.5, "mail: row 2: unknown label '0.5'"),
        (("no", "yes"), "", "mail: row 2 has no label in column 'label'"),
        (("no", "yes"), None, "mail: row 2 has no value in column 'label'"),
        (("no", "yes"), float("nan"), "mail: row 2 has no value in column 'label'"),
    ],
)
def test_labels_that_nobody_knows(labels, value, match):
    refused(match, targets, task_of(None, labels=labels), Table("mail", {"label": [labels[0], value]}))


@pytest.mark.parametrize("value", [None, "", "good", "1,5", "12_3", float("nan"), "nan", "inf", True, [1], 10**400])
def test_targets_that_are_no_numbers(value):
    task = task_of(None, "regression")
    assert targets(task, Table("mail", {"score": [1, "2.5", " -3e1 "]})).tolist() == [1, 2.5, -30]
    refused(
        "mail: row 2, column 'score' must hold a finite number", targets, task, Table("mail", {"score": [1, value]})
    )


def test_derived_labels_are_sorted(tmp_path):
    rows = [{"text": "x", "label": n} for n in (10, 9, 2) * 5]
    assert load(task_of(write(tmp_path / "a.jsonl", rows))).task.labels == ("2", "9", "10")
    rows = [{"text": "x", "label": word} for word in ("b", "a", "10") * 5]
    assert load(task_of(write(tmp_path / "a.jsonl", rows))).task.labels == ("10", "a", "b")


def test_labels_are_those_of_the_training_rows(tmp_path):
    train = write(tmp_path / "train.jsonl", WORDS)
    test = write(tmp_path / "test.jsonl", [{"text": "x", "label": "span"}])
    refused(
        r"test\.jsonl: row 1: unknown label 'span'; did you mean 'spam'",
        load,
        task_of(None, source=Source(train=str(train), test=str(test))),
    )


def test_one_class_is_no_classification(tmp_path):
    same = write(tmp_path / "a.jsonl", [{"text": "x", "label": "ham"}] * 20)
    refused(r"a\.jsonl: every row has the label 'ham'", load, task_of(same))
    refused("every training row has the label 'ham'", load, task_of(same, labels=("ham", "spam")))


def test_tasks_without_rows(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n", encoding="utf-8")
    refused(r"task 'mail': .*a\.csv has no rows", load, task_of(tmp_path / "a.csv"))
    refused("task 'mail': its source names no rows", load, task_of(None, source=Source()))
    refused("unknown bundled table 'movie'; did you mean 'movies'", load, task_of(None, source=Source(bundled="movie")))


# Splits ---------------------------------------------------------------------------------------------------------------


def splits_of(data):
    return {name: [text for (text,) in rows.texts] for name, rows in data.splits.items()}


def test_files_are_found_from_the_root(tmp_path):
    write(tmp_path / "mail.jsonl", WORDS)
    assert load(task_of("mail.jsonl"), root=tmp_path).task.labels == ("ham", "spam")
    refused("does not exist", load, task_of("mail.jsonl"), root=tmp_path.parent)


def test_given_splits_are_left_alone(tmp_path):
    source = Source(*(str(write(tmp_path / f"{name}.jsonl", WORDS[:6])) for name in ("train", "validation", "test")))
    assert {tuple(texts) for texts in splits_of(load(task_of(None, source=source))).values()} == {
        tuple(row["text"] for row in WORDS[:6])
    }


@pytest.mark.parametrize("absent", ["validation", "test"])
def test_only_the_absent_split_is_cut(tmp_path, absent):
    given_name = {"validation": "test", "test": "validation"}[absent]
    train, other = write(tmp_path / "train.jsonl", WORDS), write(tmp_path / "other.jsonl", WORDS[:3])
    splits = splits_of(load(task_of(None, source=Source(**{"train": str(train), given_name: str(other)}))))
    assert {name: len(texts) for name, texts in splits.items()} == {"train": 36, absent: 4, given_name: 3}
    assert sorted(splits["train"] + splits[absent]) == sorted(row["text"] for row in WORDS)


def test_too_few_rows_to_cut(tmp_path):
    assert len(load(task_of(write(tmp_path / "ten.jsonl", WORDS[:10]))).splits["train"]) == 8
    refused(
        "task 'mail': 9 training rows are too few to cut validation and test rows from; give 10, or name",
        load,
        task_of(write(tmp_path / "nine.jsonl", WORDS[:9])),
    )


def test_the_cut_depends_on_name_and_seed(tmp_path):
    path = write(tmp_path / "mail.jsonl", WORDS)
    first = splits_of(load(task_of(path)))
    assert splits_of(load(task_of(path))) == first
    assert splits_of(load(task_of(path), seed=1)) != first
    assert splits_of(load(task_of(path, name="other"))) != first


def test_the_cut_ignores_what_the_rows_say(tmp_path):
    first = splits_of(load(task_of(write(tmp_path / "a.jsonl", WORDS))))
    loud = splits_of(
        load(task_of(write(tmp_path / "b.jsonl", [{**row, "text": row["text"].upper()} for row in WORDS])))
    )
    assert loud == {name: [text.upper() for text in texts] for name, texts in first.items()}


def test_limit_keeps_the_first_of_a_permutation(tmp_path):
    task = task_of(write(tmp_path / "mail.jsonl", WORDS))
    whole = splits_of(load(task))
    assert splits_of(load(task, limit=32)) == whole
    some, more = splits_of(load(task, limit=3)), splits_of(load(task, limit=20))
    assert {name: len(texts) for name, texts in some.items()} == {"train": 3, "validation": 3, "test": 3}
    for name in whole:
        assert set(some[name]) < set(more[name]) <= set(whole[name])
    assert some["train"] != whole["train"][:3]
    refused("task 'mail': limit must be at least 1, not 0", load, task, limit=0)


def test_the_order_is_the_same_on_every_machine():
    assert order(10, "tickets", 0).tolist() == GOLDEN
    assert order(10, "tickets", 1).tolist() != GOLDEN


@given(st.integers(0, 500), st.text(max_size=8), st.integers(0, 2**70))
def test_order_is_a_permutation(count, name, seed):
    assert sorted(order(count, name, seed)) == list(range(count))
    assert order(count, name, seed).tolist() == order(count, name, seed).tolist()


ABSENT = st.sampled_from([("validation", "test"), ("validation",), ("test",)])


@given(st.integers(10, 400), ABSENT, st.integers(0, 9))
def test_cut_covers_every_row_once(count, absent, seed):
    parts = cut(np.arange(count), absent, "name", seed)
    assert set(parts) == {*absent, "train"}
    assert sorted(np.concatenate(list(parts.values()))) == list(range(count))
    assert all(len(parts[name]) == count // 10 for name in absent)
    again = cut(np.arange(count), absent, "name", seed)
    assert all(np.array_equal(parts[name], again[name]) for name in parts)


@given(st.integers(0, 9), ABSENT)
def test_nothing_is_cut_from_fewer_than_ten_rows(count, absent):
    refused("too few to cut", cut, np.arange(count), absent, "name", 0)
    assert cut(np.arange(count), (), "name", 0)["train"].tolist() == list(range(count))


@given(st.lists(st.integers(0, 30), min_size=10, max_size=300), ABSENT, st.integers(0, 9))
def test_groups_stay_together(groups, absent, seed):
    groups = np.unique(groups, return_inverse=True)[1]
    parts = cut(groups, absent, "name", seed)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(len(groups)))
    held = [set(groups[rows]) for rows in parts.values()]
    assert sum(map(len, held)) == len(set(groups))
    # A split takes whole groups until it has its tenth: less than one group too many.
    largest = np.bincount(groups).max()
    assert all(len(parts[name]) < len(groups) // 10 + largest for name in absent)


# Validation rows out of the training or the test rows -----------------------------------------------------------------


def made_from(split, train, test):
    """The splits of texts (each with its place among all as target), and the number dropped."""
    task = task_of(None, "regression", source=Source(train="a", test="b", validation_from=split))
    places = np.arange(len(train) + len(test), dtype=float)
    splits, dropped = _held_out(
        task,
        Rows([(text,) for text in train], places[: len(train)]),
        Rows([(text,) for text in test], places[len(train) :]),
    )
    for rows in splits.values():
        assert [(train + test)[int(place)] for place in rows.targets] == [text for (text,) in rows.texts]
        assert sorted(rows.targets) == list(rows.targets)
    return {name: [int(place) for place in rows.targets] for name, rows in splits.items()}, dropped


def numbered(count, prefix=""):
    return [f"{prefix}{n}" for n in range(count)]


@pytest.mark.parametrize(("count", "expected"), [(10, 1), (99, 9), (9_999, 999), (10_000, 1000), (30_000, 1000)])
def test_a_thousand_training_rows_or_a_tenth(count, expected):
    splits, dropped = made_from("train", numbered(count), numbered(7, "test"))
    assert {name: len(rows) for name, rows in splits.items()} == {
        "train": count - expected,
        "validation": expected,
        "test": 7,
    }
    assert dropped == 0
    assert sorted(splits["train"] + splits["validation"]) == list(range(count))


@pytest.mark.parametrize("count", [2, 7, 1043])
def test_half_of_the_test_rows(count):
    splits, dropped = made_from("test", numbered(5, "train"), numbered(count))
    assert len(splits["validation"]) == count // 2
    assert sorted(splits["validation"] + splits["test"]) == list(range(5, 5 + count))
    assert (splits["train"], dropped) == (list(range(5)), 0)


TRAIN, TEST = (st.lists(st.sampled_from(numbered(n)), min_size=20, max_size=80) for n in (200, 60))


@given(st.sampled_from(["train", "test"]), TRAIN, TEST)
def test_no_text_is_in_two_splits_and_no_other_row_is_lost(split, train, test):
    try:
        places, dropped = made_from(split, train, test)
    except InputError:  # hardly a text differs
        reject()
    held = {name: {(train + test)[place] for place in found} for name, found in places.items()}
    assert not held["train"] & (held["validation"] | held["test"])
    assert not held["validation"] & held["test"]
    kept = {place for found in places.values() for place in found}
    assert sum(map(len, places.values())) == len(kept) == len(train) + len(test) - dropped
    lost = set(range(len(train) + len(test))) - kept
    assert all(place < len(train) and train[place] in held["validation"] | held["test"] for place in lost)


def test_sharing_one_side_of_a_pair_is_no_repeat(tmp_path):
    pairs = [{"a": f"{n}", "b": "same", "label": n % 2} for n in range(20)]
    train = write(tmp_path / "train.jsonl", pairs)
    test = write(tmp_path / "test.jsonl", [{"a": row["b"], "b": row["a"], "label": 1} for row in pairs] + pairs[:2])
    source = Source(train=str(train), test=str(test), validation_from="test")
    data = load(task_of(None, template=("{a}", "{b}"), source=source))
    assert data.dropped == 2
    assert {name: len(rows) for name, rows in data.splits.items()} == {"train": 18, "validation": 11, "test": 11}


def test_rows_made_of_others_depend_on_the_name_alone(tmp_path):
    train, test = (
        write(tmp_path / "train.jsonl", WORDS),
        write(tmp_path / "test.jsonl", [{**row, "text": row["text"] + "!"} for row in WORDS]),
    )
    for split in ("train", "test"):
        task = task_of(None, source=Source(train=str(train), test=str(test), validation_from=split))
        first = splits_of(load(task))
        assert splits_of(load(task, seed=1)) == first
        assert splits_of(load(task.as_text())) == {
            name: [f"mail text: {text}" for text in texts] for name, texts in first.items()
        }
        other = splits_of(load(task_of(None, name="other", source=task.source)))
        assert {name: sorted(texts) for name, texts in other.items()} != {
            name: sorted(texts) for name, texts in first.items()
        }


def test_the_rows_that_are_made_are_the_same_on_every_machine():
    assert made_from("train", numbered(30), numbered(1, "test"))[0]["validation"] == [5, 13, 24]
    assert made_from("test", numbered(1, "train"), numbered(10))[0]["validation"] == [1, 4, 6, 8, 9]


@pytest.mark.parametrize(
    ("split", "train", "test", "empty"),
    [
        ("train", numbered(9), ["x"], "validation"),
        ("train", numbered(10), numbered(10), "train"),
        ("train", ["same"] * 10, ["x"], "train"),
        ("test", ["x"], ["same"] * 10, "test"),
        ("test", ["x"], ["one"], "validation"),
        ("test", numbered(4), numbered(4), "train"),
    ],
)
def test_too_few_rows_to_make_others_of(split, train, test, empty):
    refused(
        f"no row is left for the {empty} split: validation rows are made from the {split}",
        made_from,
        split,
        train,
        test,
    )


# Folders that stand in for the hub ------------------------------------------------------------------------------------


def hub_task(**changes):
    return task_of(None, source=Source(**{"hub": "some/mail", "folder": "Mail", "test": "dev", **changes}))


def test_a_folder_stands_in_for_the_hub(tmp_path, monkeypatch):
    import datasets

    asked = []

    def fake(hub, subset, *, split):
        asked.append(split)
        return datasets.Dataset.from_list([{**row, "text": "hub"} for row in WORDS])

    monkeypatch.setattr(datasets, "load_dataset", fake)
    (tmp_path / "Mail").mkdir()
    write(tmp_path / "Mail" / "train.jsonl", WORDS)
    write(tmp_path / "Mail" / "dev.jsonl", WORDS[:5])
    data = load(hub_task(), root=tmp_path)
    assert {name: len(rows) for name, rows in data.splits.items()} == {"train": 36, "validation": 4, "test": 5}
    assert data.splits["test"].texts == [(row["text"],) for row in WORDS[:5]]
    assert asked == []
    # Without the folder, or without a root to look in, the hub is asked, even from inside the folder's parent.
    monkeypatch.chdir(tmp_path)
    for root in (tmp_path / "Mail", None):
        assert load(hub_task(), root=root).splits["train"].texts[0] == ("hub",)
    assert asked == ["train", "dev"] * 2


def test_a_folder_that_lacks_a_split(tmp_path, monkeypatch):
    (tmp_path / "Mail").mkdir()
    refused(r"task 'mail': .*Mail lacks train\.jsonl \(it holds nothing\)", load, hub_task(), root=tmp_path)
    for name in ("train", "validation"):
        write(tmp_path / "Mail" / f"{name}.jsonl", WORDS)
    refused(r"Mail lacks dev\.jsonl \(it holds train\.jsonl, validation\.jsonl\)", load, hub_task(), root=tmp_path)


def test_a_hub_out_of_reach_names_the_folder(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    refused(
        r"task 'mail': hub data set some/mail, split 'train' cannot be read \(.*\); check the names and the "
        r"connection, or save this split as JSON lines in DIR/Mail/train\.jsonl and set `--data\.root DIR`",
        load,
        hub_task(),
        root=tmp_path,
    )


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from("uvwxyz")), min_size=1, max_size=40))
def test_rows_that_share_a_key_share_a_group(pairs):
    left, right = zip(*pairs, strict=True)
    found = quickstart.groups(left, right)
    assert sorted(set(found)) == list(range(found.max() + 1))
    reached = list(range(len(pairs)))  # the slow way: spread the smallest row number until nothing changes
    for _ in pairs:
        reached = [min(reached[j] for j, b in enumerate(pairs) if a[0] == b[0] or a[1] == b[1]) for a in pairs]
    assert len(set(zip(reached, found, strict=True))) == len(set(reached)) == len(set(found))


# The example ----------------------------------------------------------------------------------------------------------


def test_the_example_loads():
    folder = Path(__file__).parent.parent / "examples" / "two_csv"
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    tickets, stars = (load(task, root=folder) for task in tasks.resolve(config["tasks"]))
    assert tickets.task.labels == ("billing", "delivery", "technical")
    assert all(len(pair) == 2 for pair in tickets.splits["train"].texts)
    for data in (tickets, stars):
        assert {name: len(rows) for name, rows in data.splits.items()} == {"train": 48, "validation": 6, "test": 6}
        assert all(len(set(rows.targets)) > 1 for rows in data.splits.values())
