"""The numbers of one step as an SVG: a table per head, colored by head, for notebooks."""

from __future__ import annotations

import html
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["draw"]

_COLORS = ("#5b9be3", "#eeb04a", "#5fbd8d", "#cf86c2")
_CELL, _ROW, _NAMES, _TOP = 50, 20, 62, 54


def draw(title: str, numbers: Tensor, tokens: Sequence[str], num_heads: int) -> str:
    """The numbers as tables: (H, T, ·) one per head, (T, features) one, columns colored by head.

    Args:
        title: above the tables.
        numbers: of one text, without a batch.
        tokens: T texts.
        num_heads: H; features that it does not divide get no color.
    """
    tables = numbers if numbers.ndim == 3 else numbers[None]
    finite = numbers[numbers.isfinite()].abs()
    most = finite.max().item() if len(finite) else 0.0
    per_head = numbers.shape[-1] // num_heads if numbers.shape[-1] % num_heads == 0 else 0
    parts: list[str] = []
    left = 0
    for number, table in enumerate(tables.tolist()):
        if numbers.ndim == 3:
            parts.append(_text(left + _NAMES, _TOP - 10, f"head {number}", "h"))
        for i, row in enumerate(table):
            y = _TOP + i * _ROW
            parts.append(_text(left + _NAMES - 6, y + 14, tokens[i], "e"))
            for j, value in enumerate(row):
                head = number if numbers.ndim == 3 else (j // per_head if per_head else None)
                parts.append(_cell(left + _NAMES + j * _CELL, y, value, head, most))
        left += _NAMES + len(table[0]) * _CELL + 14
    width = max(left, 12 + 8 * len(title))
    height = _TOP + len(tokens) * _ROW + 6
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'role="img" aria-label="{html.escape(title)}"><style>text{{font:12px sans-serif;'
        "fill:#20242a;text-anchor:end}.h,.t{text-anchor:start;font-weight:600}.t{font-size:14px}"
        f'</style><rect width="{width}" height="{height}" fill="#fff"/>'
        f"{_text(6, 18, title, 't')}{''.join(parts)}</svg>"
    )


def _cell(x: int, y: int, value: float, head: int | None, most: float) -> str:
    shade = 0.0 if head is None or value in (0.0, -torch.inf) else 0.12 + 0.6 * abs(value) / most
    rect = ""
    if shade:
        rect = (
            f'<rect x="{x + 1}" y="{y + 1}" width="{_CELL - 2}" height="{_ROW - 2}" '
            f'fill="{_COLORS[head or 0]}" opacity="{shade:.2f}"/>'
        )
    return rect + _text(x + _CELL - 5, y + 14, f"{value:.3f}")


def _text(x: int, y: int, text: str, kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    shown = text if len(text) <= 8 or kind in ("t", "h") else f"{text[:7]}…"
    return f'<text x="{x}" y="{y}"{named}>{html.escape(shown)}</text>'
