"""Every `nn.MultiheadAttention` of a model made ours, in place."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from polyhead.drop_in.multihead import MultiheadAttention, keep_from_fast_path

__all__ = ["Replacement", "replace_attention"]


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
    class is ours, so whatever else refers to it (an optimizer, another part of the model, a list)
    still does. Subclasses are left alone, for they may compute something else.

    Args:
        model: any module; itself an `nn.MultiheadAttention`, or with some in it.

    >>> layer = nn.TransformerEncoderLayer(8, nhead=2, batch_first=True)
    >>> model = nn.TransformerEncoder(layer, num_layers=2)
    >>> print(replace_attention(model))
    replaced 2 of 2 nn.MultiheadAttention
      layers.0.self_attn
      layers.1.self_attn
    """
    notes: dict[str, str] = {}
    left: dict[str, str] = {}
    replaced = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.MultiheadAttention) or isinstance(module, MultiheadAttention):
            continue
        if type(module) is not nn.MultiheadAttention:
            left[name] = f"its class, {type(module).__name__}, may compute something else"
            continue
        if not 0.0 <= module.dropout < 1.0:
            left[name] = f"its dropout is {module.dropout}, and ours must be in [0, 1)"
            continue
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        if hooks:
            notes[name] = f"keeps its {hooks} forward hook{'s' if hooks > 1 else ''}"
        module.__class__ = MultiheadAttention
        keep_from_fast_path(module)
        replaced.append(name)
    return Replacement(tuple(replaced), notes, left)
