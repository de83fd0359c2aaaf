"""The page itself: its files and its data in one document that runs nothing else."""

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
