"""The analyses: numbers against NumPy, SciPy and matrices with known spectra, then whole runs."""

import functools
import json
import shutil

import numpy as np
import pandas
import pytest
import scipy.linalg
import scipy.stats
import torch
from safetensors.numpy import load_file, save_file

import tiny
import unolora_cli
from unolora import analysis, runs, training
from unolora.analysis import ablate, collect, numbers
from unolora.errors import InputError

RANDOM = np.random.default_rng(0)


def matrix(*shape):
    return RANDOM.standard_normal(shape)


def with_spectrum(values, rows, columns):
    """A matrix with these singular values."""
    left, _ = np.linalg.qr(matrix(rows, len(values)))
    right, _ = np.linalg.qr(matrix(columns, len(values)))
    return left @ np.diag(values) @ right.T


def rotation(size):
    return np.linalg.qr(matrix(size, size))[0]


# --- one matrix ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "ratio", "entropy"),
    [
        ([5.0, 5.0, 5.0, 5.0], 4.0, 4.0),
        ([3.0, 0.0, 0.0, 0.0], 1.0, 1.0),
        ([2.0, 1.0, 1.0, 0.0], 2.0, 2**1.5),  # shares 1/2, 1/4, 1/4: 1.5 bits
        ([0.0, 0.0, 0.0, 0.0], 0.0, 0.0),
    ],
)
def test_effective_ranks_of_known_spectra(values, ratio, entropy):
    found = numbers.measures(with_spectrum(values, 4, 9))
    assert list(found) == list(numbers.MEASURES)
    expected = [ratio, entropy, np.linalg.norm(values), max(values)]
    assert list(found.values()) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_spectra_are_those_of_numpy(shape):
    M = matrix(*shape)
    assert numbers.singular_values(M) == pytest.approx(np.linalg.svd(M)[1])
    of_product = np.sort(np.linalg.eigvalsh(M @ M.T))[::-1]
    assert numbers.eigenvalues(M) == pytest.approx(of_product[:4])
    assert of_product[4:] == pytest.approx(0)


# --- entry by entry ------------------------------------------------------------------------------------------------


def test_pca_finds_the_plane_that_matrices_lie_in():
    one, other = np.linalg.qr(matrix(12, 2))[0].T.reshape(2, 3, 4)
    places = np.array([[4.0, 0.0], [-4.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    found, shares = numbers.pca([a * one + b * other + 7 for a, b in places])
    assert np.abs(found) == pytest.approx(np.abs(places), abs=1e-9)
    assert shares == pytest.approx([16 / 17, 1 / 17])


def test_pca_of_one_matrix_and_of_equal_ones():
    for matrices in ([np.ones((2, 3))], [np.ones((2, 3))] * 3):
        found, shares = numbers.pca(matrices)
        assert found == pytest.approx(np.zeros((len(matrices), 2)))
        assert shares == pytest.approx([0, 0])


def test_correlations_are_those_of_scipy():
    matrices = [matrix(3, 5) for _ in range(3)]
    found = numbers.correlations(matrices)
    for i, one in enumerate(matrices):
        for j, other in enumerate(matrices):
            assert found[i, j] == pytest.approx(scipy.stats.pearsonr(one.ravel(), other.ravel()).statistic)
    assert np.isnan(numbers.correlations([np.zeros((3, 5))], matrices)).all()
    assert np.isnan(numbers.correlations([matrix(5, 3)], matrices)).all()


# --- subspaces -----------------------------------------------------------------------------------------------------


def test_overlap_is_that_of_the_principal_angles():
    A, other = matrix(4, 20), matrix(6, 20)
    angles = scipy.linalg.subspace_angles(A.T, other.T)
    found = numbers.overlap(numbers.basis(A, rows=True), numbers.basis(other, rows=True))
    assert found == pytest.approx(np.mean(np.cos(angles) ** 2))
    axes = np.eye(6)
    assert numbers.overlap(axes[:, :2], axes[:, :4]) == 1
    assert numbers.overlap(axes[:, :2], axes[:, 2:]) == 0
    assert numbers.overlap(axes[:, :2], axes[:, 1:3]) == 0.5


def test_a_turned_factor_spans_the_same_space():
    A, B, Q = matrix(4, 20), matrix(12, 4), rotation(4)
    turned = Q @ A, B @ Q.T
    assert turned[1] @ turned[0] == pytest.approx(B @ A)  # the same update
    for one, other, rows in ((A, turned[0], True), (B, turned[1], False)):
        assert not np.allclose(one, other)
        assert numbers.overlap(numbers.basis(one, rows), numbers.basis(other, rows)) == pytest.approx(1)
        assert list(numbers.measures(other).values()) == pytest.approx(list(numbers.measures(one).values()))
        assert numbers.correlations([one], [other])[0, 0] < 0.9  # entry-wise measures may change
    S = np.diag([1.0, 2.0, 3.0, 4.0])  # no rotation: spectra change, subspaces don't
    assert numbers.overlap(numbers.basis(A, True), numbers.basis(S @ A, True)) == pytest.approx(1)
    assert numbers.measures(S @ A)["frobenius norm"] != pytest.approx(numbers.measures(A)["frobenius norm"])


def test_a_basis_leaves_out_what_is_not_there():
    B = matrix(12, 4).astype(np.float32)
    assert numbers.basis(B, rows=False).shape == (12, 4)
    B[:, 3] = B[:, 0] + B[:, 1]
    assert numbers.basis(B, rows=False).shape == (12, 3)
    empty = numbers.basis(np.zeros((12, 4)), rows=False)
    assert empty.shape == (12, 0)
    assert np.isnan(numbers.overlap(empty, np.eye(12)[:, :4]))


@pytest.mark.parametrize(("d", "k", "l"), [(32, 4, 4), (32, 4, 7), (6, 4, 4)])
def test_random_subspaces_overlap_as_expected(d, k, l):  # noqa: E741
    drawn = numbers.random_overlaps(d, k, l, 4000, np.random.default_rng(1))
    direct = [
        numbers.overlap(numbers.basis(matrix(k, d), True), numbers.basis(matrix(l, d), True)) for _ in range(1000)
    ]
    expected = numbers.expected_overlap(d, k, l)
    assert expected == max(k, l) / d
    for sample in (drawn, direct):
        assert abs(np.mean(sample) - expected) < 5 * scipy.stats.sem(sample)
    assert scipy.stats.ks_2samp(drawn, direct).pvalue > 1e-4


def test_layers_that_correspond_are_told_from_layers_that_do_not():
    P = 8
    alike, any_pairing = np.eye(P) * 0.9 + 0.05, np.full((P, P), 0.3)
    for table, low, high in ((alike, 0, 0.01), (any_pairing, 1, 1)):
        null = numbers.permuted_means([(0, 1, table)], ["q"] * P, 500, np.random.default_rng(0))
        assert low <= numbers.p_value(np.diagonal(table).mean(), null) <= high
    # q layers may not take the place of v layers: with one of each there is nothing to permute
    null = numbers.permuted_means([(0, 1, alike[:2, :2])], ["q", "v"], 20, np.random.default_rng(0))
    assert null == pytest.approx(0.95)


def test_one_shuffle_of_an_adapter_holds_for_all_its_pairs():
    table = np.square(np.arange(9.0)).reshape(3, 3)
    null = numbers.permuted_means([(0, 1, table), (0, 1, -table)], ["q"] * 3, 50, np.random.default_rng(0))
    assert null == pytest.approx(0)
    assert numbers.permuted_means([(0, 1, table)], ["q"] * 3, 50, np.random.default_rng(0)).std() > 0.1


# --- scales --------------------------------------------------------------------------------------------------------


def test_variance_between_and_within_tasks_add_up():
    tasks = np.repeat([0, 1, 2], 10)
    s = matrix(30, 2, 4) + tasks[:, None, None]
    between, within = numbers.variances(s, tasks)
    assert between + within == pytest.approx(s.var(axis=0))
    assert numbers.task_shares(between, within).shape == (2, 4)
    fixed = np.repeat(matrix(3, 2, 4), 10, axis=0)  # a scale for each task
    between, within = numbers.variances(fixed, tasks)
    assert within == pytest.approx(0)
    assert numbers.task_shares(between, within) == pytest.approx(1)
    assert np.isnan(numbers.task_shares(*numbers.variances(np.ones((30, 2, 4)), tasks))).all()


def test_a_task_weighs_the_same_however_many_samples_it_has():
    s = np.array([0.0, 0.0, 0.0, 2.0]).reshape(4, 1, 1)
    between, _ = numbers.variances(s, np.array([0, 0, 0, 1]))
    assert between == pytest.approx(1)


def test_tasks_cluster_by_their_scales_whatever_the_size_of_b():
    means = np.stack([np.full((2, 4), value) for value in (1.0, 1.1, 3.0)])
    found = numbers.linkage(means)
    assert found.shape == (2, 4)
    assert set(found[0, :2]) == {0, 1}
    assert numbers.linkage(means * np.array([1.0, 5.0, 0.1, 2.0])) == pytest.approx(found)
    assert numbers.linkage(means[:1]).shape == (0, 4)


def test_ranks_that_a_task_switches_off():
    means = np.array([[[1.0, 0.05, -2.0]], [[0.5, 1.0, 0.1]]])
    assert numbers.switched_off(means).tolist() == [[[False, True, False]], [[False, False, True]]]
    assert not numbers.switched_off(means[:1]).any()


# --- over seeds ----------------------------------------------------------------------------------------------------


def test_intervals():
    values = [0.3, 0.5, 0.4]
    low, high = scipy.stats.t.interval(0.95, 2, np.mean(values), scipy.stats.sem(values))
    mean, half = numbers.interval(values)
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert numbers.interval([0.3]) == (0.3, None)
    alone = [(seed, seed) for seed in range(3)]
    assert numbers.pair_interval(values, alone) == pytest.approx(numbers.interval(values))


def test_pairs_that_share_seeds_are_not_independent():
    of_seeds = matrix(6)
    units = [(i, j) for i in range(6) for j in range(i)]
    found = numbers.pair_interval([(of_seeds[i] + of_seeds[j]) / 2 for i, j in units], units)
    assert found == pytest.approx(numbers.interval(list(of_seeds)))  # a mean of means: the seeds are what counts
    assert numbers.pair_interval([0.4], [(0, 1)]) == (0.4, None)


# --- runs ----------------------------------------------------------------------------------------------------------


@functools.cache
def run(seed=0, method="unolora", names=tuple(tiny.NAMES)):
    settings = tiny.settings(
        tiny.folder() / "run",
        method=method,
        tasks=tiny.tasks(*names),
        adapter={"target_modules": "query-value"},
        training={"seed": seed, "steps": 6},
    )
    return training.train(settings)


def changed(source, tmp_path, change, name="changed"):
    """A copy of a run whose adapter tensors went through `change`."""
    copy = shutil.copytree(source, tmp_path / name)
    path = copy / "adapter" / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    return copy


def rows_of(found, **wanted):
    return [row for row in found if all(row.get(key) == value for key, value in wanted.items())]


def test_pairs_are_read_in_the_order_of_the_network():
    for method, tasks in (("unolora", [""]), ("lora-shared", [""]), ("lora-per-task", tiny.NAMES)):
        adapters = collect.adapters_of(run(method=method))
        assert [adapter.task for adapter in adapters] == tasks
        for adapter in adapters:
            places = [(collect.layer_of(name), collect.kind_of(name)) for name in adapter.pairs]
            assert places == [(0, "q"), (0, "v"), (1, "q"), (1, "v")]
            assert {(pair.A.shape, pair.B.shape) for pair in adapter.pairs.values()} == {((4, 32), (32, 4))}


def test_names_of_other_families():
    names = ["decoder.block.0.layer.1.EncDecAttention.q", "encoder.block.10.layer.0.SelfAttention.v"]
    names += ["encoder.block.2.layer.0.SelfAttention.v"]
    assert sorted(names, key=collect.network_order) == [names[2], names[1], names[0]]
    assert [collect.block_of(name) for name in names[:2]] == ["decoder.block.0", "encoder.block.10"]
    kinds = {"h.0.attn.c_attn": "qkv", "layers.0.self_attn.q_proj": "q", "layer.0.attention.v_lin": "v", "proj": "proj"}
    kinds |= {
        "bert.encoder.layer.0.output.dense": "output.dense",
        "layer.1.attention.output.dense": "attention.output.dense",
    }
    assert {name: collect.kind_of(name) for name in kinds} == kinds
    assert collect.layer_of("proj") == -1


def test_identical_runs_overlap_wholly(tmp_path):
    copy = shutil.copytree(run(), tmp_path / "copy")
    found = analysis.analyze([run()], [copy], rows=0)
    for name in "AB":
        (row,) = rows_of(found.comparisons, matrix=name)
        assert row["relation"] == "same seed"
        assert row["overlap"] == pytest.approx(1)
        assert row["above chance"] == pytest.approx(1)
        assert row["correlation"] == pytest.approx(1)
        assert row["p (random)"] < 0.002
    (difference,) = rows_of(found.comparisons, matrix="A - B")
    assert difference["above chance"] == pytest.approx(0, abs=1e-9)
    assert found.notes


def test_a_turned_run_is_the_same_run_to_subspaces(tmp_path):
    Q = rotation(4).astype(np.float32)

    def turn(tensors):
        turned = {k: Q @ v if ".uno_A" in k else v @ Q.T if ".uno_B" in k else v for k, v in tensors.items()}
        assert sum(not np.array_equal(turned[k], v) for k, v in tensors.items()) == 8
        return {k: np.ascontiguousarray(v) for k, v in turned.items()}

    found = analysis.analyze([run()], [changed(run(), tmp_path, turn)], rows=0)
    for name in "AB":
        (row,) = rows_of(found.comparisons, matrix=name)
        assert row["overlap"] == pytest.approx(1, abs=1e-5)
        assert row["correlation"] < 0.95


def test_seeds_have_an_interval_and_a_random_baseline():
    found = analysis.analyze([run(0), run(1), run(2)], rows=0)
    for name in "AB":
        (row,) = rows_of(found.comparisons, matrix=name)
        assert (row["relation"], row["pairs"], row["seeds"]) == ("between seeds", 3, 3)
        assert row["random"] == 4 / 32
        assert row["random low"] < 4 / 32 < row["random high"]
        assert row["overlap ±"] > 0
        assert 0 < row["p (layers)"] <= 1
    (ranks,) = rows_of(found.summary, matrix="A", measure="effective rank (sum / max)")
    assert ranks["runs"] == 3
    assert ranks["±"] > 0


def test_tasks_of_one_run_and_methods_beside_each_other():
    found = analysis.analyze([run(method="lora-per-task")], [run(), run(1)], rows=0)
    relations = {(row["relation"], row["pairs"]) for row in rows_of(found.comparisons, matrix="A")}
    assert relations == {("between tasks", 3), ("same seed", 3), ("between seeds", 3)}
    assert {row["task"] for row in found.table} == {"", *tiny.NAMES}


def test_scales_between_tasks_and_within():
    found = analysis.analyze([run()], rows=5)
    assert not found.comparisons
    arrays = {key.rsplit("/", 1)[1]: value for key, value in found.arrays.items() if "/s/" in key}
    assert arrays["mean"].shape == (3, 4, 4)
    assert arrays["linkage of tasks"].shape == (2, 4)
    assert (arrays["variance between tasks"] > 0).all()
    assert arrays["variance within tasks"].max() > 0
    assert len(rows_of(found.table, measure="mean scale")) == 3 * 4
    loaded = runs.load_run(run())
    s = collect.scales(loaded, collect.encoded(loaded, "validation", 5))
    assert {name: part.shape for name, part in s.items()} == dict.fromkeys(tiny.NAMES, (5, 4, 4))
    assert s["mood"].mean(axis=0) == pytest.approx(arrays["mean"][0])


def test_scales_are_those_of_the_forward():
    loaded = runs.load_run(run())
    seen = []
    network = loaded.model.method.backbone.base_model.uno_hypernetwork["default"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect, "current_scales", lambda: seen.append(collect_current()) or seen[-1])
        outputs = []
        hook = network.register_forward_hook(lambda module, inputs, out: outputs.append(out))
        s = collect.scales(loaded, collect.encoded(loaded, "validation", 3))
        hook.remove()
    assert np.concatenate(list(s.values())) == pytest.approx(torch.cat(outputs).numpy())


def collect_current():
    from unolora.layer import current_scales

    return current_scales()


def test_a_run_with_one_task():
    found = analysis.analyze([run(names=("mood",))], rows=4)
    (share,) = rows_of(found.summary, measure="share of variance between tasks")
    assert share["mean"] == 0
    assert not any(row["value"] for row in rows_of(found.table, measure="ranks switched off"))


@pytest.mark.parametrize("method", ["heads-only", "poly"])
def test_a_run_without_pairs_is_refused(method):
    with pytest.raises(InputError, match="has no A and B for each projection; give runs of unolora, lora-shared"):
        analysis.analyze([tiny.trained(method)])


def test_runs_that_cannot_be_analysed(tmp_path):
    half = shutil.copytree(run(), tmp_path / "half")
    (half / "results.json").unlink()
    with pytest.raises(InputError, match=r"half: no results\.json, the run is not finished; go on with `unolora train"):
        analysis.analyze([half])
    with pytest.raises(InputError, match="no such folder"):
        analysis.analyze([tmp_path / "none"])
    with pytest.raises(InputError, match="no run in it"):
        analysis.analyze([tmp_path])
    odd = shutil.copytree(run(), tmp_path / "odd")
    (odd / "results.json").write_text("[]")
    with pytest.raises(InputError, match=r"odd/results\.json: expected the results"):
        analysis.analyze([odd])
    other = changed(run(), tmp_path, lambda t: {k: v for k, v in t.items() if "layer.1" not in k}, "other")
    with pytest.raises(InputError, match="adapts other projections"):
        analysis.analyze([run()], [other], rows=0)
    wrong = changed(run(), tmp_path, lambda t: {k: v * np.nan if ".uno_B" in k else v for k, v in t.items()}, "wrong")
    with pytest.raises(InputError, match="is not finite"):
        analysis.analyze([wrong])


def test_an_untrained_b_has_no_overlap(tmp_path):
    zero = changed(run(), tmp_path, lambda t: {k: v * 0 if ".uno_B" in k else v for k, v in t.items()})
    found = analysis.analyze([run()], [zero], rows=0)
    (row,) = rows_of(found.comparisons, matrix="B")
    assert np.isnan(row["overlap"])
    assert row["p (random)"] is None


# --- ablations -----------------------------------------------------------------------------------------------------


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def test_what_is_switched_off_comes_back():
    loaded = runs.load_run(run())
    before = state(loaded.model)
    with ablate.without(loaded, rank=1, layer="encoder.layer.0"):
        zeros = {
            name: [bool((up[:, rank] == 0).all()) for rank in range(4)] for name, (up,) in ablate.ups(loaded).items()
        }
        assert all(zero == [False, "layer.0" in name, False, False] for name, zero in zeros.items())
        assert not same(loaded.model, before)
    assert same(loaded.model, before)

    def fail():
        with ablate.without(loaded, layer="encoder.layer.0"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert same(loaded.model, before)


@pytest.mark.parametrize("method", ["unolora", "lora-per-task"])
def test_ablations_leave_the_model_as_it_was(method):
    loaded = runs.load_run(run(method=method))
    before, hooked = state(loaded.model), hooks(loaded.model)
    found = ablate.ablations(loaded, limit=6)
    assert same(loaded.model, before)
    assert hooks(loaded.model) == hooked
    parts = ["nothing", *(f"rank {rank}" for rank in range(4)), "encoder.layer.0", "encoder.layer.1"]
    assert list(dict.fromkeys(row["without"] for row in found)) == parts + ["sample"] * (method == "unolora")
    assert all(row["change"] == 0 for row in rows_of(found, without="nothing"))
    assert len(found) == 3 * len(dict.fromkeys(row["without"] for row in found))


def test_without_all_ranks_is_the_backbone():
    loaded = runs.load_run(run())
    words = {"task": "mood", "inputs": [("the cat was good",)]}
    from unolora.scoring import predict_texts

    (whole,) = predict_texts(loaded, **words)
    with ablate.without(loaded):
        (bare,) = predict_texts(loaded, **words)
    with loaded.model.method.backbone.disable_adapter():
        (off,) = predict_texts(loaded, **words)
    assert bare["probabilities"] == pytest.approx(off["probabilities"])
    assert bare["probabilities"] != pytest.approx(whole["probabilities"])


def test_without_the_sample_every_sample_gets_one_scale():
    loaded = runs.load_run(run())
    splits = collect.encoded(loaded, "validation", 4)
    assert collect.scales(loaded, splits)["mood"].std(axis=0).max() > 1e-4
    with ablate.without_sample(loaded, lambda: collect.scales(loaded, splits)):
        assert collect.scales(loaded, splits)["mood"].std(axis=0).max() < 1e-6
    shared = runs.load_run(run(method="lora-shared"))
    with pytest.raises(InputError, match="do not depend on the sample"), ablate.without_sample(shared, lambda: None):
        pass


def test_parts_that_are_not_there():
    loaded = runs.load_run(run())
    with pytest.raises(InputError, match="unknown rank 4: the ranks are 0 to 3"), ablate.without(loaded, rank=4):
        pass
    with (
        pytest.raises(InputError, match=r"did you mean 'encoder\.layer\.0'"),
        ablate.without(loaded, layer="encoder.laye.0"),
    ):
        pass
    with pytest.raises(InputError, match="has no A and B"):
        ablate.ups(runs.load_run(tiny.trained("heads-only")))


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_prints_and_writes(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "out"
    arguments = ["analyze", str(run(0)), str(run(1)), "--against", str(run(method="lora-shared"))]
    assert unolora_cli.main([*arguments, "--rows", "4", "--ablate", "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    for word in ("between seeds", "same seed", "A - B", "effective rank (entropy)", "spread within tasks", "rank 3"):
        assert word in printed
    names = {f"{name}.{kind}" for name in analysis.TABLES for kind in ("csv", "parquet")}
    assert {path.name for path in out.iterdir()} == names | {"arrays.safetensors", "about.json"}
    table = pandas.read_parquet(out / "table.parquet")
    assert list(table.columns[:5]) == ["run", "label", "seed", "task", "projection"]
    assert len(pandas.read_csv(out / "table.csv")) == len(table)
    arrays = load_file(out / "arrays.safetensors")
    name = table["run"][0]
    assert run(0).match(name)
    assert arrays[f"{name}/A/singular values"].shape == (4, 4)
    assert tiny.leftovers(tmp_path) == []
    assert unolora_cli.main([*arguments, "--rows", "0", "--output", str(out)]) == 0  # its own folder is replaced
    assert not (out / "ablations.csv").exists()


def test_the_command_overwrites_nothing_else(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert unolora_cli.main(["analyze", str(run()), "--rows", "0", "--output", str(tmp_path)]) == 2
    assert "holds other files and no analysis" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    assert unolora_cli.main(["analyze", str(run()), "--rows", "-1"]) == 2
    assert "--rows must be at least 0" in capsys.readouterr().err


def test_the_same_seed_gives_the_same_numbers():
    one, other = (analysis.analyze([run(0), run(1)], rows=3) for _ in range(2))
    assert json.dumps(one.comparisons) == json.dumps(other.comparisons)
    assert one.arrays.keys() == other.arrays.keys()


# --- gradients, starts, figures ------------------------------------------------------------------------------------


def test_where_a_started_is_built_again(tmp_path):
    """With a learning rate of almost nothing A is where it started, and B where it started: at zero."""
    for method in ("unolora", "lora-per-task", "lora-shared"):
        still = training.train(
            tiny.settings(
                tmp_path / method / "run",
                method=method,
                baselines=["lora-shared"] if method == "unolora" else [],
                training={"steps": 1, "learning_rate": 1e-12},
            )
        )
        for folder in [still, *sorted((still / "baselines").glob("*"))]:
            for adapter in collect.with_starts(collect.adapters_of(folder)):
                assert adapter.started
                for pair in adapter.pairs.values():
                    assert pair.start == pytest.approx(pair.A, abs=1e-9)
                    assert np.abs(pair.A).max() > 0.01
    moved = collect.with_starts(collect.adapters_of(run()))
    assert all(np.abs(pair.moved).max() > 1e-3 for pair in moved[0].pairs.values())


def test_what_training_added_to_a_is_compared_as_well():
    found = analysis.analyze([run(0), run(1)], rows=2)
    (added,), (whole,) = (rows_of(found.comparisons, matrix=name) for name in ("moved A", "A"))
    assert added["overlap"] != pytest.approx(whole["overlap"])
    assert rows_of(found.comparisons, matrix="moved A - B")
    assert rows_of(found.table, measure="overlap with its start", matrix="A")
    without = analysis.analyze([run(0), run(1)], rows=0)
    assert not rows_of(without.comparisons, matrix="moved A")


def test_gradients_of_tasks_are_those_of_their_mean_losses():
    loaded = runs.load_run(run())
    splits = collect.encoded(loaded, "validation", 5, answers=True)
    found = collect.gradient_cosines(loaded, splits)
    parameters = [p for name, p in loaded.model.named_parameters() if p.requires_grad and "heads" not in name]
    rows = []
    for row, split in splits.items():
        batch = collect.Collator(loaded.tokenizer)([(row, split, i) for i in range(len(split))])
        loaded.model.zero_grad()
        loaded.model(**batch)["loss"].backward()
        rows.append(torch.cat([p.grad.flatten() for p in parameters]).numpy())
    unit = np.stack(rows) / np.linalg.norm(rows, axis=1, keepdims=True)
    assert found == pytest.approx(unit @ unit.T, abs=1e-4)


def test_short_names_tell_folders_apart(tmp_path):
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "b" / "other"]
    assert collect.short_names(folders) == ["a/run", "b/run", "b/other"]
    assert collect.short_names(folders[1:]) == ["run", "other"]


def test_runs_of_other_settings_are_no_seeds_of_each_other(tmp_path):
    other = training.train(
        tiny.settings(
            tmp_path / "run", adapter={"r": 2, "target_modules": "query-value"}, training={"seed": 1, "steps": 6}
        )
    )
    found = analysis.analyze([run(), other], rows=0)
    assert {row["label"] for row in found.table} == {"UnoLoRA* (task+sample), r=4", "UnoLoRA* (task+sample), r=2"}


def test_what_is_written_is_read(tmp_path):
    found = analysis.analyze([run(0), run(1)], rows=3)
    analysis.write(found, tmp_path / "out")
    again = analysis.read(tmp_path / "out")
    assert (again.tasks, again.notes) == (found.tasks, found.notes)
    assert again.table == found.table
    assert again.arrays.keys() == found.arrays.keys()
    assert all(np.array_equal(again.arrays[key], value, equal_nan=True) for key, value in found.arrays.items())
    with pytest.raises(InputError, match="expected the numbers that `unolora analyze` writes"):
        analysis.read(tmp_path)


def test_every_figure_is_one_that_plotly_takes():
    graph_objects = pytest.importorskip("plotly.graph_objects")
    from unolora.charts import Figure
    from unolora.report import learned

    found = analysis.analyze([run(0), run(1)], [run(method="lora-per-task")], rows=3, ablate=True)
    figures = [item for item in learned.items(found, {}) if isinstance(item, Figure)]
    titles = " ".join(figure.title for figure in figures)
    for title in ("Overlap", "Effective ranks", "Spectra", "Scales", "alike", "Without a part", "lie", "Correlation"):
        assert title in titles
    for figure in figures:
        for panel in figure.panels:
            assert graph_objects.Figure(panel.plot).data
            assert panel.table.rows
    (places,) = [figure for figure in figures if "lie" in figure.title]
    drawn = sum(len(trace["x"]) for trace in places.panels[0].plot["data"])
    assert drawn == 4 * (2 + 3)  # projections of two adapters, and of one for each of three tasks
