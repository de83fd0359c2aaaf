"""Multi-head attention for PyTorch: right, fast, seen, at home.

Start with `MultiHeadAttention`, `attention` and `explain`; masks are in `polyhead.mask`.
"""

from importlib.metadata import version

from polyhead import check, convert, drop_in, errors, integrations, look, mask
from polyhead.backends import Backend, backends, use_backend
from polyhead.cache import Cache, KVCache, PagedKVCache
from polyhead.call import AttentionCall, Aux, AuxRequest, HeadStats
from polyhead.functional import attention, explain
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

__all__ = [
    "AttentionCall",
    "Aux",
    "AuxRequest",
    "Backend",
    "Cache",
    "CausalAttention",
    "DynamicNTKScaling",
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
    "trace",
    "use_backend",
]

__version__ = version("polyhead")
