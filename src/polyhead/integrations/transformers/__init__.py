"""`attn_implementation="polyhead"` in Hugging Face models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polyhead.integrations.transformers.registration import register
from polyhead.integrations.transformers.status import LayerStatus, ModelStatus, status

if TYPE_CHECKING:
    from polyhead.integrations.transformers.cache import PolyheadCache

__all__ = ["LayerStatus", "ModelStatus", "PolyheadCache", "register", "status"]


if not TYPE_CHECKING:  # for which any name would be there, and be Any

    def __getattr__(name: str) -> Any:
        # A subclass of a transformers class: imported on first access.
        if name == "PolyheadCache":
            from polyhead.integrations.transformers.cache import PolyheadCache

            return PolyheadCache
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
