"""Oracle of flash-attn's documented semantics: the formula of one sequence, in float64."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from polyhead.functional import observe


def _one_sequence(
    q, k, v, *, causal=False, window_size=(-1, -1), softcap=0.0, slopes=None, scale=None
):
    """Output (T, H, E) and lse (H, T) of q (T, H, D), k (S, G, D), v (S, G, E), in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    (T, H, D), (S, G, E) = q.shape, v.shape
    left, right = window_size
    output, lse = q.new_zeros(T, H, E), q.new_full((H, T), torch.inf)
    if S == 0:
        return output + 0 * (q.sum() + k.sum() + v.sum()), lse
    rows, sums = [], []
    position = torch.arange(T)[:, None] + S - T
    key = torch.arange(S)
    allowed = torch.ones(T, S, dtype=torch.bool)
    if causal:
        allowed &= key <= position
    if left >= 0:
        allowed &= key >= position - left
    if right >= 0:
        allowed &= key <= position + right
    empty = ~allowed.any(dim=1)
    for h in range(H):
        g = h * G // H
        scores = q[:, h] @ k[:, g].T * (D**-0.5 if scale is None else scale)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if slopes is not None:
            scores = scores - slopes[h].double() * (position - key).abs()
        scores = scores.masked_fill(~allowed & ~empty[:, None], -torch.inf)
        rows.append((torch.softmax(scores, dim=1) @ v[:, g]).masked_fill(empty[:, None], 0.0))
        sums.append(torch.logsumexp(scores, dim=1).masked_fill(empty, torch.inf))
    return torch.stack(rows, dim=1), torch.stack(sums)


@pytest.fixture(scope="session")
def one_sequence():
    """`one_sequence(q, k, v, *, causal=, window_size=, ...)`: output (T, H, E) and lse (H, T)."""
    return _one_sequence


def _batch(q, k, v, *, slopes=None, **options):
    per_row = [
        _one_sequence(
            q[b],
            k[b],
            v[b],
            slopes=slopes if slopes is None or slopes.ndim == 1 else slopes[b],
            **options,
        )
        for b in range(len(q))
    ]
    outputs, sums = zip(*per_row, strict=True)
    return torch.stack(outputs), torch.stack(sums)


@pytest.fixture(scope="session")
def batch():
    """`batch(q, k, v, ...)`: output (B, T, H, E) and lse (B, H, T), row by row."""
    return _batch


@pytest.fixture(scope="session")
def random():
    """`random(*sizes, dtype=, seed=)`: normal numbers."""

    def make(*sizes, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed + sum(sizes))
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)

    return make


@pytest.fixture(scope="session")
def close():
    """`close(actual, exact, factor=1)`: equal up to the rounding of float32 sums."""

    def check(actual, exact, factor=1):
        tolerance = 2e-5 * factor if actual.dtype == torch.float32 else 1e-10
        torch.testing.assert_close(actual.double(), exact.double(), atol=tolerance, rtol=tolerance)

    return check


@pytest.fixture(scope="session")
def cumulative():
    """`cumulative([2, 3])`: cu_seqlens, int32."""
    return lambda lengths: torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.fixture
def observed():
    """`with observed() as calls: ...`: the list of all calls of `attention`."""

    @contextmanager
    def recording():
        calls = []
        with observe(calls.append):
            yield calls

    return recording
