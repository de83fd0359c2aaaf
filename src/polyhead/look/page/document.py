"""The page itself: its files and its data in one document that runs nothing else."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from importlib import resources
from typing import TYPE_CHECKING, Any

from polyhead.look.page.contents import BUDGET, payload

if TYPE_CHECKING:
    from polyhead.look.report import HeadReport

__all__ = ["render"]

# In this order: each file uses those before it.
_SCRIPTS = (
    "core.js",
    "words.js",
    "palette.js",
    "decode.js",
    "link.js",
    "thumb.js",
    "grid.js",
    "legend.js",
    "numbers.js",
    "view.js",
    "canvas.js",
    "map.js",
    "text.js",
    "stepping.js",
    "main.js",
)


def render(report: HeadReport, *, live: bool = False, budget: int = BUDGET) -> str:
    """The page as one HTML document: to be opened from disk, sent, or put on any server.

    What it may load or run is in the document, named by hash in its content security policy; a
    text that holds HTML is shown, not run.

    Args:
        report: of `capture`.
        live: whether the page may ask the server it came from for another report (`live.js`).
        budget: characters of data, as of `payload`.

    Raises:
        ArgumentError: as of `payload`.
    """
    style = "\n".join(_file(name) for name in ("page.css", *(("live.css",) if live else ())))
    scripts = [_file(name) for name in (*_SCRIPTS, *(("live.js",) if live else ()))]
    policy = {
        "default-src": "'none'",
        "script-src": " ".join(map(_hash, scripts)),
        "style-src": _hash(style),
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    if live:
        policy["connect-src"] = "'self'"
    parts = {
        "policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "title": html.escape(f"What the heads of {report.model} do"),
        "style": style,
        "data": _json_in_html(payload(report, budget=budget)),
        "scripts": "\n".join(f"<script>{script}</script>" for script in scripts),
    }
    # Cut at its marks and joined: what is put in is never searched for marks.
    first, *rest = _file("page.html").split("{{")
    for piece in rest:
        name, _, text = piece.partition("}}")
        first += parts[name] + text
    return first


def _json_in_html(data: dict[str, Any]) -> str:
    """JSON that no HTML parser takes for the end of its script element, or for a comment."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    # Lone surrogates, as half a character of a byte-level token can be, cannot be written as UTF-8.
    text = "".join(c if not "\ud800" <= c <= "\udfff" else f"\\u{ord(c):04x}" for c in text)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _file(name: str) -> str:
    return resources.files("polyhead.look.page").joinpath(name).read_text("utf-8")


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"
