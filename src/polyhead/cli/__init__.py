"""The commands, a file each: one reads its arguments, calls one function and prints.

Their list, and what they have in common, is in `polyhead_command`.
"""

from polyhead_command import main

__all__ = ["main"]
