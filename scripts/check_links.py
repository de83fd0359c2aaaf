"""Check that relative links and #anchors in the documentation lead somewhere.

Reads the documents of the folder given (default: the repository): `DOCUMENTS`.
Prints one `file:line: link: reason` for each broken link and exits 1 if there is any. Links that
name a scheme (https:, mailto:) are not followed: a check gives the same answer without a network.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

DOCUMENTS = ("*.md", "docs/**/*.md", "csrc/*.md", "tests/*.md", ".github/**/*.md")
FENCE = re.compile(r"^ {0,3}(```+|~~~+)")
CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)")
# [text](target), ![image](target "title"), [label]: target, and the HTML attributes href and src.
LINK = re.compile(
    r"\]\(\s*(?:<([^<>]*)>|((?:[^\s()]|\([^\s()]*\))+))(?:\s+[\"'(][^)]*)?\s*\)"
    r"|^ {0,3}\[(?!\^)[^\]]+\]:\s*<?([^\s>]+)"
    r"|\b(?:href|src)=[\"']([^\"']*)[\"']"
)
HEADING = re.compile(r"^ {0,3}#{1,6}\s+(.*?)(?:\s+#+)?\s*$")
HTML_ANCHOR = re.compile(r"<\w+[^>]*\b(?:id|name)=[\"']([^\"']+)[\"']")


def prose(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line number, line) outside fenced code: what stands in a code block is not a link."""
    fence = ""
    for number, line in enumerate(text.splitlines(), 1):
        mark = FENCE.match(line)
        if fence:
            # A fence ends at a line of at least as many of the same mark and nothing else.
            if mark and mark[1].startswith(fence) and not line.strip().strip(fence[0]):
                fence = ""
        elif mark:
            fence = mark[1]
        else:
            yield number, line


def anchors(text: str) -> set[str]:
    """Return the anchors of a Markdown text, named as GitHub names them."""
    found: set[str] = set()
    for _, line in prose(text):
        found.update(HTML_ANCHOR.findall(line))
        if heading := HEADING.match(line):
            words = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading[1])
            slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
            name, count = slug, 0
            while name in found:
                count += 1
                name = f"{slug}-{count}"
            found.add(name)
    return found


def reason_broken(document: Path, link: str, root: Path) -> str | None:
    """Return why `link`, standing in `document`, leads nowhere, or None when it leads somewhere."""
    path, _, anchor = link.partition("#")
    target = (document.parent / unquote(path)).resolve() if path else document
    if path.startswith("/") or not target.is_relative_to(root):
        return "leaves the repository"
    if not target.exists():
        return "no such file"
    if not anchor or target.suffix != ".md":
        return None
    headings = anchors(target.read_text(encoding="utf-8"))
    return None if unquote(anchor) in headings else "no such heading"


def broken_links(root: Path) -> list[str]:
    """Return one `file:line: link: reason` for every broken link below `root`."""
    documents = [path for part in DOCUMENTS for path in sorted(root.glob(part))]
    broken = []
    for document in documents:
        for number, line in prose(document.read_text(encoding="utf-8")):
            for match in LINK.finditer(CODE.sub("", line)):
                link = next(group for group in match.groups() if group is not None)
                if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:", link):
                    continue
                if reason := reason_broken(document, link, root):
                    broken.append(f"{document.relative_to(root)}:{number}: {link}: {reason}")
    return broken


if __name__ == "__main__":
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent).resolve()
    broken = broken_links(root)
    print("\n".join(broken) or "documentation links: all lead somewhere")
    sys.exit(1 if broken else 0)
