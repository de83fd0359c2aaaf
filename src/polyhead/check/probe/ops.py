"""Operations inside one call, which distinguish right modules with equal behavior."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from polyhead.check.subject import Subject, seeded
from polyhead.check.tolerance import Spy, operation

__all__ = ["NarrowMasks", "draws_random_numbers", "draws_weights", "look_inside"]

_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "linear", "convolution"}
_FUSED = ("scaled_dot_product", "flex_attention")


def look_inside(subject: Subject) -> None:
    """Add claims that names do not show: positions added to the tokens, keys that come from no
    token, tokens mixed before the attention, the number of heads.
    """
    claims = subject.claims
    convolutions = [
        name
        for name, part in subject.exact.named_modules()
        if isinstance(part, (nn.Conv1d, nn.Conv2d)) and max(part.kernel_size) > 1
    ]
    spy = _Inside(subject)
    token = subject.input(1, 1).expand(-1, subject.T, -1)
    # A module that cannot run with gradients is not inspected further; laws with gradients report
    # it.
    with suppress(Exception), torch.enable_grad(), spy:
        # With gradients: without, torch may fuse the whole call into one operation.
        subject.call(subject.exact, token.clone().requires_grad_())
    if convolutions:
        claims.positions = f"convolution {convolutions[0]}"
        claims.how["positions"] = "it mixes adjacent tokens"
    elif spy.alike is False:
        claims.positions = "added to the tokens"
        claims.how["positions"] = "identical tokens differ at the first product"
    if spy.extra_keys:
        claims.features |= {"sinks"}
        claims.how["features"] = f"{spy.extra_keys} keys that come from no token"
    if claims.num_heads is None and len(spy.scores) == 1:
        claims.num_heads = spy.scores[0]
        claims.how["num_heads"] = f"its softmax has {spy.scores[0]} rows per token"


class _Fills(Spy):
    fills = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.fills |= operation(func) in ("uniform_", "normal_")
        return func(*args, **(kwargs or {}))


class NarrowMasks(TorchFunctionMode):
    """Detects float32 masks with float64 queries: a mask created in the default dtype. torch's
    fused kernel reads it as if it were float64.
    """

    found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            mask = (kwargs or {}).get("attn_mask", args[3] if len(args) > 3 else None)
            query = args[0] if args else (kwargs or {})["query"]
            if mask is not None and mask.is_floating_point() and mask.dtype != query.dtype:
                self.found = True
        return func(*args, **(kwargs or {}))


class _Inside(Spy):
    """Compares identical tokens at the first product, and counts keys."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.T = subject.T
        tensors = [*subject.exact.parameters(), *subject.exact.buffers()]
        self.own = {t.untyped_storage().data_ptr() for t in tensors}
        self.alike: bool | None = None
        self.extra_keys = 0
        self.scores: list[int] = []  # per softmax, the number of rows per query

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation(func)
        if self.alike is None and (name in _PRODUCTS or name.startswith(_FUSED)):
            given = [a for a in args if isinstance(a, Tensor) and not self._is_own(a)]
            if given:
                self.alike = any(self._alike(a) for a in given)
        keys = 0
        if name.endswith("softmax") and args[1] in (-1, args[0].ndim - 1):
            keys = args[0].shape[-1]
        elif name.startswith(_FUSED):
            keys = args[1].shape[-2]
        if keys >= self.T and args[0].ndim > 1 and args[0].shape[-2] == self.T:
            self.scores.append(math.prod(args[0].shape[:-2]))
        if keys > self.T and keys % self.T:
            self.extra_keys = keys - self.T
        return func(*args, **(kwargs or {}))

    def _is_own(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.own

    def _alike(self, tensor: Tensor) -> bool:
        """True if it is constant along an axis that may be the token axis."""
        for axis, size in enumerate(tensor.shape):
            # Batch rows or heads may be flattened with the tokens, before or after them.
            for parts, along in (((self.T, -1), axis), ((-1, self.T), axis + 1)):
                if size and size % self.T == 0:
                    split = tensor.unflatten(axis, parts)
                    if (split == split.narrow(along, 0, 1)).all():
                        return True
        return False


def draws_weights(subject: Subject, module: nn.Module) -> bool:
    """True if a call fills tensors with random values in place, as initialization does."""
    spy = _Fills()
    with torch.no_grad(), spy:
        subject.call(module, subject.input(2))
    return spy.fills


def draws_random_numbers(subject: Subject, module: nn.Module) -> bool:
    """True if a call of this copy uses torch's generator."""
    cuda = subject.device.type == "cuda"

    def state() -> Tensor:
        return torch.cuda.get_rng_state(subject.device) if cuda else torch.get_rng_state()

    with torch.no_grad(), seeded(subject.seed, subject.device):
        before = state()
        subject.calling(module, subject.input(2))
        return not torch.equal(before, state())
