"""One HTML file that shows what each head does: no server, no network, nothing to install."""

from polyhead.look.page.contents import payload
from polyhead.look.page.document import render

__all__ = ["payload", "render"]
