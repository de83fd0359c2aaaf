"""Reports of planted heads, and pages of them open in a browser."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from polyhead.look import HeadReport, LayerReport, bin_edges
from polyhead.look.page import render
from polyhead.look.page.legend import NUMBERS

WORDS = ["the", " cat", " sat", " on", " the", " mat", ".", "\n", " and", " slept", " in", " sun"]
HOSTILE = [
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 2</script>",
    "<!--<script>",
    "<img src=x onerror=window.hacked=3>",
    "\" onfocus='window.hacked=4' autofocus x=\"",
    "javascript:window.hacked=5",
    "مرحبا بالعالم ",
    "שלום",
    "漢字かな",
    "👩‍👩‍👧",
    "\ud83d",
    "\u2028\u2029\x00",
    "{{data}}",
]
# One head of each kind, and two more to make two layers of three.
HEADS = [["previous", "sink", "other"], ["induction", "local", "sink"]]


def _planted(kind: str, ids: Tensor) -> Tensor:
    """(T, T) weights of a head that does one thing: 0.9 of its weight there, the rest even."""
    T = len(ids)
    even = torch.ones(T, T).tril()
    even = even / even.sum(dim=1, keepdim=True)
    target = torch.zeros(T, T)
    for query in range(T):
        before = [key for key in range(1, query) if ids[key - 1] == ids[query]]
        at = {
            "previous": [max(0, query - 1)],
            "sink": [0],
            "local": list(range(max(0, query - 3), query + 1)),
            "induction": before or [0],
            "other": list(range(query + 1)),
        }[kind]
        target[query, at] = 1 / len(at)
    return 0.9 * target + 0.1 * even


def _stats(weights: Tensor, ids: Tensor) -> dict[str, float]:
    """What `capture` says of a head, by its definition, of weights that are written out."""
    T = len(ids)
    at = torch.arange(T)
    back = at[:, None] - at
    same = (ids[:, None] == ids) & (back > 0)
    after = torch.zeros_like(same)
    after[:, 1:] = same[:, :-1]
    repeats = same.any(dim=1)
    entropy = torch.special.entr(weights).sum(dim=1)
    return {
        "entropy": entropy.mean().item(),
        "effective_keys": entropy.exp().mean().item(),
        "mean_distance": (weights * back.abs()).sum(dim=1).mean().item(),
        "mass_first": weights[:, 0].mean().item(),
        "mass_previous": weights[back == 1].sum().item() / T,
        "mass_self": weights.diagonal().mean().item(),
        "mass_recent": weights.masked_fill(back > 15, 0.0).sum(dim=1).mean().item(),
        "mass_same_token": (weights * same).sum(dim=1)[repeats].mean().item(),
        "mass_induction": (weights * after).sum(dim=1)[repeats].mean().item(),
        "max_logit": weights.max().item(),
        "lse": 1.0,
        "contribution": weights[-1].norm().item(),
    }


def _pooled(weights: Tensor, bins: int) -> Tensor:
    if bins >= len(weights):
        return weights
    edges = bin_edges(len(weights), bins).tolist()
    parts = [slice(*edge) for edge in pairwise(edges)]
    return torch.stack([torch.stack([weights[r, c].mean() for c in parts]) for r in parts])


@cache
def _report(tokens=None, *, repeats: int = 8, bins: int = 128, n_keys: int = 8) -> HeadReport:
    tokens = tuple(WORDS) * repeats if tokens is None else tokens
    known = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    ids = torch.tensor([known[token] for token in tokens])
    layers = []
    for index, kinds in enumerate(HEADS):
        weights = torch.stack([_planted(kind, ids) for kind in kinds])
        numbers = [_stats(w, ids) for w in weights]
        top = weights.topk(min(n_keys, len(ids)), dim=-1)
        layers.append(
            LayerReport(
                index,
                f"layers.{index}",
                tuple(range(len(kinds))),
                {name: torch.tensor([n[name] for n in numbers]) for name in numbers[0]},
                torch.stack([_pooled(w, bins) for w in weights]),
                top.indices.int().masked_fill(top.values == 0, -1),
                top.values,
                weights,
            )
        )
    return HeadReport("Planted", tokens, ids, tuple(layers))


@pytest.fixture(scope="session")
def planted():
    """`planted(tokens, bins=, n_keys=)`: a report of one head of each kind, its weights kept."""

    def build(tokens=None, **options):
        return _report(None if tokens is None else tuple(tokens), **options)

    return build


def _large(T: int, layers: int = 30, heads: int = 9, bins: int = 128, n: int = 8) -> HeadReport:
    """Of random weights, which compress worse than a model's; by default as many as SmolLM2's."""
    generator = torch.Generator().manual_seed(0)

    def rand(*size):
        return torch.rand(*size, generator=generator)

    found = []
    for index in range(layers):
        weights = rand(heads, T, n).pow(6).sort(descending=True).values
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1.0)
        position = torch.arange(T)[:, None]
        keys = (position - (rand(heads, T, n).pow(4) * position).long()).int()
        keys[..., 0] *= rand(heads, T) < 0.5  # a sink, half of the time
        cells = min(bins, T)
        maps = rand(heads, cells, cells).pow(4).tril() / cells
        stats = {name: rand(heads) for name in NUMBERS}
        numbers = tuple(range(heads))
        layer = LayerReport(index, f"layers.{index}", numbers, stats, maps, keys, weights)
        found.append(layer)
    tokens = tuple(WORDS[at % len(WORDS)] for at in range(T))
    return HeadReport("Large", tokens, torch.arange(T) % len(WORDS), tuple(found))


@pytest.fixture(scope="session")
def hostile():
    """Tokens that would run, load or break something in a page that took them for its own text."""
    return HOSTILE


@pytest.fixture(scope="session")
def large():
    """`large(T, layers=, heads=, bins=, n=)`: a report of random weights."""
    return _large


@dataclass
class Opened:
    """A page in the browser, and what it complained of or asked for."""

    page: object
    path: str
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    listeners: list = field(default_factory=list)

    def listen(self, event, listener):
        self.page.on(event, listener)
        self.listeners.append((event, listener))

    def state(self):
        return self.page.evaluate("window.polyhead.selection()")

    def tile(self, place):
        return self.page.locator(f'.tile[data-place="{place}"]')

    def token(self, at):
        return self.page.locator(f'.token[data-token="{at}"]')

    def drawn(self, place):
        """(side, side, 3) of a head's thumbnail, when it is there."""
        canvas = self.tile(place).locator("canvas[data-drawn]")
        canvas.wait_for(state="attached")
        return self.pixels(canvas)[..., :3].float()

    def until(self, condition):
        """Wait for a condition in JavaScript. Playwright's own waiting is forbidden by the page."""
        for _ in range(200):
            if self.page.evaluate(condition):
                return
            self.page.wait_for_timeout(25)
        raise AssertionError(f"never true: {condition}")

    def pixels(self, canvas):
        """(height, width, 4) of a canvas."""
        script = """(canvas) => {
            const { width, height } = canvas;
            const copy = Object.assign(document.createElement("canvas"), { width, height });
            const context = copy.getContext("2d", { willReadFrequently: true });
            context.drawImage(canvas, 0, 0);
            const { data } = context.getImageData(0, 0, width, height);
            const text = Array.from(data, (byte) => String.fromCharCode(byte)).join("");
            return [width, height, btoa(text)];
        }"""
        width, height, data = canvas.evaluate(script)
        values = torch.frombuffer(bytearray(base64.b64decode(data)), dtype=torch.uint8)
        return values.view(height, width, 4).int()


@pytest.fixture(scope="session")
def windows(browser):
    """Pages by what their context was made of: a navigation costs far less than a new one."""
    return {}


@pytest.fixture
def open_page(browser, windows, tmp_path):
    """`open_page(report or document, hash, **context)`: the page, `Opened`.

    A page that complains, or asks for anything but itself, fails the test.
    """
    opened = []

    def open_(report, link="", **options) -> Opened:
        document = report if isinstance(report, str) else render(report)
        path = tmp_path / f"page{len(opened)}.html"
        path.write_text(document, encoding="utf-8")
        options = {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"} | options
        key = repr(sorted(options.items()))
        if key not in windows:
            windows[key] = browser.new_context(**options).new_page()
            windows[key].set_default_timeout(10_000)
        page = windows[key]
        found = Opened(page, path.as_uri())
        opened.append(found)
        found.listen("console", lambda message: found.complaints.append(message.text))
        found.listen("pageerror", lambda error: found.complaints.append(str(error)))
        found.listen("request", lambda request: found.requests.append(request.url))
        page.goto(found.path + link)
        page.wait_for_selector("canvas.map")
        return found

    yield open_
    for found in opened:
        found.page.evaluate("localStorage.clear()")
        found.page.mouse.move(0, 0)
        for event, listener in found.listeners:
            found.page.remove_listener(event, listener)
    for found in opened:
        assert found.complaints == []
        assert [url for url in found.requests if not url.startswith((found.path, "data:"))] == []


@pytest.fixture
def opened(open_page, planted):
    """Six heads of two layers; the induction head is chosen, as nothing else is asked for."""
    return open_page(planted())
