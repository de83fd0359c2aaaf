"""Self-contained HTML page of a head report: no server, no network, nothing to install."""

from polyhead.look.page.payload import payload
from polyhead.look.page.render import render

__all__ = ["payload", "render"]
