"""Right attentions with other row orders in their projections, one class per order.

An order is a function: (B, T, rows) of one fused layer in; query, key, value (B, H, T, D) out.
"""

import math

import torch
from torch import nn

H, D, B_T = 4, 6, 2
WIDTH = H * D


def attend(q, k, v, causal=True):
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if causal:
        future = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


def axes(*names):
    """Order of the axes role (n), head (h) and feature (d)."""
    sizes = {"n": 3, "h": H, "d": D}

    def split(fused):
        y = fused.unflatten(-1, [sizes[name] for name in names])
        to = [2 + names.index(name) for name in "nhd"]
        return y.permute(to[0], 0, to[1], 1, to[2]).unbind(0)

    return split


def roles(order, *inner):
    """Consecutive roles in this order, each split by `inner` axes of head and feature."""

    def split(fused):
        parts = dict(zip(order, fused.chunk(3, dim=-1), strict=True))
        sizes = {"h": H, "d": D}
        cut = [parts[r].unflatten(-1, [sizes[n] for n in inner]) for r in "qkv"]
        if inner == ("d", "h"):
            cut = [part.transpose(2, 3) for part in cut]
        return [part.transpose(1, 2) for part in cut]

    return split


def within_heads(order):
    """Rows grouped by head, with the roles in this order."""

    def split(fused):
        parts = fused.unflatten(-1, (H, 3 * D)).transpose(1, 2).chunk(3, dim=-1)
        return [parts[order.index(r)] for r in "qkv"]

    return split


def groups(order, kv_heads):
    """Rows per group: its queries, its key, its value, in this order (Falcon,
    InternLM 2)."""
    sizes = {"q": H // kv_heads, "k": 1, "v": 1}

    def split(fused):
        y = fused.unflatten(-1, (kv_heads, -1, D))
        parts = dict(zip(order, y.split([sizes[r] for r in order], dim=3), strict=True))
        return [parts[r].flatten(2, 3).transpose(1, 2) for r in "qkv"]

    return split


def parts(order, kv_heads):
    """All queries, all keys, all values, in this order, with fewer KV heads."""
    sizes = {"q": H * D, "k": kv_heads * D, "v": kv_heads * D}

    def split(fused):
        cut = dict(zip(order, fused.split([sizes[r] for r in order], dim=-1), strict=True))
        return [cut[r].unflatten(-1, (-1, D)).transpose(1, 2) for r in "qkv"]

    return split


def blocks(order, count):
    """As CodeGen: blocks of heads, each with its queries, keys and values in this order."""

    def split(fused):
        y = fused.unflatten(-1, (count, -1)).chunk(3, dim=-1)
        cut = [y[order.index(r)].unflatten(-1, (H // count, D)) for r in "qkv"]
        return [part.flatten(2, 3).transpose(1, 2) for part in cut]

    return split


def halves(fused):
    """Even rows of a head form its first half, as in permuted rotary weights."""
    q, k, v = axes("n", "h", "d")(fused)
    return [t.unflatten(-1, (D // 2, 2)).transpose(-1, -2).flatten(-2) for t in (q, k)] + [v]


def shuffled(fused):
    """No order at all."""
    order = torch.randperm(3 * WIDTH, generator=torch.Generator().manual_seed(7))
    return axes("n", "h", "d")(fused[..., order])


def backwards(fused):
    return axes("n", "h", "d")(fused.flip(-1))


def keys_of_all_first(fused):
    """Keys and values alternate row by row, queries come last."""
    kv, q = fused.split((2 * WIDTH, WIDTH), dim=-1)
    k, v = (kv[..., i::2].unflatten(-1, (H, D)).transpose(1, 2) for i in range(2))
    return [q.unflatten(-1, (H, D)).transpose(1, 2), k, v]


# (split, number of KV heads)
ORDERS = {
    "RolesHeadsFeatures": (axes("n", "h", "d"), H),
    "HeadsRolesFeatures": (axes("h", "n", "d"), H),
    "RolesFeaturesHeads": (axes("n", "d", "h"), H),
    "HeadsFeaturesRoles": (axes("h", "d", "n"), H),
    "FeaturesHeadsRoles": (axes("d", "h", "n"), H),
    "FeaturesRolesHeads": (axes("d", "n", "h"), H),
    **{f"Roles{o.upper()}": (roles(o, "h", "d"), H) for o in ("qvk", "kqv", "kvq", "vqk", "vkq")},
    **{f"Roles{o.upper()}FeaturesFirst": (roles(o, "d", "h"), H) for o in ("qvk", "kqv", "vkq")},
    **{f"Heads{o.upper()}": (within_heads(o), H) for o in ("qvk", "kqv", "kvq", "vqk", "vkq")},
    **{f"Groups{o.upper()}": (groups(o, 2), 2) for o in ("qkv", "kvq", "kqv", "qvk")},
    "OneGroup": (groups("qkv", 1), 1),
    **{f"Parts{o.upper()}": (parts(o, 2), 2) for o in ("qkv", "kvq", "vkq")},
    "PartsOneKey": (parts("kvq", 1), 1),
    "BlocksQVK": (blocks("qvk", 2), H),
    "BlocksQKV": (blocks("qkv", 2), H),
    "BlocksVKQ": (blocks("vkq", 4), H),
    "Halves": (halves, H),
    "Shuffled": (shuffled, H),
    "Backwards": (backwards, H),
    "AlternatingKeys": (keys_of_all_first, H),
}


class Fused(nn.Module):
    """Attention with one fused layer; `order` is a name of ORDERS."""

    order: str
    causal = True

    def __init__(self, embed_dim=WIDTH, num_heads=H):
        super().__init__()
        self.num_heads = num_heads
        self.cut, self.num_kv_heads = ORDERS[self.order]
        self.qkv_proj = nn.Linear(embed_dim, WIDTH + 2 * self.num_kv_heads * D)
        self.out_proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x):
        return self.out_proj(attend(*self.cut(self.qkv_proj(x)), causal=self.causal))


CLASSES = {name: type(name, (Fused,), {"order": name}) for name in ORDERS}
