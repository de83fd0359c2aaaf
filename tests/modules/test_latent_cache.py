"""Latent attention over its cache: one latent a token, whatever the form and the pieces."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounter

import polyhead as ph
import polyhead.modules.latent
from polyhead.errors import ArgumentError, DeviceError, DtypeError, ShapeError

# A mask for the first S of 16 tokens: a step knows no later ones. One is different by head.
WINDOW = ph.mask.causal() & ph.mask.window(before=3)
GROWING = {
    "causal": lambda S, by_head: ph.mask.causal(),
    "window": lambda S, by_head: WINDOW,
    "window and left padding": lambda S, by_head: WINDOW & ph.mask.left_padding([0, 5]),
    "documents": lambda S, by_head: (
        ph.mask.causal() & ph.mask.documents((torch.arange(16) // 6)[:S])
    ),
    "custom": lambda S, by_head: ph.mask.causal() & by_head,
}


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(GROWING)),
    cuts=st.sets(st.integers(1, 15)),
    absorb=st.lists(st.sampled_from([None, True, False]), min_size=16, max_size=16),
    query_rank=st.sampled_from([None, 13]),
    kind=st.sampled_from(["all", "window", "paged"]),
)
@example("window and left padding", set(range(1, 16)), [None] * 16, None, "window")
def test_cached_is_uncached_however_it_is_cut(latent, name, cuts, absorb, query_rank, kind):
    mla, _ = latent.build_double(query_rank=query_rank)
    x = torch.randn(2, 16, 19, dtype=torch.float64)
    expected = mla(x, mask=GROWING[name](16, latent.by_head), absorb=False)
    options = {"window": 3} if kind == "window" and "window" in name else {}
    cache = mla.make_cache(2, **options)
    if kind == "paged":
        _, rank, _, R, _ = latent.sizes
        cache = ph.PagedKVCache(
            2, 16, 1, rank + R, value_head_dim=0, dtype=torch.float64, block_size=3
        )
    bounds = [0, *sorted(cuts), 16]
    parts = []
    with torch.no_grad():
        for start, stop, form in zip(bounds, bounds[1:], absorb, strict=False):
            rule = GROWING[name](stop, latent.by_head)
            parts.append(mla(x[:, start:stop], mask=rule, cache=cache, absorb=form))
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cached_token_takes_the_promised_bytes(latent, dtype):
    sizes = set()
    _, rank, _, R, _ = latent.sizes
    for num_heads in (1, 3, 16):
        mla = latent.build(num_heads, dtype=dtype)
        cache = mla.make_cache(2, 257, preallocate=True)
        assert cache.nbytes == 2 * 257 * (rank + R) * dtype.itemsize
        sizes.add(cache.nbytes)
        eighth = mla.make_cache(2, 257, preallocate=True, storage_dtype=torch.int8)
        assert eighth.nbytes <= 2 * 257 * (rank + R + 8)  # a byte a number, and its scales
    assert len(sizes) == 1
    assert mla.make_cache(3).max_tokens == mla.context_length == 17


@pytest.mark.parametrize("absorb", [True, False])
def test_an_int8_cache_stays_within_its_bound(latent, all_aux, absorb):
    mla, x = latent.build_double(scale=1.5)
    H, _, nope, R, E = latent.sizes
    with torch.no_grad():
        plain, coded = mla.make_cache(2), mla.make_cache(2, storage_dtype=torch.int8)
        exact, aux = mla(x, cache=plain, return_aux=all_aux, absorb=absorb)
        y, coded_aux = mla(x, cache=coded, return_aux=all_aux, absorb=absorb)
        latent, _ = plain.read()
        # The bound of KVCache, for the absorbed form: its query, [c, k_rope] its key, c its value.
        a = latent.abs().amax()
        query = mla.W_query(x).unflatten(2, (H, nope + R)).transpose(1, 2)
        W_key, W_value = mla.W_key.weight.unflatten(0, (H, nope)), mla.W_value.weight
        q_nope = torch.stack([query[:, h, :, :nope] @ W_key[h] for h in range(H)], dim=1)
        q_rope = mla.rope(query[..., nope:], torch.arange(9))
        q_sum = q_nope.abs().sum(-1) + q_rope.abs().sum(-1)
        moved = mla.scale * q_sum * a / 254 * (1 + 1e-6)  # scales are held in float32
        context = a / 254 + 2 * torch.tanh(moved / 2) * a
        out = mla.out_proj.weight.unflatten(1, (H, E))
        merged = torch.einsum("ohe,hec->ohc", out, W_value.unflatten(0, (H, E)))
        bound = torch.einsum("oh,bht->bto", merged.abs().sum(-1), context)
    assert ((coded_aux.lse - aux.lse).abs() <= moved).all()
    assert ((y - exact).abs() <= bound).all()
    assert not torch.equal(y, exact)


@pytest.mark.slow
def test_steps_compile_whole_and_lengths_do_not_compile_again(latent):
    torch._dynamo.reset()
    mla = latent.build()
    counter = CompileCounter()
    compiled = torch.compile(mla, fullgraph=True, backend=counter)
    x, counts = torch.randn(2, 17, 19), []
    with torch.no_grad():
        cache = mla.make_cache(2, preallocate=True)
        parts = []
        for token in x.split(1, dim=1):
            parts.append(compiled(token, cache=cache))
            counts.append(counter.frame_count)
        torch.testing.assert_close(torch.cat(parts, dim=1), mla(x), rtol=0, atol=1e-5)
    # One for an empty cache and one for any length; the view of a full one has no gaps: another.
    assert counts[:-1] == [1, *[2] * 15]
    assert counts[-1] <= 3


class Wrapped(nn.Module):
    """A projection that has no weight of its own name, as some adapters are."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x):
        return self.base_layer(x)


def test_a_cache_fits_a_module_whose_projections_are_wrapped(latent):
    mla, x = latent.build_double()
    for name in ("W_query", "W_kv_down", "W_key", "W_value", "out_proj"):
        setattr(mla, name, Wrapped(getattr(mla, name)))
    cache = mla.make_cache(2)
    with torch.no_grad():
        mla(x, cache=cache)
    assert (cache.dtype, len(cache)) == (torch.float64, 9)


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (torch.ones(2, 18, 19), {}, ShapeError, "at most context_length = 17 tokens; got 18"),
        (torch.ones(2, 3, 4), {}, ShapeError, "x must have d_in = 19 features; got 4"),
        (torch.ones(3, 19), {}, ShapeError, r"x must have 3 dimensions .*got \(3, 19\)"),
        (torch.ones(2, 3, 19).double(), {}, DtypeError, "torch.float32; got torch.float64"),
        (torch.ones(2, 3, 19, device="meta"), {}, DeviceError, "module's device, cpu; got meta"),
        (torch.ones(2, 3, 19), {"absorb": "yes"}, DtypeError, "absorb must be True.*got 'yes'"),
        (torch.ones(2, 3, 19), {"absorb": 1}, DtypeError, "absorb must be True.*got 1"),
        (torch.ones(2, 3, 19), {"return_aux": True}, DtypeError, "return_aux must be .*got True"),
        (torch.ones(2, 3, 19), {"mask": torch.ones(3, 3)}, DtypeError, "mask must be .*got Tensor"),
        (torch.ones(2, 3, 19), {"positions": torch.arange(4)}, ShapeError, r"\(3,\) .*\(4,\)"),
        (torch.ones(2, 16, 19), {}, ShapeError, "context_length = 17 behind the 2 cached .*got 16"),
        (torch.ones(3, 3, 19), {}, ShapeError, r"\(2, 1, T, 15\); got \(3, 1, 3, 15\)"),
        (
            torch.ones(2, 3, 19),
            {"mask": ph.mask.lengths([1, 2, 3])},
            ShapeError,
            r"lengths.* 2.*3",
        ),
    ],
)
def test_call_refuses_and_the_cache_stays(latent, x, options, error, message):
    mla = latent.build()
    cached = "behind the 2" in message or "15" in message
    with torch.no_grad():
        cache = mla.make_cache(2)
        mla(torch.ones(2, 2, 19), cache=cache)
        before = cache.read()[0].clone()
        if not cached:
            with pytest.raises(error, match=message):
                mla(x, **options)
        if x.shape != (2, 18, 19):
            with pytest.raises(error, match=message):
                mla(x, cache=cache, **options)
    assert len(cache) == 2
    assert torch.equal(cache.read()[0], before)


def test_a_cache_of_another_module_or_window_is_refused(latent):
    mla, x = latent.build(), torch.ones(2, 3, 19)
    H, _, nope, R, E = latent.sizes
    heads = ph.KVCache(2, 17, H, nope + R, value_head_dim=E)
    with torch.no_grad():
        with pytest.raises(ShapeError, match=r"\(2, 3, T, 9\); got \(2, 1, 3, 15\)"):
            mla(x, cache=heads)
        with pytest.raises(ArgumentError, match=r"window = 4 needs a mask .*before=4"):
            mla(x, cache=mla.make_cache(2, window=4))
        with pytest.raises(DtypeError, match=r"cache must be .*got tuple"):
            mla(x, cache=())
    with pytest.raises(ArgumentError, match="must not require grad"):
        mla(x, cache=mla.make_cache(2))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("storage_dtype", [None, torch.int8], ids=str)
def test_the_absorbed_form_reads_a_cache_where_it_is(latent, storage_dtype, monkeypatch):
    mla, (_, rank, _, R, _) = latent.build(), latent.sizes
    x = torch.randn(2, 12, 19)
    paged = ph.PagedKVCache(
        2, 16, 1, rank + R, value_head_dim=0, block_size=3, storage_dtype=storage_dtype
    )
    numbers = mla.make_cache(2, storage_dtype=storage_dtype)
    with torch.no_grad():
        for cache in (paged, numbers):
            mla(x[:, :11], cache=cache)
        with ph.use_backend("reference"):  # which is given tensors
            expected = mla(x[:, 11:], cache=numbers, absorb=True)

        def refuse(call):
            raise AssertionError("a tensor was made of what a cache holds")

        monkeypatch.setattr(ph.call.AttentionCall, "materialized", refuse)
        y = mla(x[:, 11:], cache=paged, absorb=True)
    torch.testing.assert_close(y, expected)


def test_who_takes_tensors_makes_one_of_a_cache_for_keys_and_values(latent, monkeypatch):
    mla, (_, rank, _, R, _) = latent.build(), latent.sizes
    paged = ph.PagedKVCache(2, 16, 1, rank + R, value_head_dim=0, block_size=3)
    gather, made = paged._gather, []

    def counted(pools, table, tokens):
        made.append(tokens)
        return gather(pools, table, tokens)

    monkeypatch.setattr(paged, "_gather", counted)
    with torch.no_grad(), ph.use_backend("reference"):
        mla(torch.randn(2, 12, 19), cache=paged, absorb=True)
    assert made == [12]
