"""Exact conversion of attention weights between layouts and libraries."""

from polyhead.convert.files import convert_file
from polyhead.convert.stacked import split_to_stacked, stacked_to_split
from polyhead.convert.state_dict import state_dict
from polyhead.convert.torch_mha import from_torch, to_torch
from polyhead.convert.transformers import from_transformers, to_transformers

__all__ = [
    "convert_file",
    "from_torch",
    "from_transformers",
    "split_to_stacked",
    "stacked_to_split",
    "state_dict",
    "to_torch",
    "to_transformers",
]
