"""Example calls for every mask and score option, with the reference's weights."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import polyhead as ph

B, H, G, D = 2, 6, 2, 8


def masks(T: int, S: int) -> dict[str, ph.mask.Mask | None]:
    by_row = torch.rand(B, 1, T, S, generator=torch.Generator().manual_seed(3)) < 0.5
    causal, window = ph.mask.causal(), ph.mask.window(before=2)
    return {
        "none": None,
        "causal": causal,
        "causal from the start": ph.mask.causal(align="start"),
        "window": ph.mask.window(before=1, after=2),
        "window from the start": ph.mask.window(before=1, after=2, align="start"),
        "lengths": ph.mask.lengths([3, 0]),
        "dense": ph.mask.dense(by_row),
        "dense, one query row": ph.mask.dense(by_row[:, :, :1]),
        "and": causal & window & ph.mask.lengths([S, 3]),
        "or, not": causal | ~window,
        "prefix": causal | ph.mask.prefix(3),
        "left padding": causal & ph.mask.left_padding([0, 2]),
        "documents": ph.mask.documents(torch.arange(S) // 3) if T <= S else None,
        "rows": causal.for_queries(2, 2 + T, T + 5),
        "custom": ph.mask.custom(lambda b, h, q, k: (q + k + h) % 3 > 0, heads=H),
    }


VARIANTS = ("plain", "softcap", "sinks", "alibi", "bias", "bias of one row")


def variant(name: str, T: int, S: int, dtype: torch.dtype) -> dict[str, Tensor | float]:
    options: dict[str, dict[str, Tensor | float]] = {
        "plain": {},
        "softcap": {"softcap": 1.5},
        "sinks": {"sinks": torch.randn(H, dtype=dtype)},
        "alibi": {"alibi_slopes": ph.alibi_slopes(H)},
        "bias": {"bias": torch.randn(1, H, T, S, dtype=dtype)},
        "bias of one row": {"bias": torch.randn(B, 1, 1, S, dtype=dtype)},
    }
    return {"scale": 0.7, **options[name]}


@dataclass
class Example:
    """Arguments of a call, and its weights (B, H, T, S) by the reference in float64."""

    query: Tensor
    key: Tensor
    options: dict[str, object]
    weights: Tensor
    lse: Tensor


def _definition(query: Tensor, key: Tensor, options: dict[str, object]) -> ph.Aux:
    wide = {n: v.double() if isinstance(v, Tensor) else v for n, v in options.items()}
    request = ph.AuxRequest(weights=True, lse=True, stats=True)
    query, key = query.double(), key.double()
    return ph.attention(query, key, key, **wide, backend="reference", return_aux=request)[1]


@pytest.fixture(params=sorted(masks(2, 2)))
def mask(request):
    """Name of a mask, parametrized over all."""
    return request.param


@pytest.fixture(params=VARIANTS)
def options(request):
    """Name of a score option, parametrized over all."""
    return request.param


@pytest.fixture
def example():
    """`example(T, S, mask=, options=, dtype=)`: an `Example`."""

    def build(T, S, mask="causal", options="plain", dtype=torch.float64) -> Example:
        torch.manual_seed(1)
        query = torch.randn(B, H, T, D, dtype=dtype)
        key = torch.randn(B, G, S, D, dtype=dtype)
        asked = {"mask": masks(T, S)[mask], **variant(options, T, S, dtype)}
        aux = _definition(query, key, asked)
        return Example(query, key, asked, aux.weights, aux.lse)

    return build


@pytest.fixture
def tolerance():
    """`tolerance(lse, dtype)`: the allowed error of a weight exp(score - lse).

    Scores and lse are rounded, each to half a unit in its last place, whatever sums them: twice
    that for the two of a share, and a few units of 1 for the sum.
    """

    def allowed(lse: Tensor, dtype: torch.dtype) -> float:
        finite = lse[lse.isfinite()].abs()
        largest = finite.max().item() if len(finite) else 0.0
        return 8 * torch.finfo(dtype).eps * (1.0 + largest)

    return allowed
