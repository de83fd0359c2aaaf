"""Cache arguments of many names and protocols."""

import math

import pytest
import torch
from torch import nn

import polyhead as ph
from polyhead.check import Outcome, check_module

LAWS = ["cache_token_by_token_agrees", "cache_in_chunks_agrees"]


class Cached(nn.Module):
    """Causal attention with rotary positions; a cache is (keys, values)."""

    def __init__(self, dim=24, num_heads=4):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))

    def split(self, x):
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def rope(self, heads, first):
        half = heads.shape[-1] // 2
        places = torch.arange(first, first + heads.shape[2], dtype=torch.float64)
        angles = places[:, None] * 100.0 ** -(torch.arange(half, dtype=torch.float64) / half)
        cos, sin = angles.cos().to(heads), angles.sin().to(heads)
        a, b = heads.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

    def attend(self, x, past, first):
        q, k, v = (self.split(layer(x)) for layer in (self.q, self.k, self.v))
        q, k = self.rope(q, first), self.rope(k, first)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        return self.weigh(q, k, v), (k, v)

    def weigh(self, q, k, v):
        T, S = q.shape[2], k.shape[2]
        hidden = torch.ones(T, S, dtype=torch.bool).triu(1 + S - T)
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(hidden, -math.inf)
        return self.o((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))


class PastKeyValues(Cached):
    def forward(self, x, past_key_values=None):
        first = 0 if past_key_values is None else past_key_values[0].shape[2]
        return self.attend(x, past_key_values, first)


class PastKeyValuesRestart(Cached):
    def forward(self, x, past_key_values=None):
        return self.attend(x, past_key_values, 0)


class LayerPast(Cached):
    def forward(self, x, layer_past=None, use_cache=False):
        first = 0 if layer_past is None else layer_past[0].shape[2]
        y, past = self.attend(x, layer_past, first)
        return y, past if use_cache else None


class InADict(Cached):
    def forward(self, x, kv_cache=None):
        past = None if not kv_cache else (kv_cache["k"], kv_cache["v"])
        y, past = self.attend(x, past, 0 if past is None else past[0].shape[2])
        if kv_cache is not None:
            kv_cache["k"], kv_cache["v"] = past
        return y


class InADictForgets(Cached):
    def forward(self, x, kv_cache=None):
        past = None if not kv_cache else (kv_cache["k"], kv_cache["v"])
        y, past = self.attend(x, past, 0 if past is None else past[0].shape[2])
        if kv_cache is not None:
            kv_cache["k"], kv_cache["v"] = (t[:, :, -3:] for t in past)
        return y


class InAList(Cached):
    def forward(self, x, cache=None):
        past = None if not cache else cache[-1]
        y, past = self.attend(x, past, 0 if past is None else past[0].shape[2])
        if cache is not None:
            cache.append(past)
        return y


class Updates(Cached):
    """As in transformers: the cache has update and get_seq_length."""

    late = 0

    def forward(self, x, past_key_value=None):
        first = 0 if past_key_value is None else past_key_value.get_seq_length() + self.late
        q, k, v = (self.split(layer(x)) for layer in (self.q, self.k, self.v))
        q, k = self.rope(q, first), self.rope(k, first)
        if past_key_value is not None:
            k, v = past_key_value.update(k, v, 0)
        return self.weigh(q, k, v)


class UpdatesLate(Updates):
    late = 0

    def forward(self, x, past_key_value=None):
        self.late = 0 if past_key_value is None else -int(past_key_value.get_seq_length() > 2)
        return super().forward(x, past_key_value)


class Placed(Cached):
    """The caller passes the number of cached tokens."""

    def forward(self, x, kv_cache=None, start_pos=0):
        return self.attend(x, kv_cache, start_pos)


class PlacedByRows(Cached):
    def forward(self, x, past=None, position_ids=None):
        first = 0 if position_ids is None else int(position_ids[0, 0])
        return self.attend(x, past, first)


class Keeps(Cached):
    """The module keeps its own cache, enabled by a switch."""

    kept = None

    def forward(self, x, use_kv_cache=False):
        if not use_kv_cache:
            return self.attend(x, None, 0)[0]
        y, self.kept = self.attend(x, self.kept, self.first())
        return y

    def first(self):
        return 0 if self.kept is None else self.kept[0].shape[2]


class KeepsRestart(Keeps):
    def first(self):
        return 0


def outcomes(kind, **options):
    torch.manual_seed(0)
    report = check_module(kind(), only=LAWS, **options)
    return [r.verdict.outcome for r in report.results], report


@pytest.mark.parametrize(
    ("kind", "fact"),
    [
        (PastKeyValues, "past_key_values, functional (found by trying)"),
        (LayerPast, "layer_past, functional (found by trying)"),
        (InADict, "kv_cache, in place: dict (found by trying)"),
        (InAList, "cache, in place: list (found by trying)"),
        (Updates, "past_key_value, in place: update() (found by trying)"),
        (Placed, "kv_cache, functional (found by trying)"),
        (PlacedByRows, "past, functional (found by trying)"),
        (Keeps, "use_kv_cache, stateful (its second call depends on its first)"),
    ],
)
def test_cache_protocol_of_any_name_is_found(kind, fact):
    found, report = outcomes(kind)
    assert found == [Outcome.HOLDS] * 2, report
    assert report.facts["cache"] == fact


@pytest.mark.parametrize("kind", [PastKeyValuesRestart, InADictForgets, UpdatesLate, KeepsRestart])
def test_cache_bug_under_another_name_is_found(kind):
    found, report = outcomes(kind)
    assert Outcome.BROKEN in found, report


class NoCacheAtAll(Cached):
    def forward(self, x, memory_cache=None):
        return self.attend(x, None, 0)[0]


def test_cache_named_argument_without_cache_is_not_judged():
    found, report = outcomes(NoCacheAtAll)
    assert found == [Outcome.NOT_APPLICABLE] * 2, report


class Called(Cached):
    """Module with a signature of its own; the mask is required."""

    def run(self, x, past, shown):
        first = 0 if past is None else past[0].shape[2]
        q, k, v = (self.split(layer(x)) for layer in (self.q, self.k, self.v))
        q, k = self.rope(q, first), self.rope(k, first)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=shown)
        return self.o(y.transpose(1, 2).flatten(2)), (k, v)


MASKS = [
    "no_future_leak",
    "hidden_tokens_have_no_influence",
    "padding_on_the_right_changes_nothing",
]


def given(module, x, mask=None, cache=None):
    return module.run(x, cache, mask)


def without_its_mask(module, x, mask=None, cache=None):
    return module.run(x, cache, None)


def without_its_oldest_token(module, x, mask=None, cache=None):
    kept = None if cache is None else [t[:, :, 1:] for t in cache]
    return module.run(x, kept, mask if kept is None else mask[..., 1:])


def test_call_with_mask_and_cache_passes():
    report = check_module(Called(), call=given, causal=True, only=MASKS + LAWS)
    assert [r.verdict.outcome for r in report.results] == [Outcome.HOLDS] * 5, report


def test_call_with_mask_and_cache_bugs_are_found():
    report = check_module(Called(), call=without_its_mask, causal=True, only=MASKS + LAWS)
    assert "hidden_tokens_have_no_influence" in [r.law for r in report.failures]
    report = check_module(Called(), call=without_its_oldest_token, causal=True, only=LAWS)
    assert "with a cache, token 1 gave a different output" in report.failures[0].verdict.message


def test_call_with_another_required_argument_is_refused():
    with pytest.raises(ph.errors.ArgumentError, match="a function that also needs table"):
        check_module(Called(), call=lambda m, x, table: m.run(x, None, None))
