"""Commands, one file each: a command parses its arguments, calls one function and prints.

The list of commands and their common parts are in `polyhead_command`.
"""

from polyhead_command import main

__all__ = ["main"]
