"""The compiled operators of csrc/: loaded, with what torch must know to trace and differentiate.

`torch.ops.polyhead.attention_forward`, `attention_inference` (the same, without a derivative),
`attention_output` (of that, the output alone), `attention_fast` (of nothing but query, key and
value, checks included), `attention_cached` (over what a cache holds), `attention_backward` and
`attention_weights` exist if the package was built with them; `unavailable` is the reason if not.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes, is_in_torch_dispatch_mode

from polyhead.backends.cpu.build import why_not_built
from polyhead.backends.layout import maybe_contiguous

__all__ = [
    "choose_isa",
    "forward_names",
    "gradients",
    "isa",
    "kernel",
    "max_head_size",
    "max_tokens",
    "multiply_add",
    "unavailable",
]


_LEAST_STACK = 256 * 1024  # four times what every kernel was seen to run on, with heads of 576


def _bytes_of(stack: str) -> float:
    """The size that OMP_STACKSIZE gives; infinite where it gives none, and the system's counts."""
    match = re.fullmatch(r"\s*(\d+)\s*([BKMG]?)\s*", stack, re.IGNORECASE)
    if match is None:
        return math.inf
    exponent = "BKMG".index(match[2].upper()) if match[2] else 1
    return float(int(match[1]) * 1024**exponent)


def _load() -> str:
    """Load the operators, or return why they are not there."""
    asked = os.environ.get("POLYHEAD_CPU_ISA")
    if asked == "none":
        return "was switched off by POLYHEAD_CPU_ISA=none"
    stack = os.environ.get("OMP_STACKSIZE", "")
    if _bytes_of(stack) < _LEAST_STACK:
        return (
            f"needs threads with stacks of {_LEAST_STACK // 1024} KiB; got OMP_STACKSIZE={stack}; "
            "unset it, or set OMP_STACKSIZE=1M"
        )
    spec = importlib.util.find_spec("polyhead._kernels")
    if spec is None or spec.origin is None:
        return why_not_built()
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:  # built for another torch or system: all else must go on working
        return f"was built, and could not be loaded: {error}"
    if asked and asked != isa():
        warnings.warn(
            f"POLYHEAD_CPU_ISA must name kernels of this processor and build; got {asked!r}; "
            f"{isa()} kernels run",
            stacklevel=2,
        )
    return ""


def isa() -> str:
    """The instruction set whose kernels run: the best of this processor, or POLYHEAD_CPU_ISA."""
    return str(torch.ops.polyhead.cpu_isa(""))


unavailable = _load()
max_head_size, max_tokens = (0, 0) if unavailable else torch.ops.polyhead.cpu_limits()


def choose_isa(name: str) -> None:
    """Run another instruction set's kernels, in the whole process; to compare and to test.

    Args:
        name: "avx512_bf16", "avx512", "avx2", "neon_bf16", "neon" or "portable".

    Raises:
        RuntimeError: this processor or build lacks it.
    """
    torch.ops.polyhead.cpu_isa(name)


def kernel(B: int, H: int, G: int, T: int, S: int, D: int, E: int, needs_grad: bool) -> str:
    """Return the kernel that runs a forward call of these sizes with the current thread count.

    Returns:
        "decode", "chunked prefill" or "prefill".

    Raises:
        RuntimeError: H is no multiple of G, or T or S is above `max_tokens`.
    """
    cpu_kernel = torch.ops.polyhead.cpu_kernel.default
    if not is_in_torch_dispatch_mode():
        return str(cpu_kernel(B, H, G, T, S, D, E, needs_grad))
    sizes = [int(size) for size in (B, H, G, T, S, D, E)]
    with _disable_current_modes():  # make_fx would record the operator
        return str(cpu_kernel(*sizes, needs_grad))


def multiply_add(pairs: bool, steps: int) -> float:
    """Keep every thread's arithmetic units busy with numbers in registers: a machine's ceiling.

    Args:
        pairs: with products of bfloat16 pairs, where the processor has them.
        steps: how long.

    Returns:
        How many additions and multiplications that was.
    """
    return float(torch.ops.polyhead.cpu_multiply_add(pairs, steps))


def _forward_shapes(
    query: Tensor, key: Tensor, value: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, T, _ = query.shape
    stats = arguments[-1]
    return (
        query.new_empty(B, H, T, value.shape[-1]),
        query.new_empty(B, H, T, dtype=torch.float32),
        query.new_empty(9 if stats else 3, B, H, T, dtype=torch.float32),
    )


def _output_shape(query: Tensor, key: Tensor, value: Tensor, *arguments: Any) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[-1])


def _backward_shapes(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = dict(zip(_BACKWARD, inputs, strict=True))
    query = given["query"]

    def like(name: str, needed: bool = True) -> Tensor:
        shape = given[name].shape if needed and given[name] is not None else (0,)
        empty: Tensor = query.new_empty(shape, dtype=torch.float32)
        return empty

    bias, sinks = like("bias", given["bias_grad"]), like("sinks", given["sinks_grad"])
    return like("query"), like("key"), like("value"), bias, sinks


def _weights_shape(query: Tensor, key: Tensor, *arguments: Any) -> Tensor:
    B, H, T, _ = query.shape
    mean = arguments[-1]
    sizes = (B, T) if mean else (B, H, T)
    return query.new_empty(*sizes, key.shape[2], dtype=torch.float32)


def _argument_names(operator: str) -> tuple[str, ...]:
    schema = getattr(torch.ops.polyhead, operator).default._schema
    return tuple(argument.name for argument in schema.arguments)


# Gradients are mapped by the names of the schema, in which arguments may come and go.
forward_names = () if unavailable else _argument_names("attention_forward")
_BACKWARD = () if unavailable else _argument_names("attention_backward")
_OPTIONS = ("band", "scale", "softcap", "dropout", "stats")
_TENSORS = tuple(name for name in forward_names if name not in _OPTIONS)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    result, _, saved = output
    ctx.mark_non_differentiable(saved)
    ctx.set_materialize_grads(False)
    given = dict(zip(forward_names, inputs, strict=True))
    ctx.options = {name: given[name] for name in _OPTIONS if name != "stats"}
    ctx.save_for_backward(result, saved, *(given[name] for name in _TENSORS))


def _gradients(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None, *_: Any) -> Any:
    result, saved, *tensors = ctx.saved_tensors
    given = dict(zip(_TENSORS, tensors, strict=True))
    needs = dict(zip(forward_names, ctx.needs_input_grad, strict=True))
    needed = {name for name in forward_names if needs[name]}
    grads = gradients(given | ctx.options, result, saved, grad_output, grad_lse, needed)
    return tuple(
        grads[name].to(given[name].dtype) if name in grads else None for name in forward_names
    )


def gradients(
    arguments: Mapping[str, Any],
    output: Tensor,
    saved: Tensor,
    grad_output: Tensor | None,
    grad_lse: Tensor | None,
    needed: Collection[str],
) -> dict[str, Tensor]:
    """Backward pass: the gradients by name, in float32.

    Args:
        arguments: those of the forward operator by name, `stats` left out.
        output, saved: of the forward pass.
        grad_output, grad_lse: None if the result was not used.
        needed: names of the arguments whose gradients are returned.
    """
    computed = torch.ops.polyhead.attention_backward(
        grad_output=maybe_contiguous(
            torch.zeros_like(output) if grad_output is None else grad_output
        ),
        grad_lse=None if grad_lse is None else grad_lse.contiguous(),
        output=output,
        saved=saved,
        **arguments,
        bias_grad="bias" in needed,
        sinks_grad="sinks" in needed,
    )
    grads = zip(("query", "key", "value", "bias", "sinks"), computed, strict=True)
    return {name: grad for name, grad in grads if name in needed}


def _refuse(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError(
        "the C++ kernels have no second derivative; "
        'pass backend="reference" to differentiate attention twice'
    )


if not unavailable:
    torch.library.register_fake("polyhead::attention_forward", _forward_shapes)
    torch.library.register_fake("polyhead::attention_inference", _forward_shapes)
    torch.library.register_fake("polyhead::attention_output", _output_shape)
    torch.library.register_fake("polyhead::attention_fast", _output_shape)
    torch.library.register_fake("polyhead::attention_cached", _forward_shapes)
    torch.library.register_fake("polyhead::attention_backward", _backward_shapes)
    torch.library.register_fake("polyhead::attention_weights", _weights_shape)
    torch.library.register_autograd("polyhead::attention_forward", _gradients, setup_context=_save)
    torch.library.register_autograd("polyhead::attention_backward", _refuse)
