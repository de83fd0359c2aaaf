"""`flash_attn_func` and its packed forms against flash-attn's documented semantics."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyhead.drop_in.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
)
from polyhead.errors import ArgumentError, DeviceError, DtypeError, ShapeError

B, T, S, H, G, D, E = 2, 5, 7, 6, 2, 8, 3


@pytest.fixture
def qkv(random):
    return random(B, T, H, D), random(B, S, G, D), random(B, S, G, E)


def drawing(T, S, **options):
    """Keys that each query attends to, as flash-attn draws them: 1 = keep, 0 = masked out."""
    identity = torch.eye(S)[None, :, None]
    q = torch.zeros(1, T, 1, S)
    weights = flash_attn_func(q, identity, identity, **options)[0, :, 0]
    return ["".join(str(int(w > 0)) for w in row) for row in weights]


DRAWINGS = {
    "causal, 2 x 5": (2, 5, {"causal": True}, ["11110", "11111"]),
    "causal, 5 x 2": (5, 2, {"causal": True}, ["00", "00", "00", "10", "11"]),
    "window": (3, 5, {"window_size": (1, 1)}, ["01110", "00111", "00011"]),
    "left alone": (3, 5, {"window_size": (1, -1)}, ["01111", "00111", "00011"]),
    "right alone": (3, 5, {"window_size": (-1, 0)}, ["11100", "11110", "11111"]),
    "causal window": (3, 5, {"window_size": (1, 1), "causal": True}, ["01100", "00110", "00011"]),
    "window, 5 x 2": (5, 2, {"window_size": (0, 1)}, ["00", "00", "10", "11", "01"]),
}


@pytest.mark.parametrize("case", DRAWINGS)
def test_mask_of_drawing_is_theirs(case):
    T, S, options, expected = DRAWINGS[case]
    assert drawing(T, S, **options) == expected


OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (2, 1)},
    "causal window": {"causal": True, "window_size": (1, -1)},
    "softcap": {"softcap": 1.5, "causal": True},
    "scale": {"softmax_scale": 0.7},
    "slopes": {"alibi_slopes": torch.rand(H, generator=torch.Generator().manual_seed(1))},
    "slopes per row": {
        "alibi_slopes": torch.rand(B, H, generator=torch.Generator().manual_seed(2)),
        "window_size": (3, 1),
    },
}


def exact(batch, q, k, v, alibi_slopes=None, softmax_scale=None, **options):
    return batch(q, k, v, slopes=alibi_slopes, scale=softmax_scale, **options)


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(T, S), (S, T), (1, S)])
def test_output_lse_gradients_are_exact(case, dtype, sizes, random, batch, close):
    q, k, v = random(B, sizes[0], H, D), random(B, sizes[1], G, D), random(B, sizes[1], G, E)
    inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    output, lse, _ = flash_attn_func(*inputs, return_attn_probs=True, **OPTIONS[case])
    expected, expected_lse = exact(batch, *inputs, **OPTIONS[case])
    close(output, expected)
    close(lse, expected_lse)
    assert output.is_contiguous()
    direction = random(*output.shape, dtype=dtype)
    ours = torch.autograd.grad(output, inputs, direction)
    theirs = torch.autograd.grad(expected, inputs, direction.double())
    for gradient, expected_gradient in zip(ours, theirs, strict=True):
        close(gradient, expected_gradient, 5)


@pytest.mark.parametrize("D", [24, 80, 96, 257])
@pytest.mark.parametrize("T", [1, 17, 257])
@pytest.mark.parametrize("group", [1, 3, 7])
def test_odd_sizes_are_exact(D, T, group, random, batch, close):
    q, k, v = random(1, T, group, D), random(1, 61, 1, D), random(1, 61, 1, D)
    output = flash_attn_func(q, k, v, causal=True, window_size=(40, 0))
    close(output, batch(q, k, v, causal=True, window_size=(40, 0))[0])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shapes_and_options_are_exact(data, random, batch, close):
    size = st.integers(0, 13)
    rows, T, S, G = (data.draw(s) for s in (st.integers(1, 3), size, size, st.integers(1, 3)))
    H, D = G * data.draw(st.integers(1, 3)), data.draw(st.integers(1, 19))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    side = st.integers(-1, 9)
    options = {
        "causal": data.draw(st.booleans()),
        "window_size": (data.draw(side), data.draw(side)),
        "softcap": data.draw(st.sampled_from([0.0, 0.0, 2.5])),
    }
    slopes = data.draw(st.sampled_from([None, random(H).abs(), random(rows, H).abs()]))
    q, k, v = (random(rows, n, h, D, dtype=dtype) for n, h in ((T, H), (S, G), (S, G)))
    output, lse, _ = flash_attn_func(
        q, k, v, alibi_slopes=slopes, return_attn_probs=True, **options
    )
    expected, expected_lse = batch(q, k, v, slopes=slopes, **options)
    close(output, expected)
    close(lse, expected_lse)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_output_is_as_good_as_eager(
    dtype, qkv, batch, naive_attention, assert_as_good_as_eager
):
    q, k, v = (x.to(dtype) for x in qkv)
    output = flash_attn_func(q, k, v)
    eager = naive_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    assert_as_good_as_eager(output, eager, batch(q, k, v)[0])


def test_row_without_keys_is_zero_with_lse_inf(qkv):
    q, k, v = (x.requires_grad_() for x in qkv)
    output, lse, _ = flash_attn_func(q, k[:, :2], v[:, :2], causal=True, return_attn_probs=True)
    assert torch.equal(output[:, :3], torch.zeros(B, 3, H, E))
    assert torch.equal(lse[..., :3], torch.full((B, H, 3), torch.inf))
    assert bool(lse[..., 3:].isfinite().all())
    output.sum().backward()
    assert torch.equal(q.grad[:, :3], torch.zeros(B, 3, H, D))
    assert bool(k.grad.isfinite().all())


def test_call_of_no_keys_is_zero_with_lse_inf(random):
    output, lse, _ = flash_attn_func(
        random(B, T, H, D), random(B, 0, G, D), random(B, 0, G, E), return_attn_probs=True
    )
    assert torch.equal(output, torch.zeros(B, T, H, E))
    assert torch.equal(lse, torch.full((B, H, T), torch.inf))


def test_empty_batch_gives_empty_output(random):
    slopes = random(0, H)
    q, k = random(0, T, H, D), random(0, S, G, D)
    assert flash_attn_func(q, k, k, alibi_slopes=slopes).shape == (0, T, H, D)


def test_packed_forms_equal_unpacked_with_gradients(random):
    qkv = random(B, S, 3, H, D).requires_grad_()
    options = {"causal": True, "window_size": (3, 0), "softcap": 2.0}
    whole = flash_attn_qkvpacked_func(qkv, **options)
    (packed,) = torch.autograd.grad(whole.square().sum(), qkv)
    half = flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], **options)
    (kv_packed,) = torch.autograd.grad(half.square().sum(), qkv)
    plain = flash_attn_func(*qkv.unbind(2), **options)
    (unpacked,) = torch.autograd.grad(plain.square().sum(), qkv)
    assert torch.equal(whole, plain)
    assert torch.equal(half, plain)
    torch.testing.assert_close(packed, unpacked)
    torch.testing.assert_close(kv_packed, unpacked)


@pytest.mark.parametrize("sizes", [(T, S), (64, 64)])
def test_dropout_is_what_s_dmask_says(sizes, random):
    """Sizes of a call that the reference runs, and of one that the kernels run."""
    T, S = sizes
    q, k, v = random(B, T, H, D), random(B, S, G, D), random(B, S, G, E)
    torch.manual_seed(3)
    output, lse, dropped = flash_attn_func(
        q, k, v, dropout_p=0.4, causal=True, return_attn_probs=True
    )
    assert dropped.shape == (B, H, T, S)
    kept = dropped.clamp(min=0) / 0.6
    value = v.repeat_interleave(H // G, dim=2)
    torch.testing.assert_close(output, torch.einsum("bhts,bshe->bthe", kept, value))
    torch.testing.assert_close(dropped.abs().sum(dim=-1), torch.ones(B, H, T))
    share = (dropped < 0).sum() / (dropped != 0).sum()
    assert 0.2 < share < 0.6
    assert bool(lse.isfinite().all())


@pytest.mark.parametrize("sizes", [(T, S), (64, 64)])
def test_gradients_with_dropout_are_of_its_pattern(sizes, random):
    T, S = sizes
    q, k, v = (
        x.requires_grad_() for x in (random(B, T, H, D), random(B, S, G, D), random(B, S, G, E))
    )
    torch.manual_seed(3)
    output, _, dropped = flash_attn_func(q, k, v, dropout_p=0.4, return_attn_probs=True)
    key, value = (x.repeat_interleave(H // G, dim=2) for x in (k, v))
    weights = torch.softmax(torch.einsum("bthd,bshd->bhts", q, key) * D**-0.5, dim=-1)
    expected = torch.einsum("bhts,bshe->bthe", weights * (dropped > 0) / 0.6, value)
    direction = random(*output.shape)
    ours = torch.autograd.grad(output, (q, k, v), direction)
    theirs = torch.autograd.grad(expected, (q, k, v), direction)
    for gradient, expected_gradient in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-4)


def test_lse_has_its_gradient(qkv, batch, close):
    q, k, v = (x.requires_grad_() for x in qkv)
    _, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    _, expected = batch(q, k, v, causal=True)
    for ours, theirs in zip(
        torch.autograd.grad(lse.square().sum(), (q, k)),
        torch.autograd.grad(expected.square().sum(), (q, k)),
        strict=True,
    ):
        close(ours, theirs, 10)


def test_s_dmask_request_changes_no_output(qkv):
    outputs = []
    for asked in (False, True):
        torch.manual_seed(5)
        output = flash_attn_func(*qkv, dropout_p=0.3, return_attn_probs=asked)
        outputs.append(output[0] if asked else output)
        outputs.append(torch.rand(3))
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])


def test_s_dmask_without_dropout_is_empty(qkv):
    _, _, dropped = flash_attn_func(*qkv, return_attn_probs=True)
    assert dropped.shape == (0,)


def test_slopes_that_require_grad_get_none(qkv):
    slopes = torch.rand(H, requires_grad=True)
    q = qkv[0].requires_grad_()
    flash_attn_func(q, *qkv[1:], alibi_slopes=slopes).sum().backward()
    assert slopes.grad is None
    assert q.grad is not None


def test_output_is_contiguous_as_callers_view_it(qkv):
    output = flash_attn_func(*qkv, causal=True)
    assert output.view(B, T, H * E).shape == (B, T, H * E)


def test_deterministic_has_no_effect(qkv):
    assert torch.equal(flash_attn_func(*qkv, deterministic=True), flash_attn_func(*qkv))


def test_nan_of_another_row_does_not_leak(qkv, batch, close):
    q, k, v = (x.clone() for x in qkv)
    k[1], v[1] = torch.nan, torch.nan
    output = flash_attn_func(q, k, v, causal=True, alibi_slopes=torch.rand(B, H))
    assert bool(output[0].isfinite().all())
    assert bool(output[1].isnan().all())


def test_large_call_holds_no_t_x_s_tensor(random, tensor_sizes, kernels):
    q = random(1, 2048, 2, 8)
    slopes = torch.tensor([[0.1, 0.2]])
    with tensor_sizes:
        flash_attn_func(q, q, q, causal=True, window_size=(100, 0), alibi_slopes=slopes)
    assert tensor_sizes.largest <= q.numel()


REFUSED = {
    "not a tensor": ({"k": [1.0]}, DtypeError, "k must be a tensor; got list"),
    "integers": (
        {"q": torch.ones(B, T, H, D).int()},
        DtypeError,
        "q must be floating point; got torch.int32",
    ),
    "dtypes": (
        {"k": torch.ones(B, S, G, D, dtype=torch.bfloat16)},
        DtypeError,
        "k must have q's dtype, torch.float32; got torch.bfloat16; cast one",
    ),
    "devices": (
        {"v": torch.ones(B, S, G, E, device="meta")},
        DeviceError,
        "v must be on q's device, cpu; got meta",
    ),
    "query dimensions": (
        {"q": torch.ones(T, H, D)},
        ShapeError,
        "q must be (batch_size, seqlen, nheads, headdim), with at least 1 head",
    ),
    "rows": (
        {"k": torch.ones(3, S, G, D)},
        ShapeError,
        "k must be (batch_size, seqlen_k, nheads_k, headdim) = (2, any, any, 8); got (3, 7, 2, 8)",
    ),
    "head size": (
        {"k": torch.ones(B, S, G, D + 1)},
        ShapeError,
        "k must be (batch_size, seqlen_k, nheads_k, headdim) = (2, any, any, 8); got (2, 7, 2, 9)",
    ),
    "heads": (
        {"k": torch.ones(B, S, 4, D)},
        ShapeError,
        "k must have a number of heads that divides q's 6; got 4",
    ),
    "values": (
        {"v": torch.ones(B, S + 1, G, E)},
        ShapeError,
        "v must be (batch_size, seqlen_k, nheads_k, headdim) with k's (2, 7, 2); got (2, 8, 2, 3)",
    ),
    "dropout": ({"dropout_p": 1.0}, ArgumentError, "dropout_p must be in [0, 1); got 1.0"),
    "dropout's type": ({"dropout_p": "no"}, DtypeError, "dropout_p must be a number; got 'no'"),
    "scale": (
        {"softmax_scale": float("inf")},
        ArgumentError,
        "softmax_scale must be finite; got inf; leave it out for 1 / sqrt(headdim)",
    ),
    "softcap": (
        {"softcap": -1.0},
        ArgumentError,
        "softcap must be at least 0 and finite; got -1.0; pass 0.0 for no cap",
    ),
    "window's number": (
        {"window_size": (1, 2, 3)},
        ArgumentError,
        "window_size must be (left, right), integers of at least -1; got (1, 2, 3)",
    ),
    "window's side": (
        {"window_size": (-2, 0)},
        ArgumentError,
        "window_size must be (left, right), integers of at least -1; got (-2, 0)",
    ),
    "window's type": ({"window_size": 4}, DtypeError, "window_size must be (left, right)"),
    "slopes": (
        {"alibi_slopes": torch.ones(G)},
        ShapeError,
        "alibi_slopes must be (nheads,) = (6,) or (batch_size, nheads) = (2, 6); got (2,)",
    ),
    "slopes' dtype": (
        {"alibi_slopes": torch.ones(H).int()},
        DtypeError,
        "alibi_slopes must be floating point; got torch.int32",
    ),
    "slopes' device": (
        {"alibi_slopes": torch.ones(H, device="meta")},
        DeviceError,
        "alibi_slopes must be on q's device, cpu; got meta",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_argument_raises_with_remedy(case, qkv):
    changed, error, message = REFUSED[case]
    arguments = dict(zip("qkv", qkv, strict=True)) | changed
    with pytest.raises(error) as raised:
        flash_attn_func(**arguments)
    assert str(raised.value).startswith(message)


def test_packed_argument_is_named_in_errors(random):
    with pytest.raises(ShapeError, match=r"qkv must be \(batch_size, seqlen, 3, nheads, headdim\)"):
        flash_attn_qkvpacked_func(random(B, S, 2, H, D))
    with pytest.raises(ShapeError, match=r"kv must be \(.*\); got \(2, 7, 3, 6, 8\); torch.stack"):
        flash_attn_kvpacked_func(random(B, T, H, D), random(B, S, 3, H, D))
    with pytest.raises(ShapeError, match=r"kv must have a number of heads that divides q's 6"):
        flash_attn_kvpacked_func(random(B, T, H, D), random(B, S, 2, 4, D))


def test_compiled_call_is_one_graph(qkv):
    options = {"causal": True, "window_size": (2, 0), "softcap": 2.0}
    compiled = torch.compile(flash_attn_func, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*qkv, **options), flash_attn_func(*qkv, **options))
