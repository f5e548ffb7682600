"""Metrics: against hand-computed values, textbook formulas and the libraries, and at their edges."""

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from unolora import metrics
from unolora.metrics import METRICS, UNPARSED, average, averages, baseline, score
from unolora.tasks.glue import GLUE, TASKS
from unolora.tasks.task import METRIC_NAMES, Task

QUICK = settings(max_examples=60, deadline=None)
CLASSIFICATION = ("accuracy", "f1", "f1_macro", "f1_micro", "matthews")
REGRESSION = ("pearson", "spearman", "rmse")
IDS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40)
# Steps of 1/8 keep sums exact enough that rounding cannot turn a spread into a constant.
NUMBERS = st.lists(st.tuples(*[st.integers(-800, 800).map(lambda i: i / 8)] * 2), min_size=2, max_size=40)


def task(kind: str, **fields) -> Task:
    return Task(name="toy", kind=kind, template=("{text}",), target="label", **fields)


def columns(pairs):
    targets, predictions = (np.array(column) for column in zip(*pairs, strict=True))
    return targets, predictions


def test_every_metric_is_tested():
    assert set(METRICS) == {*CLASSIFICATION, *REGRESSION}


def test_every_name_that_a_task_accepts_is_a_metric():
    assert {name for names in METRIC_NAMES.values() for name in names} == set(METRICS)


# Values


@pytest.mark.parametrize(
    ("name", "targets", "predictions", "expected"),
    [
        ("accuracy", [0, 1, 2, 2], [0, 1, 1, 2], 0.75),
        # 2 true positives, 1 false positive, 2 false negatives: 2*2 / (2*2 + 1 + 2); class 0 has 1, 2, 1
        ("f1", [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0], 4 / 7),
        ("f1_macro", [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0], (4 / 7 + 2 / 5) / 2),
        ("f1_micro", [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0], 3 / 6),
        ("f1", [0, 0, 1, 2], [0, 1, 1, 2], (2 / 3 + 2 / 3 + 1) / 3),
        ("f1", [1, 1], [0, 0], 0),
        ("f1", [0, 0], [0, 0], 0),
        # (2*1 - 1*2) / ... = 0
        ("matthews", [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0], 0),
        # TP 2, TN 1, FP 0, FN 1: (2*1 - 0) / sqrt(2 * 3 * 1 * 2)
        ("matthews", [1, 1, 1, 0], [1, 1, 0, 0], 2 / np.sqrt(12)),
        ("matthews", [0, 1], [1, 0], -1),
        # deviations (-1, 0, 1) and (-4/3, -1/3, 5/3)
        ("pearson", [1, 2, 3], [1, 2, 4], 3 / np.sqrt(2 * 42 / 9)),
        ("spearman", [1, 2, 3], [1, 2, 400], 1),
        ("spearman", [1, 2, 3, 4], [1, 3, 2, 4], 1 - 6 * 2 / (4 * 15)),
        ("rmse", [1, 2, 3], [1, 4, 6], np.sqrt(13 / 3)),
    ],
)
def test_values_by_hand(name, targets, predictions, expected):
    value = METRICS[name](targets, predictions)
    assert type(value) is float
    assert value == pytest.approx(expected, abs=1e-12)


def test_values_of_the_libraries():
    generator = np.random.default_rng(0)
    targets, predictions = generator.integers(0, 4, (2, 200))
    predictions = np.where(generator.random(200) < 0.5, targets, predictions)
    for name, expected in {
        "accuracy": sklearn.metrics.accuracy_score(targets, predictions),
        "f1": sklearn.metrics.f1_score(targets, predictions, average="macro"),
        "f1_macro": sklearn.metrics.f1_score(targets, predictions, average="macro"),
        "f1_micro": sklearn.metrics.f1_score(targets, predictions, average="micro"),
        "matthews": sklearn.metrics.matthews_corrcoef(targets, predictions),
    }.items():
        assert 0.1 < expected < 0.9, name
        assert METRICS[name](targets, predictions) == pytest.approx(expected, abs=1e-12), name
    assert metrics.f1(targets % 2, predictions % 2) == sklearn.metrics.f1_score(targets % 2, predictions % 2)

    numbers = generator.normal(size=200)
    guesses = np.exp(numbers) + generator.normal(size=200)
    for name, expected in {
        "pearson": scipy.stats.pearsonr(numbers, guesses).statistic,
        "spearman": scipy.stats.spearmanr(numbers, guesses).statistic,
        "rmse": sklearn.metrics.root_mean_squared_error(numbers, guesses),
    }.items():
        assert METRICS[name](numbers, guesses) == pytest.approx(expected, abs=1e-12), name


@pytest.mark.parametrize("name", ["matthews", "pearson", "spearman"])
@pytest.mark.parametrize("constant", [0, 2])
def test_constants_have_no_correlation(name, constant):
    varied, flat = [0, 1, 2, 1], [constant] * 4
    assert METRICS[name](varied, varied) == pytest.approx(1)
    for pair in ((varied, flat), (flat, varied), (flat, flat)):
        assert METRICS[name](*pair) == 0


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_a_constant_up_to_rounding_is_a_constant(name):
    nearly = 0.1 + np.array([0, 1, 2, 3]) * 2**-55
    assert len(set(nearly)) > 1
    assert METRICS[name]([1, 2, 3, 4], nearly) == 0
    assert METRICS[name]([1, 2, 3, 4], nearly + np.array([0, 1, 2, 3]) * 1e-9) == pytest.approx(1)


@pytest.mark.parametrize("name", METRICS)
def test_one_row(name):
    assert METRICS[name]([1], [1]) == {"accuracy": 1, "f1": 1, "f1_macro": 1, "f1_micro": 1}.get(name, 0)


# Properties


@QUICK
@given(IDS)
def test_perfect_ids(pairs):
    targets, _ = columns(pairs)
    for name in CLASSIFICATION:
        lacks_a_class = (name == "matthews" and len(set(targets)) == 1) or (name == "f1" and not targets.any())
        assert METRICS[name](targets, targets) == pytest.approx(0 if lacks_a_class else 1), name


@QUICK
@given(NUMBERS)
def test_perfect_numbers(pairs):
    targets, _ = columns(pairs)
    assume(np.ptp(targets) > 0)
    assert {name: METRICS[name](targets, targets) for name in REGRESSION} == pytest.approx(
        {"pearson": 1, "spearman": 1, "rmse": 0}
    )


@QUICK
@given(st.data())
def test_order_of_the_rows_does_not_matter(data):
    for names, pairs in ((CLASSIFICATION, data.draw(IDS)), (REGRESSION, data.draw(NUMBERS))):
        shuffled = data.draw(st.permutations(pairs))
        for name in names:
            assert METRICS[name](*columns(shuffled)) == pytest.approx(METRICS[name](*columns(pairs)), abs=1e-9), name


@QUICK
@given(IDS)
def test_matthews_is_symmetric(pairs):
    targets, predictions = columns(pairs)
    assert metrics.matthews(targets, predictions) == pytest.approx(metrics.matthews(predictions, targets), abs=1e-12)


@QUICK
@given(IDS)
def test_micro_f1_is_accuracy(pairs):
    assert metrics.f1_micro(*columns(pairs)) == pytest.approx(metrics.accuracy(*columns(pairs)))


@QUICK
@given(NUMBERS, st.floats(0.01, 100), st.floats(-100, 100))
def test_pearson_ignores_scale_and_offset(pairs, slope, offset):
    targets, predictions = columns(pairs)
    expected = metrics.pearson(targets, predictions)
    assert metrics.pearson(targets, slope * predictions + offset) == pytest.approx(expected, abs=1e-6)
    assert metrics.pearson(targets, -slope * predictions + offset) == pytest.approx(-expected, abs=1e-6)


@QUICK
@given(NUMBERS)
def test_spearman_ignores_every_increasing_map(pairs):
    targets, predictions = columns(pairs)
    assert metrics.spearman(targets, predictions**3) == pytest.approx(metrics.spearman(targets, predictions), abs=1e-9)


# Types and shapes


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.float32, bool])
@pytest.mark.parametrize("name", CLASSIFICATION)
def test_ids_of_mixed_dtypes(name, dtype):
    targets, predictions = np.array([0, 1, 1, 0, 1]), np.array([0, 1, 0, 0, 1])
    expected = METRICS[name](targets, predictions)
    assert 0 < expected < 1
    assert METRICS[name](targets, predictions.astype(dtype)) == expected
    assert METRICS[name](targets.astype(dtype).tolist(), predictions) == expected


@pytest.mark.parametrize("name", REGRESSION)
def test_numbers_of_mixed_dtypes(name):
    targets, predictions = np.array([1, 2, 5]), np.array([1.5, 2.25, 3.0])
    expected = METRICS[name](targets, predictions)
    assert METRICS[name](targets.astype(np.uint8), predictions.astype(np.float32)) == expected
    assert METRICS[name](targets.tolist(), predictions.astype(np.float16)) == expected


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    ("targets", "predictions", "message"),
    [
        ([0, 1, 1], [0, 1, 1, 0], r"shapes \(3,\) and \(4,\)"),
        ([0, 1], [[0], [1]], r"shapes \(2,\) and \(2, 1\)"),  # would broadcast
        ([[0], [1]], [[0], [1]], r"shapes \(2, 1\) and \(2, 1\)"),
        ([], [], r"shapes \(0,\) and \(0,\)"),
        ([0, 1, 1], [0, np.nan, np.inf], "expected finite predictions, got 2 of 3 that are NaN or infinite"),
        ([np.nan, 1, 1], [0, 1, 1], "expected finite targets, got 1 of 3"),
    ],
)
def test_vectors_that_cannot_be_scored_are_refused(name, targets, predictions, message):
    with pytest.raises(ValueError, match=message):
        METRICS[name](targets, predictions)


@pytest.mark.parametrize("name", CLASSIFICATION)
@pytest.mark.parametrize("wrong", [0.5, -2])
def test_ids_that_are_no_ids_are_refused(name, wrong):
    with pytest.raises(ValueError, match=rf"expected label ids \(0, 1, 2, \.\.\.\) as predictions, got {float(wrong)}"):
        METRICS[name]([0, 1], [0, wrong])
    with pytest.raises(ValueError, match=r"as targets, got -1"):
        METRICS[name]([0, UNPARSED], [0, 1])


# Answers that are none


def test_unparsed_labels_by_hand():
    targets, predictions = [1, 1, 1, 0, 0], [1, 1, -1, 0, -1]
    toy = task("classification", labels=("no", "yes"), metrics=CLASSIFICATION)
    assert score(toy, targets, predictions) == pytest.approx(
        {
            "accuracy": 3 / 5,
            "f1": 2 * 2 / (2 * 2 + 1 + 1),  # one positive missed, and the unparsed negative is a false positive
            "f1_macro": (2 * 2 / (2 * 2 + 1) + 2 * 1 / (2 * 1 + 1)) / 2,
            "f1_micro": 3 / 5,
            "matthews": sklearn.metrics.matthews_corrcoef(targets, predictions),
        }
    )


@QUICK
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(-1, 2)), min_size=1, max_size=40))
def test_unparsed_labels_are_a_class_of_their_own(pairs):
    targets, predictions = columns(pairs)
    assume(np.ptp(targets) and np.ptp(predictions))
    three = task("classification", labels=("a", "b", "c"), metrics=CLASSIFICATION)
    occurring = sorted({*targets, *predictions} - {UNPARSED})
    macro = sklearn.metrics.f1_score(targets, predictions, labels=occurring, average="macro", zero_division=0)
    assert score(three, targets, predictions) == pytest.approx(
        {
            "accuracy": sklearn.metrics.accuracy_score(targets, predictions),
            "f1": macro,
            "f1_macro": macro,
            "f1_micro": sklearn.metrics.accuracy_score(targets, predictions),
            "matthews": sklearn.metrics.matthews_corrcoef(targets, predictions),
        },
        abs=1e-12,
    )


@QUICK
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=40), st.data())
def test_an_unparsed_label_never_helps(pairs, data):
    targets, predictions = columns(pairs)
    lost = data.draw(st.lists(st.integers(0, len(pairs) - 1), min_size=1))
    unparsed, opposite = predictions.copy(), predictions.copy()
    unparsed[lost] = UNPARSED
    opposite[lost] = 1 - targets[lost]
    for name in ("accuracy", "f1"):
        assert (
            METRICS[name](targets, unparsed) == METRICS[name](targets, opposite) <= METRICS[name](targets, predictions)
        )
    assert metrics.f1(targets, opposite) == sklearn.metrics.f1_score(targets, opposite, zero_division=0)


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_nothing_parsed_is_nothing_right(name):
    assert METRICS[name]([0, 1, 1], [0, 1, 1]) == 1
    assert METRICS[name]([0, 1, 1], [UNPARSED] * 3) == 0
    assert METRICS[name]([0, 1, 2], [UNPARSED] * 3) == 0


def test_unparsed_numbers_are_the_most_wrong_ones():
    targets, nan = [0.0, 2.0, 3.0, 5.0], float("nan")
    toy = task("regression", metrics=REGRESSION)
    assert score(toy, targets, [nan, 2.0, 3.0, nan]) == score(toy, targets, [5.0, 2.0, 3.0, 0.0])
    assert score(toy, targets, [0.0, nan, nan, 5.0]) == score(toy, targets, [0.0, 5.0, 0.0, 5.0])
    given = np.array([nan, 1.0, 2.0, 3.0], np.float32)
    score(toy, targets, given)
    assert np.isnan(given[0])  # the caller's vector is left alone
    with pytest.raises(ValueError, match="expected finite predictions, got 1 of 4"):
        score(toy, targets, [nan, 2.0, np.inf, 1.0])
    with pytest.raises(ValueError, match="expected finite targets"):
        score(toy, [nan, 1, 2, 3], [nan, 2.0, 3.0, 1.0])
    with pytest.raises(ValueError, match=r"shapes \(4,\) and \(1,\)"):
        score(toy, targets, [nan])


def test_an_unparsed_number_is_wrong_where_all_targets_agree():
    assert score(task("regression", metrics=("rmse",)), [3.0, 3.0], [3.0, 3.0]) == {"rmse": 0}
    assert score(task("regression", metrics=("rmse",)), [3.0, 3.0], [float("nan")] * 2)["rmse"] == 1


@QUICK
@given(NUMBERS, st.data())
def test_an_unparsed_number_raises_the_error_at_least_as_any_of_the_range(pairs, data):
    targets, _ = columns(pairs)
    guesses = np.array(data.draw(st.lists(st.sampled_from(list(targets)), min_size=len(pairs), max_size=len(pairs))))
    unparsed = np.where(data.draw(st.lists(st.booleans(), min_size=len(pairs), max_size=len(pairs))), np.nan, guesses)
    toy = task("regression", metrics=("rmse",))
    assert score(toy, targets, unparsed)["rmse"] >= score(toy, targets, guesses)["rmse"]


# Tasks


def test_score_keeps_the_order_of_the_task():
    toy = task("classification", labels=("no", "yes"), metrics=("f1", "accuracy", "matthews"))
    scores = score(toy, [1, 1, 1, 0], [1, 1, 0, 0])
    assert list(scores) == ["f1", "accuracy", "matthews"]
    assert scores == pytest.approx({"f1": 0.8, "accuracy": 0.75, "matthews": 2 / np.sqrt(12)})


@pytest.mark.parametrize(("kind", "first"), [("classification", "matthews"), ("regression", "pearson")])
def test_score_of_a_task_without_metrics_of_its_own(kind, first):
    assert next(iter(score(task(kind), [0, 1, 1], [0, 1, 0]).items())) == (first, pytest.approx(0.5))


def test_f1_of_many_labels_is_macro_even_where_two_occur():
    targets, predictions = [1, 1, 1, 0], [1, 1, 0, 0]
    two, three = (task("classification", labels=labels, metrics=("f1",)) for labels in (("a", "b"), ("a", "b", "c")))
    assert score(two, targets, predictions)["f1"] == pytest.approx(metrics.f1(targets, predictions))
    assert score(three, targets, predictions)["f1"] == pytest.approx(metrics.f1_macro(targets, predictions))
    assert metrics.f1(targets, predictions) != metrics.f1_macro(targets, predictions)


def paper_row(cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte):
    """Scores of the eight GLUE tasks, under the metrics that our tasks name."""
    rows = {"cola": cola, "sst2": sst2, "mrpc": mrpc, "qqp": qqp, "stsb": stsb, "mnli": mnli, "qnli": qnli, "rte": rte}
    assert tuple(rows) == GLUE
    values = {name: row if isinstance(row, tuple) else (row,) for name, row in rows.items()}
    return {name: dict(zip(TASKS[name].metrics, row, strict=True)) for name, row in values.items()}


PLAIN = paper_row(50.79, 94.61, (85.78, 85.78), (89.99, 89.32), (88.63, 88.44), 84.71, 92.68, 77.70)
STARRED = paper_row(56.11, 93.92, (86.76, 86.76), (89.88, 89.21), (88.52, 88.69), 85.24, 93.14, 76.26)


@pytest.mark.parametrize(("scores", "printed"), [(PLAIN, 84.40), (STARRED, 84.95)], ids=["UnoLoRA", "UnoLoRA*"])
def test_the_average_of_the_paper_is_the_mean_of_eleven_metrics(scores, printed):
    assert sum(map(len, scores.values())) == 11
    found = averages(scores)
    assert round(found["mean_of_metrics"], 2) == printed
    assert all(round(value, 2) != printed for name, value in found.items() if name != "mean_of_metrics")


def test_averages_by_hand():
    scores = {"a": {"matthews": 0.2, "accuracy": 0.9}, "b": {"accuracy": 0.6, "f1": 0.2, "f1_micro": 0.4}}
    assert averages(scores) == pytest.approx(
        {
            "mean_of_first_metrics": (0.2 + 0.6) / 2,
            "mean_of_metrics": (0.2 + 0.9 + 0.6 + 0.2 + 0.4) / 5,
            "mean_of_task_means": (0.55 + 0.4) / 2,
        }
    )
    assert average(scores) == averages(scores)["mean_of_first_metrics"]
    assert all(type(value) is float for value in averages(scores).values())


def test_micro_f1_comes_on_request_under_its_own_name():
    toy = task("classification", labels=("no", "yes"), metrics=("accuracy", "f1_micro"))
    assert score(toy, [0, 1, 1], [0, 1, 0]) == pytest.approx({"accuracy": 2 / 3, "f1_micro": 2 / 3})
    assert not any("f1_micro" in task.metrics for task in TASKS.values())


def test_average_is_the_mean_of_first_metrics():
    scores = {"a": {"matthews": 0.2, "accuracy": 0.9}, "b": {"pearson": 0.6, "spearman": 0.1}, "c": {"f1": 1.0}}
    assert average(scores) == pytest.approx(0.6)


@pytest.mark.parametrize("scores", [{}, {"a": {}}, {"a": {"f1": 1.0}, "b": {}}])
def test_average_of_nothing_is_refused(scores):
    with pytest.raises(ValueError, match="at least one task and one metric a task"):
        average(scores)
    with pytest.raises(ValueError, match="at least one task and one metric a task"):
        averages(scores)


def test_majority_baseline():
    toy = task("classification", labels=("a", "b", "c"))
    name, predictions = baseline(toy, np.array([2, 1, 2, 0]), 5)
    assert name == "majority class"
    assert predictions.dtype == np.int64
    assert predictions.tolist() == [2] * 5
    assert baseline(toy, [2, 1, 1, 2], 1)[1].tolist() == [1]  # a tie goes to the smaller id
    scores = score(task("classification", metrics=("accuracy", "matthews")), [2, 2, 1, 0, 2], predictions)
    assert scores == {"accuracy": 0.6, "matthews": 0}


def test_mean_baseline():
    name, predictions = baseline(task("regression"), np.array([1, 2, 6]), 4)
    assert name == "mean of the training targets"
    assert predictions.dtype == np.float64
    assert predictions.tolist() == [3.0] * 4
    assert score(task("regression", metrics=("pearson", "rmse")), [3, 3, 5, 1], predictions) == {
        "pearson": 0,
        "rmse": pytest.approx(np.sqrt(2)),
    }


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_baseline_needs_training_targets(kind):
    with pytest.raises(ValueError, match=r"shapes \(0,\)"):
        baseline(task(kind), [], 3)
