"""Head kinds (induction, previous token, sink, local, ...), by thresholds on mean statistics."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["name_head"]

INDUCTION = 0.4
PREVIOUS = 0.4
SINK = 0.5
LOCAL = 0.5
# Even causal weights put (4 ln T - 2) / T on the four most attended of T tokens: half at T = 19,
# where the last 16 have nearly all, and 0.16 at T = 100, 0.11 of it not on the first token.
SINKS = 0.5
BEYOND_FIRST = 0.2


def name_head(stats: Mapping[str, float]) -> str:
    """Return the kind of a head, from its mean statistics over a text: the first rule that holds.

    | kind | rule | the head attends to |
    |---|---|---|
    | induction | `mass_induction` >= 0.4 | the token that followed this one last time |
    | previous token | `mass_previous` >= 0.4 | the token just before |
    | sink | `mass_first` >= 0.5 | the first token, which adds little here |
    | local | `mass_recent` >= 0.5 | the last 16 tokens, no single one of them |
    | multiple sinks | `mass_sinks` >= 0.5, 0.2 of it not on the first token | the same few tokens |
    | other | else | tokens farther back that differ, or all tokens evenly |

    The statistics are means over one text, and the kind holds for that text: an induction head is
    a sink where nothing repeats. Use at least 100 tokens: in a shorter text the last 16 are so
    large a part that an even head counts as local.

    Args:
        stats: values by name, as in `LayerReport.of_head`, of one head. Without `mass_induction`
            no head is an induction head, and without `mass_sinks` none has multiple sinks.

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
    sinks = stats.get("mass_sinks", 0.0)
    if sinks >= SINKS and sinks - stats["mass_first"] >= BEYOND_FIRST:
        return "multiple sinks"
    return "other"
