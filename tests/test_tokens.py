"""Token lists in flat arrays, and their copy on disk."""

import logging

import numpy as np
import pytest

import tiny
from unolora import tokens
from unolora.tokens import Ragged, tokenize

FIRST = ["the cat was good", "", "sad", "we saw the oak and the rose and the fern and the axe"]
SECOND = ["a dog", "good", "", "cold ice"]


@pytest.mark.parametrize("lists", [[], [[]], [[1, 2], [], [3]], [[-1], [2**31 - 1]]])
def test_ragged_holds_lists(lists):
    ragged = Ragged.of(lists)
    assert list(ragged) == ragged[:] == lists
    assert len(ragged) == len(lists)
    assert ragged.lengths() == [len(numbers) for numbers in lists]
    assert [ragged[i - len(lists)] for i in range(len(lists))] == lists
    for beyond in (len(lists), -len(lists) - 1):
        with pytest.raises(IndexError):
            ragged[beyond]


@pytest.mark.parametrize("second", [None, SECOND])
@pytest.mark.parametrize("max_length", [6, 40])
def test_tokens_are_the_tokenizers_own(second, max_length, tmp_path):
    words = tiny.tokenizer()
    expected = tiny.tokenizer()(FIRST, second, truncation=True, max_length=max_length, return_attention_mask=False)
    assert (max(map(len, expected["input_ids"])) > 6) == (max_length == 40), "the shorter limit cuts"
    found = tokenize(words, FIRST, second, max_length, tmp_path)
    assert {name: list(ragged) for name, ragged in found.items()} == dict(expected)


def test_another_kind_of_tokenizer_is_called_itself(tmp_path):
    words = tiny.tokenizer()

    class Slow:
        def __call__(self, *args, **kwargs):
            return words(*args, **kwargs)

    found = tokenize(Slow(), FIRST, None, 40, tmp_path)
    assert list(found["input_ids"]) == words(FIRST)["input_ids"]
    assert not list(tmp_path.iterdir())


def test_no_rows_have_no_tokens(tmp_path):
    assert list(tokenize(tiny.tokenizer(), [], None, 8, tmp_path)["input_ids"]) == []


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Keep the tokens of 4 rows, and count how often a tokenizer is asked for all of them."""
    monkeypatch.setattr(tokens, "KEPT_FROM", len(FIRST))
    calls = []

    def get(words=None, first=FIRST, second=None, max_length=8, folder=tmp_path):
        before = len(calls)
        found = tokenize(words or Counting(calls), first, second, max_length, folder)
        return {name: list(ragged) for name, ragged in found.items()}, len(calls) - before

    get.folder = tmp_path
    return get


class Counting:
    """A tokenizer that notes when its backend encodes rows."""

    def __init__(self, calls, **settings):
        self.words, self.calls, self.backend_tokenizer = tiny.tokenizer(**settings), calls, self

    def __call__(self, *args, **kwargs):
        return self.words(*args, **kwargs)

    def to_str(self):
        return self.words.backend_tokenizer.to_str()

    def encode_batch_fast(self, texts):
        self.calls.append(len(texts))
        return self.words.backend_tokenizer.encode_batch_fast(texts)


def test_the_second_run_reads_them(kept):
    first, calls = kept()
    assert calls == 1
    assert len(list(kept.folder.iterdir())) == 1
    assert kept() == (first, 0)


def test_few_rows_are_not_kept(kept):
    assert kept(first=FIRST[:3])[1] == 1
    assert not list(kept.folder.iterdir())
    assert kept(first=FIRST[:3])[1] == 1


@pytest.mark.parametrize(
    "change", [{"first": ["other", *FIRST[1:]]}, {"second": SECOND}, {"max_length": 5}], ids=["text", "pair", "length"]
)
def test_other_texts_or_lengths_are_other_tokens(kept, change):
    before, _ = kept()
    after, calls = kept(**change)
    assert calls == 1
    assert after != before


def test_texts_are_not_run_together(kept):
    """Two lists whose concatenation is the same."""
    assert kept(first=["a b", "c", "d", "e"])[1] == 1
    assert kept(first=["a", "b c", "d", "e"])[1] == 1


def test_another_tokenizer_makes_its_own(kept):
    kept()
    calls = []
    other = Counting(calls)
    other.words.backend_tokenizer.add_tokens(["oak and"])
    assert kept(other) != kept()
    assert len(calls) == 1


@pytest.mark.parametrize("spoil", [lambda data: b"", lambda data: data[:-4], lambda data: b"x" + data[1:]])
def test_a_spoilt_copy_is_made_again(kept, spoil):
    first, _ = kept()
    (path,) = kept.folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(spoil(whole))
    assert kept() == (first, 1)
    assert path.read_bytes() == whole


def test_where_nothing_can_be_kept_the_run_goes_on(kept, tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with caplog.at_level(logging.WARNING):
        found, _ = kept(folder=blocked / "tokens")
    assert found["input_ids"]
    assert "tokens are not kept for the next run" in caplog.text


def test_numbers_take_four_bytes():
    ragged = Ragged.of([[1000] * 100] * 50)
    assert ragged.flat.dtype == np.int32
    assert ragged.flat.nbytes == 4 * 100 * 50
