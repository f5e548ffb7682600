"""The measurements: what they count, how they compare, and the page they write. No time is asserted."""

import json
import re
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from unolora import cli
from unolora.bench import data, growth, models, run, steps, timing
from unolora.bench.timing import Line, Times, interleaved, line, paired
from unolora.data import Encoded
from unolora.errors import InputError
from unolora.layer import UnoLoraLayer
from unolora.tokens import Ragged


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """MiniLM's place taken by two layers of width 32."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    monkeypatch.setattr(models, "MINILM", {**shape, "vocab_size": 1000})
    monkeypatch.setattr(steps, "SHAPES", {"minilm": {"rows": 32, "tokens": 3}, "t5-base": {"rows": 4, "tokens": 5}})


# Comparing


def test_ratios_are_medians_over_rounds_of_paired_times():
    times = {"a": Times([2.0, 2.0, 30.0] * 3, [1.0] * 9), "b": Times([1.0, 1.0, 10.0] * 3, [4.0] * 9)}
    found = line(times, "a", "b", "<= 2.5")
    assert (found.ratio, found.cpu, found.reached()) == (2.0, 0.25, True)
    assert found.spread == (2.0, 3.0)
    assert line(times, "a", "b", ">= 1", faster=True).ratio == 0.5


@pytest.mark.parametrize(
    ("ratio", "reach", "reached"), [(1.0, "<= 1", True), (1.1, "<= 1", False), (1.5, ">= 1.5", True), (1, "", None)]
)
def test_a_reach_is_read(ratio, reach, reached):
    assert Line("a", "b", ratio, reach).reached() is reached


def test_functions_take_turns_after_one_call_that_does_not_count():
    calls = []
    times = interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, 7)
    assert calls[:2] == ["a", "b"]
    assert calls[2:] == [*"abba" * 3, *"ab"]
    assert {len(t.wall) for t in times.values()} == {len(t.cpu) for t in times.values()} == {7}


def test_fewer_than_seven_rounds_are_refused(tmp_path):
    with pytest.raises(InputError, match="at least 7 rounds, got 3"):
        interleaved({"a": list}, 3)
    with pytest.raises(InputError, match="at least 7 rounds, got 3"):
        list(run.run([], 3, tmp_path / "benchmarks.md"))
    assert not list(tmp_path.iterdir())


def test_processes_take_turns_and_are_paired():
    program = ["-c", "import json; print('chatter'); print(json.dumps({'x': 4}))"]
    other = ["-c", "import json; print(json.dumps({'x': 2}))"]
    found = timing.in_turns({"a": program, "b": other}, 2)
    assert paired(found, "x", "a", "b").ratio == 2
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        timing.in_turns({"a": ["-c", "1 / 0"]}, 1)


# What is measured, run once on small shapes


@pytest.mark.parametrize("name", ["step-minilm", "inference"])
def test_a_measurement_gives_lines(name):
    lines = run.MEASUREMENTS[name](7)
    assert len(lines) >= 3
    assert all(np.isfinite(found.ratio) and found.ratio > 0 and found.spread for found in lines)


def test_twins_share_the_frozen_weights():
    base = models.backbone("minilm")
    for model in (models.unolora(base, "minilm"), models.lora(base, "minilm"), models.floor(base)):
        own = {p.data_ptr() for p in base.parameters()}
        assert own == {p.data_ptr() for p in model.parameters() if not p.requires_grad}
    assert not [p for p in base.parameters() if p.requires_grad]


def test_the_floor_goes_back_to_the_embeddings_and_trains_nothing():
    model, inputs = models.floor(models.backbone("minilm")), models.batch("minilm", 2, 3)
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda m, i, o: seen.append(o))
    models.loss(model(**inputs)).backward()
    assert seen[0].grad.abs().sum() > 0
    assert not models.trained(model)


def test_a_step_is_one_pass_of_the_backbone_and_one_of_the_hypernetwork():
    """However many tasks are in the batch."""
    base = models.backbone("minilm")
    for tasks in (1, 32):
        model, calls = models.unolora(base, "minilm"), []

        def note(module, inputs, output, calls=calls):
            calls.append(type(module).__name__)

        for name, module in model.named_modules():
            if name.endswith(("encoder", "uno_hypernetwork.default")) or isinstance(module, UnoLoraLayer):
                module.register_forward_hook(note)
        steps.step(model, steps.mixed(models.batch("minilm", 32, 3), tasks))()
        assert sorted(calls) == ["BertEncoder", "Hypernetwork", *["UnoLoraLinear"] * 4]


class Kernels(TorchDispatchMode):
    """Counts what torch is asked to compute."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def kernels(of):
    model, inputs = of
    with torch.no_grad(), Kernels() as counted:
        model.eval()(**inputs)
    return counted.count


def test_mixed_tasks_cost_no_kernel_and_a_task_more_neither():
    base, inputs = models.backbone("minilm"), models.batch("minilm", 32, 3)
    counts = {
        (tasks, used): kernels((models.unolora(base, "minilm", tasks), steps.mixed(inputs, used)))
        for tasks, used in ((32, 1), (32, 32), (256, 32))
    }
    assert len(set(counts.values())) == 1
    lora = models.lora(base, "minilm", adapters=3)
    one, three = (
        kernels((lora, {**inputs, "adapter_names": [f"task{i % used}" for i in range(32)]})) for used in (1, 3)
    )
    assert three > one, "PEFT's cost grows with the adapters in a batch"


def test_micro_batches_by_length_pad_less():
    random = np.random.default_rng(0)
    split = Encoded({"input_ids": Ragged.of([[5] * n for n in random.integers(1, 30, 64)])}, np.zeros(64))
    batches = {parts: list(islice(data.micro_batches([split], tiny.tokenizer(), parts), parts)) for parts in (1, 8)}
    rows = {
        parts: sorted(int(n) for b in found for n in b["attention_mask"].sum(1)) for parts, found in batches.items()
    }
    assert rows[1] == rows[8], "the same step"
    assert data.padding(batches[1]) == 32 * max(rows[1]) - sum(rows[1])
    expected = sum(4 * max(part) - sum(part) for part in np.array(rows[8]).reshape(8, 4).tolist())
    assert data.padding(batches[8]) == expected < data.padding(batches[1])


def test_glue_that_is_not_there_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "GLUE", tmp_path / "nowhere")
    with pytest.raises(InputError, match="nowhere: no such folder; GLUE is read from there"):
        data.glue()


def test_flops_do_not_grow_with_tasks_and_a_task_costs_less_and_less():
    few, many = growth.cost(tasks=2, tokens=8), growth.cost(tasks=200, tokens=8)
    assert many["flops"] == few["flops"] > 1
    assert many["per_task"] < few["per_task"] / 20
    assert growth.cost(tasks=2, tokens=8, r=16)["flops"] > few["flops"]


def test_figures_are_one_page(tmp_path, monkeypatch):
    monkeypatch.setattr(growth, "curves", lambda: {"r": ((1, 2), [{"flops": 1.1, "parameters": 0.1}] * 2)})
    assert cli.bench(["--figures", str(tmp_path / "growth.html")]) == 0
    page = (tmp_path / "growth.html").read_text(encoding="utf-8")
    assert "flops of a forward" in page
    assert not re.search(r'<script[^>]*src="http', page)


# The page


@pytest.fixture
def measured(monkeypatch):
    lines = [Line("a | b", "c", 0.5, "<= 1", (0.4, 0.6), 0.55, "note"), Line("counted", "d", 12345.0)]

    def first(rounds):
        """Measure first."""
        return lines

    def second(rounds):
        """Measure second."""
        return [Line("x", "y", float(rounds))]

    monkeypatch.setattr(run, "MEASUREMENTS", {"first": first, "second": second})


@pytest.mark.usefixtures("measured")
def test_the_page_keeps_what_was_measured_before(tmp_path, capsys):
    page = tmp_path / "benchmarks.md"
    assert cli.bench(["first", "--output", str(page)]) == 0
    assert "a | b" in capsys.readouterr().out
    assert cli.bench(["second", "--rounds", "8", "--output", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "| a \\| b | c | 0.500 [0.400, 0.600] | 0.550 | <= 1: yes | note |" in text
    assert "| counted | d | 1.23e+04 |" in text
    assert text.index("Measure first.") < text.index("Measure second.")
    assert "`unolora bench second --rounds 8`" in text
    assert "torch 2" in text
    assert set(json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))) == {"first", "second"}


@pytest.mark.usefixtures("measured")
def test_bad_input_writes_nothing(tmp_path):
    page = tmp_path / "benchmarks.md"
    with pytest.raises(InputError, match="unknown measurement 'frist'; did you mean 'first'"):
        cli.bench(["frist", "--output", str(page)])
    page.with_suffix(".json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"benchmarks.json: not what `unolora bench` wrote"):
        cli.bench(["first", "--output", str(page)])
    assert not page.exists()
