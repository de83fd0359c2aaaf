"""`check_module`: find out how to call a module and what it claims, then run every law."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.check.diagnose.diagnosis import diagnose
from polyhead.check.law import Law, Outcome, Verdict
from polyhead.check.laws import MODULE_LAWS
from polyhead.check.modes import own_modes
from polyhead.check.probe import signature
from polyhead.check.probe.axes import find_axes
from polyhead.check.probe.caches import claim_cache
from polyhead.check.probe.claims import band, claim_causal, read_claims
from polyhead.check.probe.filled import filled, unfilled
from polyhead.check.probe.mask_argument import claim_mask
from polyhead.check.probe.ops import NarrowMasks, look_inside
from polyhead.check.report import STOPPED, LawResult, Report
from polyhead.check.subject import Subject
from polyhead.check.tolerance import Narrowest
from polyhead.errors import ArgumentError, DtypeError, did_you_mean

__all__ = ["check_module", "choose_laws", "find_subject", "run_laws"]

Progress = Callable[[str, float], None]


def check_module(
    module: nn.Module,
    *,
    d_in: int | None = None,
    causal: bool | None = None,
    window: int | None = None,
    positions: str | None = None,
    num_heads: int | None = None,
    max_tokens: int | None = None,
    scale: float | None = None,
    mask_true: str | None = None,
    call: Callable[..., Any] | None = None,
    make: Callable[[], nn.Module] | None = None,
    weights: Callable[[nn.Module], Mapping[str, Tensor]] | None = None,
    only: Sequence[str] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    compile: bool = False,
    timeout: float | None = None,
    progress: Progress | None = None,
) -> Report:
    """Check any attention module against the laws of attention.

    Omitted arguments are inferred from the module's attributes, source and behavior; the report
    shows how. A law about a feature that the module lacks is "not applicable", with the reason.

    Args:
        module: x (B, T, d_in) -> y (B, T, features), or (y, ...); or with query, key and value,
            like nn.MultiheadAttention; or an attention layer of transformers. Never modified.
        d_in: features of the input.
        causal: True if a token may attend only to itself and earlier tokens.
        window: number of tokens a token attends to, including itself.
        positions: source of token order ("rope", ...), or "none".
        num_heads: number of heads.
        max_tokens: the most tokens it accepts.
        scale: factor on the scores, if it is not 1 / sqrt(head_dim).
        mask_true: meaning of True in its boolean mask, "attend" or "ignore".
        call: `call(module, x)`, for other signatures. An argument `mask` receives None, or (B, 1,
            T, S) booleans, True = may attend. An argument `cache` receives None, or the cache that
            the previous call returned after the output.
        make: creates another instance with its own weights, for the law on state dicts.
        weights: `weights(module)` returns its parameters, or slices of them, by role ("query",
            "key", "value", "out", each also with "_bias"; rows of a head contiguous), if names do
            not show them. The output is then compared with the reference.
        only: names of laws; None: all.
        seed: seed of every random number; the same seed gives the same report.
        dtype: dtype of most laws. float64 exposes errors in the last digit; float32 runs kernels
            that do not support float64.
        compile: also check the compiled module (tens of seconds).
        timeout: seconds after which no further law starts; the others are "not run".
        progress: called with the name of a law and the fraction done.

    Returns:
        A `Report`: `.ok`, `.failures` (each with `.law`); prints as a table.

    Raises:
        ArgumentError: the module cannot be called; the message lists the attempts.

    >>> import polyhead as ph
    >>> mha = ph.MultiHeadAttention(12, 12, context_length=16, dropout=0.0, num_heads=3)
    >>> check_module(mha, only=["no_future_leak", "batch_rows_are_independent"]).ok
    True
    """
    laws = choose_laws(MODULE_LAWS, only)
    given = {
        "d_in": d_in,
        "window": window,
        "positions": positions,
        "num_heads": num_heads,
        "max_tokens": max_tokens,
        "scale": scale,
    }
    # Warnings of the target are not part of the report, and would break laws in test suites that
    # turn warnings into errors.
    device = next((p.device for p in _tensors(module)), None)
    with warnings.catch_warnings(), own_modes(device):
        warnings.simplefilter("ignore")
        subject = find_subject(
            module,
            given,
            causal=causal,
            mask_true=mask_true,
            call=call,
            make=make,
            weights=weights,
            seed=seed,
            dtype=dtype,
            compile=compile,
        )
        results, stopped = run_laws(laws, subject, timeout, progress)
        causes: tuple[str, ...] = ()
        with contextlib.suppress(KeyboardInterrupt):  # keep the verdicts without a diagnosis
            causes = diagnose(subject, {r.law: r.verdict for r in results})
    return Report(type(module).__name__, _facts(subject), results, causes, stopped)


def choose_laws(laws: Mapping[str, Law], only: Sequence[str] | None) -> list[Law]:
    """Return the laws of these names, in the table's order.

    Raises:
        ArgumentError: there is no law of that name.
    """
    if only is None:
        return list(laws.values())
    for name in only:
        if name not in laws:
            remedy = did_you_mean(name, laws, "choose among these")
            raise ArgumentError("only", f"must name laws: {', '.join(laws)}", name, remedy)
    return [law for law in laws.values() if law.name in only]


def find_subject(
    module: nn.Module,
    given: dict[str, Any],
    *,
    causal: bool | None = None,
    mask_true: str | None = None,
    call: Callable[..., Any] | None = None,
    **options: Any,
) -> Subject:
    """Return the module with its calling convention and claims; arguments as in `check_module`."""
    if not isinstance(module, nn.Module):
        raise DtypeError(
            "module",
            "must be an nn.Module",
            type(module).__name__,
            "use check_function for functions",
        )
    if any(t.is_meta for t in _tensors(module)):
        raise ArgumentError(
            "module",
            "must have values",
            "weights on meta",
            "make it on the CPU: with torch.device('cpu'): ...",
        )
    if mask_true not in (None, "attend", "ignore"):
        raise ArgumentError(
            "mask_true", 'must be "attend" or "ignore"', repr(mask_true), "name one"
        )
    lacking = unfilled(options.get("make"), options.get("seed", 0))
    if lacking:
        module = filled(module, lacking, options.get("seed", 0))
    calling = signature.from_function(call) if call else signature.find_calling(module)
    claims, calling = read_claims(module, calling, given)
    if calling.positions and claims.positions is None:
        claims.positions = calling.positions
        claims.how["positions"] = f"the check passes {calling.positions}="
    subject = Subject(module, calling, claims, **options)
    if lacking:
        subject.unfilled = lacking
        claims.how["unfilled"] = f"{', '.join(lacking)} (the check fills them from its seed)"
    find_axes(subject)
    if not _runs_in_float64(subject):
        claims.how["dtype"] = "float32: it does not run in float64"
        subject.runs_in_float64 = False
        subject.dtype = subject.precision = torch.float32
        subject.forget()
    spy = Narrowest()
    with spy:
        subject.run(subject.input())
    if spy.dtype != subject.dtype:
        subject.precision = spy.dtype
        claims.how["precision"] = f"{spy.dtype}, used internally"
    if claims.how.get("positions") != "given":
        look_inside(subject)
    claim_causal(subject, causal)
    subject.calling = replace(subject.calling, mask=claim_mask(subject, mask_true))
    subject.forget()
    _supply_mask(subject, causal)
    claim_cache(subject)
    return subject


def run_laws(
    laws: Sequence[Law], subject: object, timeout: float | None, progress: Progress | None
) -> tuple[list[LawResult], str | None]:
    """Run laws until all are done, time is up or the user stops; return results and the reason."""
    begun, stopped = time.monotonic(), None
    results = []
    for i, law in enumerate(laws):
        start = time.monotonic()
        if stopped is None and timeout is not None and start - begun > timeout:
            stopped = f"time limit of {timeout:g} s reached"
        verdict = Verdict(Outcome.NOT_RUN, stopped or "")
        if stopped is None:
            try:
                if progress is not None:
                    progress(law.name, i / len(laws))
                verdict = law.judge(subject)
            except KeyboardInterrupt as reason:  # set by the alarm, empty for Ctrl-C
                stopped = str(reason) or STOPPED
                verdict = Verdict(Outcome.NOT_RUN, stopped)
        results.append(LawResult(law.name, law.required, verdict, time.monotonic() - start))
    return results, stopped


def _tensors(module: object) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()] if isinstance(module, nn.Module) else []


def _runs_in_float64(subject: Subject) -> bool:
    x, spy = subject.input().double(), NarrowMasks()
    try:
        with torch.no_grad(), spy:
            subject.call(subject.copy(torch.float64), x)
    except Exception:  # of unknown code
        return False
    return not spy.found


def _supply_mask(subject: Subject, causal: bool | None) -> None:
    """Pass the mask of the claims, if the module leaves it to its caller.

    Models of transformers do so, and so do callers who pass causal=True for a module with a mask
    argument.
    """
    claims, mask = subject.claims, subject.calling.mask
    if mask is None or mask.form not in ("full", "square", "batch"):
        return
    theirs = subject.calling.style == "transformers"
    sees_all = bool(subject.sees.all())
    wanted = theirs and claims.window is not None and sees_all
    if claims.causal:
        wanted = theirs or (sees_all and (causal or subject.calling.style == "yours"))
    if wanted:
        supplies = lambda T: band(T, claims.causal, claims.window)  # noqa: E731
        subject.calling = replace(subject.calling, supplies=supplies)
        subject.forget()
        told = f"; the check passes the mask as {mask.name}="
        key = "causal" if claims.causal else "window"
        claims.how[key] = claims.how.get(key, "") + told


def _facts(subject: Subject) -> dict[str, str]:
    """Facts for the head of the report: every claim, and its origin."""
    claims, calling = subject.claims, subject.calling
    values = {
        "called as": " ".join(filter(None, (calling.style, calling.told))),
        "d_in": claims.d_in,
        "causal": "yes" if claims.causal else "no",
        "window": claims.window if claims.pattern is None else claims.pattern.words,
        "num_heads": claims.num_heads,
        "positions": claims.positions,
        "max_tokens": claims.max_tokens,
        "mask": calling.mask,
        "cache": calling.cache and f"{calling.cache_name}, {calling.cache}",
    }
    how = dict(claims.how)
    if calling.mask is not None:
        how["mask"] = calling.mask.how
    facts = {
        name: f"{value} ({how[name]})" if how.get(name) else str(value)
        for name, value in values.items()
        if value is not None
    }
    learned = ("layout", "tokens", "dtype", "precision", "unfilled")
    facts |= {name: how[name] for name in learned if name in how}
    return facts
