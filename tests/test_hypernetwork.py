"""The hypernetwork, alone and with the layer: against numbers computed elsewhere, and property by property."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as quick
from hypothesis import strategies as st
from torch import nn

from unolora.hypernetwork import Hypernetwork, encode_sample
from unolora.layer import UnoLoraLayer, scaled_by

QUICK = quick(max_examples=25, deadline=None)
VECTOR = Path(__file__).parents[1] / "../shared/vectors/unolora_star.json"
PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-5)]


def network(K=3, P=4, r=2, *, sample_dim=6, awake=True, **more) -> Hypernetwork:
    found = Hypernetwork(K, P, r, sample_dim=sample_dim, **more)
    if awake:
        for parameter in found.parameters():
            nn.init.normal_(parameter, std=0.7)
    return found


# The conformance vector


@pytest.fixture(scope="module")
def vector() -> dict:
    if not VECTOR.is_file():
        pytest.skip(f"the conformance vector is not at {VECTOR.resolve()}")
    return json.loads(VECTOR.read_text("utf-8"))


def with_weights(vector: dict, dtype: torch.dtype, scale_init: str) -> tuple[Hypernetwork, list[UnoLoraLayer]]:
    sizes, weights = vector["sizes"], vector["weights"]
    hypernetwork = Hypernetwork(
        sizes["K"],
        sizes["P"],
        sizes["r"],
        sample_dim=sizes["D"],
        embedding_dim=sizes["d"],
        bottleneck_dim=sizes["d_b"],
        scale_init=scale_init,
    ).to(dtype)
    layers = []
    with torch.no_grad():
        hypernetwork.task_embedding.weight.copy_(torch.tensor(weights["task_embedding"], dtype=dtype))
        hypernetwork.position_embedding.weight.copy_(torch.tensor(weights["position_embedding"], dtype=dtype))
        copy_mlp(hypernetwork.bottleneck, [*weights["bottleneck"], weights["bottleneck_projection"]], dtype)
        copy_mlp(hypernetwork.combine, weights["combine"], dtype)
        for p in range(sizes["P"]):
            weight, bias = weights["scale"][p]
            hypernetwork.scale_weight[p] = torch.tensor(weight, dtype=dtype)
            hypernetwork.scale_bias[p] = torch.tensor(bias, dtype=dtype)
            base = nn.Linear(sizes["D"], sizes["d_out"], bias=False).to(dtype)
            base.weight.copy_(torch.tensor(weights["W"][p], dtype=dtype))
            layer = UnoLoraLayer(base, sizes["D"], sizes["d_out"])
            layer.add("uno", r=sizes["r"], alpha=vector["alpha"])
            layer.position["uno"] = p
            layer.to(dtype)
            layer.uno_A["uno"].copy_(torch.tensor(weights["A"][p], dtype=dtype))
            layer.uno_B["uno"].copy_(torch.tensor(weights["B"][p], dtype=dtype))
            layers.append(layer)
    return hypernetwork, layers


def copy_mlp(mlp: nn.Sequential, weights: list, dtype: torch.dtype) -> None:
    linears = [module for module in mlp if isinstance(module, nn.Linear)]
    assert len(linears) == len(weights)
    for linear, (weight, bias) in zip(linears, weights, strict=True):
        linear.weight.copy_(torch.tensor(weight, dtype=dtype))
        linear.bias.copy_(torch.tensor(bias, dtype=dtype))


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=["float64", "float32"])
@pytest.mark.parametrize("scale_init", ["one", "paper"])
def test_conformance_vector(vector, dtype, tolerance, scale_init):
    hypernetwork, layers = with_weights(vector, dtype, scale_init)
    tasks, mask = torch.tensor(vector["tasks"]), torch.tensor(vector["mask"])
    assert not mask.all()  # it is about padding too
    embeddings, x = (torch.tensor(vector[name], dtype=dtype) for name in ("embeddings", "x"))
    expected = {name: torch.tensor(value, dtype=torch.float64) for name, value in vector["expected"].items()}
    with torch.no_grad():
        s = hypernetwork(tasks, encode_sample(embeddings, mask))
        with scaled_by({"uno": s}):
            y = torch.stack([layer(x) for layer in layers], dim=1)
    assert s.dtype == y.dtype == dtype
    S = s.double() - (1 if scale_init == "one" else 0)
    # Outputs reach 50, where neighbouring float32 numbers are 4e-6 apart: beyond 1 the tolerance is relative.
    torch.testing.assert_close(S, expected["S"], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(y.double(), expected[f"y_scale_init_{scale_init}"], rtol=tolerance, atol=tolerance)


def test_conformance_vector_tells_the_starts_apart(vector):
    one, paper = (torch.tensor(vector["expected"][f"y_scale_init_{name}"]) for name in ("one", "paper"))
    assert (one - paper).abs().max() > 0.1


# The sample encoding


@QUICK
@given(B=st.integers(1, 4), T=st.integers(1, 6), left=st.integers(0, 5), right=st.integers(0, 5), garbage=st.booleans())
def test_encoding_does_not_see_padding(B, T, left, right, garbage):
    tokens = torch.randn(B, T, 3, dtype=torch.float64)
    pad = 1e3 if garbage else 0.0
    padded = torch.cat([torch.full((B, left, 3), pad), tokens, torch.full((B, right, 3), pad)], dim=1)
    mask = torch.cat([torch.zeros(B, left), torch.ones(B, T), torch.zeros(B, right)], dim=1)
    torch.testing.assert_close(encode_sample(padded, mask), tokens.mean(dim=1))


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_encoding_takes_masks_of_any_type(dtype):
    tokens, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 0, 0], [0, 1, 0, 0]])
    expected = torch.stack([tokens[0, :2].mean(0), tokens[1, 1]])
    torch.testing.assert_close(encode_sample(tokens, mask.to(dtype)), expected)


def test_encoding_of_nothing_is_zero():
    assert not encode_sample(torch.randn(2, 4, 3), torch.zeros(2, 4)).any()


@pytest.mark.parametrize(
    ("given_dtype", "dtype"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_encoding_is_summed_in_single_precision_at_least(given_dtype, dtype):
    ones = torch.ones(1, 3000, 2, dtype=given_dtype)
    encoded = encode_sample(ones, torch.ones(1, 3000))
    assert encoded.dtype == dtype
    assert torch.equal(encoded, torch.ones(1, 2, dtype=dtype))


# What s depends on


def test_scale_depends_on_task_sample_and_position():
    of, sample = network(), torch.randn(2, 6)
    s = of(torch.tensor([0, 0]), sample)
    assert s.shape == (2, 4, 2)
    assert (s[0] - s[1]).abs().max() > 0.05
    assert (s[0, 0] - s[0, 1]).abs().max() > 0.05
    assert (s - of(torch.tensor([1, 1]), sample)).abs().max() > 0.05


def test_without_the_sample_scale_depends_on_task_and_position_alone():
    of = network(sample_dim=None)
    assert of.bottleneck is None
    s = of(torch.tensor([0, 1, 0]))
    assert torch.equal(s[0], s[2])
    assert (s[0] - s[1]).abs().max() > 0.05


@QUICK
@given(tasks=st.lists(st.integers(0, 2), min_size=1, max_size=5))
def test_each_sample_is_alone(tasks):
    of, sample = network().double(), torch.randn(len(tasks), 6, dtype=torch.float64)
    together = of(torch.tensor(tasks), sample)
    alone = [of(torch.tensor([task]), sample[i : i + 1]) for i, task in enumerate(tasks)]
    torch.testing.assert_close(together, torch.cat(alone))


@pytest.mark.parametrize(("scale_init", "start", "spread"), [("one", 1.0, (0.2, 1.0)), ("paper", 0.0, (1e-4, 0.05))])
def test_start(scale_init, start, spread):
    of = network(K=20, P=40, r=8, awake=False, scale_init=scale_init)
    S = of(torch.arange(20), torch.randn(20, 6)) - start
    assert spread[0] < S.std() < spread[1]
    assert abs(S.mean()) < 0.3 * spread[1]
    tasks = of(torch.arange(20), torch.zeros(20, 6)).std(dim=0).mean()  # apart by their tasks alone
    assert spread[0] / 10 < tasks < spread[1]
    with torch.no_grad():
        of.scale_weight.zero_()
    assert torch.equal(of(torch.tensor([0]), torch.randn(1, 6)), torch.full((1, 40, 8), start))


def test_positions_are_shared_modulo_their_number():
    of = network(P=5, num_positions=3, sample_dim=None)
    assert of.position_embedding.weight.shape == (3, 8)
    with torch.no_grad():
        of.scale_weight.copy_(of.scale_weight[:1].expand(5, -1, -1))  # one map for all, so that only e_pos differs
        of.scale_bias.zero_()
    s = of(torch.tensor([1]))[0]
    assert torch.equal(s[0], s[3])
    assert torch.equal(s[1], s[4])
    assert (s[0] - s[1]).abs().max() > 0.01


def test_by_default_each_projection_has_its_own_position():
    assert network(P=5).position_embedding.weight.shape == (5, 8)


def test_shape_of_the_papers_networks():
    def widths(mlp: nn.Sequential) -> list[int]:
        return [mlp[0].in_features] + [module.out_features for module in mlp if isinstance(module, nn.Linear)]

    of = network(sample_dim=768)
    assert widths(of.bottleneck) == [768, 16, 16, 8]
    assert widths(of.combine) == [24, 16, 16, 16, 8]
    for mlp in (of.bottleneck, of.combine):
        assert [type(module) for module in mlp] == ([nn.Linear, nn.ReLU] * len(mlp))[: len(mlp)]
        assert isinstance(mlp[-1], nn.Linear)  # the last one has no ReLU


@QUICK
@given(K=st.integers(1, 9), P=st.integers(1, 9), r=st.integers(1, 9), d=st.integers(1, 9), db=st.integers(1, 9))
def test_number_of_parameters(K, P, r, d, db):
    of = Hypernetwork(K, P, r, sample_dim=7, embedding_dim=d, bottleneck_dim=db)
    bottleneck = (7 * db + db) + (db * db + db) + (db * d + d)
    combine = (3 * d * 2 * d + 2 * d) + 2 * (4 * d * d + 2 * d) + (2 * d * d + d)
    assert sum(p.numel() for p in of.parameters()) == (K + P) * d + bottleneck + combine + P * (d * r + r)


def test_every_parameter_gets_a_gradient():
    of = network()
    of(torch.tensor([0, 1, 2]), torch.randn(3, 6)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in of.parameters())


def test_sample_gets_a_gradient_and_a_right_one():
    of, sample = network().double(), torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: of(torch.tensor([0, 2]), x), (sample,))


def test_scales_are_computed_in_the_networks_own_precision():
    of = network().double()
    s = of(torch.tensor([0]), torch.randn(1, 6))
    assert s.dtype == torch.float64
