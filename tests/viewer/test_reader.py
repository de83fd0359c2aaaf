"""Reading a text with heads on and off."""

import pytest
import torch

import polyhead as ph
from polyhead.errors import ArgumentError, ShapeError
from polyhead.viewer.reader import compare_next, read

TEXT = "the cat sat on a mat and the cat saw a dog ."


def expected(loaded, heads=(), how="zero"):
    ids = loaded.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with ph.look.ablate(loaded.model, heads, how):
        return loaded.model(ids).logits[0, -1].softmax(dim=-1)


def test_read_returns_report_and_next_token(tiny_model):
    seen = read(TEXT, tiny_model)
    assert seen.report.model == "tiny"
    assert "".join(seen.report.tokens) == TEXT
    assert len(seen.report.rows()) == 8
    torch.testing.assert_close(seen.next_token, expected(tiny_model), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", ["zero", "mean"])
def test_read_with_heads_off_matches_ablate(tiny_model, how):
    off = {(0, 1), (1, 3)}
    seen = read(TEXT, tiny_model, off=off, how=how)
    torch.testing.assert_close(
        seen.next_token, expected(tiny_model, off, how), rtol=1e-4, atol=1e-6
    )
    whole = read(TEXT, tiny_model)
    assert (seen.next_token - whole.next_token).abs().max() > 0.01
    silent = {(row["layer"], row["head"]) for row in seen.report.rows() if row["contribution"] == 0}
    assert silent == (off if how == "zero" else set())


def test_read_reports_progress_and_can_be_stopped(tiny_model):
    told = []
    read(TEXT, tiny_model, progress=lambda step, share: told.append((step, share)))
    *before, first, second = told
    assert (first, second) == (("reading: layer 1 of 2", 0.0), ("reading: layer 2 of 2", 0.5))
    assert set(before) == {("finding what each layer reads", 0.0)}

    def stop(step, share):
        if share:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read(TEXT, tiny_model, off={(0, 0)}, progress=stop)
    hooks = [module._forward_pre_hooks for module in tiny_model.model.modules()]
    assert not any(hooks)
    torch.testing.assert_close(
        read(TEXT, tiny_model).next_token, expected(tiny_model), rtol=1e-4, atol=1e-6
    )


def test_read_refuses_invalid_texts(tiny_model):
    with pytest.raises(ShapeError, match="at least 2 tokens, one to attend to another; got 1"):
        read("cat", tiny_model)
    with pytest.raises(ArgumentError, match="heads from 0 to 3 of layer 1"):
        read(TEXT, tiny_model, off={(1, 4)})


def test_compare_next_has_the_most_probable_of_both(tiny_model):
    before = torch.tensor([0.5, 0.3, 0.15, 0.05])
    after = torch.tensor([0.1, 0.3, 0.0, 0.6])
    compared = compare_next(before, after, tiny_model.tokenizer, n=2)
    decode = tiny_model.tokenizer.decode
    assert [token.text for token in compared] == [decode([i]) for i in (0, 1, 3)]
    assert [(token.before, token.after) for token in compared] == [
        pytest.approx(pair) for pair in ((0.5, 0.1), (0.3, 0.3), (0.05, 0.6))
    ]
