"""The sampler: its shares, its guarantees (numbered as in the module's docstring), and one golden stream."""

import itertools
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unolora import sampling
from unolora.errors import InputError
from unolora.sampling import MAX_SLOTS, STRATEGIES, Sampler

QUICK = settings(max_examples=40, deadline=None)
SIZES = st.lists(st.integers(1, 300), min_size=1, max_size=6)
SAMPLERS = st.builds(
    Sampler,
    SIZES,
    batch_size=st.integers(1, 40),
    seed=st.integers(0, 2**40),
    strategy=st.sampled_from(STRATEGIES),
    temperature=st.floats(0.2, 50),
    limit=st.none() | st.integers(1, 400),
    mixed=st.booleans(),
)


def clone(sampler: Sampler) -> Sampler:
    """A sampler with the same stream and nothing cached."""
    fresh = Sampler.__new__(Sampler)
    fresh.__dict__.update(sampler.__dict__, _block=None, _passes={})
    return fresh


def drawn(sampler: Sampler, steps: int) -> list[list[int]]:
    """The rows of each task in the order in which they are drawn."""
    rows: list[list[int]] = [[] for _ in sampler.sizes]
    for task, row in itertools.chain.from_iterable(map(sampler.batch, range(steps))):
        rows[task].append(row)
    return rows


# Shares


@pytest.mark.parametrize(
    ("sizes", "options", "expected"),
    [
        ([1, 3], {"strategy": "proportional"}, [1 / 4, 3 / 4]),
        ([1, 9], {"strategy": "temperature", "temperature": 2}, [1 / 4, 3 / 4]),
        ([1, 1024], {}, [1 / 3, 2 / 3]),  # T = 10 by default
        ([1, 1000, 5], {"strategy": "equal"}, [1 / 3, 1 / 3, 1 / 3]),
        ([100, 10**6], {"strategy": "proportional", "limit": 300}, [1 / 4, 3 / 4]),
        ([100, 10**6], {"strategy": "temperature", "temperature": 2, "limit": 900}, [1 / 4, 3 / 4]),
        ([7], {}, [1.0]),
    ],
)
def test_shares_by_hand(sizes, options, expected):
    np.testing.assert_allclose(Sampler(sizes, batch_size=4, **options).probabilities, expected, rtol=1e-12)


@QUICK
@given(SIZES, st.sampled_from(STRATEGIES), st.floats(0.5, 50), st.none() | st.integers(1, 400))
def test_shares_follow_their_formulas(sizes, strategy, temperature, limit):
    sampler = Sampler(sizes, batch_size=8, strategy=strategy, temperature=temperature, limit=limit)
    capped = [min(size, limit or size) for size in sizes]
    power = {"proportional": 1.0, "temperature": 1 / temperature, "equal": 0.0}[strategy]
    weights = [(size / sum(capped)) ** power for size in capped]
    np.testing.assert_allclose(sampler.probabilities, [weight / sum(weights) for weight in weights], rtol=1e-9)


@QUICK
@given(SIZES, st.none() | st.integers(1, 100))
def test_temperature_one_is_proportional(sizes, limit):
    options = {"batch_size": 8, "limit": limit}
    warm = Sampler(sizes, strategy="temperature", temperature=1.0, **options)
    proportional = Sampler(sizes, strategy="proportional", **options)
    np.testing.assert_array_equal(warm.probabilities, proportional.probabilities)
    assert [warm.batch(step) for step in range(3)] == [proportional.batch(step) for step in range(3)]


def test_high_temperature_is_equal():
    sizes = [3, 500, 70_000]
    assert np.ptp(Sampler(sizes, batch_size=8).probabilities) > 0.1  # T = 10 is not there yet
    hot = Sampler(sizes, batch_size=8, temperature=1e12)
    np.testing.assert_allclose(hot.probabilities, np.full(3, 1 / 3), rtol=1e-9)
    equal = Sampler(sizes, batch_size=8, strategy="equal")
    assert [hot.batch(step) for step in range(20)] == [equal.batch(step) for step in range(20)]


def test_low_temperature_still_draws_every_task():
    sampler = Sampler([1, 1000], batch_size=8, temperature=1e-3)
    assert sampler.probabilities[0] == 0  # underflow
    assert sampler.counts(sampler.block_steps).tolist() == [1, MAX_SLOTS - 1]


def test_limit_lowers_the_share_but_not_the_choice_of_rows():
    sampler = Sampler([10, 200], batch_size=10, strategy="proportional", limit=10)
    assert sampler.probabilities.tolist() == [0.5, 0.5]
    assert sorted(drawn(sampler, 40)[1]) == list(range(200))


@QUICK
@given(
    st.lists(st.integers(1, 10**6), min_size=1, max_size=40),
    st.integers(1, 300),
    st.sampled_from(STRATEGIES),
    st.booleans(),
)
def test_block_counts_are_near_their_shares(sizes, batch_size, strategy, mixed):
    sampler = Sampler(sizes, batch_size=batch_size, strategy=strategy, mixed=mixed)
    slots = sampler.block_steps * (batch_size if mixed else 1)
    counts = sampler.counts(sampler.block_steps) // (1 if mixed else batch_size)
    share = slots * sampler.probabilities
    assert counts.sum() == slots
    assert counts.min() >= 1
    close = np.abs(counts - share) <= 0.02 * share + 1e-6
    assert close.all() or (2 * slots > MAX_SLOTS and sampler.probabilities.min() < 1e-4)
    assert np.all(np.abs(counts - share)[share >= 1] < 1 + len(sizes))  # the others pay at most one slot per rare task


@pytest.mark.parametrize(
    "p", [[0.25, 0.25, 0.5], [1 / 6, 1 / 3, 1 / 2], [0.3, 0.3, 0.4], [1 / 7] * 7, [0.9, 0.05, 0.05]]
)
def test_last_bits_of_a_share_change_no_count(p):
    p = np.array(p)
    for slots in range(len(p), 60):
        expected = sampling._apportion(p, slots)
        for signs in itertools.islice(itertools.product((0.0, 1.0), repeat=len(p)), 64):
            np.testing.assert_array_equal(sampling._apportion(np.nextafter(p, np.array(signs)), slots), expected)


# Guarantee 1: the arguments alone decide


@QUICK
@given(SAMPLERS, st.lists(st.integers(0, 10**7), min_size=1, max_size=6))
def test_any_order_of_calls_gives_the_same_batches(sampler, steps):
    forward = {step: clone(sampler).batch(step) for step in steps}
    assert {step: sampler.batch(step) for step in reversed(steps)} == forward
    for step, batch in forward.items():
        assert len(batch) == sampler.batch_size
        assert all(0 <= row < sampler.sizes[task] for task, row in batch)
        sampler.counts(step // 2)  # moves the cached block
        assert sampler.batch(step) == batch


def test_golden_batches():
    # These literals fix the stream, for every process and machine. A change that breaks them breaks the resuming of
    # every older run: it would go on with other rows than those it had left. Change them only with a note in the
    # changelog that says so.
    mixed = Sampler([3, 10, 40], batch_size=8, seed=0)
    assert mixed.batch(0) == [(2, 36), (1, 2), (0, 0), (2, 4), (2, 2), (0, 1), (1, 4), (1, 0)]
    assert mixed.batch(1) == [(1, 6), (2, 22), (1, 3), (1, 1), (1, 5), (0, 2), (1, 7), (2, 24)]
    by_task = Sampler([3, 10, 40], batch_size=4, seed=0, mixed=False)
    assert by_task.batch(0) == [(2, 36), (2, 4), (2, 2), (2, 22)]
    assert by_task.batch(1) == [(1, 2), (1, 4), (1, 0), (1, 6)]


def test_seeds_give_other_orders_of_the_same_shares():
    one, two = (Sampler([30, 300], batch_size=8, seed=seed) for seed in (1, 2))
    assert [task for task, _ in one.batch(0)] != [task for task, _ in two.batch(0)]
    assert drawn(one, 20)[1][:20] != drawn(two, 20)[1][:20]
    assert one.counts(one.block_steps).tolist() == two.counts(two.block_steps).tolist()


# Guarantee 2: resuming


@pytest.mark.parametrize("mixed", [True, False])
def test_resumed_equals_uninterrupted(mixed):
    options = {"sizes": [4, 60, 500], "batch_size": 16, "seed": 5, "mixed": mixed}
    whole = [Sampler(**options).batch(step) for step in range(120)]
    for k in (1, 37, 119):
        resumed = Sampler(**options)
        assert [resumed.batch(step) for step in range(k, 120)] == whole[k:]


def test_resuming_late_makes_one_block_and_one_pass_per_task(monkeypatch):
    shuffles = record_shuffles(monkeypatch)
    Sampler([4000, 70_000, 500], batch_size=32).batch(200_000)
    assert len(shuffles) == 4
    assert sum(kind == sampling.BLOCKS for _, kind, *_ in shuffles) == 1


# Guarantee 3: without replacement


@QUICK
@given(SAMPLERS)
def test_every_pass_sees_every_row_once(sampler):
    steps = 60
    for size, rows in zip(sampler.sizes, drawn(sampler, steps), strict=True):
        for start in range(0, len(rows), size):
            one_pass = rows[start : start + size]
            assert len(set(one_pass)) == len(one_pass)
            if len(one_pass) == size:
                assert sorted(one_pass) == list(range(size))


@QUICK
@given(
    st.lists(st.integers(1, 25), min_size=1, max_size=4), st.integers(1, 12), st.sampled_from(STRATEGIES), st.booleans()
)
def test_every_row_of_every_task_is_drawn_in_time(sizes, batch_size, strategy, mixed):
    sampler = Sampler(sizes, batch_size=batch_size, strategy=strategy, mixed=mixed)
    steps = sampler.block_steps
    while np.any(sampler.counts(steps) < sizes):  # every block draws every task, so this ends
        steps += sampler.block_steps
    assert [sorted(set(rows)) for rows in drawn(sampler, steps)] == [list(range(size)) for size in sizes]


def test_passes_and_tasks_have_their_own_orders():
    first, second = drawn(Sampler([50, 50], batch_size=10), 40)
    assert sorted(first[:50]) == sorted(first[50:100]) == sorted(second[:50])
    assert first[:50] != first[50:100]
    assert first[:50] != second[:50]


def test_all_orders_are_equally_likely():
    orders = Counter(tuple(sampling._shuffled(3, 0, sampling.PASSES, 0, number)) for number in range(6000))
    assert len(orders) == 6
    assert all(abs(count - 1000) < 5 * np.sqrt(1000 * 5 / 6) for count in orders.values())  # five standard deviations


# Guarantee 4: exact counts


@QUICK
@given(SAMPLERS, st.integers(0, 100))
def test_counts_equal_counting(sampler, steps):
    seen = Counter(task for step in range(steps) for task, _ in sampler.batch(step))
    counts = sampler.counts(steps)
    assert counts.tolist() == [seen[task] for task in range(len(sampler.sizes))]
    assert counts.sum() == steps * sampler.batch_size


def test_blocks_have_the_same_counts_in_another_order():
    sampler = Sampler([20, 300, 4000], batch_size=16)
    steps = sampler.block_steps
    blocks = [[task for step in range(b * steps, (b + 1) * steps) for task, _ in sampler.batch(step)] for b in range(3)]
    assert blocks[0] != blocks[1] != blocks[2]
    for b, block in enumerate(blocks):
        assert np.bincount(block).tolist() == sampler.counts(steps).tolist()
        assert sampler.counts((b + 1) * steps).tolist() == ((b + 1) * sampler.counts(steps)).tolist()


def test_counts_far_along_the_stream_need_no_replay():
    sampler = Sampler([20, 300, 4000], batch_size=16)
    far = 10**9 * sampler.block_steps
    assert sampler.counts(far).tolist() == (10**9 * sampler.counts(sampler.block_steps)).tolist()
    tasks = np.bincount([task for task, _ in sampler.batch(far)], minlength=3)
    assert (sampler.counts(far + 1) - sampler.counts(far)).tolist() == tasks.tolist()


# Guarantee 5: ranks


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_global_batch(world_size, mixed):
    sampler = Sampler([4, 60, 500], batch_size=16, mixed=mixed)
    for step in (0, 1, 999):
        parts = [clone(sampler).local_batch(step, rank, world_size) for rank in range(world_size)]
        assert {len(part) for part in parts} == {16 // world_size}
        assert list(itertools.chain.from_iterable(zip(*parts, strict=True))) == sampler.batch(step)


@QUICK
@given(SIZES, st.integers(1, 8), st.sampled_from(STRATEGIES), st.booleans(), st.integers(0, 10**6))
def test_any_number_of_processes_draws_the_same_global_batches(sizes, quarter, strategy, mixed, step):
    options = {"sizes": sizes, "batch_size": 4 * quarter, "strategy": strategy, "mixed": mixed}
    expected = Sampler(**options).batch(step)
    for world_size in (1, 2, 4):
        parts = [Sampler(**options).local_batch(step, rank, world_size) for rank in range(world_size)]
        assert list(itertools.chain.from_iterable(zip(*parts, strict=True))) == expected


# One task a batch


@QUICK
@given(SIZES, st.integers(2, 20))
def test_unmixed_batches_hold_consecutive_draws_of_one_task(sizes, batch_size):
    sampler = Sampler(sizes, batch_size=batch_size, mixed=False)
    for step in range(20):
        batch = sampler.batch(step)
        (task,) = {task for task, _ in batch}
        before = int(sampler.counts(step)[task])
        assert [row for _, row in batch] == [clone(sampler)._row(task, before + i) for i in range(batch_size)]


def test_mixed_batches_do_mix():
    assert len({task for task, _ in Sampler([50, 50, 50], batch_size=12).batch(0)}) > 1


# Extreme sizes


def test_a_large_task_is_permuted_in_no_memory(monkeypatch):
    """One row beside a thousand million."""
    shuffles = record_shuffles(monkeypatch)
    sampler = Sampler([1, 10**9], batch_size=32)
    tracemalloc.start()
    try:
        batches = [sampler.batch(step) for step in range(30)]
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert {task for batch in batches for task, _ in batch} == {0, 1}
    assert sum(n == 1 for n, *_ in shuffles) > 30  # though the task of one row went through many passes
    assert max(n for n, *_ in shuffles) < 1000
    assert max(row for batch in batches for _, row in batch) > 10**8
    assert kept < 1e6
    assert peak < 1e6


def test_a_task_just_beyond_the_shuffles_keeps_its_promises(monkeypatch):
    """Every row once a pass, another order in the next pass, any order of calls."""
    monkeypatch.setattr(sampling, "LARGE", 40)
    for size, kind in ((40, np.ndarray), (41, sampling.Feistel)):
        sampler = Sampler([size], batch_size=10)
        rows = drawn(sampler, 3 * size // 10)[0]
        assert type(sampler._passes[0][1]) is kind
        first, second = rows[:size], rows[size : 2 * size]
        assert sorted(first) == sorted(second) == list(range(size))
        assert first != second
        assert clone(sampler).batch(2) == sampler.batch(2)


@QUICK
@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 9))
def test_a_feistel_network_is_a_permutation(n, seed, key):
    order = sampling.Feistel(n, seed, key)
    assert sorted(order[place] for place in range(n)) == list(range(n))
    with pytest.raises(IndexError):
        order[n]


def test_a_feistel_network_spreads_evenly():
    """Each place holds each tenth equally often, and so do neighbours, whatever the other one holds."""
    n, keys = 1000, 4000
    places = np.array([[sampling.Feistel(n, 0, key)[place] for place in (0, 1, 2, n - 1)] for key in range(keys)])
    tenths = places * 10 // n  # [keys, 4]
    for column in tenths.T:
        counts = np.bincount(column, minlength=10)
        assert ((counts - keys / 10) ** 2 / (keys / 10)).sum() < 33  # chi-squared, 9 degrees: beyond it 1 in 10,000
    pairs = np.bincount(tenths[:, 0] * 10 + tenths[:, 1], minlength=100)
    assert ((pairs - keys / 100) ** 2 / (keys / 100)).sum() < 160  # 99 degrees: beyond it 1 in 10,000
    order = np.array([sampling.Feistel(n, 0, 1)[place] for place in range(n)])
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.12
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.12


GOLDEN = [631082594, 450923094, 447985192, 557861868]


def test_golden_draws_of_a_large_task():
    order = sampling.Feistel(10**9, 0, sampling.PASSES, 0, 0)
    assert [order[place] for place in range(4)] == GOLDEN
    assert Sampler([10**9], batch_size=4).batch(0) == [(0, row) for row in GOLDEN]


def test_one_row_beside_ten_million_in_proportion():
    sampler = Sampler([1, 10_000_000], batch_size=32, strategy="proportional")
    assert sampler.counts(sampler.block_steps).tolist() == [1, MAX_SLOTS - 1]


def test_more_tasks_than_rows_in_a_batch():
    sampler = Sampler(range(1, 101), batch_size=8)
    assert np.all(sampler.counts(sampler.block_steps) >= 1)


def record_shuffles(monkeypatch) -> list[tuple[int, ...]]:
    """The (length, kind, key...) of every shuffle from here on."""
    calls: list[tuple[int, ...]] = []
    shuffled = sampling._shuffled

    def recorded(n, seed, *key):
        calls.append((n, *key))
        return shuffled(n, seed, *key)

    monkeypatch.setattr(sampling, "_shuffled", recorded)
    return calls


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": []}, "at least one task"),
        ({"sizes": [5, 0]}, "at least 1 training row, got 0 for task 1"),
        ({"strategy": "temprature"}, "unknown sampling strategy 'temprature'; did you mean 'temperature'"),
        ({"temperature": 0}, "temperature must be above 0.*got 0"),
        ({"temperature": -1.5}, "temperature must be above 0.*got -1.5"),
        ({"temperature": float("nan")}, "temperature must be above 0.*got nan"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"limit": 0}, "limit must be at least 1 row, or none at all, got 0"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
    ],
)
def test_nonsense_is_refused(arguments, message):
    sensible = {"sizes": [5, 6], "batch_size": 4}
    Sampler(**sensible)
    with pytest.raises(InputError, match=message):
        Sampler(**sensible | arguments)


@pytest.mark.parametrize(
    ("rank", "world_size", "message"),
    [
        (0, 3, "batch_size 8 must be a multiple of the number of processes, 3"),
        (2, 2, r"rank must lie in 0..world_size - 1, got rank 2 of 2"),
        (-1, 2, "got rank -1 of 2"),
        (0, 0, "got rank 0 of 0"),
    ],
)
def test_ranks_that_cannot_be_are_refused(rank, world_size, message):
    with pytest.raises(InputError, match=message):
        Sampler([5, 6], batch_size=8).local_batch(0, rank, world_size)


def test_negative_steps_are_refused():
    sampler = Sampler([5, 6], batch_size=8)
    for method in (sampler.batch, sampler.counts):
        with pytest.raises(InputError, match="counted from 0, got -1"):
            method(-1)
