"""The examples that are scripts."""

import importlib.util
from pathlib import Path

import pytest

from unolora import InputError

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_image_tasks_on_a_vit(tmp_path):
    images = example("images")
    train, test = images.rows()
    seen = {row["pixel_values"].numpy().tobytes() for row in train}
    assert len(train) + len(test) == 2 * 1797
    assert sum(row["pixel_values"].numpy().tobytes() in seen for row in test) < 10, "the data repeats a few itself"
    accuracies = images.main(steps=60, output=str(tmp_path))
    assert set(accuracies) == {"upright", "turned"}
    assert min(accuracies.values()) > 0.6, accuracies
    model = images.adapted()
    with pytest.raises(InputError, match="unknown task 'turn'; did you mean 'turned'"):
        model(pixel_values=test[0]["pixel_values"].unsqueeze(0), tasks="turn")
