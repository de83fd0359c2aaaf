"""Layouts of BERT: separate projections with biases, bidirectional attention.

    self.query, self.key, self.value (d, d)    output.dense (d, d)        BertAttention
         query,      key,      value (d, d)                               BertSelfAttention

Row block h of query is head h. BertAttention's steps after output.dense (dropout, the residual,
LayerNorm) stay with the model: our output is their input.
"""

from __future__ import annotations

from typing import Any

from polyhead.convert.config import UNLIMITED, causal, is_causal
from polyhead.convert.family import Family
from polyhead.convert.layout import Layout, linear
from polyhead.errors import ConversionError
from polyhead.modules import MultiHeadAttention

__all__ = ["FAMILIES"]

BERT = Layout(
    "bert",
    linear("self.query", "W_query"),
    linear("self.key", "W_key"),
    linear("self.value", "W_value"),
    linear("output.dense", "out_proj"),
    staying=("output.LayerNorm.weight", "output.LayerNorm.bias"),
    grouped=False,
)
BERT_SELF = Layout(
    "bert_self",
    linear("query", "W_query"),
    linear("key", "W_key"),
    linear("value", "W_value"),
)


def build(layer: Any) -> MultiHeadAttention:
    """Return a MultiHeadAttention with a BertAttention's options, on the meta device."""
    return build_self(layer.self, out_proj=True)


def build_self(layer: Any, *, out_proj: bool = False) -> MultiHeadAttention:
    """Return a MultiHeadAttention with a BertSelfAttention's options: no output projection."""
    config = getattr(layer, "config", None)  # not in transformers 4
    width: int = layer.query.in_features
    kind = getattr(layer, "position_embedding_type", None) or "absolute"
    if kind != "absolute":
        raise ConversionError(
            f'position_embedding_type must be "absolute"; got "{kind}", whose scores depend on '
            "the distance in a way that has no counterpart here; keep the layer as it is"
        )
    return MultiHeadAttention(
        width,
        width,
        UNLIMITED if config is None else config.max_position_embeddings,
        layer.dropout.p,
        layer.num_attention_heads,
        qkv_bias=True,
        out_proj=out_proj,
        mask=causal() if is_causal(layer) else None,
        device="meta",
    )


FAMILIES = (
    Family(names=("bert",), classes=("BertAttention",), build=build, layouts=(BERT,)),
    Family(
        classes=(
            "BertSelfAttention",
            "BertSdpaSelfAttention",
            "BertCrossAttention",
        ),
        build=build_self,
        layouts=(BERT_SELF,),
    ),
)
