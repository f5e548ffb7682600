"""Rows to tokens to batches."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from unolora.data import Collator, Encoded, TaskRows, TrainingBatches, encode
from unolora.errors import InputError
from unolora.sampling import Sampler
from unolora.tasks.rows import Rows
from unolora.tokens import Ragged


@pytest.fixture(scope="module")
def words():
    return tiny.tokenizer()


def rows(*texts):
    return Rows(list(texts), np.arange(len(texts)))


def test_pairs_become_pairs(words):
    one = encode(rows(("bad cat",)), words, 32)
    two = encode(rows(("bad", "cat")), words, 32)
    assert [words.convert_ids_to_tokens(x.inputs["input_ids"][0]) for x in (one, two)] == [
        ["[CLS]", "bad", "cat", "[SEP]"],
        ["[CLS]", "bad", "[SEP]", "cat", "[SEP]"],
    ]
    assert list(two.inputs["token_type_ids"]) == [[0, 0, 0, 1, 1]]
    assert set(one.inputs) == {"input_ids", "token_type_ids"}


def test_long_inputs_are_cut(words):
    split = encode(rows(("bad " * 50,), ("bad",)), words, 8)
    assert split.lengths() == [8, 3]
    assert len(split) == 2
    pair = encode(rows(("bad " * 50, "cat")), words, 8)
    assert words.convert_ids_to_tokens(pair.inputs["input_ids"][0])[-2:] == ["cat", "[SEP]"], "the shorter text stays"


@pytest.mark.parametrize("text", ["a \ud83d b", "\udcff"])
def test_half_a_surrogate_pair_is_no_text(words, text):
    with pytest.raises(InputError, match=r"a text is not valid Unicode: '.*\\ud.*'; save it as UTF-8"):
        encode(rows(("good",), (text,)), words, 8)


@pytest.mark.parametrize("text", ["", "\U0001f600 é", "\u2028", "\0"])
def test_odd_texts_are_texts(words, text):
    assert len(encode(rows((text,), ("bad",)), words, 8)) == 2


@given(st.lists(st.text(max_size=20), min_size=1, max_size=5), st.integers(4, 12))
@settings(max_examples=50, deadline=None)
def test_any_text_is_taken(texts, length):
    split = encode(Rows([(text,) for text in texts], np.zeros(len(texts))), tiny.tokenizer(), length)
    assert all(2 <= n <= length for n in split.lengths())


# --- collating -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_are_padded_to_their_longest_on_the_right(side):
    words = tiny.tokenizer(padding_side=side)
    split = encode(rows(("bad",), ("bad cat dog",), ("bad " * 9,)), words, 16)
    batch = Collator(words)([(2, split, 1), (0, split, 0)])
    assert batch["input_ids"].shape == (2, 5)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["input_ids"][1, 3:].tolist() == [words.pad_token_id] * 2
    assert batch["tasks"].tolist() == [2, 0]
    assert batch["labels"].tolist() == [1, 0]
    assert batch["labels"].dtype == torch.float32
    assert set(batch) == {"input_ids", "token_type_ids", "attention_mask", "tasks", "labels"}


@pytest.mark.parametrize("eos", ["[SEP]", None])
def test_a_tokenizer_without_padding_gets_one(eos):
    words = tiny.tokenizer(pad_token=None, eos_token=eos)
    split = encode(rows(("bad",), ("bad cat",)), words, 16)
    batch = Collator(words)([(0, split, 0), (0, split, 1)])
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_rows_are_addressed_by_task_and_row():
    one, two = (Encoded({"input_ids": Ragged.of([[1]] * n)}, np.arange(n)) for n in (2, 3))
    data = TaskRows([one, two])
    assert len(data) == 5
    assert data[1, 2] == (1, two, 2)


# --- micro-batches -------------------------------------------------------------------------------------------------


def batches(start=0, *, batch_size=12, steps=5, seed=0, **more):
    sampler = Sampler([9, 5], batch_size=batch_size, seed=seed)
    lengths = [[(7 * row) % 11 + 1 for row in range(9)], [(3 * row) % 7 + 1 for row in range(5)]]
    return sampler, lengths, TrainingBatches(sampler, lengths, steps, lambda: start, **more)


@given(st.sampled_from([1, 2, 3, 4, 6, 12]), st.sampled_from([1, 2, 3, 4]), st.integers(0, 5), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_parts_are_the_global_batch(accumulation, world_size, start, seed):
    """Whatever the cut, the parts of all ranks are the rows of the step, and start anywhere alike."""
    sampler, _, _ = batches(seed=seed)
    more = {"seed": seed, "accumulation": accumulation, "world_size": world_size}
    if 12 % (accumulation * world_size):
        with pytest.raises(InputError, match="can't be cut into equal parts"):
            batches(**more)
        return
    parts = [list(batches(start, rank=rank, **more)[2]) for rank in range(world_size)]
    for rank in range(world_size):
        assert len(parts[rank]) == (5 - start) * accumulation
        assert parts[rank] == list(batches(0, rank=rank, **more)[2])[start * accumulation :]
    for step in range(5 - start):
        own = slice(step * accumulation, (step + 1) * accumulation)
        found = [row for rank in range(world_size) for part in parts[rank][own] for row in part]
        assert sorted(found) == sorted(sampler.batch(start + step))
        assert {len(part) for rank in range(world_size) for part in parts[rank][own]} == {
            12 // accumulation // world_size
        }


def test_parts_are_of_like_length():
    _, lengths, found = batches(accumulation=4)
    for first, second in zip(list(found)[:3], list(found)[1:4], strict=True):
        assert max(lengths[t][r] for t, r in first) <= min(lengths[t][r] for t, r in second)
    assert len(found) == 20


def test_the_start_is_asked_when_iteration_begins():
    sampler, lengths, _ = batches()
    start = [0]
    found = TrainingBatches(sampler, lengths, 3, lambda: start[0])
    start[0] = 2
    assert [sorted(rows) for rows in found] == [sorted(sampler.batch(2))]
