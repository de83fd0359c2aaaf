"""One HTML document from a template: it loads nothing, and runs nothing but its own scripts."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from typing import Any

__all__ = ["assemble", "json_in_html"]


def assemble(
    template: str,
    *,
    title: str,
    style: str,
    scripts: Sequence[str],
    data: dict[str, Any],
    connects: bool = False,
) -> str:
    """Fill the marks {{policy}}, {{title}}, {{style}}, {{data}} and {{scripts}} of a template.

    The style and the scripts are named by hash in the content security policy; nothing else is
    loaded or run, whatever text the data holds.

    Args:
        template: of the page, with the marks.
        title: as plain text.
        style, scripts: what the page has of its own.
        data: what the scripts read, as JSON.
        connects: whether the scripts may request data from the page's own server.
    """
    policy = {
        "default-src": "'none'",
        "script-src": " ".join(map(_hash, scripts)),
        "style-src": _hash(style),
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    if connects:
        policy["connect-src"] = "'self'"
    parts = {
        "policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "title": html.escape(title),
        "style": style,
        "data": json_in_html(data),
        "scripts": "\n".join(f"<script>{script}</script>" for script in scripts),
    }
    # Cut at its marks and joined: what is put in is never searched for marks.
    first, *rest = template.split("{{")
    for piece in rest:
        name, _, text = piece.partition("}}")
        first += parts[name] + text
    return first


def json_in_html(data: dict[str, Any]) -> str:
    """JSON that no HTML parser takes for the end of its script element, or for a comment."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    # Lone surrogates, as half a character of a byte-level token can be, cannot be written as UTF-8.
    text = "".join(c if not "\ud800" <= c <= "\udfff" else f"\\u{ord(c):04x}" for c in text)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"
