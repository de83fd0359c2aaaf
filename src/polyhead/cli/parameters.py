"""Parameter types shared by the commands; an unknown name is refused with the nearest known one."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from polyhead.errors import did_you_mean, nearest

__all__ = ["NewFile", "OneOf", "ReadablePath"]


class OneOf(click.Choice[str]):
    """One of several names."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in self.choices:
            known = ", ".join(map(repr, self.choices))
            hint = did_you_mean(value, self.choices, "choose one of these")
            self.fail(f"{value!r} is not one of {known}; {hint}", param, ctx)
        return str(value)


class ReadablePath(click.Path):
    """An existing file, or with `folders` a folder too."""

    def __init__(self, *, folders: bool = False) -> None:
        super().__init__(exists=True, dir_okay=folders, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not os.path.exists(value):
            hint = _nearest_path(Path(value)) or "check the path"
            self.fail(f"{os.fspath(value)!r} does not exist; {hint}", param, ctx)
        return super().convert(value, param, ctx)


class NewFile(click.Path):
    """A file to write, refused before minutes of work if its folder is missing."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False, writable=True, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        folder = Path(value).parent
        if not os.path.isdir(folder):
            hint = _nearest_path(folder) or "make it"
            self.fail(f"there is no folder {str(folder)!r}; {hint}", param, ctx)
        return super().convert(value, param, ctx)


def _nearest_path(path: Path) -> str | None:
    """Return a hint with the name nearest to the first missing part of a path, or None."""
    place = next(parent for parent in path.parents if os.path.isdir(parent))
    missing, *rest = path.relative_to(place).parts
    name = None
    with suppress(OSError):  # a folder that may not be listed
        name = nearest(missing, os.listdir(place))
    return None if name is None else f"did you mean {str(place.joinpath(name, *rest))!r}?"
