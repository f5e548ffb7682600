"""The low-rank products beside the formulas that they stand for, with their gradients and what they keep."""

import itertools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from unolora import fused
from unolora.fused import LEVELS, chunks, down, up
from unolora.layer import UnoLoraLayer

SHAPES = [(1, 1, 1, 1), (2, 3, 5, 2), (4, 7, 6, 3), (3, 1, 9, 8)]  # B, T, D, R; some no multiple of a random number's 4


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks for a small input, the last one shorter."""
    monkeypatch.setattr(fused, "CHUNK", 20)


def numbers(*shape, dtype=torch.float64, grad=True):
    return torch.randn(shape, dtype=dtype).requires_grad_(grad)


def mask_of(x, p, seed):
    """The mask that `down` draws for x after `torch.manual_seed(seed)`, scaled."""
    torch.manual_seed(seed)
    dropped = round(p * LEVELS)
    drawn = torch.randint(2**63 - 1, ()).item()
    parts = [mask.clone() for _, mask in chunks(x[..., 0].numel(), x.shape[-1], dropped, drawn)]
    return torch.cat(parts).view(x.shape).to(x.dtype) / (1 - dropped / LEVELS)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
def test_down_is_its_formula_with_gradients(shape, p):
    B, T, D, R = shape
    x, A, g = numbers(B, T, D), numbers(R, D), numbers(B, T, R, grad=False)
    mask = mask_of(x, p, 3) if p else torch.ones_like(x)
    assert len(list(chunks(B * T, D, 1, 0))) > 1 or B * T * D <= 20
    torch.manual_seed(3)
    h = down(x, A, p)
    expected = F.linear(x * mask, A)
    torch.testing.assert_close(h, expected)
    found = torch.autograd.grad(h, (x, A), g)
    for one, other in zip(found, torch.autograd.grad(expected, (x, A), g), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_right(shape):
    B, T, D, R = shape
    x, A, s, y, up_B = numbers(B, T, D), numbers(R, D), numbers(B, 1, R), numbers(B, T, D), numbers(D, R)

    def run(x, A, s, y, up_B):
        torch.manual_seed(0)
        return up(y, down(x, A, 0.4) * s, up_B)

    assert torch.autograd.gradcheck(run, (x, A, s, y, up_B))


@pytest.mark.parametrize("shape", SHAPES)
def test_up_is_its_formula_with_gradients(shape):
    B, T, D, R = shape
    y, h, up_B, g = numbers(B, T, D), numbers(B, T, R), numbers(D, R), numbers(B, T, D, grad=False)
    torch.testing.assert_close(up(y, h, up_B), y + F.linear(h, up_B))
    found = torch.autograd.grad(up(y, h, up_B), (y, h, up_B), g)
    for one, other in zip(found, torch.autograd.grad(y + F.linear(h, up_B), (y, h, up_B), g), strict=True):
        torch.testing.assert_close(one, other)


def test_a_layer_is_the_plain_formula():
    of = UnoLoraLayer(nn.Linear(64, 48), 64, 48)
    of.add("uno", r=4, alpha=8, dropout=0.25)
    nn.init.normal_(of.uno_B["uno"])
    x = numbers(8, 50, 64, dtype=torch.float32)
    mask = mask_of(x, 0.25, 5)
    A, B = of.uno_A["uno"], of.uno_B["uno"]
    plain = of.base_layer(x) + 2 * F.linear(F.linear(x * mask, A), B)
    torch.manual_seed(5)
    y = of(x)
    torch.testing.assert_close(y, plain)
    for one, other in zip(
        torch.autograd.grad(y.square().sum(), (x, A, B)),
        torch.autograd.grad(plain.square().sum(), (x, A, B)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


# The mask


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_as_many_elements_are_dropped_as_asked_for(p):
    torch.manual_seed(0)
    kept = down(torch.eye(1000), torch.eye(1000), p).diagonal()  # 1000 of a million, each on its own
    whole = torch.cat([mask for _, mask in chunks(1000, 1000, round(p * LEVELS), 1)]).float()
    deviation = (p * (1 - p)) ** 0.5
    assert abs((kept == 0).float().mean() - p) < 5 * deviation / 1000**0.5
    assert abs((whole == 0).float().mean() - p) < 5 * deviation / 1000
    assert sorted(kept.unique().tolist()) == pytest.approx([0.0, 1 / (1 - p)], rel=1e-3)


def test_neighbours_are_dropped_independently():
    """Within a row, from row to row, within one random number and from one chunk to the next."""
    mask = torch.cat([mask for _, mask in chunks(4000, 100, LEVELS // 2, 7)]).double()
    assert 2 * fused.CHUNK < 4000 * 100
    centred = mask - 0.5
    for lag in (1, 2, 3, 4, 5, 100, 101, fused.CHUNK // 100 * 100):
        flat = centred.flatten()
        correlation = (flat[:-lag] * flat[lag:]).mean() / 0.25
        assert abs(correlation) < 5 / (len(flat) - lag) ** 0.5, lag


def test_masks_differ_from_call_to_call_and_follow_the_seed():
    x, A = torch.ones(50, 40), torch.ones(3, 40)
    torch.manual_seed(1)
    first, second = down(x, A, 0.5), down(x, A, 0.5)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(down(x, A, 0.5), first)


def test_no_dropout_draws_no_random_number():
    before = torch.get_rng_state()
    down(torch.ones(3, 4), torch.ones(2, 4), 0.0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("p", [1.0, 1e-9])
def test_what_levels_cannot_express_is_left_to_torch(p):
    x, A = torch.ones(5, 4), torch.ones(2, 4)
    torch.testing.assert_close(down(x, A, p), F.linear(F.dropout(x, p), A))


# What is kept for the backward


def kept_bytes(run):
    """Bytes of the distinct storages that `run` keeps for its backward."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    return sum(storages.values()), out


def test_two_projections_of_one_input_keep_it_once():
    """Beside x [N, D] only what is as narrow as the rank; plain dropout keeps two masks and two masked inputs."""
    N, D, R = 512, 256, 8
    x = numbers(N, D, dtype=torch.float32)
    pair = []
    for _ in range(2):
        of = UnoLoraLayer(nn.Linear(D, D).requires_grad_(False), D, D)
        of.add("uno", r=R, alpha=8, dropout=0.1)
        pair.append(of)
    fixed = 2 * D * D * 4 + 2 * 2 * D * R * 4  # both W, both pairs
    bytes_kept, _ = kept_bytes(lambda: [of(x) for of in pair])
    assert bytes_kept == fixed + N * D * 4 + 2 * N * R * 4

    def plain():
        return [
            of.base_layer(x) + F.linear(F.linear(F.dropout(x, 0.1), of.uno_A["uno"]), of.uno_B["uno"]) for of in pair
        ]

    bytes_kept, _ = kept_bytes(plain)
    assert bytes_kept == fixed + 4 * N * D * 4 + 2 * N * R * 4


# Where the plain formulas run


def test_autocast_computes_in_its_type():
    torch.manual_seed(0)
    x, A, up_B, y = (numbers(*shape, dtype=torch.float32) for shape in ((64, 32), (4, 32), (16, 4), (64, 16)))
    mask = mask_of(x, 0.5, 2)
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16):
        h = down(x, A, 0.5)
        out = up(y.bfloat16(), h, up_B)
        expected = y.bfloat16() + F.linear(F.linear(x * mask, A), up_B)
    assert h.dtype == out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.3)
    out.float().sum().backward()
    assert {t.grad.dtype for t in (x, A, up_B, y)} == {torch.float32}


def test_half_precision_adds_up_gradients_in_single():
    """Over many chunks; in bfloat16, ones stop adding up at 256."""
    x = torch.ones(4 * fused.CHUNK // 64, 64, dtype=torch.bfloat16)
    A = torch.zeros(1, 64, dtype=torch.bfloat16, requires_grad=True)
    assert len(list(chunks(*x.shape, 1, 0))) == 4
    down(x, A, 0.5).backward(torch.ones(len(x), 1, dtype=torch.bfloat16))
    torch.testing.assert_close(A.grad.float().mean(), torch.tensor(float(len(x))), rtol=0.01, atol=0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_draws_the_same_mask_again(reentrant):
    x, A = numbers(20, 8), numbers(3, 8)

    def grads(checkpointed):
        torch.manual_seed(4)
        h = (
            torch.utils.checkpoint.checkpoint(down, x, A, 0.5, use_reentrant=reentrant)
            if checkpointed
            else down(x, A, 0.5)
        )
        out = h.square().sum()
        torch.rand(3)  # the generator moves on before the backward
        x.grad = A.grad = None
        out.backward()
        return x.grad, A.grad

    plain, again = grads(False), grads(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_frozen_inputs_get_no_gradient():
    x, A = numbers(6, 8, grad=False), numbers(3, 8)
    torch.manual_seed(0)
    down(x, A, 0.5).sum().backward()
    assert x.grad is None
    assert A.grad is not None


def test_compiled_code_has_the_plain_formulas():
    torch._dynamo.reset()
    x, A, y, up_B = torch.ones(6, 8), torch.ones(3, 8), torch.ones(6, 4), torch.ones(4, 3)
    compiled = torch.compile(lambda: up(y, down(x, A, 0.0), up_B), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(), y + F.linear(F.linear(x, A), up_B))
    dropped = torch.compile(lambda: down(x, A, 0.5), backend="eager", fullgraph=True)
    assert dropped().shape == (6, 3)


def test_any_number_of_leading_axes():
    A, up_B = torch.randn(2, 5), torch.randn(3, 2)
    for shape in itertools.accumulate([(4,), (3,), (2,)], lambda a, b: (*a, *b)):
        x, y = torch.randn(*shape, 5), torch.randn(*shape, 3)
        assert down(x, A, 0.5).shape == (*shape, 2)
        assert up(y, down(x, A, 0.5), up_B).shape == y.shape


# Dropout by itself


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 7), ()])
def test_dropout_and_its_gradient_have_one_mask(shape, monkeypatch):
    monkeypatch.setattr(fused, "CHUNK", 4)
    x = numbers(*shape)
    y = fused.Dropout(0.5)(x)
    factors = (y / x).detach()
    torch.testing.assert_close(factors * (2 - factors), torch.zeros_like(factors))  # each is 0 or 2
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], factors)


def test_dropout_keeps_no_mask():
    x = numbers(300, 400, dtype=torch.float32)
    assert kept_bytes(lambda: fused.Dropout(0.1)(x))[0] == 0
    assert kept_bytes(lambda: nn.Dropout(0.1)(x))[0] > 0


def test_dropout_does_nothing_where_nn_dropout_does_nothing():
    x = torch.ones(20, 30)
    assert torch.equal(fused.Dropout(0.5).eval()(x), x)
    assert torch.equal(fused.Dropout(0.0)(x), x)
    assert not fused.Dropout(1.0)(x).any()
    assert fused.Dropout(0.5, inplace=True)(x) is x
    assert not x.all()


def test_only_nn_dropout_itself_is_replaced():
    class Own(nn.Dropout):
        pass

    model = nn.Sequential(nn.Dropout(0.3), nn.Sequential(nn.Dropout(0.2)), Own(0.1)).eval()
    fused.replace_dropout(model)
    assert [type(m) for m in model.modules() if isinstance(m, nn.Dropout)] == [fused.Dropout, fused.Dropout, Own]
    assert [model[0].p, model[1][0].p] == [0.3, 0.2]
    assert not model[0].training
