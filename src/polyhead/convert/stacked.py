"""Between the lecture's two mechanisms: stacked heads (3.6.1) and weight splits (3.6.2).

They are the same function in two layouts. The rows of a split projection, `head_dim` at a time,
are the projections of the stacked heads:

    W_query of the split      W_query of the stacked heads
    +------------------+      +------------------+
    | head 0           |      | heads[0]         |      d_out means the size of ONE head
    +------------------+      +------------------+      in MultiHeadAttentionWrapper, and
    | head 1           |  =   +------------------+      of ALL heads in MultiHeadAttention
    +------------------+      | heads[1]         |
    | ...              |      +------------------+

With fewer key/value heads than query heads, the stacked heads of one group each hold a copy of
their group's key and value rows.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from polyhead.convert.linear import check_plain, copied, filled
from polyhead.errors import ConversionError, ShapeError
from polyhead.modules import CausalAttention, MultiHeadAttention, MultiHeadAttentionWrapper

__all__ = ["split_to_stacked", "stacked_to_split"]


def split_to_stacked(mha: MultiHeadAttention) -> MultiHeadAttentionWrapper:
    """The same function as stacked heads, each with weights of its own.

    Args:
        mha: split heads, of H heads of size head_dim. It is left as it is; weights are copied.

    Returns:
        A wrapper with `num_heads = H` and **`d_out = head_dim`, the size of one head**. A head
        gets the key and value rows of its group. out_proj, bias, dropout, rope, mask, scale and
        training mode are kept, and which parameters are frozen.

    Raises:
        ConversionError: a projection is no plain nn.Linear (adapters, quantisation), or stacked
            heads have no such option (sinks, softcap and others).

    >>> split = MultiHeadAttention(6, 4, context_length=8, dropout=0.0, num_heads=2)
    >>> stacked = split_to_stacked(split)
    >>> x = torch.randn(1, 8, 6)
    >>> torch.allclose(stacked(x), split(x), atol=1e-6)
    True
    """
    _check_options(mha)
    split = _projections(mha)
    state = _out_state(mha)
    has_bias = split["W_query"].bias is not None
    wrapper = MultiHeadAttentionWrapper(
        mha.d_in,
        mha.head_dim,
        mha.context_length,
        mha.dropout.p,
        mha.num_heads,
        has_bias,
        out_proj=mha.out_proj is not None,
        out_features=None if mha.out_proj is None else mha.d_out,
        out_bias=mha.out_proj is not None and mha.out_proj.bias is not None,
        rope=mha.rope,
        mask=mha.mask,
        scale=mha.scale,
        backend=mha.backend,
        device="meta",
    )
    group = mha.num_heads // mha.num_kv_heads
    for name, projection in split.items():
        for kind, parameter in projection.named_parameters():
            rows = parameter.detach().split(mha.head_dim)
            for h in range(mha.num_heads):
                source = h if name == "W_query" else h // group
                row = rows[source].clone().requires_grad_(parameter.requires_grad)
                state[f"heads.{h}.{name}.{kind}"] = row
    return filled(wrapper, state, mha)


def stacked_to_split(
    wrapper: MultiHeadAttentionWrapper, *, num_kv_heads: int | None = None
) -> MultiHeadAttention:
    """The same function as one projection split into heads.

    Args:
        wrapper: stacked heads, H of size d_out each. It is left as it is; weights are copied.
        num_kv_heads: G, how many key/value heads the split keeps, a divisor of H; None: H. The
            key and value weights of the heads of one group must then be equal, bit for bit.

    Returns:
        Split heads with `head_dim = wrapper's d_out` and **`d_out` the size of the whole
        output**. It has an output projection if the wrapper has one.

    Raises:
        ConversionError: the heads differ in more than their weights, the heads of a group hold
            different key or value weights, or a projection is no plain nn.Linear (adapters).

    >>> wrapper = MultiHeadAttentionWrapper(6, 2, context_length=8, dropout=0.0, num_heads=3)
    >>> split = stacked_to_split(wrapper)
    >>> split.d_out, split.head_dim                              # 3 heads of 2 features
    (6, 2)
    >>> x = torch.randn(1, 8, 6)
    >>> torch.allclose(split(x), wrapper(x), atol=1e-6)
    True
    """
    heads = _heads(wrapper)
    H = wrapper.num_heads
    G = H if num_kv_heads is None else num_kv_heads
    if G < 1 or H % G:
        raise ShapeError(
            "num_kv_heads", f"must divide num_heads = {H}", G, "leave it out to keep every head"
        )
    first = _common(heads)
    state = _out_state(wrapper)
    merged = H * first.d_out
    mha = MultiHeadAttention(
        first.d_in,
        merged if wrapper.out_proj is None else wrapper.out_proj.out_features,
        first.context_length,
        first.dropout.p,
        H,
        first.W_query.bias is not None,
        num_kv_heads=G,
        head_dim=first.d_out,
        out_proj=wrapper.out_proj is not None,
        out_bias=wrapper.out_proj is not None and wrapper.out_proj.bias is not None,
        rope=first.rope,
        mask=first.mask,
        scale=first.scale,
        backend=first.backend,
        device="meta",
    )
    for kind, _ in first.W_query.named_parameters():
        for name in ("W_query", "W_key", "W_value"):
            parameters = [getattr(getattr(head, name), kind) for head in heads]
            rows = [parameter.detach() for parameter in parameters]
            if name != "W_query":
                rows = _one_a_group(rows, H // G, f"{name}.{kind}")
            if len({parameter.requires_grad for parameter in parameters}) > 1:
                raise ConversionError(
                    f"stacked heads must all train or all freeze {name}.{kind} to become one "
                    "split; got a mixture; set requires_grad alike"
                )
            state[f"{name}.{kind}"] = torch.cat(rows).requires_grad_(parameters[0].requires_grad)
    return filled(mha, state, wrapper)


def _check_options(mha: MultiHeadAttention) -> None:
    """Stacked heads are the lecture's: what they cannot do must not be lost."""
    options = {
        "value_head_dim": mha.value_head_dim != mha.head_dim,
        "alibi": mha.alibi,
        "softcap": mha.softcap is not None,
        "sinks": mha.sinks is not None,
        "qk_norm": mha.q_norm is not None,
        "output_gate": mha.W_gate is not None,
    }
    used = [name for name, on in options.items() if on]
    if used:
        raise ConversionError(
            f"stacked heads have no {', '.join(options)}; got a split with {', '.join(used)}; "
            "keep it as it is"
        )


def _projections(mha: MultiHeadAttention) -> dict[str, nn.Linear]:
    """The three projections, separate also where they are fused."""
    for name in ("W_qkv",) if mha.fused else ("W_query", "W_key", "W_value"):
        check_plain(name, getattr(mha, name))
    if mha.fused:
        mha = copy.deepcopy(mha).unfuse()
    return {name: getattr(mha, name) for name in ("W_query", "W_key", "W_value")}


def _heads(wrapper: MultiHeadAttentionWrapper) -> list[CausalAttention]:
    heads: list[CausalAttention] = []
    for index, head in enumerate(wrapper.heads):
        if not isinstance(head, CausalAttention):
            raise ConversionError(
                f"heads[{index}] must be a CausalAttention; got {type(head).__name__}; "
                "merge adapters first"
            )
        for name in ("W_query", "W_key", "W_value"):
            check_plain(f"heads[{index}].{name}", getattr(head, name))
        heads.append(head)
    return heads


def _out_state(module: MultiHeadAttention | MultiHeadAttentionWrapper) -> dict[str, Tensor]:
    if module.out_proj is None:
        return {}
    check_plain("out_proj", module.out_proj)
    return copied("out_proj", module.out_proj)


def _common(heads: list[CausalAttention]) -> CausalAttention:
    """The first head, after checking that the others differ from it in their weights only."""
    first = _options(heads[0])
    for index, head in enumerate(heads):
        for name, option in _options(head).items():
            if option != first[name]:
                raise ConversionError(
                    f"stacked heads must share {name} to become one split; heads[0] has "
                    f"{first[name]!r}, heads[{index}] has {option!r}"
                )
    return heads[0]


def _options(head: CausalAttention) -> dict[str, object]:
    names = ("d_in", "d_out", "context_length", "rope", "mask", "scale", "backend")
    return {name: getattr(head, name) for name in names} | {
        "dropout": head.dropout.p,
        "qkv_bias": head.W_query.bias is not None,
        "dtype": head.W_query.weight.dtype,
        "device": head.W_query.weight.device,
    }


def _one_a_group(rows: list[Tensor], group: int, name: str) -> list[Tensor]:
    """The first of each group's rows, after checking that the group agrees bit for bit."""
    for index, row in enumerate(rows):
        leader = index - index % group
        if not torch.equal(row, rows[leader]):
            raise ConversionError(
                f"heads[{leader}] and heads[{index}] must have equal {name} to share one "
                f"key/value head; they differ by up to {(row - rows[leader]).abs().max():.3g}; "
                "leave num_kv_heads out to keep every head"
            )
    return rows[::group]
