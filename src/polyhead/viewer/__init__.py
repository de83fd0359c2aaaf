"""Viewer of `polyhead look`: a text and the heads of a model, in a page, a terminal or a server."""
