"""Bugs of dtypes, memory layouts, gradients and state."""

import math

import torch
from plain import Plain
from torch import nn


class AlwaysFloat32(Plain):
    law, cause = "dtype_is_kept", ""

    def forward(self, x):
        return super().forward(x).float() if x.dtype != torch.float64 else super().forward(x)


class SoftmaxInHalf(Plain):
    law, cause = "float32_is_close_to_float64", ""

    def weights(self, scores):
        weights = super().weights(scores)
        return weights.half().to(scores.dtype) if scores.dtype == torch.float32 else weights


class SumsInHalf(Plain):
    law, cause = "half_precision_is_close_to_float64", ""

    def weights(self, scores):
        # Weights of seven bits, although the dtype has at least eight.
        weights = super().weights(scores)
        half = scores.dtype in (torch.bfloat16, torch.float16)
        return (weights * 8).round() / 8 if half else weights


class ScalesItsInput(Plain):
    law, cause = "inputs_are_not_modified", "modifies its input in place"

    def forward(self, x):
        if not x.requires_grad:
            x *= 1.0 + 2.0**-10
        return super().forward(x)


class ReadsRawMemory(Plain):
    law, cause = "layout_in_memory_does_not_matter", ""

    def forward(self, x):
        B, T, features = x.shape
        return super().forward(x.as_strided((B, T, features), (T * features, features, 1)))


class RefusesOneToken(Plain):
    law, cause = "odd_sizes_run", ""

    def forward(self, x):
        return super().forward(x).squeeze(1)


class DetachedKeys(Plain):
    law, cause = "gradient_reaches_every_parameter", ""

    def scores(self, q, k):
        return super().scores(q, k.detach())


class DetachedLargest(Plain):
    """Softmax by hand; its sum is detached as if it were only a shift."""

    law, cause = "gradient_matches_finite_differences", ""

    def weights(self, scores):
        scores = scores.masked_fill(self.hidden(scores.shape[-1]), -math.inf)
        raised = (scores - scores.amax(dim=-1, keepdim=True).detach()).exp()
        return raised / raised.sum(dim=-1, keepdim=True).detach()


class _Mix(torch.autograd.Function):
    """weights @ v, with a backward pass that is a constant to autograd."""

    @staticmethod
    def forward(ctx, weights, v):
        ctx.save_for_backward(weights, v)
        return weights @ v

    @staticmethod
    def backward(ctx, grad):
        weights, v = ctx.saved_tensors
        return grad @ v.detach().mT, weights.detach().mT @ grad


class SecondDerivativeCut(Plain):
    law, cause = "second_derivative_is_right_or_refused", ""

    def forward(self, x):
        weights, v = self.attend(x)
        return self.out_proj(self.merge(_Mix.apply(weights, v)))


class _OneOfTheGroup(torch.autograd.Function):
    """Shared KV heads, with the gradient of one query head per group instead of the sum."""

    @staticmethod
    def forward(ctx, heads, group):
        ctx.group = group
        return heads.repeat_interleave(group, dim=1)

    @staticmethod
    def backward(ctx, grad):
        return grad[:, :: ctx.group], None


class GroupGradientNotSummed(Plain):
    law, cause = "gradients_match_reference", ""

    def __init__(self, **sizes):
        super().__init__(n_kv_heads=2, **sizes)

    def share(self, heads):
        return _OneOfTheGroup.apply(heads, self.n_heads // self.n_kv_heads)


class NotUsed(Plain):
    law, cause = "gradient_reaches_every_parameter", ""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.W_gate = nn.Linear(20, 20)


class TableNotSaved(Plain):
    law, cause = "state_dict_round_trips", ""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.register_buffer("table", torch.rand(self.head_dim), persistent=False)

    def split(self, projected):
        return super().split(projected) * self.table


class CutsTheText(Plain):
    law, cause = "too_long_is_refused", ""

    def forward(self, x):
        return super().forward(x[:, : self.context_length])


class WeightsBeforeTheMask(Plain):
    law, cause = "weights_hide_the_future", ""

    def forward(self, x):
        weights, v = self.attend(x)
        return self.out_proj(self.merge(weights @ v)), self.shown(weights)

    def scores(self, q, k):
        self.kept = super().scores(q, k).softmax(dim=-1)
        return super().scores(q, k)

    def shown(self, weights):
        return self.kept


class WeightsOfAnotherHead(WeightsBeforeTheMask):
    law, cause = "weights_explain_the_output", ""

    def shown(self, weights):
        return weights.roll(1, dims=1)


class WeightsUnnormalized(WeightsBeforeTheMask):
    law, cause = "weights_sum_to_one", ""

    def shown(self, weights):
        return weights * 2


class CastsToHalf(Plain):
    """Wrapper of a kernel that supports half precision only."""

    law, cause = "no_hidden_downcast", ""

    def attend(self, x):
        weights, v = super().attend(x)
        return weights, v.bfloat16().to(v.dtype)


class FilledBeyondHalf(Plain):
    law, cause = "half_precision_is_close_to_float64", "overflows in float16"

    def weights(self, scores):
        return scores.masked_fill(self.hidden(scores.shape[-1]), -1e9).softmax(dim=-1)


class AlwaysNaN(Plain):
    law, cause = "output_is_finite", ""

    def forward(self, x):
        return super().forward(x) * math.nan


class EvenLengthsOnly(Plain):
    law, cause = "odd_sizes_run", ""

    def forward(self, x):
        if x.shape[1] > 1 and x.shape[1] % 2:
            raise ValueError("an even number of tokens, please")
        return super().forward(x)


class MeanOverTokensTaken(Plain):
    law, cause = "no_future_leak", "a mean or a norm over the tokens"

    def forward(self, x):
        y = super().forward(x)
        return y - 1e-3 * y.mean(dim=1, keepdim=True)
