"""Mask argument of a module, its form, and the meaning of True in it, found by trying."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.check.probe.claims import band, is_polyheads
from polyhead.check.probe.invocation import MaskArgument
from polyhead.check.probe.signature import mask_names
from polyhead.check.probe.transformers import is_transformers_own
from polyhead.check.subject import Subject, difference

__all__ = ["claim_mask"]

_FORMS = ("keys", "full", "square", "batch")


def claim_mask(subject: Subject, true_means: str | None) -> MaskArgument | None:
    """Find the mask argument and its form by trying. None: there is none, or none that runs.

    The meaning of True is the user's; else that of two names with a fixed meaning
    (`attention_mask`: attend, `key_padding_mask`: ignore), except in layers of transformers; else
    the observed one.
    """
    calling = subject.calling
    if calling.style == "yours":
        return calling.mask
    if is_polyheads(subject.module):
        return _polyhead_mask()
    names = mask_names(subject.module)
    if subject.claims.causal and bool(subject.sees.all()):
        # It leaves the causal mask to its caller, and a mask over keys cannot express one.
        names = [name for name in names if "pad" not in name and "len" not in name]
    fallback = None
    for name in names:
        runs = [mask for mask in _tried(subject, name, true_means) if _runs(subject, mask)]
        if chosen := next((m for m in runs if _works(subject, m)), None):
            return chosen
        # A mask without effect in any form is judged in the first form that runs; except for
        # transformers' own layers, which have many forms.
        if not is_transformers_own(subject.module):
            fallback = fallback or next(iter(runs), None)
    return fallback


def _tried(subject: Subject, name: str, true_means: str | None) -> Iterator[MaskArgument]:
    """Candidate forms and meanings of a mask of this name, the likeliest first."""
    theirs = subject.calling.style == "transformers"
    by_name = None if theirs else _meaning_of(name, subject.module)
    how = "given" if true_means else "by its name" if by_name else "found by trying"
    if true_means or by_name:
        meanings = [true_means or by_name or ""]
        if meanings == ["attend"] and not true_means:
            meanings.append("add")  # as BERT's attention_mask
    elif theirs:
        meanings = ["add", "attend", "ignore"]  # eager layers add
    else:
        meanings = ["ignore", "attend", "add"] if "pad" in name else ["attend", "ignore", "add"]
    if "valid_len" in name:
        yield MaskArgument(name, "lengths", "count", "found by trying")
        return
    strict = "key_padding_mask" in name
    forms = ("keys",) if strict else ("full", "batch", "square", "keys") if theirs else _FORMS
    for form in forms:
        for meaning in meanings:
            yield MaskArgument(name, form, meaning, "found by trying" if meaning == "add" else how)


def _meaning_of(name: str, module: nn.Module) -> str | None:
    if "key_padding_mask" in name or isinstance(module, nn.MultiheadAttention):
        return "ignore"
    return "attend" if name == "attention_mask" else None


def _runs(subject: Subject, mask: MaskArgument) -> bool:
    try:
        shape = _masked(subject, mask, hide=None).shape
    except Exception:  # of unknown code
        return False
    # A mask that broadcasts to more dimensions changes the number of tokens.
    return shape[:2] == (2, subject.T)


def _works(subject: Subject, mask: MaskArgument) -> bool:
    """True if an all-True mask changes nothing, and a masked token has no influence."""
    if mask.true_means == "add" and not isinstance(mask, _Raised):
        # Adding 1 to every score changes nothing; read as a boolean it masks all, or none.
        higher = _Raised(mask.name, mask.form, mask.true_means, mask.how)
        if not _runs(subject, higher) or not _works(subject, higher):
            return False
    if subject.T < 3:
        return False
    x, other = subject.input(2), subject.input(2, salt=1)
    hidden = subject.T - 1 if mask.form == "lengths" else 1
    shown = _masked(subject, mask, hide=None)
    try:
        plain = subject.run(x)
    except Exception:  # the mask is needed
        plain = shown
    changed = x.clone()
    changed[:, hidden] = other[:, hidden]
    before = _masked(subject, mask, hide=hidden)
    after = _masked(subject, mask, hide=hidden, x=changed)
    others = [t for t in range(x.shape[1]) if t > 1 and t != hidden]
    rounding = subject.allowed(x)
    hides = difference(before, after)[:, others].max() <= rounding
    # If the caller must pass the causal mask, even a mask of no other token has an effect.
    changes_nothing = difference(shown, plain).max() <= rounding
    return bool(hides and (changes_nothing or subject.sees.all()))


def _masked(
    subject: Subject, mask: MaskArgument, hide: int | None, x: Tensor | None = None
) -> Tensor:
    x = subject.input(2) if x is None else x
    T = x.shape[1]
    allowed = band(T, subject.claims.causal, None).expand(2, 1, T, T).clone().to(x.device)
    if mask.form in ("keys", "lengths") or not subject.claims.causal:
        allowed[:] = True
    if hide is not None:
        allowed[..., hide] = False
    with torch.no_grad():
        calling = replace(subject.calling, mask=mask, supplies=None)
        return calling(subject.exact, x, allowed=allowed).output


class _Raised(MaskArgument):
    """Additive mask with 1 added to every element."""

    def given(self, allowed_b1ts: Tensor, dtype: torch.dtype) -> Tensor:
        return super().given(allowed_b1ts, dtype) + 1


def _polyhead_mask() -> MaskArgument:
    return _PolyheadMask("mask", "full", "attend", "True = may attend in polyhead's masks")


class _PolyheadMask(MaskArgument):
    """Mask argument of polyhead's own modules, which take masks of its algebra."""

    def given(self, allowed_b1ts: Tensor, dtype: torch.dtype) -> Any:
        from polyhead.mask import dense

        return dense(allowed_b1ts)
