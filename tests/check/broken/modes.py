"""Bugs of dropout, modes and batches."""

import math

import torch
import torch.nn.functional as F
from plain import Plain


class DropoutInEvaluation(Plain):
    law, cause = "evaluation_repeats", "dropout in evaluation"

    def weights(self, scores):
        return F.dropout(super().weights(scores), 0.2)


class DropoutOnScores(Plain):
    law, cause = "dropout_drops_weights", "renormalized after dropout"

    def weights(self, scores):
        scores = scores.masked_fill(torch.rand_like(scores) < 0.5 * self.training, -30.0)
        return super().weights(scores)


class DropoutUnscaled(Plain):
    law, cause = "dropout_is_unbiased", "not scaled by 1 / (1 - p)"

    def weights(self, scores):
        weights = super().weights(scores)
        return weights * (torch.rand_like(weights) >= 0.2) if self.training else weights


class DropoutOnFeatures(Plain):
    law, cause = "dropout_drops_weights", ""

    def merge(self, contexts):
        return F.dropout(super().merge(contexts), 0.2, self.training)


class OtherScaleInTraining(Plain):
    law, cause = "training_without_dropout_is_evaluation", ""

    def scores(self, q, k):
        return super().scores(q, k) * (2.0 if self.training else 1.0)


class OtherWithGradients(Plain):
    law, cause = "gradient_mode_changes_nothing", ""

    def scores(self, q, k):
        return super().scores(q, k) * (2.0 if torch.is_grad_enabled() else 1.0)


class MixesBatchAndHeads(Plain):
    law, cause = "batch_rows_are_independent", ""

    def merge(self, contexts):
        B, H, T, D = contexts.shape
        return contexts.transpose(0, 1).reshape(B, H, T, D).transpose(1, 2).flatten(2)


class AddsTheRowNumber(Plain):
    law, cause = "batch_rows_permute", ""

    def merge(self, contexts):
        rows = torch.arange(len(contexts), dtype=contexts.dtype)[:, None, None]
        return super().merge(contexts) + rows


class OnlyOneRow(Plain):
    law, cause = "batch_of_one_agrees", ""

    def scores(self, q, k):
        return super().scores(q, k) / len(q)


class DropoutThenDivided(Plain):
    law, cause = "dropout_drops_weights", "renormalized after dropout"

    def weights(self, scores):
        weights = F.dropout(super().weights(scores), 0.3, self.training)
        return weights / (weights.sum(dim=-1, keepdim=True) + 1e-9) if self.training else weights


class DropoutByLayerOnScores(Plain):
    law, cause = "dropout_drops_weights", "dropout on scores"

    def scores(self, q, k):
        return F.dropout(super().scores(q, k), 0.3, self.training)


class NoiseFromElsewhere(Plain):
    law, cause = "evaluation_repeats", "torch's generator is not the cause"
    calls = 0

    def forward(self, x):
        NoiseFromElsewhere.calls += 1
        return super().forward(x) * (1 + 1e-3 * math.sin(self.calls))
