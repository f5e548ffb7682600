"""Several processes on one run, with gloo: the losses of one, who writes, and what happens when one is lost.

The slow tests start ranks as Slurm does, each a process of its own that no launcher watches.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import tiny
import tiny_text
from unolora import processes, recovery, training
from unolora.errors import InputError
from unolora.sampling import Sampler
from unolora.settings import from_dict

RANKS = Path(__file__).with_name("ranks.py")
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
PLAIN = {"adapter": {"r": 4, "dropout": 0.0}, "training": {"log_every": 1}}
RANDOM = ("poly", "c-poly")  # draw their skills anew in each forward, each rank its own


def plain(output, **changes):
    """Settings without dropout, whose masks depend on the rank."""
    return tiny.spelled(output, backbone=str(tiny.backbone(dropout=0.0)), **{**PLAIN, **changes})


def begun(folder, jobs, n, **environment):
    """Start n ranks on some jobs."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(n), **environment}
    return [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(RANKS), str(file), str(folder)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(n)},
            stderr=subprocess.PIPE,
        )
        for rank in range(n)
    ]


def ended(ranks, seconds=400):
    """Wait for ranks; returns their exit codes. None of them outlives this."""
    try:
        errors = [rank.communicate(timeout=seconds)[1].decode() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    for rank, error in zip(ranks, errors, strict=True):
        assert rank.returncode in (0, -9), error
    return [rank.returncode for rank in ranks]


def ran(folder, jobs, n, **environment):
    """What each rank says of each job: found[job][rank]."""
    assert ended(begun(folder, jobs, n, **environment)) == [0] * n
    return [[json.loads((folder / f"{k}-{rank}.json").read_text()) for rank in range(n)] for k in range(len(jobs))]


def losses(run):
    return [line["loss"] for line in tiny.lines(run) if line["kind"] == "train"]


def alike(run, other, tolerance=1e-5):
    """The losses and the scores of two runs."""
    assert len(losses(run)) > 2
    assert losses(run) == pytest.approx(losses(other), abs=tolerance)
    for line, wanted in zip(tiny.lines(run), tiny.lines(other), strict=True):
        assert {**line, "seconds": 0}.keys() == {**wanted, "seconds": 0}.keys()
        if line["kind"] == "train":
            assert line["seen"] == wanted["seen"]
            assert line["task_loss"] == pytest.approx(wanted["task_loss"], abs=tolerance)
    one, two = (tiny.results(path)["averages"]["mean_of_first_metrics"]["test"] for path in (run, other))
    assert one == pytest.approx(two, abs=1e-4)


def clean(run):
    """Nothing in a finished run is there twice or half, and it holds what one process would have written."""
    assert tiny.leftovers(run.parent) == []
    assert {path.name for path in run.iterdir()} - {"analysis"} == {  # of methods that have an A and a B
        "adapter", "config.yaml", "data.json", "environment.json", "metrics.jsonl", "predictions.json", "report.html",
        "results.json",
    }  # fmt: skip
    steps = [(line["kind"], line["step"]) for line in tiny.lines(run)]
    assert len(set(steps)) == len(steps)


# --- one process ---------------------------------------------------------------------------------------------------


def test_one_process_needs_no_others():
    assert (processes.rank(), processes.count()) == (0, 1)
    value = torch.tensor([1.0])
    assert processes.summed(value) is processes.largest(value) is processes.whole(value) is value
    assert processes.spread(value, value) is value
    assert processes.gathered([1, 2]) == [1, 2]
    assert processes.first(lambda: 3) == 3
    assert not processes.sharded(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="this one"):
        processes.first(lambda: (_ for _ in ()).throw(InputError("this one")))


def test_errors_of_one_process_are_its_own():
    with pytest.raises(RuntimeError, match="gloo has nothing to do with it"), processes.watched("go on"):
        raise RuntimeError("gloo has nothing to do with it")


def test_methods_that_run_task_by_task_are_refused_with_fsdp(tmp_path, monkeypatch):
    """Ranks would run the backbone a different number of times, and wait for each other for ever."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match=r"method 'lora-per-task' runs a batch task by task.*; use DDP"):
        training.train(tiny.settings(tmp_path / "run", method="lora-per-task"))
    assert list(tmp_path.iterdir()) == []


def test_a_batch_that_ranks_can_not_share_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 3)
    monkeypatch.setattr(processes, "first", lambda function: function())
    with pytest.raises(InputError, match="can't be cut into equal parts for 3 processes"):
        training.train(tiny.settings(tmp_path / "run"))


def test_layers_are_the_units_and_embeddings_are_not():
    settings = tiny.settings()
    for folder, name in ((settings.backbone, "BertLayer"), (str(tiny_text.backbone("t5")), "T5Block")):
        changed = from_dict(tiny.spelled(backbone=folder, tasks=tiny_text.tasks()))
        model, _ = training.build(changed, "unolora", training.load_data(changed))
        assert processes.layers(model) == [name]


def test_deepspeed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(InputError, match=r"DeepSpeed alone can write its part of a checkpoint.*; use DDP or FSDP2"):
        training.train(tiny.settings(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


CONFIGS = sorted(Path(__file__).parents[1].glob("configs/accelerate/*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_are_what_accelerate_reads(path):
    """Its own reader refuses a key that it does not know; the launcher must take what it gives."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(path))
    spelled = yaml.safe_load(path.read_text())
    for name, value in spelled.items():
        assert getattr(getattr(config, name), "value", getattr(config, name)) == value, name
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "-m", "unolora", "train"])
    for section in ("fsdp_config", "deepspeed_config"):
        for name in spelled.get(section, {}):
            assert hasattr(arguments, name), f"accelerate has no --{name}"
    wanted = {"1-gpu": 1, "8-gpus": 8, "2-nodes": 16, "fsdp2": 8, "deepspeed-zero2": 8}
    assert config.num_processes == wanted.pop(path.stem)
    assert {other.stem for other in CONFIGS} == {path.stem, *wanted}


# --- several -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ranks_train_as_one_does_every_method(tmp_path):
    jobs = [{"settings": plain(tmp_path / "two" / method, method=method)} for method in tiny.METHODS]
    (tmp_path / "two").mkdir()
    for method, found in zip(tiny.METHODS, ran(tmp_path, jobs, 2), strict=True):
        assert [rank["error"] for rank in found] == [None, None], method
        assert {rank["wrapped"] for rank in found} == {"DistributedDataParallel"}
        run = tmp_path / "two" / method
        clean(run)
        if method in RANDOM:
            continue
        alike(run, training.train(from_dict(plain(tmp_path / "one" / method, method=method))))
    reduced = [name for bucket in found[0]["reduced"] for name in bucket]  # of UnoLoRA, the last one
    steps = 12
    assert method == "unolora"
    assert any("hypernetwork" in name for name in reduced)
    assert sorted(reduced) == sorted(found[0]["trained"] * steps), "each parameter once a step"


@pytest.mark.slow
def test_four_ranks_train_as_one_does_though_they_lack_tasks(tmp_path):
    """Two rows each, of three tasks; and batches of a single task."""
    jobs = {
        "unolora": plain(tmp_path / "unolora"),
        "lora-per-task": plain(tmp_path / "lora-per-task", method="lora-per-task"),
        "unmixed": plain(tmp_path / "unmixed", method="full-per-task", sampling={"mixed": False}),
    }
    found = ran(tmp_path, [{"settings": settings} for settings in jobs.values()], 4)
    for (name, settings), ranks in zip(jobs.items(), found, strict=True):
        assert [rank["error"] for rank in ranks] == [None] * 4
        one = training.train(from_dict({**settings, "output": str(tmp_path / "one" / name)}))
        alike(tmp_path / name, one)
        clean(tmp_path / name)
    sampler = Sampler([64, 64, 60], batch_size=8)
    held = [{task for task, _ in sampler.local_batch(step, rank, 4)} for step in range(12) for rank in range(4)]
    assert min(map(len, held)) == 1, "no rank ever lacked a task"


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
def test_parts_of_weights_train_as_whole_ones_do(n, tmp_path):
    """FSDP2, adapters and full fine-tuning; stopped, and resumed on one process."""
    jobs = [
        {"settings": plain(tmp_path / "unolora")},
        {"settings": plain(tmp_path / "full", method="full")},
        {"settings": plain(tmp_path / "stopped"), "at": 7, "do": "ask"},
    ]
    found = ran(tmp_path, jobs if n == 2 else jobs[:1], n, **FSDP)
    for job, ranks in zip(jobs, found, strict=False):
        assert {rank["wrapped"] for rank in ranks} == {"FSDPMultiTaskModel"}
        run = Path(job["settings"]["output"])
        if "at" in job:
            assert all("Interrupted: stopped at step 7" in rank["error"] for rank in ranks)
            training.train(from_dict(job["settings"]), resume=True)
        else:
            assert [rank["error"] for rank in ranks] == [None] * n
        one = training.train(from_dict({**job["settings"], "output": str(tmp_path / "one" / run.name)}))
        alike(run, one)
        clean(run)


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, FSDP], ids=["ddp", "fsdp2"])
def test_text_to_text_on_two_ranks(environment, tmp_path):
    changes = {"backbone": str(tiny_text.backbone("t5")), "tasks": tiny_text.tasks(), "data": {"max_length": 64}}
    settings = tiny.spelled(tmp_path / "run", **PLAIN, **changes)
    ((first, second),) = ran(tmp_path, [{"settings": settings}], 2, **environment)
    assert (first["error"], second["error"]) == (None, None)
    alike(tmp_path / "run", training.train(from_dict({**settings, "output": str(tmp_path / "one" / "run")})))


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 4])
def test_a_killed_rank_stops_the_others_and_the_run_goes_on_on_other_ranks(n, tmp_path):
    """Within a minute, without a launcher that would tell them."""
    run = tmp_path / "run"
    ranks = begun(tmp_path, [{"settings": plain(run), "at": 7, "do": "die"}], 2)
    try:
        ranks[1].wait(timeout=400)
    finally:
        codes = ended(ranks, seconds=60)
    assert codes == [0, -9]
    said = json.loads((tmp_path / "0-0.json").read_text())["error"]
    assert said.startswith("ProcessLostError: another process of the run is gone; go on with `unolora train --resume ")
    assert [path.name for path in recovery.found(run)] == ["step-000004"]
    if n == 1:
        training.train(from_dict(plain(run)), resume=True)
    else:
        (found,) = ran(tmp_path, [{"settings": plain(run), "resume": True}], n)
        assert [rank["error"] for rank in found] == [None] * n
    alike(run, training.train(from_dict(plain(tmp_path / "one" / "run"))))
    clean(run)


@pytest.mark.slow
def test_what_one_rank_meets_all_ranks_tell(tmp_path):
    """A signal to one of them, a full disk on the one that writes, an error in another."""
    jobs = [
        {"settings": plain(tmp_path / "asked"), "at": 5, "do": "ask"},
        {"settings": plain(tmp_path / "full"), "at": 5, "do": "fill_disk"},
        {"settings": plain(tmp_path / "taken", tasks=tiny.tasks("mood")[:0])},
        {"settings": plain(tmp_path / "lost"), "at": 5, "do": "fail"},
    ]
    jobs[2] = {"settings": {**plain(tmp_path / "asked")}}  # there is a run already
    file = tmp_path / "jobs.json"
    codes = ended(begun(tmp_path, jobs, 2))
    assert codes == [0, 0]
    said = [[json.loads((tmp_path / f"{k}-{r}.json").read_text())["error"] for r in (0, 1)] for k in range(4)]
    assert file.exists()
    assert said[0] == [f"Interrupted: stopped at step 5; go on with `unolora train --resume {tmp_path / 'asked'}`"] * 2
    assert [path.name for path in recovery.found(tmp_path / "asked")] == ["step-000004", "step-000005"]
    assert said[1][0] == said[1][1].replace("process 0 failed: ", "")
    assert said[1][0].startswith("InputError: no space left to write")
    assert said[2][0] == said[2][1]
    assert "already holds a run" in said[2][0]
    assert said[3][1] == "ValueError: something that only one rank meets"
    assert said[3][0].startswith("ProcessLostError: another process of the run is gone")
