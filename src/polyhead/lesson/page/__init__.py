"""The lesson as one HTML file: no server, no network; all numbers are computed in the page."""

from polyhead.lesson.page.document import payload, render

__all__ = ["payload", "render"]
