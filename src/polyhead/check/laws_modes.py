"""Laws of modes: evaluation and training, with gradients and without, autocast, compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from polyhead.check.heads import contexts_of
from polyhead.check.law import NotApplicable, Verdict, broken, holds, module_law, reported
from polyhead.check.subject import Subject, by, difference

__all__: list[str] = []


@module_law
def evaluation_repeats(subject: Subject) -> Verdict:
    """In evaluation the same call gives the same output, whatever the random seed.

    Why: a model that answers differently each time cannot be tested, or served.

    Would have caught: `F.dropout` without `training=self.training`, and
    `scaled_dot_product_attention(dropout_p=...)`, which drops in evaluation too.
    """
    x = subject.input(2)
    apart = difference(subject.run(x), subject.run(x, salt=1))
    if apart.max() > subject.allowed(x):
        return broken(
            f"two calls in evaluation gave outputs {by(apart)} apart: dropout in evaluation?",
            dropout_in_eval=True,
        )
    return holds()


@module_law
def gradient_mode_changes_nothing(subject: Subject) -> Verdict:
    """With gradients and without, the output is the same.

    Why: kernels are chosen by it: what was tested in training may not be what serves.

    Would have caught: nn.MultiheadAttention's fast path, which runs in evaluation without
    gradients only, and treats masks in its own way.
    """
    x = subject.input(2)
    with torch.enable_grad():
        graded = subject.call(subject.exact, x.clone().requires_grad_()).output.detach()
    apart = difference(graded, subject.run(x))
    if apart.max() > subject.allowed(x):
        return broken(f"with gradients the output is another, by {by(apart)}")
    return holds()


@module_law
def training_without_dropout_is_evaluation(subject: Subject) -> Verdict:
    """With every dropout at 0, training and evaluation give the same output.

    Why: only dropout may tell them apart in an attention.

    Would have caught: a mask built in one of two branches; another scale for the fused kernel.
    """
    x = subject.input(2)
    module = subject.copy().train()
    _stop_dropout(module)
    with torch.no_grad():
        trained, again = (subject.call(module, x, salt=salt).output for salt in (0, 1))
    if difference(trained, again).max() > subject.allowed(x):
        raise NotApplicable("its dropout cannot be switched off from outside")
    apart = difference(trained, subject.run(x))
    if apart.max() > subject.allowed(x):
        return broken(f"in training without dropout the output is another, by {by(apart)}")
    return holds()


@module_law
def dropout_is_unbiased(subject: Subject) -> Verdict:
    """In training, the output averaged over many dropout masks is that of evaluation.

    Why: kept weights grow by 1 / (1 - p), so that nothing shifts when dropout is switched off.

    Would have caught: dropout on scores before the softmax, weights divided by their sum again
    after dropout, a missing 1 / (1 - p).
    """
    x = subject.input()
    trained = subject.copy().train()
    _need_dropout(subject, trained)
    many = x.expand(512, -1, -1)
    with torch.no_grad():
        try:
            expected = contexts_of(subject, subject.exact, x)
            drawn = contexts_of(subject, trained, many)
        except NotApplicable:
            if any("norm" in type(part).__name__.lower() for part in trained.modules()):
                raise
            expected = subject.run(x)
            drawn = subject.call(trained, many).output
    # One number a draw: along the expected output, so that many small shifts add up.
    direction = expected / expected.square().sum()
    along = ((drawn - expected) * direction).flatten(1).sum(dim=1)
    mean, error = along.mean().item(), along.std().item() / len(along) ** 0.5
    if abs(mean) > max(6 * error, 1e-4):
        return broken(
            f"the mean over {len(along)} dropout masks is {1 + mean:.3f} times the output of "
            f"evaluation, {abs(mean) / error:.0f} standard errors off"
        )
    return holds()


@module_law
def dropout_drops_weights(subject: Subject) -> Verdict:
    """Dropout acts on attention weights: a head's whole contribution of a key is kept or dropped.

    Why: it is what the paper and the lecture do. With one token a head has one weight, so its
    context is zero, or the whole of it and larger.

    Would have caught: dropout on values or on contexts, feature by feature.
    """
    x = subject.input(1, 1)
    module = subject.copy().train()
    _need_dropout(subject, module)
    with torch.no_grad():
        expected = contexts_of(subject, subject.exact, x)[0, 0]
        contexts = contexts_of(subject, module, x.expand(64, -1, -1))[:, 0]
    if not expected.isfinite().all():
        raise NotApplicable("one token alone gives numbers that are not finite")
    # By how much each head's context was multiplied: 0, or 1 / (1 - dropout).
    factor = (contexts * expected).sum(dim=-1) / expected.square().sum(dim=-1)
    rounding = subject.allowed(x)
    if difference(contexts, expected.expand_as(contexts)).max() <= rounding:
        return reported("dropout acts behind the heads, not on attention weights")
    if difference(contexts, factor[..., None] * expected).max() > 4 * rounding:
        return broken(
            "of one head's context some features were dropped and others kept: dropout acts on "
            "features, not on attention weights"
        )
    return holds()


def _need_dropout(subject: Subject, trained: nn.Module) -> None:
    x = subject.input(2)
    with torch.no_grad():
        drawn, again = (subject.call(trained, x, salt=salt).output for salt in (0, 1))
    if torch.equal(drawn, again):
        raise NotApplicable("training draws no random numbers: there is no dropout")


@module_law
def autocast_agrees(subject: Subject) -> Verdict:
    """Under autocast to bfloat16 the output is that of float32, within bfloat16's rounding.

    Why: most training runs under autocast; masks and scales must survive the change of dtype.

    Would have caught: masks filled with a number that overflows in half precision, scores added
    to a mask of another dtype.
    """
    x = subject.input(2).float()
    module = subject.copy(torch.float32)
    with torch.no_grad(), torch.autocast(subject.device.type, torch.bfloat16):
        actual = subject.call(module, x).output
    with torch.no_grad():
        exact = subject.call(subject.copy(torch.float64), x.double()).output
    allowed = subject.allowed(x.double(), torch.bfloat16)
    apart = difference(actual.double(), exact)
    if apart.max() > allowed:
        return broken(f"under autocast the output is {by(apart)} off, allowed are {allowed:.2g}")
    return holds()


@module_law
def compiled_agrees(subject: Subject) -> Verdict:
    """Compiled by torch.compile, the output is the same, for one length and for another.

    Why: guards that forget a shape give the first length's mask to the second.

    Would have caught: masks cached by the first length; symbolic lengths baked in as numbers.
    """
    if not subject.compile:
        raise NotApplicable("it takes many seconds; ask for it with --compile or compile=True")
    compiled: Any = torch.compile(subject.exact)
    for T in (subject.T, subject.T - 2, subject.T - 1):
        x = subject.input(2, T)
        with torch.no_grad():
            apart = difference(subject.call(compiled, x).output, subject.run(x))
        if apart.max() > subject.allowed(x):
            return broken(f"compiled, {T} tokens give another output, by {by(apart)}")
    return holds()


def _stop_dropout(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for name, value in vars(part).items():
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)
