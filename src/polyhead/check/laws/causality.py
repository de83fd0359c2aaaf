"""Laws of causality: no influence from the future, full influence from the past and the window."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from polyhead.check.law import NotApplicable, Verdict, broken, holds, law
from polyhead.check.probe.sight import band
from polyhead.check.subject import Subject, by, difference

__all__ = ["LAWS"]

# Longest sequence of a law: time and memory of some modules are quadratic in it.
_LONGEST = 512


def need_causal(subject: Subject) -> None:
    if not subject.claims.causal:
        raise NotApplicable(f"it is not causal ({subject.claims.how.get('causal', 'not claimed')})")


def worst(matrix: Tensor, where: Tensor) -> tuple[int, int, float]:
    """Row, column and value of the largest entry where the mask `where` is True."""
    masked = matrix.masked_fill(~where, -1.0)
    flat = int(masked.argmax())
    t, s = divmod(flat, matrix.shape[1])
    return t, s, masked[t, s].item()


@law
def no_future_leak(subject: Subject) -> Verdict:
    """In a causal module the output at a token does not depend on later tokens.

    Why: a model trained with a leak copies the next token instead of predicting it. Its loss is
    excellent and its generated text is noise.

    Would have caught: a bonus variant in a book's repository, whose boolean mask was inverted for
    two years.
    """
    need_causal(subject)
    influence = subject.influence
    future = ~band(influence.shape[0], True, None)
    t, s, change = worst(influence, future & influence.isfinite())
    # Empty rows (not finite) belong to another law.
    if change > subject.allowed(subject.input()):
        return broken(
            f"the output at token {t} changed by {change:.2g} when token {s} changed: the future "
            "leaks",
            sees=subject.sees,
        )
    return holds()


@law
def no_future_leak_in_long_texts(subject: Subject) -> Verdict:
    """In a causal module the output does not depend on later tokens in long sequences either.

    Why: kernels work in blocks of 16, 32 or 64 tokens, and are often right within the first block
    only.

    Would have caught: block masks that are off at a block boundary, and leaks that only start after
    the short lengths used in tests.
    """
    need_causal(subject)
    T = min(67, subject.claims.max_tokens or 67)
    if T <= subject.T:
        raise NotApplicable(f"it accepts {T} tokens only")
    if not subject.takes(T):
        raise NotApplicable(f"it does not accept {T} tokens")
    x, other = subject.input(1, T), subject.input(1, T, salt=1)
    before, allowed = subject.run(x), subject.allowed(x)
    places = torch.arange(T)
    for starts in torch.arange(1, T).split(33):
        # Each batch row changes the tokens from its own start on.
        late = (places >= starts[:, None]).to(x.device)
        changed = torch.where(late[..., None], other, x)
        apart = difference(subject.run(changed), before).amax(dim=-1).masked_fill(late, 0.0)
        if apart.max() > allowed:
            row, t = divmod(int(apart.argmax()), T)
            return broken(
                f"in a sequence of {T} tokens the output at token {t} changed by {by(apart)} "
                f"when the tokens from {int(starts[row])} on changed: the future leaks"
            )
    return holds()


@law
def no_future_gradient(subject: Subject) -> Verdict:
    """In a causal module the output at a token has no gradient with respect to later tokens.

    Why: a leak can be too small to show in the output and still be learned in training.

    Would have caught: masks applied to the forward result only, and custom backward passes without
    the mask.
    """
    need_causal(subject)
    x = subject.input().requires_grad_()
    with torch.enable_grad():
        output = subject.call(subject.exact, x).output
        direction = subject.input(salt=3)[..., :1].expand_as(output)
        for t in range(x.shape[1] - 1):
            (gradient,) = torch.autograd.grad(
                (output[:, t] * direction[:, t]).sum(), x, retain_graph=True
            )
            # Values that are not finite belong to another law.
            later = gradient.abs().nan_to_num(0.0, 0.0)[:, t + 1 :].amax(dim=(0, 2))
            largest, s = later.max(dim=0)
            if largest > subject.allowed(x.detach()):
                return broken(
                    f"the output at token {t} has a gradient of {by(largest)} with respect to "
                    f"token {t + 1 + int(s)}: the future leaks",
                    sees=subject.sees,
                )
    return holds()


@law
def causal_in_every_mode(subject: Subject) -> Verdict:
    """A causal module is causal in training and in evaluation, with gradients and without.

    Why: kernels are chosen by mode. A module tested in training may run another kernel in
    inference.

    Would have caught: nn.MultiheadAttention with is_causal=True and no mask. It raises in training,
    and silently attends to the future in evaluation without gradients.
    """
    need_causal(subject)
    future = ~band(subject.T, True, None)
    leaks = []
    modes: dict[str, tuple[bool, type[AbstractContextManager[None]]]] = {
        "training": (True, torch.enable_grad),
        "training without gradients": (True, torch.no_grad),
        "evaluation with gradients": (False, torch.enable_grad),
        "evaluation": (False, torch.no_grad),
    }
    for mode, (training, grad_mode) in modes.items():
        module = subject.copy().train(training)
        influence = subject.influence_in(module, grad_mode)
        t, s, change = worst(influence, future & influence.isfinite())
        # In training, dropout scales the kept weights by 1 / (1 - p).
        if change > 4 * subject.allowed(subject.input()):
            leaks.append(
                f"in {mode} the output at token {t} changed by {change:.2g} with token {s}"
            )
    if leaks:
        return broken("; ".join(leaks[:2]), modes=len(leaks))
    return holds()


@law
def past_is_used(subject: Subject) -> Verdict:
    """The output at a token depends on every token it may attend to, including itself.

    Why: a mask that excludes too much raises no error. The model trains, but badly.

    Would have caught: a causal mask without its diagonal; a mask that was added where it should
    have been multiplied.
    """
    sees = subject.sees
    expected = subject.claims.shown(len(sees)).to(sees.device)
    blind = (expected & ~sees).nonzero()
    if len(blind):
        t, s = blind[-1].tolist()
        return broken(
            f"the output at token {t} did not change when token {s} changed: "
            f"{len(blind)} of {int(expected.sum())} pairs that should have influence have none",
            sees=sees,
        )
    return holds()


@law
def first_token_is_alone(subject: Subject) -> Verdict:
    """In a causal module the output at token 0 is that of a sequence of token 0 alone.

    Why: it is the smallest causal case, and the easiest to compute by hand.

    Would have caught: masks that leave the first row empty, so that its softmax averages all
    tokens.
    """
    need_causal(subject)
    return _prefix_of(subject, 1)


@law
def prefix_gives_prefix(subject: Subject) -> Verdict:
    """In a causal module a prefix of the sequence gives the same prefix of the outputs.

    Why: autoregressive generation and KV caches depend on it.

    Would have caught: positions counted from the end, a norm over the sequence length, a scale
    computed from the number of tokens.
    """
    need_causal(subject)
    for n in range(2, subject.T):
        verdict = _prefix_of(subject, n)
        if verdict.message:
            return verdict
    return holds()


def _prefix_of(subject: Subject, n: int) -> Verdict:
    x = subject.input(2)
    whole, prefix = subject.run(x)[:, :n], subject.run(x[:, :n])
    apart = difference(whole, prefix)
    if apart.max() > subject.allowed(x):
        t = int(apart.amax(dim=(0, 2)).argmax())
        return broken(
            f"the output at token {t} differs by {by(apart)} when the sequence ends after "
            f"{n} token{'s' if n > 1 else ''}"
        )
    return holds()


@law
def window_counts_its_tokens(subject: Subject) -> Verdict:
    """With a sliding window of W, a token attends to W tokens, including itself.

    Why: W against W + 1 is the most common difference between two implementations of one model.

    Would have caught: sliding windows one too wide in several inference engines, and caches that
    evict the oldest token one step early.
    """
    claims = subject.claims
    if claims.window is None:
        raise NotApplicable("it has no window")
    T = claims.window + 4
    if T > _LONGEST:
        raise NotApplicable(f"its window of {claims.window} is long: make one of {_LONGEST // 64}")
    if claims.max_tokens is not None and claims.max_tokens < T:
        raise NotApplicable(f"its window of {claims.window} covers nearly every token it accepts")
    x = subject.input(1, T).requires_grad_()
    with torch.enable_grad():
        output = subject.call(subject.exact, x).output
        last = (output[:, -1] * subject.input(1, 1, salt=3)[:, 0, :1]).sum()
        (gradient,) = torch.autograd.grad(last, x)
    seen = gradient[0].abs().amax(dim=-1) > 0
    counted = int(seen.sum())
    loose = "or" in claims.how.get("window", "").split()
    right = (claims.window, claims.window + 1) if loose else (claims.window,)
    if counted in right and bool(seen[-counted:].all()):
        return holds()
    return broken(
        f"the last token attends to {counted} tokens, including itself; its window is "
        f"{claims.window}",
        counted=counted,
        window=claims.window,
    )


LAWS = (
    no_future_leak,
    no_future_leak_in_long_texts,
    no_future_gradient,
    causal_in_every_mode,
    past_is_used,
    first_token_is_alone,
    prefix_gives_prefix,
    window_counts_its_tokens,
)
