"""What was learned: numbers on the A's, B's and scales of runs, and whether they are alike between runs.

    collect.py   run folders -> A's, B's, scales        numbers.py   arrays -> numbers
    ablate.py    scores without a part of the adapter   figures.py   numbers -> figures

"A generalises, B specialises" becomes a number here: how much more the row spaces of A overlap between tasks, methods
or seeds than the column spaces of B do, both corrected for what random subspaces overlap. A starts at random and B at
zero: where A has moved little, its overlap is that of two starts (none, or all of it for one seed). So the same is said
of what training added to A ("moved A"), which B, all added, compares with.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from unolora.analysis import numbers
from unolora.analysis.ablate import ablations
from unolora.analysis.collect import (
    PER_TASK,
    SHARED,
    Adapter,
    Pair,
    adapters_of,
    encoded,
    gradient_cosines,
    kind_of,
    layer_of,
    scales,
    short_names,
    with_starts,
)
from unolora.atomic import new_folder, write_json
from unolora.compare import method_settings, told_apart
from unolora.errors import InputError
from unolora.runs import Run, load_run

Array = np.ndarray[Any, Any]
Row = dict[str, Any]

WITH_PAIRS = (*SHARED, PER_TASK)
"""Methods that can be analysed."""
DRAWS = 1000
"""Of random subspaces and of permutations."""
TABLES = ("table", "comparisons", "ablations", "summary")
MOVED = "moved A"
"""What training added to A, as a matrix of its own."""
MATRICES = {
    "A": (lambda pair: pair.A, True),
    MOVED: (lambda pair: pair.moved, True),
    "B": (lambda pair: pair.B, False),
}  # fmt: skip
"""Matrix -> how it is had of a pair, and whether its row space or its column space counts."""


@dataclass
class Analysis:
    """What `analyze` found.

    Args:
        table: A row for each number: run, label, seed, task, projection, layer, kind, matrix, shape, measure, value.
            `task` is
            empty for what all tasks share.
        comparisons: A row for each kind of pair and each matrix: overlap with interval, random baseline, p-values.
        ablations: A row for each part switched off and each task, if asked for.
        summary: A row for each method and measure: the mean over projections, with an interval over seeds.
        arrays: Singular values, PCA, correlations, scales; named RUN/MATRIX/WHAT, or RUN:TASK/MATRIX/WHAT.
        tasks: Run -> the names of its tasks, in the order of their rows.
        notes: What should be known when reading them, a line each.
    """

    table: list[Row] = field(default_factory=list)
    comparisons: list[Row] = field(default_factory=list)
    ablations: list[Row] = field(default_factory=list)
    summary: list[Row] = field(default_factory=list)
    arrays: dict[str, Array] = field(default_factory=dict)
    tasks: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def analyze(
    runs: Sequence[Path], against: Sequence[Path] = (), *, rows: int = 32, ablate: bool = False, seed: int = 0
) -> Analysis:
    """Analyse runs, and compare them with each other and with further runs.

    Args:
        runs: Run folders, or `RUN/baselines/METHOD`; seeds of one method belong together.
        against: Runs to compare them with.
        rows: Validation rows of each task for scales and gradients; 0 leaves them out, and where A started; then no
            backbone is needed.
        ablate: Whether to score each run on its validation splits without each rank, each layer and the sample.
        seed: Of the random baseline and the permutations.

    Raises:
        InputError: A folder is no finished run of a method with A's and B's, or the runs adapt other projections.
    """
    ours, theirs = _read(_once(runs), _once(against), starts=rows > 0)
    if not ours:
        raise InputError("nothing to analyse: give at least one run folder")
    _check_alike([*ours, *theirs])
    found, random = Analysis(), np.random.default_rng(seed)
    everyone = list({adapter.name: adapter for adapter in [*ours, *theirs]}.values())
    for adapter in everyone:
        found.tasks[adapter.run] = list(adapter.tasks)
        _measure(adapter, found)
    _place(everyone, found)
    _compare(_pairs(ours, theirs), found, random)
    for adapter in {adapter.run: adapter for adapter in ours}.values():
        if not (rows or ablate):
            continue
        if not (adapter.folder / "config.yaml").is_file():
            found.notes.append(
                f"{adapter.run}: no scales and gradients, its folder has no config.yaml to load it with."
            )
            continue
        run = load_run(adapter.folder)
        if rows:
            _of_rows(run, adapter, rows, found)
        if ablate:
            found.ablations += [{"run": adapter.run, "label": adapter.label} | row for row in ablations(run)]
    _summarise(found)
    return found


def _read(ours: Sequence[Path], theirs: Sequence[Path], *, starts: bool) -> tuple[list[Adapter], list[Adapter]]:
    """Read adapters under short names, and labels that tell their settings apart."""
    folders = _once([*ours, *theirs])
    read = [adapters_of(folder) for folder in folders]
    known = [method_settings(folder, each[0].method) for folder, each in zip(folders, read, strict=True)]
    labels = told_apart([each[0].label for each in read], known)
    found = {}
    for folder, adapters, name, label in zip(folders, read, short_names(folders), labels, strict=True):
        named = [replace(adapter, run=name, label=label) for adapter in adapters]
        found[folder.resolve()] = with_starts(named) if starts else named
    ours_too, theirs_too = ([a for folder in each for a in found[folder.resolve()]] for each in (ours, theirs))
    return ours_too, theirs_too


def write(found: Analysis, folder: Path) -> None:
    """Write the tables as CSV and parquet and the arrays as safetensors; the folder is replaced as a whole.

    Raises:
        InputError: The folder holds something else, or can't be written.
    """
    import pandas
    from safetensors.numpy import save_file

    if folder.exists() and not (folder / "arrays.safetensors").is_file() and not _empty(folder):
        raise InputError(f"{folder} holds other files and no analysis; it is not overwritten, choose another --output")
    with new_folder(folder) as inside:
        for name in TABLES:
            if not getattr(found, name):
                continue
            frame = pandas.DataFrame(getattr(found, name))
            frame.to_csv(inside / f"{name}.csv", index=False)
            frame.to_parquet(inside / f"{name}.parquet", index=False)
        write_json(inside / "about.json", {"tasks": found.tasks, "notes": found.notes})
        save_file(
            {key: np.ascontiguousarray(value) for key, value in found.arrays.items()}, inside / "arrays.safetensors"
        )


def read(folder: Path) -> Analysis:
    """Read what `write` wrote.

    Raises:
        InputError: A file is missing or not what `write` wrote.
    """
    import pandas
    from safetensors.numpy import load_file

    found = Analysis()
    try:
        found.arrays = load_file(folder / "arrays.safetensors")
        for name in TABLES:
            if (folder / f"{name}.parquet").is_file():
                frame = pandas.read_parquet(folder / f"{name}.parquet")
                setattr(found, name, frame.astype(object).where(frame.notna(), None).to_dict("records"))
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        found.tasks, found.notes = dict(about["tasks"]), list(about["notes"])
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        SafetensorError,
    ) as error:
        raise InputError(
            f"{folder}: expected the numbers that `unolora analyze` writes: {error}; write them again"
        ) from error
    return found


def _empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def _once(folders: Iterable[Path]) -> list[Path]:
    """Return the folders, each once however it is spelled."""
    return list({Path(folder).resolve(): Path(folder) for folder in folders}.values())


def _check_alike(adapters: Sequence[Adapter]) -> None:
    """Refuse runs whose layers have no counterpart in each other."""
    first = adapters[0]
    for other in adapters[1:]:
        for name in sorted(first.pairs.keys() ^ other.pairs.keys()):
            raise InputError(
                f"{other.run} adapts other projections than {first.run}: only one of them has {name}; compare runs of "
                "one backbone with the same `target_modules`"
            )
        for name, pair in first.pairs.items():
            widths, found = (f"{p.A.shape[1]} to {p.B.shape[0]}" for p in (pair, other.pairs[name]))
            if widths != found:
                raise InputError(
                    f"{other.run}: {name} maps {found}, in {first.run} {widths}; compare one backbone's runs"
                )


def _row(adapter: Adapter, projection: str, matrix: str, measure: str, value: float, task: str = "") -> Row:
    return {
        "run": adapter.run,
        "label": adapter.label,
        "seed": adapter.seed,
        "task": task or adapter.task,
        "projection": projection,
        "layer": layer_of(projection),
        "kind": kind_of(projection),
        "matrix": matrix,
        "shape": _shape(getattr(adapter.pairs[projection], matrix)) if matrix in "AB" else "",
        "measure": measure,
        "value": float(value),
    }


def _shape(matrix: Array) -> str:
    return " x ".join(map(str, matrix.shape))


# ---------------------------------------------------------------- each adapter


def _measure(adapter: Adapter, found: Analysis) -> None:
    if adapter.started:
        for projection, pair in adapter.pairs.items():
            for measure, value in _way(pair).items():
                found.table.append(_row(adapter, projection, "A", measure, value))
    for matrix in "AB":
        matrices = [getattr(pair, matrix) for pair in adapter.pairs.values()]
        for projection, each in zip(adapter.pairs, matrices, strict=True):
            for measure, value in numbers.measures(each).items():
                found.table.append(_row(adapter, projection, matrix, measure, value))
        values = [numbers.singular_values(each) for each in matrices]
        longest = max(map(len, values))
        padded = np.stack([np.pad(each, (0, longest - len(each))) for each in values])  # [P, R]
        found.arrays[f"{adapter.name}/{matrix}/singular values"] = padded
        found.arrays[f"{adapter.name}/{matrix}/eigenvalues"] = np.square(padded)
        found.arrays[f"{adapter.name}/{matrix}/correlations"] = numbers.correlations(matrices)


def _way(pair: Pair) -> dict[str, float]:
    """Say how far A is from its start."""
    assert pair.start is not None
    start, end = (numbers.basis(each, rows=True) for each in (pair.start, pair.A))
    return {
        "distance from its start / norm of the start": float(np.linalg.norm(pair.moved) / np.linalg.norm(pair.start)),
        "overlap with its start": numbers.overlap(start, end),
    }


def _place(adapters: Sequence[Adapter], found: Analysis) -> None:
    """Put the matrices of all adapters into one plane; those of another shape into another."""
    for matrix in "AB":
        shapes: dict[str, list[tuple[Adapter, str]]] = {}
        for adapter in adapters:
            for projection, pair in adapter.pairs.items():
                shapes.setdefault(_shape(getattr(pair, matrix)), []).append((adapter, projection))
        for shape, owners in shapes.items():
            coordinates, shares = numbers.pca([getattr(a.pairs[name], matrix) for a, name in owners])
            key = f"pca/{matrix}/{shape}"
            found.arrays |= {f"{key}/coordinates": coordinates, f"{key}/share of variance": shares}
            for (adapter, projection), place in zip(owners, coordinates, strict=True):
                for axis, value in enumerate(place, start=1):
                    found.table.append(_row(adapter, projection, matrix, f"principal component {axis}", value))


# ---------------------------------------------------------------- pairs of adapters

Pairing = tuple[str, str, Adapter, Adapter]  # the labels, what sets the two apart, and they


def _pairs(ours: Sequence[Adapter], theirs: Sequence[Adapter]) -> list[Pairing]:
    found = [_pairing(one, other) for one, other in itertools.combinations(ours, 2)]
    found += [_pairing(one, other) for one in ours for other in theirs]
    return [pairing for pairing in found if pairing is not None]


def _pairing(one: Adapter, other: Adapter) -> Pairing | None:
    """Say what sets two adapters apart; None for two tasks of two runs, which differ in more than one way."""
    if one.label == other.label and one.task != other.task:
        return (one.label, "between tasks", one, other) if one.run == other.run else None
    if one.task and other.task and one.task != other.task:
        return None
    labels = one.label if one.label == other.label else f"{one.label} / {other.label}"
    return labels, "same seed" if one.seed == other.seed else "between seeds", one, other


def _compare(pairs: Sequence[Pairing], found: Analysis, random: np.random.Generator) -> None:
    groups: dict[tuple[str, str], list[tuple[Adapter, Adapter]]] = {}
    for labels, relation, one, other in pairs:
        groups.setdefault((labels, relation), []).append((one, other))
    for (labels, relation), group in groups.items():
        units = [(one.seed, other.seed) for one, other in group]
        head = {"label": labels, "relation": relation, "pairs": len(group), "seeds": len(set(sum(units, ())))}
        corrected = {}
        started = all(adapter.started for pair in group for adapter in pair)
        for matrix in MATRICES:
            if matrix == MOVED and not started:
                continue
            row, corrected[matrix] = _overlap(group, units, matrix, random)
            found.comparisons.append(head | {"matrix": matrix} | row)
        for matrix in [name for name in corrected if name != "B"]:
            mean, half = numbers.pair_interval(list(corrected[matrix] - corrected["B"]), units)
            found.comparisons.append(head | {"matrix": f"{matrix} - B", "above chance": mean, "above chance ±": half})
    if any(relation == "same seed" for _, relation in groups):
        found.notes.append(
            "Runs of the same seed may start from the same A: overlap between them also says how little A has moved."
        )


def _overlap(
    group: Sequence[tuple[Adapter, Adapter]], units: Sequence[tuple[int, int]], matrix: str, random: np.random.Generator
) -> tuple[Row, Array]:
    """Return a row of the comparisons, and each pair's overlap above chance."""
    first = group[0][0]
    bases = {id(a): _bases(a, matrix) for pair in group for a in pair}
    order = {key: number for number, key in enumerate(bases)}
    names = list(first.pairs)
    kinds = [(kind_of(name), bases[id(first)][place].shape[0]) for place, name in enumerate(names)]
    tables, chances, correlation, null = [], [], [], np.zeros(DRAWS)
    pools: dict[tuple[int, int, int], Array] = {}
    for one, other in group:
        ours, theirs = bases[id(one)], [bases[id(other)][list(other.pairs).index(name)] for name in one.pairs]
        tables.append((order[id(one)], order[id(other)], numbers.overlaps(ours, theirs)))
        sizes = [(a.shape[0], a.shape[1], b.shape[1]) for a, b in zip(ours, theirs, strict=True)]
        chances.append(np.mean([numbers.expected_overlap(*size) for size in sizes]))
        for size in sizes:
            if size not in pools:
                pools[size] = numbers.random_overlaps(*size, DRAWS, random) if min(size) else np.full(DRAWS, np.nan)
            null += random.choice(pools[size], DRAWS) / (len(sizes) * len(group))
        correlation.append(_correlation(one, other, matrix))
    values = np.array([np.diagonal(table).mean() for _, _, table in tables])  # NaN where a B is zero
    chance = np.array(chances)
    above = (values - chance) / (1 - chance)
    overlap, corrected = numbers.pair_interval(list(values), units), numbers.pair_interval(list(above), units)
    known = not np.isnan(overlap.mean)
    low, high = np.quantile(null, (0.025, 0.975))
    row: Row = {
        "overlap": overlap.mean,
        "overlap ±": overlap.half,
        "random": float(chance.mean()),
        "random low": float(low),
        "random high": float(high),
        "p (random)": numbers.p_value(overlap.mean, null) if known else None,
        "p (layers)": numbers.p_value(overlap.mean, numbers.permuted_means(tables, kinds, DRAWS, random))
        if known
        else None,
        "above chance": corrected.mean,
        "above chance ±": corrected.half,
        "correlation": float(np.mean(correlation)),
    }
    return row, above


def _bases(adapter: Adapter, matrix: str) -> list[Array]:
    take, rows = MATRICES[matrix]
    return [numbers.basis(take(pair), rows=rows) for pair in adapter.pairs.values()]


def _correlation(one: Adapter, other: Adapter, matrix: str) -> float:
    """Return the mean over projections of the correlation, entry by entry; NaN where the ranks differ."""
    take, _ = MATRICES[matrix]
    pairs = [(take(pair), take(other.pairs[name])) for name, pair in one.pairs.items()]
    return float(np.mean([numbers.correlations([a], [b])[0, 0] for a, b in pairs]))


# ---------------------------------------------------------------- scales and gradients


def _of_rows(run: Run, adapter: Adapter, rows: int, found: Analysis) -> None:
    splits = encoded(run, "validation", rows, answers=True)
    found.arrays[f"{adapter.run}/gradients/cosines"] = gradient_cosines(run, splits)
    if run.settings.method == "unolora" and run.settings.adapter.conditioning != "none":
        _scales(adapter, scales(run, splits), found)


def _scales(adapter: Adapter, of_tasks: Mapping[str, Array], found: Analysis) -> None:
    s, tasks = (
        np.concatenate(list(of_tasks.values())),
        np.repeat(np.arange(len(of_tasks)), [*map(len, of_tasks.values())]),
    )
    means, spreads = (np.stack([how(part, axis=0) for part in of_tasks.values()]) for how in (np.mean, np.std))
    between, within = numbers.variances(s, tasks)
    off, shares = numbers.switched_off(means), numbers.task_shares(between, within)
    found.arrays |= {
        f"{adapter.run}/s/{what}": value
        for what, value in {
            "mean": means,
            "spread over samples": spreads,
            "variance between tasks": between,
            "variance within tasks": within,
            "switched off": off.astype(np.uint8),
            "linkage of tasks": numbers.linkage(means),
        }.items()
    }
    for place, projection in enumerate(adapter.pairs):
        for row, task in enumerate(of_tasks):
            of_task: Mapping[str, float] = {
                "mean scale": means[row, place].mean(),
                "spread over samples": spreads[row, place].mean(),
                "ranks switched off": off[row, place].sum(),
            }
            found.table += [_row(adapter, projection, "s", what, value, task) for what, value in of_task.items()]
        of_all = {
            "spread between tasks": np.sqrt(between[place]).mean(),
            "spread within tasks": np.sqrt(within[place]).mean(),
            "share of variance between tasks": shares[place].mean(),
        }
        found.table += [_row(adapter, projection, "s", what, value) for what, value in of_all.items()]


# ---------------------------------------------------------------- over seeds


def _summarise(found: Analysis) -> None:
    """Average each measure over projections, then over the runs of a method."""
    groups: dict[tuple[str, str, str, str], dict[str, list[float]]] = {}
    for row in found.table:
        if not row["measure"].startswith("principal"):
            key = (row["label"], row["task"], row["matrix"], row["measure"])
            groups.setdefault(key, {}).setdefault(row["run"], []).append(row["value"])
    for (label, task, matrix, measure), of_runs in groups.items():
        mean, half = numbers.interval([float(np.mean(values)) for values in of_runs.values()])
        found.summary.append(
            {"label": label, "task": task, "matrix": matrix, "measure": measure, "mean": mean, "±": half}
            | {"runs": len(of_runs)}
        )
