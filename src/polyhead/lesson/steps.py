"""The ten steps in words: title, sentence, formula, and the lines of both classes that run."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["SPLIT_CODE", "STACKED_CODE", "STEPS", "Words"]


class Words(NamedTuple):
    """One step: `name` is short, `formula` plain text."""

    name: str
    title: str
    says: str
    formula: str


STEPS = (
    Words(
        "Input",
        "The input, and the two meanings of d_out",
        "Each token is a row of numbers. Both classes make new numbers of it. In the stacked class "
        "d_out is the size of one head; in the split class it is the size of all heads together.",
        "stacked: num_heads × d_out numbers    split: d_out numbers, d_out / num_heads per head",
    ),
    Words(
        "Project",
        "Queries, keys and values",
        "Every head makes a query, a key and a value of every token. Stacked heads hold many small "
        "weights. The split class holds the same rows under each other, in one weight.",
        "q = x · W_queryᵀ    k = x · W_keyᵀ    v = x · W_valueᵀ",
    ),
    Words(
        "Split",
        "One strip of numbers becomes heads: view, then transpose",
        "The one large product lies in memory token by token, and in each token head by head. A "
        "view only names this order. The transpose makes heads the outer dimension. Neither moves "
        "a number.",
        "(T, H·d)  →  view (T, H, d)  →  transpose (H, T, d)",
    ),
    Words(
        "Scores",
        "How well each query fits each key",
        "The score of a token for another is the product of its query with the other's key. Heads "
        "never mix: each has its own table.",
        "scores[h, i, j] = Σₑ q[h, i, e] · k[h, j, e]",
    ),
    Words(
        "Scale, mask",
        "Smaller scores, and no look ahead",
        "Scores are divided by the square root of the head's size, so that they do not grow with "
        "it. Then every key ahead of its query gets -inf: exp(-inf) is 0.",
        "masked[h, i, j] = scores[h, i, j] / √d  if j ≤ i,  else -inf",
    ),
    Words(
        "Softmax",
        "Scores become weights",
        "In each row, exp of every score divided by their sum: positive weights with the sum 1. A "
        "row depends on its own scores alone.",
        "weights[h, i, j] = exp(masked[h, i, j]) / Σⱼ exp(masked[h, i, j])",
    ),
    Words(
        "Contexts",
        "A weighted mean of the values",
        "What a head gives a token is the mean of the values it may see, by its weights.",
        "contexts[h, i, e] = Σⱼ weights[h, i, j] · v[h, j, e]",
    ),
    Words(
        "Together",
        "The heads become one row again",
        "Stacked heads are concatenated. The split class goes back the way it came: transpose, "
        "contiguous (this one does move numbers), view. Both give one row per token, head by head.",
        "(H, T, d)  →  transpose (T, H, d)  →  contiguous  →  view (T, H·d)",
    ),
    Words(
        "out_proj",
        "The output projection mixes the heads",
        "Until here each head has columns of its own. The output projection makes every column of "
        "all heads: the sum of what each head contributes, and a bias. The lecture's stacked class "
        "has none.",
        "output = Σₕ contexts[h] · W_out[:, h]ᵀ + bias",
    ),
    Words(
        "The same?",
        "Are they the same?",
        "Yes: one function in two layouts, if the weights are carried over. See it on your "
        "numbers, on random inputs, against torch, and on the lecture's printed digits.",
        "stacked(x) − split(x) = 0",
    ),
)

# Each line, and the steps that run it.
STACKED_CODE = (
    ("class CausalAttention:", ()),
    ("    def forward(self, x):", (1,)),
    ("        q = self.W_query(x)", (2,)),
    ("        k = self.W_key(x)", (2,)),
    ("        v = self.W_value(x)", (2,)),
    ("        scores = q @ k.transpose(1, 2)", (4,)),
    ("        scores = scores / d ** 0.5", (5,)),
    ("        scores.masked_fill_(ahead, -torch.inf)", (5,)),
    ("        weights = torch.softmax(scores, dim=-1)", (6,)),
    ("        return weights @ v", (7,)),
    ("class MultiHeadAttentionWrapper:", ()),
    ("    def forward(self, x):", ()),
    ("        heads = [head(x) for head in self.heads]", (3, 10)),
    ("        return torch.cat(heads, dim=-1)", (8, 9)),
)
SPLIT_CODE = (
    ("class MultiHeadAttention:", ()),
    ("    def forward(self, x):", (1,)),
    ("        q = self.W_query(x)", (2,)),
    ("        k = self.W_key(x)", (2,)),
    ("        v = self.W_value(x)", (2,)),
    ("        q = q.view(B, T, H, d).transpose(1, 2)", (3,)),
    ("        k = k.view(B, T, H, d).transpose(1, 2)", (3,)),
    ("        v = v.view(B, T, H, d).transpose(1, 2)", (3,)),
    ("        scores = q @ k.transpose(2, 3)", (4,)),
    ("        scores = scores / d ** 0.5", (5,)),
    ("        scores.masked_fill_(ahead, -torch.inf)", (5,)),
    ("        weights = torch.softmax(scores, dim=-1)", (6,)),
    ("        contexts = weights @ v", (7,)),
    ("        merged = contexts.transpose(1, 2)", (8,)),
    ("        merged = merged.contiguous().view(B, T, H * d)", (8,)),
    ("        return self.out_proj(merged)", (9, 10)),
)
