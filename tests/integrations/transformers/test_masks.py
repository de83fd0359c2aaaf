"""The mask function: equal to transformers' own, with structure if it is recognized."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import masking_utils as theirs

import polyhead as ph
from polyhead.integrations.transformers import mask_functions
from polyhead.integrations.transformers.masks import make_mask
from polyhead.integrations.transformers.structured_mask import StructuredMask

B = 3
RULES = {
    "causal": theirs.causal_mask_function,
    "window": theirs.sliding_window_causal_mask_function(4),
    "chunks": theirs.chunked_causal_mask_function(4, torch.tensor([0, 2, 5])),
    "window of one": theirs.sliding_window_causal_mask_function(1),
    "window of none": theirs.sliding_window_causal_mask_function(0),
}
SINCE_5 = hasattr(theirs, "bidirectional_mask_function")  # transformers
if SINCE_5:
    RULES |= {
        "bidirectional": theirs.bidirectional_mask_function,
        "two-sided window": theirs.sliding_window_bidirectional_mask_function(2),
        "two-sided window of none": theirs.sliding_window_bidirectional_mask_function(-1),
    }


def both(T, S, *, kv_offset=0, q_offset=None, **options):
    """Return our mask and the one that transformers materializes."""
    q_offset = kv_offset + S - T if q_offset is None else q_offset
    sizes = {"batch_size": B, "kv_length": S, "kv_offset": kv_offset}
    if SINCE_5:
        sizes |= {"q_length": T, "q_offset": q_offset}
    else:
        sizes |= {"cache_position": torch.arange(int(q_offset), int(q_offset) + T)}
    full = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return make_mask(**sizes, **options), theirs.sdpa_mask(**sizes, **(options | full))


def assert_same(ours, expected):
    if ours is None:
        assert expected.all()
    else:
        assert ours.shape == expected.shape
        assert torch.equal(ours, expected)


def padding(side, positions):
    real = torch.ones(B, positions, dtype=torch.bool)
    for row, n in enumerate((0, 2, 5)):
        if side in ("left", "both"):
            real[row, :n] = False
        if side in ("right", "both"):
            real[row, positions - n // 2 - 1 :] = False
        if side == "hole":
            real[row, n : n + 2] = False
    return None if side == "no mask" else real


@pytest.mark.parametrize("side", ["no mask", "none", "left", "right", "both", "hole"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("T", "S", "kv_offset", "q_offset"),
    [
        (9, 9, 0, None),  # a prompt
        (1, 11, 0, None),  # a step
        (3, 11, 0, None),  # a chunk
        (2, 5, 6, None),  # in a window that rolled on
        (3, 17, 0, 4),  # in a static cache, later keys not written yet
        (1, 17, 0, 4),
    ],
)
def test_make_mask_equals_transformers(T, S, kv_offset, q_offset, rule, side):
    known = S if q_offset is None else q_offset + T
    options = {"mask_function": RULES[rule], "attention_mask": padding(side, kv_offset + known)}
    assert_same(*both(T, S, kv_offset=kv_offset, q_offset=q_offset, **options))


@settings(deadline=None, max_examples=60)
@given(
    real=st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=B, max_size=B),
    rule=st.sampled_from(sorted(RULES)),
    T=st.integers(1, 6),
)
def test_make_mask_any_padding(real, rule, T):
    assert_same(*both(T, 6, mask_function=RULES[rule], attention_mask=torch.tensor(real)))


STRUCTURES = [
    ("causal", "none", "causal()"),
    ("causal", "left", "causal() & left_padding([0, 2, 5])"),
    ("causal", "right", "causal() & lengths([8, 7, 6])"),
    ("window", "left", "window(before=3) & causal() & left_padding([0, 2, 5])"),
    ("two-sided window", "none", "window(before=2, after=2)"),
    ("bidirectional", "right", "lengths([8, 7, 6])"),
    ("bidirectional", "none", "None"),
    ("chunks", "none", "documents(3x9) & causal()"),
    ("causal", "hole", "causal() & dense(3x1x1x9)"),
]


@pytest.mark.parametrize(
    ("rule", "side", "expected"), [case for case in STRUCTURES if case[0] in RULES]
)
def test_make_mask_keeps_structure(rule, side, expected):
    mask, _ = both(9, 9, mask_function=RULES[rule], attention_mask=padding(side, 9))
    assert isinstance(mask, StructuredMask)
    assert repr(mask.rule) == expected


@pytest.mark.parametrize("rule", sorted(RULES.keys() & {"causal", "bidirectional", "window"}))
def test_make_mask_step_that_sees_all_keys_is_none(rule):
    S = 4 if rule == "window" else 9
    mask, expected = both(1, S, mask_function=RULES[rule], attention_mask=padding("none", S))
    assert mask is None
    assert expected.all()


def packed(inner, position, reverse):
    """The rule of a model called with these positions, in this release of transformers, or with
    its two parts in the other order, as since 5.24."""
    sequence = theirs.find_packed_sequence_indices(position)
    rule = RULES[inner]
    if SINCE_5:
        rule = theirs.remap_positions_for_packed_sequence(rule, position)
    parts = (rule, theirs.packed_sequence_mask_function(sequence))
    return theirs.and_masks(*(parts[::-1] if reverse else parts))


def test_make_mask_one_sequence_per_row_is_not_packed():
    one = theirs.packed_sequence_mask_function(torch.zeros(B, 9, dtype=torch.int64))
    mask, expected = both(9, 9, mask_function=theirs.and_masks(theirs.causal_mask_function, one))
    assert repr(mask.rule) == "causal()"
    assert_same(mask, expected)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("inner", ["causal", "window"])
def test_make_mask_packed_sequences(inner, reverse):
    position = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7, 8], [0] * 9])
    mask, expected = both(9, 9, mask_function=packed(inner, position, reverse))
    assert "documents(3x9)" in repr(mask.rule)
    assert_same(mask, expected)


def every_second(batch, head, query, key):
    return (key % 2 == 0) | (key == query)


UNKNOWN = {
    "custom": every_second,
    "and": theirs.and_masks(theirs.causal_mask_function, every_second),
    "or": theirs.or_masks(theirs.causal_mask_function, every_second),
}
if SINCE_5:
    image_tokens = theirs.blockwise_overlay(torch.tensor([[-1, 0, 0, 0, -1, 1, 1]] * B))
    UNKNOWN["image tokens"] = theirs.or_masks(theirs.causal_mask_function, image_tokens)


@pytest.mark.parametrize("rule", UNKNOWN.values(), ids=UNKNOWN)
def test_make_mask_unknown_function_is_materialized(rule):
    mask, expected = both(7, 7, mask_function=rule, attention_mask=padding("left", 7))
    assert type(mask) is torch.Tensor
    assert_same(mask, expected)


def test_recognize_changed_function_is_not_matched(monkeypatch):
    def sliding_window_overlay(sliding_window):
        def inner_mask(batch_idx, head_idx, q_idx, kv_idx):
            return kv_idx >= q_idx - sliding_window  # one key more

        return inner_mask

    monkeypatch.setattr(theirs, "sliding_window_overlay", sliding_window_overlay)
    mask_functions._matchers.cache_clear()
    try:
        rule = theirs.and_masks(sliding_window_overlay(3), theirs.causal_mask_function)
        mask, expected = both(7, 7, mask_function=rule)
    finally:
        mask_functions._matchers.cache_clear()
    assert type(mask) is torch.Tensor
    assert_same(mask, expected)


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
@pytest.mark.parametrize("options", [{"use_cache": False}, {}], ids=str)
@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_make_mask_under_meta_or_fake_tensors(kind, options, name, build):
    if kind == "meta" and (options or not SINCE_5):
        pytest.skip("transformers itself looks at numbers")
    mask_functions._matchers.cache_clear()  # they may first be needed here
    model = build(name, "polyhead")
    if kind == "meta":
        model.to("meta")
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake if kind == "fake" else torch.device("meta"):
        tokens = torch.ones(2, 9, dtype=torch.int64)
        assert model(tokens, **options).logits.shape == (2, 9, 31)
    keys = mask_functions.KeySpan(9, 0, "cpu")
    assert mask_functions.recognize(theirs.causal_mask_function, keys) == (ph.mask.causal(),)


def test_make_mask_compiled_step_gets_a_plain_tensor():
    mask, expected = both(1, 17, q_offset=torch.tensor(4), allow_is_causal_skip=False)
    assert type(mask) is torch.Tensor
    assert torch.equal(mask, expected)


def test_make_mask_long_prompt_takes_no_memory(tensor_sizes):
    real = torch.ones(1, 3000, dtype=torch.bool)
    real[0, :7] = False
    with tensor_sizes:
        make_mask(batch_size=1, q_length=3000, kv_length=3000, attention_mask=real)
    assert tensor_sizes.operations
    assert tensor_sizes.largest <= 3000


@pytest.mark.parametrize("side", ["left", "no mask"])
def test_make_mask_attention_receives_masks(build, inputs, calls, side):
    options, _ = inputs("Mistral", side)
    build("Mistral", "polyhead").generate(**options, max_new_tokens=8, do_sample=False)
    assert all(
        not any(isinstance(rule, ph.mask.Dense) for rule in call["mask"].primitives())
        for call in calls
        if call["mask"] is not None
    )
