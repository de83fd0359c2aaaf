"""`import flash_attn` finds this package where flash-attn is not installed: explicit, undoable."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder, PackageNotFoundError
from types import ModuleType, TracebackType
from typing import Any

from polyhead.errors import ArgumentError

__all__ = ["VERSION", "Installation", "install", "uninstall"]

VERSION = "2.8.3+polyhead"

_HERE = "polyhead.drop_in.flash_attn"
# Modules of flash-attn, and the modules here whose names they offer.
_MODULES = {
    "flash_attn": f"{_HERE}.flash_attn_interface",
    "flash_attn.flash_attn_interface": f"{_HERE}.flash_attn_interface",
    "flash_attn.bert_padding": f"{_HERE}.bert_padding",
    "flash_attn.layers": None,
    "flash_attn.layers.rotary": f"{_HERE}.rotary",
}
_PACKAGES = ("flash_attn", "flash_attn.layers")


class Installation:
    """Installation of the stand-in. Used as a context manager, it is undone at the end.

    An installation that was there before the context stays.
    """

    def __init__(self, is_new: bool) -> None:
        self._is_new = is_new

    def __enter__(self) -> Installation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._is_new:
            uninstall()

    def __repr__(self) -> str:
        return f"flash_attn {VERSION}: {_HERE}"


def install() -> Installation:
    """Make `import flash_attn` find this package, in this process, where it is not installed.

    `flash_attn`, `flash_attn.flash_attn_interface`, `flash_attn.bert_padding` and
    `flash_attn.layers.rotary` can be imported, and no other module of flash-attn.
    `importlib.metadata.version("flash-attn")` is "2.8.3+polyhead": the release whose functions
    these are. Call it before the import of a library that looks for flash-attn: many look once.

    Returns:
        An `Installation`: ``with install(): ...`` undoes it at the end.

    Raises:
        ArgumentError: another flash_attn is installed.

    >>> with install():
    ...     import flash_attn
    ...     from flash_attn.bert_padding import unpad_input
    ...     flash_attn.__version__
    '2.8.3+polyhead'
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return Installation(is_new=False)
    found = _other()
    if found is not None:
        raise ArgumentError(
            "install()",
            "must not replace an installed flash_attn",
            found,
            "import it, or import the functions from polyhead.drop_in.flash_attn by name",
        )
    sys.meta_path.insert(0, _Finder())
    importlib.invalidate_caches()
    return Installation(is_new=True)


def uninstall() -> None:
    """Undo `install`. Functions that were imported meanwhile still work.

    >>> uninstall()
    """
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
    for name in _MODULES:
        if isinstance(getattr(sys.modules.get(name), "__loader__", None), _Loader):
            del sys.modules[name]


def _other() -> str | None:
    """Location of another flash_attn, or None."""
    if "flash_attn" in sys.modules:
        return f"{sys.modules['flash_attn']!r}, imported"
    spec = importlib.util.find_spec("flash_attn")
    if spec is not None:
        return f"{spec.origin or list(spec.submodule_search_locations or ())}"
    try:
        return f"flash-attn {importlib.metadata.version('flash-attn')}"
    except PackageNotFoundError:
        return None


class _Finder(MetaPathFinder):
    """Finder of the modules, and of the metadata that libraries read versions from."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname not in _MODULES:
            return None
        origin = importlib.import_module(_HERE).__file__
        return ModuleSpec(fullname, _Loader(), origin=origin, is_package=fullname in _PACKAGES)

    @staticmethod
    def find_distributions(
        context: DistributionFinder.Context | None = None,
    ) -> Iterable[Distribution]:
        name = None if context is None else context.name
        if name is None or name.lower().replace("_", "-") == "flash-attn":
            yield _Distribution()


class _Loader(Loader):
    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        offered: list[str] = []
        if (source_name := _MODULES[name]) is not None:
            source = importlib.import_module(source_name)
            offered = source.__all__
            vars(module).update({public: getattr(source, public) for public in offered})
        module.__doc__ = f"Stand-in for {name}: {_HERE}."
        module.__file__ = module.__spec__.origin if module.__spec__ else None
        if name == "flash_attn":
            vars(module)["__version__"] = VERSION
        vars(module)["__all__"] = offered


class _Distribution(Distribution):
    """Metadata of the stand-in."""

    def read_text(self, filename: str) -> str | None:
        return {
            "METADATA": f"Metadata-Version: 2.1\nName: flash-attn\nVersion: {VERSION}\n"
            "Summary: stand-in of polyhead, installed by polyhead.drop_in.flash_attn.install()\n",
            "top_level.txt": "flash_attn\n",
        }.get(filename)

    def locate_file(self, path: Any) -> Any:
        raise FileNotFoundError(f"{path}: the stand-in for flash-attn has no files")
