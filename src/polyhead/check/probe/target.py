"""Load targets of the command line: a class, function or object in a file, package or notebook.
Loading runs its code.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import linecache
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polyhead.check.law import first_line
from polyhead.check.probe.configurations import (
    GUESSES,
    SIZES_OF_TRANSFORMERS,
    configurations,
    fill_parameters,
    is_configuration,
)
from polyhead.check.probe.transformers import is_of_transformers
from polyhead.errors import ArgumentError, did_you_mean

__all__ = ["build", "load", "parse_arguments"]


def load(target: str) -> Any:
    """Return the object that a target names.

    Args:
        target: "path/to/file.py:Name", "path/to/file.ipynb:Name" or "package.module:Name"; Name
            may have dots.

    Raises:
        ArgumentError: there is no such file, module or name, or its code raises.
    """
    place, colon, name = target.rpartition(":")
    if not colon or not place or not name:
        raise ArgumentError(
            "TARGET",
            "must be FILE.py:NAME, FILE.ipynb:NAME or PACKAGE.MODULE:NAME",
            target,
            "add :NAME",
        )
    path = Path(place)
    try:
        if path.suffix in (".py", ".ipynb"):
            module = _from_file(path)
        else:
            # As `python -m` does; the console script does not.
            if "" not in sys.path:
                sys.path.insert(0, "")
            module = importlib.import_module(place)
    except FileNotFoundError:
        remedy = did_you_mean(place, map(str, path.parent.glob("*")), "check it")
        raise ArgumentError("TARGET", "must name a file that exists", place, remedy) from None
    except (Exception, SystemExit) as error:  # of unknown code
        raise ArgumentError(
            "TARGET",
            "must be importable",
            f"{place}: {type(error).__name__}: {first_line(error)}",
            _remedy(error, path, name),
        ) from error
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            known = [
                n
                for n, v in vars(module).items()
                if isinstance(v, type) and issubclass(v, nn.Module)
            ]
            raise ArgumentError(
                "TARGET",
                f"must name something in {place} (modules there: {', '.join(known) or 'none'})",
                name,
                did_you_mean(part, known, "check the name"),
            )
        found = getattr(found, part)
    return found


def build(
    found: Any, given: Mapping[str, Any]
) -> tuple[Any, dict[str, Any], Callable[[], nn.Module] | None]:
    """Return a module or function from a loaded target.

    Args:
        found: a module, a class of modules, or a function. A function whose parameters are not
            those of attention (query, key, value) is called to create a module.
        given: arguments of the constructor. Other required arguments are guessed by their names.

    Returns:
        The module or function, the guessed arguments, and a function that creates another one.

    Raises:
        ArgumentError: a required argument cannot be guessed, or the constructor raises.
    """
    if isinstance(found, nn.Module):
        return found, {}, None
    if not callable(found):
        raise ArgumentError(
            "TARGET",
            "must be a module, a class or a function",
            type(found).__name__,
            "name another",
        )
    if not isinstance(found, type) and takes_query_key_value(found):
        return found, {}, None
    failures: list[tuple[Exception | SystemExit, str]] = []
    for arguments, guessed in _arguments(found, given):

        def make(arguments: dict[str, Any] = arguments) -> nn.Module:
            return _made(found, arguments)

        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                module = make()
        except (Exception, SystemExit) as error:  # of unknown code
            values = ", ".join(f"{k}={guessed.get(k, v)}" for k, v in arguments.items())
            failures.append((error, values))
            continue
        if not isinstance(module, nn.Module):
            raise ArgumentError(
                "TARGET", "must give an nn.Module", type(module).__name__, "name another"
            )
        return module, guessed, make
    first, values = failures[0]
    config = next((n for n in inspect.signature(found).parameters if is_configuration(n)), None)
    inside = "" if config is None else f" or --arg {config}.NAME=VALUE"
    raise ArgumentError(
        "TARGET",
        "must be constructible",
        f"{type(first).__name__}: {first_line(first)} from {found.__name__}({values})",
        f"give its arguments with --arg NAME=VALUE{inside}",
    ) from first


def _made(found: Any, arguments: Mapping[str, Any]) -> nn.Module:
    """Return an instance; uninitialized parameters are NaN, not arbitrary memory."""
    required = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    # Not torch.use_deterministic_algorithms, which imports its compiler: seconds.
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    try:
        module: nn.Module = found(**arguments)
    finally:
        torch._C._set_deterministic_algorithms(required, warn_only=warn_only)
    config = next((arguments[n] for n in arguments if is_configuration(n)), None)
    if is_of_transformers(module) and config is not None:
        if not hasattr(module, "config"):
            module.config = config  # documents how its model calls it
        fill_parameters(module, config)
    return module


def _remedy(error: BaseException, path: Path, name: str) -> str:
    """Return a remedy for a file or package that cannot be imported."""
    if "relative import" in str(error) and path.suffix == ".py":
        folder, parts = path.resolve().parent, [path.stem]
        while (folder / "__init__.py").exists() or len(parts) == 1:
            folder, parts = folder.parent, [folder.name, *parts]
        return f"name it in its package: polyhead check {'.'.join(parts)}:{name}, run in {folder}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"install {error.name}, or run where it can be imported"
    return "import it in python to see where it raises"


def takes_query_key_value(function: Any) -> bool:
    """True if a function's first three parameters are those of attention."""
    try:
        names = list(inspect.signature(function).parameters)[:3]
    except (TypeError, ValueError):  # a builtin, such as scaled_dot_product_attention
        return "attention" in getattr(function, "__name__", "")
    return [name.lstrip("_")[:1].lower() for name in names] == ["q", "k", "v"]


def parse_arguments(pairs: tuple[str, ...]) -> dict[str, Any]:
    """NAME=VALUE pairs; a value is a Python literal, or else a word.

    >>> parse_arguments(("d_model=64", "bias=False", "norm=rms"))
    {'d_model': 64, 'bias': False, 'norm': 'rms'}
    """
    parsed: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise ArgumentError("--arg", "must be NAME=VALUE", pair, "such as --arg d_model=64")
        try:
            parsed[name] = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            parsed[name] = text
    return parsed


def _arguments(
    found: Any, given: Mapping[str, Any]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Arguments of a constructor, and those among them that were guessed, the likeliest first."""
    arguments = {name: value for name, value in given.items() if "." not in name}
    guessed: dict[str, Any] = {}
    parameters = _signature(found)
    theirs = is_of_transformers(found)
    guesses = GUESSES | SIZES_OF_TRANSFORMERS if theirs else GUESSES
    wanted: inspect.Parameter | None = None
    for name, parameter in parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or name in given:
            continue
        needed = parameter.default is parameter.empty
        inside = any(n.startswith(f"{name}.") for n in given)
        if is_configuration(name) and (needed or inside or theirs):
            wanted = parameter
        elif name in guesses and (needed or (theirs and name.startswith("layer_"))):
            arguments[name] = guessed[name] = guesses[name]
        elif needed:
            raise ArgumentError(
                "--arg",
                f"must give {name}, which {found.__name__} requires: it cannot be guessed",
                ", ".join(given) or "nothing",
                f"add --arg {name}=VALUE",
            )
    for name in given:
        place = name.partition(".")[0]
        if place != name and (wanted is None or place != wanted.name):
            raise ArgumentError(
                "--arg",
                f"must name a parameter of {found.__name__}: {', '.join(parameters) or 'none'}",
                name,
                did_you_mean(place, parameters, "check the name before the dot"),
            )
    if wanted is None:
        yield arguments, guessed
        return
    inside_given = {n.split(".", 1)[1]: v for n, v in given.items() if "." in n}
    for config, words in configurations(found, wanted, inside_given):
        yield arguments | {wanted.name: config}, guessed | {wanted.name: words}


def _signature(found: Any) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(found).parameters)
    except (TypeError, ValueError):  # of a builtin
        return {}


def _from_file(path: Path) -> types.ModuleType:
    if path.suffix == ".ipynb":
        return _from_notebook(path)
    name = f"_polyhead_target_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.exists():
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    # Files in its folder are importable, as for a script; dataclasses need it in sys.modules.
    sys.modules[name] = module
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module


def _from_notebook(path: Path) -> types.ModuleType:
    """Run the code cells of a notebook in order.

    Magics (%, !) are skipped. An exception in a cell is printed, and the other cells still run.
    """
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    module = types.ModuleType(f"_polyhead_target_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    for number, cell in enumerate(cells):
        if cell["cell_type"] != "code":
            continue
        lines = "".join(cell["source"]).splitlines(keepends=True)
        source = "".join("\n" if line.lstrip().startswith(("%", "!")) else line for line in lines)
        name = f"<{path.name} cell {number}>"
        # For inspect.getsource.
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        try:
            exec(compile(source, name, "exec"), module.__dict__)
        except (Exception, SystemExit) as error:  # data that is not here, plots, ...
            print(
                f"cell {number} of {path.name} raised {type(error).__name__}: {error}",
                file=sys.stderr,
            )
    return module
