"""Every exception that polyhead raises on purpose.

    PolyheadError
    |-- ArgumentError (ValueError)                an argument breaks a rule
    |   |-- ShapeError                            ... of shape or size
    |   |-- DeviceError                           ... of device
    |   `-- DtypeError (also TypeError)           ... of dtype or type
    |-- BackendError (NotImplementedError)        no backend asked for can run this call
    |-- ConversionError (ValueError)              weights cannot move and keep the function
    |-- ModelError (ValueError)                   a model file or folder cannot be read or used
    `-- DependencyError (ImportError)             an optional package is missing

Each is also the builtin a caller would catch. A message names the argument, the rule, what was
got and the remedy; those that come from arguments carry the four as attributes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from types import BuiltinFunctionType
from typing import Any

__all__ = [
    "ArgumentError",
    "BackendError",
    "ConversionError",
    "DependencyError",
    "DeviceError",
    "DtypeError",
    "ModelError",
    "PolyheadError",
    "ShapeError",
]


class PolyheadError(Exception):
    """Base of every error raised by polyhead."""


class ArgumentError(PolyheadError, ValueError):
    """An argument breaks a rule.

    Args:
        argument: name of the argument, as the caller wrote it.
        rule: what must hold, as a clause that follows the name ("must be positive").
        got: what was passed.
        remedy: what to do instead.

    >>> raise ArgumentError("num_heads", "must be positive", 0, "pass at least 1")
    Traceback (most recent call last):
    polyhead.errors.ArgumentError: num_heads must be positive; got 0; pass at least 1
    """

    def __init__(self, argument: str, rule: str, got: object, remedy: str) -> None:
        self.argument = argument
        self.rule = rule
        self.got = got
        self.remedy = remedy
        # Not super().__init__, which torch.compile cannot trace: its error would not name this one.
        self.args = (f"{argument} {rule}; got {got}; {remedy}",)

    def __reduce__(self) -> tuple[type[ArgumentError], tuple[str, str, object, str]]:
        return type(self), (self.argument, self.rule, self.got, self.remedy)


class ShapeError(ArgumentError):
    """An argument has a shape or size that breaks a rule."""


class DeviceError(ArgumentError):
    """An argument is on another device than its companions."""


class DtypeError(ArgumentError, TypeError):
    """An argument has a dtype or type that breaks a rule. Nothing is cast silently."""


class BackendError(PolyheadError, NotImplementedError):
    """No backend that was asked for can run this call.

    Args:
        reasons: for each backend tried, everything that stands in its way.
    """

    def __init__(self, reasons: Mapping[str, Sequence[str]]) -> None:
        self.reasons = {name: tuple(why) for name, why in reasons.items()}
        lines = [f"  {name}: {reason}" for name, why in self.reasons.items() for reason in why]
        self.args = (
            "no backend asked for can run this call:\n"
            + "\n".join(lines)
            + '\n  pass backend="auto" to let polyhead choose one that can',
        )

    def __reduce__(self) -> tuple[type[BackendError], tuple[dict[str, tuple[str, ...]]]]:
        return type(self), (self.reasons,)


class ConversionError(PolyheadError, ValueError):
    """Weights cannot be moved to the layout asked for without changing the function."""


class ModelError(PolyheadError, ValueError):
    """A model file or folder cannot be found, read or used."""


class DependencyError(PolyheadError, ImportError):
    """An optional package is needed and not installed; the message says how to get it."""


def check_count(
    argument: str,
    count: object,
    least: int,
    remedy: str = "count tokens or sizes",
    error: type[ArgumentError] = ArgumentError,
) -> None:
    """Raise unless `count` is an integer of at least `least`; True and False are none.

    >>> check_count("num_heads", 0, 1, "count from 1")
    Traceback (most recent call last):
    polyhead.errors.ArgumentError: num_heads must be an integer of at least 1; got 0; count from 1
    """
    if not isinstance(count, int) or isinstance(count, bool) or count < least:
        if isinstance(count, Integral) and not isinstance(count, int):  # numpy's
            remedy = "convert it with int()"
        raise error(argument, f"must be an integer of at least {least}", repr(count), remedy)


# Kinds of tensors with operators of their own that compute attention as plain tensors do.
_TRANSPARENT = ("AsyncCollectiveTensor", "FakeTensor", "FunctionalTensor", "LazyCacheTensor")


# And those without the numbers that they stand for, whichever these are.
_REMEDIES = {
    "DTensor": "pass .to_local() on every rank, of whole heads, rows and tokens",
    "CausalBias": 'pass mask=polyhead.mask.causal(), with align="start" for causal_upper_left',
}


def check_is_plain(argument: str, tensor: Any) -> None:
    """Raise unless a tensor holds its numbers: a `DTensor` or another wrapper does not."""
    kind = type(tensor)
    if kind.__name__ in ("Tensor", "Parameter"):
        return
    names = [base.__name__ for base in kind.__mro__]
    remedy = next((_REMEDIES[name] for name in names if name in _REMEDIES), "")
    # A function of torch's, in subclasses that change no operator.
    is_wrapper = not isinstance(kind.__torch_dispatch__, BuiltinFunctionType)
    if remedy or (is_wrapper and kind.__name__ not in _TRANSPARENT):
        remedy = remedy or "pass a plain tensor made of it"
        raise DtypeError(argument, "must be a plain tensor", kind.__name__, remedy)
