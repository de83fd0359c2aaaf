"""Head importance: the increase of a model's loss without each of its heads."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyhead.errors import ModelError
from polyhead.look.ablate import How, ablate
from polyhead.look.layers import (
    Head,
    attention_layers,
    check_heads,
    check_not_compiled,
    inference_kwargs,
)

__all__ = ["HeadImportance", "head_importance", "next_token_loss"]


@dataclass(frozen=True)
class HeadImportance:
    """Losses of a model without one head each.

    Attributes:
        loss: with all heads.
        change: by (layer, head), the increase of the loss without it; negative if it decreases.
    """

    loss: float
    change: dict[Head, float]

    @property
    def ranked(self) -> list[Head]:
        """The heads in descending order of `change`: the most important first."""
        return sorted(self.change, key=self.change.__getitem__, reverse=True)


def show_bar(done: int, total: int) -> None:
    """Show a progress bar on stderr if that is a terminal."""
    if sys.stderr.isatty():
        filled = "=" * (30 * done // max(1, total))
        end = "\n" if done == total else ""
        print(f"\r[{filled:30}] {done}/{total} heads", end=end, file=sys.stderr, flush=True)


def next_token_loss(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Return the mean cross-entropy of each token given those before it, in nats.

    Args:
        model: from (B, T) token ids to logits (B, T, vocabulary), or an output with `.logits`.
        input_ids: (B, T).
    """
    spared = {name: value for name, value in inference_kwargs(model).items() if name == "use_cache"}
    output = model(input_ids, **spared)
    logits = output if isinstance(output, Tensor) else output.logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten())


@torch.no_grad()
def head_importance(
    model: nn.Module,
    input_ids: Tensor,
    heads: Collection[Head] | None = None,
    how: How = "zero",
    *,
    loss: Callable[[Any, Tensor], Tensor] = next_token_loss,
    resume: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] = show_bar,
) -> HeadImportance:
    """Measure the change of loss when each head is ablated, one at a time: one forward per head.

    Args:
        model: as in `ablate`.
        input_ids: (T,) or (B, T) tokens of which the loss is computed.
        heads: (layer, head) pairs to ablate one after the other; None: every head.
        how: as in `ablate`.
        loss: a function of (model, input_ids); default: `next_token_loss`.
        resume: a file with the losses so far, written after each head. If it exists, only the
            missing heads are computed.
        progress: called with the number of heads done, and their total.

    Raises:
        ModelError: the file to resume from is of another model, text or `how`.
        ArgumentError: as in `ablate`.

    >>> import polyhead as ph
    >>> model = nn.Sequential(nn.Embedding(5, 8), ph.MultiHeadAttention(8, 5, 16, 0.0, num_heads=1))
    >>> ph.look.head_importance(model, torch.tensor([0, 1, 2, 3])).ranked
    [(0, 0)]
    """
    check_not_compiled(model)
    input_ids = input_ids[None] if input_ids.ndim == 1 else input_ids
    layers = attention_layers(model)
    if heads is None:
        heads = [(layer.index, head) for layer in layers for head in range(layer.num_heads)]
    check_heads(heads, layers)
    whole = loss(model, input_ids).item()
    diary = _ResumeFile(resume, _fingerprint(model, input_ids, how), whole)
    for done, head in enumerate(heads):
        progress(done, len(heads))
        if head not in diary.losses:
            with ablate(model, {head}, how):
                diary.add(head, loss(model, input_ids).item())
    progress(len(heads), len(heads))
    return HeadImportance(whole, {head: diary.losses[head] - whole for head in heads})


class _ResumeFile:
    """Losses by ablated head, written to disk after each if there is a path."""

    def __init__(
        self, path: str | os.PathLike[str] | None, about: dict[str, str], loss: float
    ) -> None:
        self.path = None if path is None else Path(path)
        self.about = about
        self.loss = loss
        self.losses: dict[Head, float] = {}
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def _read(self, path: Path) -> None:
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            before = {name: kept[name] for name in self.about}
            # Another number of threads may round differently; another model differs by more.
            same = before == self.about and abs(kept["loss"] - self.loss) <= 1e-4 * abs(self.loss)
            losses = {(layer, head): loss for layer, head, loss in kept["heads"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{path} must be a file of head_importance; delete it") from error
        if not same:
            raise ModelError(
                f"{path} must be of this model, text and way of removing, {self.about} with a loss "
                f"of {self.loss:.4f}; got {before} with {kept['loss']:.4f}; give another path"
            )
        self.losses = losses

    def add(self, head: Head, loss: float) -> None:
        self.losses[head] = loss
        if self.path is not None:
            entries = [[*head, loss] for head, loss in self.losses.items()]
            text = json.dumps({**self.about, "loss": self.loss, "heads": entries})
            beside = self.path.with_name(self.path.name + ".part")
            beside.write_text(text, encoding="utf-8")
            beside.replace(self.path)  # atomic, even if interrupted


def _fingerprint(model: nn.Module, input_ids: Tensor, how: str) -> dict[str, str]:
    digest = hashlib.sha256(repr(input_ids.tolist()).encode()).hexdigest()
    return {"model": type(model).__name__, "text": digest[:16], "how": how}
