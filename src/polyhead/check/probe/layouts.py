"""Weights of queries, keys, values and output, recognized by name and shape."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from polyhead.check.law import NotApplicable
from polyhead.check.probe.vocabulary import KV_HEADS

__all__ = ["Weights", "interleaved", "recognise", "role_of"]

# Layer names by role, lower case and without underscores.
_ROLES = {
    "qkv": re.compile(r"qkv|cattn|inproj|querykeyvalue"),
    "kv": re.compile(r"^(to|w)?kv(proj)?$"),
    "query": re.compile(
        r"^(w|to|fc|proj|linear|lin)?(q|query|queries)(proj|linear|lin|layer|fc)?$"
    ),
    "key": re.compile(r"^(w|to|fc|proj|linear|lin)?(k|key|keys)(proj|linear|lin|layer|fc)?$"),
    "value": re.compile(r"^(w|to|fc|proj|linear|lin)?(v|value|values)(proj|linear|lin|layer|fc)?$"),
    "out": re.compile(
        r"^(w|to|fc|proj|linear)?(o|out|output|c|final|unify)?(proj|projection|heads|layer|linear|dense)?\d?$"
    ),
}


@dataclass(frozen=True)
class Weights:
    """Weights of plain attention: q = x query^T + query_bias, and so on.

    Attributes:
        query: (H * D, d_in), the rows of a head contiguous.
        key: (G * D, d_in).
        value: (G * E, d_in).
        out: (d_out, H * E), or None.
        num_heads: H.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    num_heads: int
    out: Tensor | None = None
    query_bias: Tensor | None = None
    key_bias: Tensor | None = None
    value_bias: Tensor | None = None
    out_bias: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in vars(self).values() if isinstance(t, Tensor)]


def recognise(module: nn.Module, num_heads: int | None) -> Weights:
    """Return the weights of a module, still part of its graph.

    Raises:
        NotApplicable: its layout is unknown, or it has parameters that plain attention lacks.
    """
    if num_heads is None:
        raise NotApplicable("the number of heads is unknown; pass num_heads=")
    if isinstance(module, nn.MultiheadAttention):
        weights, used = _of_torch(module)
    elif isinstance(heads := _module_list(module), nn.ModuleList):
        weights, used = _of_stacked(module, heads)
    else:
        weights, used = _of_layers(module, num_heads)
    known = {id(parameter) for parameter in used}
    for name, parameter in module.named_parameters():
        if id(parameter) not in known:
            raise NotApplicable(f"unknown layout: {name} is not part of plain attention")
    return weights


def _module_list(module: nn.Module) -> nn.ModuleList | None:
    return next((c for c in module.children() if isinstance(c, nn.ModuleList)), None)


def _of_torch(module: nn.MultiheadAttention) -> tuple[Weights, list[Tensor]]:
    if module.in_proj_weight is None:
        raise NotApplicable("unknown layout: keys and values of other sizes")
    query, key, value = module.in_proj_weight.chunk(3)
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    out = module.out_proj
    query_bias, key_bias, value_bias = biases
    weights = Weights(
        query,
        key,
        value,
        module.num_heads,
        out.weight,
        query_bias,
        key_bias,
        value_bias,
        out.bias,
    )
    return weights, list(module.parameters())


def _of_stacked(module: nn.Module, heads: nn.ModuleList) -> tuple[Weights, list[Tensor]]:
    """One module per head, each with its own projections."""
    each, used = [], []
    for head in heads:
        weights, parameters = _of_layers(head, 1)
        each.append(weights)
        used += parameters
    tensors: dict[str, Tensor | None] = {}
    for name in ("query", "key", "value", "query_bias", "key_bias", "value_bias"):
        parts = [getattr(w, name) for w in each]
        tensors[name] = None if parts[0] is None else torch.cat(parts)
    outside = {
        n: c for n, c in _layers(module).items() if n.split(".")[0] not in _names_of(module, heads)
    }
    out = _roles(outside).get("out")
    if out is not None:
        tensors |= {"out": out.weight, "out_bias": out.bias}
        used += list(out.parameters())
    return Weights(num_heads=len(heads), **tensors), used  # type: ignore[arg-type]


def _names_of(module: nn.Module, heads: nn.ModuleList) -> list[str]:
    return [name for name, child in module.named_children() if child is heads]


def _of_layers(module: nn.Module, num_heads: int) -> tuple[Weights, list[Tensor]]:
    roles = _roles(_layers(module))
    used: list[Tensor] = [p for layer in roles.values() for p in layer.parameters()]
    if "qkv" in roles:
        out = roles.get("out")
        size = None if out is None else out.in_features // num_heads
        weights = _split(roles["qkv"], ("query", "key", "value"), module, num_heads, size)
    elif "query" in roles and "kv" in roles:
        weights = _split(roles["query"], ("query",), module, num_heads)
        weights |= _split(roles["kv"], ("key", "value"), module, num_heads)
    elif {"query", "key", "value"} <= roles.keys():
        weights = {}
        for name in ("query", "key", "value"):
            weights |= _split(roles[name], (name,), module, num_heads)
    else:
        raise NotApplicable("unknown layout: no layers named like query, key and value")
    if out := roles.get("out"):
        weights |= {"out": out.weight, "out_bias": out.bias}
    return Weights(num_heads=num_heads, **weights), used  # type: ignore[arg-type]


def _split(
    layer: nn.Linear,
    names: tuple[str, ...],
    module: nn.Module,
    num_heads: int,
    head_size: int | None = None,
) -> dict[str, Tensor | None]:
    """Rows of a layer, split into its consecutive parts."""
    rows = layer.weight.shape[0]
    sizes = [rows // len(names)] * len(names)
    G = next((getattr(module, n) for n in KV_HEADS if hasattr(module, n)), None)
    if G is None and head_size:  # inferred from the number of rows
        G = (rows // head_size - num_heads) // 2
        if G < 1 or num_heads % G or rows != (num_heads + 2 * G) * head_size:
            raise NotApplicable(f"unknown layout: {rows} rows for {', '.join(names)}")
    if len(names) == 3 and G not in (None, num_heads):
        head = rows // (num_heads + 2 * G)
        sizes = [num_heads * head, G * head, G * head]
    if sum(sizes) != rows:
        raise NotApplicable(f"unknown layout: {rows} rows for {', '.join(names)}")
    parts: dict[str, Tensor | None] = dict(zip(names, layer.weight.split(sizes), strict=True))
    biases = [None] * len(names) if layer.bias is None else layer.bias.split(sizes)
    return parts | {f"{n}_bias": b for n, b in zip(names, biases, strict=True)}


def _layers(module: nn.Module) -> dict[str, nn.Linear]:
    return {n: layer for n, layer in module.named_modules() if type(layer) is nn.Linear}


def _roles(layers: Mapping[str, nn.Linear]) -> dict[str, nn.Linear]:
    """Layers by the role that their names show; if two have one role, the first."""
    roles: dict[str, nn.Linear] = {}
    for name, layer in layers.items():
        role = role_of(name)
        if role is not None and role not in roles:
            roles[role] = layer
    return roles


def role_of(name: str) -> str | None:
    """Role of a layer, from its name."""
    # to_out.0 of a Sequential is to_out.
    plain = re.sub(r"\.\d+$", "", name).rsplit(".", 1)[-1].lower().replace("_", "")
    return next((role for role, pattern in _ROLES.items() if pattern.search(plain)), None)


def interleaved(weights: Weights, of: str) -> Weights:
    """Reorder the rows of another common layout to the standard one.

    Args:
        weights: as `recognise` read them.
        of: "features": head h has rows h, h + H, ... of each part (`view(B, T, size, heads)`);
            "heads": the fused rows are, head by head, its query, key and value (GPT-NeoX, BLOOM).
    """
    H = weights.num_heads
    changed: dict[str, Tensor] = {}
    for suffix in ("", "_bias"):
        parts = [getattr(weights, f"{name}{suffix}") for name in ("query", "key", "value")]
        if any(p is None for p in parts):
            continue
        if of == "heads":
            fused = torch.cat(parts)
            split = fused.unflatten(0, (H, 3, -1)).transpose(0, 1).flatten(1, 2)
            parts = list(split)
        else:
            parts = [p.unflatten(0, (-1, H)).transpose(0, 1).flatten(0, 1) for p in parts]
        changed |= {
            f"{n}{suffix}": p for n, p in zip(("query", "key", "value"), parts, strict=True)
        }
    if of == "features" and weights.out is not None:
        changed["out"] = weights.out.unflatten(1, (-1, H)).transpose(1, 2).flatten(1, 2)
    return replace(weights, **changed)  # type: ignore[arg-type]
