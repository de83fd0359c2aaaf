"""Every `F.scaled_dot_product_attention` within a context or a model, by polyhead or counted.

A `TorchFunctionMode` sees torch's function by whatever name it was imported. torch is not patched.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from polyhead.drop_in.sdpa_calls import SdpaCalls
from polyhead.drop_in.sdpa_checkpoints import is_recomputed_outside
from polyhead.drop_in.sdpa_function import attend
from polyhead.errors import ArgumentError, DtypeError

__all__ = ["SdpaMode", "SdpaUse", "sdpa", "use_for_sdpa"]

_torch_sdpa = torch._C._nn.scaled_dot_product_attention
_CHECKPOINTED = (
    "within torch.utils.checkpoint, which calls again in backward, outside of this context: "
    "use_for_sdpa(model) has both"
)
_WEIGHTS = "F.multi_head_attention_forward(need_weights=True) calls none: see replace_attention"


class SdpaMode(TorchFunctionMode):
    """Context in which polyhead computes torch's `scaled_dot_product_attention`; see `sdpa`.

    Args:
        calls: record that every call is added to; None: a new one.
    """

    def __init__(self, calls: SdpaCalls | None = None) -> None:
        super().__init__()
        self.calls = SdpaCalls() if calls is None else calls

    def __enter__(self) -> SdpaCalls:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self.calls

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is _torch_sdpa:
            if torch.compiler.is_compiling():  # a graph counts nothing
                return attend(args, kwargs, None)
            return self._attend(*args, **kwargs)
        if func is F.multi_head_attention_forward and not torch.compiler.is_compiling():
            return self._multi_head_attention(args, kwargs)
        return func(*args, **kwargs)

    def _attend(self, *args: Any, **kwargs: Any) -> Tensor:
        if is_recomputed_outside(_needs_grad(args, kwargs), _dropout(args, kwargs), _enters):
            self.calls.add("torch", _CHECKPOINTED)
            return _torch_sdpa(*args, **kwargs)
        return attend(args, kwargs, self.calls)

    def _multi_head_attention(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """torch's own Python function, in which the name of its attention is ours.

        A mode is off while it handles a function, so that what the function calls is not seen.
        """
        if any(type(x) not in (Tensor, nn.Parameter) for x in args if isinstance(x, Tensor)):
            return F.multi_head_attention_forward(*args, **kwargs)
        result = _function_with(F.multi_head_attention_forward, self._attend)(*args, **kwargs)
        if result[1] is not None:
            self.calls.add("torch", _WEIGHTS)
        return result


def _function_with(function: Callable[..., Any], attend: Callable[..., Tensor]) -> Any:
    """A copy of one of torch's functions that calls `attend`. It does not look for modes again."""
    own = {"scaled_dot_product_attention": attend, "has_torch_function": lambda tensors: False}
    copy = types.FunctionType(
        function.__code__,
        {**function.__globals__, **own},
        function.__name__,
        function.__defaults__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _needs_grad(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in (*args, *kwargs.values())
    )


def _dropout(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)


def sdpa() -> SdpaMode:
    """Context in which polyhead computes every `scaled_dot_product_attention` of this thread.

    Calls that torch computes as fast, or that polyhead cannot compute as torch does, stay torch's,
    and are counted with the reason.

    Returns:
        A context manager, which gives the record of the calls.

    >>> import torch.nn.functional as F
    >>> query = torch.randn(1, 12, 300, 64)
    >>> with sdpa() as calls:
    ...     _ = F.scaled_dot_product_attention(query, query, query, is_causal=True)
    ...     _ = F.scaled_dot_product_attention(query[:, :, :8], query[:, :, :8], query[:, :, :8])
    >>> print(calls)
    2 calls of scaled_dot_product_attention: 1 by polyhead, 1 by torch
      polyhead  1  causal()
      torch     1  T = 8 queries by S = 8 keys: torch is as fast in inference below 65536 pairs
    """
    return SdpaMode()


class SdpaUse:
    """A model's use of polyhead, by `use_for_sdpa`. Printing it gives the table of its calls.

    Attributes:
        calls: the record, an `SdpaCalls`.
    """

    def __init__(self, calls: SdpaCalls, handles: list[RemovableHandle]) -> None:
        self.calls, self._handles = calls, handles

    def remove(self) -> None:
        """Remove every hook: the model is as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __str__(self) -> str:
        return str(self.calls)

    def __repr__(self) -> str:
        return f"<SdpaUse: {self.calls!r}>"


def use_for_sdpa(model: nn.Module) -> SdpaUse:
    """Have polyhead compute every `scaled_dot_product_attention` of a model, wherever it is called.

    Hooks on its modules enter the mode of `sdpa`: in every thread, and in the recomputations of
    activation checkpoints. `remove()` undoes it.

    Args:
        model: any module.

    Raises:
        DtypeError: it is no module.
        ArgumentError: it is in use already.

    >>> model = nn.TransformerEncoderLayer(96, nhead=4, batch_first=True)
    >>> use = use_for_sdpa(model)
    >>> _ = model(torch.randn(2, 400, 96))
    >>> print(use)
    1 call of scaled_dot_product_attention: 1 by polyhead, 0 by torch
      polyhead  1  no mask
    >>> use.remove()
    """
    if not isinstance(model, nn.Module):
        remedy = "pass the model, or use `with sdpa():` around a function"
        raise DtypeError("model", "must be an nn.Module", type(model).__name__, remedy)
    if any(_enters(module) for module in model.modules()):
        rule = "must not be in use already, nor any module of it"
        raise ArgumentError("model", rule, type(model).__name__, "call remove() of that use first")
    state = _Entered(SdpaMode())
    handles = []
    for module in model.modules():
        if module is model or not _is_leaf(module):
            handles.append(module.register_forward_pre_hook(_Enter(state), prepend=True))
            handles.append(module.register_forward_hook(_Leave(state), always_call=True))
    return SdpaUse(state.mode.calls, handles)


def _is_leaf(module: nn.Module) -> bool:
    """True for modules of torch's own that call no attention, such as `nn.Linear`."""
    is_torchs = type(module).__module__.startswith("torch.nn.modules.")
    return is_torchs and next(module.children(), None) is None


def _enters(module: object) -> bool:
    """True if a module enters the mode when it is called."""
    return isinstance(module, nn.Module) and any(
        isinstance(hook, _Enter) for hook in module._forward_pre_hooks.values()
    )


class _Entered:
    """A mode, and in each thread the modules that are being called in it, the outermost first."""

    def __init__(self, mode: SdpaMode) -> None:
        self.mode = mode
        self._local = threading.local()

    @property
    def stack(self) -> list[nn.Module]:
        return self._local.__dict__.setdefault("stack", [])  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        return {"mode": self.mode}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.mode, self._local = state["mode"], threading.local()


class _Enter:
    """Forward pre-hook: enters the mode, unless a module around this one has."""

    def __init__(self, state: _Entered) -> None:
        self.state = state

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():
            return
        stack = self.state.stack
        # Ctrl-C leaves a module without its hooks: the call that comes next begins anew.
        if stack and stack[0] is module:
            stack.clear()
        elif not stack:
            self.state.mode.__enter__()
        stack.append(module)


class _Leave:
    """Forward hook, called after errors too: leaves the mode where it was entered."""

    def __init__(self, state: _Entered) -> None:
        self.state = state

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        stack = self.state.stack
        if stack and stack[-1] is module:
            stack.pop()
            if not stack:
                self.state.mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
