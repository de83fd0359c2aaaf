"""The page as people use it: keys, narrow screens, screen readers, notebooks; what it may load."""

from __future__ import annotations

import hashlib
import re

import pytest

import polyhead as ph
from polyhead.lesson.page import render


def test_every_step_is_reached_by_next_and_by_back(opened):
    titles = []
    for step in range(1, 11):
        assert opened.state()["step"] == step
        titles.append(opened.page.inner_text("#title"))
        assert opened.page.evaluate("document.activeElement.id") == ("title" if step > 1 else "")
        if step < 10:
            opened.press("Next")
    assert len(set(titles)) == 10
    assert opened.page.get_by_role("button", name="Next").is_disabled()
    opened.press("Back")
    assert opened.state()["step"] == 9


def test_all_steps_work_by_keyboard_alone(opened):
    page = opened.page
    for step in range(1, 11):
        page.keyboard.press("Tab")
        tried, cells = set(), 0
        for _ in range(200):
            here = page.evaluate(
                """() => { const e = document.activeElement; const d = e.dataset;
                const c = getComputedStyle(e);
                return [e.tagName, e.textContent.trim(), d.pick ?? "",
                        c.outlineStyle !== "none" || e.tagName === "BODY", "pick" in d] }"""
            )
            if here[0] == "BODY":
                break
            assert here[3], f"no focus ring on {here}"
            if here[4] and cells == 0:
                before = opened.state()["pick"]
                page.keyboard.press("ArrowRight")
                cells += 1
                assert opened.state()["pick"] != before
                page.keyboard.press("ArrowLeft")
                assert opened.state()["pick"] == before
            tried.add(here[1])
            if here[1] == "Next":
                page.keyboard.press("Enter")
                break
            page.keyboard.press("Tab")
        assert "Next" in tried or step == 10
        assert (cells == 1) == (step in (2, 3, 4, 5, 6, 7, 8)), step
    assert opened.state()["step"] == 10


def test_arrows_lead_from_one_head_to_the_next(opened):
    opened.go(4)
    cell = opened.page.locator('#stacked ~ .figure [data-pick="0,1,5"]')
    cell.click()
    cell.press("ArrowRight")
    assert opened.state()["pick"] == [1, 1, 0]
    assert opened.page.evaluate("document.activeElement.dataset.pick") == "1,1,0"
    opened.page.keyboard.press("ArrowDown")
    assert opened.state()["pick"] == [1, 2, 0]


def test_typing_keeps_the_caret_and_a_bad_number_is_put_back(opened):
    cell = opened.page.locator('[data-edit="x,0,0"]')
    cell.click()
    cell.fill("")
    opened.page.keyboard.type("-1.5")
    assert opened.state()["x"][0][0] == -1.5
    assert cell.input_value() == "-1.5"
    opened.page.keyboard.type("oops")
    assert cell.get_attribute("aria-invalid") == "true"
    assert opened.state()["x"][0][0] == -1.5
    opened.page.keyboard.press("Tab")
    assert cell.input_value() == "-1.5"


def test_a_weight_row_lights_in_both_lanes(opened):
    opened.go(2)
    opened.page.locator('#split ~ .figure [data-pick="1,2,1"]').click()
    for lane, row in (("stacked", "3"), ("split", "3")):
        lit = opened.page.locator(f"#{lane} ~ .figure td.on input")
        edits = lit.evaluate_all("(inputs) => inputs.map((i) => i.dataset.edit)")
        assert edits == [f"W_query,{row},{column}" for column in range(3)]


def test_the_sizes_agree_at_d_out_4_and_3_is_refused(opened):
    box = opened.page.get_by_role("spinbutton", name="d_out of the split class")
    assert "(6, 4) is not (6, 2)" in opened.page.inner_text(".reads")
    box.fill("4")
    assert "Both give (6, 4)" in opened.page.inner_text(".reads")
    box.fill("3")
    assert "cannot be divided among 2 heads" in opened.page.inner_text("#step")


def test_the_chosen_number_is_found_in_memory(opened):
    opened.go(3)
    opened.page.locator('#split ~ .figure [data-pick="1,2,1"]').click()
    assert "= 11" in opened.page.inner_text(".reads")
    lit = opened.page.locator(".strip .on")
    assert lit.inner_text().split() == ["11", f"{opened.now()['left']['query'][1][2][1]:.2f}"]


def test_the_lecture_s_digits_have_a_tick_each(opened):
    opened.go(10)
    text = opened.page.inner_text("#step")
    assert text.count("✓") == 36
    assert "✗" not in text
    assert "-0.451920" in text


def test_nothing_overflows_at_320_px(open_lesson):
    opened = open_lesson(viewport={"width": 320, "height": 640})
    for step in range(1, 11):
        opened.go(step)
        assert opened.page.evaluate("document.documentElement.scrollWidth") == 320, step


def test_reduced_motion_moves_nothing(open_lesson):
    opened = open_lesson(reduced_motion="reduce", step=6)
    durations = opened.page.evaluate(
        "[...document.querySelectorAll('*')].map((e) => getComputedStyle(e).transitionDuration)"
    )
    assert set(durations) == {"0s"}


@pytest.mark.slow
@pytest.mark.parametrize("width", [320, 768, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_in_any_step(open_lesson, axe, width, scheme):
    lesson = ph.lesson(num_heads=4) if width == 768 else None
    opened = open_lesson(lesson, viewport={"width": width, "height": 800}, color_scheme=scheme)
    for step in range(1, 11):
        opened.go(step)
        assert axe(opened.page) == [], step


def test_axe_would_find_a_violation(opened, axe):
    opened.page.evaluate("document.querySelector('h1').style.color = '#cccccc'")
    opened.page.evaluate("document.querySelector('[data-edit]').removeAttribute('aria-label')")
    assert {rule for rule, _ in axe(opened.page)} >= {"color-contrast", "label"}


def test_axe_finds_nothing_in_mistakes_and_answers(opened, axe):
    for step, button in ((3, "Forget the transpose"), (5, "Mask after the softmax")):
        opened.go(step)
        opened.press(button)
        opened.press("Check")
        assert axe(opened.page) == []


HOSTILE = [
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 2</script>",
    "<img src=x onerror=window.hacked=3>",
    "\" onfocus='window.hacked=4' autofocus x=\"",
    "{{data}}${window.hacked=5}`",
    "&lt;b&gt;",
]


def test_hostile_tokens_are_shown_and_run_nothing(open_lesson):
    opened = open_lesson(ph.lesson(tokens=HOSTILE, x=ph.lesson().x))
    for step in range(1, 11):
        opened.go(step)
        assert opened.page.evaluate("window.hacked") is None
        assert opened.page.locator("main img, main script, main b script").count() == 0
    opened.go(4)
    names = opened.page.locator("#stacked ~ .figure tbody th").all_inner_texts()
    assert [name.strip() for name in names[:6]] == HOSTILE


def test_what_the_policy_forbids_is_stopped(open_lesson):
    opened = open_lesson()
    opened.page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "window.hacked = 1";
            document.body.append(script);
            document.body.insertAdjacentHTML("beforeend", "<img src=x onerror='window.hacked=2'>");
            return fetch("https://example.com").catch(() => null);
        }"""
    )
    assert opened.page.evaluate("window.hacked") is None
    assert opened.complaints
    assert all("Content Security Policy" in complaint for complaint in opened.complaints)
    opened.complaints.clear()
    opened.requests.clear()


def test_in_a_notebook_s_frame_it_works(browser, tmp_path):
    page = browser.new_page()
    complaints = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.set_content(ph.lesson()._repr_html_())
    frame = page.frame_locator("iframe")
    frame.get_by_role("button", name="Next").click()
    assert "Queries" in frame.locator("#title").inner_text()
    assert not page.locator(".polyhead-untrusted").is_visible()
    assert complaints == []
    page.close()


def test_the_document_is_the_same_but_for_its_measurements():
    def hashed():
        text = re.sub(r'"milliseconds":\{[^}]*\}', "", render(ph.lesson()))
        return hashlib.sha256(text.encode()).hexdigest()

    assert hashed() == hashed()
