"""In place of flash-attn, on any device: its names, layouts and semantics over `attention()`.

`install()` makes `import flash_attn` find these functions where flash-attn is not installed.
"""

from polyhead.drop_in.flash_attn import bert_padding, flash_attn_interface, rotary
from polyhead.drop_in.flash_attn.batched import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
)
from polyhead.drop_in.flash_attn.installation import VERSION, Installation, install, uninstall
from polyhead.drop_in.flash_attn.varlen import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from polyhead.drop_in.flash_attn.with_kvcache import flash_attn_with_kvcache

__version__ = VERSION  # as callers of flash-attn compare it

__all__ = [
    "Installation",
    "bert_padding",
    "flash_attn_func",
    "flash_attn_interface",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "install",
    "rotary",
    "uninstall",
]
