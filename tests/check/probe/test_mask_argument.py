"""Mask arguments of many names: form and meaning are found by trying."""

import math

import pytest
import torch
from torch import nn

from polyhead.check import check_module

LAWS = [
    "mask_that_shows_all_changes_nothing",
    "hidden_tokens_have_no_influence",
    "shown_tokens_keep_their_influence",
    "padding_on_the_right_changes_nothing",
]


class Masked(nn.Module):
    """Encoder attention; `hides` returns the masked entries of the scores."""

    def __init__(self, dim=24, num_heads=4):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim) for _ in range(4))

    def attend(self, x, mask):
        q, k, v = (
            w(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for w in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = self.masked(scores, mask)
        return self.o_proj((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))

    def masked(self, scores, mask):
        lowest = torch.finfo(scores.dtype).min
        return scores.masked_fill(self.hides(mask, scores.shape[-1]), lowest)


class SrcPaddingMask(Masked):
    def forward(self, x, src_padding_mask=None):
        return self.attend(x, src_padding_mask)

    def hides(self, mask, T):
        return mask[:, None, None, :]


class SrcPaddingMaskShows(SrcPaddingMask):
    def hides(self, mask, T):
        return ~mask[:, None, None, :]


class SrcPaddingMaskOfQueries(SrcPaddingMask):
    def hides(self, mask, T):
        return mask[:, None, :, None]


class SrcPaddingMaskIgnored(SrcPaddingMask):
    def hides(self, mask, T):
        return torch.zeros_like(mask)[:, None, None, :]


class PadMaskMultiplied(Masked):
    """Masked scores are 0 instead of -inf."""

    def forward(self, x, pad_mask=None):
        return self.attend(x, pad_mask)

    def masked(self, scores, mask):
        return scores * ~mask[:, None, None, :]


class ValidLens(Masked):
    more = 0

    def forward(self, x, valid_lens=None):
        return self.attend(x, valid_lens)

    def hides(self, mask, T):
        return (torch.arange(T) >= mask[:, None] + self.more)[:, None, None, :]


class ValidLensOneMore(ValidLens):
    more = 1


class Added(Masked):
    """Additive (B, T, T) mask."""

    def forward(self, x, src_mask=None):
        return self.attend(x, src_mask)

    def masked(self, scores, mask):
        return scores + mask[:, None]


class TwoMasks(SrcPaddingMask):
    """No form fits the first mask by name; the other one is still found."""

    def forward(self, x, mask=None, src_padding_mask=None):
        if mask is not None and mask.dtype != torch.int8:
            raise TypeError("int8 is needed")
        return self.attend(x, src_padding_mask)


def check(kind):
    torch.manual_seed(0)
    return check_module(kind(), only=LAWS)


@pytest.mark.parametrize(
    ("kind", "fact"),
    [
        (SrcPaddingMask, "src_padding_mask, form keys, True means ignore (found by trying)"),
        (SrcPaddingMaskShows, "src_padding_mask, form keys, True means attend (found by trying)"),
        (ValidLens, "valid_lens, form lengths, number of real tokens (found by trying)"),
        (Added, "src_mask, form batch, added to the scores (found by trying)"),
        (TwoMasks, "src_padding_mask, form keys, True means ignore (found by trying)"),
    ],
)
def test_mask_form_and_meaning_are_found_by_trying(kind, fact):
    report = check(kind)
    assert report.ok, report
    assert report.facts["mask"] == fact


@pytest.mark.parametrize(
    "kind", [SrcPaddingMaskOfQueries, SrcPaddingMaskIgnored, PadMaskMultiplied, ValidLensOneMore]
)
def test_mask_bug_under_another_name_is_found(kind):
    report = check(kind)
    assert report.exit_code == 1, report


class Switch(Masked):
    def forward(self, x, mask=False, mask_value=-1e4, head_mask=None):
        return self.attend(x, None)


def test_switches_and_head_masks_are_not_masks():
    assert "mask" not in check(Switch).facts
