"""The measurements: what they count, how they compare, and the page they write. No time is asserted."""

import json
import re
from itertools import chain

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import T5ForConditionalGeneration

import tiny
import tiny_text
from unolora import cli
from unolora.bench import evaluation, growth, lengths, models, run, steps, timing
from unolora.bench.timing import Line, Times, interleaved, line, paired
from unolora.data import Collator, Encoded
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
        list(run.run([], 3, tmp_path, tmp_path / "benchmarks.md"))
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


def test_places_are_compared_in_time_and_memory(monkeypatch):
    peaks = dict(zip(steps.PLACES, (4, 6, 2), strict=True))

    def in_turns(commands, rounds):
        assert [command[-1] for command in commands.values()] == list(peaks)
        return {place: [{"bytes": peaks[command[-1]]}] * rounds for place, command in commands.items()}

    monkeypatch.setattr(steps, "in_turns", in_turns)
    lines = run.MEASUREMENTS["places"](7)
    first, *others = peaks
    for lines_of, what in ((lines[:2], "training step"), (lines[2:], "peak memory")):
        assert [found.what for found in lines_of] == [f"{what}, {place}" for place in others]
        assert {found.against for found in lines_of} == {f"{what}, {first}"}
    assert [found.ratio for found in lines[2:]] == [1.5, 0.5]
    made = []
    monkeypatch.setattr(models, "unolora", lambda *_, r, targets: made.append((targets, r)) or models.floor(_[0]))
    for place in peaks:
        steps.peak_bytes(place)
    assert made == list(steps.PLACES.values())


def test_places_have_about_as_many_parameters():
    """MiniLM's shapes; the ranks are those of configs/arena-ablations.yaml."""
    base = models.backbone("minilm", hidden_size=384, num_hidden_layers=6, intermediate_size=1536)
    counts, layers = [], []
    for names, r in steps.PLACES.values():
        model = models.unolora(base, "minilm", r=r, targets=names, conditioning="none")
        counts.append(sum(p.numel() for p in models.trained(model)))
        layers.append(sum(isinstance(module, UnoLoraLayer) for module in model.modules()))
    assert layers == [12, 12, 6]
    assert max(counts) < 1.1 * min(counts)


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
    lora = models.loras(base, "minilm", adapters=3)
    one, three = (
        kernels((lora, {**inputs, "adapter_names": [f"task{i % used}" for i in range(32)]})) for used in (1, 3)
    )
    assert three > one, "PEFT's cost grows with the adapters in a batch"


def test_micro_batches_by_length_pad_less():
    random = np.random.default_rng(0)
    split = Encoded({"input_ids": Ragged.of([[5] * n for n in random.integers(1, 30, 64)])}, np.zeros(64))
    cuts = {"whole": (1, False), "drawn": (8, False), "by length": (8, True)}
    rows = {name: list(lengths.micro_batches([split], n, by_length=how, steps=1)) for name, (n, how) in cuts.items()}
    drawn = rows["whole"][0]
    assert [*chain(*rows["drawn"])] == drawn, "as they were drawn"
    assert sorted(chain(*rows["by length"])) == sorted(drawn), "the same step"
    long = [split.lengths()[row] for _, row in drawn]
    expected = {
        "whole": 32 * max(long) - sum(long),
        "drawn": sum(4 * max(part) for part in np.reshape(long, (8, 4)).tolist()) - sum(long),
        "by length": sum(4 * max(part) for part in np.reshape(sorted(long), (8, 4)).tolist()) - sum(long),
    }
    found = {
        name: lengths.padding(lengths.collated([split], batches, tiny.tokenizer())) for name, batches in rows.items()
    }
    assert found == expected
    assert found["by length"] < found["drawn"] < found["whole"]


def test_glue_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder; pass `--data` with GLUE"):
        lengths.read_glue(tmp_path / "nowhere")


def test_loras_made_at_once_are_those_that_peft_makes():
    base, inputs = models.backbone("minilm"), models.batch("minilm", 2, 3)
    model = models.loras(base, "minilm", 3).eval()
    assert sorted(model.peft_config) == ["task0", "task1", "task2"]
    names = [name for name, _ in model.named_parameters() if "lora_A" in name]
    assert len(names) == len(set(names)) == 3 * 4
    for name, parameter in model.named_parameters():
        if "lora_B.task2" in name:
            parameter.data.normal_()
    with torch.no_grad():
        found = model(**inputs, adapter_names=["task1", "task2"]).last_hidden_state
        bare = base.eval()(**inputs).last_hidden_state
    torch.testing.assert_close(found[0], bare[0])
    assert (found[1] - bare[1]).abs().max() > 0.01


def test_a_merged_task_runs_the_kernels_of_the_bare_backbone():
    base, inputs = models.backbone("minilm"), models.batch("minilm", 2, 3)
    adapted = models.unolora(models.backbone("minilm"), "minilm", conditioning="task")
    more = kernels((adapted, steps.mixed(inputs, 2)))
    assert kernels((adapted.merge_and_unload(tasks="task0"), inputs)) == kernels((base, inputs)) < more


def test_forced_answers_end_generation():
    """What is generated is the right answer, and no longer than the longest of its batch."""
    host = T5ForConditionalGeneration.from_pretrained(tiny_text.backbone("t5"))
    end = host.config.eos_token_id
    answers = torch.tensor([[7, 8, end], [9, end, -100]])
    batch = {"input_ids": torch.tensor([[5, 6], [5, 7]]), "attention_mask": torch.ones(2, 2, dtype=torch.long)}
    out = evaluation.generated(host, {**batch, "answers": answers}, 64)
    assert out[:, 1:3].tolist() == [[7, 8], [9, end]]
    assert out.shape[1] == 4


def test_the_authors_batches_are_as_wide_as_theirs():
    split = Encoded({"input_ids": Ragged.of([[5] * n for n in (3, 9)])}, np.zeros(2), answers=[[1], [2]])
    rows = [(0, split, 0), (0, split, 1)]
    collate = Collator(tiny.tokenizer())
    (plain,), (wide,) = (list(evaluation.batches(rows, collate, wide=how)) for how in (False, True))
    assert (plain["input_ids"].shape, wide["input_ids"].shape) == ((2, 9), (2, 512))
    assert plain["attention_mask"].sum() == wide["attention_mask"].sum() == 12


def test_flops_do_not_grow_with_tasks_and_a_task_costs_less_and_less():
    few, many = growth.cost(tasks=2, tokens=8), growth.cost(tasks=200, tokens=8)
    assert many["flops"] == few["flops"] > 1
    assert many["parameters"] / 200 < few["parameters"] / 2 / 20
    assert many["loras"] == pytest.approx(100 * few["loras"])
    assert growth.cost(tasks=2, tokens=8, r=16)["flops"] > few["flops"]


def test_growth_is_counted_timed_and_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(growth, "AXES", {"tasks": (1, 10), "r": (2, 4), "tokens": (3,), "layers": (1, 2)})
    page, figures = tmp_path / "benchmarks.md", tmp_path / "growth.html"
    with pytest.raises(InputError, match="run `unolora bench growth` first"):
        cli.bench(["--figures", str(figures), "--output", str(page)])
    assert cli.bench(["growth", "--output", str(page)]) == 0
    found = {each["what"]: each["ratio"] for each in run.read(page)["growth"]["lines"]}
    assert len(found) == 4 * 7
    assert found["flops of a forward, tasks = 10"] == found["flops of a forward, tasks = 1"] > 1
    assert found["parameters of LoRAs, %, tasks = 10"] == pytest.approx(10 * found["parameters of LoRAs, %, tasks = 1"])
    assert cli.bench(["--figures", str(figures), "--output", str(page)]) == 0
    html = figures.read_text(encoding="utf-8")
    assert "Parameters, % of the backbone&#39;s" in html
    assert not re.search(r'<(script|link)[^>]*(src|href)="http', html)


def test_counting_takes_no_memory_for_weights():
    with torch.device("meta"):
        base, model = growth._models(2, 4, 1)
    assert all(parameter.is_meta for parameter in [*base.parameters(), *model.parameters()])


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

    def third(rounds, glue):
        """Measure third."""
        return [Line("on", str(glue.name), float(rounds))]

    monkeypatch.setattr(run, "MEASUREMENTS", {"first": first, "second": second})
    monkeypatch.setattr(run, "ON_GLUE", {"third": third})


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
def test_without_glue_all_others_are_measured(tmp_path, capsys):
    page = tmp_path / "benchmarks.md"
    arguments = ["--output", str(page), "--data"]
    assert cli.bench([*arguments, str(tmp_path / "nowhere")]) == 0
    assert "left out  third: " in capsys.readouterr().out
    assert set(run.read(page)) == {"first", "second"}
    (tmp_path / "glue").mkdir()
    assert cli.bench([*arguments, str(tmp_path / "glue")]) == 0
    assert set(run.read(page)) == {"first", "second", "third"}
    assert "| on | glue | 7.000 |" in page.read_text(encoding="utf-8")


@pytest.mark.usefixtures("measured")
def test_bad_input_writes_nothing(tmp_path):
    page = tmp_path / "benchmarks.md"
    with pytest.raises(InputError, match="unknown measurement 'frist'; did you mean 'first'"):
        cli.bench(["frist", "--output", str(page)])
    page.with_suffix(".json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"benchmarks.json: not what `unolora bench` wrote"):
        cli.bench(["first", "--output", str(page)])
    assert not page.exists()
