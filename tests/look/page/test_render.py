"""The rendered page: its contents and its content security policy."""

from __future__ import annotations

import base64
import hashlib
import html
import importlib
import json
from dataclasses import replace
from html.parser import HTMLParser

from polyhead.look.page import payload, render

# The module: the package exports a function of the same name.
document = importlib.import_module("polyhead.look.page.render")
# In addition to hostile tokens: characters special in HTML or JSON, and blanks.
ODD = ["{{script}} \\u003c & &amp; &lt;", "\x85", "\t", "\r\n", "\n", " ", ""]


class Elements(HTMLParser):
    """The elements of a document as (tag, attributes, text within)."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.found = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs), []))

    def handle_data(self, data):
        if self.found:
            self.found[-1][2].append(data)

    def handle_endtag(self, tag):
        self.found.append((f"/{tag}", {}, []))

    def of(self, tag):
        return [(attrs, "".join(text)) for name, attrs, text in self.found if name == tag]


def test_render_policy_lists_every_script_by_hash(planted):
    elements = Elements(render(planted()))
    (policy,) = [a["content"] for a, _ in elements.of("meta") if "http-equiv" in a]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert "unsafe" not in policy
    assert "connect-src" not in rules

    def hashes(tag, skip=()):
        digests = [
            hashlib.sha256(text.encode()).digest()
            for attrs, text in elements.of(tag)
            if attrs.get("type") not in skip
        ]
        return [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]

    assert rules["script-src"].split() == hashes("script", skip=["application/json"])
    assert rules["style-src"].split() == hashes("style")
    assert not [a for _, a, _ in elements.found if "style" in a or any(n[:2] == "on" for n in a)]
    assert not [a for _, a, _ in elements.found if "src" in a]


def test_render_live_adds_the_server_parts(planted):
    still, live = render(planted()), render(planted(), live=True)
    assert "connect-src 'self'" in live
    assert document._file("live.js") in live
    assert document._file("live.js") not in still


def test_render_data_round_trips(planted, hostile):
    report = planted([*hostile, *ODD] * 2)
    elements = Elements(render(report))
    (data,) = [text for attrs, text in elements.of("script") if attrs.get("id") == "data"]
    assert json.loads(data) == payload(report)
    assert "<" not in data
    data.encode()


def test_render_html_in_text_adds_no_elements(planted, hostile):
    plain = Elements(render(planted()))
    odd = Elements(render(planted([*hostile, *ODD] * 2)))
    assert [tag for tag, *_ in odd.found] == [tag for tag, *_ in plain.found]


def test_render_includes_every_script():
    files = document.resources.files("polyhead.look.page").iterdir()
    scripts = {file.name for file in files if file.name.endswith(".js")}
    assert scripts == {*document._SCRIPTS, "live.js"}


def test_to_html_writes_the_page(planted, tmp_path):
    planted().to_html(tmp_path / "heads.html")
    assert (tmp_path / "heads.html").read_text("utf-8") == render(planted())


def test_repr_html_is_a_sandboxed_frame(planted):
    ((attributes, _),) = Elements(planted()._repr_html_()).of("iframe")
    assert attributes["sandbox"] == "allow-scripts"
    assert attributes["srcdoc"] == html.unescape(render(planted(), budget=1_500_000))


def test_render_title_is_escaped(planted):
    ((_, title),) = Elements(render(replace(planted(), model="<b>x</b>"))).of("title")
    assert title == "What the heads of <b>x</b> do"
