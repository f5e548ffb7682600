"""Scripts that measure: their tables come from the scores that are kept, and docs/ shows these tables."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "scripts"))
import auto_accuracy  # noqa: E402
import few_shot  # noqa: E402
import measured  # noqa: E402
import readme_tables  # noqa: E402
import zero_shot  # noqa: E402

PAGE = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")


def auto_table(scores):
    return auto_accuracy.table(list(dict.fromkeys(key.split()[0] for key in scores)), scores)


@pytest.mark.parametrize(
    ("name", "table"), [("few-shot", few_shot.table), ("zero-shot", zero_shot.table), ("auto", auto_table)]
)
def test_tables_are_what_the_scores_give(name, table):
    assert f"<!-- table: {name} -->" in PAGE
    folder = ROOT / "results" / name
    if not folder.is_dir():
        pytest.skip(f"results/{name} is not in this checkout")
    assert (folder / "table.md").read_text(encoding="utf-8") == table(measured.read(folder))
    assert readme_tables.filled(PAGE, ROOT / "results") == PAGE


def test_few_shot_cells_are_means_and_deviations_over_draws():
    found = {
        f"{method} {size} {draw}": size / 100 + draw / 10
        for method in few_shot.METHODS
        for size in (16, 4)
        for draw in range(3)
    }
    lines = few_shot.table(found).splitlines()
    assert lines[0] == "| | learning rate | 4 examples | 16 examples |"
    assert lines[3] == "| LoRA from scratch | 0.003 | 0.140 ± 0.100 | 0.260 ± 0.100 |"


def test_zero_shot_cells_are_means_over_draws_and_seeds():
    names = ("description", "mean", "nearest", "trained on 16", "no adapter", "old a", "old b")
    of_n = {name: [0.1 * place, 0.1 * place + 0.02] for place, name in enumerate(names)}
    more = {name: [value + 0.1 for value in values] for name, values in of_n.items()}
    found = {"spam 0": {"16": of_n, "128": of_n}, "spam 1": {"16": more, "128": more}}
    cells = zero_shot.table(found).splitlines()[2].strip("| ").split(" | ")
    assert cells[0] == "spam, 16"
    ways = ("description", "mean", "nearest", "trained on 16", "old b", "old a", "no adapter")
    wanted = [np.mean(of_n[name]) + 0.05 for name in ways]
    assert [float(cell) for cell in cells[1:]] == pytest.approx(wanted, abs=6e-4)
    assert "ahead" not in zero_shot.table(found)  # one task has no interval

    higher = {name: [value + 0.3 * (name == "description") for value in of] for name, of in of_n.items()}
    found["movies 0"] = {"16": higher, "128": of_n}
    cells = zero_shot.table(found).splitlines()[-2].strip("| ").split(" | ")
    assert cells[:3] == ["description ahead of it, 16", "\u2013", "+0.050 ± 1.906"]  # of -0.1 and +0.2


def test_scores_that_are_damaged_are_not_lost(tmp_path):
    assert measured.read(tmp_path) == {}
    measured.write(tmp_path / "out", {"a": 1.5})
    assert measured.read(tmp_path / "out") == {"a": 1.5}
    path = tmp_path / "out" / measured.SCORES
    path.write_text(json.dumps({"a": 1.5})[:-2])
    with pytest.raises(SystemExit, match=r"scores\.json: expected the scores measured so far .*; delete it to measure"):
        measured.read(tmp_path / "out")
    assert path.read_text() == '{"a": 1.'
