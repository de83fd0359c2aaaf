"""Bugs that learned facts must not hide: with rows in another order, after a norm,
in layers with uncommon names."""

import math

import torch
from plain import Plain
from torch import nn


class _HeadsFeaturesRoles(nn.Module):
    """Rows by head, feature and role, as in `y.view(B, T, H, D, 3)`."""

    causal = True

    def __init__(self, embed_dim=20, num_heads=4):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.out_proj = nn.Linear(embed_dim, 3 * embed_dim), nn.Linear(embed_dim, 20)

    def forward(self, x):
        q, k, v = self.cut(self.qkv(x))
        contexts = self.weights(q @ k.mT * self.scale(q)) @ v
        return self.out_proj(self.merge(contexts))

    def cut(self, fused):
        B, T, _ = fused.shape
        return fused.view(B, T, self.num_heads, -1, 3).transpose(1, 2).unbind(-1)

    def scale(self, q):
        return q.shape[-1] ** -0.5

    def weights(self, scores):
        future = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
        return scores.masked_fill(future, -math.inf).softmax(-1)

    def merge(self, contexts):
        return contexts.transpose(1, 2).flatten(2)


class OtherRowsNoScale(_HeadsFeaturesRoles):
    law, cause = "output_matches_reference", "missing scale"

    def scale(self, q):
        return 1.0


class OtherRowsOddScale(_HeadsFeaturesRoles):
    law, cause = "output_matches_reference", "wrong scale: 0.3"

    def scale(self, q):
        return 0.3


class OtherRowsSplitByView(_HeadsFeaturesRoles):
    law, cause = "no_future_leak", ""

    def cut(self, fused):
        B, T, _ = fused.shape
        return fused.view(B, self.num_heads, T, -1, 3).unbind(-1)


class OtherRowsMergedByView(_HeadsFeaturesRoles):
    law, cause = "no_future_leak", ""

    def merge(self, contexts):
        B, _, T, _ = contexts.shape
        return contexts.reshape(B, T, -1)


class OtherRowsSplitByViewInAnEncoder(OtherRowsSplitByView):
    law, cause = "permutation_equivariant", ""
    causal = False

    def weights(self, scores):
        return scores.softmax(-1)


class OtherRowsSoftmaxOverQueries(_HeadsFeaturesRoles):
    law, cause = "contexts_are_weighted_means", "softmax over the wrong axis"
    causal = False

    def weights(self, scores):
        return scores.softmax(-2)


class OtherRowsSeesTheNext(_HeadsFeaturesRoles):
    law, cause = "output_matches_reference", "off-by-one mask"

    def weights(self, scores):
        future = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(2)
        return scores.masked_fill(future, -math.inf).softmax(-1)


class OtherRowsMaskedByZero(_HeadsFeaturesRoles):
    law, cause = "output_matches_reference", "masked scores are 0"

    def weights(self, scores):
        return (scores * torch.ones_like(scores[0, 0]).tril()).softmax(-1)


class OtherRowsScaledByTheLength(_HeadsFeaturesRoles):
    law, cause = "output_matches_reference", "wrong scale"

    def scale(self, q):
        return q.shape[-2] ** -0.5


class NormedNoScale(OtherRowsNoScale):
    """A norm before and a residual after."""

    def forward(self, x):
        return x + 0.5 * super().forward(nn.functional.layer_norm(x, x.shape[-1:]))


class PartsOfTheInputNoScale(nn.Module):
    """The query layer receives parts of x, and the scale is missing."""

    law, cause = "output_matches_reference", "missing scale"

    def __init__(self, embed_dim=20, heads=4):
        super().__init__()
        self.heads = heads
        self.queries, self.keys, self.values = (nn.Linear(5, 5, bias=False) for _ in range(3))
        self.fc_out = nn.Linear(embed_dim, embed_dim)

    def forward(self, x):
        parts = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        scores = self.queries(parts) @ self.keys(parts).mT
        y = scores.softmax(-1) @ self.values(parts)
        return self.fc_out(y.transpose(1, 2).flatten(2))


class PartsOfTheInputScaledByTheWidth(PartsOfTheInputNoScale):
    cause = "wrong scale: 1 / sqrt(num_heads * head_dim)"

    def forward(self, x):
        parts = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        scores = self.queries(parts) @ self.keys(parts).mT / x.shape[-1] ** 0.5
        y = scores.softmax(-1) @ self.values(parts)
        return self.fc_out(y.transpose(1, 2).flatten(2))


class WeightsInBareParameters(nn.Module):
    """No layers, and no scale."""

    law, cause = "output_matches_reference", "missing scale"

    def __init__(self, d_model=20, n_heads=4):
        super().__init__()
        self.n_heads = n_heads
        self.w_in = nn.Parameter(torch.randn(d_model, 3 * d_model) * d_model**-0.5)
        self.w_back = nn.Parameter(torch.randn(d_model, d_model) * d_model**-0.5)

    def forward(self, x):
        T = x.shape[1]
        q, k, v = (x @ self.w_in).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        weights = (q @ k.mT).masked_fill(future, -math.inf).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2) @ self.w_back


class FirstTokenHidden(Plain):
    """A mask for the padding index excludes the first token of every sequence: not a window."""

    law, cause = "past_is_used", ""

    def hidden(self, T):
        hidden = super().hidden(T)
        hidden[1:, 0] = True
        return hidden


class SeesItselfAlone(Plain):
    """A band of one token is not a window."""

    law, cause = "past_is_used", ""

    def hidden(self, T):
        return ~torch.eye(T, dtype=torch.bool)


class LayersMadeInForward(Plain):
    law, cause = "evaluation_repeats", "layers created in forward"

    def merge(self, contexts):
        merged = super().merge(contexts)
        return nn.Linear(20, 20).to(merged.dtype)(merged)


class NeverFilled(Plain):
    law, cause = "parameters_are_filled", "uninitialized parameters: mix"

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.empty(20, 20))

    def merge(self, contexts):
        return super().merge(contexts) @ self.mix


class NeverFilledOldStyle(NeverFilled):
    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.Tensor(20, 20))
