"""Weights moved between layouts and libraries, exactly: the function stays the same."""

from polyhead.convert.stacked import split_to_stacked, stacked_to_split
from polyhead.convert.transformers import from_transformers

__all__ = ["from_transformers", "split_to_stacked", "stacked_to_split"]
