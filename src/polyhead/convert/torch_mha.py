"""Layout of `nn.MultiheadAttention`: one weight, all queries before all keys before all values.

in_proj_weight (3 * d, d)    in_proj_bias (3 * d,)        out_proj (d, d)
q_proj_weight, k_proj_weight, v_proj_weight               where kdim or vdim is not d

+---------+-----+-------------+---------+-----+-----------+---------+-----+-------------+
| query 0 | ... | query H - 1 | key 0   | ... | key H - 1 | value 0 | ... | value H - 1 |
+---------+-----+-------------+---------+-----+-----------+---------+-----+-------------+
"""

from __future__ import annotations

from torch import Tensor, nn

from polyhead.convert.config import UNLIMITED
from polyhead.convert.layout import Layout, Rule, Sizes, linear, parameter, thirds
from polyhead.convert.linear import (
    check_kind,
    check_plain,
    copy_of,
    filled,
    parameters_of,
    separate_parameters,
)
from polyhead.errors import ConversionError
from polyhead.modules import MultiHeadAttention

__all__ = ["PACKED", "UNPACKED", "from_torch", "to_torch"]


def _thirds(theirs: str, kind: str, *, required: bool) -> Rule:
    ours = (f"W_query.{kind}", f"W_key.{kind}", f"W_value.{kind}")
    return Rule(theirs, ours, thirds, required=required)


_BIAS_AND_OUTPUT = (
    _thirds("in_proj_bias", "bias", required=False),
    *linear("out_proj", "out_proj"),
)
PACKED = Layout(
    "torch",
    (_thirds("in_proj_weight", "weight", required=True),),
    _BIAS_AND_OUTPUT,
    unmovable=("bias_k", "bias_v"),
)
UNPACKED = Layout(
    "torch_unpacked",
    parameter("q_proj_weight", "W_query.weight"),
    parameter("k_proj_weight", "W_key.weight"),
    parameter("v_proj_weight", "W_value.weight"),
    _BIAS_AND_OUTPUT,
    unmovable=("bias_k", "bias_v"),
)


def from_torch(
    attention: nn.MultiheadAttention, *, context_length: int = UNLIMITED
) -> MultiHeadAttention:
    """Convert an `nn.MultiheadAttention` to a `MultiHeadAttention` with the same weights.

    Args:
        attention: with any batch_first. It is not modified; weights are copied.
        context_length: the most tokens that the result accepts; theirs has no limit.

    Returns:
        The same function of (query, key = value) as of (x, memory), each (B, tokens, d). It has
        no mask of its own, as theirs; masks are given at the call (True = may attend; torch's
        True forbids). add_zero_attn becomes sinks that stay 0: `ours.sinks` is frozen.

    Raises:
        ConversionError: keys or values have features of their own (kdim, vdim), or a learned key
            and value are added to every sequence (add_bias_kv).

    >>> import torch
    >>> theirs = nn.MultiheadAttention(8, num_heads=2, batch_first=True)
    >>> ours = from_torch(theirs)
    >>> x, memory = torch.randn(1, 3, 8), torch.randn(1, 5, 8)
    >>> torch.allclose(ours(x, memory), theirs(x, memory, memory)[0], atol=1e-6)
    True
    """
    if not isinstance(attention, nn.MultiheadAttention):
        raise ConversionError(
            f"attention must be an nn.MultiheadAttention; got {type(attention).__name__}; for a "
            "layer of transformers call from_transformers"
        )
    kind = type(attention)
    if kind is not nn.MultiheadAttention and not kind.__module__.startswith("polyhead."):
        raise ConversionError(
            "attention must be an nn.MultiheadAttention itself: a subclass may compute something "
            f"else; got {kind.__module__}.{kind.__name__}; load its state_dict into one first"
        )
    d = attention.embed_dim
    if attention.kdim != d or attention.vdim != d:
        raise ConversionError(
            f"kdim and vdim must be embed_dim = {d}: a MultiHeadAttention makes queries, keys and "
            f"values of d_in features; got kdim = {attention.kdim}, vdim = {attention.vdim}; "
            "project the memory to embed_dim before, or keep the module as it is"
        )
    if attention.bias_k is not None:
        raise ConversionError(
            "add_bias_kv must be off: a MultiHeadAttention adds no learned key and value to a "
            "sequence; got bias_k and bias_v; keep the module as it is"
        )
    check_plain("out_proj", attention.out_proj)
    mha = MultiHeadAttention(
        d,
        d,
        context_length,
        attention.dropout,
        attention.num_heads,
        attention.in_proj_bias is not None,
        out_bias=attention.out_proj.bias is not None,
        mask=None,
        sinks=attention.add_zero_attn,
        device="meta",
    )
    theirs = {name: copy_of(tensor) for name, tensor in parameters_of(attention, ()).items()}
    state = PACKED.to_ours(theirs, Sizes())
    if attention.add_zero_attn:
        state["sinks"] = state["out_proj.weight"].new_zeros(attention.num_heads)
    return filled(mha, state, attention)


def to_torch(mha: MultiHeadAttention, *, batch_first: bool = True) -> nn.MultiheadAttention:
    """Convert a `MultiHeadAttention` to an `nn.MultiheadAttention` with the same weights.

    Args:
        mha: with torch's options only: `mask=None`, one KV head per query head, d_in and d_out
            all heads together. It is not modified; weights are copied.
        batch_first: as in `nn.MultiheadAttention`.

    Returns:
        The same function. If ours has a bias after the heads and none before them, theirs has
        zeros there that do not require grad. Sinks that are 0 become add_zero_attn.

    Raises:
        ConversionError: torch has no such option, or a projection is no plain nn.Linear.

    >>> import torch
    >>> ours = MultiHeadAttention(8, 8, context_length=4, dropout=0.0, num_heads=2, mask=None)
    >>> theirs = to_torch(ours)
    >>> x = torch.randn(1, 4, 8)
    >>> torch.allclose(ours(x), theirs(x, x, x)[0], atol=1e-6)
    True
    """
    check_kind("mha", mha, MultiHeadAttention, "stacked heads become one by stacked_to_split")
    _check_options(mha)
    ours = separate_parameters(mha)
    zero_attention = ours.pop("sinks", None) is not None
    frozen_bias = "W_query.bias" not in ours and "out_proj.bias" in ours
    theirs = PACKED.to_theirs(ours, Sizes())
    if frozen_bias:
        theirs["in_proj_bias"] = theirs["in_proj_weight"].detach().new_zeros(3 * mha.d_in)
    attention = nn.MultiheadAttention(
        mha.d_in,
        mha.num_heads,
        mha.dropout.p,
        bias="out_proj.bias" in ours,
        add_zero_attn=zero_attention,
        batch_first=batch_first,
        device="meta",
    )
    state = {name: copy_of(tensor) for name, tensor in theirs.items()}
    return filled(attention, state, mha)


def _check_options(mha: MultiHeadAttention) -> None:
    """Raise if `mha` uses an option that torch's layer does not have."""
    sinks: Tensor | None = mha.sinks
    merged = mha.num_heads * mha.head_dim
    options = {
        "a mask of its own (set mask to None, and give it at the call)": mha.mask is not None,
        f"d_in = {mha.d_in}, d_out = {mha.d_out} other than all heads together, {merged}": (
            not mha.d_in == mha.d_out == merged == mha.num_heads * mha.value_head_dim
        ),
        f"num_kv_heads = {mha.num_kv_heads} for {mha.num_heads} heads": (
            mha.num_kv_heads != mha.num_heads
        ),
        "no output projection": mha.out_proj is None,
        "a bias before the heads and none after": (
            mha.out_proj is not None and mha.out_proj.bias is None and _has_bias(mha)
        ),
        "rope": mha.rope is not None,
        "alibi": mha.alibi,
        "position_bias": mha.position_bias is not None,
        "softcap": mha.softcap is not None,
        "scale": mha.scale is not None and mha.scale != mha.head_dim**-0.5,
        "qk_norm": mha.q_norm is not None,
        "output_gate": mha.W_gate is not None,
        "sinks other than 0, or that require grad": sinks is not None
        and (bool(sinks.any()) or sinks.requires_grad),
    }
    if used := [name for name, on in options.items() if on]:
        raise ConversionError(
            f"nn.MultiheadAttention has no option for {'; '.join(used)}; keep the module as it is"
        )


def _has_bias(mha: MultiHeadAttention) -> bool:
    return (mha.W_qkv if mha.fused else mha.W_query).bias is not None
