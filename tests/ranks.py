"""What one of several processes does in test_processes: trains a few runs, and says what became of them.

    torchrun --nproc-per-node N ranks.py JOBS.json

JOBS is a list of {"settings": ..., "resume": ..., "fsdp": ..., "at": STEP, "do": ...}.
"""

import faulthandler
import json
import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist
from accelerate import PartialState
from torch.distributed.tensor import DTensor

import conftest  # noqa: F401  # threads, offline
import tiny
from unolora import training
from unolora.settings import from_dict

RANK = int(os.environ.get("RANK", "0"))
SEEN: dict = {}


def watch(job):
    def progress(label, trainer):
        SEEN["it"] = trainer

        def do(step):
            if step == job.get("at"):
                ACTIONS[job["do"]]()

        return tiny.Watch(do)

    return progress


def die():
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def ask():
    if RANK == 1:  # the others are not told by anybody else
        signal.raise_signal(signal.SIGTERM)


def break_disk():
    if RANK == 0:
        from unolora import recovery

        def full(*_):
            raise OSError(28, "No space left on device")

        recovery.save_tensors = full


ACTIONS = {"die": die, "ask": ask, "break_disk": break_disk}


def fsdp_on_a_processor():
    """Accelerate knows FSDP2 for accelerators only; torch's part of it runs on gloo as well."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    real = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        real(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = init


def main():
    faulthandler.dump_traceback_later(40, exit=True)  # a rank that waits for ever says where
    out = Path(sys.argv[2])
    if os.environ.get("ACCELERATE_USE_FSDP"):
        fsdp_on_a_processor()
    for number, job in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        found = {"error": None}
        try:
            training.train(from_dict(job["settings"]), resume=job.get("resume", False), progress=watch(job))
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {error}"
        trainer = SEEN.pop("it", None)
        if trainer is not None:
            found["wrapped"] = type(trainer.model_wrapped).__name__
            found["parts"] = sum(isinstance(p, DTensor) for p in trainer.model.parameters())
        (out / f"{number}-{RANK}.json").write_text(json.dumps(found))
    if dist.is_initialized():
        PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
