"""What every layout shares: plain linear layers in, a module with their weights out."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

from polyhead.errors import ConversionError

__all__ = ["check_plain", "copied", "filled"]

M = TypeVar("M", bound=nn.Module)


def check_plain(name: str, projection: nn.Module) -> None:
    """Adapters and quantised layers hold more than a weight and a bias: they are refused."""
    if type(projection) is not nn.Linear:
        raise ConversionError(
            f"{name} must be a plain nn.Linear to be converted; got {type(projection).__name__}; "
            "merge adapters first"
        )


def copied(name: str, projection: nn.Module) -> dict[str, Tensor]:
    """Copies of a layer's parameters as state-dict entries below `name`, trainable as they were."""
    return {
        f"{name}.{kind}": parameter.detach().clone().requires_grad_(parameter.requires_grad)
        for kind, parameter in projection.named_parameters()
    }


def filled(module: M, state: dict[str, Tensor], source: nn.Module) -> M:
    """`module`, built on the meta device so that no random numbers are drawn, with its weights."""
    module.load_state_dict(state, assign=True)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(state[name].requires_grad)
    return module.train(source.training)
