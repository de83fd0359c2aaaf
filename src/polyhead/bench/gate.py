"""Correctness gate: every peer's output and gradients are checked against float64 before timing.

The tolerance is twice the largest error of an eager run in the same dtype, plus 4 units in the last
place of the largest value: a peer need not be better than eager attention, nor may it be worse.
For attention's output, where thousands of values may cancel, that value is the largest sum of their
magnitudes: sums round in proportion to the magnitudes added (Higham 2002, section 4.2).

Everything is checked at the measured size, with these exceptions, named in `scope`: a long forward
pass on a sample of queries (all heads, including the first and last query); a decoder on a shorter
prompt; dropout by the same call without it, plus a test that it drops and scales correctly.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from polyhead.bench.cases import Case, Inputs
from polyhead.bench.peers.attention import Peer, Results, Run, eager_attention, eager_weights
from polyhead.bench.peers.registry import definition_of

__all__ = ["Check", "Gate", "gate"]

# Scores of the float64 run per chunk.
_CELLS = 2**24
_QUERIES = 64
_PROMPT = 64


@dataclass(frozen=True)
class Check:
    """Error of one tensor of a peer against float64."""

    what: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed

    def __str__(self) -> str:
        return f"{self.what} is off by {self.error:.2g}, allowed are {self.allowed:.2g}"


@dataclass(frozen=True)
class Gate:
    """Result of the gate: its scope, the checks of each peer, and the seconds of its first call."""

    scope: str
    checks: Mapping[str, tuple[Check, ...]]
    seconds: Mapping[str, float]

    def faults(self, name: str) -> tuple[Check, ...]:
        return tuple(check for check in self.checks[name] if not check.ok)


def gate(case: Case, prepared: Mapping[Peer, Run], inputs: Inputs) -> Gate:
    """Check every prepared peer against float64.

    Args:
        case: the case to measure.
        prepared: the calls that will be measured, by peer.
        inputs: the inputs with which they were prepared.
    """
    if case.kind == "generate":
        S = min(_PROMPT, case.S)
        small = replace(case, S=S, T=S if case.prompt else 1)
        inputs = small.inputs(seed=0)
        prepared = {peer: peer.prepare(small, inputs) for peer in prepared}
        return _compare(small, prepared, inputs, f"prompts of {small.S} tokens")
    if not case.dropout:
        return _compare(case, prepared, inputs, "all of it")
    certain = replace(case, dropout=0.0)
    kept = {peer: peer.prepare(certain, inputs) for peer in prepared}
    result = _compare(certain, kept, inputs, "without dropout, and how much is dropped")
    checks = {
        peer.name: (*result.checks[peer.name], *_dropout_checks(peer, case, inputs))
        for peer in prepared
    }
    return replace(result, checks=checks)


def _compare(case: Case, prepared: Mapping[Peer, Run], inputs: Inputs, scope: str) -> Gate:
    if case.kind == "attention" and not case.train:
        rows = _query_rows(case)
        if len(rows) < case.T:
            scope = f"{len(rows)} of {case.T} queries"
        exact = _attention_rows(case, inputs, rows, torch.float64)
        eager = _attention_rows(case, inputs, rows, case.dtype)
        magnitudes = inputs | {"value": inputs["value"].abs()}
        summed = _attention_rows(case, magnitudes, rows, torch.float64)["output"]
        sizes = {"output": summed.max().item()}
    else:
        rows, sizes = None, {}
        definition = definition_of(case)
        exact = _exact(case, inputs)
        eager = definition.compared(case, definition.prepare(case, inputs)())
    checks, seconds = {}, {}
    for peer, run in prepared.items():
        start = time.perf_counter()
        results = run()
        seconds[peer.name] = time.perf_counter() - start
        results = peer.compared(case, results)
        if rows is not None:
            results = {name: tensor[:, :, rows] for name, tensor in results.items()}
        checks[peer.name] = _checks(peer, results, eager, exact, sizes)
    return Gate(scope, checks, seconds)


def _checks(
    peer: Peer, results: Results, eager: Results, exact: Results, sizes: Mapping[str, float]
) -> tuple[Check, ...]:
    """Checks of one peer; `sizes` has the magnitude of a sum's terms where it exceeds the sum."""
    checks = []
    for name in exact:
        # Statistics are requested of polyhead only. Any other missing result is an error.
        if name == "entropy" and not peer.ours:
            continue
        largest = sizes.get(name, exact[name].abs().max().item())
        allowed = 2 * _error(eager[name], exact[name])
        allowed += 4 * torch.finfo(eager[name].dtype).eps * largest
        error = _error(results[name], exact[name]) if name in results else float("inf")
        checks.append(Check(name, error, allowed))
        if name in results and results[name].dtype != eager[name].dtype:
            checks.append(Check(f"{name}'s dtype {results[name].dtype}", float("inf"), 0.0))
    return tuple(checks)


def _error(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute difference; infinite for NaN or another shape."""
    if actual.shape != exact.shape:
        return float("inf")
    error = (actual.double() - exact).abs().max().item()
    return error if error == error else float("inf")


def _query_rows(case: Case) -> list[int]:
    """Evenly spaced queries, first and last included, within the memory of the float64 run."""
    most = _CELLS // (case.B * case.H * case.S)
    if most >= case.T:
        return list(range(case.T))
    most = max(2, min(_QUERIES, most))
    return [i * (case.T - 1) // (most - 1) for i in range(most)]


def _attention_rows(case: Case, inputs: Inputs, rows: list[int], dtype: torch.dtype) -> Results:
    query, key, value = (inputs[name].to(dtype) for name in ("query", "key", "value"))
    query, forbidden = query[:, :, rows], None
    if case.mask is not None:
        allowed = [case.mask.materialize_rows(row, row + 1, case.T, case.S) for row in rows]
        forbidden = ~torch.cat(allowed)
    results = {"output": eager_attention(query, key, value, forbidden)}
    if case.statistics:
        # Statistics are computed in float32 whatever the dtype.
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weights = eager_weights(query.to(wide), key.to(wide), forbidden)
        results["entropy"] = torch.special.entr(weights).sum(dim=-1)
    return results


def _exact(case: Case, inputs: Inputs) -> Results:
    """Run the eager peer in float64, one batch row at a time to limit memory."""
    definition, parts = definition_of(case), []
    for b in range(case.B):
        one = replace(case, B=1, dtype=torch.float64)
        row = {
            name: (tensor if name in _WEIGHTS else tensor[b : b + 1])
            for name, tensor in inputs.items()
        }
        row = {n: t.double() if t.is_floating_point() else t for n, t in row.items()}
        parts.append(definition.compared(one, definition.prepare(one, row)()))
    stacked = {name: [part[name] for part in parts] for name in parts[0]}
    return {
        name: torch.stack(rows).sum(dim=0) if name in _SUMS else torch.cat(rows)
        for name, rows in stacked.items()
    }


_WEIGHTS = frozenset({"qkv_weight", "out_weight", "out_bias"})
_SUMS = frozenset({"dqkv_weight", "dout_weight", "dout_bias"})


def _dropout_checks(peer: Peer, case: Case, inputs: Inputs) -> tuple[Check, Check]:
    """Check dropout: with values of one, the outputs have a mean of one but are not all one."""
    ones = inputs | {"value": torch.ones_like(inputs["value"])}
    output = peer.prepare(case, ones)()["output"].double()
    kept = case.B * case.H * case.T
    # A row's variance is at most p / (1 - p); the mean may differ by 5 standard deviations.
    allowed = 5 * (case.dropout / (1 - case.dropout) / kept) ** 0.5
    varies = output.std().item() > torch.finfo(case.dtype).eps * 100
    return (
        Check("the mean of what dropout keeps", abs(output.mean().item() - 1), allowed),
        Check("that dropout drops", 0.0 if varies else float("inf"), 0.0),
    )
