"""Multi-head attention for PyTorch: right, fast, seen, at home.

Start with `MultiHeadAttention`, `attention` and `explain`; masks are in `polyhead.mask`.
"""

from importlib.metadata import version

from polyhead import convert, errors, integrations, look, mask
from polyhead.backends import Backend, backends, use_backend
from polyhead.call import AttentionCall, Aux, AuxRequest, HeadStats
from polyhead.functional import attention, explain
from polyhead.modules import CausalAttention, MultiHeadAttention, MultiHeadAttentionWrapper
from polyhead.positions import Rope

__all__ = [
    "AttentionCall",
    "Aux",
    "AuxRequest",
    "Backend",
    "CausalAttention",
    "HeadStats",
    "MultiHeadAttention",
    "MultiHeadAttentionWrapper",
    "Rope",
    "attention",
    "backends",
    "convert",
    "errors",
    "explain",
    "integrations",
    "look",
    "mask",
    "use_backend",
]

__version__ = version("polyhead")
