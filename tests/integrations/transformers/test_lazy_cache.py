"""Lazy cache tensors: plain tensors to models, int8 cache views to polyhead's attention."""

import copy

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

import polyhead as ph
from polyhead.integrations.transformers.cache import PolyheadCache
from polyhead.integrations.transformers.lazy_cache import LazyCacheTensor, unwrap, wrap


@pytest.fixture
def cache_view():
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(2, 3, 5, 4, generator=generator)
    key, _ = ph.KVCache(2, 8, 3, 4, storage_dtype=torch.int8).append_as_views(numbers, numbers)
    return key


@pytest.fixture
def materializing_raises(monkeypatch):
    def refuse(self):
        raise AssertionError("a cache view was materialized")

    monkeypatch.setattr(LazyCacheTensor, "_materialize", refuse)


def test_lazy_cache_tensor_has_the_tensors_attributes(cache_view):
    held, numbers = wrap(cache_view), cache_view.materialize()
    assert isinstance(held, torch.Tensor)
    assert held.shape == numbers.shape
    assert (held.dtype, held.device, held.requires_grad) == (torch.float32, numbers.device, False)
    assert unwrap(held) is cache_view
    assert unwrap(numbers) is numbers
    assert wrap(numbers) is numbers


@pytest.mark.parametrize(
    "use",
    [
        lambda key: key[:, :, -1:, :2],
        lambda key: key.transpose(2, 3),
        lambda key: torch.ones(2, 3, 1, 4) @ key.mT,
        lambda key: torch.cat([key, key], dim=2),
        lambda key: key.repeat_interleave(2, dim=1),
        lambda key: key.to(torch.float64),
        lambda key: torch.nn.functional.scaled_dot_product_attention(key, key, key),
        torch.clone,
        torch.Tensor.detach,
        copy.deepcopy,
    ],
)
def test_lazy_cache_tensor_operations_materialize(cache_view, use):
    used = use(wrap(cache_view))
    assert type(used) is torch.Tensor
    assert torch.equal(used, use(cache_view.materialize()))


def test_lazy_cache_tensor_is_materialized_once(cache_view):
    held = wrap(cache_view)
    assert held.dense() is held.dense()


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 4}], ids=str)
@pytest.mark.usefixtures("materializing_raises", "kernels")
def test_lazy_cache_generation_does_not_dequantize(name, options, build, inputs):
    given, _ = inputs(name, "left")
    model = build(name, "polyhead")
    cache = PolyheadCache(model.config, 40, storage_dtype=torch.int8)
    model.generate(**given, past_key_values=cache, max_new_tokens=4, do_sample=False, **options)


@pytest.mark.parametrize("other", ["eager", "sdpa"])
def test_lazy_cache_other_attentions_get_tensors(other, build, inputs):
    given, _ = inputs("Llama", "left")
    logits = []
    for attention in ("polyhead", other):
        model = build("Llama", attention)
        cache = PolyheadCache(model.config, 40, storage_dtype=torch.int8)
        with torch.no_grad():
            model(**given, past_key_values=cache)
            mask = torch.nn.functional.pad(given["attention_mask"], (0, 1), value=1)
            token = torch.tensor([[4]] * len(mask))
            answer = model(token, attention_mask=mask, past_key_values=cache)
        logits.append(answer.logits)
    torch.testing.assert_close(*logits)


def test_lazy_cache_cross_attention_reads_int8(build, inputs):
    given, _ = inputs("Bart", "left")
    given.pop("decoder_input_ids")
    model = build("Bart", "polyhead")
    caches = EncoderDecoderCache(
        PolyheadCache(model.config, 40, storage_dtype=torch.int8),
        PolyheadCache(model.config, 40, storage_dtype=torch.int8),
    )
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True}
    options["return_dict_in_generate"] = True
    plain = EncoderDecoderCache(
        DynamicCache(config=model.config), DynamicCache(config=model.config)
    )
    ours, theirs = (
        model.generate(**given, past_key_values=cache, **options).logits[0]
        for cache in (caches, plain)
    )
    assert 0 < (ours - theirs).abs().max() < 0.05 * theirs.abs().max()


# transformers 4 warns for any attention but eager, and returns the weights all the same.
@pytest.mark.filterwarnings("ignore:.output_attentions=True. is not supported:UserWarning")
@pytest.mark.usefixtures("kernels")
def test_lazy_cache_weights_match_materialized_keys(build, inputs):
    given, _ = inputs("Llama", "no mask")
    model = build("Llama", "polyhead")
    cache = PolyheadCache(model.config, 40, storage_dtype=torch.int8)
    with torch.no_grad():
        answer = model(**given, past_key_values=cache, output_attentions=True)
    sums = answer.attentions[0].sum(dim=-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))
