"""The mask argument of a module, its form, and what True means in it: found by trying."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.check.calling import FORMS, MaskArgument
from polyhead.check.facts import band, is_polyheads
from polyhead.check.signature import mask_names
from polyhead.check.subject import Subject, difference

__all__ = ["claim_mask"]


def claim_mask(subject: Subject, true_means: str | None) -> MaskArgument | None:
    """Find the mask argument and its form by trying. None: there is none, or none that runs.

    What True means is taken from the user, then from the name where that has one meaning
    (`attention_mask` shows, `key_padding_mask` hides), then from what the module does.
    """
    calling = subject.calling
    if calling.style in ("yours", "transformers"):
        return calling.mask
    if is_polyheads(subject.module):
        return _polyhead_mask()
    names = mask_names(subject.module)
    if subject.claims.causal and bool(subject.sees.all()):
        # It leaves the causal mask to its caller, which one of keys cannot say.
        names = [name for name in names if "pad" not in name]
    for name in names:
        by_name = _meaning_of(name, subject.module)
        meanings = [m for m in (true_means, by_name) if m][:1] or ["show", "hide", "add"]
        if meanings == ["show"] and not true_means:
            meanings.append("add")  # as BERT's attention_mask
        how = "you said so" if true_means else "by its name" if by_name else "found by trying"
        forms = ("keys",) if "padding" in name else tuple(FORMS)
        tried = [
            MaskArgument(name, form, m, "found by trying" if m == "add" else how)
            for form in forms
            for m in meanings
        ]
        runs = [mask for mask in tried if _runs(subject, mask)]
        if chosen := next((m for m in runs if _works(subject, m)), runs[0] if runs else None):
            return chosen
    return None


def _meaning_of(name: str, module: nn.Module) -> str | None:
    if "padding" in name or "pad_mask" in name or isinstance(module, nn.MultiheadAttention):
        return "hide"
    return "show" if name == "attention_mask" else None


def _runs(subject: Subject, mask: MaskArgument) -> bool:
    try:
        shape = _masked(subject, mask, hide=None).shape
    except Exception:  # of unknown code
        return False
    # A mask that broadcasts to more dimensions is folded into the tokens.
    return shape[:2] == (2, subject.T)


def _works(subject: Subject, mask: MaskArgument) -> bool:
    """Whether showing all changes nothing, and the token that is hidden has no influence."""
    if mask.true_means == "add" and not isinstance(mask, _Raised):
        # 1 on every score changes nothing; read as a boolean it hides, or shows, all.
        higher = _Raised(mask.name, mask.form, mask.true_means, mask.how)
        if not _runs(subject, higher) or not _works(subject, higher):
            return False
    x, other = subject.input(2), subject.input(2, salt=1)
    shown = _masked(subject, mask, hide=None)
    try:
        plain = subject.run(x)
    except Exception:  # the mask is needed
        plain = shown
    changed = x.clone()
    changed[:, 1] = other[:, 1]
    before = _masked(subject, mask, hide=1)
    after = _masked(subject, mask, hide=1, x=changed)
    others = [t for t in range(x.shape[1]) if t > 1]
    rounding = subject.allowed(x)
    hides = difference(before, after)[:, others].max() <= rounding
    # Where the caller passes the causal mask, showing all that is causal changes something.
    changes_nothing = difference(shown, plain).max() <= rounding
    return bool(hides and (changes_nothing or subject.sees.all()))


def _masked(
    subject: Subject, mask: MaskArgument, hide: int | None, x: Tensor | None = None
) -> Tensor:
    x = subject.input(2) if x is None else x
    T = x.shape[1]
    allowed = band(T, subject.claims.causal, None).expand(2, 1, T, T).clone().to(x.device)
    if mask.form == "keys" or not subject.claims.causal:
        allowed[:] = True
    if hide is not None:
        allowed[..., hide] = False
    with torch.no_grad():
        calling = replace(subject.calling, mask=mask, supplies=None)
        return calling(subject.exact, x, allowed=allowed).output


class _Raised(MaskArgument):
    """A mask of numbers, each larger by 1."""

    def given(self, allowed_b1ts: Tensor, dtype: torch.dtype) -> Tensor:
        return super().given(allowed_b1ts, dtype) + 1


def _polyhead_mask() -> MaskArgument:
    return _PolyheadMask("mask", "full", "show", "polyhead's masks show")


class _PolyheadMask(MaskArgument):
    """polyhead's own modules take a mask of its algebra."""

    def given(self, allowed_b1ts: Tensor, dtype: torch.dtype) -> Any:
        from polyhead.mask import dense

        return dense(allowed_b1ts)
