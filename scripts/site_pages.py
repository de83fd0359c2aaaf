"""Pages of the documentation site that lie outside docs/, and links between all of them.

A hook of mkdocs; `mkdocs.yml` names it. The documents link to each other as files of the
repository, so that they can be read there; the site has the files of `PAGES` under other names.
Links to other files lead to the repository if `repo_url` names one, or else are plain text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "docs/index.md": "contents.md",
    "docs/decisions": "decisions/index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "tests/README.md": "tests.md",
    "csrc/README.md": "csrc.md",
}
LINK = re.compile(r"(?P<image>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^()\s]+)\)")
CODE = re.compile(r"^( {0,3}```.*?^ {0,3}```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, *, config: Any) -> Files:
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        if source == "docs/decisions":
            text = decisions()
        elif (ROOT / source).exists():
            text = (ROOT / source).read_text("utf-8")
        else:
            continue
        if existing := files.get_file_from_path(page):
            files.remove(existing)
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    return rewrite(markdown, page.file.src_uri, config.repo_url)


def decisions() -> str:
    """Return a list of the decisions, by their headings."""
    lines = ["# Decisions", "", "Why it is as it is, one decision a page.", ""]
    for path in sorted((ROOT / "docs/decisions").glob("*.md")):
        title = path.read_text("utf-8").partition("\n")[0].removeprefix("# ")
        lines.append(f"- [{title}]({path.name})")
    return "\n".join(lines) + "\n"


def rewrite(markdown: str, page: str, repo_url: str | None = None) -> str:
    """Return a page's text with links that lead to pages of the site, or out of it.

    >>> rewrite("[why](docs/decisions/0001-x.md#a) [code](src/x.py)", "index.md")
    '[why](decisions/0001-x.md#a) code'
    >>> rewrite("[code](../csrc/tiles)", "masks.md", "https://host/x")
    '[code](https://host/x/blob/main/csrc/tiles)'
    """
    sources = {name: source for source, name in PAGES.items()}
    folder = posixpath.dirname(sources.get(page, f"docs/{page}"))
    if page == "decisions/index.md":
        folder = "docs/decisions"

    def link(match: re.Match[str]) -> str:
        target, hash_, anchor = match["target"].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        name = PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if name is None:
            if not repo_url:
                return match["text"]
            return f"[{match['text']}]({repo_url.rstrip('/')}/blob/main/{path}{hash_}{anchor})"
        name = posixpath.relpath(name, posixpath.dirname(page) or ".")
        return f"{match['image']}[{match['text']}]({name}{hash_}{anchor})"

    # Code holds no links, but the text of a link may be code: it is set aside, and put back.
    code: list[str] = []
    text = CODE.sub(lambda match: f"\0{code.append(match[0]) or len(code) - 1}\0", markdown)
    return re.sub("\0(\\d+)\0", lambda match: code[int(match[1])], LINK.sub(link, text))
