"""Pages of the documentation site: the reference is complete, and links lead to its pages."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest

import polyhead as ph

ROOT = Path(__file__).parents[2]
PUBLIC = (
    ph,
    ph.check,
    ph.convert,
    ph.drop_in,
    ph.errors,
    ph.integrations.transformers,
    ph.look,
    ph.mask,
    ph.positions,
)


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages():
    return script("site_pages")


def find(path):
    place, _, name = path.rpartition(".")
    return getattr(importlib.import_module(place), name)


def described():
    """Every object with an entry in the reference."""
    texts = [path.read_text("utf-8") for path in (ROOT / "docs/api").glob("*.md")]
    return [find(path) for text in texts for path in re.findall(r"^::: (\S+)$", text, re.M)]


def public_modules():
    """The modules that `polyhead.__all__` names, as versions.md lists them."""
    found = [getattr(ph, name) for name in ph.__all__]
    return [value for value in found if isinstance(value, types.ModuleType)]


def test_public_modules_are_those_listed():
    assert {*public_modules()} - {ph.integrations} == {*PUBLIC} - {
        ph,
        ph.integrations.transformers,
    }
    versions = (ROOT / "docs/versions.md").read_text("utf-8")
    for module in PUBLIC[1:]:
        assert f"`{module.__name__.removeprefix('polyhead.')}`" in versions


@pytest.mark.parametrize(
    "module", [*PUBLIC, ph.drop_in.flash_attn], ids=lambda module: module.__name__
)
def test_reference_has_every_public_name(module):
    pytest.importorskip("transformers")  # PolyheadCache is a class of it
    entries = described()
    missing = [
        name
        for name in module.__all__
        if not isinstance(getattr(module, name), types.ModuleType)
        and not any(getattr(module, name) is entry for entry in entries)
    ]
    assert missing == []


def test_public_names_have_docstrings_of_their_own():
    pytest.importorskip("transformers")
    bare = [
        f"{module.__name__}.{name}"
        for module in PUBLIC
        for name in module.__all__
        if isinstance(value := getattr(module, name), type | types.FunctionType)
        if not (value.__doc__ or "").strip() or value.__doc__.startswith(f"{name}(")  # dataclass'
    ]
    assert bare == []


def test_every_document_is_in_the_navigation(pages):
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8")
    documents = {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")}
    extra = {name for source, name in pages.PAGES.items() if (ROOT / source).exists()}
    assert [name for name in documents - {"index.md"} | extra if name not in navigation] == []


@pytest.mark.parametrize(
    ("page", "text", "expected"),
    [
        ("index.md", "[why](docs/decisions/0001-x.md#a)", "[why](decisions/0001-x.md#a)"),
        ("index.md", "![map](docs/a.png) [x](#y)", "![map](a.png) [x](#y)"),
        ("contents.md", "[start](../README.md), [why](decisions)", None),
        (
            "contributing/add-a-mask.md",
            "[m](../masks.md), [s](../../src/x.py)",
            "[m](../masks.md), s",
        ),
        ("masks.md", "[`a [b]`](../src/x.py) `[no](link.md)`", "`a [b]` `[no](link.md)`"),
        ("masks.md", "[far](https://example.org/x)", "[far](https://example.org/x)"),
        ("masks.md", "```\n[no](link.md)\n```", "```\n[no](link.md)\n```"),
        ("decisions/index.md", "[1](0001-x.md)", "[1](0001-x.md)"),
    ],
)
def test_rewrite_leads_to_the_sites_pages(pages, page, text, expected):
    if expected is None:
        expected = "[start](index.md), [why](decisions/index.md)"
    assert pages.rewrite(text, page) == expected


def test_rewrite_with_a_repository_leads_there(pages):
    url = "https://example.org/x/"
    rewritten = pages.rewrite("[c](../csrc/tiles#a)", "masks.md", url)
    assert rewritten == "[c](https://example.org/x/blob/main/csrc/tiles#a)"


def test_docstrings_become_markdown(monkeypatch):
    griffe = types.SimpleNamespace(Extension=object, Object=object)
    monkeypatch.setitem(sys.modules, "griffe", griffe)
    text = (
        "Twice.\n\nArgs:\n    a, b: of\n        each.\n\nShapes:\n    x (B)\n\n>>> f(1)\n2\n\nEnd."
    )
    assert script("site_docstrings").as_markdown(text) == (
        "Twice.\n\nArgs:\n    a: of\n        each.\n    b: of\n        each.\n\n"
        "**Shapes**\n\n    x (B)\n\n```pycon\n>>> f(1)\n2\n```\n\nEnd."
    )
