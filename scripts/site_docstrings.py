"""Docstrings as Markdown, for the documentation site.

An extension of griffe, which reads the docstrings without importing the package.
`mkdocs.yml` names it.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

# Sections that Google's style does not have.
HEADING = re.compile(r"^(Shapes|Formula|Source):(.*)$", re.MULTILINE)
# Several parameters that share a description.
GROUP = re.compile(r"^ {4}(\w+(?:, \w+)+): (.*\n?(?: {5,}.*\n?)*)", re.MULTILINE)
EXAMPLE = re.compile(r"^>>> .*\n(?:(?!\n).+\n?)*", re.MULTILINE)


def as_markdown(text: str) -> str:
    """Return a docstring whose examples are fenced, and whose own sections have bold headings."""
    text = GROUP.sub(
        lambda m: "".join(f"    {n}: {m[2].rstrip()}\n" for n in m[1].split(", ")), text
    )
    text = HEADING.sub(lambda m: f"**{m[1]}**{m[2] and ':' + m[2]}" + "\n" * (not m[2]), text)
    return EXAMPLE.sub(lambda m: f"```pycon\n{m[0].rstrip()}\n```\n", text)


class Markdown(Extension):
    """Applies `as_markdown` to every docstring."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
