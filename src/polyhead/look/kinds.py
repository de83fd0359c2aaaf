"""A name for what a head does, by plain thresholds."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["name_head"]

INDUCTION = 0.4
PREVIOUS = 0.4
SINK = 0.5
LOCAL = 0.5


def name_head(stats: Mapping[str, float]) -> str:
    """What a head does, in a word, from its mean statistics over a text.

    The first of these that holds:

    | name | rule | what it means |
    |---|---|---|
    | induction | `mass_induction` >= 0.4 | where a token repeats, looks at what came next |
    | previous token | `mass_previous` >= 0.4 | looks at the token just before |
    | sink | `mass_first` >= 0.5 | rests on the first token: it has little to say here |
    | local | `mass_recent` >= 0.5 | looks at the last 16 tokens, at no single one of them |
    | other | else | farther back, several tokens at once, or everything alike |

    The numbers are means over one text, and a name holds for that text: an induction head rests on
    the first token where nothing repeats. Take 100 tokens at least: of fewer, the last 16 are so
    many that a head which spreads evenly is called local.

    Args:
        stats: numbers by name, as `HeadStats.per_head` has them for one head. Without
            `mass_induction` no head is called that.

    Sources: induction heads: Olsson et al. 2022; attention sinks: Xiao et al. 2024.

    >>> name_head({"mass_first": 0.8, "mass_previous": 0.1, "mass_recent": 0.15})
    'sink'
    """
    if stats.get("mass_induction", 0.0) >= INDUCTION:
        return "induction"
    if stats["mass_previous"] >= PREVIOUS:
        return "previous token"
    if stats["mass_first"] >= SINK:
        return "sink"
    if stats["mass_recent"] >= LOCAL:
        return "local"
    return "other"
