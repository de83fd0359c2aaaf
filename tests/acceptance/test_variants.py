"""The variants that modern models use, each against transformers' own layer, and cached.

In float64 the numbers must agree to rounding: another order of operations (a cap after the mask, a
norm after rope, a sink counted twice) is far outside.
"""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import polyhead as ph

transformers = pytest.importorskip("transformers")

B, T, D_IN, H, G, D = 2, 11, 24, 6, 2, 8
CONFIG = {
    "hidden_size": D_IN,
    "num_attention_heads": H,
    "num_key_value_heads": G,
    "head_dim": D,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
CAUSAL = torch.full((T, T), float("-inf"), dtype=torch.float64).triu(1)[None, None]


def build(**options):
    arguments = {"num_kv_heads": G, "head_dim": D, "out_bias": False} | options
    return ph.MultiHeadAttention(D_IN, D_IN, 64, 0.0, H, **arguments).double().eval()


def randomised(layer):
    """Weights far from their initial ones and zeros, so that none can be left out."""
    torch.manual_seed(0)
    layer = layer.double().eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 0.0, 0.4)
    return layer


def load(mha, layer, **more):
    names = {"q_proj": "W_query", "k_proj": "W_key", "v_proj": "W_value", "o_proj": "out_proj"}
    state = {}
    for name, value in layer.state_dict().items():
        head, _, rest = name.partition(".")
        state[f"{names[head]}.{rest}" if head in names else name] = value
    mha.load_state_dict({**state, **more})
    return mha


def rotary(module, config, x):
    return module(config)(x, torch.arange(T)[None])


def qwen3(x):
    from transformers.models.qwen3 import modeling_qwen3 as modeling

    config = transformers.Qwen3Config(**CONFIG, **ROPE)
    layer = randomised(modeling.Qwen3Attention(config, 0))
    want = layer(x, rotary(modeling.Qwen3RotaryEmbedding, config, x), CAUSAL)[0]
    norm = functools.partial(nn.RMSNorm, eps=config.rms_norm_eps)
    return load(build(rope=ph.Rope(theta=500.0), qk_norm=norm), layer), want


def qwen3_next(x):
    from transformers.models.qwen3_next import modeling_qwen3_next as modeling

    rope = {"rope_parameters": {**ROPE["rope_parameters"], "partial_rotary_factor": 0.5}}
    config = transformers.Qwen3NextConfig(**CONFIG, **rope)
    layer = randomised(modeling.Qwen3NextAttention(config, 0))
    want = layer(x, rotary(modeling.Qwen3NextRotaryEmbedding, config, x), CAUSAL)[0]
    mha = build(
        rope=ph.Rope(theta=500.0, rotary_dim=4),
        qk_norm=functools.partial(nn.RMSNorm, eps=config.rms_norm_eps),
        output_gate=True,
    )
    # Each head's query rows are followed by its gate's; the norms hold weight - 1.
    queries, gates = layer.q_proj.weight.detach().unflatten(0, (H, 2, D)).unbind(1)
    changed = {"W_query.weight": queries.flatten(0, 1), "W_gate.weight": gates.flatten(0, 1)}
    changed |= {f"{n}.weight": getattr(layer, n).weight.detach() + 1 for n in ("q_norm", "k_norm")}
    return load(mha, layer, **changed), want


def gemma2(x):
    from transformers.models.gemma2 import modeling_gemma2 as modeling

    config = transformers.Gemma2Config(
        **CONFIG, **ROPE, attn_logit_softcapping=3.0, query_pre_attn_scalar=20
    )
    layer = randomised(modeling.Gemma2Attention(config, 1))
    want = layer(x, rotary(modeling.Gemma2RotaryEmbedding, config, x), CAUSAL)[0]
    return load(build(rope=ph.Rope(theta=500.0), softcap=3.0, scale=20**-0.5), layer), want


def gpt_oss(x):
    from transformers.models.gpt_oss import modeling_gpt_oss as modeling

    config = transformers.GptOssConfig(**CONFIG, **ROPE)
    layer = randomised(modeling.GptOssAttention(config, 1))
    want = layer(x, rotary(modeling.GptOssRotaryEmbedding, config, x), CAUSAL)[0]
    mha = build(rope=ph.Rope(theta=500.0), sinks=True, qkv_bias=True, out_bias=True)
    return load(mha, layer), want


def bloom(x):
    from transformers.models.bloom import modeling_bloom as modeling

    config = transformers.BloomConfig(
        hidden_size=D_IN, n_head=H, n_layer=1, vocab_size=32, attn_implementation="eager"
    )
    layer = randomised(modeling.BloomAttention(config, 0))
    # Their ALiBi has no float64; ours is compared to what float32 keeps.
    alibi = modeling.build_alibi_tensor(torch.ones(B, T), H, torch.float64)
    want = layer(x, torch.zeros_like(x), alibi=alibi, attention_mask=CAUSAL)[0]
    mha = build(alibi=True, num_kv_heads=H, head_dim=4, qkv_bias=True, out_bias=True)
    fused = layer.query_key_value
    state = {f"out_proj.{n}": p for n, p in layer.dense.named_parameters()}
    for index, name in enumerate(("W_query", "W_key", "W_value")):
        for kind, parameter in fused.named_parameters():
            rows = parameter.detach().unflatten(0, (H, 3, 4))[:, index].flatten(0, 1)
            state[f"{name}.{kind}"] = rows
    mha.load_state_dict(state)
    return mha, want


@pytest.mark.parametrize("model", [qwen3, qwen3_next, gemma2, gpt_oss, bloom])
def test_a_variant_is_that_of_transformers(model):
    x = torch.randn(B, T, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        mha, want = model(x)
        got = mha(x)
        # transformers computes rope's angles, and some softmaxes, in float32.
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6 * want.abs().max().item())
        contributions = mha.head_contributions(x).sum(dim=1)
        bias = 0.0 if mha.out_proj.bias is None else mha.out_proj.bias
        torch.testing.assert_close(contributions + bias, got, rtol=0, atol=1e-12)


OFF = {
    "rope": None,
    "alibi": False,
    "softcap": None,
    "sinks": False,
    "qk_norm": None,
    "output_gate": False,
    "scale": None,
}
ON = {
    "rope": ph.Rope(theta=100.0),
    "alibi": True,
    "softcap": 1.5,
    "sinks": True,
    "qk_norm": nn.RMSNorm,
    "output_gate": True,
    "scale": 0.9,
}


@pytest.mark.parametrize("name", ON)
def test_every_keyword_changes_the_output(name):
    """None is lost on the way, alone or beside all the others."""
    x = torch.randn(B, T, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def output(options):
        torch.manual_seed(0)
        mha = build(**options)
        with torch.no_grad():
            # A norm's weight begins as 1 and a sink as 0: they act even so.
            return mha(x)

    assert (output(OFF | {name: ON[name]}) - output(OFF)).abs().max() > 1e-3
    assert (output(ON | {name: OFF[name]}) - output(ON)).abs().max() > 1e-3


def test_values_of_another_size_than_keys():
    mha = build(value_head_dim=5, rope=ph.Rope())
    x = torch.randn(B, T, D_IN, dtype=torch.float64)
    assert mha.W_value.out_features == G * 5
    assert mha.out_proj.in_features == H * 5
    assert mha(x).shape == (B, T, D_IN)
    fused = mha(x)
    torch.testing.assert_close(mha.fuse()(x), fused, rtol=0, atol=1e-12)
    torch.testing.assert_close(mha.unfuse()(x), fused, rtol=0, atol=1e-12)
    assert mha.head_contexts(x).shape == (B, H, T, 5)


CACHES = {
    "dense": lambda mha: mha.make_cache(B),
    "preallocated": lambda mha: mha.make_cache(B, preallocate=True),
    "rolling": lambda mha: mha.make_cache(B, window=3),
    "paged": lambda mha: ph.PagedKVCache(
        B, 64, G, D, value_head_dim=5, block_size=4, dtype=torch.float64
    ),
}


@pytest.mark.parametrize("kind", CACHES)
@given(st.data())
@settings(max_examples=25, deadline=None)
def test_cached_output_is_uncached_output(kind, data):
    torch.manual_seed(0)
    mask = ph.mask.causal()
    if kind == "rolling":
        mask &= ph.mask.window(before=data.draw(st.integers(0, 3)))
    chosen = {name: data.draw(st.sampled_from([OFF[name], ON[name]])) for name in ON}
    mha = build(**chosen, mask=mask, value_head_dim=5)
    x = torch.randn(B, T, D_IN, dtype=torch.float64)
    given_mask = data.draw(
        st.sampled_from(
            [
                lambda S: None,
                lambda S: ph.mask.left_padding([0, 4]),
                lambda S: ph.mask.lengths([2, 9]),
                lambda S: ph.mask.documents(torch.tensor([0] * 4 + [1] * 7)[:S]),
                lambda S: ph.mask.prefix(6),
            ]
        )
    )
    with torch.no_grad():
        want = mha(x, mask=given_mask(T))
        cache = CACHES[kind](mha)
        got = []
        while cache.length < T:
            n = data.draw(st.integers(1, T - cache.length))
            start, stop = cache.length, cache.length + n
            got.append(mha(x[:, start:stop], None, given_mask(stop), cache))
    torch.testing.assert_close(torch.cat(got, dim=1), want, rtol=0, atol=1e-12)


def module(**options):
    return build(mask=ph.mask.causal() & ph.mask.window(before=4), **options)


BAD = [
    (
        {"cache": "a dict"},
        ph.errors.DtypeError,
        "cache must be a polyhead.KVCache, PagedKVCache or None; got str; make one with "
        "make_cache(batch)",
    ),
    (
        {"memory": torch.zeros(B, 3, D_IN, dtype=torch.float64)},
        ph.errors.ArgumentError,
        "cache must be None with memory, whose keys do not grow; got both; project memory once "
        "with project_qkv, and call polyhead.attention",
    ),
    (
        {"x": torch.zeros(B, 60, D_IN, dtype=torch.float64)},
        ph.errors.ShapeError,
        "x must fit context_length = 64 behind the 5 cached tokens; got 60; shorten it, or build "
        "the module with a larger context_length",
    ),
    (
        {"cache": "rolling"},
        ph.errors.ArgumentError,
        "cache with window = 3 needs a mask that looks no further back; got "
        "causal() & window(before=4); add & polyhead.mask.window(before=3) to it, or use a "
        "cache without a window",
    ),
    (
        {"mask": ph.mask.lengths([1, 2, 3])},
        ph.errors.ShapeError,
        "mask.lengths(lengths) must have one entry per batch row, B = 2; got 3; give one for each",
    ),
    (
        {"x": torch.zeros(3, 1, D_IN, dtype=torch.float64)},
        ph.errors.ShapeError,
        None,
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_a_bad_call_leaves_the_cache_as_it_was(change, error, message):
    mha = module()
    x = torch.randn(B, 5, D_IN, dtype=torch.float64)
    with torch.no_grad():
        cache = mha.make_cache(B)
        mha(x, cache=cache)
        if change.get("cache") == "rolling":
            cache = mha.make_cache(B, window=3)
            change = {"cache": cache}
        before = [part.clone() for part in cache.read()], cache.length, cache.start
        with pytest.raises(error) as caught:
            mha(**{"x": x, "cache": cache, **change})
    assert message is None or str(caught.value) == message
    assert cache.length == before[1]
    assert cache.start == before[2]
    assert all(torch.equal(a, b) for a, b in zip(cache.read(), before[0], strict=True))


def test_a_cache_is_for_inference():
    mha = module()
    cache = mha.make_cache(B)
    with pytest.raises(ph.errors.ArgumentError, match="grad"):
        mha(torch.randn(B, 5, D_IN, dtype=torch.float64), cache=cache)
    assert cache.length == 0
