"""scripts/method_tables.py: differences, verdicts and rates are read from results/, and docs/method.md shows them."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from unolora import compare

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "scripts"))
import method_tables  # noqa: E402
import readme_tables  # noqa: E402

BASE = {0: 0.5, 1: 0.6, 2: 0.7}


def write(folder, name, by_seed, split="validation", **adapter):
    """Finished runs of a method with these averages."""
    for seed, value in by_seed.items():
        run = folder / f"{name}-seed{seed}"
        run.mkdir(parents=True)
        found = {"averages": {method_tables.AVERAGE: {split: value}}, "parameters": {"per_task_percent": 0.0539}}
        found["tasks"] = [
            {"name": task, "score_metric": "f1", "metrics": {"validation": {"f1": value * sign, "accuracy": 9}}}
            for task, sign in (("up", 1), ("down", -1))
        ]
        (run / "results.json").write_text(json.dumps(found))
        own = {"adapter": {"r": 8, **adapter}, "training": {"seed": seed, "steps": 3}}
        config = {"method": "unolora", "tasks": ["spam"], **own}
        (run / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture
def ablations(tmp_path):
    """A better, a worse, an unclear and a single-seed row of the suite that comes along."""
    folder = tmp_path / "arena-ablations"
    write(folder, "base", BASE)
    write(folder, "gate", {0: 0.53, 1: 0.631, 2: 0.729}, scale_gate=True)
    write(folder, "start-paper", {0: 0.4, 1: 0.501, 2: 0.599}, scale_init="paper")
    write(folder, "rank-2", {0: 0.6, 1: 0.5, 2: 0.71}, r=2)
    write(folder, "rank-4", {1: 0.9}, r=4)
    return folder


def cells(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_differences_are_paired_by_seed(ablations):
    head, rule, *rows = cells(method_tables.paired(ablations, "validation", "base"))
    assert head[2:5] == ["trained % a task", "validation average", "difference to base"]
    assert set(rule) == {"---"}
    assert [row[0] for row in rows] == ["base", "gate", "start-paper", "rank-2", "rank-4"], "the suite's order"
    by_name = {row[0]: row for row in rows}
    expected = compare.interval([0.53 - 0.5, 0.631 - 0.6, 0.729 - 0.7])
    assert by_name["gate"][1:] == [
        "scale_gate=True", "0.0539", "0.6300", f"+{expected.mean:.4f} ± {expected.half:.4f}", "better", "0, 1, 2",
    ]  # fmt: skip
    assert expected.half < 0.003, "paired: the seeds themselves differ by 0.1"
    assert by_name["start-paper"][5] == "worse"
    assert by_name["rank-2"][5] == "open"
    assert by_name["rank-4"][4:] == ["+0.3000, one seed", "open", "1"]
    assert by_name["base"][1:6] == [compare.NOTHING, "0.0539", "0.6000", compare.NOTHING, compare.NOTHING]


def test_differences_task_by_task(tmp_path):
    folder = tmp_path / "arena-ablations"
    write(folder, "gate", {0: 0.5, 1: 0.7, 7: 0.9})
    write(folder, "base", {0: 0.4, 1: 0.5})
    head, _, *rows = cells(method_tables.by_task(folder, "gate", "base"))
    assert head[1] == "gate less base, seeds 0, 1"
    assert [row[0] for row in rows] == ["up", "down"]
    assert rows[0][1].startswith("+0.1500 ± ")
    assert rows[1][1].startswith("-0.1500 ± ")
    assert method_tables.by_task(folder, "gate", "rank-2") == "not measured yet\n"


def test_what_was_not_measured_is_said_to_be_so(ablations, tmp_path):
    rows = cells(method_tables.defaults(ablations))[2:]
    told = {row[0]: row[3] for row in rows}
    assert told["start of the scale"].startswith("-0.1000 ± ")
    assert told["batches"] == told["learning rate"] == "not measured yet"
    write(ablations, "query-value", {0: 0.41, 1: 0.52}, r=16)
    assert cells(method_tables.defaults(ablations))[2][3] == "not measured yet", "its other row lacks"
    write(ablations, "feed-forward-output", {0: 0.51, 1: 0.61}, r=14)
    assert cells(method_tables.defaults(ablations))[2][3].startswith("-0.0950 ± ")
    assert method_tables.tuning(tmp_path) == "not measured yet\n"
    assert method_tables.paired(tmp_path / "arena", "test", "unolora-star") == "not measured yet\n"
    assert {row[3] for row in cells(method_tables.defaults(tmp_path / "none"))[2:]} == {"not measured yet"}


def test_chosen_rates(tmp_path):
    methods = {
        "one": {"chosen": 0.003, "validation": {"0.001": 0.25, "0.003": 0.5, "0.01": None}},
        "two": {"chosen": 0.01, "validation": {"0.001": 0.25, "0.01": 0.5}},
        "three": {"chosen": None, "validation": {"0.001": 0.25, "0.01": None}},
    }
    (tmp_path / "tuning.json").write_text(json.dumps({"seed": 4, "methods": methods}))
    head, _, *rows = cells(method_tables.tuning(tmp_path))
    assert "seed 4" in head[1]
    assert [row[2] for row in rows] == ["0.003", "0.01 (at the edge)", "not measured yet"]
    assert rows[0][1] == "0.001: 0.2500, 0.003: 0.5000, 0.01: no score"


def test_rows_of_the_defaults_are_in_the_suite():
    suite = yaml.safe_load((ROOT / "configs" / "arena-ablations.yaml").read_text(encoding="utf-8"))
    named = {name for *_, names in method_tables.DEFAULTS for name in names or ()}
    assert len(named) > 3
    assert named <= suite["methods"].keys()


def test_the_page_shows_what_the_results_give():
    page = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    named = [place[2] for place in readme_tables.PLACE.finditer(page)]
    assert sorted(named) == [
        "arena-ablations/defaults",
        "arena-ablations/paired",
        "arena-ablations/places",
        "arena/paired",
        "arena/tuning",
    ]
    results = ROOT / "results"
    if not results.is_dir():
        pytest.skip("results/ is not in this checkout")
    assert readme_tables.filled(page, results) == page
    arena, ablations = results / "arena", results / "arena-ablations"
    assert (arena / "tuning.md").read_text(encoding="utf-8") == method_tables.tuning(arena)
    assert (arena / "paired.md").read_text(encoding="utf-8") == method_tables.paired(arena, "test", "unolora-star")
    paired = method_tables.paired(ablations, "validation", "base")
    assert (ablations / "paired.md").read_text(encoding="utf-8") == paired
    assert (ablations / "defaults.md").read_text(encoding="utf-8") == method_tables.defaults(ablations)
    places = method_tables.by_task(ablations, "feed-forward-output", "query-value")
    assert (ablations / "places.md").read_text(encoding="utf-8") == places
