"""The page's arithmetic, against torch's own numbers."""

from __future__ import annotations

import pytest
import torch

import polyhead as ph


def test_at_load_every_step_is_torch_s(opened, assert_is_torch_s):
    assert_is_torch_s(opened)
    assert 0.0 <= opened.page.evaluate("polyhead.torch()") < 1e-12


@pytest.mark.parametrize(
    ("tokens", "features", "num_heads", "d_out"), [(1, 1, 1, 1), (12, 4, 4, 4), (5, 2, 3, 2)]
)
def test_at_load_other_sizes_are_torch_s(
    open_lesson, assert_is_torch_s, tokens, features, num_heads, d_out
):
    x = torch.randn(tokens, features, generator=torch.Generator().manual_seed(1))
    opened = open_lesson(ph.lesson(x, num_heads=num_heads, d_out=d_out, seed=7))
    assert_is_torch_s(opened)
    assert opened.page.evaluate("polyhead.torch()") < 1e-12
    for step in range(1, 11):
        opened.go(step)


@pytest.mark.parametrize("seed", [0, 123, 2**32 - 1])
@pytest.mark.parametrize(("H", "d", "features"), [(2, 2, 3), (4, 3, 1), (1, 4, 4)])
def test_a_seed_draws_torch_s_weights_bit_for_bit(opened, seed, H, d, features):
    drawn = opened.page.evaluate(f"polyhead.drawStacked({seed}, {H}, {d}, {features})")
    torch.manual_seed(seed)
    stacked = ph.MultiHeadAttentionWrapper(features, d, 6, 0.0, H, out_proj=True)
    split = ph.convert.stacked_to_split(stacked)
    for name in ("W_query", "W_key", "W_value"):
        assert torch.equal(torch.tensor(drawn[name]), getattr(split, name).weight)
    assert torch.equal(torch.tensor(drawn["W_out"]), split.out_proj.weight)
    assert torch.equal(torch.tensor(drawn["bias"]), split.out_proj.bias)
    drawn = opened.page.evaluate(f"polyhead.drawSplit({seed}, {H}, {d}, {features})")
    torch.manual_seed(seed)
    mha = ph.MultiHeadAttention(features, H * d, 6, 0.0, H)
    for name in ("W_query", "W_key", "W_value"):
        assert torch.equal(torch.tensor(drawn[name]), getattr(mha, name).weight)
    assert torch.equal(torch.tensor(drawn["bias"]), mha.out_proj.bias)


@pytest.mark.parametrize("edits", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_drawn_edits_are_torch_s(opened, assert_is_torch_s, edits):
    generator = torch.Generator().manual_seed(0)

    def draw(most):
        return int(torch.randint(most, (), generator=generator))

    page = opened.page
    for _ in range(edits):
        opened.go(1 + draw(2))
        cells = page.locator("input[data-edit]")
        cells.nth(draw(cells.count())).fill(f"{torch.randn((), generator=generator).item():.4f}")
    assert_is_torch_s(opened)
    assert opened.gap() < 1e-12
    assert page.evaluate("polyhead.torch()") is None


SWITCHES = {
    "noTranspose": (3, "Forget the transpose"),
    "maskAfter": (5, "Mask after the softmax"),
    "noBack": (8, "Forget the transpose back"),
    "unconverted": (10, "Same seed, not converted"),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_a_mistake_changes_the_foot_as_torch_does(opened, assert_is_torch_s, name):
    step, button = SWITCHES[name]
    opened.go(step)
    opened.press(button)
    assert_is_torch_s(opened)
    assert opened.verdict() == "NOT the same"
    assert float(opened.page.inner_text("#gap")) == pytest.approx(opened.gap(), rel=1e-2)
    opened.press("Put it right")
    assert opened.verdict() == "the same"
    assert opened.gap() == 0.0


def test_forgetting_the_transpose_is_off_by_0_86(opened):
    opened.go(3)
    opened.press("Forget the transpose")
    assert opened.page.inner_text("#gap") == "0.858"
    assert "the transpose is forgotten" in opened.page.inner_text("#foot")
    code = opened.page.inner_text("#split ~ .code")
    assert "q = q.view(B, H, T, d)\n" in code
    assert "scores = q @ k.transpose(2, 3)" in code


@pytest.mark.parametrize("out", ["none", "both", "right"])
@pytest.mark.parametrize("silent", [-1, 0, 1])
def test_projection_and_silence_are_torch_s(opened, assert_is_torch_s, out, silent):
    opened.go(9)
    opened.page.locator(f'input[name="out"][value="{out}"]').check()
    opened.page.locator(f'input[name="silent"][value="{silent}"]').check()
    assert_is_torch_s(opened)
    assert (opened.verdict() == "the same") == (out != "right")


def test_sizes_seed_and_causal_are_torch_s(opened, assert_is_torch_s):
    page = opened.page
    for heads, size, seed in [(1, 4, 5), (4, 1, 123), (3, 3, 99), (4, 4, 1)]:
        page.get_by_role("combobox", name="Heads").select_option(str(heads))
        page.get_by_role("combobox", name="Size of a head").select_option(str(size))
        page.get_by_label("Seed").fill(str(seed))
        page.get_by_label("causal").uncheck()
        assert_is_torch_s(opened)
        page.get_by_label("causal").check()
        assert_is_torch_s(opened)
        learned = ph.lesson(num_heads=heads, d_out=size, seed=seed)
        got = torch.tensor(opened.now()["left"]["merged"], dtype=torch.float64)
        torch.testing.assert_close(got, learned.traces[0].merged[0], rtol=0, atol=1e-12)
    opened.press("Random input")
    assert_is_torch_s(opened)
    opened.press("Start again")
    assert page.get_by_role("combobox", name="Heads").input_value() == "2"
    assert page.get_by_label("Seed").input_value() == "123"
    assert page.evaluate("polyhead.torch()") < 1e-12


def test_a_dragged_score_changes_its_row_alone(opened, assert_is_torch_s):
    opened.go(6)
    before = opened.now()["left"]["weights"]
    opened.page.locator("[data-slide]").focus()
    for _ in range(5):
        opened.page.keyboard.press("PageUp")
    assert_is_torch_s(opened)
    after = opened.now()["left"]["weights"]
    moved = [(h, i) for h in range(2) for i in range(6) if before[h][i] != after[h][i]]
    assert moved == [(0, 1)]
    assert opened.verdict() == "the same"


def test_a_thousand_random_inputs_agree(opened):
    opened.go(10)
    opened.press("Try 1,000")
    assert 0.0 <= opened.state()["thousand"] < 1e-12
    opened.press("Same seed, not converted")
    opened.press("Try 1,000")
    assert opened.state()["thousand"] > 0.1
