"""Metrics as pure functions of two vectors, targets and predictions, on scikit-learn and SciPy.

The correlations of a constant (Matthews, Pearson, Spearman) are 0/0; here they are 0, "no better than a constant",
so an untrained head and the trivial baseline score 0 rather than NaN. Numbers that are not finite are refused: a NaN
that slips into an average hides which task diverged.

A model that writes its answers may write what is none. Such a row is not skipped but counts as wrong: its prediction is
the id `UNPARSED`, or NaN where a number was due (see `score`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from unolora.tasks.task import Task

UNPARSED = -1
"""The label id of a prediction that names no label: a class of its own, which no row has."""


def accuracy(targets: ArrayLike, predictions: ArrayLike) -> float:
    """Share of rows whose label id is right, 0 to 1; both [N]."""
    t, p = _ids(targets, predictions)
    return float(np.mean(t == p))


def f1(targets: ArrayLike, predictions: ArrayLike) -> float:
    """F1 of the positive class (id 1) when every id is 0 or 1, as GLUE has it, else `f1_macro`; both [N].

    Without a positive row and without a positive prediction it is 0. `UNPARSED` counts as the wrong one of both
    classes, on purpose: on a negative row it is a false positive, since it would cost nothing otherwise.
    """
    t, p = _ids(targets, predictions)
    if max(t.max(), p.max()) > 1:
        return f1_macro(t, p)
    return _f1(t, np.where(p == UNPARSED, 1 - t, p), "binary")


def f1_macro(targets: ArrayLike, predictions: ArrayLike) -> float:
    """Unweighted mean of the F1 of every class that occurs among the targets or the predictions; both [N].

    `UNPARSED` is no class to take the mean over; on its row the right class is missed.
    """
    t, p = _ids(targets, predictions)
    return _f1(t, p, "macro", np.setdiff1d(np.union1d(t, p), [UNPARSED]))


def f1_micro(targets: ArrayLike, predictions: ArrayLike) -> float:
    """F1 over all decisions pooled, which for one label a row equals `accuracy`; both [N]."""
    return _f1(*_ids(targets, predictions), "micro")


def matthews(targets: ArrayLike, predictions: ArrayLike) -> float:
    """Matthews correlation of label ids, any number of classes, -1 to 1; 0 when either side is constant; both [N]."""
    from sklearn.metrics import matthews_corrcoef

    t, p = _ids(targets, predictions)
    return 0.0 if _constant(t) or _constant(p) else float(matthews_corrcoef(t, p))


def pearson(targets: ArrayLike, predictions: ArrayLike) -> float:
    """Linear correlation, -1 to 1; 0 when either side is constant up to rounding; both [N]."""
    from scipy.stats import pearsonr

    t, p = _numbers(targets, predictions)
    return 0.0 if _constant(t) or _constant(p) else float(pearsonr(t, p).statistic)


def spearman(targets: ArrayLike, predictions: ArrayLike) -> float:
    """Correlation of the ranks, ties averaged, -1 to 1; 0 when either side is constant up to rounding; both [N]."""
    from scipy.stats import spearmanr

    t, p = _numbers(targets, predictions)
    return 0.0 if _constant(t) or _constant(p) else float(spearmanr(t, p).statistic)


def rmse(targets: ArrayLike, predictions: ArrayLike) -> float:
    """Root of the mean squared error, in the targets' unit; lower is better; both [N]."""
    t, p = _numbers(targets, predictions)
    return float(np.sqrt(np.mean(np.square(t - p))))


Metric = Callable[[ArrayLike, ArrayLike], float]
METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "f1": f1,
    "f1_macro": f1_macro,
    "f1_micro": f1_micro,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
    "rmse": rmse,
}


def score(task: Task, targets: ArrayLike, predictions: ArrayLike) -> dict[str, float]:
    """Score one task, metric by metric in the order of `task.metrics`; the first one is the task's score.

    A task with three or more labels gets the macro F1 under "f1", even where only ids 0 and 1 occur.

    Args:
        task: The task, whose metrics are names of `METRICS`.
        targets: Label ids or numbers [N].
        predictions: Label ids or numbers [N]; `UNPARSED` or NaN where the model's text is neither. NaN is scored as the
            number, among those from the least to the greatest target, that is farthest from the row's own target.

    Raises:
        ValueError: The vectors are empty, differ in length, or hold what the metric cannot take.
    """
    if task.kind == "regression":
        predictions = _farthest_where_nan(targets, predictions)
    scores = {}
    for name in task.metrics:
        metric = f1_macro if name == "f1" and len(task.labels) > 2 else METRICS[name]
        scores[name] = metric(targets, predictions)
    return scores


def resampled(
    metric: str,
    targets: ArrayLike,
    predictions: ArrayLike,
    *,
    regression: bool,
    labels: int,
    draws: int,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Score rows drawn again and again with replacement, as many as there are: the bootstrap of a score.

    Args:
        metric: One of METRICS.
        targets: Label ids or numbers [N].
        predictions: Label ids or numbers [N], see `score`.
        regression: Whether they are numbers.
        labels: How many labels the task has.
        draws: How often.
        seed: Of the draws.

    Returns:
        The scores [draws].
    """
    t = np.asarray(targets, dtype=np.float64)
    p = np.asarray(_farthest_where_nan(t, predictions) if regression else predictions, dtype=np.float64)
    how = f1_macro if metric == "f1" and labels > 2 else METRICS[metric]
    random = np.random.default_rng(seed)
    index = (random.integers(0, len(t), len(t)) for _ in range(draws))
    return np.array([how(t[rows], p[rows]) for rows in index])


def worst(task: Task, targets: ArrayLike, predictions: ArrayLike, confidence: ArrayLike) -> list[int]:
    """Order a task's mistakes, the worst first.

    Args:
        task: Its kind decides.
        targets: Label ids or numbers [N].
        predictions: Label ids or numbers [N], see `score`.
        confidence: Probability of each predicted label [N]; NaN, as of a number, comes last.

    Returns:
        Rows: of a classification the wrong ones, those with the most confidence first; of a regression all, the largest
        errors first, an answer that is no number before them.
    """
    t, p, sure = (np.asarray(each, dtype=np.float64) for each in (targets, predictions, confidence))
    if task.kind == "regression":
        size = np.nan_to_num(np.abs(t - p), nan=np.inf)
        return np.argsort(-size, kind="stable").tolist()
    rows = np.flatnonzero(t != p)
    return rows[np.argsort(-np.nan_to_num(sure[rows]), kind="stable")].tolist()


def scored_on(averages: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the split that a run's scores are told of: test, or validation where the test split was left alone.

    Args:
        averages: Of its results, name -> split -> value.
    """
    return "test" if any("test" in average for average in averages.values()) else "validation"


def averages(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Average the scores of several tasks in three ways, each under its own name.

    | name                  | mean over                                                                            |
    |-----------------------|--------------------------------------------------------------------------------------|
    | mean_of_first_metrics | tasks, of each one's first metric; `average`, which decides on the checkpoint        |
    | mean_of_metrics       | all metrics of all tasks (11 for the eight GLUE tasks), as the paper's tables have it |
    | mean_of_task_means    | tasks, of the mean of each one's metrics (8 for GLUE), as GLUE's leaderboard has it  |

    No mean knows the number of rows. What a task measures beside is in the last two as well, an error such as `rmse`
    too, so only runs whose tasks name the same metrics compare.

    Args:
        scores: Task name -> what `score` returned for it.

    Raises:
        ValueError: There is no task, or a task without a metric.
    """
    if not scores or not all(scores.values()):
        raise ValueError(f"an average needs at least one task and one metric a task, got {dict(scores)}")
    tasks = [list(metrics.values()) for metrics in scores.values()]
    return {
        "mean_of_first_metrics": float(np.mean([values[0] for values in tasks])),
        "mean_of_metrics": float(np.mean([value for values in tasks for value in values])),
        "mean_of_task_means": float(np.mean([np.mean(values) for values in tasks])),
    }


def average(scores: Mapping[str, Mapping[str, float]]) -> float:
    """Return the `mean_of_first_metrics` of `averages`, by which checkpoints are chosen."""
    return averages(scores)["mean_of_first_metrics"]


def baseline(task: Task, train_targets: ArrayLike, n: int) -> tuple[str, NDArray[Any]]:
    """Predict `n` rows without looking at them: what a model has to beat.

    The prediction is a constant, so its Matthews, Pearson and Spearman correlations are 0 by definition; accuracy, F1
    and the errors say more about it.

    Args:
        task: The task; its kind decides.
        train_targets: Label ids or numbers of the training rows [M].
        n: The number of rows to predict.

    Returns:
        The baseline's name, and its predictions [n]: the most frequent label id (int64; the smallest of several), or
        the mean of the training targets (float64).

    Raises:
        ValueError: There are no training targets, or they are not label ids or finite numbers.
    """
    if task.kind == "classification":
        ids, _ = _ids(train_targets, train_targets)
        return "majority class", np.full(n, np.bincount(ids).argmax(), dtype=np.int64)
    numbers, _ = _numbers(train_targets, train_targets)
    return "mean of the training targets", np.full(n, numbers.mean())


def _f1(
    targets: NDArray[np.int64], predictions: NDArray[np.int64], over: str, labels: NDArray[np.int64] | None = None
) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(targets, predictions, labels=labels, average=over, zero_division=0.0))


def _farthest_where_nan(targets: ArrayLike, predictions: ArrayLike) -> ArrayLike:
    """Return the predictions [N] with the most wrong number of the targets' range in place of each NaN.

    Where all targets agree the range is taken to be a unit wide, so that NaN is wrong there too.
    """
    t, p = np.asarray(targets, dtype=np.float64), np.asarray(predictions, dtype=np.float64)
    if t.shape != p.shape or not np.isnan(p).any():
        return predictions
    low, high = t.min(), t.max()
    high = high if high > low else low + 1
    return np.where(np.isnan(p), np.where(t - low > high - t, low, high), p)


def _numbers(targets: ArrayLike, predictions: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both vectors as float64 [N], checked: [N, 1] beside [N] would broadcast to [N, N] in silence."""
    t, p = np.asarray(targets, dtype=np.float64), np.asarray(predictions, dtype=np.float64)
    if t.ndim != 1 or t.shape != p.shape or not t.size:
        raise ValueError(f"expected as many targets as predictions, [N] each, got shapes {t.shape} and {p.shape}")
    for name, values in (("targets", t), ("predictions", p)):
        if bad := int(np.count_nonzero(~np.isfinite(values))):
            raise ValueError(f"expected finite {name}, got {bad} of {values.size} that are NaN or infinite")
    return t, p


def _ids(targets: ArrayLike, predictions: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Both vectors as int64 label ids [N], whatever integer, boolean or float type they came in.

    Predictions alone may be `UNPARSED`.
    """
    numbers = _numbers(targets, predictions)
    for name, least, values in zip(("targets", "predictions"), (0, UNPARSED), numbers, strict=True):
        wrong = values[(values < least) | (values != np.floor(values))]
        if wrong.size:
            raise ValueError(f"expected label ids (0, 1, 2, ...) as {name}, got {wrong[0]}")
    t, p = numbers
    return t.astype(np.int64), p.astype(np.int64)


def _constant(values: NDArray[Any]) -> bool:
    """Whether all values agree up to float64 rounding; a correlation of what is left would be noise."""
    return bool(np.ptp(values) <= 1e-12 * np.abs(values).max())
