"""Generate docs/laws.md from the docstrings of the laws. --check: only test that it is current."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from polyhead.check.law import Law
from polyhead.check.laws import FUNCTION_LAWS, MODULE_LAWS

PAGE = Path(__file__).parent.parent / "docs" / "laws.md"

HEAD = """\
# The laws of attention

The laws that [`polyhead check`](check.md) tests: the requirement, the reason, and a real bug that
each would have caught. Generated from the laws' docstrings by `scripts/write_laws.py`.
"""


def page() -> str:
    """Return the page as Markdown."""
    parts = [HEAD]
    parts += section("Laws of modules", MODULE_LAWS)
    parts += section("Laws of functions", FUNCTION_LAWS)
    return "\n".join(parts)


def section(title: str, laws: Mapping[str, Law]) -> list[str]:
    """Return the lines of one table of laws."""
    lines = [f"## {title}", ""]
    for law in laws.values():
        required, why, caught = law.paragraphs
        lines += [f"### {law.name}", "", f"**{required}**", ""]
        for paragraph in (why, caught):
            word, _, rest = paragraph.partition(":")
            lines += [f"*{word}:*{rest}", ""]
    return lines


if __name__ == "__main__":
    if "--check" in sys.argv:
        current = PAGE.exists() and PAGE.read_text("utf-8") == page()
        print("docs/laws.md is current" if current else "run scripts/write_laws.py")
        sys.exit(0 if current else 1)
    PAGE.write_text(page(), encoding="utf-8")
