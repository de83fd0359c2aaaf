"""`polyhead look`: a text read by a model, shown in a page, in the terminal, by a server."""
