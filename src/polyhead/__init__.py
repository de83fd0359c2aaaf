"""Multi-head attention for PyTorch.

Fused CPU kernels, composable masks, KV caches, per-head analysis, conformance checks. Start with
`MultiHeadAttention`, `attention` and `explain`; masks are in `polyhead.mask`.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from polyhead import errors, mask, positions
from polyhead.backends import Backend, BackendChoice, backends, use_backend
from polyhead.cache import Cache, KVCache, PagedKVCache
from polyhead.call import AttentionCall, Aux, AuxRequest, HeadStats
from polyhead.functional import Explanation, attention, explain
from polyhead.lesson import Lesson, lesson
from polyhead.modules import (
    CausalAttention,
    MultiHeadAttention,
    MultiHeadAttentionWrapper,
    MultiHeadLatentAttention,
)
from polyhead.positions import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NTKScaling,
    Rope,
    RopeScaling,
    YarnScaling,
    alibi_slopes,
)
from polyhead.trace import Trace, trace

if TYPE_CHECKING:
    from polyhead import check, convert, drop_in, integrations, look

__all__ = [
    "AttentionCall",
    "Aux",
    "AuxRequest",
    "Backend",
    "BackendChoice",
    "Cache",
    "CausalAttention",
    "DynamicNTKScaling",
    "Explanation",
    "HeadStats",
    "KVCache",
    "Lesson",
    "LinearScaling",
    "Llama3Scaling",
    "LongRopeScaling",
    "MultiHeadAttention",
    "MultiHeadAttentionWrapper",
    "MultiHeadLatentAttention",
    "NTKScaling",
    "PagedKVCache",
    "Rope",
    "RopeScaling",
    "Trace",
    "YarnScaling",
    "alibi_slopes",
    "attention",
    "backends",
    "check",
    "convert",
    "drop_in",
    "errors",
    "explain",
    "integrations",
    "lesson",
    "look",
    "mask",
    "positions",
    "trace",
    "use_backend",
]

_LOADED_ON_USE = {"check", "convert", "drop_in", "integrations", "look"}

try:
    __version__ = version("polyhead")
except PackageNotFoundError:  # a checkout on sys.path, not installed
    __version__ = "0+unknown"


if not TYPE_CHECKING:  # for which any name would be there, and be Any

    def __getattr__(name: str) -> Any:
        if name in _LOADED_ON_USE:
            return importlib.import_module(f"polyhead.{name}")
        raise AttributeError(f"module 'polyhead' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
