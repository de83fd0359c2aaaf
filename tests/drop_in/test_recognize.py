"""Dense masks recognized: exactly, and never by an old reading."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polyhead.drop_in import recognize as module
from polyhead.drop_in.recognize import EVERYTHING, recognize

LOWEST = torch.finfo(torch.float32).min


def _recognize(attn_mask, B=2, H=3, T=6, S=6):
    return recognize(
        attn_mask.reshape((1,) * (4 - attn_mask.ndim) + attn_mask.shape), B, H, T, S, 8
    )


def _additive(allowed, dtype=torch.float32, forbidden=-torch.inf):
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, forbidden)


@pytest.fixture
def causal():
    return torch.ones(6, 6, dtype=torch.bool).tril()


@pytest.fixture
def trusting(any_size, monkeypatch):
    """Masks are read once for each version, as masks that are large for their call."""
    monkeypatch.setattr(module, "_AGAIN_SHARE", 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_recognize_additive_mask_of_infinity_is_the_rule(any_size, causal, dtype):
    assert repr(_recognize(_additive(causal, dtype))) == "causal()"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recognize_the_lowest_floats_forbid(any_size, causal, dtype):
    lowest = torch.finfo(dtype).min
    assert repr(_recognize(_additive(causal, dtype, lowest))) == "causal()"


def test_recognize_a_row_of_the_lowest_floats_is_no_rule(any_size, causal):
    """It is the mean of all values, and no row of zeros."""
    causal[2] = False
    assert _recognize(_additive(causal, forbidden=LOWEST)) is None
    both = _additive(causal)
    both[2] = LOWEST
    assert _recognize(both) is None


@pytest.mark.parametrize("forbidden", [-1e4, -1e9, -100.0, torch.inf, torch.nan, 1.0])
def test_recognize_other_numbers_are_no_rule(any_size, causal, forbidden):
    assert _recognize(_additive(causal, forbidden=forbidden)) is None


def test_recognize_the_lowest_float16_is_no_rule(any_size, causal):
    """Scores of float16 queries and keys reach as far."""
    assert _recognize(_additive(causal, torch.float16, -65504.0)) is None


def test_recognize_a_mask_that_requires_grad_is_none(any_size, causal):
    assert _recognize(_additive(causal).requires_grad_()) is None


def test_recognize_a_mask_of_all_keys_is_everything(any_size):
    assert _recognize(torch.zeros(6, 6)) is EVERYTHING


def test_recognize_heads_that_differ_is_none(any_size, causal):
    heads = torch.stack([causal, causal, causal | True])[None]
    assert _recognize(heads) is None
    assert repr(_recognize(causal.expand(2, 3, 6, 6))) == "causal()"


def test_recognize_expanded_padding_reads_one_row(any_size):
    padding = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]]).bool()
    assert repr(_recognize(padding[:, None, None])) == "lengths([2, 4])"
    expanded = padding[:, None, None].expand(2, 1, 6, 6)
    assert repr(_recognize(expanded)) == "lengths([2, 4])"


def test_recognize_keys_that_are_not_contiguous_is_none(any_size, causal):
    assert _recognize(causal.T) is None
    assert _recognize(torch.ones(6, 1, dtype=torch.bool).expand(6, 6)) is None


WRITES = {
    "fill_": lambda mask: mask.fill_(True),
    "index": lambda mask: mask.__setitem__((0, 5), True),
    "view": lambda mask: mask.view(-1)[5:6].fill_(True),
    "detach": lambda mask: mask.detach()[0].fill_(True),
    "copy_": lambda mask: mask.copy_(torch.ones_like(mask)),
    "numpy": lambda mask: mask.numpy().__setitem__((0, 5), True),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("often", ["trusting", "any_size"])
def test_recognize_a_mask_that_was_written_is_read_again(request, causal, write, often):
    request.getfixturevalue(often)
    assert repr(_recognize(causal)) == "causal()"
    WRITES[write](causal)
    assert repr(_recognize(causal)) != "causal()"


def test_recognize_a_cheap_mask_sees_writes_without_version(any_size, causal):
    assert repr(_recognize(causal)) == "causal()"
    causal.data[0, 5] = True
    assert _recognize(causal) is None


def test_recognize_numpy_memory_is_never_trusted(trusting, causal):
    assert _recognize(torch.from_numpy(causal.numpy().copy())) is None


def test_recognize_an_inference_tensor_is_never_trusted(trusting):
    with torch.inference_mode():
        mask = torch.ones(6, 6, dtype=torch.bool).tril()
        assert _recognize(mask) is None


def test_recognize_an_inference_tensor_is_read_each_time(any_size):
    with torch.inference_mode():
        mask = torch.ones(6, 6, dtype=torch.bool).tril()
        assert repr(_recognize(mask)) == "causal()"
        mask[0, 5] = True
        assert _recognize(mask) is None


def test_recognize_memory_that_was_freed_is_not_remembered(trusting, causal):
    """A new mask in the same place has another storage."""
    for _ in range(50):
        mask = causal.clone()
        assert repr(_recognize(mask)) == "causal()"
        del mask
        mask = causal.T.contiguous()
        assert repr(_recognize(mask)) == "window(before=0)"
        del mask


def test_recognize_keeps_few_masks_alive(any_size, causal):
    masks = [causal.clone() for _ in range(200)]
    for mask in masks:
        _recognize(mask)
    assert len(module._readings) <= module._MOST_MASKS
    storages = [reading.storage for reading in module._readings.values()]
    del masks, mask
    gc.collect()
    assert all(storage.expired() for storage in storages)


def test_recognize_trusts_a_version(trusting, causal, monkeypatch):
    assert repr(_recognize(causal)) == "causal()"
    monkeypatch.setattr(module, "_read", None)
    assert repr(_recognize(causal)) == "causal()"


def test_recognize_a_dear_mask_waits_for_its_second_call(kernels, causal, monkeypatch):
    """Reading it would take over a twentieth of one call."""
    monkeypatch.setattr(module, "_LEAST_PAIRS", 0)
    module._readings.clear()
    assert _recognize(causal) is None
    assert repr(_recognize(causal)) == "causal()"


@pytest.mark.parametrize("S", [1, 7, 8, 63, 64, 65, 200])
def test_recognize_reads_rows_of_every_size(any_size, S):
    """Rows longer than a step of the kernel, and such as divide nothing."""
    for begin in {0, 1, S // 2, S - 1, S}:
        for end in {begin, S, min(S, begin + 1), min(S, begin + 70)}:
            allowed = torch.zeros(1, S, dtype=torch.bool)
            allowed[0, begin:end] = True
            for mask in (allowed, _additive(allowed), _additive(allowed, torch.bfloat16)):
                ranges, kind = torch.ops.polyhead.dense_mask_rows(mask[None])
                want = [begin, end] if begin < end else [0, 0]
                assert (ranges[0, 0].tolist(), kind) == (want, 1)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_recognize_is_the_very_mask(any_size, data):
    """Random masks, most of which have no rule: bool or additive, of strides of any kind."""
    B, T, S = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 5)))
    cells = data.draw(st.lists(st.booleans(), min_size=B * T * S, max_size=B * T * S))
    allowed = torch.tensor(cells).view(B, 1, T, S)
    if data.draw(st.booleans()):
        allowed = allowed & torch.ones(T, S, dtype=torch.bool).tril()
    if data.draw(st.booleans()):
        allowed = torch.cat([allowed, allowed], dim=3)[..., :S]
    mask = allowed if data.draw(st.booleans()) else _additive(allowed)
    rule = recognize(mask, B, 2, T, S, 8)
    if rule is not None:
        full = torch.ones(T, S, dtype=torch.bool) if rule is EVERYTHING else rule.materialize(T, S)
        assert torch.equal(full.expand(B, 1, T, S), allowed)


def test_dense_mask_rows_with_gaps_is_unstructured(kernels):
    allowed = torch.tensor([[[True, False, True]]])
    assert torch.ops.polyhead.dense_mask_rows(allowed)[1] == 0
