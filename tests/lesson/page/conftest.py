"""The lesson's page in a browser, and what torch makes of the numbers it holds."""

from __future__ import annotations

import base64
import struct
from dataclasses import dataclass, field

import pytest
import torch

import polyhead as ph
from polyhead.lesson.page import render


@dataclass
class OpenLesson:
    """A page in the browser, and what it complained of or requested."""

    page: object
    address: str
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    listeners: list = field(default_factory=list)

    def listen(self, event, listener):
        self.page.on(event, listener)
        self.listeners.append((event, listener))

    def go(self, step):
        self.page.locator(f'#steps [data-step="{step}"]').click()

    def state(self):
        return self.page.evaluate("polyhead.state")

    def now(self):
        """The numbers of both lanes; JSON has no -inf, so masked scores have None there."""
        return self.page.evaluate("JSON.parse(JSON.stringify(polyhead.now))")

    def gap(self):
        return self.page.evaluate("polyhead.now.gap")

    def verdict(self):
        return self.page.inner_text("#foot .verdict")

    def press(self, name):
        self.page.get_by_role("button", name=name, exact=True).click()


@pytest.fixture(scope="session")
def lecture_page():
    """The document of the lecture's numbers, written once."""
    return render(ph.lesson())


@pytest.fixture(scope="session")
def lesson_windows(browser):
    """Pages by what their context was made of: a navigation costs far less than a new one."""
    return {}


@pytest.fixture
def open_lesson(browser, lesson_windows, tmp_path, lecture_page):
    """`open_lesson(lesson, step, **context)`; a complaint or a request fails the test."""
    opened = []

    def open_(lesson=None, step=1, **options) -> OpenLesson:
        document = lecture_page if lesson is None else render(lesson)
        path = tmp_path / f"lesson{len(opened)}.html"
        path.write_text(document, encoding="utf-8")
        options = {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"} | options
        key = repr(sorted(options.items()))
        if key not in lesson_windows:
            lesson_windows[key] = browser.new_context(**options).new_page()
            lesson_windows[key].set_default_timeout(10_000)
        page = lesson_windows[key]
        found = OpenLesson(page, path.as_uri())
        found.listen("console", lambda message: found.complaints.append(message.text))
        found.listen("pageerror", lambda error: found.complaints.append(str(error)))
        found.listen("request", lambda request: found.requests.append(request.url))
        page.goto(f"{found.address}#{step}")
        opened.append(found)
        return found

    yield open_
    for found in opened:
        found.page.mouse.move(0, 0)
        for event, listener in found.listeners:
            found.page.remove_listener(event, listener)
    for found in opened:
        assert found.complaints == []
        assert [url for url in found.requests if not url.startswith((found.address, "data:"))] == []


@pytest.fixture
def opened(open_lesson):
    """The lecture's numbers, at the first step."""
    return open_lesson()


def _double(rows):
    return torch.tensor(rows, dtype=torch.float64)


def torch_lanes(state):
    """(left, right) by torch of a page's state: dictionaries of tensors named as the page's."""
    x, H, d, T = _double(state["x"]), state["H"], state["d"], state["T"]
    own = {name: _double(rows) for name, rows in state["w"].items()}
    ahead = torch.ones(T, T).triu(1).bool() if state["causal"] else torch.zeros(T, T).bool()

    def lane(w, *, split, back, late):
        flat = {n: x @ w[f"W_{n}"].T for n in ("query", "key", "value")}
        found = {n: split(t) for n, t in flat.items()}
        found["scores"] = found["query"] @ found["key"].mT
        scaled = found["scores"] / d**0.5
        if state["edit"]:
            e = state["edit"]
            scaled[e["h"], e["i"], e["j"]] = e["value"]
            scaled = scaled.masked_fill(ahead, -torch.inf) if not late else scaled
        if late:
            found["weights"] = scaled.softmax(-1).masked_fill(ahead, 0.0)
        else:
            found["weights"] = scaled.masked_fill(ahead, -torch.inf).softmax(-1)
        contexts = found["weights"] @ found["value"]
        if state["silent"] >= 0:
            contexts[state["silent"]] = 0.0
        found["contexts"] = contexts
        found["merged"] = back(contexts)
        return found

    def right_split(t):
        return t.view(T, H, d).transpose(0, 1)

    def right_back(t):
        return t.transpose(0, 1).reshape(T, H * d)

    other = own
    if state["unconverted"]:
        torch.manual_seed(state["seed"])
        mha = ph.MultiHeadAttention(x.shape[1], H * d, T, 0.0, H).double()
        names = ("W_query", "W_key", "W_value")
        other = {name: getattr(mha, name).weight.detach() for name in names}
        other |= {"W_out": mha.out_proj.weight.detach(), "bias": mha.out_proj.bias.detach()}
    left = lane(own, split=right_split, back=right_back, late=False)
    right = lane(
        other,
        split=(lambda t: t.reshape(H, T, d)) if state["noTranspose"] else right_split,
        back=(lambda t: t.reshape(T, H * d)) if state["noBack"] else right_back,
        late=state["maskAfter"],
    )
    for found, w, projects in (
        (left, own, state["out"] == "both"),
        (right, other, state["out"] != "none"),
    ):
        merged = found["merged"]
        found["projected"] = merged @ w["W_out"].T + w["bias"] if projects else merged
    return left, right


@pytest.fixture
def assert_is_torch_s():
    """`check(opened)`: both lanes of the page, and its difference, are what torch makes of them."""

    def check(opened):
        now = opened.now()
        lanes = torch_lanes(opened.state())
        for name, expected in zip(("left", "right"), lanes, strict=True):
            for step, tensor in expected.items():
                got = _double(now[name][step])
                torch.testing.assert_close(got, tensor, rtol=0, atol=1e-12, msg=f"{name} {step}")
        gap = (lanes[0]["projected"] - lanes[1]["projected"]).abs().max().item()
        assert opened.gap() == pytest.approx(gap, abs=1e-12)

    return check


@pytest.fixture
def unpacked():
    """`unpack(text)`: the numbers of a packed tensor."""

    def unpack(text):
        data = base64.b64decode(text)
        return torch.tensor(struct.unpack(f"<{len(data) // 8}d", data), dtype=torch.float64)

    return unpack
