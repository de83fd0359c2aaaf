"""Common names in constructors, attributes and configurations."""

from __future__ import annotations

import re

__all__ = [
    "DROPOUT",
    "HEADS",
    "HEAD_COUNT",
    "HEAD_SIZE",
    "KV_HEADS",
    "LENGTH",
    "WIDTH",
    "WIDTH_OUT",
    "WINDOW",
]


def _names(words: str) -> tuple[str, ...]:
    return tuple(words.split())


WIDTH = _names(
    "d_in d_model embed_dim embedding_dim emb_dim embed_size embedding_size n_embd n_embed "
    "hidden_size dim input_dim model_dim in_features features width d_embed d_emb emb_size channels"
)
WIDTH_OUT = _names("d_out output_dim out_features hidden_dim")
HEADS = _names(
    "num_heads n_heads n_head heads nhead num_attention_heads nheads num_head head_num nb_heads "
    "n_local_heads num_local_heads n_attn_heads num_attn_heads n_attention_heads attention_heads "
    "attn_heads num_q_heads n_q_heads num_query_heads n_query_heads head_count h H"
)
# Other names for the number of heads: words around "head", none about size or sharing.
HEAD_COUNT = re.compile(
    r"_?(?!.*(kv|key|size|dim|feat|width|group|per_|rank|drop|mask|hidden|idx|index|scale|repeat))"
    r"(\w*_)?n?heads?(_?(num|count|number|n))?",
    re.I,
)
KV_HEADS = _names(
    "num_kv_heads n_kv_heads n_kv_head num_key_value_heads kv_heads n_local_kv_heads "
    "num_local_kv_heads num_kv_head kv_head n_kv num_kv num_query_groups n_query_groups"
)
LENGTH = _names(
    "context_length block_size max_seq_len max_seq_length max_len max_length context_size ctx_len "
    "n_ctx seq_len sequence_length"
)
DROPOUT = _names(
    "dropout dropout_p dropout_rate attn_dropout attention_dropout attn_pdrop resid_pdrop "
    "drop_rate p_dropout"
)
HEAD_SIZE = _names("head_dim head_size dim_head d_head head_dimension d_k d_v")
WINDOW = _names("sliding_window window_size window")
