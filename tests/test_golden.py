"""The losses of four steps of each method on query and value, and of some on BERT's own default, on record.

To renew them after a change that is meant to shift them, say so in the change and run

    python -c "import sys; sys.path.insert(0, 'tests'); import test_golden; test_golden.renew()"
"""

import pytest

import conftest  # noqa: F401  # threads, offline
import tiny
from unolora import training

TOLERANCE = 2e-4

GOLDEN = {
    "c-poly": [0.75404, 0.88392, 1.72893, 1.01694],
    "full": [0.75404, 1.22952, 1.87599, 1.49771],
    "full-per-task": [0.75404, 1.93382, 3.59831, 1.56280],
    "heads-only": [0.75404, 0.88634, 1.69590, 1.02048],
    "hyperformer": [0.75850, 0.98358, 1.00078, 2.10934],
    "ia3": [0.75404, 0.88260, 1.72096, 1.01956],
    "lora-matched": [0.75404, 0.85761, 1.81239, 1.01839],
    "lora-per-task": [0.75404, 0.84571, 1.86920, 1.00105],
    "lora-shared": [0.75404, 0.87819, 1.76930, 1.01123],
    "mtl-lora": [0.75404, 0.85995, 1.88936, 1.01632],
    "poly": [0.75404, 0.88607, 1.70053, 1.02007],
    "prompt-tuning": [0.82410, 0.91439, 1.70333, 0.97943],
    "unolora": [0.75404, 0.89020, 1.73748, 1.02380],
}
DEFAULT = {
    "lora-shared": [0.75404, 0.86849, 1.82074, 1.02034],
    "unolora": [0.75404, 0.87913, 1.84268, 1.01210],
}


def losses(method, folder, targets="query-value"):
    settings = tiny.settings(
        folder,
        method=method,
        backbone=str(tiny.backbone(dropout=0.0)),  # no dropout: its masks may differ between releases of torch
        adapter={"r": 4, "dropout": 0.0, "target_modules": targets},
        training={"steps": 4, "log_every": 1, "evaluate_every": 4, "checkpoint_every": 4, "schedule": "constant"},
    )
    return [line["loss"] for line in tiny.lines(training.train(settings)) if line["kind"] == "train"]


def renew():
    for record, targets in ((GOLDEN, "query-value"), (DEFAULT, None)):
        for method in record:
            values = ", ".join(f"{loss:.5f}" for loss in losses(method, tiny.folder() / method, targets))
            print(f'    "{method}": [{values}],')  # noqa: T201


@pytest.mark.parametrize("method", tiny.METHODS)
def test_the_losses_are_those_on_record(method, tmp_path):
    assert len({tuple(values) for values in GOLDEN.values()}) == len(tiny.METHODS), "methods can't be told apart"
    assert losses(method, tmp_path / "run") == pytest.approx(GOLDEN[method], abs=TOLERANCE)


@pytest.mark.parametrize("method", DEFAULT)
def test_the_losses_of_the_default_projections_are_those_on_record(method, tmp_path):
    assert DEFAULT[method] != pytest.approx(GOLDEN[method], abs=10 * TOLERANCE)
    assert losses(method, tmp_path / "run", None) == pytest.approx(DEFAULT[method], abs=TOLERANCE)
