"""What a run goes on from: its checkpoints, whole or recognised as not, and the last one that is good.

RUN/checkpoints/
  step-000500/  weights.safetensors  optimizer.safetensors  trainer_state.json  state.json  metrics.jsonl  manifest.json
  best-000400/  weights.safetensors  state.json  manifest.json

A folder gets its name when all of it is on the disk, and its manifest holds the length and the SHA-256 of each file. So
one that is torn, cut, changed, or of another run is told apart before anything of it is used. The log travels with a
checkpoint, so that a resumed run has each line once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerState

from unolora.atomic import explained, new_folder, sweep, write_json
from unolora.errors import CheckpointError
from unolora.runs import save_tensors
from unolora.settings import Settings, flat
from unolora.tasks.files import one_line

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
LOG = "metrics.jsonl"
UNCHANGING = ("output", "overwrite", "baselines", "data.root", "training.keep_checkpoints", "training.report_to")
"""Settings that may change while a run is stopped: the training does not depend on them."""


class OtherSettingsError(CheckpointError):
    """A checkpoint goes with settings that the run no longer has."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one method of a run.

    Args:
        run: The method's folder.
        identity: What must be the same for a checkpoint to be of this run: `settings` (see `fingerprint`), `method` and
            the digests of the `data`.
        keep: How many stay, the newest ones. With each stays what was the best when it was written.
    """

    run: Path
    identity: Mapping[str, Any]
    keep: int = 2

    @property
    def folder(self) -> Path:
        """Where they lie."""
        return self.run / "checkpoints"

    def step(self, step: int) -> Path:
        """Return the checkpoint of a step, which need not be there."""
        return self.folder / f"step-{step:06d}"

    def best(self, step: int) -> Path:
        """Return the weights that were the best when step `step` was scored."""
        return self.folder / f"best-{step:06d}"

    def write_best(self, step: int, weights: Mapping[str, Any], scores: Mapping[str, Any]) -> None:
        """Write the best weights so far.

        Raises:
            InputError: They can't be written; those before are whole.
        """
        with new_folder(self.best(step)) as folder:
            save_tensors(weights, folder / "weights.safetensors")
            write_json(folder / "state.json", {"step": step, "validation": scores})
            seal(folder)

    def write(
        self,
        step: int,
        weights: Mapping[str, Any],
        moments: Mapping[str, Any],
        state: Mapping[str, Any],
        save_trainer_state: Callable[[str], None],
    ) -> None:
        """Write the checkpoint of a step, and remove what is no longer needed.

        Args:
            step: Steps taken.
            weights: All that training changes.
            moments: The optimiser's, by "PARAMETER.NAME".
            state: What else the trainer keeps, as JSON.
            save_trainer_state: Writes the Trainer's own state to the file it is given.

        Raises:
            InputError: It can't be written; those before are whole.
        """
        with new_folder(self.step(step)) as folder:
            save_tensors(weights, folder / "weights.safetensors")
            save_tensors(moments, folder / "optimizer.safetensors")
            save_trainer_state(str(folder / "trainer_state.json"))
            write_json(folder / "state.json", {"step": step, **state, **self.identity})
            log = self.run / LOG
            if log.exists():
                shutil.copyfile(log, folder / LOG)
            seal(folder)
        self._prune()

    def last_good(self) -> Path | None:
        """Return the newest checkpoint that is whole and of this run, or None if there is none at all.

        Newer ones that are not are named in a warning and put aside as `step-N.damaged`.

        Raises:
            CheckpointError: There are checkpoints, and none of them is good.
        """
        sweep(self.folder)
        bad: list[tuple[Path, CheckpointError]] = []
        for path in reversed(found(self.run)):
            try:
                self._check(path)
            except CheckpointError as error:
                bad.append((path, error))
                continue
            for damaged, reason in bad:
                logger.warning("%s; going on from %s", reason, path.name)
                with explained(damaged):
                    aside = damaged.with_name(f"{damaged.name}.damaged")
                    shutil.rmtree(aside, ignore_errors=True)
                    os.replace(damaged, aside)
            return path
        for _, reason in bad:
            if isinstance(reason, OtherSettingsError):
                raise reason
        if bad:
            raise CheckpointError(f"{bad[0][1]}; no good checkpoint is left: delete {self.folder} to start over")
        return None

    def restore_log(self, checkpoint: Path) -> None:
        """Put the log back to what it was when a checkpoint was written: later lines are written again."""
        kept, log = checkpoint / LOG, self.run / LOG
        with explained(log):
            if kept.exists():
                temporary = log.with_name(f".{LOG}.00000000")
                shutil.copyfile(kept, temporary)
                os.replace(temporary, log)
            else:
                log.unlink(missing_ok=True)

    def _check(self, path: Path) -> None:
        """Check one checkpoint, and the best weights that belong to it.

        Raises:
            CheckpointError: It is not whole, or of another run.
        """
        check(path)
        state = read_json(path / "state.json", *self.identity)
        check_settings(path, state["settings"], self.identity["settings"])
        for name in self.identity.keys() - {"settings"}:
            if state[name] != self.identity[name]:
                raise CheckpointError(f"{path}: of another run, trained on other data or by another method")
        best = _best_step(path)
        if best is not None:
            check(self.best(best))

    def _prune(self) -> None:
        kept = found(self.run)[-self.keep :]
        best = set()
        for path in kept:
            step = _best_step(path)
            best |= set() if step is None else {self.best(step)}
        for path in [*found(self.run), *self.folder.glob("best-*")]:
            if path not in kept and path not in best:
                shutil.rmtree(path, ignore_errors=True)


def found(run: Path) -> list[Path]:
    """Return a run's checkpoints, good or not, in the order of their steps."""
    paths = [path for path in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(paths, key=lambda path: int(path.name.removeprefix("step-")))


def seal(folder: Path) -> None:
    """Write the manifest of a folder: of each file its length in bytes and its SHA-256."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST and not path.name.startswith(".")
    }
    write_json(folder / MANIFEST, {"files": files, "sha256": _sha256_of(files)})


def check(folder: Path) -> None:
    """Check a folder against its manifest.

    Raises:
        CheckpointError: A file lacks, is longer or shorter, or holds something else; or the folder has no manifest.
    """
    manifest = read_json(folder / MANIFEST, "files", "sha256")
    files = manifest["files"]
    if not isinstance(files, dict) or not files or manifest["sha256"] != _sha256_of(files):
        raise CheckpointError(f"{folder / MANIFEST}: damaged: expected the list of files that a run writes")
    for name, wanted in files.items():
        path = folder / name
        if Path(name).name != name or not isinstance(wanted, dict):  # a name may not lead out of the folder
            raise CheckpointError(f"{folder / MANIFEST}: damaged: expected the list of files that a run writes")
        try:
            size, digest = path.stat().st_size, _sha256(path)
        except OSError as error:
            raise CheckpointError(f"{path}: can't be read ({error.strerror})") from error
        if size != wanted.get("bytes"):
            raise CheckpointError(f"{path}: expected {wanted.get('bytes')} bytes, found {size}")
        if digest != wanted.get("sha256"):
            raise CheckpointError(f"{path}: damaged: it has another SHA-256 than when it was written")


def read_json(path: Path, *needed: str) -> dict[str, Any]:
    """Read a JSON file that must hold some keys.

    Raises:
        CheckpointError: It can't be read or lacks one.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{path}: can't be read ({reason})") from error
    if not isinstance(data, dict) or not data.keys() >= set(needed):
        raise CheckpointError(f"{path}: expected {', '.join(needed)}")
    return data


def fingerprint(settings: Settings) -> dict[str, Any]:
    """Return what must be the same for a run to go on as if it had not stopped: `section.name` -> value."""
    kept = {name: value for name, value in flat(settings).items() if name not in UNCHANGING}
    return dict(json.loads(json.dumps(kept)))


def check_settings(source: Path, kept: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compare two fingerprints.

    Raises:
        OtherSettingsError: They differ; the message says in what.
    """
    odd = sorted(name for name in now.keys() | kept.keys() if now.get(name) != kept.get(name))
    if odd:
        raise OtherSettingsError(
            f"{source}: written with other settings ({', '.join(odd)}); resume with those of the run's own config.yaml"
        )


def _best_step(checkpoint: Path) -> int | None:
    """Return the step of the best weights that belong to a checkpoint."""
    path = checkpoint / "trainer_state.json"
    try:
        state = TrainerState.load_from_json(str(path))
        return None if state.best_global_step is None else int(state.best_global_step)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: expected the state of a Trainer ({one_line(error)})") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_of(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
