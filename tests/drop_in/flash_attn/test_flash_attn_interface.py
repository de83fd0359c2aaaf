"""Signatures of flash-attn 2.8: positional order, names and defaults."""

from __future__ import annotations

import inspect

import pytest

from polyhead.drop_in import flash_attn
from polyhead.drop_in.flash_attn import flash_attn_interface, rotary

OPTIONS = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "alibi_slopes=None, deterministic=False, return_attn_probs=False"
)
BOUNDS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
SIGNATURES = {
    "flash_attn_func": f"q, k, v, {OPTIONS}",
    "flash_attn_kvpacked_func": f"q, kv, {OPTIONS}",
    "flash_attn_qkvpacked_func": f"qkv, {OPTIONS}",
    "flash_attn_varlen_func": f"q, k, v, {BOUNDS}, {OPTIONS}, block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q, kv, {BOUNDS}, {OPTIONS}",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {OPTIONS}",
    "flash_attn_with_kvcache": (
        "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, "
        "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, "
        "softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
        "rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False"
    ),
}
OTHERS = {
    (flash_attn.bert_padding, "unpad_input"): "hidden_states, attention_mask, unused_mask=None",
    (flash_attn.bert_padding, "pad_input"): "hidden_states, indices, batch, seqlen",
    (flash_attn.bert_padding, "unpad_input_for_concatenated_sequences"): (
        "hidden_states, attention_mask_in_length"
    ),
    (flash_attn.bert_padding, "index_first_axis"): "input, indices",
    (flash_attn.bert_padding, "index_put_first_axis"): "values, indices, first_axis_dim",
    (rotary, "apply_rotary_emb"): (
        "x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, "
        "max_seqlen=None"
    ),
    (rotary, "apply_rotary_emb_torch"): "x, cos, sin, interleaved=False",
    (rotary, "apply_rotary_emb_qkv_"): (
        "qkv, cos, sin, cos_k=None, sin_k=None, interleaved=False, seqlen_offsets=0, "
        "num_heads_q=None"
    ),
    (rotary, "apply_rotary_emb_kv_"): "kv, cos, sin, interleaved=False, seqlen_offsets=0",
}


def plain(function) -> str:
    """Signature without annotations."""
    parameters = inspect.signature(function).parameters.values()
    return ", ".join(
        p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters
    )


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_that_of_flash_attn(name):
    assert plain(getattr(flash_attn_interface, name)) == SIGNATURES[name]
    assert getattr(flash_attn, name) is getattr(flash_attn_interface, name)


@pytest.mark.parametrize(("module", "name"), OTHERS)
def test_signature_of_helper_is_that_of_flash_attn(module, name):
    assert plain(getattr(module, name)) == OTHERS[module, name]


def test_interface_offers_these_functions():
    assert sorted(flash_attn_interface.__all__) == sorted(SIGNATURES)
