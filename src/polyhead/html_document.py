"""Self-contained HTML document from a template: loads nothing, and runs only its own scripts."""

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
    """Fill the placeholders {{policy}}, {{title}}, {{style}}, {{data}}, {{scripts}} of a template.

    The content security policy lists the style and the scripts by hash; nothing else is loaded or
    run, for any text in the data.

    Args:
        template: the page, with the placeholders.
        title: plain text.
        style, scripts: CSS and JavaScript of the page.
        data: data for the scripts, embedded as JSON.
        connects: if True, the scripts may request data from the page's own server.
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
    # Split at the placeholders and joined: inserted text is never searched for placeholders.
    first, *rest = template.split("{{")
    for piece in rest:
        name, _, text = piece.partition("}}")
        first += parts[name] + text
    return first


def json_in_html(data: dict[str, Any]) -> str:
    """Encode as JSON without sequences that end a script element or open an HTML comment."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    # UTF-8 has no lone surrogates, which a byte-level token with half a character can contain.
    text = "".join(c if not "\ud800" <= c <= "\udfff" else f"\\u{ord(c):04x}" for c in text)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"
