"""Which of the waiting rows run together."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unolora.serving.batching import Size, choose

sizes = st.lists(st.builds(Size, st.integers(1, 200), st.sampled_from([1, 1, 1, 8])), min_size=1, max_size=60)


def cost(rows, overhead):
    longest, steps = max(r.length for r in rows), max(r.steps for r in rows)
    return overhead * steps + len(rows) * (longest + steps)


@given(sizes, st.integers(1, 16), st.integers(1, 2000), st.floats(0, 500))
def test_the_oldest_runs_and_bounds_hold(found, max_rows, max_tokens, overhead):
    places = choose(found, max_rows=max_rows, max_tokens=max_tokens, overhead=overhead)
    assert 0 in places
    assert places == sorted(set(places))
    assert len(places) <= max_rows
    assert max(places) < 2 * max_rows
    taken = [found[place] for place in places]
    if len(taken) > 1:
        assert cost(taken, 0) <= max_tokens


@given(sizes, st.integers(1, 8), st.floats(0, 500))
def test_all_rows_are_served_and_the_first_plan_is_no_dearer_than_one_by_one(found, max_rows, overhead):
    left, spent = list(found), 0.0
    while left:
        places = choose(left, max_rows=max_rows, max_tokens=10**6, overhead=overhead)
        spent += cost([left[place] for place in places], overhead)
        left = [size for place, size in enumerate(left) if place not in places]
    assert spent <= sum(cost([size], overhead) for size in found) + 1e-6


def test_like_lengths_share_a_forward_where_padding_is_dearer_than_a_pass():
    found = [Size(100), Size(5), Size(6), Size(90), Size(7)]
    assert choose(found, max_rows=8, max_tokens=10**6, overhead=20) == [0, 3]
    assert choose(found[1:], max_rows=8, max_tokens=10**6, overhead=20) == [0, 1, 3]


def test_all_share_one_where_a_pass_is_dearer():
    found = [Size(100), Size(5), Size(6), Size(90), Size(7)]
    assert choose(found, max_rows=8, max_tokens=10**6, overhead=10_000) == [0, 1, 2, 3, 4]


def test_a_row_that_is_longer_than_a_batch_may_be_runs_alone():
    assert choose([Size(500), Size(4)], max_rows=8, max_tokens=64, overhead=1000) == [0]


def test_rows_that_write_much_do_not_hold_up_rows_that_write_little():
    found = [Size(5, 1), Size(5, 200), Size(5, 1), Size(5, 190)]
    assert choose(found, max_rows=8, max_tokens=10**6, overhead=50) == [0, 2]


@pytest.mark.parametrize("place", range(5))
def test_no_row_waits_for_ever(place):
    """Fresh short rows keep coming; the odd one is served once it is the oldest."""
    waiting = [Size(5)] * place + [Size(90)] + [Size(5)] * 4
    turns = 0
    while True:
        places = choose(waiting, max_rows=2, max_tokens=10**6, overhead=1)
        if any(waiting[p].length == 90 for p in places):
            break
        turns += 1
        waiting = [size for p, size in enumerate(waiting) if p not in places] + [Size(5)] * 2
    assert turns <= place
