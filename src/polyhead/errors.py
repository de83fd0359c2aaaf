"""Exceptions of polyhead.

    PolyheadError
    |-- ArgumentError (ValueError)                an argument breaks a rule
    |   |-- ShapeError                            ... of shape or size
    |   |-- DeviceError                           ... of device
    |   `-- DtypeError (also TypeError)           ... of dtype or type
    |-- BackendError (NotImplementedError)        no requested backend can run this call
    |-- ConversionError (ValueError)              weights cannot be converted to a layout
    |-- ModelError (ValueError)                   a model file or folder cannot be read or used
    `-- DependencyError (ImportError)             an optional package is missing

Each also derives from the builtin that a caller would catch. A message names the argument, the
rule, the value it got and the remedy; an `ArgumentError` has the four as attributes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
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
    """Base class of all errors of polyhead."""


class ArgumentError(PolyheadError, ValueError):
    """Invalid argument: it breaks a rule.

    Args:
        argument: name of the argument, as the caller wrote it.
        rule: the violated rule, as a clause that follows the name ("must be positive").
        got: the value that was passed.
        remedy: the action that fixes it.

    >>> raise ArgumentError("num_heads", "must be positive", 0, "pass at least 1")
    Traceback (most recent call last):
    polyhead.errors.ArgumentError: num_heads must be positive; got 0; pass at least 1
    """

    def __init__(self, argument: str, rule: str, got: object, remedy: str) -> None:
        self.argument = argument
        self.rule = rule
        self.got = got
        self.remedy = remedy
        # Not super().__init__: torch.compile cannot trace it, and would raise its own error.
        self.args = (f"{argument} {rule}; got {got}; {remedy}",)

    def __reduce__(self) -> tuple[type[ArgumentError], tuple[str, str, object, str]]:
        return type(self), (self.argument, self.rule, self.got, self.remedy)


class ShapeError(ArgumentError):
    """Invalid shape or size of an argument."""


class DeviceError(ArgumentError):
    """Device mismatch: an argument is on another device than the others."""


class DtypeError(ArgumentError, TypeError):
    """Invalid dtype or type of an argument. Nothing is cast silently."""


class BackendError(PolyheadError, NotImplementedError):
    """Unsupported call: no requested backend can run it.

    Args:
        reasons: per backend, all reasons why it cannot run the call.
    """

    def __init__(self, reasons: Mapping[str, Sequence[str]]) -> None:
        self.reasons = {name: tuple(why) for name, why in reasons.items()}
        lines = [f"  {name}: {reason}" for name, why in self.reasons.items() for reason in why]
        self.args = (
            "no requested backend can run this call:\n"
            + "\n".join(lines)
            + '\n  pass backend="auto" to let polyhead choose one that can',
        )

    def __reduce__(self) -> tuple[type[BackendError], tuple[dict[str, tuple[str, ...]]]]:
        return type(self), (self.reasons,)


class ConversionError(PolyheadError, ValueError):
    """Failed conversion: the requested layout cannot express the same function."""


class ModelError(PolyheadError, ValueError):
    """Model file or folder that cannot be found, read or used."""


class DependencyError(PolyheadError, ImportError):
    """Missing optional package; the message contains the command that installs it."""


def did_you_mean(got: object, names: Iterable[str], otherwise: str) -> str:
    """Return a remedy for an unknown name: the nearest of the known ones, or `otherwise`.

    >>> did_you_mean("referense", ["cpu", "reference"], "choose one of these")
    "did you mean 'reference'?"
    >>> did_you_mean("x", ["cpu", "reference"], "choose one of these")
    'choose one of these'
    """
    near = nearest(got, names)
    return otherwise if near is None else f"did you mean {near!r}?"


def nearest(got: object, names: Iterable[str]) -> str | None:
    """Return the known name nearest to an unknown one, or None if all are far from it."""
    in_lower_case = {name.lower(): name for name in names}
    near = difflib.get_close_matches(str(got).lower(), in_lower_case, n=1)
    return in_lower_case[near[0]] if near else None


def install_command(extra: str) -> str:
    """Return the command that installs what an extra of polyhead needs.

    >>> install_command("cli")
    'pip install -e ".[cli]" in a checkout of polyhead'
    """
    return f'pip install -e ".[{extra}]" in a checkout of polyhead'


def check_count(
    argument: str,
    count: object,
    least: int,
    remedy: str = "count tokens or sizes",
    error: type[ArgumentError] = ArgumentError,
) -> None:
    """Raise unless `count` is an integer of at least `least`; bools are not integers here.

    >>> check_count("num_heads", 0, 1, "count from 1")
    Traceback (most recent call last):
    polyhead.errors.ArgumentError: num_heads must be an integer of at least 1; got 0; count from 1
    """
    if not isinstance(count, int) or isinstance(count, bool) or count < least:
        if isinstance(count, Integral) and not isinstance(count, int):  # numpy's
            remedy = "convert it with int()"
        raise error(argument, f"must be an integer of at least {least}", repr(count), remedy)


# Tensor subclasses with their own dispatch that compute attention as plain tensors do.
_TRANSPARENT = ("AsyncCollectiveTensor", "FakeTensor", "FunctionalTensor", "LazyCacheTensor")


# Tensor subclasses that do not hold their elements, and the remedy for each.
_REMEDIES = {
    "DTensor": "pass .to_local() on every rank, of whole heads, rows and tokens",
    "CausalBias": 'pass mask=polyhead.mask.causal(), with align="start" for causal_upper_left',
}


def check_is_plain(argument: str, tensor: Any) -> None:
    """Raise unless a tensor is plain: wrappers such as `DTensor` do not hold their elements."""
    kind = type(tensor)
    if kind.__name__ in ("Tensor", "Parameter"):
        return
    names = [base.__name__ for base in kind.__mro__]
    remedy = next((_REMEDIES[name] for name in names if name in _REMEDIES), "")
    # Subclasses without a dispatch of their own inherit torch's builtin function.
    is_wrapper = not isinstance(kind.__torch_dispatch__, BuiltinFunctionType)
    if remedy or (is_wrapper and kind.__name__ not in _TRANSPARENT):
        remedy = remedy or "convert it to a plain tensor"
        raise DtypeError(argument, "must be a plain tensor", kind.__name__, remedy)
