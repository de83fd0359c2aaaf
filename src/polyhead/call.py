"""Backend interface: the frozen `AttentionCall` that a backend receives, and the `Aux` it returns.

Shape legend, for the whole library:

    B  batch rows
    H  query heads
    G  key/value heads; H = G * group, and query head h uses KV head h // group
    T  query tokens
    S  key tokens
    D  head size of queries and keys
    E  head size of values

Layout is (B, heads, tokens, size), as in `torch.nn.functional.scaled_dot_product_attention`.
Shape suffixes in dense code give the layout: `scores_bhts` is (B, H, T, S).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, replace

import torch
from torch import Tensor

from polyhead.cache_view import CacheView
from polyhead.mask import Mask
from polyhead.type_hints import MaybeNone

__all__ = ["BACKEND_STATS", "NO_AUX", "AttentionCall", "Aux", "AuxRequest", "HeadStats"]


@dataclass(frozen=True)
class AuxRequest:
    """Request for auxiliary results in addition to the output, which it never changes.

    Args:
        weights: the attention weights before dropout, (B, H, T, S). They cost T x S memory.
        lse: the log-sum-exp of each query's scores, (B, H, T).
        stats: per-head statistics, as a `HeadStats`.
        mean_weights: the mean of the weights over heads, (B, T, S).

    >>> AuxRequest(weights=True)
    AuxRequest(weights=True, lse=False, stats=False, mean_weights=False)
    """

    weights: bool = False
    lse: bool = False
    stats: bool = False
    mean_weights: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the requested results."""
        if not (self.weights or self.lse or self.stats or self.mean_weights):
            return ()
        names = ("weights", "lse", "stats", "mean_weights")
        return tuple(name for name in names if getattr(self, name))


@dataclass(frozen=True, eq=False)
class HeadStats:
    """Attention statistics per head and query: (B, H, T) tensors in the compute dtype.

    `attention(..., return_aux=)` computes the six without a default; `look.stats` computes all.
    Distances are between absolute positions: query t of T against S keys has position S - T + t,
    or query_offset + t.
    A query with no key to attend to has zeros; max_logit and lse are -inf there.

    Attributes:
        entropy: entropy of the weights, in nats; 0 if all weight is on one key.
        mean_distance: weighted mean of |query position - key position|, in tokens.
        mass_first: weight on key 0 (an "attention sink").
        mass_previous: weight on the key just before the query's position.
        mass_self: weight on the key at the query's own position.
        max_logit: the largest unmasked score, after scale, softcap and bias.
        mass_recent: weight on the last 16 tokens: the query's own position and the 15 before it.
        mass_same_token: weight on earlier keys of the query's own token. None without token ids.
        mass_induction: weight on the keys that follow an earlier occurrence of the query's token:
            what came next last time. None without token ids.
        repeats: (B or 1, 1, T) True if the query's token came before: if there are such keys.
        lse: the log-sum-exp of the scores, sinks left out.
    """

    entropy: Tensor
    mean_distance: Tensor
    mass_first: Tensor
    mass_previous: Tensor
    mass_self: Tensor
    max_logit: Tensor
    mass_recent: Tensor | None = None
    mass_same_token: Tensor | None = None
    mass_induction: Tensor | None = None
    repeats: Tensor | None = None
    lse: Tensor | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The statistics by name, without those that are None."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    @property
    def effective_keys(self) -> Tensor:
        """exp(entropy): the number of equally weighted keys with this entropy."""
        return torch.exp(self.entropy)

    def per_head(self) -> dict[str, Tensor]:
        """One value per head by name, (H,): the mean over the queries that attend to a key.

        `mass_same_token` and `mass_induction` are means over the queries whose token came before;
        `max_logit` is the largest. `effective_keys` is included; fields that are None are not.
        """
        attends = self.max_logit != -torch.inf
        means = {}
        for name in _PER_HEAD:
            values = getattr(self, name)
            if name == "max_logit":
                means[name] = values.amax(dim=(0, 2))
            elif name in ("mass_same_token", "mass_induction"):
                if values is not None and self.repeats is not None:
                    means[name] = _mean(values, attends & self.repeats)
            elif values is not None:
                means[name] = _mean(values, attends)
        return means

    @staticmethod
    def concat(parts: Sequence[HeadStats], dim: int) -> HeadStats:
        """Return the backend statistics of several calls as one: dim 1 for heads, 2 for queries."""
        joined = (torch.cat([getattr(p, name) for p in parts], dim=dim) for name in BACKEND_STATS)
        return HeadStats(*joined)


# The statistics that a backend computes, in the order of the kernels.
BACKEND_STATS = tuple(field.name for field in fields(HeadStats) if field.default is MISSING)

_PER_HEAD = (
    "entropy",
    "effective_keys",
    "mean_distance",
    "mass_first",
    "mass_previous",
    "mass_self",
    "mass_recent",
    "mass_same_token",
    "mass_induction",
    "max_logit",
    "lse",
)


def _mean(values_bht: Tensor, where_bht: Tensor) -> Tensor:
    total = values_bht.masked_fill(~where_bht, 0.0).sum(dim=(0, 2))
    return total / where_bht.sum(dim=(0, 2)).clamp(min=1)


@dataclass(frozen=True, eq=False)
class Aux:
    """Auxiliary results, as requested by an `AuxRequest`; the others are None.

    Attributes:
        weights: (B, H, T, S) in the call's dtype, before dropout. Rows sum to 1, to 0 if a query
            has no key to attend to, or with a sink to 1 less the sink's share.
        lse: (B, H, T), log of the sum of exp(score) over the keys a query may attend to, without
            sinks; -inf if there are none. float32, or float64 for float64 calls.
        stats: a `HeadStats`.
        mean_weights: (B, T, S) in the call's dtype, the mean of weights over heads.
    """

    weights: Tensor | MaybeNone = None
    lse: Tensor | MaybeNone = None
    stats: HeadStats | MaybeNone = None
    mean_weights: Tensor | MaybeNone = None


NO_AUX = Aux()


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """Validated arguments of `attention()`, which backends read. Immutable.

    Attributes:
        query, key, value: (B, H, T, D), (B, G, S, D), (B, G, S, E); one dtype, one device.
        mask: a `Mask`, or None: every query may attend to all keys.
        bias: added to the scaled (and capped) scores; broadcasts to (B, H, T, S). Or None.
        scale: factor on the scores.
        softcap: scores become softcap * tanh(scores / softcap). Or None.
        sinks: (H,) one extra logit per head, which takes weight and adds no value. Or None.
        alibi_slopes: (H,) float32; subtracts slope * |query position - key position| from a score.
            Or None.
        dropout: probability of dropping a weight; kept ones are multiplied by 1 / (1 - dropout).
        aux: results to return in addition to the output.
        query_offset: position of query 0 among the keys, an int, or (B,) integers if it differs by
            batch row. None: S - T.
        cache_views: (key, value) in a cache, or None. With it, `key` and `value` are NaN
            placeholders of the right shape, dtype and device. A `Backend` receives it only if it
            `reads_cache_views`; others receive the call `materialized()`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Mask | None
    bias: Tensor | None
    scale: float
    softcap: float | None
    sinks: Tensor | None
    alibi_slopes: Tensor | None
    dropout: float
    aux: AuxRequest
    query_offset: int | Tensor | None = None
    cache_views: tuple[CacheView, CacheView] | None = None

    @property
    def B(self) -> int:
        return self.query.shape[0]

    @property
    def H(self) -> int:
        return self.query.shape[1]

    @property
    def G(self) -> int:
        return self.key.shape[1]

    @property
    def T(self) -> int:
        return self.query.shape[2]

    @property
    def S(self) -> int:
        return self.key.shape[2]

    @property
    def D(self) -> int:
        return self.query.shape[3]

    @property
    def E(self) -> int:
        return self.value.shape[3]

    @property
    def group(self) -> int:
        """Number of query heads per KV head."""
        return self.H // self.G

    @property
    def first_position(self) -> int | Tensor:
        """Position of query 0 among the keys; (B,) if it differs by batch row."""
        return self.S - self.T if self.query_offset is None else self.query_offset

    @property
    def dtype(self) -> torch.dtype:
        return self.query.dtype

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of scores and sums: float64 for float64 calls, else float32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Differentiable tensors by name, with the optional ones that are given."""
        given = {"query": self.query, "key": self.key, "value": self.value}
        for name in ("bias", "sinks", "alibi_slopes"):
            if (tensor := getattr(self, name)) is not None:
                given[name] = tensor
        return given

    @property
    def grad_names(self) -> tuple[str, ...]:
        """Names of the tensors that require grad; empty if grad mode is off."""
        if not torch.is_grad_enabled():
            return ()
        return tuple(name for name, tensor in self.tensors.items() if tensor.requires_grad)

    @property
    def needs_grad(self) -> bool:
        """True if any tensor of this call requires grad."""
        return bool(self.grad_names)

    def key_range(self, start: int, stop: int) -> tuple[int, int]:
        """Range (first, last) of the keys that queries start .. stop - 1 may attend to."""
        if self.mask is None:
            return 0, self.S
        return self.mask.key_range(start, stop, self.T, self.S, self.query_offset)

    def allowed(self, start: int, stop: int, keys: tuple[int, int]) -> Tensor | None:
        """The mask of these queries and keys, materialized; None: there is no mask."""
        if self.mask is None:
            return None
        return self.mask.materialize_rows(
            start,
            stop,
            self.T,
            self.S,
            keys=keys,
            query_offset=self.query_offset,
            device=self.device,
        )

    def materialized(self) -> AttentionCall:
        """Return the same call with cached keys and values materialized as tensors."""
        if self.cache_views is None:
            return self
        key, value = (view.materialize_valid() for view in self.cache_views)
        return replace(self, key=key, value=value, cache_views=None)

    def without_aux(self) -> AttentionCall:
        """Return the same call, with a request for the output only."""
        return replace(self, aux=AuxRequest())
