"""Text to text: the prefix tree, the loss on answers only, and label scoring beside greedy generation."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st

import tiny
import tiny_text
from unolora import runs, scoring, training
from unolora.data import Collator
from unolora.errors import InputError
from unolora.heads import Moments
from unolora.tasks import resolve
from unolora.text import CUE, Answers, Tree, _walk, encode_text

METHODS = [method for method in tiny.METHODS if method != "heads-only"]  # which has nothing to train here
KNOW_TASKS = {"c-poly", "full-per-task", "hyperformer", "lora-per-task", "mtl-lora", "poly", "prompt-tuning", "unolora"}
LONG = {"steps": 20, "learning_rate": 0.02, "evaluate_every": 20, "checkpoint_every": 20, "log_every": 1}
LABELS = {"mood": ("bad", "good"), "topic": ("plant", "animal", "tool"), "heat": ()}
_runs = {}


def trained(family, method="unolora"):
    """A run of 20 steps, made once."""
    if (family, method) not in _runs:
        rivals = {"prompt_tokens": 4, "hyperformer_dim": 4, "hyperformer_embedding_dim": 8}
        settings = tiny_text.settings(
            tiny.folder() / "run", family, method=method, training=LONG, rivals=rivals, scoring="labels"
        )
        _runs[family, method] = training.train(settings)
    return _runs[family, method]


@pytest.fixture(scope="module", params=tiny_text.FAMILIES)
def family(request):
    return request.param


def held_out(run):
    """The test split of each task, as the run's model reads it."""
    data = training.load_data(run.settings)
    return {
        row: runs.encode_rows(run.model, row, d.splits["test"], run.tokenizer, run.settings.data.max_length)
        for row, d in enumerate(data)
    }


def answers_of(family, **moments):
    named = [dataclasses.replace(task.as_text(), labels=LABELS[task.name]) for task in resolve(tiny_text.tasks())]
    _, words = runs.load_backbone(str(tiny_text.backbone(family)), "text")
    return Answers(named, words, moments or {"heat": Moments(0, 1, -10, 50)}, continues=family == "llama")


# --- the tree ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "paths", "forks"),
    [
        ([(5, 1), (6, 1)], [()], 1),
        ([(5, 7, 1), (5, 8, 1)], [(5,)], 1),
        ([(5, 7, 1), (5, 8, 1), (6, 1)], [(5,)], 2),
        ([(5, 7, 1), (5, 8, 1), (6, 7, 1), (6, 9, 1)], [(5,), (6,)], 3),
        ([(5, 1), (5, 7, 1)], [(5,)], 1),  # one word begins another: the end token parts them
    ],
)
def test_the_tree_has_a_node_wherever_answers_part(answers, paths, forks):
    tree = Tree.of(answers)
    assert tree.paths == paths
    assert len(tree.nodes) == forks


words = st.lists(st.lists(st.integers(2, 5), min_size=1, max_size=4).map(tuple), min_size=2, max_size=9, unique=True)


@given(words=words, seed=st.integers(0, 1000))
def test_scores_are_probabilities_and_the_choice_is_the_greedy_walk(words, seed):
    """Against the definition, word by word: p(word) over the tree sums to one, and greedy goes branch by branch."""
    answers = [(*word, 1) for word in words]
    tree = Tree.of(answers)
    R, L = len(tree.paths), tree.depth
    random = torch.Generator().manual_seed(seed)
    table = {}  # the logits behind a prefix do not depend on the path that they are read on

    def behind(prefix):
        return table.setdefault(prefix, torch.randn(6, generator=random))

    logits = torch.zeros(1, R, L + 1, 6)
    for r, path in enumerate(tree.paths):
        for depth in range(len(path) + 1):
            logits[0, r, depth] = behind(path[:depth])
    chosen, scores = _walk(tree, logits[..., tree.tokens])
    assert scores.exp().sum().item() == pytest.approx(1, abs=1e-5)
    prefix = ()
    while prefix not in answers:
        branches = sorted({answer[len(prefix)] for answer in answers if answer[: len(prefix)] == prefix})
        best = branches[0] if len(branches) == 1 else max(branches, key=lambda token: behind(prefix)[token].item())
        prefix = (*prefix, best)
    assert answers[chosen.item()] == prefix


def test_answers_are_in_the_order_of_their_ids(family):
    answers = answers_of(family)
    assert answers.words(0) == ["bad", "good"]
    assert answers.words(1) == ["plant", "animal", "tool"]
    assert answers.values(2) == [5.0 * n for n in range(-2, 11)]
    assert answers.words(2)[0] == "-10.0"
    assert answers.targets(2, np.array([17.4, 17.6])) == answers.tokens(["15.0", "20.0"])
    assert len({tuple(ids) for ids in answers.tokens(answers.words(2))}) == 13


@pytest.mark.parametrize(("step", "value", "wanted"), [(0.2, 3.3000001, "3.4"), (0.2, 2.0, "2.0"), (0.25, 1.1, "1.00"),
                                                       (1.0, -0.2, "0.0"), (5.0, 12.6, "15.0")])  # fmt: skip
def test_numbers_are_rounded_to_the_step(step, value, wanted):
    answers = answers_of("t5")
    task = resolve([{**tiny_text.tasks("heat")[0], "text_step": step}])[0]
    answers.tasks[2] = task
    assert answers.number(2, value) == wanted


@pytest.mark.parametrize(
    ("row", "text", "wanted"),
    [(0, " good ", 1), (0, "goo", -1), (0, "", -1), (0, "good good", -1), (2, "15.0", 15), (2, "-3", -3),
     (2, "warm", math.nan), (2, "1_0", math.nan), (2, "inf", math.nan), (2, "", math.nan)],
)  # fmt: skip
def test_what_does_not_parse_is_no_answer(row, text, wanted):
    assert answers_of("t5").read(row, text) == pytest.approx(wanted, nan_ok=True)


def test_words_that_the_tokenizer_cannot_tell_apart_are_refused():
    named = [dataclasses.replace(resolve(tiny_text.tasks("mood"))[0], labels=("good", "GOOD"))]
    _, words = runs.load_backbone(str(tiny.backbone()))
    words.eos_token = "[SEP]"
    answers = Answers(named, words, {}, continues=False)
    with pytest.raises(InputError, match="'good' and 'GOOD' the same tokens; choose other label words"):
        answers.tree(0)


def test_a_regression_needs_a_step(family, tmp_path):
    settings = tiny_text.settings(tmp_path / "run", family, tasks=tiny.tasks())
    with pytest.raises(InputError, match="task 'heat': a regression as text needs `text_step`"):
        training.train(settings)
    assert not (tmp_path / "run").exists()


# --- the loss -------------------------------------------------------------------------------------------------------


def batch_of(run, splits, picked):
    rows = [(task, splits[task], i) for task, i in picked]
    return Collator(run.tokenizer)(rows)


def training_splits(run):
    data = training.load_data(run.settings)
    return {
        row: runs.encode_rows(run.model, row, d.splits["train"], run.tokenizer, 64, train=True)
        for row, d in enumerate(data)
    }


PICKED = [(0, 0), (2, 1), (1, 2), (2, 3), (0, 4)]


def test_losses_are_those_of_the_host_row_by_row(family):
    """The host's own loss on one row at a time, without padding: the mean over the answer's tokens."""
    run = runs.load_run(trained(family, "full"))
    splits = training_splits(run)
    host = run.model.method.backbone
    batch = batch_of(run, splits, PICKED)
    assert len(set(batch["attention_mask"].sum(1).tolist())) > 2, "no padding"
    assert (batch["answers"] == -100).any()
    with torch.no_grad():
        found = run.model(**batch)["losses"]
        for place, (task, i) in enumerate(PICKED):
            ids, answer = splits[task].inputs["input_ids"][i], splits[task].answers[i]
            if family == "t5":
                wanted = host(input_ids=torch.tensor([ids]), labels=torch.tensor([answer])).loss
            else:
                labels = torch.tensor([[-100] * len(ids) + answer])
                wanted = host(input_ids=torch.tensor([[*ids, *answer]]), labels=labels).loss
            assert found[place].item() == pytest.approx(wanted.item(), abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_mixed_batch_is_row_by_row(family, method):
    run = runs.load_run(trained(family, method))
    train, test = training_splits(run), held_out(run)
    with torch.no_grad():
        together = run.model(**batch_of(run, train, PICKED))["losses"]
        alone = [run.model(**batch_of(run, train, [one]))["losses"][0] for one in PICKED]
        torch.testing.assert_close(together, torch.stack(alone), atol=2e-5, rtol=0)
    rows = [(task, test[task], i) for task, i in PICKED]
    logits, values = scoring.outputs(run.model, rows, Collator(run.tokenizer))
    single = [scoring.outputs(run.model, [row], Collator(run.tokenizer)) for row in rows]
    torch.testing.assert_close(logits, torch.cat([one[0] for one in single]), atol=2e-5, rtol=0)
    assert torch.equal(values, torch.cat([one[1] for one in single]))
    counts = {0: 2, 1: 3, 2: len(run.model.heads.values(2))}
    assert logits.isfinite().sum(1).tolist() == [counts[task] for task, _ in PICKED]


@pytest.mark.parametrize("method", METHODS)
def test_tasks_are_felt_where_a_method_knows_them(family, method):
    run = runs.load_run(trained(family, method))
    splits = held_out(run)
    batch = batch_of(run, splits, [(0, 0)] * 2)
    batch.pop("labels")
    states = []
    for task in (0, 1):
        tasks = torch.full((2,), task)

        def first(model, given, at):
            more = {"decoder_input_ids": torch.zeros(2, 1, dtype=torch.long)} if family == "t5" else {}
            return model(**given, **more).logits[:, -1]

        with torch.no_grad():
            states.append(run.model.method.run(tasks, {k: batch[k] for k in ("input_ids", "attention_mask")}, first))
    assert torch.equal(*states) == (method not in KNOW_TASKS)


@pytest.mark.parametrize("method", METHODS)
def test_loss_falls_in_20_steps(family, method):
    losses = [line["loss"] for line in tiny.lines(trained(family, method)) if line["kind"] == "train"]
    assert len(losses) == 20
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.02


def test_prompts_are_cut_before_the_cue():
    """A prompt that is too long loses its end, never the words that ask for the answer."""
    answers = answers_of("llama")
    data = training.load_data(tiny_text.settings(None, "llama"))
    short = encode_text(data[0].splits["train"], 0, answers, 20, train=True)
    cue = answers.tokenizer(CUE, add_special_tokens=False)["input_ids"]
    assert max(map(len, short.inputs["input_ids"])) == 20
    assert all(ids[-len(cue) :] == cue for ids in short.inputs["input_ids"])
    assert all(ids[-1] == answers.tokenizer.eos_token_id for ids in short.answers)
    assert encode_text(data[0].splits["test"], 0, answers, 20, train=False).answers is None


# --- label scoring and generation -----------------------------------------------------------------------------------


def test_label_scoring_answers_as_generation_wherever_that_is_valid(family, tmp_path):
    """Trained until most of what is generated is an answer; the rest is counted, not compared."""
    wanted = {"steps": 60, "learning_rate": 0.01, "evaluate_every": 60, "checkpoint_every": 60}
    run = runs.load_run(training.train(tiny_text.settings(tmp_path / "run", family, method="full", training=wanted)))
    compared, differ = 0, set()
    for row, split in held_out(run).items():
        batch = batch_of(run, {row: split}, [(row, i) for i in range(len(split))])
        batch.pop("labels")
        values, texts = run.model.generate(**batch)
        with torch.no_grad():
            answers = run.model(**batch)["answers"]
        words = run.model.heads.words(row)
        valid = torch.tensor([text.strip() in words for text in texts])
        torch.testing.assert_close(answers[valid], values[valid])
        compared += int(valid.sum())
        differ |= {(row, value) for value in answers[valid].tolist()}
    assert compared > 10, "nothing was compared"
    assert len(differ) > 2, "every answer was the same"


def test_what_is_no_answer_is_counted():
    named = resolve(tiny_text.tasks())
    named[0] = dataclasses.replace(named[0], labels=("bad", "good"))
    found = {0: np.array([0.0, -1.0, 1.0, -1.0]), 2: np.array([-5.0, math.nan, 3.0])}
    assert scoring.unparsed(named, found) == {"mood": 2, "heat": 1}


def test_generation_does_not_depend_on_padding(family):
    run = runs.load_run(trained(family, "full"))
    splits = held_out(run)
    batch = batch_of(run, splits, PICKED)
    given = {name: batch[name] for name in ("input_ids", "attention_mask", "tasks")}
    _, together = run.model.generate(**given)
    for place, one in enumerate(PICKED):
        alone = batch_of(run, splits, [one])
        _, texts = run.model.generate(**{name: alone[name] for name in given})
        assert texts == [together[place]]


def test_one_pass_of_the_decoder_scores_all_labels(family):
    """Counted: what is decided at the first token takes one forward of the backbone, several paths one more at most."""
    run = runs.load_run(trained(family))
    splits = held_out(run)
    calls = []
    host = run.model.method.backbone.base_model.model
    stack = host.decoder if family == "t5" else host.model
    scoring.outputs(run.model, [(0, splits[0], 0)], Collator(run.tokenizer))  # the first batch is read both ways
    stack.register_forward_pre_hook(lambda module, args, kwargs: calls.append(1), with_kwargs=True)
    for rows, most in (([(0, splits[0], i) for i in range(6)], 1), ([(2, splits[2], i) for i in range(6)], 2)):
        calls.clear()
        scoring.outputs(run.model, rows, Collator(run.tokenizer))
        assert len(calls) == most
    assert run.model.heads.passes(2) > 1, "no paths"


def test_generation_is_scored_and_counted(family, tmp_path):
    training_settings = {"steps": 2, "evaluate_every": 2}
    settings = tiny_text.settings(tmp_path / "run", family, scoring="generation", training=training_settings)
    found = tiny.results(training.train(settings))
    counts = {task["name"]: (task["unparsed"], task["rows"]["test"]) for task in found["tasks"]}
    assert counts["mood"] == (8, 8)  # two steps teach nothing, so that nothing is an answer
    assert next(t for t in found["tasks"] if t["name"] == "mood")["metrics"]["test"]["accuracy"] == 0
    labels = tiny.results(trained(family))
    assert {task["unparsed"] for task in labels["tasks"]} == {0}


@pytest.mark.parametrize("method", METHODS)
def test_a_loaded_run_predicts_as_the_trained_one(family, method):
    folder = trained(family, method)
    first = scoring.evaluate_run(runs.load_run(folder), "test")[0]
    assert first == {task["name"]: task["metrics"]["test"] for task in tiny.results(folder)["tasks"]}


def test_probabilities_of_a_text(family):
    run = runs.load_run(trained(family))
    (found,) = scoring.predict_texts(run, "topic", [("we saw a cat",)])
    assert sum(found["probabilities"].values()) == pytest.approx(1)
    assert found["label"] in found["probabilities"]
    (mood,) = scoring.predict_texts(run, "mood", [("we saw a cat",)])
    assert len(run.model.heads.tree(0).nodes) == 1, "more than one fork: greedy need not be the likeliest"
    assert mood["label"] == max(mood["probabilities"], key=mood["probabilities"].get)
    (number,) = scoring.predict_texts(run, "heat", [("first: hot second: ice",)])
    assert number["value"] in run.model.heads.values(2)


# --- what is refused ------------------------------------------------------------------------------------------------


def test_heads_do_not_fit_an_encoder_decoder(tmp_path):
    with pytest.raises(InputError, match="is an encoder-decoder, which has no place for heads; set `answers: text`"):
        training.train(tiny_text.settings(tmp_path / "run", "t5", answers="heads"))


def test_a_decoder_takes_heads_when_told_so(tmp_path):
    run = training.train(tiny_text.settings(tmp_path / "run", "llama", answers="heads", training={"steps": 2}))
    assert tiny.results(run)["parameters"]["heads"] > 0


def test_heads_only_has_nothing_to_train(family, tmp_path):
    with pytest.raises(InputError, match="'heads-only' has nothing to train where answers are text"):
        training.train(tiny_text.settings(tmp_path / "run", family, method="heads-only"))


def test_labels_of_the_same_tokens_are_refused_before_anything_is_written(family, tmp_path, monkeypatch):
    monkeypatch.setattr(Answers, "tokens", lambda self, texts: [[7, 1] for _ in texts])  # as unknown words have
    with pytest.raises(InputError, match="the backbone's tokenizer gives 'bad' and 'good' the same tokens"):
        training.train(tiny_text.settings(tmp_path / "run", family))
    assert not (tmp_path / "run").exists()


def test_heads_generate_nothing():
    run = runs.load_run(tiny.trained())
    with pytest.raises(InputError, match="heads write nothing"):
        scoring.predictions(run.model, held_out(run), Collator(run.tokenizer), "generation")


def test_heads_write_nothing(tmp_path):
    with pytest.raises(InputError, match="`scoring: generation` needs answers that are text"):
        training.train(tiny.settings(tmp_path / "run", scoring="generation"))


def test_the_answer_counts_among_the_positions(tmp_path):
    settings = tiny_text.settings(tmp_path / "run", "llama", data={"max_length": 126})
    with pytest.raises(InputError, match=r"takes 128 tokens, \d+ of them for the answer"):
        training.train(settings)


def test_log_p_is_over_the_branches_only(family):
    """With one fork, the scores are the log-softmax of the host's logits over the first tokens of the labels."""
    run = runs.load_run(trained(family, "full"))
    splits = held_out(run)
    ids = splits[0].inputs["input_ids"][0]
    host = run.model.method.backbone
    first = [tokens[0] for tokens in run.model.heads.tokens(run.model.heads.words(0))]
    assert len(set(first)) == 2
    with torch.no_grad():
        more = {"decoder_input_ids": torch.tensor([[0]])} if family == "t5" else {}
        logits = host(input_ids=torch.tensor([ids]), **more).logits[0, -1, first]
    found, _ = scoring.outputs(run.model, [(0, splits[0], 0)], Collator(run.tokenizer))
    torch.testing.assert_close(found[0, :2].float(), F.log_softmax(logits, 0), atol=1e-5, rtol=0)
