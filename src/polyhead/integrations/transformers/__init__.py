"""`attn_implementation="polyhead"` in Hugging Face models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polyhead.integrations.transformers.registration import register
from polyhead.integrations.transformers.status import LayerStatus, ModelStatus, report

if TYPE_CHECKING:
    from polyhead.integrations.transformers.cache import Cache

__all__ = ["Cache", "LayerStatus", "ModelStatus", "register", "report"]


def __getattr__(name: str) -> Any:
    # A class of transformers', which is imported when it is asked for.
    if name == "Cache":
        from polyhead.integrations.transformers.cache import Cache

        return Cache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
