"""Contexts per head inside a module: the input of its output projection."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.check.law import NotApplicable
from polyhead.check.probe.autograd_graph import made_by
from polyhead.check.subject import Subject, difference

__all__ = [
    "RELATIVE",
    "contexts_of",
    "need_heads",
    "need_no_absolute_positions",
    "need_no_positions",
    "need_plain",
    "need_plain_values",
    "out_projection",
    "shares_of",
]


# Names of positions that act on scores alone.
RELATIVE = re.compile(r"rope|rotary|alibi|freq|relative|slopes|position_embeddings", re.I)


def need_heads(subject: Subject) -> int:
    """Return the number of heads; NotApplicable if it is unknown or 1."""
    if subject.claims.num_heads is None:
        raise NotApplicable("the number of heads is unknown; pass num_heads=")
    if subject.claims.num_heads == 1:
        raise NotApplicable("it has one head")
    return subject.claims.num_heads


def need_plain_values(subject: Subject) -> None:
    """Require that contexts are weights times values, and that values have no positions."""
    need_plain(subject)
    need_no_absolute_positions(subject)
    out_projection(subject)
    if subject.notes.get("gated"):
        raise NotApplicable("its heads are gated")


def need_plain(subject: Subject) -> None:
    """Require that no other feature changes scores or weights."""
    if features := subject.claims.features:
        raise NotApplicable(f"it is more than plain attention ({', '.join(features)})")


def need_no_positions(subject: Subject) -> None:
    """Require that neither tokens nor scores have positions."""
    claims = subject.claims
    if claims.positions is not None:
        raise NotApplicable(f"it has positions ({claims.how.get('positions', claims.positions)})")


def need_no_absolute_positions(subject: Subject) -> None:
    """Require that positions, if any, act on scores and not on values."""
    positions = subject.claims.positions
    if positions is not None and not RELATIVE.search(positions):
        raise NotApplicable(f"its positions may be part of the values ({positions})")


def contexts_of(subject: Subject, module: nn.Module, x: Tensor) -> Tensor:
    """Return the heads' contexts of a call, (B, T, H, E), with their graph if gradients are on.

    They are the input of the linear layer whose output is the module's; without one, the output
    itself.

    Raises:
        NotApplicable: they cannot be found.
    """
    if "features first" not in subject.notes:
        subject.notes["features first"] = _features_first(subject)
    return _contexts(subject, module, x, subject.notes["features first"])


def _contexts(subject: Subject, module: nn.Module, x: Tensor, features_first: bool) -> Tensor:
    H = subject.claims.num_heads
    if H is None:
        raise NotApplicable("the number of heads is unknown; pass num_heads=")
    if not subject.calling.batch_first:
        raise NotApplicable("heads can be inspected only with the batch first")
    name = out_projection(subject)
    if name is None:
        merged = subject.call(module, x).output
    else:
        seen: list[Tensor] = []
        layer = module.get_submodule(name)
        hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            subject.call(module, x)
        finally:
            hook.remove()
        merged = seen[-1]
    if merged.shape[:2] != x.shape[:2] or merged[0, 0].numel() % H:
        raise NotApplicable(f"merged contexts {tuple(merged.shape)} are not {H} heads")
    if features_first:
        return merged.reshape(x.shape[0], x.shape[1], -1, H).transpose(2, 3)
    return merged.reshape(x.shape[0], x.shape[1], H, -1)


def _features_first(subject: Subject) -> bool:
    """True if the merged heads are interleaved: head h has features h, h + H, ...

    Found from a property of every head: its context over two tokens is a mean of their values.
    """
    try:
        need_plain_values(subject)
    except NotApplicable:
        return False
    if subject.claims.window == 1:
        return False
    x = subject.input(1, 2)
    plain, turned = (shares_of(subject, x, order)[0] for order in (False, True))
    allowed = 16 * subject.allowed(subject.input(1, 2))
    return bool(plain > allowed >= turned)


def shares_of(
    subject: Subject,
    x: Tensor,
    features_first: bool | None = None,
    *,
    module: nn.Module | None = None,
    draws: int = 1,
) -> tuple[Tensor, Tensor]:
    """Decompose the last token's context, per head, into the tokens' values: w times one plus u
    times the other. The value of a token is its context alone.

    Args:
        subject: the module under check.
        x: (1, T, d_in) the tokens.
        features_first: order of merged heads; None: find out.
        module: copy that is called with all tokens; None: the one in evaluation.
        draws: number of rows with the same tokens.

    Returns:
        The largest misfit, and the shares per head, (draws, H, T).
    """
    if features_first is None:
        contexts_of(subject, subject.exact, x)  # finds out
        features_first = bool(subject.notes["features first"])
    T, exact = x.shape[1], subject.exact
    calls = [(exact, x[:, t : t + 1]) for t in range(T)]
    calls.append((exact if module is None else module, x.expand(draws, -1, -1)))
    with torch.no_grad():
        *alone, together = (
            _contexts(subject, called, part, features_first)[:, -1] for called, part in calls
        )
    if together.shape[-1] <= T:
        raise NotApplicable(f"its heads have {together.shape[-1]} features: too few")
    values = torch.stack(alone, dim=-1).expand(draws, -1, -1, -1)
    if not (values.isfinite().all() and together.isfinite().all()):
        raise NotApplicable("some tokens give values that are not finite")
    shares = torch.linalg.lstsq(values, together[..., None]).solution
    misfit = difference((values @ shares)[..., 0], together).max()
    return misfit, shares[..., 0]


def out_projection(subject: Subject) -> str | None:
    """Return the name of the layer whose output is the module's; None if its output is the heads'.

    Raises:
        NotApplicable: neither; the contexts of heads cannot be found.
    """
    if "out projection" not in subject.notes:
        subject.notes["out projection"] = _find_out_projection(subject)
    name: str | None = subject.notes["out projection"]
    if name is not None and name.startswith("!"):
        raise NotApplicable(name[1:])
    return name


def _find_out_projection(subject: Subject) -> str | None:
    """As `out_projection`; a string that begins with "!" is the reason for NotApplicable."""
    module, x = subject.exact, subject.input(2).requires_grad_()
    seen: list[tuple[str, Tensor, Tensor]] = []

    def remember(name: str) -> Any:
        return lambda _, inputs, output: seen.append((name, inputs[0], output))

    layers = [(name, layer) for name, layer in module.named_modules() if _like_linear(layer)]
    hooks = [layer.register_forward_hook(remember(name)) for name, layer in layers]
    try:
        with torch.enable_grad():
            output = subject.call(module, x).output
    finally:
        for hook in hooks:
            hook.remove()
    for name, merged, given in reversed(seen):
        same_size = given.numel() == output.numel()
        if same_size and not difference(given.flatten(), output.flatten()).any():
            kind = made_by(merged)
            subject.notes["gated"] = kind == "gated"
            if kind is None:
                return "!other operations lie between its heads and its output projection"
            return name
    if made_by(output) is None:
        return "!other operations surround the attention: its output is not that of a layer or "
        "of heads"
    return None


def _like_linear(layer: nn.Module) -> bool:
    """True for nn.Linear, and for transformers' Conv1D, whose weight is transposed."""
    weight = getattr(layer, "weight", None)
    return (
        isinstance(weight, Tensor)
        and weight.ndim == 2
        and not isinstance(layer, nn.Embedding)
        and not list(layer.children())
    )
