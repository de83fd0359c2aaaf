"""What every layout shares: plain linear layers in, a module with their weights out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import Tensor, nn

from polyhead.errors import ConversionError
from polyhead.modules import MultiHeadAttention
from polyhead.modules.arguments import is_plain, kind_of

__all__ = [
    "check_kind",
    "check_plain",
    "copied",
    "filled",
    "parameters_of",
    "rms_norm",
    "separate_parameters",
]

M = TypeVar("M", bound=nn.Module)

# Plain linear layers under other names, known by them: transformers is not imported.
_PLAIN = {"Conv1D", "FalconLinear"}


def check_kind(argument: str, module: object, kind: type[nn.Module], remedy: str) -> None:
    if not isinstance(module, kind):
        raise ConversionError(
            f"{argument} must be a {kind.__name__}; got {type(module).__name__}; {remedy}"
        )


def check_plain(name: str, projection: nn.Module) -> None:
    """Adapters and quantised layers hold more than a weight and a bias: they are refused."""
    is_theirs = type(projection).__name__ in _PLAIN and "weight" in projection._parameters
    if not is_plain(projection) and not is_theirs:
        raise ConversionError(
            f"{name} must be a plain nn.Linear to be converted; got {kind_of(projection)}; "
            "merge adapters first"
        )


def copied(name: str, projection: nn.Module) -> dict[str, Tensor]:
    """Copies of a layer's parameters as state-dict entries below `name`, trainable as they were."""
    return {
        f"{name}.{kind}": parameter.detach().clone().requires_grad_(parameter.requires_grad)
        for kind, parameter in projection.named_parameters()
    }


def parameters_of(module: nn.Module, projections: Iterable[str]) -> dict[str, Tensor]:
    """All parameters by name, after checking that the projections are plain layers.

    Raises:
        ConversionError: one of them is an adapter, say, or quantised.
    """
    for name in projections:
        parent, _, child = name.rpartition(".")
        layer = getattr(module.get_submodule(parent), child, None)
        if layer is not None:
            check_plain(name, layer)
    return dict(module.named_parameters())


def separate_parameters(mha: nn.Module) -> dict[str, Tensor]:
    """The parameters of a module of ours, those of a fused W_qkv apart."""
    projections = [name for name, _ in mha.named_children() if name.startswith(("W_", "out_proj"))]
    parameters = parameters_of(mha, projections)
    for kind in ("weight", "bias") if isinstance(mha, MultiHeadAttention) and mha.fused else ():
        fused = parameters.pop(f"W_qkv.{kind}", None)
        if fused is not None:
            names = [f"{name}.{kind}" for name in ("W_query", "W_key", "W_value")]
            parts = fused.detach().split(mha.qkv_sizes)
            for name, part in zip(names, parts, strict=True):
                parameters[name] = part.requires_grad_(fused.requires_grad)
    return parameters


def filled(module: M, state: dict[str, Tensor], source: nn.Module) -> M:
    """`module`, built on the meta device so that no random numbers are drawn, with its weights."""
    module.load_state_dict(state, assign=True)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(state[name].requires_grad)
    return module.train(source.training)


def rms_norm(theirs: Any) -> Callable[[int], nn.Module]:
    """What makes a norm as theirs is: root mean square, its weight alone."""
    return functools.partial(nn.RMSNorm, eps=theirs.variance_epsilon)
