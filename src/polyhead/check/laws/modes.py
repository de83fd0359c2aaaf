"""Laws of modes: training and evaluation, with and without gradients, autocast, torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from polyhead.check.law import NotApplicable, Verdict, broken, holds, law
from polyhead.check.probe.ops import draws_random_numbers, draws_weights
from polyhead.check.subject import Subject, by, difference

__all__ = ["LAWS"]


@law
def evaluation_repeats(subject: Subject) -> Verdict:
    """In evaluation the same call gives the same output, for any random seed.

    Why: a model whose outputs vary cannot be tested or served.

    Would have caught: `F.dropout` without `training=self.training`, and
    `scaled_dot_product_attention(dropout_p=...)`, which also drops in evaluation.
    """
    x = subject.input(2)
    apart = difference(subject.run(x), subject.run(x, salt=1))
    if apart.max() > subject.allowed(x):
        drawn = draws_random_numbers(subject, subject.exact)
        made = drawn and draws_weights(subject, subject.exact)
        reason = "; torch's generator is not the cause"
        if drawn:
            reason = ": are layers made in forward?" if made else ": dropout in evaluation?"
        return broken(
            f"two calls in evaluation gave outputs that differ by {by(apart)}{reason}",
            drawn=drawn,
            made=made,
        )
    return holds()


@law
def gradient_mode_changes_nothing(subject: Subject) -> Verdict:
    """The output is the same with gradients and without.

    Why: kernels are chosen by it. Inference may not run the kernel that was tested in training.

    Would have caught: nn.MultiheadAttention's fast path, which runs only in evaluation without
    gradients and treats masks differently.
    """
    x = subject.input(2)
    with torch.enable_grad():
        graded = subject.call(subject.exact, x.clone().requires_grad_()).output.detach()
    apart = difference(graded, subject.run(x))
    if apart.max() > subject.allowed(x):
        return broken(f"with gradients the output differs by {by(apart)}")
    return holds()


@law
def training_without_dropout_is_evaluation(subject: Subject) -> Verdict:
    """With every dropout at 0, training and evaluation give the same output.

    Why: dropout is the only difference between the two modes of an attention.

    Would have caught: a mask built in one of two branches; another scale for the fused kernel.
    """
    x = subject.input(2)
    module = subject.copy().train()
    _stop_dropout(module)
    if draws_random_numbers(subject, module):
        raise NotApplicable("its dropout cannot be switched off from the outside")
    with torch.no_grad():
        trained = subject.call(module, x).output
    apart = difference(trained, subject.run(x))
    if apart.max() > subject.allowed(x):
        return broken(f"in training without dropout the output differs by {by(apart)}")
    return holds()


@law
def autocast_agrees(subject: Subject) -> Verdict:
    """Under autocast to bfloat16 the output is that of float32, within bfloat16's rounding.

    Why: most training runs under autocast; masks and scales must survive the change of dtype.

    Would have caught: masks filled with a value that overflows in half precision, scores added
    to a mask of another dtype.
    """
    x = subject.input(2).float()
    module = subject.copy(torch.float32)
    with torch.no_grad(), torch.autocast(subject.device.type, torch.bfloat16):
        actual = subject.call(module, x).output
    wide = torch.float64 if subject.runs_in_float64 else torch.float32
    with torch.no_grad():
        exact = subject.call(subject.copy(wide), x.to(wide)).output.double()
    allowed = subject.allowed(x.to(wide), torch.bfloat16)
    apart = difference(actual.double(), exact)
    if apart.max() > allowed:
        return broken(f"under autocast the output is {by(apart)} off; allowed: {allowed:.2g}")
    return holds()


@law
def compiled_agrees(subject: Subject) -> Verdict:
    """Compiled by torch.compile, the output is the same, for several lengths.

    Why: with a missing shape guard, the mask of the first length is used for the second.

    Would have caught: masks cached by the first length; symbolic lengths specialized to constants.
    """
    if not subject.compile:
        raise NotApplicable("slow (many seconds): enable with --compile or compile=True")
    compiled: Any = torch.compile(subject.exact)
    for T in (subject.T, subject.T - 2, subject.T - 1):
        x = subject.input(2, T)
        with torch.no_grad():
            apart = difference(subject.call(compiled, x).output, subject.run(x))
        if apart.max() > subject.allowed(x):
            return broken(f"compiled, the output for {T} tokens differs by {by(apart)}")
    return holds()


def _stop_dropout(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for name, value in vars(part).items():
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)


LAWS = (
    evaluation_repeats,
    gradient_mode_changes_nothing,
    training_without_dropout_is_evaluation,
    autocast_agrees,
    compiled_agrees,
)
