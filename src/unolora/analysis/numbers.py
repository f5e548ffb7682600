"""What is measured on the matrices A [R, D_in] and B [D_out, R] and on the scales s: arrays in, numbers out.

A product B A is the same for A' = Q A and B' = B Q^-1, so a measure of one factor says something about the adapter only
as far as it does not see Q:

    any Q         subspace overlap (row space of A, column space of B) and all that is made of it
    rotations Q   singular values, effective ranks, Frobenius norm, eigenvalues of M M^T
    no Q          entry by entry: PCA of flattened matrices, Pearson correlation

Scales have a freedom of their own: c s_r with B's column r divided by c is the same update. So a rank's scale can be
compared between tasks and samples, but not with that of another rank; what is here does only the former.

Axes: M matrices, P projections, R rank, D width, K tasks, N samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from scipy.cluster import hierarchy
from scipy.spatial.distance import pdist

Array = np.ndarray[Any, Any]

MEASURES = (
    "effective rank (sum / max)",
    "effective rank (entropy)",
    "frobenius norm",
    "largest singular value",
)
"""What `measures` gives of each matrix."""


class Interval(NamedTuple):
    """A mean and the half width of its interval; None where there is too little to tell."""

    mean: float
    half: float | None = None


# ---------------------------------------------------------------- one matrix


def singular_values(matrix: Array) -> Array:
    """Return the singular values of a matrix [R, D] or [D, R], the largest first [min(R, D)]."""
    found: Array = np.linalg.svd(np.asarray(matrix, dtype=np.float64), compute_uv=False)
    return found


def eigenvalues(matrix: Array) -> Array:
    """Return the eigenvalues of M M^T that can differ from zero, the largest first [min(R, D)]."""
    return np.square(singular_values(matrix))


def ratio_rank(values: Array) -> float:
    """Return the paper's effective rank: the sum of the singular values over the largest one; 0 for a zero matrix."""
    return float(values.sum() / values.max()) if values.any() else 0.0


def entropy_rank(values: Array) -> float:
    """Return the effective rank of Roy and Vetterli (2007): exp of the entropy of the singular values' shares."""
    if not values.any():
        return 0.0
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def measures(matrix: Array) -> dict[str, float]:
    """Return MEASURES of a matrix; none of them sees a rotation of the ranks."""
    values = singular_values(matrix)
    found = (ratio_rank(values), entropy_rank(values), float(np.sqrt(np.square(values).sum())), float(values.max()))
    return dict(zip(MEASURES, found, strict=True))


# ---------------------------------------------------------------- matrices of one shape, entry by entry


def pca(matrices: Sequence[Array], dimensions: int = 2) -> tuple[Array, Array]:
    """Project flattened matrices of one shape onto their principal components.

    Args:
        matrices: M matrices.
        dimensions: How many components; those that M matrices do not have are zero.

    Returns:
        Coordinates [M, dimensions], and each component's share of the variance [dimensions]. A component's sign is
        chosen so that its largest coordinate is positive.
    """
    flat = np.stack([np.asarray(matrix, dtype=np.float64).ravel() for matrix in matrices])
    flat -= flat.mean(axis=0)
    left, values, _ = np.linalg.svd(flat, full_matrices=False)
    coordinates, shares = np.zeros((len(flat), dimensions)), np.zeros(dimensions)
    kept = min(dimensions, len(values))
    found = left[:, :kept] * values[:kept]
    largest = np.take_along_axis(found, np.abs(found).argmax(axis=0)[None], axis=0)
    coordinates[:, :kept] = found * np.where(largest < 0, -1, 1)
    total = np.square(values).sum()
    if total > 0:
        shares[:kept] = np.square(values[:kept]) / total
    return coordinates, shares


def correlations(matrices: Sequence[Array], others: Sequence[Array] | None = None) -> Array:
    """Return Pearson's correlation between the entries of matrices.

    Args:
        matrices: M matrices.
        others: L matrices; the same ones when None.

    Returns:
        [M, L]; NaN where two shapes differ or a matrix is constant, as B is before training.
    """
    others = matrices if others is None else others
    rows, columns = ([_standardised(matrix) for matrix in each] for each in (matrices, others))
    found = np.full((len(rows), len(columns)), np.nan)
    for i, one in enumerate(rows):
        for j, other in enumerate(columns):
            if one.shape == other.shape:
                found[i, j] = np.clip((one * other).sum(), -1, 1)
    return found


def _standardised(matrix: Array) -> Array:
    centred = np.asarray(matrix, dtype=np.float64) - np.mean(matrix, dtype=np.float64)
    norm = np.linalg.norm(centred)
    return centred / norm if norm > 0 else np.full_like(centred, np.nan)


# ---------------------------------------------------------------- subspaces


def basis(matrix: Array, rows: bool) -> Array:
    """Return an orthonormal basis [D, k] of the row space (of A) or the column space (of B); k <= R, 0 for zeros."""
    tall = np.asarray(matrix, dtype=np.float64)
    left, values, _ = np.linalg.svd(tall.T if rows else tall, full_matrices=False)
    limit = values.max(initial=0.0) * max(tall.shape) * np.finfo(np.float32).eps  # what float32 weights can tell
    return np.ascontiguousarray(left[:, values > limit])


def overlap(one: Array, other: Array) -> float:
    """Return the mean squared cosine of the principal angles between two subspaces, from 0 to 1.

    Args:
        one: Orthonormal basis [D, k].
        other: Orthonormal basis [D, l].

    Returns:
        1 where the smaller lies within the larger, 0 where they are orthogonal; NaN where one is empty or the spaces
        around them differ.
    """
    if one.shape[0] != other.shape[0] or not one.shape[1] or not other.shape[1]:
        return float("nan")
    return float(min(1.0, np.square(one.T @ other).sum() / min(one.shape[1], other.shape[1])))


def overlaps(ones: Sequence[Array], others: Sequence[Array]) -> Array:
    """Return the overlap of every subspace with every other, [M, L]; see `overlap`."""
    return np.array([[overlap(one, other) for other in others] for one in ones]).reshape(len(ones), len(others))


def expected_overlap(d: int, k: int, l: int) -> float:  # noqa: E741
    """Return what two independent random subspaces of k and l dimensions in d overlap on average: max(k, l) / d.

    It is r / d where both have r dimensions: each basis vector of one keeps that part of its square in the other.
    """
    return max(k, l) / d


def random_overlaps(d: int, k: int, l: int, count: int, random: np.random.Generator) -> Array:  # noqa: E741
    """Draw the overlap of two independent random subspaces, uniform over all of k and l dimensions in d.

    Only their position to each other counts, so that one of them may be spanned by the first l axes.

    Returns:
        [count].
    """
    found = np.empty(count)
    block = max(1, 4_000_000 // (d * k))  # matrices at a time
    for start in range(0, count, block):
        bases, _ = np.linalg.qr(random.standard_normal((min(block, count - start), d, k)))
        found[start : start + len(bases)] = np.square(bases[:, :l]).sum(axis=(1, 2)) / min(k, l)
    return found


def p_value(observed: float, null: Array) -> float:
    """Return the share of a sampled null that is at least as large, the observed value counted in."""
    # Rounding must not make a value larger than its equals: a permutation may be the identity.
    return float((1 + np.count_nonzero(null >= observed - 1e-12)) / (1 + len(null)))


def permuted_means(
    tables: Sequence[tuple[int, int, Array]], groups: Sequence[object], count: int, random: np.random.Generator
) -> Array:
    """Sample the mean overlap of paired layers under the null that a layer has no counterpart in another adapter.

    Each adapter's layers are shuffled once a draw, within their group, whatever number of pairs it is part of.

    Args:
        tables: For each pair of adapters their numbers, and the overlap of each layer with each [P, P].
        groups: What may take each other's place: of each layer its shape and kind [P].
        count: Draws.
        random: Generator.

    Returns:
        Means over the pairs and layers [count].
    """
    members = [np.flatnonzero([group == each for each in groups]) for group in dict.fromkeys(groups)]
    adapters = sorted({number for one, other, _ in tables for number in (one, other)})
    found = np.empty(count)
    for draw in range(count):
        orders = {adapter: np.arange(len(groups)) for adapter in adapters}
        for order in orders.values():
            for places in members:
                order[places] = random.permutation(places)
        found[draw] = np.mean([table[orders[one], orders[other]].mean() for one, other, table in tables])
    return found


# ---------------------------------------------------------------- scales


def variances(s: Array, tasks: Array) -> tuple[Array, Array]:
    """Split the variance of scales into that between tasks and that between the samples of a task.

    Args:
        s: [N, P, R].
        tasks: Task of each sample [N]; each task weighs the same, however many samples it has.

    Returns:
        Variance of the tasks' means, and mean of the variances within a task, [P, R] each; both about the mean, not
        corrected for the number of samples, so that with samples alike in number they add up to the variance of all.
    """
    s = np.asarray(s, dtype=np.float64)
    parts = [s[tasks == task] for task in np.unique(tasks)]
    between = np.var([part.mean(axis=0) for part in parts], axis=0)
    within = np.mean([part.var(axis=0) for part in parts], axis=0)
    return between, within


def task_shares(between: Array, within: Array) -> Array:
    """Return the part of the variance that lies between tasks, from 0 to 1 [P, R]; NaN where nothing varies."""
    total = between + within
    return np.divide(between, total, out=np.full_like(total, np.nan), where=total > 0)


def relative_scales(means: Array) -> Array:
    """Return the tasks' mean scales [K, P, R] over each rank's root mean square, so that B's size is out."""
    means = np.asarray(means, dtype=np.float64)
    size = np.sqrt(np.square(means).mean(axis=0))  # [P, R]
    return means / np.where(size > 0, size, 1)


def switched_off(means: Array, below: float = 0.1) -> Array:
    """Tell which ranks a task hardly uses: its |s| is under `below` times the largest of any task.

    Args:
        means: Mean scales of the tasks [K, P, R].
        below: The limit.

    Returns:
        [K, P, R] of bool; with one task nothing is.
    """
    size = np.abs(means)
    return np.asarray(size < below * size.max(axis=0))


def linkage(means: Array) -> Array:
    """Cluster tasks by their scales.

    Args:
        means: Mean scales [K, P, R].

    Returns:
        SciPy's linkage (average, ordered) [K - 1, 4] of the root mean square differences of `relative_scales`.
    """
    if len(means) < 2:
        return np.empty((0, 4))
    flat = relative_scales(means).reshape(len(means), -1)
    found: Array = hierarchy.linkage(pdist(flat) / np.sqrt(flat.shape[1]), "average", optimal_ordering=True)
    return found


# ---------------------------------------------------------------- over seeds


def interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Return the mean of independent values and Student's t interval; None as half width for fewer than two."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean)
    quantile = stats.t.ppf((1 + level) / 2, len(values) - 1)
    return Interval(mean, float(quantile * stats.sem(values)))


def pair_interval(values: Sequence[float], units: Sequence[tuple[int, int]], level: float = 0.95) -> Interval:
    """Return the mean of values that belong to pairs of seeds, and its jackknife interval.

    Pairs that share a seed are not independent. So each seed is left out in turn with all its pairs, and the spread of
    what remains gives the error, with Student's t of as many seeds. It is `interval` where both seeds of each pair are
    the same, and errs on the wide side otherwise (Efron and Stein 1981).

    Args:
        values: One for each pair.
        units: The two seeds of each pair; the same number twice for a value of one seed.
        level: Confidence.

    Returns:
        The mean over pairs; the half width is None where leaving a seed out leaves nothing.
    """
    mean = float(np.mean(values))
    seeds = sorted({unit for pair in units for unit in pair})
    kept = [[value for value, pair in zip(values, units, strict=True) if seed not in pair] for seed in seeds]
    if not all(kept):
        return Interval(mean)
    without, n = np.array([np.mean(part) for part in kept]), len(seeds)
    error = np.sqrt((n - 1) / n * np.square(without - without.mean()).sum())
    return Interval(mean, float(stats.t.ppf((1 + level) / 2, n - 1) * error))
