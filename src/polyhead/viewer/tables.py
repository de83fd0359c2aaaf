"""Terminal tables that keep their numbers whole."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

__all__ = ["print_table"]


def print_table(console: Console, table: Table, least: int) -> None:
    """Print a table without truncating numbers, even on a narrower terminal.

    rich would cut each to a digit or to nothing; longer lines are wrapped by the terminal.

    Args:
        console: the console to print on.
        table: the table.
        least: the fewest columns in which the table's numbers fit.
    """
    width = console.width
    console.width = max(width, least)
    try:
        console.print(table)
    finally:
        console.width = width
