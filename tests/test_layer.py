"""The low-rank pair and its scale, on plain layers."""

import math
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import settings as quick
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from unolora.errors import InputError
from unolora.layer import UnoLoraLayer, current_scales, scaled_by

QUICK = quick(max_examples=25, deadline=None)
SIZES = st.integers(1, 6)


def layer(d_in=5, d_out=4, r=3, *, conv=False, scaled=True, dropout=0.0, dtype=torch.float64) -> UnoLoraLayer:
    base = (Conv1D(d_out, d_in) if conv else nn.Linear(d_in, d_out)).to(dtype)
    found = UnoLoraLayer(base, d_in, d_out)
    found.add("uno", r=r, alpha=7, dropout=dropout)
    found.uno_A.to(dtype), found.uno_B.to(dtype)
    nn.init.normal_(found.uno_B["uno"])
    if scaled:
        found.position["uno"] = 1
    return found


def scales(B: int, r: int = 3, P: int = 3) -> torch.Tensor:
    return torch.randn(B, P, r, dtype=torch.float64)


def reference(of: UnoLoraLayer, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """W x + (alpha / r) B diag(s) A x, one row after the other, with the matrices written out."""
    A, B = of.uno_A["uno"], of.uno_B["uno"]
    out = [
        of.base_layer(row) + 7 / len(A) * (row @ (B @ torch.diag(s_row) @ A).T) for row, s_row in zip(x, s, strict=True)
    ]
    return torch.stack(out)


@QUICK
@given(N=SIZES, T=SIZES, d_in=SIZES, d_out=SIZES, r=SIZES, conv=st.booleans())
def test_forward_is_the_papers_equation(N, T, d_in, d_out, r, conv):
    of, x, s = layer(d_in, d_out, r, conv=conv), torch.randn(N, T, d_in, dtype=torch.float64), scales(N, r)
    with scaled_by({"uno": s}):
        y = of(x)
    assert y.shape == (N, T, d_out)
    torch.testing.assert_close(y, reference(of, x, s[:, 1]))
    if d_in > 1:
        assert not torch.allclose(y, of.base_layer(x))


@QUICK
@given(B=SIZES, beams=SIZES, T=SIZES)
def test_beams_repeat_each_sample_in_turn(B, beams, T):
    of, x, s = layer(), torch.randn(B, T, 5, dtype=torch.float64), scales(B)
    with scaled_by({"uno": s}):
        once, repeated = of(x), of(x.repeat_interleave(beams, dim=0))
    torch.testing.assert_close(repeated, once.repeat_interleave(beams, dim=0))


@QUICK
@given(B=SIZES, T=SIZES)
def test_flattened_tokens_count_as_rows_of_their_sample(B, T):
    of, x, s = layer(), torch.randn(B, T, 5, dtype=torch.float64), scales(B)
    with scaled_by({"uno": s}):
        torch.testing.assert_close(of(x.flatten(0, 1)), of(x).flatten(0, 1))


@QUICK
@given(order=st.permutations(range(5)))
def test_permuting_the_samples_permutes_the_output(order):
    of, x, s = layer(), torch.randn(5, 2, 5, dtype=torch.float64), scales(5)
    with scaled_by({"uno": s}):
        y = of(x)
    with scaled_by({"uno": s[list(order)]}):
        torch.testing.assert_close(of(x[list(order)]), y[list(order)])


def test_one_scale_serves_any_number_of_rows():
    of, x, s = layer(), torch.randn(5, 2, 5, dtype=torch.float64), scales(1)
    with scaled_by({"uno": s}):
        torch.testing.assert_close(of(x), reference(of, x, s[:, 1].expand(5, -1)))


@QUICK
@given(d_in=SIZES, d_out=SIZES, r=SIZES, conv=st.booleans(), scaled=st.booleans())
def test_delta_weight_is_what_the_forward_adds(d_in, d_out, r, conv, scaled):
    of, x, s = layer(d_in, d_out, r, conv=conv, scaled=scaled), torch.randn(3, d_in, dtype=torch.float64), scales(1, r)
    with scaled_by({"uno": s}):
        delta = of.delta_weight("uno")
        assert delta.shape == of.base_layer.weight.shape
        torch.testing.assert_close(x @ (delta if conv else delta.T), of(x) - of.base_layer(x))


def test_scale_of_one_is_lora():
    of, x = layer(), torch.randn(3, 2, 5, dtype=torch.float64)
    plain = layer(scaled=False)
    plain.load_state_dict(of.state_dict())
    with scaled_by({"uno": torch.ones(3, 3, 3, dtype=torch.float64)}):
        assert torch.equal(of(x), plain(x))
    assert not torch.allclose(plain(x), plain.base_layer(x))


def test_each_position_has_its_own_scale():
    of, x, s = layer(), torch.randn(2, 2, 5, dtype=torch.float64), scales(2)
    with scaled_by({"uno": s}):
        second = of(x)
        of.position["uno"] = 2
        assert not torch.allclose(of(x), second)


@pytest.mark.parametrize("conv", [False, True])
def test_fresh_pair_changes_nothing(conv):
    of = UnoLoraLayer(Conv1D(4, 64) if conv else nn.Linear(64, 4), 64, 4)
    of.add("uno", r=8, alpha=16)
    assert not of.uno_B["uno"].any()
    bound = 1 / math.sqrt(64)  # Kaiming-uniform with a = sqrt 5
    assert 0.9 * bound < of.uno_A["uno"].abs().max() <= bound
    assert of.scaling["uno"] == 2
    x = torch.randn(3, 2, 64)
    assert torch.equal(of(x), of.base_layer(x))


def test_base_layers_own_state_is_untouched():
    base = nn.Linear(5, 4)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    of = UnoLoraLayer(base, 5, 4)
    of.add("uno", r=2, alpha=2)
    of(torch.randn(2, 5)).sum().backward()
    assert of.base_layer is base
    assert all(torch.equal(base.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize(("N", "B"), [(3, 2), (2, 3), (5, 4)])
def test_rows_that_are_no_multiple_of_the_batch_are_refused(N, B):
    with (
        scaled_by({"uno": scales(B)}),
        pytest.raises(InputError, match=f"got {N} rows for a batch of {B}.*target_modules"),
    ):
        layer()(torch.randn(N, 5, dtype=torch.float64))


def test_outside_a_forward_the_scale_is_unknown():
    with pytest.raises(InputError, match=r"scale of adapter 'uno' is not known.*model\.condition"):
        layer()(torch.randn(2, 5, dtype=torch.float64))
    with scaled_by({"another": scales(2)}), pytest.raises(InputError, match="'uno' is not known"):
        layer()(torch.randn(2, 5, dtype=torch.float64))


def test_several_scales_have_no_single_weight():
    with scaled_by({"uno": scales(2)}), pytest.raises(InputError, match="one weight needs one scale, got 2"):
        layer().delta_weight("uno")


def test_scales_nest_and_leave_no_trace():
    outer, inner = {"uno": scales(1)}, {"uno": scales(2)}
    owner = object()
    with scaled_by(outer, owner):
        with scaled_by(inner):
            assert current_scales() is inner
            assert current_scales(owner) is None
        assert current_scales() is outer
        with pytest.raises(RuntimeError, match="on purpose"), scaled_by(inner):
            raise RuntimeError("on purpose")
        assert current_scales(owner) is outer
        assert current_scales(object()) is None
    assert current_scales() is None


def test_scales_are_one_threads_own():
    of, x = layer(), torch.randn(2, 3, 5, dtype=torch.float64)
    both = [scales(2), scales(2)]
    expected = [reference(of, x, s[:, 1]) for s in both]
    assert not torch.allclose(*expected)
    barrier, found = threading.Barrier(2), [True, True]

    def run(k: int) -> None:
        for _ in range(50):
            with scaled_by({"uno": both[k]}):
                barrier.wait(10)  # both have set theirs before either reads
                found[k] &= torch.allclose(of(x), expected[k])

    threads = [threading.Thread(target=run, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [True, True]
    assert current_scales() is None


def test_dropout_acts_on_the_input_in_training_only():
    of, x = layer(scaled=False, dropout=0.5), torch.ones(2, 5, dtype=torch.float64)
    of.train()
    assert not torch.equal(of(x), of(x))
    of.eval()
    assert torch.equal(of(x), of(x))
    torch.testing.assert_close(of(x) - of.base_layer(x), x @ of.delta_weight("uno").T)


def test_adapters_add_up():
    of, x = layer(scaled=False), torch.randn(2, 5, dtype=torch.float64)
    of.add("due", r=2, alpha=2)
    of.uno_A.to(torch.float64), of.uno_B.to(torch.float64)
    nn.init.normal_(of.uno_B["due"])
    updates = [nn.functional.linear(of.reduced(name, x), of.uno_B[name]) for name in ("uno", "due")]
    assert all(update.abs().max() > 0.1 for update in updates)
    torch.testing.assert_close(of(x), of.base_layer(x) + sum(updates))


def test_output_keeps_the_base_layers_dtype():
    of = layer(dtype=torch.bfloat16)
    of.uno_A.to(torch.float32), of.uno_B.to(torch.float32)
    x = torch.randn(2, 3, 5, dtype=torch.bfloat16)
    with scaled_by({"uno": scales(2)}):
        y = of(x)
    assert y.dtype == torch.bfloat16
    assert (y - of.base_layer(x)).abs().max() > 0.1


def test_gradients_reach_the_pair_and_the_scale_and_are_right():
    of, x, s = layer(), torch.randn(2, 3, 5, dtype=torch.float64), scales(2).requires_grad_()

    def run(A, B, s):
        with scaled_by({"uno": s}):
            return torch.func.functional_call(of, {"uno_A.uno": A, "uno_B.uno": B}, (x,))

    pair = [of.uno_A["uno"].detach().clone().requires_grad_(), of.uno_B["uno"].detach().clone().requires_grad_()]
    assert torch.autograd.gradcheck(run, (*pair, s))
