"""Every family: `attn_implementation="polyhead"` equals "eager"."""

import pytest
import torch
import transformers

ATTENTIONS = {"Bart": 6, "T5": 6}  # two per decoder layer, and the encoder's


def run(model, given):
    dtype = next(model.parameters()).dtype
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}
    return model(**given)[0]


DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
QUICK = (("left", "f32"), ("left", "bf16"), ("right", "f32"), ("no mask", "f32"))


@pytest.mark.parametrize(
    ("side", "dtype"),
    [
        pytest.param(side, DTYPES[name], marks=() if (side, name) in QUICK else pytest.mark.slow)
        for side in ("left", "right", "none", "no mask")
        for name in DTYPES
    ],
)
def test_models_outputs_match_eager_without_padding(
    family, side, dtype, build, inputs, calls, assert_as_good_as_eager
):
    given, real = inputs(family, side)
    with torch.no_grad():
        exact = run(build(family, "eager", torch.float64), given)[real]
        eager = run(build(family, "eager", dtype), given)[real]
        ours = run(build(family, "polyhead", dtype), given)
    assert torch.isfinite(ours).all()
    assert_as_good_as_eager(ours[real], eager, exact)
    assert len(calls) == ATTENTIONS.get(family, 2)  # one per layer: polyhead ran


@pytest.mark.parametrize("side", ["left", "right"])
def test_models_gradients_match_eager(family, side, build, inputs, assert_as_good_as_eager):
    given, real = inputs(family, side)
    grads = []
    for attention, dtype in (
        ("polyhead", torch.float32),
        ("eager", torch.float32),
        ("eager", torch.float64),
    ):
        model = build(family, attention, dtype)
        (run(model, given)[real] ** 2).mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    ours, eager, exact = grads
    assert ours.keys() == eager.keys()
    flat = [torch.cat([grad[name].flatten() for name in exact]) for grad in grads]
    assert_as_good_as_eager(*flat)


@pytest.mark.parametrize("side", ["left", "no mask"])
def test_models_generation_matches_eager(generator, side, build, inputs, calls):
    given, _ = inputs(generator, side)
    given.pop("decoder_input_ids", None)
    options = given | {"max_new_tokens": 6, "do_sample": False}
    expected = build(generator, "eager").generate(**options)
    assert torch.equal(build(generator, "polyhead").generate(**options), expected)
    assert len(calls) >= 2 * 6


def static(config):
    return transformers.StaticCache(config=config, max_cache_len=20)


def quantized(config):
    return transformers.QuantizedCache("fp8", config)


DECODING = {
    "static cache": (static, {}),
    "quantized cache": (quantized, {}),
    "beam search": (None, {"num_beams": 3}),
    "chunks of a prompt": (None, {"prefill_chunk_size": 4}),
    "prompt lookup": (None, {"prompt_lookup_num_tokens": 3}),
}


@pytest.mark.parametrize("way", DECODING)
def test_models_every_decoding_mode_matches_eager(decoder, way, build, inputs, calls):
    """Windows of 4 in Mistral, Gemma 2 and GPT-OSS: their caches drop old tokens."""
    if way == "quantized cache" and decoder not in ("GPT2", "Llama"):
        pytest.skip("it takes no windows, and its rounding shows every other one")
    is_4 = transformers.__version__.startswith("4.")
    if is_4 and (way in ("quantized cache", "prompt lookup") or decoder == "DeepseekV3"):
        pytest.skip("needs another package, or fails by itself")
    make_cache, options = DECODING[way]
    given, _ = inputs(decoder, "none" if way == "prompt lookup" else "left")
    if way == "prompt lookup":
        given = {name: x[:1] for name, x in given.items()}
    tokens = []
    for attention in ("eager", "polyhead"):
        model = build(decoder, attention)
        cache = None if make_cache is None else make_cache(model.config)
        tokens.append(
            model.generate(
                **given, **options, past_key_values=cache, max_new_tokens=7, do_sample=False
            )
        )
    assert torch.equal(*tokens)
    assert calls
