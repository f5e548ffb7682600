"""What is off by default: each variant starts as the backbone, merges as it runs, and does what it says."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

import test_golden
import tiny
from conftest import MIXED, TASKS, adapted, apart, backbone, batch, first_head, output, scales_of, settings, wake
from unolora import metrics, rates, recovery, runs, training
from unolora.errors import InputError
from unolora.export import as_lora, task_scale, write_lora
from unolora.hypernetwork import Hypernetwork
from unolora.methods import METHODS

VARIANTS = {
    "rslora": {"use_rslora": True},
    "gate": {"scale_gate": True},
    "shared map": {"shared_scale_map": True},
    "unmasked": {"mask_padding": False},
    "all": {"use_rslora": True, "scale_gate": True, "shared_scale_map": True, "mask_padding": False},
}
EACH = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
FAMILY = pytest.mark.parametrize("family", ["t5", "bert", "gpt2"])


def differing(family, variant, conditioning="task+sample"):
    """The output with the same weights with and without a variant; of a shared map, the first one's."""
    inputs = batch(family)
    found = []
    for more in ({}, variant):
        model = get_peft_model(backbone(family), settings(conditioning, r=4, task_type=first_head(family), **more))
        found.append(output(wake(model).eval(), **inputs, tasks=MIXED))
    return apart(*found)


@FAMILY
@EACH
def test_a_fresh_adapter_is_the_backbone(family, variant):
    inputs, model = batch(family), backbone(family)
    expected = output(model, **inputs)
    assert torch.equal(
        output(get_peft_model(model, settings(task_type=first_head(family), **variant)).eval(), **inputs, tasks=MIXED),
        expected,
    )


@FAMILY
@EACH
def test_it_is_felt_once_trained(family, variant):
    assert differing(family, {}) == 0
    assert differing(family, variant) > 1e-4


@FAMILY
@EACH
def test_merged_and_exported_are_unmerged(family, variant, tmp_path):
    model = wake(get_peft_model(backbone(family), settings("task", r=4, **variant))).eval()
    inputs = batch(family)
    with torch.no_grad():
        expected = output(model, **inputs, tasks=TASKS[1])
        assert apart(expected, output(model, **inputs, tasks=TASKS[0])) > 1e-3
        write_lora(*as_lora(model, task_scale(model, TASKS[1])), tmp_path)
        plain = PeftModel.from_pretrained(backbone(family), tmp_path).eval()
        tolerance = 1e-4 * max(1, expected.abs().max().item())
        assert apart(output(plain, **inputs), expected) < tolerance
        model.merge_adapter(tasks=TASKS[1])
        assert apart(output(model, **inputs, tasks=TASKS[1]), expected) < tolerance


@EACH
def test_it_is_read_back(variant, tmp_path):
    model, inputs = wake(get_peft_model(backbone("bert"), settings(r=4, **variant))).eval(), batch("bert")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(backbone("bert"), tmp_path, adapter_name="other").eval()
    assert torch.equal(output(again, **inputs, tasks=MIXED), output(model, **inputs, tasks=MIXED))


def test_rank_stabilised_scaling_is_peft_s():
    uno = get_peft_model(backbone("bert"), settings("none", r=9, alpha=6, use_rslora=True))
    lora = get_peft_model(
        backbone("bert"), LoraConfig(r=9, lora_alpha=6, use_rslora=True, target_modules=["query", "value"])
    )
    (ours,) = {layer.scaling["default"] for layer in uno.base_model.layers("default").values()}
    (theirs,) = {layer.scaling["default"] for layer in lora.modules() if isinstance(layer, LoraLayer)}
    assert ours == theirs == 2.0


@pytest.mark.parametrize(("start", "low", "high"), [("one", 0, 2), ("paper", -1, 1)])
def test_a_gated_scale_is_bounded(start, low, high):
    torch.manual_seed(0)
    made = [Hypernetwork(3, 4, 5, sample_dim=None, scale_init=start, gated=gated) for gated in (False, True)]
    for each in made:
        with torch.no_grad():
            each.scale_weight.normal_(std=20, generator=torch.Generator().manual_seed(1))
            for mine, first in zip(each.combine.parameters(), made[0].combine.parameters(), strict=True):
                mine.copy_(first)
            each.task_embedding.weight.copy_(made[0].task_embedding.weight)
            each.position_embedding.weight.copy_(made[0].position_embedding.weight)
    free, bounded = (each(torch.tensor([0, 1, 2])) for each in made)
    assert free.min() < low or free.max() > high, "the numbers are large"
    assert low <= bounded.min()
    assert bounded.max() <= high
    middle = (low + high) / 2
    assert apart(bounded, middle + torch.tanh(free - middle)) < 1e-6


def test_one_map_for_all_projections():
    own, shared = (Hypernetwork(3, 6, 4, sample_dim=8, shared_map=it) for it in (False, True))
    assert (own.scale_weight.shape, shared.scale_weight.shape) == ((6, 4, 8), (1, 4, 8))
    saved = sum(p.numel() for p in own.parameters()) - sum(p.numel() for p in shared.parameters())
    assert saved == 5 * 4 * (8 + 1)
    s = shared(torch.tensor([1]), torch.randn(1, 8))
    assert s.shape == (1, 6, 4)
    assert len({tuple(row.tolist()) for row in s[0]}) == 6, "positions tell projections apart"
    alone = Hypernetwork(3, 6, 4, sample_dim=8, shared_map=True, num_positions=1)
    s = alone(torch.tensor([1]), torch.randn(1, 8))
    assert len({tuple(row.tolist()) for row in s[0]}) == 1, "and nothing else does"


def test_an_unmasked_encoding_counts_padding():
    inputs = batch("bert")
    alone = {name: value[1:2, :4] for name, value in inputs.items() if name != "labels"}
    padded = {name: value[1:2] for name, value in inputs.items() if name != "labels"}
    masked, unmasked = adapted("bert"), wake(get_peft_model(backbone("bert"), settings(mask_padding=False))).eval()
    assert apart(scales_of(masked, [TASKS[0]], **alone), scales_of(masked, [TASKS[0]], **padded)) < 1e-6
    assert apart(scales_of(unmasked, [TASKS[0]], **alone), scales_of(unmasked, [TASKS[0]], **padded)) > 1e-4


@pytest.mark.parametrize("name", ["use_rslora", "scale_gate", "shared_scale_map", "mask_padding"])
def test_switches_are_true_or_false(name):
    with pytest.raises(InputError, match=f"`{name}` must be true or false, got 'yes'"):
        settings(**{name: "yes"})
    with pytest.raises(InputError, match=rf"`adapter\.{name}` must be of type bool, got 'yes'"):
        tiny.settings(adapter={name: "yes"})


@pytest.mark.parametrize("method", ["lora-shared", "lora-matched", "lora-per-task"])
def test_rivals_take_the_scaling_too(method):
    config = tiny.settings(adapter={"r": 4, "alpha": 6, "use_rslora": True})
    model = METHODS[method](backbone("bert", "FEATURE_EXTRACTION"), TASKS, config)
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    assert {scaling for layer in layers for scaling in layer.scaling.values()} == {3.0}
    (rank,) = {rank for layer in layers for rank in layer.r.values()}
    assert rank > 4 if method == "lora-matched" else rank == 4
    model = METHODS["mtl-lora"](backbone("bert", "FEATURE_EXTRACTION"), TASKS, config)
    assert {update.scaling for update in model.updates} == {3.0}


GOLDEN = {  # losses of four steps, as in test_golden.py
    "rslora": ({"adapter": {"use_rslora": True}}, [0.75404, 0.89599, 1.75151, 1.03658]),
    "gate": ({"adapter": {"scale_gate": True}}, [0.75404, 0.88954, 1.73661, 1.02460]),
    "shared map": ({"adapter": {"shared_scale_map": True}}, [0.75404, 0.89284, 1.75198, 1.02445]),
    "unmasked": ({"adapter": {"mask_padding": False}}, [0.75404, 0.89018, 1.73760, 1.02357]),
    "rates apart": (
        {"training": {"b_rate_ratio": 4.0, "hypernetwork_rate_ratio": 0.5}},
        [0.75404, 0.91278, 1.73785, 1.07360],
    ),
}


@pytest.mark.parametrize(("changes", "expected"), GOLDEN.values(), ids=GOLDEN)
def test_the_losses_are_those_on_record(changes, expected, tmp_path):
    assert len({tuple(losses) for _, losses in (*GOLDEN.values(), ({}, test_golden.GOLDEN["unolora"]))}) == 6
    config = tiny.settings(
        tmp_path / "run",
        backbone=str(tiny.backbone(dropout=0.0)),
        adapter={"r": 4, "dropout": 0.0, "target_modules": "query-value", **changes.get("adapter", {})},
        training={
            "steps": 4, "log_every": 1, "evaluate_every": 4, "checkpoint_every": 4, "schedule": "constant",
            **changes.get("training", {}),
        },
    )  # fmt: skip
    found = [line["loss"] for line in tiny.lines(training.train(config)) if line["kind"] == "train"]
    assert found == pytest.approx(expected, abs=test_golden.TOLERANCE)


# --- learning rates apart ------------------------------------------------------------------------------------------

APART = {"b_rate_ratio": 4.0, "hypernetwork_rate_ratio": 0.5}


def groups(tmp_path, method="unolora", **more):
    """Learning rate -> names of the parameters that have it, and the trainer."""
    trainers = {}
    config = tiny.settings(tmp_path / "run", method=method, training={"steps": 1, "schedule": "constant", **more})
    training.train(config, progress=tiny.watched(trainers, "it"))
    trainer = trainers["it"]
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    found = {}
    for group in trainer.optimizer.param_groups:
        found.setdefault(group["lr"], []).extend(names[id(p)] for p in group["params"])
    return found, trainer


def test_learning_rates_apart(tmp_path):
    found, trainer = groups(tmp_path, **APART)
    assert set(found) == {0.01, 0.04, 0.005}
    assert found[0.04]
    assert all(".uno_B." in name for name in found[0.04])
    assert found[0.005]
    assert all(".uno_hypernetwork." in name for name in found[0.005])
    assert any(".uno_A." in name for name in found[0.01])
    assert any(name.startswith("heads.") for name in found[0.01])
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert sorted(trained) == sorted(name for names in found.values() for name in names), "each once"
    assert trainer.optimizer.param_groups[0]["lr"] == 0.01, "the one that is logged"
    decays = {(g["lr"], g["weight_decay"]) for g in trainer.optimizer.param_groups}
    assert (0.005, 0.0) in decays, "biases still have no decay"
    assert (0.005, 0.01) in decays


@pytest.mark.parametrize(("method", "expected"), [("lora-shared", {0.01, 0.04}), ("heads-only", {0.01})])
def test_learning_rates_apart_of_rivals(method, expected, tmp_path):
    found, _ = groups(tmp_path, method, **APART)
    assert set(found) == expected


def test_hyperformer_s_networks_have_the_hypernetwork_s_rate(tmp_path):
    found, trainer = groups(tmp_path, "hyperformer", **APART)
    assert set(found) == {0.01, 0.005}
    own = {name for name, _ in trainer.model.named_parameters() if ".hypernetworks." in name}
    assert own
    assert set(found[0.005]) == own


def test_ratios_of_one_leave_the_optimiser_alone():
    model = torch.nn.Linear(2, 2)
    optimiser = torch.optim.AdamW(model.parameters())
    before = optimiser.param_groups[0]
    rates.part(optimiser, model, 1.0, 1.0)
    assert optimiser.param_groups == [before]


def test_schedules_scale_each_rate_and_resuming_keeps_it(tmp_path):
    steps = {"steps": 12, "evaluate_every": 6, "checkpoint_every": 4, "log_every": 1, "warmup_steps": 2, **APART}
    whole = training.train(tiny.settings(tmp_path / "whole", training=steps))
    stop = lambda label, trainer: tiny.Watch(lambda step: setattr(trainer, "stopped", step == 5))  # noqa: E731
    config = tiny.settings(tmp_path / "run", training=steps)
    with pytest.raises(training.Interrupted):
        training.train(config, progress=stop)
    training.train(config, resume=True)
    assert tiny.parts(tmp_path / "run").keys() == tiny.parts(whole).keys()
    for name, part in tiny.parts(whole).items():
        if name != "results.json":  # it holds the folder's name
            assert tiny.parts(tmp_path / "run")[name] == part, name


# --- the mean of the last checkpoints ------------------------------------------------------------------------------


def averaged(tmp_path, many, **more):
    steps = {"steps": 12, "evaluate_every": 4, "checkpoint_every": 4, "keep_checkpoints": 3, "average_last": many}
    return training.train(tiny.settings(tmp_path / f"average{many}", training={**steps, **more}))


def evaluations(run):
    return [(line["step"], line["average"]) for line in tiny.lines(run) if line["kind"] == "evaluation"]


@pytest.mark.parametrize("better", [True, False])
def test_the_mean_of_the_last_checkpoints_is_kept_if_it_is_better(better, tmp_path, monkeypatch):
    kept = {}
    write = recovery.Checkpoints.write

    def keep(self, step, weights, *args):
        kept[step] = {name: value.clone() for name, value in weights.items()}
        return write(self, step, weights, *args)

    monkeypatch.setattr(recovery.Checkpoints, "write", keep)
    scores = iter([0.1, 0.5, 0.2, 0.6 if better else 0.4])
    monkeypatch.setattr(metrics, "average", lambda found: next(scores))
    run = averaged(tmp_path, 2)
    assert evaluations(run) == [(4, 0.1), (8, 0.5), (12, 0.2), (12, 0.6 if better else 0.4)]
    assert list(kept) == [4, 8, 12]
    expected = {name: (kept[8][name] + kept[12][name]) / 2 if better else kept[8][name] for name in kept[12]}
    model = runs.load_run(run).model
    compared = 0
    for name, value in model.state_dict().items():
        if name in expected:
            assert apart(value, expected[name]) < 1e-7, name
            compared += 1
    assert compared == len(expected)


def test_averaging_needs_checkpoints():
    message = r"`training.average_last` 3 needs as many checkpoints, and `training.keep_checkpoints` keeps 2; raise it"
    with pytest.raises(InputError, match=message):
        tiny.settings(training={"average_last": 3})


def test_the_defaults_are_the_variants_off():
    adapter, plain = tiny.settings().adapter, tiny.settings().training
    assert not any((adapter.use_rslora, adapter.scale_gate, adapter.shared_scale_map))
    assert adapter.mask_padding
    assert (plain.b_rate_ratio, plain.hypernetwork_rate_ratio, plain.average_last) == (1, 1, 1)
