"""Errors of the library in the words of a command: its options in place of Python's arguments."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from polyhead.errors import PolyheadError

__all__ = ["in_options"]


def in_options(error: PolyheadError, command: click.Command) -> str:
    """Return the message of an error, with the command's options for the arguments it names.

    A command declares each option with the name of the library's argument: `"--heads",
    "num_heads"`. Values that were received are kept as they are.
    """
    from polyhead.errors import ArgumentError

    options = {param.name: param for param in command.params if param.name}
    if not isinstance(error, ArgumentError):
        return _translated(str(error), options)
    if error.argument not in options:  # of the user's own code, or translated already
        rule, remedy = (_assignments(text, options) for text in (error.rule, error.remedy))
        return f"{error.argument} {rule}; got {error.got}; {remedy}"
    name = _option(options[error.argument])
    rule, remedy = (_translated(text, options) for text in (error.rule, error.remedy))
    return f"{name} {rule}; got {error.got}; {remedy}"


def _option(param: click.Parameter) -> str:
    if isinstance(param, click.Argument):
        return param.human_readable_name
    return max(param.opts, key=len)


def _translated(text: str, options: dict[str, click.Parameter]) -> str:
    """Translate `name=value`, and names that no prose has: at the beginning, or with a _."""
    text = _assignments(text, options)
    for name, param in options.items():
        place = rf"(?<![\w./-]){name}(?![\w./-])" if "_" in name else rf"^{name}(?= )"
        text = re.sub(place, _option(param), text)
    return text


def _assignments(text: str, options: dict[str, click.Parameter]) -> str:
    """Translate `name=value`, where it is no part of `--arg name=value` or of a path."""

    def option(match: re.Match[str]) -> str:
        param = options[match["name"]]
        value = match["value"]
        if value == "False" and param.secondary_opts:
            return param.secondary_opts[0]
        if not value or value in ("True", "False"):
            return _option(param)
        return f"{_option(param)} {value}"

    names = "|".join(map(re.escape, options))
    pattern = rf"(?<![\w./-])(?<!--arg )(?P<name>{names})=(?P<value>(?:'[^']*'|[\w.]*\w)?)"
    return re.sub(pattern, option, text)
