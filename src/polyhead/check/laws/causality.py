"""Laws of who sees whom: the future, the past, the window."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from polyhead.check.law import NotApplicable, Verdict, broken, holds, law
from polyhead.check.probe.sight import band
from polyhead.check.subject import Subject, by, difference

__all__ = ["LAWS"]

# Tokens that a law may take: the time and memory of some modules grow with their square.
_LONGEST = 512


def need_causal(subject: Subject) -> None:
    if not subject.claims.causal:
        raise NotApplicable(f"it is not causal ({subject.claims.how.get('causal', 'not claimed')})")


def worst(matrix: Tensor, where: Tensor) -> tuple[int, int, float]:
    """Row, column and value of the largest entry among those where `where` holds."""
    masked = matrix.masked_fill(~where, -1.0)
    flat = int(masked.argmax())
    t, s = divmod(flat, matrix.shape[1])
    return t, s, masked[t, s].item()


@law
def no_future_leak(subject: Subject) -> Verdict:
    """In a causal module the output at a token does not change when a later token does.

    Why: a model trained with a leak reads the answer off the next token. Its loss is splendid and
    its text is noise.

    Would have caught: a book's repository carried a bonus variant whose boolean mask was inverted
    for two years.
    """
    need_causal(subject)
    influence = subject.influence
    future = ~band(influence.shape[0], True, None)
    t, s, change = worst(influence, future & influence.isfinite())
    # A row with nothing to attend to is another law's.
    if change > subject.allowed(subject.input()):
        return broken(
            f"the output at token {t} changed by {change:.2g} when token {s} changed: the future "
            "leaks",
            sees=subject.sees,
        )
    return holds()


@law
def no_future_leak_in_long_texts(subject: Subject) -> Verdict:
    """In a causal module the start of a long text does not depend on what comes after it.

    Why: kernels work in blocks of 16, 32 or 64 tokens, and are right within the first.

    Would have caught: block masks that are off at a block's border, and leaks that only show
    behind the end of the short text that somebody tried.
    """
    need_causal(subject)
    T = min(67, subject.claims.max_tokens or 67)
    if T <= subject.T:
        raise NotApplicable(f"it takes {T} tokens only")
    if not subject.takes(T):
        raise NotApplicable(f"it does not take {T} tokens")
    x, other = subject.input(1, T), subject.input(1, T, salt=1)
    before, allowed = subject.run(x), subject.allowed(x)
    places = torch.arange(T)
    for starts in torch.arange(1, T).split(33):
        # Row by row, the tokens from `start` on are others.
        late = (places >= starts[:, None]).to(x.device)
        changed = torch.where(late[..., None], other, x)
        apart = difference(subject.run(changed), before).amax(dim=-1).masked_fill(late, 0.0)
        if apart.max() > allowed:
            row, t = divmod(int(apart.argmax()), T)
            return broken(
                f"in a text of {T} tokens the output at token {t} changed by {by(apart)} when the "
                f"tokens from {int(starts[row])} on changed: the future leaks"
            )
    return holds()


@law
def no_future_gradient(subject: Subject) -> Verdict:
    """In a causal module the output at a token has no gradient for a later token.

    Why: a leak can be small where it is perturbed and still teach a model to cheat.

    Would have caught: masks applied to the forward result only, and custom backward passes that
    forget the mask.
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
            # What is not finite is another law's.
            later = gradient.abs().nan_to_num(0.0, 0.0)[:, t + 1 :].amax(dim=(0, 2))
            largest, s = later.max(dim=0)
            if largest > subject.allowed(x.detach()):
                return broken(
                    f"the output at token {t} has a gradient of {by(largest)} for token "
                    f"{t + 1 + int(s)}: the future leaks",
                    sees=subject.sees,
                )
    return holds()


@law
def causal_in_every_mode(subject: Subject) -> Verdict:
    """A causal module is causal in training and in evaluation, with gradients and without.

    Why: kernels are chosen by mode. A module that is tested in training may run another kernel
    when it serves.

    Would have caught: nn.MultiheadAttention, called with is_causal=True and no mask, raises in
    training, and in evaluation without gradients silently attends to the future.
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
        # In training kept weights are larger by 1 / (1 - dropout).
        if change > 4 * subject.allowed(subject.input()):
            leaks.append(
                f"in {mode} the output at token {t} changed by {change:.2g} with token {s}"
            )
    if leaks:
        return broken("; ".join(leaks[:2]), modes=len(leaks))
    return holds()


@law
def past_is_used(subject: Subject) -> Verdict:
    """The output at a token changes when a token that it may see does, itself included.

    Why: a mask that hides too much leaves a model that trains, badly, and nothing fails.

    Would have caught: a causal mask built with the diagonal left out; a mask added where it should
    have been multiplied.
    """
    sees = subject.sees
    expected = subject.claims.shown(len(sees)).to(sees.device)
    blind = (expected & ~sees).nonzero()
    if len(blind):
        t, s = blind[-1].tolist()
        return broken(
            f"the output at token {t} did not change when token {s} changed: "
            f"{len(blind)} of {int(expected.sum())} pairs that should be seen are not",
            sees=sees,
        )
    return holds()


@law
def first_token_is_alone(subject: Subject) -> Verdict:
    """In a causal module the output at token 0 is that of a sequence of token 0 alone.

    Why: it is the smallest causal case, and the easiest to compute by hand.

    Would have caught: masks that leave the first row empty, so that its softmax averages all.
    """
    need_causal(subject)
    return _prefix_of(subject, 1)


@law
def prefix_gives_prefix(subject: Subject) -> Verdict:
    """In a causal module the first tokens of a text give the first outputs of the whole.

    Why: it is what makes generating token by token, and caching, right.

    Would have caught: positions counted from the end, a normalisation over the length, scale
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
            f"the output at token {t} is another by {by(apart)} when the text ends after "
            f"{n} token{'s' if n > 1 else ''}"
        )
    return holds()


@law
def window_counts_its_tokens(subject: Subject) -> Verdict:
    """With a window of W a token sees W tokens, itself included.

    Why: W or W + 1 is the commonest disagreement between two implementations of one model.

    Would have caught: sliding windows one too wide in several inference engines, and caches that
    drop the oldest token one step early.
    """
    claims = subject.claims
    if claims.window is None:
        raise NotApplicable("it has no window")
    T = claims.window + 4
    if T > _LONGEST:
        raise NotApplicable(f"its window of {claims.window} is long: make one of {_LONGEST // 64}")
    if claims.max_tokens is not None and claims.max_tokens < T:
        raise NotApplicable(f"its window of {claims.window} holds nearly all it accepts")
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
        f"the last token sees {counted} tokens, itself included; its window is {claims.window}",
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
