"""What the scripts that measure share: quiet libraries, and scores on the disk, from which they go on."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import transformers as tf

from unolora.atomic import write_json

SCORES = "scores.json"


def quiet() -> None:
    """Keep warnings and bars away from what a script prints."""
    warnings.simplefilter("ignore")
    tf.logging.set_verbosity_error()
    tf.logging.disable_progress_bar()


def read(folder: Path) -> dict[str, Any]:
    """Return the scores that are in a folder so far."""
    path = folder / SCORES
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise SystemExit(f"{path}: expected the scores measured so far ({error}); delete it to measure again") from None


def write(folder: Path, scores: dict[str, Any]) -> None:
    """Keep the scores, whole or as they were."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SCORES, scores)
