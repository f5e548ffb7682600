"""Methods: any mix of tasks in a batch is each row by itself, and each is what its paper or PEFT says."""

import copy
import functools
import threading
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from peft import MultitaskPromptTuningConfig, PolyConfig, get_peft_model
from peft.tuners.poly import PolyLayer
from torch import nn

import tiny
from conftest import TASKS, apart, backbone, batch
from unolora import InputError, UnoLoraConfig, runs, scoring
from unolora.data import Collator, encode
from unolora.methods import METHODS, label
from unolora.methods.baselines import LoraPerTask, lora_config, matched_lora_config, on_meta, projections
from unolora.methods.hyperformer import PLACES, places
from unolora.methods.method import tasks_of_rows
from unolora.settings import Adapter, Data, Rivals, Settings
from unolora.tasks.rows import Rows

KNOW_TASKS = (
    "c-poly",
    "full-per-task",
    "hyperformer",
    "lora-per-task",
    "mtl-lora",
    "poly",
    "prompt-tuning",
    "unolora",
)
TEXTS = [
    ("bad day",),
    ("the cat saw a good oak then it was very very very sad",),
    ("so",),
    ("hot ice", "fire and cold"),
]


@pytest.fixture(scope="module", params=tiny.METHODS)
def run(request):
    return runs.load_run(tiny.trained(request.param))


def mixed(run):
    """Rows of all tasks, of different lengths, in no order."""
    splits = [encode(Rows([text], np.zeros(1)), run.tokenizer, 32) for text in TEXTS]
    tasks = [1, 0, 2, 2, 0, 1, 2]
    texts = [0, 1, 2, 3, 0, 1, 1]
    return [(task, splits[text], 0) for task, text in zip(tasks, texts, strict=True)]


def test_the_methods_are_all_tested():
    assert tuple(METHODS) == tiny.METHODS


def test_mixed_batch_is_row_by_row(run):
    rows = mixed(run)
    collate = Collator(run.tokenizer)
    together = scoring.outputs(run.model, rows, collate)[0]
    alone = torch.cat([scoring.outputs(run.model, [row], collate)[0] for row in rows])
    widths = collate(rows)["attention_mask"].sum(1)
    assert len(set(widths.tolist())) > 2, "no padding"
    finite = together.isfinite()
    assert torch.equal(finite, alone.isfinite())
    assert (together[finite] - alone[finite]).abs().max() < 1e-5
    for order in ([6, 5, 4, 3, 2, 1, 0], [3, 3, 0, 6]):
        found = scoring.outputs(run.model, [rows[i] for i in order], collate)[0]
        torch.testing.assert_close(found, together[order], atol=1e-5, rtol=0)


def test_tasks_are_felt_where_a_method_knows_them(run):
    """The states of one text under two tasks differ, or are the same, by method: the premise of the test above."""
    batch = Collator(run.tokenizer)([(0, mixed(run)[0][1], 0)] * 2)
    batch["tasks"] = torch.tensor([0, 2])
    batch.pop("labels")
    with torch.no_grad():
        states = run.model.method(**batch)
    assert torch.equal(states[0], states[1]) == (run.settings.method not in KNOW_TASKS)


def test_padding_tokens_are_not_felt(run):
    """What stands under a zero of the mask may be anything."""
    batch = Collator(run.tokenizer)(mixed(run))
    batch.pop("labels")
    other = {**batch, "input_ids": torch.where(batch["attention_mask"] == 1, batch["input_ids"], 7)}
    assert not torch.equal(other["input_ids"], batch["input_ids"])
    with torch.no_grad():
        assert torch.equal(run.model(**batch)["logits"], run.model(**other)["logits"])


# --- on every family of backbones ----------------------------------------------------------------------------------

FAMILIES = ("t5", "bert", "roberta", "distilbert", "deberta", "deberta-v2", "deberta-v3", "gpt2", "llama", "qwen3")
UNFIT = {("c-poly", "gpt2"), ("poly", "gpt2"), ("ia3", "distilbert")}
FITTING = [(method, family) for method in METHODS for family in FAMILIES if (method, family) not in UNFIT]
ROWS = torch.tensor([1, 0, 2])  # of the tasks, for a batch of 3
EVERYWHERE = pytest.mark.parametrize(("method", "family"), FITTING)
BOTH_SIDES = pytest.mark.parametrize(("method", "family"), [f for f in FITTING if f[1] in ("t5", "llama")])


def chosen(**adapter):
    """Small settings of three tasks."""
    rivals = Rivals(hyperformer_dim=4, hyperformer_embedding_dim=8, prompt_tokens=5)
    return Settings(
        backbone="tiny", tasks=TASKS, adapter=Adapter(**{"r": 4, **adapter}), rivals=rivals, data=Data(max_length=16)
    )


def fresh(method, family, seed=0, **adapter):
    """A method on a tiny random backbone, as it starts."""
    model = backbone(family).requires_grad_(False)
    torch.manual_seed(seed)
    return METHODS[method](model, TASKS, chosen(**adapter)).eval()


def awake(method, family, **adapter):
    """A method whose parameters are all moved, so that each of its parts is felt."""
    model = fresh(method, family, **adapter)
    with torch.no_grad():
        for name, parameter in trained(model).items():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def tokens(family):
    """A batch of three lengths, padded on the right, without labels."""
    found = batch("t5" if family == "t5" else "bert")
    return {name: found[name] for name in ("input_ids", "attention_mask")}


DECODED = torch.tensor([[0, 9, 4, 11]]).repeat(3, 1)


def logits(model, given, places):
    """Of a classifier, of a decoder's input tokens, or of what T5 decodes, which differs by row."""
    if model.config.is_encoder_decoder:
        return model(**given, decoder_input_ids=DECODED[: len(places)] + places[:, None]).logits
    return model(**given).logits


def alone(model, tasks, inputs, row):
    """The logits of a row by itself, without its padding."""
    length = int(inputs["attention_mask"][row].sum())
    one = {name: value[row : row + 1, :length] for name, value in inputs.items()}
    return model.run(tasks[row : row + 1], one, lambda host, given, _: logits(host, given, torch.tensor([row])))


@EVERYWHERE
@torch.no_grad()
def test_a_mixed_batch_is_row_by_row_on_every_family(method, family):
    model, inputs = awake(method, family), tokens(family)
    together = model.run(ROWS, inputs, logits)
    same = [model.run(torch.full((3,), task), inputs, logits) for task in (0, 2)]
    assert (apart(*same) > 1e-4) == (method in KNOW_TASKS)
    assert not hooks(model)
    for row in range(3):
        one, found = alone(model, ROWS, inputs, row), together[row : row + 1]
        if family in ("gpt2", "llama", "qwen3"):  # from the prompt's end on
            length = int(inputs["attention_mask"][row].sum())
            front = together.shape[1] - inputs["input_ids"].shape[1]
            one, found = one[:, front:], found[:, front : front + length]
        assert apart(one, found) < 2e-5


@EVERYWHERE
def test_only_what_is_its_own_is_trained(method, family):
    """The backbone's weights get no gradient, but for full fine-tuning, and the norms of HyperFormer++."""
    model = awake(method, family).train()
    host = dict(backbone(family).named_parameters())
    own = trained(model)
    assert bool(own) == (method != "heads-only")
    named = {name.removeprefix("backbone.").removeprefix("base_model.model.") for name in own}
    whole = {name.removeprefix(f"others.{i}.") for name in named for i in range(2)} & host.keys()
    if method.startswith("full"):
        assert whole == host.keys()
    elif method == "hyperformer":
        modules = dict(backbone(family).named_modules())
        assert whole
        assert all(type(modules[name.rpartition(".")[0]]).__name__.endswith("Norm") for name in whole)
        assert len(whole) == sum("norm" in name.lower() or ".ln_" in name for name in host)
    else:
        assert not whole
    if own:
        model.run(ROWS, tokens(family), logits).square().mean().backward()
        reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        felt = reached == own.keys()
        assert felt or (method.startswith("full") and reached < own.keys()), own.keys() - reached  # unused heads


@BOTH_SIDES
def test_the_start_depends_on_the_seed_only(method, family):
    first, again, other = (trained(fresh(method, family, seed=seed)) for seed in (0, 0, 1))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    differs = any(not torch.equal(first[name], other[name]) for name in first)
    assert differs == (method not in ("full", "full-per-task", "heads-only", "ia3"))


STARTS_ELSEWHERE = ("hyperformer", "prompt-tuning")  # near the backbone, or with tokens more


@BOTH_SIDES
@torch.no_grad()
def test_the_start_is_the_backbone(method, family):
    model, inputs = fresh(method, family), tokens(family)
    found, host = model.run(ROWS, inputs, logits), logits(backbone(family), inputs, torch.arange(3))
    if method in STARTS_ELSEWHERE:
        found = found[:, -host.shape[1] :]
        assert 1e-5 < apart(found, host) < (0.5 * host.abs().max() if method == "hyperformer" else torch.inf)
    else:
        assert apart(found, host) < (1e-9 if model.mixes else 1e-5)  # the last bits differ with the rows of a batch


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_parts_of_the_backbone_run_on_copies_of_rows(method):
    """Encoder once, then the decoder on three beams of each row, as a search does, several times."""
    model, inputs = awake(method, "t5"), tokens("t5")

    def beams(host, given, places):
        encoded = host.get_encoder()(**given).last_hidden_state
        copies = (encoded.repeat_interleave(3, 0),)
        mask = given["attention_mask"].repeat_interleave(3, 0)
        decoded = (DECODED[: len(places)] + places[:, None]).repeat_interleave(3, 0)
        runs = [host(encoder_outputs=copies, attention_mask=mask, decoder_input_ids=decoded).logits for _ in range(2)]
        assert torch.equal(*runs)
        return runs[0].unflatten(0, (-1, 3)).mean(1)

    assert apart(model.run(ROWS, inputs, beams), model.run(ROWS, inputs, logits)) < 2e-5


@BOTH_SIDES
@torch.no_grad()
def test_generate_is_row_by_row(method, family):
    model, inputs = awake(method, family), tokens(family)
    if family == "llama":  # whose prompts end together
        inputs = {name: value[:, :4] for name, value in inputs.items()}
        assert inputs["attention_mask"].all()

    def write(host, given, _):
        out = host.generate(**given, max_new_tokens=5, min_new_tokens=5, num_beams=2, do_sample=False, pad_token_id=0)
        return out[:, -5:]

    together = model.run(ROWS, inputs, write)
    for row in range(3):
        one = {name: value[row : row + 1] for name, value in inputs.items()}
        assert torch.equal(model.run(ROWS[row : row + 1], one, write), together[row : row + 1])


def hooks(model):
    return [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


@BOTH_SIDES
@torch.no_grad()
def test_an_error_inside_leaves_nothing_behind(method, family):
    model, inputs = awake(method, family), tokens(family)
    expected = model.run(ROWS, inputs, logits)

    def fails(host, given, places):
        logits(host, given, places)
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        model.run(ROWS.flip(0), inputs, fails)
    assert not hooks(model)
    assert torch.equal(model.run(ROWS, inputs, logits), expected)


HOOKED = ("c-poly", "hyperformer", "mtl-lora", "poly")


@pytest.mark.parametrize("method", HOOKED)
def test_rows_that_are_no_copies_are_refused(method):
    model, inputs = awake(method, "bert"), tokens("bert")
    two = {name: value[:2] for name, value in inputs.items()}
    with pytest.raises(InputError, match=r"a layer got 2 rows for a batch of 3; inside `condition`, run its rows"):
        model.run(ROWS, inputs, lambda host, _, places: host(**two).logits)
    assert not hooks(model)


def test_rows_are_copies_side_by_side():
    tasks = torch.tensor([2, 0])
    assert tasks_of_rows(torch.zeros(2, 5), tasks) is tasks
    assert tasks_of_rows(torch.zeros(6, 5), tasks).tolist() == [2, 2, 2, 0, 0, 0]


@pytest.mark.parametrize("method", HOOKED)
@torch.no_grad()
def test_two_models_run_in_two_threads(method):
    models, inputs = [awake(method, "bert"), awake(method, "bert", r=2)], tokens("bert")
    expected = [model.run(ROWS, inputs, logits) for model in models]
    both_inside, found = threading.Barrier(2, timeout=20), {}

    def work(i):
        def call(host, given, places):
            both_inside.wait()
            return logits(host, given, places)

        with torch.no_grad():
            found[i] = models[i].run(ROWS, inputs, call)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(2))


@pytest.mark.parametrize(
    ("method", "family", "message"),
    [
        ("poly", "gpt2", "Poly adapts `nn.Linear` only, and 'tiny' has other projections"),
        ("c-poly", "gpt2", "Poly adapts `nn.Linear` only, and 'tiny' has other projections"),
        ("ia3", "distilbert", r"unknown family of backbones for \(IA\)\^3 'distilbert' \(known: RefinedWeb"),
        ("hyperformer", "vit", r"unknown family of backbones for HyperFormer\+\+ 'vit' \(known: bert, "),
    ],
)
def test_a_family_that_does_not_fit_is_said(method, family, message):
    with pytest.raises(InputError, match=message):
        fresh(method, family)


# --- full fine-tuning for each task --------------------------------------------------------------------------------


def test_each_task_trains_its_own_backbone():
    model = fresh("full-per-task", "bert").train()
    assert len(trained(model)) == 3 * len(list(backbone("bert").parameters()))
    model.run(torch.tensor([2, 0, 2]), tokens("bert"), logits).square().sum().backward()
    reached = {name.rpartition(".bert.")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert reached - {""} == {"backbone", "others.1"}


def test_copies_of_a_backbone_share_nothing():
    pointers = [p.data_ptr() for p in fresh("full-per-task", "bert").parameters()]
    assert len(set(pointers)) == len(pointers)


# --- LoRA of UnoLoRA*'s size ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("conditioning", ["none", "task+sample"])
@pytest.mark.parametrize("family", ["t5", "bert", "deberta-v3", "llama"])
def test_the_matched_rank_is_the_smallest_that_is_enough(family, conditioning):
    star = get_peft_model(backbone(family), UnoLoraConfig(tasks=TASKS, r=4))
    wanted = sum(p.numel() for p in star.parameters() if p.requires_grad)
    model = fresh("lora-matched", family, conditioning=conditioning, alpha=6.0)
    config = model.backbone.peft_config["default"]
    found = sum(p.numel() for p in trained(model).values())
    assert found - found // config.r < wanted <= found
    assert config.lora_alpha / config.r == 6.0 / 4
    assert config.r > 4


def test_counting_leaves_the_backbone_and_the_generator_alone():
    model = backbone("t5")
    before = {name: (value.clone(), value.data_ptr()) for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    matched_lora_config(model, TASKS, Adapter(r=4))
    assert torch.equal(torch.rand(2), expected)
    assert {n: v.data_ptr() for n, v in model.state_dict().items()} == {n: p for n, (_, p) in before.items()}
    assert all(torch.equal(value, before[name][0]) for name, value in model.state_dict().items())
    empty = on_meta(model)
    assert all(p.is_meta for p in empty.parameters())
    assert empty.shared.weight is empty.encoder.embed_tokens.weight, "what is tied stays tied"


# --- HyperFormer++ -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["t5", "bert", "gpt2", "llama"])
@torch.no_grad()
def test_hyperformers_weights_are_written_from_task_layer_and_place(family):
    """One adapter, spelled out for one token."""
    model, inputs = awake("hyperformer", family), tokens(family)
    E, width = 8, model.backbone.config.hidden_size
    for stack, layers in model.places.items():
        network = model.hypernetworks[stack]
        for layer, place in ((0, 1), (1, 0)):
            seen = []
            name = layers[layer][place]
            before = model.backbone.get_submodule(name).register_forward_hook(lambda *args, s=seen: s.append(args[2]))
            with model.condition(ROWS, inputs) as host:
                after = host.get_submodule(name).register_forward_hook(lambda *args, s=seen: s.append(args[2]))
                logits(host, inputs, torch.arange(3))
            before.remove()
            after.remove()
            y, found = (value[0, 2] for value in seen)
            e = torch.cat(
                [
                    model.task_embedding.weight[ROWS[0]],
                    network.layer_embedding.weight[layer],
                    network.place_embedding.weight[place],
                ]
            )
            down1, _, down2, norm = network.combine
            e = norm(down2(down1(e).relu()))
            w = {part: write.weight @ e + write.bias for part, write in network.write.items()}
            z = w["down"].view(4, width) @ y + w["down_bias"]
            z = w["up"].view(width, 4) @ F.gelu(z, approximate="tanh") + w["up_bias"]
            z = (z - z.mean()) / (z.var(unbiased=False) + 1e-5).sqrt() * w["gamma"] + w["beta"]
            assert e.shape == (E,)
            assert apart(found, y) > 1e-3
            assert apart(found, y + z) < 1e-5 * max(1, float(y.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_hyperformers_adapters_follow_both_parts_of_each_layer(family):
    host = backbone(family)
    found = places(host)
    assert list(found) == (["encoder", "decoder"] if family == "t5" else ["layers"])
    assert [len(layers) for layers in found.values()] == [2] * len(found)
    for layers in found.values():
        for attention, feed_forward in layers:
            assert "attn" in attention.lower() or "attention" in attention.lower()
            assert not any(part in feed_forward.lower() for part in ("attn", "attention"))
            assert "EncDec" not in attention
            assert not getattr(host.get_submodule(feed_forward), "out_features", host.config.hidden_size) - 32


def test_hyperformer_knows_the_families_that_it_names():
    assert PLACES.keys() >= {backbone(family).config.model_type for family in FAMILIES}
    assert list(PLACES) == sorted(PLACES)


# --- MTL-LoRA ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_mtl_lora_is_its_formula():
    model = awake("mtl-lora", "bert", alpha=6.0)
    update = model.updates[1]
    x = torch.randn(3, 5, 48)
    found = update(x, ROWS)
    for row, t in enumerate(ROWS):
        p = (update.mixture[t] / 0.5).softmax(0)
        B = sum(p[i] * update.B[i] for i in range(3))
        assert apart(found[row], x[row] @ (6.0 / 4 * B @ update.turns[t] @ update.A).T) < 1e-5
    assert update.mixture.std() > 0.05, "equal weights would keep the B's equal"


def test_mtl_loras_ups_part_in_training():
    """They start at zero, all alike; the mixtures tell them apart."""
    model = fresh("mtl-lora", "bert").train()
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.01)
    for _ in range(2):
        model.run(ROWS, tokens("bert"), logits).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for update in model.updates:
        assert apart(update.B[0], update.B[1]) > 1e-5
        assert apart(update.turns[0], torch.eye(4)) > 1e-5


def test_dropout_is_that_of_the_settings():
    model = fresh("mtl-lora", "bert", dropout=0.25)
    assert {update.dropout.p for update in model.updates} == {0.25}
    update = model.updates[0].train()
    nn.init.ones_(update.B)
    x = torch.ones(1, 1, 48)
    assert apart(update(x, ROWS[:1]), update(x, ROWS[:1])) > 1e-3
    assert torch.equal(update.eval()(x, ROWS[:1]), update(x, ROWS[:1]))


# --- Poly and C-Poly -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_poly_is_pefts():
    model, inputs = awake("poly", "bert"), tokens("bert")
    found = model.run(ROWS, inputs, logits)
    assert torch.equal(model.backbone.base_model(**inputs, task_ids=ROWS).logits, found)
    config = model.backbone.peft_config["default"]
    assert isinstance(config, PolyConfig)
    assert (config.r, config.n_tasks, config.n_skills, config.n_splits) == (4, 3, 4, 1)


@torch.no_grad()
def test_c_poly_is_poly_and_a_lora_for_each_task():
    model, inputs = awake("c-poly", "bert"), tokens("bert")
    layer, own = model.layers()[0], model.own[0]
    seen = []
    handle = layer.base_layer.register_forward_hook(lambda _, args, y: seen.append((args[0], y)))
    with model.condition(ROWS, inputs) as host:
        after = layer.register_forward_hook(lambda _, args, y: seen.append((args[0], y)))
        logits(host, inputs, torch.arange(3))
        after.remove()
    handle.remove()
    (x, _), (_, found) = seen
    for row, t in enumerate(ROWS):
        p = layer.poly_router["default"].module_logits[t].sigmoid()
        p = p / p.sum()
        A = sum(p[i] * layer.poly_lora_A["default"][0, i] for i in range(4))  # [D_in, R]
        B = sum(p[i] * layer.poly_lora_B["default"][0, i] for i in range(4))  # [R, D_out]
        wanted = layer.base_layer(x[row]) + x[row] @ A @ B / 4 + x[row] @ own.A[t].T @ own.B[t].T / 4
        assert apart(found[row], wanted) < 1e-5


def test_own_skills_get_gradients_of_their_tasks_only():
    model = awake("c-poly", "bert").train()
    model.run(torch.tensor([1, 1, 0]), tokens("bert"), logits).square().sum().backward()
    for own in model.own:
        assert own.A.grad[:2].abs().amax((1, 2)).min() > 0
        assert not own.A.grad[2].any()


# --- Multitask prompt tuning ---------------------------------------------------------------------------------------


@functools.cache
def pefts_prompts():
    """PEFT's own model with the same prompts, for a decoder."""
    config = MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_tasks=3, num_virtual_tokens=5, num_ranks=1)
    return get_peft_model(backbone("llama"), config).eval()


@torch.no_grad()
def test_prompts_are_pefts():
    model, inputs, other = awake("prompt-tuning", "llama"), tokens("llama"), pefts_prompts()
    other.prompt_encoder["default"].load_state_dict(model.prompts.state_dict())
    found = model.run(ROWS, inputs, logits)
    assert found.shape[1] == 5 + inputs["input_ids"].shape[1]
    assert apart(other(**inputs, task_ids=ROWS).logits, found) < 1e-5


@torch.no_grad()
def test_prompts_go_in_front():
    model, inputs = awake("prompt-tuning", "bert"), tokens("bert")
    inputs["token_type_ids"] = torch.ones_like(inputs["input_ids"])
    given = dict(inputs)
    found = model.embed(ROWS, inputs)
    assert inputs.keys() == given.keys(), "what came is left as it was"
    assert set(found) == {"inputs_embeds", "attention_mask", "token_type_ids"}
    n, (B, T) = 5, inputs["input_ids"].shape
    assert found["inputs_embeds"].shape == (B, n + T, 32)
    assert torch.equal(found["inputs_embeds"][:, n:], model.backbone.get_input_embeddings()(inputs["input_ids"]))
    prompts = model.prompts
    for row, t in enumerate(ROWS):
        wanted = prompts.embedding.weight * (prompts.prefix_task_cols[t] @ prompts.prefix_task_rows[t])
        assert apart(found["inputs_embeds"][row, :n], wanted) < 1e-6
    assert torch.equal(found["attention_mask"], F.pad(inputs["attention_mask"], (n, 0), value=1))
    assert torch.equal(found["token_type_ids"], F.pad(inputs["token_type_ids"], (n, 0)))


@pytest.mark.parametrize(("family", "limit"), [("gpt2", 48), ("roberta", 47)])
def test_prompts_that_leave_no_room_are_refused(family, limit):
    settings = chosen()
    settings.rivals.prompt_tokens = limit - 16
    METHODS["prompt-tuning"](backbone(family), TASKS, settings)
    settings.rivals.prompt_tokens += 1
    message = rf"`rivals.prompt_tokens` {limit - 15} and `data.max_length` 16 must fit the {limit} tokens that 'tiny'"
    with pytest.raises(InputError, match=message):
        METHODS["prompt-tuning"](backbone(family), TASKS, settings)


def test_t5_has_room_for_any_prompt():
    settings = chosen()
    settings.rivals.prompt_tokens = 5000
    assert METHODS["prompt-tuning"](backbone("t5"), TASKS, settings).prompts.num_virtual_tokens == 5000


def test_the_last_states_are_those_of_the_input():
    model = fresh("prompt-tuning", "bert")
    model.backbone = model.backbone.base_model
    inputs = tokens("bert")
    assert model(ROWS, **inputs).shape == (*inputs["input_ids"].shape, 32)


# --- LoRA for each task --------------------------------------------------------------------------------------------


def lora_per_task(dropout=0.0):
    backbone, _ = runs.load_backbone(str(tiny.backbone(dropout=0.0)))
    torch.manual_seed(3)
    config = lora_config(backbone, Adapter(r=4, dropout=dropout))
    model = LoraPerTask(backbone, tiny.NAMES, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model


def loras(model, task):
    """The parameters of a task's LoRA by their names in plain PEFT."""
    return {
        name.removeprefix("backbone.").replace(f".task_{task}.", ".default."): parameter
        for name, parameter in model.named_parameters()
        if f".task_{task}." in name
    }


def inputs(seed, tasks):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 40, (len(tasks), 6), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("tasks", [[0, 2, 0, 2], [2], [1, 0, 2, 1, 1]])
def test_only_the_tasks_of_a_batch_get_gradients(tasks):
    model = lora_per_task().train()
    assert len(loras(model, "mood")) == 4
    model(torch.tensor(tasks), **inputs(0, tasks)).square().mean().backward()
    for row, name in enumerate(tiny.NAMES):
        for key, parameter in loras(model, name).items():
            assert parameter.requires_grad, key
            if row in tasks:
                assert parameter.grad.abs().max() > 0, key
            else:
                assert parameter.grad is None, key
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}


def test_gradients_of_a_mixed_batch_are_those_of_its_rows():
    tasks, batch = [1, 0, 1, 2], inputs(1, range(4))
    model = lora_per_task().train()
    model(torch.tensor(tasks), **batch).square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for row, task in enumerate(tasks):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        model(torch.tensor([task]), **one).square().sum().backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) == 12
    assert found.keys() == wanted.keys()
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-5, rtol=1e-4)


def test_a_tasks_lora_is_peft_alone_on_its_rows():
    """Batches of one task, in turn: each LoRA ends where PEFT's LoRA ends that saw that task's batches only."""
    together = lora_per_task()
    start = {task: {name: p.detach().clone() for name, p in loras(together, task).items()} for task in tiny.NAMES}
    steps = [(seed, seed % 3) for seed in range(9)]

    def train(model, call, batches):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for seed, task in batches:
            (call(task, inputs(seed, [task] * 4)) - 0.5).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    train(together, lambda task, batch: together(torch.full((4,), task), **batch), steps)
    for row, task in enumerate(tiny.NAMES):
        backbone, _ = runs.load_backbone(str(tiny.backbone(dropout=0.0)))
        alone = get_peft_model(backbone, copy.deepcopy(lora_config(backbone, Adapter(r=4))))
        assert {name for name, p in alone.named_parameters() if p.requires_grad} == start[task].keys()
        alone.load_state_dict(start[task], strict=False)
        train(
            alone,
            lambda _, batch, model=alone: model(**batch).last_hidden_state,
            [step for step in steps if step[1] == row],
        )
        found = {name: p for name, p in alone.named_parameters() if p.requires_grad}
        for name, parameter in loras(together, task).items():
            assert torch.equal(parameter, found[name]), name
            assert not torch.equal(parameter, start[task][name]), name


def test_names_of_tasks_do_not_meet():
    """`sort` begins `sort_more`, and `dense` is the name of a projection."""
    names = ["sort", "sort_more", "dense", "lora_A"]
    backbone, _ = runs.load_backbone(str(tiny.backbone()))
    model = LoraPerTask(backbone, names, lora_config(backbone, Adapter(r=2)))
    found = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(found) == len(set(found)) == len(names) * 4
    assert model(torch.tensor([3, 0]), **inputs(0, [0, 0])).shape == (2, 6, 32)


def test_lora_adapts_what_unolora_adapts():
    found = {}
    settings = Settings(tasks=list(tiny.NAMES), adapter=Adapter(r=4, alpha=12, dropout=0.25))
    for method in ("unolora", "lora-shared"):
        backbone, _ = runs.load_backbone(str(tiny.backbone()))
        model = METHODS[method](backbone, tiny.NAMES, settings)
        found[method] = {
            name.rpartition("base_model.model.")[2]
            for name, module in model.named_modules()
            if hasattr(module, "base_layer")
        }
        config = model.backbone.peft_config["default"]
        assert config.r == 4
        assert (config.alpha if method == "unolora" else config.lora_alpha) == 12
        assert (config.dropout if method == "unolora" else config.lora_dropout) == 0.25
    assert found["unolora"] == found["lora-shared"]
    assert len(found["unolora"]) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_rivals_adapt_what_unolora_adapts(family):
    host = backbone(family)
    wanted = get_peft_model(backbone(family), UnoLoraConfig(tasks=TASKS)).base_model.layers("default")
    found = projections(host, Adapter())
    assert found == {name: (layer.d_in, layer.d_out) for name, layer in wanted.items()}
    assert fresh("mtl-lora", family).names == list(wanted)
    for method in {"poly", "c-poly"} - {method for method, unfit in UNFIT if unfit == family}:
        model = fresh(method, family).backbone
        names = [name for name, module in model.named_modules() if isinstance(module, PolyLayer)]
        assert [name.removeprefix("base_model.model.") for name in names] == list(wanted)


def test_targets_of_the_settings_hold_for_rivals():
    for targets in (["key", "output.dense"], r".*\.1\..*query", "all-linear"):
        wanted = set(projections(backbone("bert"), Adapter(target_modules=targets)))
        assert len(wanted) == {list: 6, str: 1}[type(targets)] or targets == "all-linear"
        assert set(fresh("mtl-lora", "bert", target_modules=targets).names) == wanted
        model = fresh("lora-shared", "bert", target_modules=targets).backbone.base_model.model
        assert {name for name, module in model.named_modules() if hasattr(module, "lora_A")} == wanted


def test_labels_of_methods():
    labels = [label(method, Adapter()) for method in METHODS]
    assert len(set(labels)) == len(METHODS)
    assert label("unolora", Adapter(conditioning="none")) == "UnoLoRA"
    assert label("unolora", Adapter(conditioning="task")) == "UnoLoRA* (task)"
