"""`PolyheadCache` in generation: equal to transformers' own caches, token for token."""

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

import polyhead as ph
from polyhead.errors import ArgumentError, ShapeError
from polyhead.integrations.transformers.cache import Layer, PolyheadCache

GREEDY = {"max_new_tokens": 9, "do_sample": False}


def generate(model, given, cache, **options):
    return model.generate(**given, **(GREEDY | options), past_key_values=cache)


@pytest.mark.parametrize("side", ["left", pytest.param("no mask", marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 4}], ids=str)
def test_cache_generation_equals_dynamic_cache(decoder, side, options, build, inputs):
    given, _ = inputs(decoder, side)
    model = build(decoder, "polyhead")
    expected = generate(model, given, DynamicCache(config=model.config), **options)
    cache = PolyheadCache(model.config, max_tokens=40)
    assert torch.equal(generate(model, given, cache, **options), expected)
    assert cache.get_seq_length() == expected.shape[1] - 1


@pytest.mark.parametrize("name", ["Llama", "Mistral", "DeepseekV3"])
@pytest.mark.parametrize("storage_dtype", [None, torch.int8], ids=["plain", "int8"])
def test_cache_under_autocast(name, storage_dtype, build, inputs):
    """Keys are rotated in float32, values are bfloat16."""
    given, _ = inputs(name, "left")
    model = build(name, "polyhead")
    cache = PolyheadCache(model.config, max_tokens=40, storage_dtype=storage_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = generate(model, given, cache)
        expected = generate(model, given, DynamicCache(config=model.config))
    assert tokens.shape == expected.shape
    if storage_dtype is None:
        assert torch.equal(tokens, expected)


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_cache_second_turn_continues_the_first(name, build, inputs):
    given, _ = inputs(name, "no mask")
    model = build(name, "polyhead")
    cache = PolyheadCache(model.config, max_tokens=40)
    first = generate(model, given, cache)
    again = {"input_ids": torch.cat([first, given["input_ids"][:, :5]], dim=1)}
    expected = generate(model, again, DynamicCache(config=model.config))
    assert torch.equal(generate(model, again, cache), expected)


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_cache_assisted_generation(name, build, inputs):
    given, _ = inputs(name, "no mask")
    given = {"input_ids": given["input_ids"][:1]}
    model, assistant = build(name, "polyhead"), build(name, "polyhead", num_hidden_layers=1)
    options = {"assistant_model": assistant, "max_new_tokens": 12}
    cache = PolyheadCache(model.config, max_tokens=60)
    expected = generate(model, given, None, max_new_tokens=12)
    assert torch.equal(generate(model, given, cache, **options), expected)


@pytest.mark.parametrize("preallocate", [False, True])
def test_cache_after_reset_takes_another_batch_size(preallocate, build, inputs):
    """As DynamicCache: the last batch of many is often smaller."""
    given, _ = inputs("Mistral", "left")
    model = build("Mistral", "polyhead")
    cache = PolyheadCache(model.config, max_tokens=40, preallocate=preallocate)
    for rows in (slice(3), slice(1), slice(3)):
        some = {name: x[rows] for name, x in given.items()}
        expected = generate(model, some, DynamicCache(config=model.config))
        assert torch.equal(generate(model, some, cache), expected)
        cache.reset()
        assert cache.get_seq_length() == 0


@pytest.mark.parametrize("name", ["T5", "Bart"])
def test_cache_cross_attention(name, build, inputs):
    given, _ = inputs(name, "left")
    given.pop("decoder_input_ids")
    model = build(name, "polyhead")
    caches = EncoderDecoderCache(PolyheadCache(model.config, 40), PolyheadCache(model.config, 40))
    assert torch.equal(generate(model, given, caches), generate(model, given, None))


def test_cache_new_token_does_not_move_the_others(build, inputs):
    given, _ = inputs("Llama", "no mask", T=30)
    model = build("Llama", "polyhead")
    cache = PolyheadCache(model.config, max_tokens=37, preallocate=True)
    with torch.no_grad():
        model(**given, past_key_values=cache)
        before = [layer.keys.data_ptr() for layer in cache.layers]
        model(torch.tensor([[3]] * 3), past_key_values=cache)
    assert [layer.keys.data_ptr() for layer in cache.layers] == before


def test_cache_int8_saves_memory_and_is_close(build, inputs):
    given, _ = inputs("Llama", "no mask")
    model = build("Llama", "polyhead")
    caches = [
        PolyheadCache(model.config, 40),
        PolyheadCache(model.config, 40, storage_dtype=torch.int8),
    ]
    with torch.no_grad():
        plain, int8 = (model(**given, past_key_values=cache).logits for cache in caches)
        token = torch.tensor([[4]] * 3)
        plain, int8 = (model(token, past_key_values=cache).logits for cache in caches)
    error = (plain - int8).abs().max()
    assert 0 < error < 0.05 * plain.abs().max()
    nbytes = [cache.layers[0]._cache.nbytes for cache in caches]
    assert nbytes[1] < nbytes[0] / 1.9


def test_cache_full_raises(build, inputs):
    given, _ = inputs("Llama", "no mask")
    model = build("Llama", "polyhead")
    with torch.no_grad(), pytest.raises(ShapeError, match=r"max_tokens - length = 8 - 0 = 8"):
        model(**given, past_key_values=PolyheadCache(model.config, 8))


def test_cache_rows_are_repeated_and_selected():
    layer = Layer(8)
    key = torch.randn(2, 3, 4, 5)
    layer.update(key, key)
    layer.batch_repeat_interleave(2)
    assert torch.equal(layer.keys, key.repeat_interleave(2, dim=0))
    layer.batch_select_indices(torch.tensor([3, 0]))
    assert torch.equal(layer.values, key[[1, 0]])


@pytest.mark.parametrize(("crop", "left"), [(-2, 4), (0, 6), (4, 4)])
def test_cache_crop_removes_last_tokens(crop, left):
    layer = Layer(8)
    key = torch.randn(2, 3, 6, 5)
    layer.update(key, key)
    layer.crop(crop)
    assert layer.get_seq_length() == left
    assert torch.equal(layer.keys, key[:, :, :left])


@pytest.mark.parametrize("window", [None, 4])
def test_cache_mask_sizes_match_the_next_keys(window):
    layer = Layer(40, window)
    for T in (3, 1, 1, 6, 1, 9):
        S, first = layer.get_mask_sizes(T)
        start = layer.get_seq_length()
        key = torch.arange(start, start + T).float()[None, None, :, None].expand(2, 3, T, 5)
        got, _ = layer.update(key, key)
        assert got[0, 0, :, 0].tolist() == list(range(first, first + S))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 4}], ids=str)
def test_cache_layers_that_share_keys(options, inputs):
    transformers = pytest.importorskip("transformers", minversion="5", reason="Gemma 4 came with 5")
    config = transformers.Gemma4TextConfig(
        vocab_size=31,
        hidden_size=24,
        intermediate_size=29,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=4,
        head_dim=10,
        global_head_dim=12,
        hidden_size_per_layer_input=5,
        vocab_size_per_layer_input=31,
        pad_token_id=0,
        eos_token_id=None,
        attn_implementation="polyhead",
    )
    torch.manual_seed(3)
    model = transformers.Gemma4ForCausalLM(config).eval()
    given, _ = inputs("Gemma4Text", "left")
    expected = generate(model, given, DynamicCache(config=config), **options)
    cache = PolyheadCache(config, max_tokens=40)
    assert torch.equal(generate(model, given, cache, **options), expected)


def test_cache_layers_with_other_state_raise():
    from transformers import Lfm2Config

    with pytest.raises(ArgumentError, match=r"keep keys and values; got layer 0: conv"):
        ph.integrations.transformers.PolyheadCache(
            Lfm2Config(num_hidden_layers=2, layer_types=["conv", "full_attention"])
        )


def numbered(start, T):
    return torch.arange(start, start + T).float()[None, None, :, None].expand(1, 2, T, 3)


@pytest.mark.parametrize("drafted", [5, 300])
@pytest.mark.parametrize("before", [[], [7, 1, 1, 30]], ids=["empty", "filled"])
@pytest.mark.parametrize("was_reset", [False, True])
def test_cache_crop_of_drafts_beyond_a_window(before, drafted, was_reset):
    """transformers#48280: recording began with the first token or never, and kept 256."""
    layer = Layer(None, 4)
    if was_reset:
        layer.update(numbered(0, 9), numbered(0, 9))
        layer.reset()
    length = 0
    for T in before:
        layer.update(numbered(length, T), numbered(length, T))
        length += T
    layer.activate_past_recording()
    for kept in (0, drafted - 2, 3):
        layer.update(numbered(length, drafted), numbered(length, drafted))
        layer.crop(kept - drafted)
        length += kept
        assert layer.get_seq_length() == length
        key, _ = layer.update(numbered(length, 1), numbered(length, 1))
        assert key[0, 0, :, 0].tolist() == list(range(max(0, length - 3), length + 1))
        layer.crop(-1)


def test_cache_after_recording_drops_the_past():
    layer = Layer(None, 4)
    layer.activate_past_recording()
    layer.update(numbered(0, 500), numbered(0, 500))
    layer.crop(0)
    layer.record_past = False  # as generate leaves it
    for length in range(500, 520):
        layer.update(numbered(length, 1), numbered(length, 1))
    assert layer._cache.max_rewind == 0
    with pytest.raises(ArgumentError, match=r"tokens_to_remove must be at most"):
        layer.crop(-300)


def test_cache_crop_beyond_window_raises_unchanged(build, inputs):
    given, _ = inputs("Gemma2", "no mask", T=30)
    model = build("Gemma2", "polyhead")
    cache = PolyheadCache(model.config, max_tokens=64)
    with torch.no_grad():
        model(**given, past_key_values=cache)
    lengths = [layer.get_seq_length() for layer in cache.layers]
    remedy = r"got -12; call cache.activate_past_recording\(\) before tokens"
    with pytest.raises(ArgumentError, match=remedy):
        cache.crop(-12)
    assert [layer.get_seq_length() for layer in cache.layers] == lengths
    cache.reset()
    cache.activate_past_recording()
    with torch.no_grad():
        model(**given, past_key_values=cache)
    cache.crop(-12)
    assert {layer.get_seq_length() for layer in cache.layers} == {18}


def test_cache_assisted_generation_in_a_filled_cache(build, inputs):
    given, _ = inputs("Mistral", "no mask")
    prompt = given["input_ids"][:1]
    model, assistant = (build("Mistral", "polyhead", num_hidden_layers=n) for n in (2, 1))
    cache = PolyheadCache(model.config, max_tokens=37)
    first = model.generate(prompt, past_key_values=cache, max_new_tokens=6, do_sample=False)
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(first, **options)
    got = model.generate(first, past_key_values=cache, assistant_model=assistant, **options)
    assert torch.equal(got, expected)
