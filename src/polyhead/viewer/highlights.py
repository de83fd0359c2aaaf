"""Highlights of a report: the strongest heads of each kind, with an example from the text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from polyhead.look import HeadReport, LayerReport
from polyhead.look.top_keys import most_attended

__all__ = ["KINDS", "Example", "Highlight", "highlights"]

# Head kinds, and the statistic by which the heads of each are ranked.
KINDS = {
    "induction": "mass_induction",
    "previous token": "mass_previous",
    "local": "mass_recent",
    "multiple sinks": "mass_sinks",
    "other": "effective_keys",
    "sink": "mass_first",
}


@dataclass(frozen=True)
class Example:
    """A query and a key by their positions in the text, and the weight between them."""

    query: int
    key: int
    weight: float


@dataclass(frozen=True)
class Highlight:
    """One head: its kind, its statistics, and the example with the largest weight."""

    layer: int
    head: int
    name: str
    numbers: dict[str, float]
    example: Example | None


def highlights(report: HeadReport, n: int = 10) -> tuple[Highlight, ...]:
    """Return n heads round-robin over kinds: the best of each kind, the second best of each, ...

    The result is grouped by kind. The best head of a kind has the largest statistic of `KINDS`:
    the induction head with the largest `mass_induction` and so on; "other" heads are ranked by
    `effective_keys`. Of heads equal to two decimals, the one with fewer effective keys is first.

    >>> import torch
    >>> import polyhead as ph
    >>> mha = ph.MultiHeadAttention(8, 8, context_length=200, dropout=0.0, num_heads=2)
    >>> report = ph.look.capture(mha, torch.zeros(1, 200, 8))        # equal weights
    >>> [(head.layer, head.head, head.name) for head in highlights(report, n=2)]
    [(0, 0, 'other'), (0, 1, 'other')]
    """
    rows = report.rows()
    kinds = [
        sorted(
            (row for row in rows if row["name"] == name),
            key=lambda row: (-round(row[number], 2), row["effective_keys"]),
        )
        for name, number in KINDS.items()
    ]
    round_robin = [row for rank in zip_longest(*kinds) for row in rank if row is not None]
    layers = {layer.index: layer for layer in report.layers}
    found = []
    for row in sorted(round_robin[:n], key=lambda row: list(KINDS).index(row["name"])):
        numbers = {k: v for k, v in row.items() if k not in ("layer", "head", "name")}
        example = _example(report, layers[row["layer"]], row["head"], row["name"])
        found.append(Highlight(row["layer"], row["head"], row["name"], numbers, example))
    return tuple(found)


def _example(report: HeadReport, layer: LayerReport, head: int, name: str) -> Example | None:
    """Return the head's largest weight that is typical of its kind, if there is any."""
    if not layer.is_input:  # its tokens are not the report's
        return None
    at = layer.heads.index(head)
    keys, weights = layer.keys[at].long(), layer.key_weights[at]
    queries = torch.arange(len(keys))[:, None]
    shows = (keys >= 0) & _SHOWS[name](report.token_ids, queries, keys)
    if name == "multiple sinks":
        shows &= torch.isin(keys, most_attended(keys, weights).keys)
    if not shows.any():
        return None
    place = int(torch.where(shows, weights, -1.0).argmax())
    query, rank = divmod(place, weights.shape[1])
    return Example(query, int(keys[query, rank]), weights[query, rank].item())


def _after_the_same(ids: Tensor | None, queries: Tensor, keys: Tensor) -> Tensor:
    if ids is None or len(ids) != len(queries):
        return torch.zeros_like(keys, dtype=torch.bool)
    return (keys >= 1) & (keys <= queries) & (ids[(keys - 1).clamp(min=0)] == ids[queries])


# The first token is left out of kinds for which it may be a mere sink.
_SHOWS: dict[str, Callable[[Tensor | None, Tensor, Tensor], Tensor]] = {
    "induction": _after_the_same,
    "previous token": lambda ids, q, k: (k == q - 1) & (k > 0),
    "local": lambda ids, q, k: (k > 0) & (k < q) & (q - k < 16),
    "multiple sinks": lambda ids, q, k: (k > 0) & (q - k >= 16),
    "other": lambda ids, q, k: (k > 0) & (q - k >= 16),
    "sink": lambda ids, q, k: (k == 0) & (2 * q >= len(q)),
}


def as_dict(report: HeadReport) -> dict[str, Any]:
    """Return the JSON of `polyhead look --json`: all heads, and the highlights."""
    return {
        "model": report.model,
        "tokens": report.tokens,
        "heads": report.rows(),
        "highlights": [asdict(head) for head in highlights(report)],
    }
