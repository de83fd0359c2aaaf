"""Attention peers: polyhead, SDPA and eager attention, each as a `Peer`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.backends import BACKENDS, Backend
from polyhead.bench.cases import Case, Inputs
from polyhead.bench.machine.describe import available_bytes
from polyhead.call import AuxRequest
from polyhead.functional import attention, explain

__all__ = [
    "EAGER",
    "OUTPUT_ONLY",
    "POLYHEAD",
    "SDPA",
    "Peer",
    "Results",
    "Run",
    "attention_run",
    "chosen_backend",
    "eager_attention",
    "eager_weights",
    "scores_reasons",
]

# Results of a call by name: "output", and in training "dquery" and so on.
Results = dict[str, Tensor]
Run = Callable[[], Results]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """One implementation of a case.

    Attributes:
        name: its name in tables.
        why_not: every reason why it cannot run a case; empty if it can.
        prepare: does the one-time setup and returns the call to measure.
        compared: converts a run's results to the names and layout common to all peers.
        backend: the kernel that runs, where the peer chooses between several.
        ours: True for polyhead.
        compiles: True if its first call compiles.
    """

    name: str
    why_not: Callable[[Case], list[str]]
    prepare: Callable[[Case, Inputs], Run]
    compared: Callable[[Case, Results], Results] = lambda case, results: results
    backend: Callable[[Case], str] = lambda case: ""
    ours: bool = False
    compiles: bool = False


def attention_run(case: Case, inputs: Inputs, attend: Attend) -> Run:
    """Return the call to measure: `attend`, and its gradients in training."""
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    if not case.train:
        return lambda: {"output": attend(query, key, value)}
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]

    def forward_and_backward() -> Results:
        output = attend(*leaves)
        dquery, dkey, dvalue = torch.autograd.grad(output, leaves, inputs["grad"])
        return {"output": output.detach(), "dquery": dquery, "dkey": dkey, "dvalue": dvalue}

    return forward_and_backward


def scores_reasons(case: Case, bytes_per_score: int) -> list[str]:
    """Reasons why a peer that materializes all T x S scores does not fit in memory."""
    need = case.B * case.H * case.T * case.S * bytes_per_score
    free = available_bytes()
    if free is None or need <= free / 2:
        return []
    return [f"would hold {need / 2**30:.0f} GiB of T x S scores; {free / 2**30:.0f} GiB are free"]


def _prepare_polyhead(case: Case, inputs: Inputs) -> Run:
    mask, dropout = case.mask, case.dropout
    if not case.statistics:
        return attention_run(
            case, inputs, lambda q, k, v: attention(q, k, v, mask=mask, dropout=dropout)
        )
    request = AuxRequest(stats=True)

    def with_statistics() -> Results:
        output, aux = attention(
            inputs["query"], inputs["key"], inputs["value"], mask=mask, return_aux=request
        )
        assert aux.stats is not None
        return {"output": output, "entropy": aux.stats.entropy}

    return with_statistics


def chosen_backend(case: Case) -> str:
    """Name of the backend that polyhead chooses for this case."""
    query = torch.empty(case.B, case.H, case.T, case.D, dtype=case.dtype)
    key = torch.empty(case.B, case.G, case.S, case.D, dtype=case.dtype)
    with torch.set_grad_enabled(case.train):
        return str(
            explain(
                query.requires_grad_(case.train), key, key, mask=case.mask, dropout=case.dropout
            ).chosen
        )


def _backend(case: Case) -> Backend:
    name = chosen_backend(case)
    return next(backend for backend in BACKENDS if backend.name == name)


def _polyhead_reasons(case: Case) -> list[str]:
    chosen = _backend(case)
    written_out = chosen.name == "reference" or (case.statistics and "stats" not in chosen.aux)
    return scores_reasons(case, 32) if written_out else []


def _plain(case: Case) -> Case:
    return replace(case, statistics=False)


def _backends(case: Case) -> str:
    chosen = _backend(case)
    apart = case.statistics and "stats" not in chosen.aux
    return f"{chosen.name}, reference" if apart else chosen.name


POLYHEAD = Peer("polyhead", _polyhead_reasons, _prepare_polyhead, backend=_backends, ours=True)

OUTPUT_ONLY = Peer(
    "output only",
    lambda case: _polyhead_reasons(_plain(case)),
    lambda case, inputs: _prepare_polyhead(_plain(case), inputs),
    backend=chosen_backend,
)


def _prepare_sdpa(case: Case, inputs: Inputs) -> Run:
    mask = case.mask
    allowed = None if mask is None or case.window is None else mask.materialize(case.T, case.S)
    is_causal = mask is not None and allowed is None

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=allowed,
            dropout_p=case.dropout,
            is_causal=is_causal,
            enable_gqa=case.H != case.G,
        )

    return attention_run(case, inputs, attend)


SDPA = Peer(
    "sdpa",
    # With dropout, torch takes its math path, which materializes the scores.
    lambda case: scores_reasons(case, 5 * case.dtype.itemsize if case.dropout else 1),
    _prepare_sdpa,
)


def _prepare_eager(case: Case, inputs: Inputs) -> Run:
    mask = case.mask
    forbidden = None if mask is None else ~mask.materialize(case.T, case.S)
    return attention_run(
        case, inputs, lambda q, k, v: eager_attention(q, k, v, forbidden, case.dropout)
    )


def eager_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    forbidden: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Eager attention, (B, H, T, E): the exact result in float64, and a peer."""
    B, H, T, _ = query.shape
    G, S, E = value.shape[1:]
    weights_bhts = eager_weights(query, key, forbidden)
    if dropout:
        weights_bhts = F.dropout(weights_bhts, dropout)
    return (weights_bhts.reshape(B, G, H // G * T, S) @ value).reshape(B, H, T, E)


def eager_weights(query: Tensor, key: Tensor, forbidden: Tensor | None = None) -> Tensor:
    """Return the attention weights, (B, H, T, S).

    The heads of a group are rows of one product, so that no KV head is repeated.
    """
    B, H, T, D = query.shape
    G, S = key.shape[1:3]
    query_bgrd = query.reshape(B, G, H // G * T, D)
    scores_bhts = (query_bgrd @ key.mT).reshape(B, H, T, S) * D**-0.5
    if forbidden is not None:
        scores_bhts = scores_bhts.masked_fill(forbidden, float("-inf"))
    return torch.softmax(scores_bhts, dim=-1)


EAGER = Peer(
    "eager",
    lambda case: scores_reasons(case, (5 if case.train else 3) * case.dtype.itemsize),
    _prepare_eager,
)
