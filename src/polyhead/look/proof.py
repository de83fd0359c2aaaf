"""Pruning check: a pruned model must compute the same as the ablated one, on one input."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.errors import ArgumentError, PolyheadError
from polyhead.look.ablate import ablate
from polyhead.look.layers import (
    AttentionLayer,
    Head,
    attention_layers,
    inference_kwargs,
    input_embeddings,
)
from polyhead.modules import MultiHeadAttention

__all__ = ["Proof"]

_TOKENS = 7
_INPUTS = ("q_proj", "k_proj", "v_proj", "W_query", "W_key", "W_value", "W_qkv")
# Tolerance: the rounding of a pruned layer over the measured rounding of its inputs.
_MARGIN = 16


class Proof:
    """Outputs of the ablated model on one input, to compare the pruned model with.

    Each layer is compared separately: in the pruned run the layers after it get the outputs of the
    ablated run. The tolerance is measured: `_MARGIN` times the change that one rounding of the
    queries, keys and values makes in the ablated run.

    Args:
        model: the model before pruning.
        kept: by layer, its heads that stay.
        heads: the (layer, head) pairs to remove.
        inputs: keywords of the model's forward; None: made here.

    Raises:
        ArgumentError: no forward pass can be made of the model as it is.
    """

    def __init__(
        self,
        model: nn.Module,
        kept: Mapping[AttentionLayer, Sequence[int]],
        heads: Collection[Head],
        inputs: Mapping[str, Any] | None,
    ) -> None:
        self.model = model
        self.kept = {layer.index: list(queries) for layer, queries in kept.items()}
        self.forward = self._forward(list(kept), inputs)
        try:
            with _evaluating(model), ablate(model, heads):
                self.want, self.result = self._run(list(kept), None)
                moved, _ = self._run(list(kept), self.want, round_inputs=True)
        except PolyheadError:
            raise
        except Exception as error:
            raise ArgumentError(
                "inputs",
                f"must be keywords that {type(model).__name__} runs with, to prove the pruning",
                f"{type(error).__name__}: {error}",
                "pass inputs=dict(...), as the model is called",
            ) from error
        self.allowed = {
            index: [
                _MARGIN * (_difference(a, b) + torch.finfo(a.dtype).eps * _largest(a))
                for a, b in zip(self.want[index], moved[index], strict=True)
            ]
            for index in self.want
        }

    def check(self) -> None:
        """Raise ArgumentError unless the model, now pruned, computes the same."""
        layers = [layer for layer in attention_layers(self.model) if layer.index in self.kept]
        try:
            with _evaluating(self.model):
                got, result = self._run(layers, self.want)
        except Exception as error:
            raise self._refusal(layers, f"{type(error).__name__}: {error}") from error
        for layer in layers:
            want, allowed = self.want[layer.index], self.allowed[layer.index]
            if len(got[layer.index]) != len(want):
                raise self._refusal([layer], f"{len(got[layer.index])} passes, not {len(want)}")
            for a, b, most in zip(want, got[layer.index], allowed, strict=True):
                if a.shape != b.shape or not (apart := _difference(a, b)) <= most:
                    apart = apart if a.shape == b.shape else float("nan")
                    raise self._refusal([layer], f"outputs {apart:.2g} apart")
        for a, b in zip(self.result, result, strict=True):
            most = 4 * _MARGIN * torch.finfo(a.dtype).eps * _largest(a)
            if a.shape != b.shape or not (apart := _difference(a, b)) <= most:
                raise self._refusal(layers, "another output, as later layers read what is pruned")

    def _refusal(self, layers: Sequence[AttentionLayer], got: str) -> ArgumentError:
        kinds = ", ".join(sorted({type(layer.module).__name__ for layer in layers}))
        return ArgumentError(
            "model",
            "must compute the same pruned as with the heads ablated",
            f"{kinds} ({layers[0].name}): {got}",
            "use polyhead.look.ablate; the model is as it was",
        )

    def _forward(
        self, layers: Sequence[AttentionLayer], inputs: Mapping[str, Any] | None
    ) -> Callable[[], Any]:
        model = self.model
        ours = [m for layer in layers if type(m := layer.module) is MultiHeadAttention]
        if inputs is None and len(ours) == len(layers):
            given = [(module, _features(module)) for module in ours]
            return lambda: [module(x) for module, x in given]
        given_inputs = dict(inputs) if inputs is not None else _text(model) or _image(model)
        if given_inputs is None:
            raise ArgumentError(
                "inputs",
                "must be given, to prove the pruning, where they are no input_ids or pixel_values",
                type(model).__name__,
                "pass inputs=dict(...), as the model is called",
            )
        spared = {n: v for n, v in inference_kwargs(model).items() if n == "use_cache"}
        return lambda: model(**(spared | given_inputs))

    def _run(
        self,
        layers: Sequence[AttentionLayer],
        forced: Mapping[int, Sequence[Tensor]] | None,
        *,
        round_inputs: bool = False,
    ) -> tuple[dict[int, list[Tensor]], list[Tensor]]:
        """Return the outputs of each layer's projection and of the model, with `forced` outputs."""
        seen: dict[int, list[Tensor]] = defaultdict(list)
        with ExitStack() as stack:
            for layer in layers:
                assert layer.projection is not None
                see = _seeing(seen[layer.index], forced[layer.index] if forced else None)
                stack.callback(layer.projection.register_forward_hook(see).remove)
                for name in _INPUTS if round_inputs else ():
                    if isinstance(part := getattr(layer.module, name, None), nn.Module):
                        stack.callback(part.register_forward_hook(_rounded).remove)
            torch.manual_seed(0)  # some layers draw random numbers in evaluation too
            result = self.forward()
        return dict(seen), [x.detach().clone() for x in _tensors(result)]


def _seeing(seen: list[Tensor], forced: Sequence[Tensor] | None) -> Callable[..., Tensor | None]:
    def see(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        seen.append(output.detach().clone())
        if forced is None or len(seen) > len(forced):
            return None
        return forced[len(seen) - 1]

    return see


def _rounded(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    generator = torch.Generator(output.device).manual_seed(1)  # leaves the global one alone
    signs = torch.randn(output.shape, generator=generator, device=output.device).sign()
    return output + signs.to(output.dtype) * torch.finfo(output.dtype).eps * output.abs().amax()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Disable dropout and gradients within; modes and random state are restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {x.device for x in model.parameters() if x.device.type == "cuda"}
    try:
        with torch.no_grad(), torch.random.fork_rng(list(devices)):
            for module, _ in modes:
                module.training = False
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _features(module: MultiHeadAttention) -> Tensor:
    """Random input of one of our layers."""
    weight = next(module.parameters())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, min(_TOKENS, module.context_length), module.d_in, generator=generator)
    return x.to(weight)


def _text(model: nn.Module) -> dict[str, Any] | None:
    """Random token ids for a model of transformers, without special tokens."""
    config: Any = getattr(model, "config", None)
    embeddings = input_embeddings(model)
    count = getattr(embeddings, "num_embeddings", None)
    if config is None or count is None:
        return None
    if "input_ids" not in inspect.signature(model.forward).parameters:
        return None
    own = set(_special_ids(config))
    ids = [i for i in range(count) if i not in own] or list(range(count))
    chosen = torch.randint(len(ids), (2, _TOKENS), generator=torch.Generator().manual_seed(0))
    ids_bt = torch.tensor(ids)[chosen].to(embeddings.weight.device)
    found = {"input_ids": ids_bt}
    if getattr(config, "is_encoder_decoder", False):
        found["decoder_input_ids"] = ids_bt.flip(1)
    return found


def _image(model: nn.Module) -> dict[str, Any] | None:
    """Random pixels for a model of transformers with a fixed image size."""
    config: Any = getattr(model, "config", None)
    size = getattr(config, "image_size", None)
    names = inspect.signature(model.forward).parameters
    if "pixel_values" not in names or not isinstance(size, (int, list, tuple)):
        return None
    height, width = (size, size) if isinstance(size, int) else size
    pixels = (1, getattr(config, "num_channels", 3), height, width)
    noise = torch.randn(pixels, generator=torch.Generator().manual_seed(0))
    weight = next((x for x in model.parameters() if x.is_floating_point()), noise)
    return {"pixel_values": noise.to(weight)}


def _special_ids(config: Any) -> Iterator[int]:
    for name, value in vars(config).items():
        if hasattr(value, "sub_configs"):
            yield from _special_ids(value)
        elif name.endswith(("token_id", "token_index")):
            yield from value if isinstance(value, list) else [value]


def _tensors(result: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors of an output, in order."""
    if isinstance(result, Tensor):
        if result.is_floating_point():
            yield result
    elif isinstance(result, Mapping):
        for value in result.values():
            yield from _tensors(value)
    elif isinstance(result, (list, tuple)):
        for value in result:
            yield from _tensors(value)


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item() if a.numel() else 0.0
