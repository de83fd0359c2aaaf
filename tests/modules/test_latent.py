"""Latent attention: one function in two forms."""

import copy
import functools
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import polyhead as ph
import polyhead.modules.latent
from polyhead.errors import ArgumentError, DtypeError, ShapeError


def naive(sizes, mla, x, naive_attention, allowed):
    """The formula of the paper, in the order in which it is printed."""
    _, rank, nope, R, E = sizes
    positions = torch.arange(x.shape[1])
    c_q = x if mla.W_query_down is None else mla.q_norm(x @ mla.W_query_down.weight.T)
    c = mla.kv_norm(x @ mla.W_kv_down.weight[:rank].T)
    k_rope = mla.rope((x @ mla.W_kv_down.weight[rank:].T)[:, None], positions)
    queries, keys, values = [], [], []
    for h in range(mla.num_heads):
        W_query = mla.W_query.weight[h * (nope + R) : (h + 1) * (nope + R)]
        q_rope = mla.rope((c_q @ W_query[nope:].T)[:, None], positions)
        queries.append(torch.cat([(c_q @ W_query[:nope].T)[:, None], q_rope], dim=-1))
        W_key, W_value = mla.W_key.weight[h * nope :][:nope], mla.W_value.weight[h * E :][:E]
        keys.append(torch.cat([(c @ W_key.T)[:, None], k_rope], dim=-1))
        values.append((c @ W_value.T)[:, None])
    q, k, v = (torch.cat(heads, dim=1) for heads in (queries, keys, values))
    heads = naive_attention(q, k, v, allowed=allowed, scale=(nope + R) ** -0.5)
    return mla.out_proj(torch.cat(heads.unbind(1), dim=-1))


@pytest.mark.parametrize("absorb", [None, True, False])
@pytest.mark.parametrize("query_rank", [None, 13])
def test_the_formula(latent, latent_mask, query_rank, absorb, naive_attention):
    mla, x = latent.build_double(query_rank=query_rank, mask=latent_mask)
    allowed = None if latent_mask is None else latent_mask.materialize(9, 9)
    expected = naive(latent.sizes, mla, x, naive_attention, allowed)
    torch.testing.assert_close(mla(x, absorb=absorb), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("query_rank", [None, 13])
def test_absorbed_is_expanded_with_its_gradients_and_aux(latent, all_aux, latent_mask, query_rank):
    mla, x = latent.build_double(query_rank=query_rank, mask=latent_mask, qkv_bias=True)
    inputs = [x.requires_grad_(), *mla.parameters()]
    results = []
    for absorb in (True, False):
        y, aux = mla(x, return_aux=all_aux, absorb=absorb)
        gradients = torch.autograd.grad(y.square().sum(), inputs)
        results.append([y, aux.weights, aux.lse, *aux.stats.tensors.values(), *gradients])
    for absorbed, expanded in zip(*results, strict=True):
        torch.testing.assert_close(absorbed, expanded, rtol=0, atol=1e-12)


@pytest.mark.parametrize("absorb", [True, False])
def test_the_absorbed_form_shares_one_key_head_and_copies_none(latent, absorb, monkeypatch):
    calls = []

    def spy(query, key, value, **options):
        calls.append((query, key, value, options))
        return ph.attention(query, key, value, **options)

    monkeypatch.setattr(polyhead.modules.latent, "attention", spy)
    mla = latent.build()
    x = torch.randn(2, 9, 19)
    mla(x, absorb=absorb)
    query, key, value, options = calls.pop()
    H, rank, nope, R, E = latent.sizes
    assert options["scale"] == pytest.approx((nope + R) ** -0.5, rel=1e-15)
    if absorb:
        assert query.shape == (2, H, 9, rank + R)
        assert key.shape == (2, 1, 9, rank + R)
        assert value.shape == (2, 1, 9, rank)
        assert value.data_ptr() == key.data_ptr()
        assert value.stride() == key.stride()
    else:
        assert query.shape == key.shape == (2, H, 9, nope + R)
        assert value.shape == (2, H, 9, E)
    with torch.no_grad():
        cache = mla.make_cache(2, preallocate=True)
        mla(x[:, :1], cache=cache, absorb=absorb)
    held = calls.pop()[1].untyped_storage().data_ptr() == cache.read()[0].data_ptr()
    assert held == absorb


def flops(mla, x, cache, absorb):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        mla(x, cache=cache, absorb=absorb)
    cache.rewind(x.shape[1])
    return counter.get_total_flops()


@pytest.mark.parametrize("sizes", [(128, 512, 128, 64, 128), (2, 7, 3, 2, 24)])
def test_the_form_is_chosen_by_counting_multiplications(latent, sizes):
    num_heads, kv_rank, nope, rope, value = sizes
    mla = latent.build(
        num_heads,
        context_length=4096,
        kv_rank=kv_rank,
        nope_head_dim=nope,
        rope_head_dim=rope,
        value_head_dim=value,
        device="meta",
        backend="reference",
    )
    chosen = {}
    for before in (0, 40, 3000):
        for T in (1, 17, 257, 1000):
            cache = mla.make_cache(1)
            with torch.no_grad():
                mla(torch.empty(1, before, 19, device="meta"), cache=cache)
            x = torch.empty(1, T, 19, device="meta")
            absorbed, expanded = (flops(mla, x, cache, absorb) for absorb in (True, False))
            assert flops(mla, x, cache, None) == min(absorbed, expanded)
            chosen[before, T] = absorbed < expanded
    assert chosen[3000, 1]  # decoding absorbs
    if sizes[0] == 128:  # DeepSeek-V3
        assert chosen[3000, 17]  # a draft to verify as well
        assert not any(chosen[0, T] for T in (1, 17, 257, 1000))  # prefill does not


def test_asking_for_aux_or_for_a_form_keeps_the_dropped_weights(latent, all_aux):
    mla, x = latent.build_double(dropout=0.4)
    outputs = []
    for options in ({}, {"return_aux": all_aux}, {"absorb": True}, {"absorb": False}):
        torch.manual_seed(0)
        y = mla(x, **options)
        outputs.append(y[0] if isinstance(y, tuple) else y)
    assert torch.equal(outputs[0], outputs[1])
    for output in outputs[2:]:
        torch.testing.assert_close(output, outputs[0], rtol=0, atol=1e-12)
    without = mla.eval()(x)
    assert not torch.allclose(without, outputs[0])
    assert torch.equal(without, mla(x))


@pytest.mark.parametrize("absorb", [True, False])
def test_positions_are_the_default_written_out(latent, absorb):
    mla, x = latent.build_double()
    run = functools.partial(mla, x, absorb=absorb)
    assert torch.equal(run(), run(positions=torch.arange(9)))
    torch.testing.assert_close(run(), run(positions=torch.arange(9) + 100), rtol=0, atol=1e-12)
    stretched = run(positions=torch.stack([torch.arange(9), torch.arange(9) * 5]))
    assert torch.equal(stretched[0], run()[0])
    assert not torch.allclose(stretched[1], run()[1])
    plain = latent.build(rope=None, dtype=torch.float64)
    plain.load_state_dict(mla.state_dict())
    assert not torch.allclose(plain(x), run())
    assert torch.equal(plain(x), plain(x, positions=torch.arange(9) * 5))


@pytest.mark.parametrize("options", [{}, {"query_rank": 13, "qkv_bias": True, "out_bias": False}])
def test_saved_copied_and_pickled_it_is_the_same(latent, options):
    mla, x = latent.build_double(**options)
    expected = mla(x)
    fresh = latent.build(dtype=torch.float64, **options)
    fresh.load_state_dict(mla.state_dict())
    on_meta = latent.build(dtype=torch.float64, device="meta", **options)
    assert all(parameter.is_meta for parameter in on_meta.parameters())
    assert on_meta(x.to("meta")).shape == (2, 9, 23)
    on_meta.to_empty(device="cpu").load_state_dict(mla.state_dict())
    file = io.BytesIO()
    torch.save(mla.state_dict(), file)
    file.seek(0)
    loaded = latent.build(dtype=torch.float64, **options)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for other in (fresh, on_meta, loaded, copy.deepcopy(mla), pickle.loads(pickle.dumps(mla))):
        assert torch.equal(other(x), expected)
        assert repr(other) == repr(mla)
    names = set(mla.state_dict())
    biased = {"W_kv_down.bias", "W_query_down.bias"} if options else {"out_proj.bias"}
    assert {name for name in names if name.endswith("bias")} == biased
    assert {"W_query_down.weight", "q_norm.weight"} <= names or not options
    H, rank, *_ = latent.sizes
    assert f"num_heads={H}, kv_rank={rank}, query_rank={options.get('query_rank')}" in repr(mla)


@pytest.mark.parametrize("absorb", [True, False])
def test_compiles_as_one_graph(latent, absorb):
    torch._dynamo.reset()
    mla = latent.build(query_rank=13)
    compiled = torch.compile(mla, fullgraph=True, backend="eager")
    x = torch.randn(2, 9, 19)
    torch.testing.assert_close(compiled(x, absorb=absorb), mla(x, absorb=absorb))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("absorb", [True, False])
def test_dtype_in_is_dtype_out(latent, dtype, absorb):
    mla = latent.build(query_rank=13, dtype=dtype)
    with torch.no_grad():
        cache = mla.make_cache(2)
        assert mla(torch.randn(2, 4, 19, dtype=dtype), cache=cache, absorb=absorb).dtype == dtype
    assert cache.dtype == dtype


class WideNorm(nn.Module):
    """Answers in float32 whatever it is given: its weights are float32."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return self.weight * nn.functional.rms_norm(x.float(), x.shape[-1:])


@pytest.mark.parametrize("absorb", [True, False])
def test_autocast_decides_the_dtype(latent, absorb):
    mla, x = latent.build(query_rank=13, norm=WideNorm), torch.randn(2, 9, 19)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mla(x, absorb=absorb)
        with torch.no_grad():
            cache = mla.make_cache(2, dtype=torch.bfloat16)
            cached = mla(x, cache=cache, absorb=absorb)
    assert y.dtype == cached.dtype == torch.bfloat16
    assert torch.equal(y, cached)
    torch.testing.assert_close(y.float(), mla(x, absorb=absorb), rtol=0, atol=0.05)


@pytest.mark.parametrize("shape", [(0, 3, 19), (2, 0, 19), (0, 0, 19)])
@pytest.mark.parametrize("absorb", [None, True, False])
def test_nothing_in_nothing_out(latent, shape, absorb):
    x = torch.zeros(shape, requires_grad=True)
    y = latent.build(query_rank=13)(x, absorb=absorb)
    assert y.shape == (*shape[:2], 23)
    y.sum().backward()
    assert x.grad.shape == shape


class Adapted(nn.Module):
    """A projection with something added to it, as LoRA does."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.weight = base_layer.weight

    def forward(self, x):
        return 2 * self.base_layer(x)


def test_adapters_are_never_passed_by(latent):
    mla, x = latent.build_double()
    twice = copy.deepcopy(mla)
    with torch.no_grad():
        twice.W_value.weight *= 2
    expected = twice(x)
    mla.W_value = Adapted(mla.W_value)
    with torch.no_grad():
        cache = mla.make_cache(2)
        parts = [mla(part, cache=cache) for part in x.split(1, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-12)
        with pytest.raises(
            ArgumentError, match=r"absorb needs plain .*got Linear, .*Adapted.*; leave"
        ):
            mla(x[:, :1], cache=cache, absorb=True)
    assert len(cache) == 9


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kv_rank": 0}, ShapeError, "kv_rank must be an integer of at least 1; got 0"),
        ({"query_rank": 0}, ShapeError, "query_rank must be .* at least 1; got 0"),
        ({"nope_head_dim": -1}, ShapeError, "nope_head_dim must be .*; got -1"),
        ({"rope_head_dim": 0}, ShapeError, "rope_head_dim must be .*; got 0"),
        ({"rope_head_dim": 3}, ShapeError, "rope_head_dim must be even with rope; got 3"),
        ({"value_head_dim": 2.5}, ShapeError, r"value_head_dim must be .*; got 2\.5"),
        ({"num_heads": 0}, ShapeError, "num_heads must be .*; got 0"),
        ({"context_length": 0}, ShapeError, "context_length must be .*; got 0"),
        ({"dropout": 1.0}, ArgumentError, r"dropout must be .* in \[0, 1\); got 1\.0"),
        ({"rope": 100.0}, DtypeError, r"rope must be a polyhead.Rope or None; got 100\.0"),
        ({"rope": ph.Rope(rotary_dim=6)}, ShapeError, "must turn at most .* 4 .*rotary_dim = 6"),
        ({"mask": torch.ones(3, 3, dtype=torch.bool)}, DtypeError, r"mask .*Tensor.*mask\.dense"),
        ({"norm": torch.nn.RMSNorm(6)}, DtypeError, "norm must make a norm from a size; got RMS"),
        ({"scale": "1"}, DtypeError, "scale must be a number; got '1'"),
    ],
)
def test_constructor_refuses(latent, change, error, message):
    with pytest.raises(error, match=message):
        latent.build(**change)
