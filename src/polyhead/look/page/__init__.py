"""One HTML file that shows what each head does: no server, no network, nothing to install."""

from polyhead.look.page.payload import payload
from polyhead.look.page.render import render

__all__ = ["payload", "render"]
