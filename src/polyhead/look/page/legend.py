"""Legend of the page: short explanations of head kinds and statistics."""

from __future__ import annotations

__all__ = ["KINDS", "NUMBERS"]

# In the order of the rules of `name_head`; each continues "This head".
KINDS = {
    "induction": "looks at what followed this token last time",
    "previous token": "looks at the token just before",
    "sink": "rests on the first token: it has little to say here",
    "local": "reads the last 16 tokens, no single one of them",
    "other": "does none of these: farther back, several tokens at once, or everything alike",
}

# name: (label, unit, explanation). A "share" is of a token's total weight, 1; its label continues
# "weight on".
NUMBERS = {
    "mass_first": ("first token", "share", "Weight on the first token of the text."),
    "mass_previous": ("previous token", "share", "Weight on the token just before."),
    "mass_self": ("itself", "share", "Weight that a token puts on itself."),
    "mass_recent": (
        "last 16 tokens",
        "share",
        "Weight on the token itself and the 15 before it.",
    ),
    "mass_same_token": (
        "same token earlier",
        "share",
        "Weight on earlier occurrences of the same token, where there are any.",
    ),
    "mass_induction": (
        "what came next",
        "share",
        "Weight on the tokens that followed those earlier occurrences.",
    ),
    "effective_keys": (
        "effective tokens",
        "tokens",
        "Over how many tokens, weighted alike, its weight would be as spread: exp(entropy).",
    ),
    "entropy": ("entropy", "nats", "How spread the weight is: 0 is all on one token."),
    "mean_distance": ("distance", "tokens", "How far away it looks, weighted by where it looks."),
    "contribution": (
        "contribution",
        "norm",
        "How long a vector the head alone adds to the layer's output, on average.",
    ),
    "max_logit": ("largest score", "score", "The largest score before the softmax."),
    "lse": ("log-sum-exp", "score", "Log of the sum of exp(score), on average."),
}
