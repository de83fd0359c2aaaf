"""Tokenized text."""

import dataclasses

import pytest
import torch

from polyhead.errors import ArgumentError, ShapeError
from polyhead.models.text import PART, most_likely, read_ids, token_texts


class BytesTokenizer:
    """A start token, then one token per byte, as byte-level tokenizers do for rare characters."""

    is_fast = True

    def __call__(self, text, return_offsets_mapping=False, verbose=True):
        owners = [i for i, char in enumerate(text) for _ in char.encode()]
        ids = [256, *text.encode()]
        return {"input_ids": ids, "offset_mapping": [(0, 0), *((i, i + 1) for i in owners)]}

    def decode(self, ids):
        return "<s>" if ids == [256] else bytes(ids).decode(errors="replace")


@pytest.fixture
def by_bytes(tiny_model):
    return dataclasses.replace(tiny_model, tokenizer=BytesTokenizer())


def test_token_texts_have_no_partial_characters(by_bytes):
    shown = token_texts("a é日", by_bytes)
    assert shown == ("<s>", "a", " ", "é", PART, "日", PART, PART)


def test_token_texts_dropped_spaces_go_with_next_word(tiny_model):
    text = "the cat  sat. on"
    shown = token_texts(text, tiny_model)
    assert shown == ("the", " cat", "  sat", ".", " on")
    assert len(shown) == read_ids(text, tiny_model).shape[1]


@pytest.mark.parametrize("trims", [True, False])
@pytest.mark.parametrize("text", ["a b", "a  b", " a", "a ", "a \n b", "é  日"])
def test_token_texts_of_trimmed_spaces_are_not_doubled(text, trims, tiny_model):
    """A token of spaces only has empty offsets if the tokenizer trims them."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    by_byte = tokenizers.pre_tokenizers.ByteLevel
    vocabulary = {character: i for i, character in enumerate(sorted(by_byte.alphabet()))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = by_byte(add_prefix_space=False, trim_offsets=trims)
    tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=trims)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    shown = token_texts(text, dataclasses.replace(tiny_model, tokenizer=fast))
    assert "".join(part for part in shown if part != PART) == text


def test_token_texts_slow_tokenizer_decodes_each_token(tiny_model):
    class Slow:
        is_fast = False
        decode = staticmethod(tiny_model.tokenizer.decode)

        def __call__(self, text, verbose):
            return tiny_model.tokenizer(text)

    loaded = dataclasses.replace(tiny_model, tokenizer=Slow())
    assert token_texts("the cat.", loaded) == ("the", "cat", ".")


def test_read_ids_limits_are_named(tiny_model):
    assert read_ids("the cat", tiny_model).tolist() == [[1, 2]]
    with pytest.raises(ShapeError, match="at most 64 tokens, the context of tiny; got 65; shorten"):
        read_ids("the " * 65, tiny_model)
    with pytest.raises(ShapeError, match="at most 3 tokens; got 4"):
        read_ids("the " * 4, tiny_model, most=3)
    with pytest.raises(ShapeError, match="at most 64 tokens, the context"):
        read_ids("the " * 65, tiny_model, most=100)
    with pytest.raises(ArgumentError, match="TEXT must not be empty"):
        read_ids(" \n", tiny_model)
    with pytest.raises(ArgumentError, match=r"TEXT must be whole characters .*got '\\udcff' at 4"):
        read_ids("the \udcff", tiny_model)


def test_most_likely_is_in_descending_order(tiny_model):
    logits = torch.full((1, 2, 18), -30.0)
    logits[0, -1, [2, 3]] = torch.tensor([0.9, 0.1]).log()
    first, second = most_likely(logits, tiny_model.tokenizer, 2)
    assert (first.text, second.text) == ("cat", "sat")
    assert (first.probability, second.probability) == pytest.approx((0.9, 0.1))
