"""JSON data of the page."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from polyhead.errors import ArgumentError
from polyhead.look.maps import bin_edges
from polyhead.look.page.encode import pack_keys, pack_maps
from polyhead.look.page.legend import KINDS, NUMBERS

if TYPE_CHECKING:
    from polyhead.look.report import HeadReport, LayerReport

__all__ = ["BUDGET", "payload"]

BUDGET = 4_800_000  # characters, of a page under 5 MB
_MAPS_SHARE = 0.25  # of the budget after the text, where keys are included too


def payload(report: HeadReport, *, budget: int = BUDGET) -> dict[str, Any]:
    """Return the data of the page as a JSON dictionary, `maps` and `keys` as detailed as fits.

    Args:
        report: from `capture`. A layer over other tokens than the report's own, such as
            cross-attention, is left out: `left_out` has its name.
        budget: the most characters of JSON; texts and numbers are never shortened.

    Raises:
        ArgumentError: there are no tokens or not those of the model's input, or all layers are
            left out.
    """
    tokens = _tokens(report)
    if not tokens:
        raise ArgumentError("report", "must be of a text", "no tokens", "capture a text")
    layers = [layer for layer in report.layers if _reads_itself(layer, len(tokens))]
    if not layers:
        raise ArgumentError(
            "report",
            "must have a layer that attends to the text itself",
            f"{len(report.layers)} layers over other keys than the {len(tokens)} tokens",
            "report the self-attention of a model",
        )
    rows = [row for row in report.rows() if row["layer"] in {layer.index for layer in layers}]
    known = [name for name in NUMBERS if any(name in row for row in rows)]
    data: dict[str, Any] = {
        "format": 1,
        "model": report.model,
        "tokens": tokens,
        "layers": [{"index": layer.index, "name": layer.name} for layer in layers],
        "heads": [[row["layer"], row["head"]] for row in rows],
        "kinds": [row["name"] for row in rows],
        "numbers": {name: [_rounded(row.get(name)) for row in rows] for name in known},
        "legend": {
            "kinds": KINDS,
            "numbers": {
                name: dict(zip(("label", "unit", "says"), NUMBERS[name], strict=True))
                for name in known
            },
        },
        "left_out": [layer.name for layer in report.layers if layer not in layers],
        "keys": None,
    }
    left = budget - len(json.dumps(data))
    maps = [cells for layer in layers for cells in layer.map]
    edges = bin_edges(len(tokens), len(maps[0])).tolist()
    pooled = len(maps[0]) < len(tokens)
    data["maps"] = pack_maps(maps, edges, int(left * _MAPS_SHARE) if pooled else left)
    if len(data["maps"]["edges"]) <= len(tokens):
        keys = [keys for layer in layers for keys in layer.keys]
        weights = [weights for layer in layers for weights in layer.key_weights]
        data["keys"] = pack_keys(keys, weights, left - len(json.dumps(data["maps"])))
        if pooled:  # with the characters that the keys left over
            data["maps"] = pack_maps(maps, edges, left - len(json.dumps(data["keys"])))
    return data


def _tokens(report: HeadReport) -> list[str]:
    read = report.token_ids
    T = len(read) if read is not None else report.layers[0].keys.shape[1]
    if report.tokens and len(report.tokens) != T:
        raise ArgumentError(
            "report.tokens",
            f"must be one for each of the {T} tokens that the model read",
            len(report.tokens),
            "give capture() the tokens of this text, or none",
        )
    if report.tokens:
        return list(report.tokens)
    return [f" #{token}" for token in (range(T) if read is None else read.tolist())]


def _reads_itself(layer: LayerReport, tokens: int) -> bool:
    rows, columns = layer.map.shape[1:]
    return layer.is_self and layer.is_input and layer.keys.shape[1] == tokens and rows == columns


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")
