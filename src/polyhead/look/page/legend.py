"""Legend of the page: short explanations of head kinds and statistics."""

from __future__ import annotations

__all__ = ["KINDS", "NUMBERS"]

# In the order of the rules of `name_head`; each continues "This head".
KINDS = {
    "induction": "attends to the token that followed this one last time",
    "previous token": "attends to the token just before",
    "sink": "attends to the first token, which adds little here",
    "local": "attends to the last 16 tokens, no single one of them",
    "multiple sinks": "attends to the same few tokens, from everywhere in the text",
    "other": "attends to tokens farther back that differ, or to all tokens evenly",
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
    "mass_sinks": (
        "top four tokens",
        "share",
        "Weight on the four tokens that all others attend to most, counted where they are among "
        "the eight strongest of a token.",
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
        "The number of equally weighted tokens with this entropy: exp(entropy).",
    ),
    "entropy": ("entropy", "nats", "Spread of the weight: 0 if all is on one token."),
    "mean_distance": ("distance", "tokens", "Mean distance to the attended tokens, by weight."),
    "contribution": (
        "contribution",
        "norm",
        "Mean norm of the head's own addition to the layer's output.",
    ),
    "max_logit": ("largest score", "score", "The largest score before the softmax."),
    "lse": ("log-sum-exp", "score", "Log of the sum of exp(score), on average."),
}
