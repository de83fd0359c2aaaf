"""Renderer of the page: its files and its data in one HTML document."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING

from polyhead.html_document import assemble
from polyhead.look.page.payload import BUDGET, payload

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
    "print.js",
)


def render(report: HeadReport, *, live: bool = False, budget: int = BUDGET) -> str:
    """Render the page as one HTML document, to open from disk, send, or put on any server.

    All scripts and styles are in the document, listed by hash in its content security policy;
    HTML in the text is shown, not run.

    Args:
        report: from `capture`.
        live: True to let the page request other reports from its own server (`live.js`).
        budget: characters of data, as for `payload`.

    Raises:
        ArgumentError: as for `payload`.
    """
    names = (*_SCRIPTS, *(("live.js",) if live else ()))
    return assemble(
        _file("page.html"),
        title=f"What the heads of {report.model} do",
        style="\n".join(_file(name) for name in ("page.css", *(("live.css",) if live else ()))),
        scripts=[_file(name) for name in names],
        data=payload(report, budget=budget),
        connects=live,
    )


def _file(name: str) -> str:
    return resources.files("polyhead.look.page").joinpath(name).read_text("utf-8")
