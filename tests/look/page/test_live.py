"""The live page in a browser, against a server of its own."""

import threading
import time

import pytest
import uvicorn

from polyhead.viewer.server import listen, make_app
from polyhead.viewer.session import Session

TEXT = "the cat sat on a mat and the"
OTHER = "one <b> two <b> three . the dog saw <img/src=x/onerror=alert(1)>"


class Live:
    """The page, open; and what it should show."""

    def __init__(self, page, session):
        self.page = page
        self.session = session

    def wait(self):
        self.page.wait_for_selector("#live:not([aria-busy])")

    def read(self, text):
        self.page.fill("#live textarea", text)
        self.page.click("#live .primary")
        self.wait()

    def status(self):
        return self.page.inner_text("#live-status")

    def next(self):
        """Token, before, after of each row; after is None while no head is off."""
        rows = self.page.locator("#next tbody tr").all()
        cells = [
            [row.locator("th").inner_text(), *row.locator(".value").all_inner_texts()]
            for row in rows
        ]
        return [tuple(cell) if len(cell) == 3 else (*cell, None) for cell in cells]

    def check(self, text, off=(), how="zero"):
        """The table shows what the session answers."""
        answer = self.session.answer(text, off, how)
        assert self.page.evaluate("polyhead.data.tokens") == answer["payload"]["tokens"]
        assert self.page.evaluate("polyhead.data.kinds") == answer["payload"]["kinds"]
        shown = [(token["text"], token["before"], token["after"]) for token in answer["next"]]
        for row, (token, before, after) in zip(self.next(), shown, strict=True):
            assert row[0] == token.replace(" ", "␣")
            assert percent(row[1]) == pytest.approx(100 * before, abs=0.51)
            if off:
                assert percent(row[2]) == pytest.approx(100 * after, abs=0.51)
            else:
                assert row[2] is None

    def pixels(self, place):
        script = "c => Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)"
        return self.page.locator(f".tile[data-place='{place}'] canvas").evaluate(script)

    def off(self):
        return self.page.locator("#off button[data-head]").evaluate_all(
            "all => all.map((button) => button.dataset.head)"
        )


def percent(text):
    return float(text.removesuffix("%"))


@pytest.fixture
def server(tiny_model):
    """A session, its address, and what ends it."""
    session = Session(tiny_model, TEXT, most=20)
    with listen("127.0.0.1", 0) as listening:
        config = uvicorn.Config(
            make_app(session, "127.0.0.1"), lifespan="off", ws="none", log_level="warning"
        )
        running = uvicorn.Server(config)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()

        def stop():
            running.should_exit = True
            thread.join()

        yield session, f"http://127.0.0.1:{listening.getsockname()[1]}/", stop
        stop()


@pytest.fixture
def live(browser, server):
    session, address, _ = server
    complaints = []
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(10_000)
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(address)
    page.wait_for_selector("#live:not([hidden])")
    found = Live(page, session)
    found.complaints = complaints
    yield found
    context.close()
    assert complaints == []


def test_another_text_is_read_and_drawn(live):
    live.check(TEXT)
    assert live.page.input_value("#live textarea") == TEXT
    before = live.pixels(5)
    live.read(OTHER)
    assert live.status() == "Read 10 tokens."
    live.check(OTHER)
    assert live.pixels(5) != before
    assert live.page.text_content("#text").split() == OTHER.split()

    live.read("the " * 21)
    assert live.status() == "TEXT must have at most 20 tokens; got 21; shorten it"
    live.check(OTHER)
    live.page.click("#toggle")  # of the text that is shown, not of the one that was refused
    live.wait()
    head = live.page.evaluate("polyhead.selection()")
    live.check(OTHER, {(head["layer"], head["head"])})
    live.complaints.remove(
        "Failed to load resource: the server responded with a status of 400 (Bad Request)"
    )


def test_heads_are_switched_off_and_on(live):
    page = live.page
    tile = page.locator(".tile[data-place='6']")  # layer 1, head 2
    tile.click()
    page.click("#toggle")
    live.wait()
    live.check(TEXT, {(1, 2)})
    assert page.inner_text("#next thead .after") == "without 1.2"
    assert "off" in tile.get_attribute("class").split()
    assert tile.get_attribute("aria-label").startswith("Switched off. Layer 1, head 2")
    assert tile.get_attribute("title") == tile.get_attribute("aria-label")
    assert page.inner_text("#toggle") == "Switch on again"

    # With the keyboard, on another text, and with the mean.
    tile.press("ArrowLeft")
    page.keyboard.press("x")
    live.read(OTHER)
    live.check(OTHER, {(1, 2), (1, 1)})
    page.select_option("#how", "mean")
    live.wait()
    live.check(OTHER, {(1, 2), (1, 1)}, "mean")
    assert live.off() == ["1.2", "1.1"]

    page.click("#off button[data-head='1.2']")
    live.wait()
    live.check(OTHER, {(1, 1)}, "mean")
    kind = page.evaluate("polyhead.data.kinds[0]")
    page.select_option("#off-kind", kind)
    live.wait()
    heads = page.evaluate("polyhead.data.heads")
    kinds = live.session.answer(OTHER, {(1, 1)}, "mean")["payload"]["kinds"]
    gone = {"1.1", *(f"{h[0]}.{h[1]}" for h, k in zip(heads, kinds, strict=True) if k == kind)}
    assert set(live.off()) == gone
    page.click("#all-on")
    live.wait()
    live.check(OTHER)
    assert page.locator(".tile.off").count() == 0


def test_the_next_tokens_stay_in_sight(live):
    assert not live.page.is_visible("#peek")
    live.page.set_viewport_size({"width": 700, "height": 400})
    live.page.locator("#text").scroll_into_view_if_needed()
    live.page.wait_for_selector("#peek:not([hidden])")
    token, before, _ = live.next()[0]
    assert f"{token} {before}" in live.page.inner_text("#peek")


def test_changes_while_it_reads_are_asked_once(live, monkeypatch):
    asked = []
    answer = live.session.answer

    def slow(**wanted):
        asked.append(sorted(wanted["off"]))
        time.sleep(0.3)
        return answer(**wanted)

    monkeypatch.setattr(live.session, "answer", slow)
    for place in range(4):
        live.page.locator(f".tile[data-place='{place}']").press("x")
    live.wait()
    assert len(asked) <= 3
    assert asked[-1] == [(0, 0), (0, 1), (0, 2), (0, 3)]
    monkeypatch.undo()
    live.check(TEXT, {(0, head) for head in range(4)})


def test_a_server_that_is_gone_is_told(live, server):
    server[2]()
    live.read(OTHER)
    assert live.status() == "The server does not answer. Is it still running?"
    live.complaints[:] = [line for line in live.complaints if "ERR_CONNECTION_REFUSED" not in line]


@pytest.mark.slow
def test_the_default_model_forgets_a_name_without_its_induction_heads(smollm2):
    from polyhead.cli.look import _TEXT

    session = Session(smollm2, _TEXT, most=100)
    first = session.start()["next"][0]
    assert (first["text"], first["before"] > 0.5) == (" Ade", True)
    data = session.answer(_TEXT, (), "zero")["payload"]
    heads = zip(data["heads"], data["kinds"], strict=True)
    induction = {tuple(head) for head, kind in heads if kind == "induction"}
    assert len(induction) >= 3
    after = session.answer(_TEXT, induction, "zero")["next"][0]
    assert (after["text"], after["after"] < 0.1) == (" Ade", True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_while_a_head_is_off(live, axe, scheme):
    page = live.page
    page.emulate_media(color_scheme=scheme)
    assert axe(page) == []
    page.click("#toggle")
    live.wait()
    assert live.off() != []
    assert axe(page) == []
