"""Position encodings: RoPE and its context scalings, ALiBi, T5's relative bias."""

from polyhead.positions.alibi import alibi_slopes
from polyhead.positions.dynamic import DynamicNTKScaling, LongRopeScaling
from polyhead.positions.relative import RelativeBias
from polyhead.positions.rope import Rope, apply_rope, rotate
from polyhead.positions.scaling import LinearScaling, Llama3Scaling, NTKScaling, RopeScaling
from polyhead.positions.yarn import YarnScaling

__all__ = [
    "DynamicNTKScaling",
    "LinearScaling",
    "Llama3Scaling",
    "LongRopeScaling",
    "NTKScaling",
    "RelativeBias",
    "Rope",
    "RopeScaling",
    "YarnScaling",
    "alibi_slopes",
    "apply_rope",
    "rotate",
]
