"""In-place replacement of every `nn.MultiheadAttention` of a model."""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass
from typing import Any

from torch import nn

from polyhead.drop_in.multihead import MultiheadAttention, keep_from_fast_path
from polyhead.errors import ArgumentError

__all__ = ["Replacement", "replace_attention"]

_TORCHS = nn.MultiheadAttention.forward  # before anybody replaces it


@dataclass(frozen=True)
class Replacement:
    """What `replace_attention` did. Printing it gives a list.

    Attributes:
        replaced: names of the modules that are ours now; a shared one once, by its first name.
        notes: by name, what of such a module is kept and worth knowing.
        left: by name, why a module that is an `nn.MultiheadAttention` stayed as it was.
    """

    replaced: tuple[str, ...]
    notes: dict[str, str]
    left: dict[str, str]

    def __str__(self) -> str:
        count = len(self.replaced) + len(self.left)
        lines = [f"replaced {len(self.replaced)} of {count} nn.MultiheadAttention"]
        for name in self.replaced:
            note = self.notes.get(name)
            lines.append(f"  {name or '(the model itself)'}" + (f": {note}" if note else ""))
        lines += [
            f"  left {name or '(the model itself)'}: {why}" for name, why in self.left.items()
        ]
        return "\n".join(lines)


def replace_attention(model: nn.Module) -> Replacement:
    """Make every `nn.MultiheadAttention` in a model a `MultiheadAttention` of ours.

    In place: a module stays the same object with the same parameters, hooks and mode, only its
    class is ours, so all other references to it (an optimizer, another part of the model, a list)
    still hold. Subclasses are left alone, for they may compute something else; so is a module
    whose `forward` was replaced on the instance, unless by accelerate's hooks, which then call
    ours. All modules are planned before one is changed, and if anything raises the model is as it
    was.

    Args:
        model: any module; itself an `nn.MultiheadAttention`, or with some in it.

    >>> layer = nn.TransformerEncoderLayer(8, nhead=2, batch_first=True)
    >>> model = nn.TransformerEncoder(layer, num_layers=2)
    >>> print(replace_attention(model))
    replaced 2 of 2 nn.MultiheadAttention
      layers.0.self_attn
      layers.1.self_attn
    """
    left: dict[str, str] = {}
    planned: dict[str, nn.MultiheadAttention] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.MultiheadAttention) or isinstance(module, MultiheadAttention):
            continue
        reason = _reason_to_leave(module)
        if reason is None:
            planned[name] = module
        else:
            left[name] = reason
    notes = {name: note for name, module in planned.items() if (note := _note(module))}
    before = [(module, _state_of(module)) for module in planned.values()]
    try:
        for module in planned.values():
            _replace(module)
    except BaseException:
        for module, state in before:
            _restore(module, state)
        raise
    return Replacement(tuple(planned), notes, left)


def _reason_to_leave(module: nn.MultiheadAttention) -> str | None:
    kind = type(module)
    if _is_sharded(module):
        return "fully_shard made its class; call replace_attention before it"
    if hasattr(module, "parametrizations"):
        return "parametrizations made its class; call replace_attention before them"
    if kind is not nn.MultiheadAttention:
        return f"its class, {kind.__name__}, may compute something else"
    if not 0.0 <= module.dropout < 1.0:
        return f"its dropout is {module.dropout}, and ours must be in [0, 1)"
    if nn.MultiheadAttention.forward is not _TORCHS:
        return "forward of nn.MultiheadAttention itself was replaced, and may compute another thing"
    if "__call__" in vars(module) or "_call_impl" in vars(module):
        return "its call was replaced on the instance, and may compute something else"
    if "forward" in vars(module) and _forward_slot(module) is None:
        forward = vars(module)["forward"]
        kind_of_forward = getattr(forward, "__qualname__", type(forward).__name__)
        return f"its forward was replaced on the instance by {kind_of_forward}, which would go on"
    weight = module.in_proj_weight if module._qkv_same_embed_dim else module.q_proj_weight
    if not weight.is_floating_point():
        return f"its weights are {weight.dtype}, not floating point"
    return None


def _is_sharded(module: nn.Module) -> bool:
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


def _forward_slot(module: nn.Module) -> str | None:
    """Attribute of the instance that holds torch's forward, to be rebound; None: not certain.

    accelerate's hooks put a function in `forward` that calls `_old_forward`.
    """
    held = vars(module)
    slot = "forward"
    if isinstance(held["forward"], functools.partial) and "_old_forward" in held:
        owner = getattr(held["forward"].func, "__module__", None)
        if owner != "accelerate.hooks" or held["forward"].args != (module,):
            return None
        slot = "_old_forward"
    forward = held[slot]
    is_torchs = isinstance(forward, types.MethodType) and forward.__func__ is _TORCHS
    return slot if is_torchs and forward.__self__ is module else None


def _note(module: nn.MultiheadAttention) -> str | None:
    notes = []
    if hooks := len(module._forward_hooks) + len(module._forward_pre_hooks):
        notes.append(f"keeps its {hooks} forward hook{'s' if hooks > 1 else ''}")
    if "_old_forward" in vars(module):
        notes.append("keeps accelerate's hook")
    return ", ".join(notes) or None


def _replace(module: nn.MultiheadAttention) -> None:
    slot = _forward_slot(module) if "forward" in vars(module) else None
    module.__class__ = MultiheadAttention
    if slot is not None:
        setattr(module, slot, types.MethodType(MultiheadAttention.forward, module))
    keep_from_fast_path(module)
    runs = type(module).forward if slot is None else vars(module)[slot].__func__
    if runs is not MultiheadAttention.forward:
        raise ArgumentError(
            "model", "must run polyhead's forward once replaced", repr(runs), "leave it as it is"
        )


def _state_of(module: nn.Module) -> tuple[type[nn.Module], dict[str, Any]]:
    held = {n: v.copy() if isinstance(v, dict) else v for n, v in vars(module).items()}
    return type(module), held


def _restore(module: nn.Module, state: tuple[type[nn.Module], dict[str, Any]]) -> None:
    module.__class__, held = state
    for name in [name for name in vars(module) if name not in held]:
        del vars(module)[name]
    for name, value in held.items():
        if isinstance(value, dict):
            vars(module)[name].clear()
            vars(module)[name].update(value)
        else:
            vars(module)[name] = value
