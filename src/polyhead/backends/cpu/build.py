"""Why an installed package has no kernels, and the command that builds them there."""

from __future__ import annotations

import json
import shlex
import sys
from importlib import metadata
from urllib.parse import unquote, urlsplit

__all__ = ["why_not_built"]


def why_not_built() -> str:
    """The reason that the build kept (scripts/build_backend.py), and the remedy."""
    try:
        distribution = metadata.distribution("polyhead")
    except metadata.PackageNotFoundError:
        return "was not built, as polyhead is not installed here; pip install a checkout of it"
    kept = (distribution.read_text("no_kernels.txt") or "").splitlines()
    reason, first = kept if len(kept) == 2 else ("its library is not among the package's files", "")
    # torch is there by now: this module is imported by what imports it.
    first = "" if first in ("", "install torch") else f"{first}, then "
    return f"was not built: {reason}; {first}run: {_command(distribution)}"


def _command(distribution: metadata.Distribution) -> str:
    """Install again what was installed, by the pip of this Python."""
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    words = [sys.executable, "-m", "pip", "install", "--force-reinstall", "--no-deps"]
    words += ["--no-cache-dir"]  # which may hold the wheel without kernels
    parts = urlsplit(origin.get("url", ""))
    if parts.scheme != "file":
        words += [
            "--no-binary",
            "polyhead",
            origin.get("url") or f"polyhead=={distribution.version}",
        ]
    else:
        editable = origin.get("dir_info", {}).get("editable", False)
        words += ["--editable"] * editable + [unquote(parts.path)]
    return shlex.join(words)
