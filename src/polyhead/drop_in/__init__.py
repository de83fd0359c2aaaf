"""In place of torch's own module: its constructor, call and state_dict, our masks and kernels."""

from polyhead.drop_in.multihead import MultiheadAttention
from polyhead.drop_in.replace import Replacement, replace_attention

__all__ = ["MultiheadAttention", "Replacement", "replace_attention"]
