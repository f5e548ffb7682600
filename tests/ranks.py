"""What one of several processes does in test_processes: trains a few runs, and says what became of them.

    RANK=... WORLD_SIZE=... python ranks.py JOBS.json FOLDER

JOBS is a list of {"settings": ..., "resume": ..., "at": STEP, "do": ACTION}; job k of rank r writes FOLDER/k-r.json.
"""

import faulthandler
import json
import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

import conftest  # noqa: F401  # threads, offline
import tiny
from unolora import processes, recovery, runs, training
from unolora.settings import from_dict

RANK = int(os.environ.get("RANK", "0"))


def die():
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def ask():
    if RANK == 1:  # nobody tells the others
        signal.raise_signal(signal.SIGTERM)


def fill_disk():
    def full(*_):
        raise OSError(28, "No space left on device")

    if RANK == 0:
        recovery.save_tensors = full


def fail():
    if RANK == 1:
        raise ValueError("something that only one rank meets")


ACTIONS = {"die": die, "ask": ask, "fill_disk": fill_disk, "fail": fail}


class Watch(tiny.Watch):
    """Does something at a step, and notes what DDP reduces."""

    def __init__(self, trainer, job):
        super().__init__(lambda step: ACTIONS[job["do"]]() if step == job.get("at") else None)
        self.trainer, self.reduced = trainer, []

    def on_train_begin(self, args, state, control, **kwargs):
        model = self.trainer.model_wrapped
        if hasattr(model, "register_comm_hook"):
            names = {id(parameter): name for name, parameter in self.trainer.model.named_parameters()}

            def hook(_, bucket):
                self.reduced.append([names[id(parameter)] for parameter in bucket.parameters()])
                future = dist.all_reduce(bucket.buffer().div_(args.world_size), async_op=True).get_future()
                return future.then(lambda done: done.value()[0])

            model.register_comm_hook(None, hook)


def fsdp_on_a_processor():
    """Accelerate knows FSDP2 for accelerators only; torch's part of it runs on gloo as well."""
    real = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        real(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = init


def main():
    faulthandler.dump_traceback_later(int(os.environ.get("PATIENCE", "380")), exit=True)  # says where a rank waits
    if os.environ.get("ACCELERATE_USE_FSDP"):
        fsdp_on_a_processor()
    for number, job in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        found, watches = {"error": None}, []
        recovery.save_tensors = runs.save_tensors

        def progress(label, trainer, job=job, watches=watches):
            watches.append(Watch(trainer, job))
            return watches[-1]

        try:
            training.train(from_dict(job["settings"]), resume=job.get("resume", False), progress=progress)
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {error}"
        for watch in watches:
            trainer = watch.trainer
            found["wrapped"] = type(trainer.model_wrapped).__name__
            found["in_parts"] = all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
            found["trained"] = sorted(name for name, p in trainer.model.named_parameters() if p.requires_grad)
            found["reduced"] = watch.reduced
        Path(sys.argv[2], f"{number}-{RANK}.json").write_text(json.dumps(found))
    processes.stop()


if __name__ == "__main__":
    main()
