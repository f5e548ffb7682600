"""One product for projections that read the same input: what it gives, when it is made, and what is left of it."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from peft import get_peft_model
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from conftest import MIXED, TASKS, adapted, apart, backbone, batch, settings, wake
from unolora import fused, siblings
from unolora.fused import LEVELS, chunks, down_each
from unolora.layer import UnoLoraLayer

P = 0.25


@pytest.fixture
def passes(monkeypatch):
    """The inputs that were gone through with a mask: (rows, width, seed) of each, forward and backward alike."""
    found = []

    def counted(rows, width, dropped, seed):
        found.append((rows, width, seed))
        return chunks(rows, width, dropped, seed)

    monkeypatch.setattr(fused, "chunks", counted)
    return found


@pytest.fixture(autouse=True)
def _nothing_held():
    siblings.forget()
    yield
    siblings.forget()


class OnPurposeError(RuntimeError):
    pass


def numbers(*shape, dtype=torch.float64, grad=True):
    return torch.randn(shape, dtype=dtype).requires_grad_(grad)


def projections(count=2, d=12, dropout=P, dtype=torch.float64, adapter_dtype=None, r=3):
    """Layers that may read the same input, awake and in training mode."""
    found = []
    for _ in range(count):
        layer = UnoLoraLayer(nn.Linear(d, 8).to(dtype), d, 8)
        layer.add("uno", r=r, alpha=2 * r, dropout=dropout)
        nn.init.normal_(layer.uno_B["uno"])
        layer.uno_A.to(adapter_dtype or dtype), layer.uno_B.to(adapter_dtype or dtype)
        found.append(layer)
    for layer in found:
        layer.siblings = tuple(other for other in found if other is not layer)
    return found


def masks(x, count, seed=3):
    """The masks that `count` products with x draw in turn after `torch.manual_seed(seed)`, scaled."""
    torch.manual_seed(seed)
    dropped = round(P * LEVELS)
    found = []
    for _ in range(count):
        drawn = torch.randint(2**63 - 1, ()).item()
        parts = [mask.clone() for _, mask in chunks(x[..., 0].numel(), x.shape[-1], dropped, drawn)]
        found.append(torch.cat(parts).view(x.shape).to(x.dtype) / (1 - dropped / LEVELS))
    return found


def plain(layer, x, mask, name="uno"):
    A, B = layer.uno_A[name], layer.uno_B[name]
    return layer.base_layer(x) + layer.scaling[name] * F.linear(F.linear(x * mask, A), B)


def same(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def dropping(family, p=P, **more):
    """A tiny model in training mode, in which only the adapter drops."""
    model = adapted(family, dropout=p, **more)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "dropout_prob", "attention_dropout", "dropout_rate", "attn_pdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    for layer in model.layers("default").values():
        layer.uno_dropout["default"].p = p
    return model.train()


def losses_and_gradients(model, inputs, seed=5):
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(**inputs, tasks=MIXED).loss
    torch.rand(3)  # the generator moves on before the backward
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


# What it gives


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("grad", [True, False])
def test_the_formula_with_one_mask_and_its_gradients(count, grad, monkeypatch, passes):
    monkeypatch.setattr(fused, "CHUNK", 40)  # several chunks, the last one shorter
    layers, x = projections(count), numbers(2, 5, 12, grad=grad)
    (mask,) = masks(x, 1)
    expected = [plain(layer, x, mask) for layer in layers]
    torch.manual_seed(3)
    found = [layer(x) for layer in layers]
    same(found, expected)
    wanted = [*([x] if grad else []), *(p for layer in layers for p in layer.parameters())]
    weights = torch.arange(1.0, count + 1)
    gradients = [
        torch.autograd.grad(sum(w * y.square().sum() for w, y in zip(weights, ys, strict=True)), wanted)
        for ys in (found, expected)
    ]
    same(*gradients)
    assert len(passes) == 2  # forward and backward


def test_gradients_of_several_products_are_right():
    """Also where only some of the outputs are used, and ranks differ."""
    x, As = numbers(3, 7, 6), [numbers(r, 6) for r in (2, 1, 3)]

    def run(used):
        def products(x, *As):
            torch.manual_seed(0)
            found = down_each(x, As, 0.4)
            return tuple(found[i] for i in used)

        return products

    for used in ([0, 1, 2], [1], [0, 2]):
        assert torch.autograd.gradcheck(run(used), (x, *As))


def test_a_frozen_pair_gets_no_gradient():
    one, other = projections()
    x = numbers(4, 12, grad=False)
    other.uno_A["uno"].requires_grad_(False)
    (one(x) + other(x)).sum().backward()
    assert one.uno_A["uno"].grad is not None
    assert other.uno_A["uno"].grad is None
    assert x.grad is None


def test_without_dropout_it_is_lora_and_draws_nothing(passes):
    layers, x = projections(dropout=0.0), numbers(2, 5, 12)
    before = torch.get_rng_state()
    same([layer(x) for layer in layers], [plain(layer, x, 1) for layer in layers])
    assert torch.equal(torch.get_rng_state(), before)
    layers = [layer.eval() for layer in projections()]
    before = torch.get_rng_state()
    same([layer(x) for layer in layers], [plain(layer, x, 1) for layer in layers])
    assert torch.equal(torch.get_rng_state(), before)
    assert not passes


def test_one_number_is_drawn_for_one_product():
    layers, x = projections(), numbers(2, 5, 12)
    torch.manual_seed(4)
    torch.randint(2**63 - 1, ())
    after_one = torch.get_rng_state()
    torch.manual_seed(4)
    for layer in layers:
        layer(x)
    assert torch.equal(torch.get_rng_state(), after_one)
    for layer in layers:
        layer(x)
    assert not torch.equal(torch.get_rng_state(), after_one)


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_a_backbone_in_half_precision(adapter_dtype, passes):
    """x is cast for the product; what makes two of one input is the tensor that was given."""
    layers = projections(dtype=torch.bfloat16, adapter_dtype=adapter_dtype)
    x = numbers(2, 5, 12, dtype=torch.bfloat16)
    (mask,) = masks(x, 1)
    torch.manual_seed(3)
    found = [layer(x) for layer in layers]
    assert len(passes) == 1
    for layer, y in zip(layers, found, strict=True):
        A, B = (of["uno"].float() for of in (layer.uno_A, layer.uno_B))
        expected = layer.base_layer(x).float() + 2 * F.linear(F.linear((x * mask).float(), A), B)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.1)


def test_autocast():
    layers, x = projections(dtype=torch.float32), numbers(2, 5, 12, dtype=torch.float32)
    (mask,) = masks(x, 1)
    expected = [plain(layer, x, mask) for layer in layers]
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        found = [layer(x) for layer in layers]
        again = layers[0](x)
    y = layers[1](x)  # out of it: the part that is held has another type
    assert {y.dtype for y in (*found, again)} == {torch.bfloat16}
    assert y.dtype == torch.float32
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=0.05, atol=0.1)
    sum(y.float().sum() for y in found).backward()
    assert {p.grad.dtype for layer in layers for p in layer.uno_A.parameters()} == {torch.float32}


def test_x_is_kept_once():
    N, D, R = 512, 256, 8
    layers, x = projections(d=D, dtype=torch.float32, r=R), numbers(N, D, dtype=torch.float32)
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = [layer(x) for layer in layers]
    weights = sum(p.nbytes for layer in layers for n, p in layer.named_parameters() if "bias" not in n)
    assert sum(storages.values()) == weights + x.nbytes + len(kept) * N * R * 4


# When it is made


def test_a_self_attention_takes_one_pass(passes):
    model = dropping("bert")
    assert len(model.layers("default")) == 4  # query and value of two layers
    loss = model(**batch("bert"), tasks=MIXED).loss
    assert len(passes) == 2
    loss.backward()
    assert len(passes) == 4
    assert len(set(passes)) == 2  # the backward draws the masks of the forward again


def test_a_cross_attention_takes_two(passes):
    model = dropping("t5")
    assert len(model.layers("default")) == 12  # q and v of two blocks, and of two with a cross-attention
    loss = model(**batch("t5"), tasks=MIXED).loss
    assert [rows for rows, _, _ in passes] == [21, 21, 12, 12, 21, 12, 12, 21]  # the encoder's 3 x 7, the labels' 3 x 4
    loss.backward()
    assert len(passes) == 16


def test_a_wrong_guess_changes_nothing():
    model, inputs = dropping("t5", target_modules=r".*EncDecAttention\.(q|v)"), batch("t5")
    found = losses_and_gradients(model, inputs)
    again = losses_and_gradients(model, inputs)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    for layer in model.layers("default").values():
        assert layer.siblings
        layer.siblings = ()
    same(found, losses_and_gradients(model, inputs))


def test_keys_and_values_of_a_cross_attention_take_one_pass(passes):
    """The query's guess is wrong, the key's is not."""
    (q, k, v), x, y = projections(3), numbers(2, 5, 12), numbers(2, 4, 12)
    first, second = masks(x, 2)[0], masks(y, 2)[1]
    torch.manual_seed(3)
    found = [q(x), k(y), v(y)]
    same(found, [plain(q, x, first), plain(k, y, second), plain(v, y, second)])
    assert len(passes) == 2
    assert not siblings._held.parts  # none was computed for q, which came first


def test_a_value_that_only_looks_the_same_is_another_input(passes):
    (q, v), x = projections(), numbers(2, 5, 12)
    q(x), v(x.clone())
    assert len(passes) == 2


def test_one_fused_projection_has_no_siblings(passes):
    model = dropping("gpt2")
    assert all(layer.siblings == () for layer in model.layers("default").values())
    model(**batch("gpt2"), tasks=MIXED).loss.backward()
    assert len(passes) == 4  # forward and backward of two layers


def test_who_are_siblings():
    """Projections of one module with inputs of one width; not the parts of a container."""
    model = adapted("llama", target_modules="all-linear")
    layers = model.layers("default")
    names = {layer: name for name, layer in layers.items()}
    near = {
        name.split("layers.0.")[1]: sorted(names[of].split(".")[-1] for of in layer.siblings)
        for name, layer in layers.items()
        if "layers.0." in name
    }
    assert near["self_attn.q_proj"] == ["k_proj", "o_proj", "v_proj"]
    assert near["mlp.gate_proj"] == ["up_proj"]
    assert near["mlp.down_proj"] == []

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
            self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    found = get_peft_model(Rows(), settings("task", target_modules=["0", "1"])).base_model.layers("default")
    assert len(found) == 4
    assert all(layer.siblings == () for layer in found.values())


def test_all_projections_of_a_model(passes):
    """q, k and v, then o with an input of its own; gate and up, then down."""
    model = dropping("llama", target_modules="all-linear")
    loss = model(**batch("llama"), tasks=MIXED).loss
    assert len(passes) == 2 * 4
    assert [width for _, width, _ in passes] == [32, 32, 32, 48] * 2
    loss.backward()
    assert len(passes) == 4 * 4


@pytest.mark.parametrize("what", ["x", "A"])
def test_tensors_that_are_more_than_tensors_are_left_alone(what, passes):
    class Own(torch.Tensor):
        pass

    (q, v), x = projections(), numbers(2, 5, 12)
    if what == "x":
        x = x.detach().as_subclass(Own)
    else:
        v.uno_A["uno"] = nn.Parameter(v.uno_A["uno"].detach().as_subclass(Own))
        assert type(v.uno_A["uno"]) is not nn.Parameter
    q(x), v(x)
    assert len(passes) == 2


def test_adapters_of_two_types_are_left_alone(passes):
    (q, v), x = projections(), numbers(2, 5, 12)
    v.uno_A.float(), v.uno_B.float()
    assert {y.dtype for y in (q(x), v(x))} == {x.dtype}
    assert len(passes) == 2


def test_compiled_code_shares_nothing():
    torch._dynamo.reset()
    (q, v), x = projections(), numbers(2, 5, 12)
    compiled = torch.compile(lambda x: q(x) + v(x), backend="eager", fullgraph=True)
    assert compiled(x).shape == (2, 5, 8)
    assert not siblings._held.parts


# Adapters, switches


def test_two_adapters_have_a_product_each(passes):
    layers, x = projections(), numbers(2, 5, 12)
    for layer in layers:
        layer.add("due", r=2, alpha=4, dropout=P)
        nn.init.normal_(layer.uno_B["due"])
        layer.uno_A.to(x.dtype), layer.uno_B.to(x.dtype)
    first, second = masks(x, 2)
    torch.manual_seed(3)
    found = [layer(x) for layer in layers]
    assert len(passes) == 2
    expected = [plain(layer, x, first) + plain(layer, x, second, "due") - layer.base_layer(x) for layer in layers]
    same(found, expected)
    y = numbers(2, 4, 12)
    for times in range(2):  # for either adapter the guess is wrong, each time alike
        passes.clear()
        layers[0](x), layers[1](y)
        assert len(passes) == 4, times


def test_adapters_with_other_projections(passes):
    """One adapter on query and value, one on query and key: none computes for a projection that it does not have."""
    model = adapted("bert", task_type="FEATURE_EXTRACTION", dropout=P)
    model.add_adapter("other", settings(dropout=0.5, target_modules=["query", "key"]))
    wake(model)
    model.base_model.set_adapter(["default", "other"])
    model.eval()
    query = next(layer for name, layer in model.layers("default").items() if name.endswith("query"))
    assert len(query.siblings) == 2
    assert [len(query.train().beside(name)) for name in ("default", "other")] == [0, 0]  # the others are in eval mode
    model.train()
    assert [len(query.beside(name)) for name in ("default", "other")] == [1, 1]
    inputs = batch("bert", "FEATURE_EXTRACTION")
    model(**inputs, tasks=MIXED).last_hidden_state.sum().backward()
    assert len(passes) == 2 * 2 * 2  # layers, adapters, directions


def test_disabled_and_merged(passes):
    model, inputs = dropping("bert", conditioning="task"), batch("bert")
    with model.disable_adapter():
        model(**inputs)
    model.merge_adapter(tasks=TASKS[0])
    model(**inputs, tasks=TASKS[0])
    assert not passes
    model.unmerge_adapter()
    value = next(layer for name, layer in model.layers("default").items() if name.endswith("value"))
    value._disable_adapters = True
    assert value.siblings[0].beside("default") == []
    model(**inputs, tasks=MIXED)
    assert len(passes) == 2  # one of the query alone, one of the other layer


# What a part is good for


def test_a_part_is_for_what_it_was_computed_from(passes):
    """After a change of x, of A, of the mode or of the gradients, by hand between two calls, it is computed anew."""

    def changed(by, x):
        q, v = projections()
        q(x)
        assert len(siblings._held.parts) == 1
        passes.clear()
        by(q, v, x)
        torch.manual_seed(3)
        found = v(x)
        same([found], [plain(v, x, masks(x, 1)[0] if v.training else 1)])
        return found

    @torch.no_grad()
    def twice(tensor):
        tensor.mul_(2)

    changed(lambda q, v, x: twice(x), numbers(2, 5, 12))
    assert len(passes) == 1
    changed(lambda q, v, x: twice(v.uno_A["uno"]), numbers(2, 5, 12))
    assert len(passes) == 1
    changed(lambda q, v, x: v.eval(), numbers(2, 5, 12))
    assert not passes

    (q, v), x = projections(), numbers(2, 5, 12)
    with torch.no_grad():
        q(x)
    v(x).sum().backward()
    assert v.uno_A["uno"].grad is not None


def test_a_part_goes_with_the_backward(passes):
    (q, v), x = projections(), numbers(2, 5, 12)
    q(x).sum().backward()
    assert not siblings._held.parts
    v(x).sum().backward()  # of a product of its own
    assert len(passes) == 4


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    (q, v), x = projections(), numbers(2, 5, 12)
    (mask,) = masks(x, 1)
    torch.manual_seed(3)
    with mode():
        found = [q(x).clone(), v(x).clone()]
        inside = torch.ones(2, 5, 12, dtype=x.dtype)  # has no count of changes in inference mode
        q(inside), v(inside)
    same([y.clone() for y in found], [plain(layer, x, mask).detach() for layer in (q, v)])


# What is left


def test_nothing_is_held_when_all_have_taken_theirs():
    (q, v), x = projections(), numbers(2, 5, 12)
    q(x)
    assert siblings._held.parts
    v(x)
    assert not siblings._held.parts


def test_a_projection_that_is_not_called_leaves_nothing():
    """DeBERTa's query and key map positions as well, its value does not."""
    wanted = {"target_modules": ["query_proj", "key_proj", "value_proj"]}
    model, inputs = dropping("deberta-v3", conditioning="none", **wanted), batch("deberta-v3")
    left, refs = [], []

    def look(module, arguments, output):
        parts = list(siblings._held.parts.values())
        left.append(len(parts))
        refs.extend(weakref.ref(part.x) for part in parts)

    attention = [module for module in model.modules() if type(module).__name__ == "DisentangledSelfAttention"]
    for module in attention:
        module.register_forward_hook(look)
    loss = model(**inputs).loss
    assert left == [1, 1]
    assert not siblings._held.parts
    loss.backward()
    del loss
    gc.collect()
    assert all(ref() is None for ref in refs)


@pytest.mark.parametrize("place", ["query", "value"])
def test_a_forward_that_fails_leaves_nothing(place):
    model, inputs = dropping("bert"), batch("bert")
    expected = losses_and_gradients(model, inputs)
    seen = []

    def fail(module, arguments):
        seen.append((len(siblings._held.parts), weakref.ref(arguments[0])))
        raise OnPurposeError

    layer = next(layer for name, layer in model.layers("default").items() if name.endswith(place))
    handle = layer.register_forward_pre_hook(fail)
    with pytest.raises(OnPurposeError):
        model(**inputs, tasks=MIXED)
    handle.remove()
    ((held, x),) = seen
    assert held == (place == "value")
    assert not siblings._held.parts
    gc.collect()
    assert x() is None
    assert all(
        torch.equal(one, other) for one, other in zip(losses_and_gradients(model, inputs), expected, strict=True)
    )


# Checkpoints, threads, copies


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["bert", "t5"])
def test_a_checkpointed_block_draws_the_same_masks_again(family, reentrant, passes):
    model, inputs = dropping(family).double(), batch(family)
    model.config.use_cache = False
    expected = losses_and_gradients(model, inputs)
    once = len(passes)
    assert apart(expected[0], losses_and_gradients(model, inputs, seed=6)[0]) > 1e-3
    passes.clear()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = losses_and_gradients(model, inputs)
    assert len(passes) == once * 3 / 2  # forward, again, backward
    assert len({seed for _, _, seed in passes}) == once / 2
    same(found, expected)
    assert not siblings._held.parts


def test_two_threads_with_one_model(monkeypatch, passes):
    """Each is between query and value at the same time as the other."""
    model = dropping("bert").double()
    inputs = [batch("bert", seed=seed) for seed in (1, 2)]
    monkeypatch.setattr(torch, "randint", lambda *_: torch.tensor(7))  # which of them draws first must not matter

    def gradients(k):
        parameters = [p for n, p in model.named_parameters() if ".uno_" in n]
        return torch.autograd.grad(model(**inputs[k], tasks=MIXED).loss, parameters)

    expected = [gradients(k) for k in range(2)]
    assert any(apart(a, b) > 1e-3 for a, b in zip(*expected, strict=True))
    passes.clear()
    barrier, found, errors = threading.Barrier(2, timeout=30), [None, None], []
    value = next(layer for name, layer in model.layers("default").items() if name.endswith("value"))

    def wait(*_):
        barrier.wait()

    value.register_forward_pre_hook(wait)

    def run(k):
        try:
            for _ in range(5):
                found[k] = gradients(k)
        except Exception as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors
    assert len(passes) == 2 * 5 * 4
    for k in range(2):
        same(found[k], expected[k])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_siblings_of_its_own(copied, passes):
    model, inputs = dropping("t5"), batch("t5")
    expected = losses_and_gradients(model, inputs)
    once = len(passes)
    other = copied(model)
    own = set(other.modules())
    layers = list(other.layers("default").values())
    assert all(len(layer.siblings) == 1 and layer.siblings[0] in own for layer in layers)
    assert set(model.state_dict()) == set(other.state_dict())
    with torch.no_grad():
        for layer in layers:
            layer.uno_A["default"].mul_(2)
    passes.clear()
    assert apart(losses_and_gradients(other, inputs)[0], expected[0]) > 1e-3
    assert len(passes) == once
    assert all(torch.equal(a, b) for a, b in zip(losses_and_gradients(model, inputs), expected, strict=True))


def test_a_checkpoint_knows_nothing_of_it(tmp_path):
    model = adapted("bert")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert not any("sibling" in name for name in before)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(backbone("bert"), tmp_path)
    assert set(loaded.state_dict()) == set(before)
    assert all(len(layer.siblings) == 1 for layer in loaded.layers("default").values())
