"""The laws of attention, by subject, in the order of the report."""

from polyhead.check.law import Law
from polyhead.check.laws import (
    batch,
    cache,
    causality,
    dropout,
    function,
    gradients,
    heads,
    masks,
    modes,
    numerics,
    positions,
    reference,
    state,
    weights,
)

__all__ = ["FUNCTION_LAWS", "MODULE_LAWS"]


def _by_name(*laws: Law) -> dict[str, Law]:
    return {law.name: law for law in laws}


MODULE_LAWS = _by_name(
    *causality.LAWS,
    *positions.LAWS,
    *reference.LAWS,
    *masks.LAWS,
    *cache.LAWS,
    *heads.LAWS,
    *weights.LAWS,
    *batch.LAWS,
    *modes.LAWS,
    *dropout.LAWS,
    *numerics.LAWS,
    *gradients.LAWS,
    *state.LAWS,
)
FUNCTION_LAWS = _by_name(*function.LAWS)
