"""What crosses the border to a backend: one frozen `AttentionCall`, and what comes back as `Aux`.

Shape legend, for the whole library:

    B  batch rows
    H  query heads
    G  key/value heads; H = G * group, and query head h uses key head h // group
    T  query tokens
    S  key tokens
    D  head size of queries and keys
    E  head size of values

Layout is (B, heads, tokens, size), as in `torch.nn.functional.scaled_dot_product_attention`.
Shape suffixes in dense code say the layout: `scores_bhts` is (B, H, T, S).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from polyhead.cache_view import CacheView
from polyhead.mask import Mask

__all__ = ["NO_AUX", "AttentionCall", "Aux", "AuxRequest", "HeadStats"]


@dataclass(frozen=True)
class AuxRequest:
    """What to return beside the output. Asking never changes the output.

    Args:
        weights: the attention weights before dropout, (B, H, T, S). They cost T x S memory.
        lse: the log-sum-exp of each query's scores, (B, H, T).
        stats: what each head does, as a `HeadStats`.
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
        """The names of what is asked for."""
        if not (self.weights or self.lse or self.stats or self.mean_weights):
            return ()
        names = ("weights", "lse", "stats", "mean_weights")
        return tuple(name for name in names if getattr(self, name))


@dataclass(frozen=True, eq=False)
class HeadStats:
    """What each head does, for every query: tensors of shape (B, H, T), in the compute dtype.

    Distances are between absolute positions: query t of T against S keys stands at S - T + t.
    A query with nothing to attend to has zeros, and max_logit -inf.

    Attributes:
        entropy: of the weights, in nats; 0 when all weight is on one key.
        mean_distance: weighted mean of |query position - key position|, in tokens.
        mass_first: weight on key 0 (an "attention sink").
        mass_previous: weight on the key just before the query's position.
        mass_self: weight on the key at the query's own position.
        max_logit: the largest score that was allowed, after scale, softcap and bias.
    """

    entropy: Tensor
    mean_distance: Tensor
    mass_first: Tensor
    mass_previous: Tensor
    mass_self: Tensor
    max_logit: Tensor

    def per_head(self) -> dict[str, Tensor]:
        """One number a head: the mean over batch rows and queries, (H,); the largest max_logit."""
        means = {f.name: getattr(self, f.name).mean(dim=(0, 2)) for f in fields(self)}
        means["max_logit"] = self.max_logit.amax(dim=(0, 2))
        return means


@dataclass(frozen=True, eq=False)
class Aux:
    """What was asked for with an `AuxRequest`; None where it was not.

    Attributes:
        weights: (B, H, T, S) in the call's dtype, before dropout. Rows sum to 1, or to 0 where a
            query has nothing to attend to, or to 1 less the sink's share.
        lse: (B, H, T), log of the sum of exp(score) over the keys a query may attend to, sinks
            left out; -inf where there are none. float32, or float64 for float64 calls.
        stats: a `HeadStats`.
        mean_weights: (B, T, S) in the call's dtype, the mean of weights over heads.
    """

    weights: Tensor | None = None
    lse: Tensor | None = None
    stats: HeadStats | None = None
    mean_weights: Tensor | None = None


NO_AUX = Aux()


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """Everything that was asked of `attention()`, checked. Backends read it; nobody changes it.

    Attributes:
        query, key, value: (B, H, T, D), (B, G, S, D), (B, G, S, E); one dtype, one device.
        mask: who may attend, or None for everybody.
        bias: added to the scaled (and capped) scores; broadcasts to (B, H, T, S). Or None.
        scale: factor on the scores.
        softcap: scores become softcap * tanh(scores / softcap). Or None.
        sinks: (H,) one extra logit a head that takes weight and gives no value. Or None.
        alibi_slopes: (H,) float32; a score falls by slope * |query position - key position|. Or
            None.
        dropout: probability with which a weight is dropped; kept ones grow by 1 / (1 - dropout).
        aux: what to return beside the output.
        cache_views: (key, value) where a cache holds them; then `key` and `value` have the shapes,
            dtype and device, and NaN for numbers. A `Backend` gets this only if it
            `reads_cache_views`; others get the call `materialized()`.
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
        """Query heads that share one key/value head."""
        return self.H // self.G

    @property
    def dtype(self) -> torch.dtype:
        return self.query.dtype

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """Scores and sums are kept in float32, or in float64 when the call is."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that a gradient can be asked of, by name; the optional ones where given."""
        given = {"query": self.query, "key": self.key, "value": self.value}
        for name in ("bias", "sinks", "alibi_slopes"):
            if (tensor := getattr(self, name)) is not None:
                given[name] = tensor
        return given

    @property
    def grad_names(self) -> tuple[str, ...]:
        """The names of the tensors that a gradient will be asked of."""
        if not torch.is_grad_enabled():
            return ()
        return tuple(name for name, tensor in self.tensors.items() if tensor.requires_grad)

    @property
    def needs_grad(self) -> bool:
        """Whether a gradient will be asked of any tensor of this call."""
        return bool(self.grad_names)

    def materialized(self) -> AttentionCall:
        """The same call, with keys and values made of what a cache holds."""
        if self.cache_views is None:
            return self
        key, value = self.cache_views
        return replace(self, key=key.gather(), value=value.gather(), cache_views=None)

    def without_aux(self) -> AttentionCall:
        """The same call, asking for the output only."""
        return replace(self, aux=AuxRequest())
