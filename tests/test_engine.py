"""The engine: the same answers as row by row, whatever the mix; a bounded queue; deadlines; failures of one row."""

import asyncio
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait

import numpy as np
import pytest
import torch

import tiny
import tiny_text
from unolora import runs, scoring, training
from unolora.errors import InputError
from unolora.serving import ClosedError, DeadlineError, Engine, FailedError, QueueFullError
from unolora.serving.engine import Batch

TEXTS = {
    "mood": [row["text"] for row in tiny.rows("mood", 24)],
    "topic": [row["text"] for row in tiny.rows("topic", 24)],
    "heat": [(row["first"], row["second"]) for row in tiny.rows("heat", 24)],
}


def mixed(texts=TEXTS, seed=0):
    """Inputs of all tasks, shuffled."""
    inputs = [(task, text) for task, own in texts.items() for text in own]
    return [inputs[place] for place in np.random.default_rng(seed).permutation(len(inputs))]


def alone(run, inputs):
    """What `scoring.predict_texts` says of each input by itself."""
    return [next(scoring.predict_texts(run, t, [x] if isinstance(x, tuple) else [(x,)])) for t, x in inputs]


def assert_same(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        assert one["task"] == other["task"]
        assert one.get("label") == other.get("label")
        assert one.get("value") == pytest.approx(other.get("value"), abs=1e-3)
        assert one.get("probabilities") == pytest.approx(other.get("probabilities"), abs=1e-5)


def prompts(run):
    """The same inputs as a language model reads them."""
    found = {}
    for task in run.tasks:
        rows = tiny.rows(task.name, 8)
        found[task.name] = [task.template[0].format(**row) for row in rows]
    return mixed(found)


@pytest.fixture(scope="module")
def engine(run):
    with Engine(run, max_wait=0.0) as engine:
        yield engine


class Held:
    """An engine whose model waits for a sign, and whose batches are seen."""

    def __init__(self, run, **settings) -> None:
        self.batches: list[Batch] = []
        self.engine = Engine(run, observe=self.batches.append, **{"max_wait": 0.0, **settings})
        self.sign, self.running = threading.Event(), threading.Event()
        self.hold(self.engine.predictor)

    def hold(self, predictor):
        for name in ("predict", "write", "scales"):
            setattr(predictor, name, self._waiting(getattr(predictor, name)))

    def _waiting(self, function):
        def wait(*args):
            self.running.set()
            assert self.sign.wait(30)
            return function(*args)

        return wait

    def busy(self):
        """Give it a row to chew on, and wait until it does."""
        future = self.engine.submit([("mood", "a")])
        assert self.running.wait(30)
        return future


@pytest.fixture
def held(run):
    made = []

    def make(**settings):
        made.append(Held(run, **settings))
        return made[-1]

    yield make
    for one in made:
        one.sign.set()
        one.engine.close()


# --- the same answers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_any_mix_is_answered_as_row_by_row(run, engine, seed):
    inputs = mixed(seed=seed)
    wanted = alone(run, inputs)
    assert len({str(answer) for answer in wanted}) > 60
    assert_same(engine.predict(inputs), wanted)


@pytest.mark.parametrize("settings", [{"max_rows": 1}, {"max_rows": 7}, {"max_tokens": 40}, {"max_queue": 3}])
def test_the_size_of_batches_changes_nothing(run, settings):
    batches = []
    with Engine(run, observe=batches.append, **settings) as engine:
        assert_same(engine.predict(mixed()), alone(run, mixed()))
    assert sum(len(batch.tasks) for batch in batches) == 72
    assert max(len(batch.tasks) for batch in batches) <= settings.get("max_rows", 32)
    if settings != {"max_rows": 1}:
        assert any(len(set(batch.tasks)) > 1 for batch in batches), "no batch mixed tasks"


def test_many_callers_share_batches(run, held):
    one = held(max_rows=16)
    busy, inputs = one.busy(), mixed()
    with ThreadPoolExecutor(24) as pool:
        futures = [pool.submit(one.engine.predict, inputs[start::24]) for start in range(24)]
        while one.engine.waiting < 72:
            time.sleep(0.001)
        one.sign.set()
        for start, future in enumerate(futures):
            assert_same(future.result(30), alone(run, inputs[start::24]))
    assert busy.result()
    assert len(one.batches) < 20


def test_coroutines(run, engine):
    inputs = mixed()

    async def ask():
        return await asyncio.gather(*(engine.apredict(inputs[start::9]) for start in range(9)))

    for start, found in enumerate(asyncio.run(ask())):
        assert_same(found, alone(run, inputs[start::9]))


def test_long_texts_are_tokenized_in_a_thread(run, engine):
    """By several at once: a fast tokenizer that truncates refuses that without a lock."""
    inputs = [("mood", "good day " * 600), ("topic", "cat " * 1500), ("heat", ("hot " * 900, "ice " * 900))]
    assert sum(len(text) for _, texts in inputs for text in texts) > 4096

    async def ask():
        return await asyncio.gather(*(engine.apredict(inputs) for _ in range(8)))

    for found in asyncio.run(ask()):
        assert_same(found, alone(run, inputs))


@pytest.mark.parametrize("method", ["heads-only", "lora-per-task"])
def test_rivals_are_served_too(method):
    run = runs.load_run(tiny.trained(method))
    with Engine(run) as engine:
        assert_same(engine.predict(mixed()[:20]), alone(run, mixed()[:20]))
        with pytest.raises(InputError, match="scales no ranks"):
            engine.scales([("mood", "a")])


def test_nothing_asked_nothing_answered(engine):
    assert engine.predict([]) == []
    assert asyncio.run(engine.apredict([])) == []
    assert engine.submit([]).result() == []


# --- language models -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=tiny_text.FAMILIES)
def writer(request):
    long = {"steps": 20, "learning_rate": 0.02, "evaluate_every": 20, "checkpoint_every": 20}
    return runs.load_run(training.train(tiny_text.settings(tiny.folder() / "run", request.param, training=long)))


def test_text_answers_are_those_of_row_by_row(writer):
    inputs = prompts(writer)
    with Engine(writer, max_rows=8) as engine:
        assert_same(engine.predict(inputs), alone(writer, inputs))


def test_generation_is_that_of_row_by_row(writer):
    inputs = prompts(writer)
    batches = []
    with Engine(writer, max_rows=8, observe=batches.append) as engine:
        found = engine.generate(inputs, max_tokens=6)
        singly = [engine.generate([each], max_tokens=6)[0] for each in inputs]
        shorter = engine.generate(inputs, max_tokens=2)
    assert found == singly
    assert any(len(set(batch.tasks)) > 1 for batch in batches)
    assert len({each.text for each in found}) > 1
    wanted = scoring.outputs(
        writer.model, scoring.text_rows(writer, [(t, (x,)) for t, x in inputs]), engine.predictor._collate,
        scoring="generation",
    )[1]  # fmt: skip
    row = {task.name: place for place, task in enumerate(writer.tasks)}
    read = [
        writer.model.heads.read(row[task], each.text) if each.ended else None
        for (task, _), each in zip(inputs, found, strict=True)
    ]
    for one, other in zip(read, wanted.tolist(), strict=True):
        assert one is None or one == other or np.isnan(one) == np.isnan(other)
    for long, short in zip(found, shorter, strict=True):
        assert long.text.startswith(short.text)
        assert short.tokens == min(2, long.tokens)
        assert short.ended == (long.ended and long.tokens <= 2)


def test_predictions_and_generation_wait_in_one_queue(writer):
    inputs = prompts(writer)[:6]
    with Engine(writer) as engine, ThreadPoolExecutor(2) as pool:
        first = pool.submit(engine.generate, inputs, max_tokens=4)
        second = pool.submit(engine.predict, inputs)
        assert first.result() == engine.generate(inputs, max_tokens=4)
        assert_same(second.result(), alone(writer, inputs))


def test_limits_of_generation(writer, engine):
    with Engine(writer) as own:
        with pytest.raises(InputError, match="`max_tokens` must be at least 1, got 0"):
            own.generate([("mood", "a")], max_tokens=0)
        if not writer.model.encodes:
            with pytest.raises(InputError, match=r"input 1: the backbone has room for \d+ tokens behind it, not 500"):
                own.generate([("mood", "a")], max_tokens=500)
    with pytest.raises(InputError, match="the run has heads, which write nothing"):
        engine.generate([("mood", "a")])


# --- the scales ----------------------------------------------------------------------------------------------------


def test_scales_are_those_of_the_forward(run, engine):
    from unolora.layer import UnoLoraLayer

    seen, inputs = {}, mixed()[:5]
    layers = [module for module in run.model.modules() if isinstance(module, UnoLoraLayer)]
    hooks = [
        layer.register_forward_hook(
            lambda layer, *_: seen.__setitem__(layer.position["default"], layer.scale("default"))
        )
        for layer in layers
    ]
    wanted = []
    for each in inputs:
        alone(run, [each])
        wanted.append(torch.stack([seen[place][0] for place in range(len(layers))]))
    for hook in hooks:
        hook.remove()
    found = engine.scales(inputs)
    assert len(engine.about.positions) == len(layers) == 2
    torch.testing.assert_close(torch.stack(found), torch.stack(wanted))
    assert not torch.equal(found[0], found[1])


# --- what is refused at once ---------------------------------------------------------------------------------------


def test_bad_inputs_are_their_callers_own(engine):
    with pytest.raises(InputError, match=r"unknown task 'moods'; did you mean 'mood'\?"):
        engine.predict([("mood", "a"), ("moods", "b")])
    with pytest.raises(InputError, match=r"input 2: task 'heat' takes two texts, got 1"):
        engine.predict([("mood", "a"), ("heat", "b")])
    with pytest.raises(InputError, match="a text is not valid Unicode"):
        engine.predict([("mood", "\ud800")])
    assert engine.waiting == 0


@pytest.mark.parametrize("wrong", [{"max_rows": 0}, {"max_queue": 0}, {"max_tokens": 0}, {"max_wait": -1}])
def test_settings_that_make_no_sense(run, wrong):
    with pytest.raises(InputError, match="must be at least 1, `max_wait` at least 0"):
        Engine(run, **wrong)


# --- the queue -----------------------------------------------------------------------------------------------------


def test_a_full_queue_refuses_all_or_nothing(held):
    one = held(max_queue=4)
    one.busy()
    kept = one.engine.submit([("mood", "a")] * 3)
    with pytest.raises(QueueFullError) as error:
        one.engine.submit([("mood", "b")] * 2)
    assert error.value.retry_after > 0
    assert one.engine.waiting == 3
    with pytest.raises(QueueFullError):
        asyncio.run(one.engine.apredict([("mood", "b")] * 2, wait=False))
    more = one.engine.submit([("mood", "b")])
    one.sign.set()
    assert len(kept.result(30)) == 3
    assert len(more.result(30)) == 1


def test_callers_wait_for_room(held):
    one = held(max_queue=2)
    one.busy()
    with ThreadPoolExecutor(2) as pool:
        threads = [pool.submit(one.engine.predict, [("mood", "a")] * 9), pool.submit(asyncio.run, self_ask(one.engine))]
        while one.engine.waiting < 2:
            time.sleep(0.001)
        time.sleep(0.05)
        assert one.engine.waiting == 2
        one.sign.set()
        assert [len(future.result(30)) for future in threads] == [9, 5]


async def self_ask(engine):
    return await engine.apredict([("topic", "cat")] * 5)


def test_the_oldest_is_never_passed_over(held):
    """Short rows keep coming; a long one that came first is in the first batch."""
    one = held(max_rows=2)
    one.busy()
    long = one.engine.submit([("mood", "good " * 30)])
    short = [one.engine.submit([("mood", "bad")]) for _ in range(8)]
    one.sign.set()
    wait([long, *short], 30)
    assert one.batches[1].tokens > 28


def test_rows_wait_for_company_while_the_model_is_idle(run):
    batches = []
    with Engine(run, max_wait=0.5, max_rows=4, observe=batches.append) as engine:
        futures = [engine.submit([("mood", "a")]) for _ in range(4)]
        wait(futures, 30)
    assert [len(batch.tasks) for batch in batches] == [4]


# --- deadlines and cancelling --------------------------------------------------------------------------------------


def test_a_deadline_ends_the_wait_and_frees_the_place(held):
    one = held()
    one.busy()
    with pytest.raises(DeadlineError, match=r"did not come within 0\.05 s"):
        one.engine.predict([("mood", "a")] * 3, timeout=0.05)
    assert one.engine.waiting == 0
    with pytest.raises(DeadlineError, match=r"did not come within 0\.05 s"):
        asyncio.run(one.engine.apredict([("mood", "a")] * 3, timeout=0.05))
    assert one.engine.waiting == 0


def test_a_deadline_while_waiting_for_room(held):
    one = held(max_queue=1)
    one.busy()
    one.engine.submit([("mood", "a")])
    with pytest.raises(DeadlineError):
        one.engine.predict([("mood", "b")], timeout=0.05)
    with pytest.raises(DeadlineError):
        asyncio.run(one.engine.apredict([("mood", "b")], timeout=0.05))
    assert one.engine.waiting == 1


def test_what_is_late_is_not_computed(held):
    one = held()
    one.busy()
    late = one.engine.submit([("mood", "a")], timeout=0.0)
    good = one.engine.submit([("mood", "b")], timeout=30)
    time.sleep(0.01)
    one.sign.set()
    assert good.result(30)
    with pytest.raises(DeadlineError):
        late.result(30)
    assert sum(len(batch.tasks) for batch in one.batches) == 2


def test_cancelling_takes_rows_out(held):
    one = held()
    one.busy()
    gone = one.engine.submit([("mood", "a")] * 5)
    stays = one.engine.submit([("mood", "b")])
    assert gone.cancel()
    assert one.engine.waiting == 1
    one.sign.set()
    assert stays.result(30)
    with pytest.raises(CancelledError):
        gone.result()

    async def leave():
        one.sign.clear()
        one.running.clear()
        one.busy()
        task = asyncio.create_task(one.engine.apredict([("mood", "a")] * 5))
        while one.engine.waiting < 5:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert one.engine.waiting == 0
        one.sign.set()

    asyncio.run(leave())
    assert one.engine.predict([("mood", "a")], timeout=30)


def test_cancelling_what_runs_leaves_the_others(held):
    one = held(max_rows=8)
    running = one.busy()
    assert running.cancel()
    other = one.engine.submit([("mood", "b")])
    one.sign.set()
    assert other.result(30)


# --- failures ------------------------------------------------------------------------------------------------------


def poison(predictor, text="poor"):
    """Let the model fail on every batch that has this word in it."""
    ((_, split, place),) = predictor.rows([("mood", text)])
    token = split.inputs["input_ids"][place][1]
    good, calls = predictor.predict, []

    def predict(rows):
        calls.append(len(rows))
        if any(token in split.inputs["input_ids"][place] for _, split, place in rows):
            raise RuntimeError("poisoned")
        return good(rows)

    predictor.predict = predict
    return calls


def test_a_poisoned_row_fails_alone(run, held):
    one = held(max_rows=32)
    one.sign.set()
    calls = poison(one.engine.predictor)
    one.sign.clear()
    inputs = [(t, x) for t, x in mixed() if "poor" not in str(x)][:20]
    one.hold(one.engine.predictor)
    one.busy()
    good = [one.engine.submit([each]) for each in inputs]
    bad = one.engine.submit([("mood", "a poor day")])
    both = one.engine.submit([("mood", "a good day"), ("mood", "poor")])
    one.sign.set()
    with pytest.raises(FailedError, match="the model failed on this input") as error:
        bad.result(30)
    assert str(error.value.__cause__) == "poisoned"
    with pytest.raises(FailedError):
        both.result(30)
    assert_same([future.result(30)[0] for future in good], alone(run, inputs))
    assert max(calls) > 10
    assert sum(batch.failed for batch in one.batches) == 2


def test_outputs_that_are_not_finite_are_a_failure(run, held):
    one = held()
    one.sign.set()
    original = run.model.heads.forward
    try:
        run.model.heads.forward = lambda pooled, tasks: original(pooled, tasks).masked_fill(
            (tasks == 1)[:, None], torch.nan
        )
        ok, bad = one.engine.submit([("mood", "a")]), one.engine.submit([("topic", "a")])
        assert ok.result(30)
        with pytest.raises(FailedError):
            bad.result(30)
    finally:
        del run.model.heads.forward


def test_an_observer_that_fails_stops_nothing(run, caplog):
    def broken(batch):
        raise ZeroDivisionError

    with Engine(run, observe=broken) as engine:
        assert engine.predict([("mood", "a")])
        assert engine.predict([("mood", "a")])
    assert "the observer of the engine failed" in caplog.text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_an_engine_that_died(held, monkeypatch):
    one = held()
    one.busy()
    monkeypatch.setattr("unolora.serving.engine.choose", lambda *_, **__: 1 / 0)
    future = one.engine.submit([("mood", "a")])
    one.sign.set()
    with pytest.raises(ClosedError):
        future.result(30)
    one.engine._thread.join(30)
    assert not one.engine.alive
    with pytest.raises(ClosedError):
        one.engine.predict([("mood", "a")])


# --- closing and replacing -----------------------------------------------------------------------------------------


def test_closing_answers_what_was_accepted(held):
    one = held(max_rows=2)
    one.busy()
    futures = [one.engine.submit([("mood", "a")]) for _ in range(7)]
    closer = threading.Thread(target=one.engine.close)
    closer.start()
    while one.engine.accepts:
        time.sleep(0.001)
    with pytest.raises(ClosedError, match="the engine is closed"):
        one.engine.submit([("mood", "late")])
    one.sign.set()
    closer.join(30)
    assert all(future.result(0) for future in futures)


def test_closing_in_a_hurry(held):
    one = held()
    one.busy()
    future = one.engine.submit([("mood", "a")])
    assert not one.engine.close(timeout=0.05)
    with pytest.raises(ClosedError, match="closed before the answer came"):
        future.result(0)


def test_a_new_run_takes_over_and_drops_nothing(run, held):
    """What was accepted before is answered by the old one, in batches of its own."""
    other = runs.load_run(tiny.trained("heads-only"))
    inputs = mixed()[:30]
    old, new = alone(run, inputs), alone(other, inputs)
    assert old != new
    one = held(max_rows=8)
    one.busy()
    before = [one.engine.submit([each]) for each in inputs]
    one.engine.replace(other)
    after = [one.engine.submit([each]) for each in inputs]
    one.sign.set()
    assert_same([future.result(30)[0] for future in before], old)
    assert_same([future.result(30)[0] for future in after], new)


def test_a_broken_run_does_not_take_over(run):
    broken = runs.load_run(tiny.trained())
    with torch.no_grad():
        next(p for p in broken.model.heads.parameters()).fill_(torch.nan)
    with Engine(run) as engine:
        wanted = engine.predict(mixed()[:4])
        with pytest.raises(InputError, match="not finite"):
            engine.replace(broken)
        assert engine.predict(mixed()[:4]) == wanted
