"""Latent attention: one function in two forms, held to DeepSeek's published layer."""

import copy
import functools
import io
import pickle

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

import polyhead as ph
import polyhead.modules.latent
from polyhead.errors import ArgumentError, DeviceError, DtypeError, ShapeError
from polyhead.modules.latent import MultiHeadLatentAttention

# Distinct sizes, so that a swapped axis cannot pass.
H, C, Q, N, R, E = 3, 11, 13, 5, 4, 7
ALL_AUX = ph.AuxRequest(weights=True, lse=True, stats=True)


def build(num_heads=H, context_length=17, dropout=0.0, **options):
    sizes = {"kv_rank": C, "nope_head_dim": N, "rope_head_dim": R, "value_head_dim": E}
    arguments = {**sizes, "rope": ph.Rope(interleaved=True), "out_bias": True, **options}
    mla = MultiHeadLatentAttention(19, 23, context_length, dropout, num_heads, **arguments)
    with torch.no_grad():
        for norm in (mla.kv_norm, mla.q_norm):
            if isinstance(norm, nn.RMSNorm) and not norm.weight.is_meta:
                norm.weight.uniform_(0.5, 1.5)  # ones would hide a norm that has lost its weight
    return mla


def build_double(**options):
    return build(dtype=torch.float64, **options), torch.randn(2, 9, 19, dtype=torch.float64)


def second_key_or_self(batch, head, query, key):
    return ((key + head) % 2 == 0) | (key == query)


MASKS = {
    "causal": ph.mask.causal(),
    "nobody forbids": None,
    "window": ph.mask.causal() & ph.mask.window(before=2),
    "both ways": ph.mask.window(before=1, after=3),
    "upper left": ph.mask.causal(align="start"),
    "lengths, of a row none": ph.mask.lengths([0, 6]),
    "left padding": ph.mask.causal() & ph.mask.left_padding([0, 3]),
    "prefix": ph.mask.causal() | ph.mask.prefix(4),
    "documents": ph.mask.causal() & ph.mask.documents([0, 0, 0, 1, 1, 2, 2, 2, 2]),
    "not": ph.mask.causal() & ~ph.mask.prefix(2),
    "dense": ph.mask.dense(torch.rand(2, H, 9, 9, generator=torch.manual_seed(0)) > 0.5),
    "custom": ph.mask.causal() & ph.mask.custom(second_key_or_self, heads=H),
}
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


def naive(mla, x, naive_attention, allowed):
    """The formula of the paper, in the order in which it is printed."""
    positions = torch.arange(x.shape[1])
    c_q = x if mla.W_query_down is None else mla.q_norm(x @ mla.W_query_down.weight.T)
    c = mla.kv_norm(x @ mla.W_kv_down.weight[:C].T)
    k_rope = mla.rope((x @ mla.W_kv_down.weight[C:].T)[:, None], positions)
    queries, keys, values = [], [], []
    for h in range(mla.num_heads):
        W_query = mla.W_query.weight[h * (N + R) : (h + 1) * (N + R)]
        q_rope = mla.rope((c_q @ W_query[N:].T)[:, None], positions)
        queries.append(torch.cat([(c_q @ W_query[:N].T)[:, None], q_rope], dim=-1))
        W_key, W_value = mla.W_key.weight[h * N :][:N], mla.W_value.weight[h * E :][:E]
        keys.append(torch.cat([(c @ W_key.T)[:, None], k_rope], dim=-1))
        values.append((c @ W_value.T)[:, None])
    q, k, v = (torch.cat(heads, dim=1) for heads in (queries, keys, values))
    heads = naive_attention(q, k, v, allowed=allowed, scale=(N + R) ** -0.5)
    return mla.out_proj(torch.cat(heads.unbind(1), dim=-1))


@pytest.mark.parametrize("absorb", [None, True, False])
@pytest.mark.parametrize("query_rank", [None, Q])
@every_mask
def test_the_formula(mask, query_rank, absorb, naive_attention):
    mla, x = build_double(query_rank=query_rank, mask=mask)
    allowed = None if mask is None else mask.materialize(9, 9)
    expected = naive(mla, x, naive_attention, allowed)
    torch.testing.assert_close(mla(x, absorb=absorb), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("query_rank", [None, Q])
@every_mask
def test_absorbed_is_expanded_with_its_gradients_and_aux(mask, query_rank):
    mla, x = build_double(query_rank=query_rank, mask=mask, qkv_bias=True)
    inputs = [x.requires_grad_(), *mla.parameters()]
    results = []
    for absorb in (True, False):
        y, aux = mla(x, return_aux=ALL_AUX, absorb=absorb)
        gradients = torch.autograd.grad(y.square().sum(), inputs)
        results.append([y, aux.weights, aux.lse, *vars(aux.stats).values(), *gradients])
    for absorbed, expanded in zip(*results, strict=True):
        torch.testing.assert_close(absorbed, expanded, rtol=0, atol=1e-12)


@pytest.mark.parametrize("absorb", [True, False])
def test_the_absorbed_form_shares_one_key_head_and_copies_none(absorb, monkeypatch):
    calls = []

    def spy(query, key, value, **options):
        calls.append((query, key, value, options))
        return ph.attention(query, key, value, **options)

    monkeypatch.setattr(polyhead.modules.latent, "attention", spy)
    mla = build()
    x = torch.randn(2, 9, 19)
    mla(x, absorb=absorb)
    query, key, value, options = calls.pop()
    assert options["scale"] == pytest.approx((N + R) ** -0.5, rel=1e-15)
    if absorb:
        assert query.shape == (2, H, 9, C + R)
        assert key.shape == (2, 1, 9, C + R)
        assert value.shape == (2, 1, 9, C)
        assert value.data_ptr() == key.data_ptr()
        assert value.stride() == key.stride()
    else:
        assert query.shape == key.shape == (2, H, 9, N + R)
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
def test_the_form_is_chosen_by_counting_multiplications(sizes):
    num_heads, kv_rank, nope, rope, value = sizes
    mla = build(
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


def deepseek(query_rank, *, interleave=True, bias=False, yarn=False):
    """Their layer, our Rope for it, and cos and sin by their own rotary embedding."""
    modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    from transformers import DeepseekV3Config

    parameters = {"rope_type": "default", "rope_theta": 100.0}
    scaling = None
    if yarn:
        scaling = ph.YarnScaling(4.0, 8, beta_fast=4.0, mscale=0.7, mscale_all_dim=1.3)
        parameters |= {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
        parameters |= {"beta_fast": 4.0, "beta_slow": 1.0, "mscale": 0.7, "mscale_all_dim": 1.3}
    config = DeepseekV3Config(
        hidden_size=19,
        num_attention_heads=H,
        num_key_value_heads=H,
        kv_lora_rank=C,
        q_lora_rank=query_rank,
        qk_nope_head_dim=N,
        qk_rope_head_dim=R,
        v_head_dim=E,
        max_position_embeddings=32,
        rope_parameters=parameters,
        rope_interleave=interleave,
        attention_bias=bias,
        attn_implementation="eager",
    )
    layer = modeling.DeepseekV3Attention(config, 0).requires_grad_(False)
    for norm in (layer.kv_a_layernorm, layer.q_a_layernorm):
        if norm is not None:
            norm.weight.uniform_(0.5, 1.5)
    rope = ph.Rope(100.0, interleaved=interleave, scaling=scaling)
    return layer, rope, modeling.DeepseekV3RotaryEmbedding(config)


def ours_of(layer, rope, dtype=torch.float32):
    """Their weights in our module: kv_b_proj has, head by head, keys and values together."""
    bias = layer.o_proj.bias is not None
    names = {"W_kv_down": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "out_proj": "o_proj"}
    if layer.q_lora_rank is None:
        names |= {"W_query": "q_proj"}
    else:
        names |= {"W_query_down": "q_a_proj", "q_norm": "q_a_layernorm", "W_query": "q_b_proj"}
    mla = MultiHeadLatentAttention(
        19,
        19,
        32,
        0.0,
        H,
        kv_rank=C,
        query_rank=layer.q_lora_rank,
        nope_head_dim=N,
        rope_head_dim=R,
        value_head_dim=E,
        rope=rope,
        qkv_bias=bias,
        out_bias=bias,
        scale=layer.scaling,
        dtype=dtype,
    )
    state = {
        f"{name}.{kind}": tensor
        for name, their_name in names.items()
        for kind, tensor in layer.get_submodule(their_name).state_dict().items()
    }
    keys, values = layer.kv_b_proj.weight.unflatten(0, (H, N + E)).split((N, E), dim=1)
    state |= {"W_key.weight": keys.flatten(0, 1), "W_value.weight": values.flatten(0, 1)}
    mla.load_state_dict(state)
    return mla.requires_grad_(False)


def in_double(layer):
    """Their layer in float64, without the float32 that its norm and eager softmax insist on."""
    layer = copy.deepcopy(layer).double()
    layer.config._attn_implementation = "sdpa"
    for name in ("kv_a_layernorm", "q_a_layernorm"):
        theirs = getattr(layer, name)
        if theirs is not None:
            norm = nn.RMSNorm(len(theirs.weight), theirs.variance_epsilon, dtype=torch.float64)
            norm.weight.data.copy_(theirs.weight)
            setattr(layer, name, norm)
    return layer


def angles_in_double(rope, T):
    """cos and sin as their layer takes them: each pair's angle twice."""
    exponents = torch.arange(0, R, 2, dtype=torch.float64) / R
    frequencies, factor = rope.theta**-exponents, 1.0
    if rope.scaling is not None:
        frequencies, factor = rope.scaling.frequencies(rope.theta, exponents, torch.arange(T))
    angles = (torch.arange(T).double()[:, None] * frequencies).repeat(1, 2)[None]
    return angles.cos() * factor, angles.sin() * factor


DEEPSEEKS = [
    {"query_rank": Q},
    {"query_rank": None},
    {"query_rank": Q, "bias": True, "interleave": False},
    {"query_rank": Q, "yarn": True},
]


@pytest.mark.parametrize("absorb", [True, False])
@pytest.mark.parametrize("options", DEEPSEEKS, ids=str)
def test_deepseek_s_layer(options, absorb, assert_as_good_as_eager):
    layer, rope, rotary = deepseek(**options)
    x = torch.randn(2, 17, 19)
    mask = torch.zeros(17, 17).masked_fill(torch.ones(17, 17).triu(1).bool(), -torch.inf)[
        None, None
    ]
    eager, _ = layer(x, rotary(x, torch.arange(17)[None]), mask)
    exact, _ = in_double(layer)(x.double(), angles_in_double(rope, 17), mask.double())
    torch.testing.assert_close(eager.double(), exact, rtol=0, atol=1e-6)  # two runs of one layer
    ours = ours_of(layer, rope, torch.float64)(x.double(), absorb=absorb)
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)
    assert_as_good_as_eager(ours_of(layer, rope)(x, absorb=absorb), eager, exact)


@pytest.mark.parametrize("chunks", [[1] * 17, [12, 1, 1, 3], [17]])
def test_decoding_is_deepseek_s_layer_uncached(chunks):
    layer, rope, _ = deepseek(query_rank=Q, yarn=True)
    mla = ours_of(layer, rope, torch.float64)
    x = torch.randn(2, 17, 19, dtype=torch.float64)
    mask = torch.zeros(17, 17).double().masked_fill(torch.ones(17, 17).triu(1).bool(), -torch.inf)
    expected, _ = in_double(layer)(x, angles_in_double(rope, 17), mask[None, None])
    cache = mla.make_cache(2)
    y = torch.cat([mla(part, cache=cache) for part in x.split(chunks, dim=1)], dim=1)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


# A mask for the first S of 16 tokens: a step knows no later ones.
GROWING = {
    "causal": lambda S: ph.mask.causal(),
    "window": lambda S: ph.mask.causal() & ph.mask.window(before=3),
    "window and left padding": lambda S: GROWING["window"](S) & ph.mask.left_padding([0, 5]),
    "documents": lambda S: ph.mask.causal() & ph.mask.documents((torch.arange(16) // 6)[:S]),
    "custom": lambda S: ph.mask.causal() & ph.mask.custom(second_key_or_self, heads=H),
}


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(GROWING)),
    cuts=st.sets(st.integers(1, 15)),
    absorb=st.lists(st.sampled_from([None, True, False]), min_size=16, max_size=16),
    query_rank=st.sampled_from([None, Q]),
    kind=st.sampled_from(["all", "window", "paged"]),
)
@example("window and left padding", set(range(1, 16)), [None] * 16, None, "window")
def test_cached_is_uncached_however_it_is_cut(name, cuts, absorb, query_rank, kind):
    mla, _ = build_double(query_rank=query_rank)
    x = torch.randn(2, 16, 19, dtype=torch.float64)
    expected = mla(x, mask=GROWING[name](16), absorb=False)
    options = {"window": 3} if kind == "window" and "window" in name else {}
    cache = mla.make_cache(2, **options)
    if kind == "paged":
        cache = ph.PagedKVCache(
            2, 16, 1, C + R, value_head_dim=0, dtype=torch.float64, block_size=3
        )
    bounds = [0, *sorted(cuts), 16]
    parts = []
    with torch.no_grad():
        for start, stop, form in zip(bounds, bounds[1:], absorb, strict=False):
            rule = GROWING[name](stop)
            parts.append(mla(x[:, start:stop], mask=rule, cache=cache, absorb=form))
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cached_token_takes_the_promised_bytes(dtype):
    sizes = set()
    for num_heads in (1, 3, 16):
        mla = build(num_heads, dtype=dtype)
        cache = mla.make_cache(2, 257, preallocate=True)
        assert cache.nbytes == 2 * 257 * (C + R) * dtype.itemsize
        sizes.add(cache.nbytes)
        eighth = mla.make_cache(2, 257, preallocate=True, storage=torch.int8)
        assert eighth.nbytes <= 2 * 257 * (C + R + 8)  # a byte a number, and its scales
    assert len(sizes) == 1
    assert mla.make_cache(3).max_tokens == mla.context_length == 17


@pytest.mark.parametrize("absorb", [True, False])
def test_an_int8_cache_stays_within_its_bound(absorb):
    mla, x = build_double(scale=1.5)
    with torch.no_grad():
        plain, coded = mla.make_cache(2), mla.make_cache(2, storage=torch.int8)
        exact, aux = mla(x, cache=plain, return_aux=ALL_AUX, absorb=absorb)
        y, coded_aux = mla(x, cache=coded, return_aux=ALL_AUX, absorb=absorb)
        latent, _ = plain.read()
        # The bound of KVCache, for the absorbed form: its query, [c, k_rope] its key, c its value.
        a = latent.abs().amax()
        query = mla.W_query(x).unflatten(2, (H, N + R)).transpose(1, 2)
        W_key, W_value = mla.W_key.weight.unflatten(0, (H, N)), mla.W_value.weight
        q_nope = torch.stack([query[:, h, :, :N] @ W_key[h] for h in range(H)], dim=1)
        q_rope = mla.rope(query[..., N:], torch.arange(9))
        q_sum = q_nope.abs().sum(-1) + q_rope.abs().sum(-1)
        moved = mla.scale * q_sum * a / 254 * (1 + 1e-6)  # scales are held in float32
        context = a / 254 + 2 * torch.tanh(moved / 2) * a
        out = mla.out_proj.weight.unflatten(1, (H, E))
        merged = torch.einsum("ohe,hec->ohc", out, W_value.unflatten(0, (H, E)))
        bound = torch.einsum("oh,bht->bto", merged.abs().sum(-1), context)
    assert ((coded_aux.lse - aux.lse).abs() <= moved).all()
    assert ((y - exact).abs() <= bound).all()
    assert not torch.equal(y, exact)


def test_asking_for_aux_or_for_a_form_keeps_the_dropped_weights():
    mla, x = build_double(dropout=0.4)
    outputs = []
    for options in ({}, {"return_aux": ALL_AUX}, {"absorb": True}, {"absorb": False}):
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
def test_positions_are_the_default_written_out(absorb):
    mla, x = build_double()
    run = functools.partial(mla, x, absorb=absorb)
    assert torch.equal(run(), run(positions=torch.arange(9)))
    torch.testing.assert_close(run(), run(positions=torch.arange(9) + 100), rtol=0, atol=1e-12)
    stretched = run(positions=torch.stack([torch.arange(9), torch.arange(9) * 5]))
    assert torch.equal(stretched[0], run()[0])
    assert not torch.allclose(stretched[1], run()[1])
    plain = build(rope=None, dtype=torch.float64)
    plain.load_state_dict(mla.state_dict())
    assert not torch.allclose(plain(x), run())
    assert torch.equal(plain(x), plain(x, positions=torch.arange(9) * 5))


@pytest.mark.parametrize("options", [{}, {"query_rank": Q, "qkv_bias": True, "out_bias": False}])
def test_saved_copied_and_pickled_it_is_the_same(options):
    mla, x = build_double(**options)
    expected = mla(x)
    fresh = build(dtype=torch.float64, **options)
    fresh.load_state_dict(mla.state_dict())
    on_meta = build(dtype=torch.float64, device="meta", **options)
    assert all(parameter.is_meta for parameter in on_meta.parameters())
    assert on_meta(x.to("meta")).shape == (2, 9, 23)
    on_meta.to_empty(device="cpu").load_state_dict(mla.state_dict())
    file = io.BytesIO()
    torch.save(mla.state_dict(), file)
    file.seek(0)
    loaded = build(dtype=torch.float64, **options)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for other in (fresh, on_meta, loaded, copy.deepcopy(mla), pickle.loads(pickle.dumps(mla))):
        assert torch.equal(other(x), expected)
        assert repr(other) == repr(mla)
    names = set(mla.state_dict())
    biased = {"W_kv_down.bias", "W_query_down.bias"} if options else {"out_proj.bias"}
    assert {name for name in names if name.endswith("bias")} == biased
    assert {"W_query_down.weight", "q_norm.weight"} <= names or not options
    assert f"num_heads={H}, kv_rank={C}, query_rank={options.get('query_rank')}" in repr(mla)


@pytest.mark.parametrize("absorb", [True, False])
def test_compiles_as_one_graph(absorb):
    torch._dynamo.reset()
    mla = build(query_rank=Q)
    compiled = torch.compile(mla, fullgraph=True, backend="eager")
    x = torch.randn(2, 9, 19)
    torch.testing.assert_close(compiled(x, absorb=absorb), mla(x, absorb=absorb))


@pytest.mark.slow
def test_steps_compile_whole_and_lengths_do_not_compile_again():
    torch._dynamo.reset()
    mla = build()
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("absorb", [True, False])
def test_dtype_in_is_dtype_out(dtype, absorb):
    mla = build(query_rank=Q, dtype=dtype)
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
def test_autocast_decides_the_dtype(absorb):
    mla, x = build(query_rank=Q, norm=WideNorm), torch.randn(2, 9, 19)
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
def test_nothing_in_nothing_out(shape, absorb):
    x = torch.zeros(shape, requires_grad=True)
    y = build(query_rank=Q)(x, absorb=absorb)
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


class Wrapped(nn.Module):
    """A projection that has no weight of its own name, as some adapters are."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x):
        return self.base_layer(x)


def test_a_cache_fits_a_module_whose_projections_are_wrapped():
    mla, x = build_double()
    for name in ("W_query", "W_kv_down", "W_key", "W_value", "out_proj"):
        setattr(mla, name, Wrapped(getattr(mla, name)))
    cache = mla.make_cache(2)
    with torch.no_grad():
        mla(x, cache=cache)
    assert (cache.dtype, len(cache)) == (torch.float64, 9)


def test_adapters_are_never_passed_by():
    mla, x = build_double()
    twice = copy.deepcopy(mla)
    with torch.no_grad():
        twice.W_value.weight *= 2
    expected = twice(x)
    mla.W_value = Adapted(mla.W_value)
    with torch.no_grad():
        cache = mla.make_cache(2)
        parts = [mla(part, cache=cache) for part in x.split(1, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-12)
        with pytest.raises(ArgumentError, match=r"absorb needs plain .*got Linear, Adapted; merge"):
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
    ],
)
def test_constructor_refuses(change, error, message):
    with pytest.raises(error, match=message):
        build(**change)


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
def test_call_refuses_and_the_cache_stays(x, options, error, message):
    mla = build()
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


def test_a_cache_of_another_module_or_window_is_refused():
    mla, x = build(), torch.ones(2, 3, 19)
    heads = ph.KVCache(2, 17, H, N + R, value_head_dim=E)
    with torch.no_grad():
        with pytest.raises(ShapeError, match=r"\(2, 3, T, 9\); got \(2, 1, 3, 15\)"):
            mla(x, cache=heads)
        with pytest.raises(ArgumentError, match=r"window = 4 needs a mask .*before=4"):
            mla(x, cache=mla.make_cache(2, window=4))
        with pytest.raises(DtypeError, match=r"cache must be .*got tuple"):
            mla(x, cache=())
    with pytest.raises(ArgumentError, match="must not need a gradient"):
        mla(x, cache=mla.make_cache(2))
