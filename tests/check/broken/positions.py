"""Bugs of positions."""

import math

import torch
from plain import Plain


class Rotary(Plain):
    """Right: queries and keys are rotated by their positions."""

    def __init__(self, **sizes):
        super().__init__(d_model=24, **sizes)
        half = self.head_dim // 2
        self.register_buffer("inv_freq", 10.0 ** -torch.arange(half, dtype=torch.float64))

    def turn(self, heads, way=1):
        half = heads.shape[-1] // 2
        places = way * torch.arange(heads.shape[2], dtype=torch.float64)
        angles = places[:, None] * self.inv_freq.double()
        cos, sin = angles.cos().to(heads.dtype), angles.sin().to(heads.dtype)
        a, b = heads[..., :half], heads[..., half:]
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

    def scores(self, q, k):
        return super().scores(self.turn(q), self.turn(k))


class TurnsQueriesOnly(Rotary):
    law, cause = "relative_positions_are_relative", "rotated by different rules"

    def scores(self, q, k):
        return Plain.scores(self, self.turn(q), k)


class TurnsKeysBack(Rotary):
    law, cause = "relative_positions_are_relative", "rotated by different rules"

    def scores(self, q, k):
        return Plain.scores(self, self.turn(q), self.turn(k, -1))


class TurnsAlongHeads(Rotary):
    law, cause = "positions_tell_order", "positions have no effect"

    def turn(self, heads):
        return super().turn(heads.transpose(1, 2)).transpose(1, 2)


class TurnsValuesToo(Rotary):
    law, cause = "identical_tokens_agree", "are positions also applied to the values?"

    def attend(self, x):
        weights, v = super().attend(x)
        return weights, self.turn(v)


class DistancesFromTheStart(Plain):
    """A bias of the key's position instead of the distance."""

    law, cause = "relative_positions_are_relative", ""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, self.n_heads + 1))

    def scores(self, q, k):
        places = torch.arange(k.shape[2]) ** 2
        return super().scores(q, k) + self.slopes[:, None, None].to(q) * places.to(q)


class AddedPositions(Plain):
    """Right: learned positions, under an uncommon name, are added to the tokens."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.table = torch.nn.Embedding(self.context_length, 20)

    def forward(self, x):
        places = torch.arange(x.shape[1], device=x.device)
        return super().forward(x + self.table(places) * math.sqrt(2))
