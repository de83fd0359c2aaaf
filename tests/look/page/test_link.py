"""The view in the address, in a browser."""

from __future__ import annotations

import pytest


def test_a_link_restores_and_follows(open_page, planted):
    opened = open_page(planted(), "#layer=0&head=0&token=20")
    page = opened.page
    assert opened.state() == {"layer": 0, "head": 0, "token": 20, "other": None}
    opened.token(30).click()
    page.locator('.tile[data-place="4"]').click()
    assert page.url.endswith("#layer=1&head=1&token=30")
    page.get_by_role("button", name="Compare").click()
    page.locator('.tile[data-place="1"]').click()
    assert page.url.endswith("#layer=1&head=1&token=30&with=0.1")
    page.evaluate("location.hash = '#layer=0&head=2&token=7'")
    opened.until("polyhead.selection().head == 2")
    assert opened.state() == {"layer": 0, "head": 2, "token": 7, "other": None}


@pytest.mark.parametrize(
    ("link", "state"),
    [
        ("#layer=1&head=2&with=0.1", [1, 2, None, {"layer": 0, "head": 1}]),
        ("#layer=0&head=1&token=96", [0, 1, None, None]),
        ("#layer=0&head=1&token=-1&with=x.y", [0, 1, None, None]),
    ],
)
def test_links(open_page, planted, link, state):
    opened = open_page(planted(), link)
    assert list(opened.state().values()) == [state[0], state[1], state[2], state[3]]


def test_a_link_to_no_head_is_the_first_view(open_page, planted):
    opened = open_page(planted(), "#layer=9&head=<img>")
    assert [opened.state()["layer"], opened.state()["head"]] == [1, 0]
