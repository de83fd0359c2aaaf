"""Tables in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

__all__ = ["print_table"]


def print_table(console: Console, table: Table, least: int) -> None:
    """Print a table with its numbers whole, also where the terminal is narrower.

    rich would cut each to a digit or to nothing; longer lines are wrapped by the terminal.

    Args:
        console: where.
        table: what.
        least: columns in which the table has room for its numbers.
    """
    width = console.width
    console.width = max(width, least)
    try:
        console.print(table)
    finally:
        console.width = width
