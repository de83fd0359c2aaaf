"""Bugs that teaching code has had, and that its readers introduce."""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "right"))
import teaching as right

sys.path.pop(0)


class _Small(right.SmallGPT):
    def __init__(self):
        sizes = {"n_embd": 24, "n_head": 4, "bias": True, "dropout": 0.1, "block_size": 32}
        super().__init__(SimpleNamespace(**sizes))


class SmallGPTNoScale(_Small):
    law, cause = "output_matches_reference", "missing scale"

    def scale(self, q):
        return 1.0


class SmallGPTMergedByView(_Small):
    law, cause = "no_future_leak", "heads merged without transposing back"

    def merge(self, y):
        return y.contiguous().view(y.shape[0], y.shape[2], -1)


class HeadScaledByTheWidth(right.LectureHead):
    """The lecture's own first scale."""

    law, cause = "output_matches_reference", "wrong scale: 0.2041"

    def scale(self, x, k):
        return x.shape[-1] ** -0.5


class HeadsScaledByTheWidth(right.LectureHeads):
    law, cause = "output_matches_reference", "wrong scale: 1 / sqrt(num_heads * head_dim)"
    kind = HeadScaledByTheWidth


class EinsumKeysAreQueries(right.EinsumWeights):
    """W_key is created, but the query weight is used instead."""

    law, cause = "gradient_reaches_every_parameter", ""

    def parameters_of_roles(self):
        return self.W_query, self.W_query, self.W_value


class EinsumRolesTurned(right.EinsumWeights):
    law, cause = "output_matches_reference", "W_value gives the keys, not the values"

    def parameters_of_roles(self):
        return self.W_query, self.W_value, self.W_key


class FromScratchScaledByTheWidth(right.FromScratch):
    law, cause = "output_matches_reference", "wrong scale: 1 / sqrt(num_heads * head_dim)"

    def size(self, e, s):
        return e


class SequenceFirst(right.ModulesOfModules):
    """Split by a view without a transpose."""

    law, cause = "permutation_equivariant", "by a view"

    def split(self, tensor):
        n, length, d_model = tensor.size()
        return tensor.view(n, self.n_head, length, d_model // self.n_head)


class ResidualTwice(right.WithItsResidual):
    """Scaled twice, with a norm and a residual."""

    law, cause = "output_matches_reference", "wrong scale"

    def forward(self, q, k, v, mask=None):
        n, residual = q.size(0), q
        layers = ((self.w_qs, q), (self.w_ks, k), (self.w_vs, v))
        q, k, v = (w(x).view(n, -1, self.n_head, self.d_k).transpose(1, 2) for w, x in layers)
        attn = torch.matmul(q / self.d_k**0.5, k.transpose(2, 3)) / self.d_k**0.5
        if mask is not None:
            attn = attn.masked_fill(mask.unsqueeze(1) == 0, torch.finfo(attn.dtype).min)
        attn = F.softmax(attn, dim=-1)
        q = torch.matmul(attn, v).transpose(1, 2).contiguous()
        return self.layer_norm(self.fc(q.view(n, -1, self.n_head * self.d_v)) + residual), attn


class DropsTheCausalArgument(nn.Module):
    """The argument `causal` is ignored."""

    law, cause = "no_future_leak", "no mask reaches the scores"
    flags = {"causal": True}  # noqa: RUF012

    def __init__(self, n_embd=24, n_head=4, causal=True):
        super().__init__()
        self.n_head, self.causal = n_head, causal
        self.c_q, self.c_k, self.c_v, self.c_proj = (nn.Linear(n_embd, n_embd) for _ in "qkvp")

    def forward(self, x):
        B, T, width = x.shape
        q, k, v = (
            w(x).view(B, T, self.n_head, -1).transpose(1, 2) for w in (self.c_q, self.c_k, self.c_v)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, width))
