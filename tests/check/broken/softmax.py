"""Bugs of scale and softmax."""

import math

from plain import Plain


class OverQueries(Plain):
    law, cause = "identical_tokens_agree", "softmax over the wrong axis"

    def weights(self, scores):
        return scores.masked_fill(self.hidden(scores.shape[-1]), -math.inf).softmax(dim=-2)


class OverHeads(Plain):
    law, cause = "identical_tokens_agree", "softmax over the wrong axis"

    def weights(self, scores):
        weights = scores.softmax(dim=1)
        return weights.masked_fill(self.hidden(scores.shape[-1]), 0.0)


class EncoderOverQueries(Plain):
    law, cause, flags = "contexts_are_weighted_means", "queries instead of keys", {"causal": False}

    def weights(self, scores):
        return scores.softmax(dim=-2)


class NoScale(Plain):
    law, cause = "output_matches_reference", "missing scale"

    def scores(self, q, k):
        return q @ k.mT


class ScaledByTheWholeWidth(Plain):
    law, cause = "output_matches_reference", "wrong scale"

    def scores(self, q, k):
        return q @ k.mT / math.sqrt(self.head_dim * self.n_heads)


class ScaledUp(Plain):
    law, cause = "output_matches_reference", "wrong scale: multiplied"

    def scores(self, q, k):
        return q @ k.mT * math.sqrt(self.head_dim)


class ScaledByTheLength(Plain):
    law, cause = "prefix_gives_prefix", ""

    def scores(self, q, k):
        return q @ k.mT / math.sqrt(k.shape[-2])


class Overflowing(Plain):
    law, cause = "large_inputs_stay_finite", ""

    def weights(self, scores):
        raised = scores.exp() * ~self.hidden(scores.shape[-1])
        return raised / raised.sum(dim=-1, keepdim=True)


class NeverNormalized(Plain):
    law, cause = "identical_tokens_agree", ""

    def weights(self, scores):
        return scores.exp() * ~self.hidden(scores.shape[-1])


class ScoresTurned(Plain):
    law, cause = "output_matches_reference", "scores transposed"

    def scores(self, q, k):
        return super().scores(k, q)


class ScaledByAnOddNumber(Plain):
    law, cause = "output_matches_reference", "wrong scale: 0.137"

    def scores(self, q, k):
        return q @ k.mT / 7.3


class KeysAndValuesSwapped(Plain):
    law, cause = "output_matches_reference", "keys and values are swapped"

    def attend(self, x):
        q = self.split(self.W_query(x))
        return self.weights(self.scores(q, self.split(self.W_value(x)))), self.split(self.W_key(x))


class QueriesAreKeys(Plain):
    law, cause = "gradient_reaches_every_parameter", "the queries are also used as keys"

    def scores(self, q, k):
        return super().scores(q, q)


class OutputLayerForgotten(Plain):
    law, cause = "output_matches_reference", "the output projection is not applied"

    def forward(self, x):
        weights, v = self.attend(x)
        return self.merge(weights @ v)
