"""Guard against models that bypass AttentionInterface: they raise, and never ignore "polyhead"."""

from __future__ import annotations

import functools
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from polyhead.errors import ModelError
from polyhead.integrations.transformers.attention_layers import AttentionLayer, attention_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["NAME", "reject_unsupported_models"]

NAME = "polyhead"


def reject_unsupported_models() -> None:
    """Make transformers raise if a model is given "polyhead" and would never call it.

    transformers itself accepts any registered name: a model written before attention functions
    (Bloom, Falcon, XLNet ...) then computes its own attention, some with a mask of another
    convention. Wraps the methods of `PreTrainedModel` that receive the name: before the layers are
    built, after they are built, and in `set_attn_implementation`.
    """
    from transformers import PreTrainedModel

    checked = PreTrainedModel.get_correct_attn_implementation
    if hasattr(checked, "__wrapped__"):  # register() was called before
        return
    set_name = PreTrainedModel.set_attn_implementation
    finish = PreTrainedModel.post_init

    @functools.wraps(checked)
    def get_correct_attn_implementation(
        self: PreTrainedModel, requested_attention: str | None, *args: Any, **kwargs: Any
    ) -> str:
        if requested_attention == NAME:
            _check_dispatches(self)
            _name_own_classes(self)
        return checked(self, requested_attention, *args, **kwargs)

    @functools.wraps(finish)
    def post_init(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        finish(self, *args, **kwargs)  # type: ignore[no-untyped-call]
        named = [config for config in _configs(self) if config._attn_implementation == NAME]
        _check_layers(self, _own_layers(self), named)

    @functools.wraps(set_name)
    def set_attn_implementation(
        self: PreTrainedModel, attn_implementation: str | dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        # All is checked before anything is set; transformers only warns.
        named = list(_named(self.config, attn_implementation))
        if attn_implementation == NAME:
            named = list(_configs(self))
        for model in self.modules():
            if isinstance(model, PreTrainedModel) and _is_in(model.config, named):
                _check_dispatches(model)
        _check_layers(self, attention_layers(self), named)
        set_name(self, attn_implementation, *args, **kwargs)

    PreTrainedModel.get_correct_attn_implementation = get_correct_attn_implementation  # type: ignore[method-assign]
    PreTrainedModel.post_init = post_init  # type: ignore[method-assign]
    PreTrainedModel.set_attn_implementation = set_attn_implementation  # type: ignore[method-assign]


def _check_dispatches(model: PreTrainedModel) -> None:
    if not model._can_set_attn_implementation():
        raise ModelError(
            f'{type(model).__name__} cannot run attn_implementation="{NAME}": its layers compute '
            "attention themselves, without AttentionInterface; "
            'keep "eager", or name the part to change: {"text_config": "polyhead"}'
        )


class _OwnClasses(dict[str, Any]):
    """A model's own table of attention classes by name; "polyhead" raises with a reason."""

    def __init__(self, name: str, classes: dict[str, Any]) -> None:
        super().__init__(classes)
        self._name = name

    def __missing__(self, name: str) -> Any:
        if name != NAME:
            raise KeyError(name)
        raise ModelError(
            f'a layer cannot run attn_implementation="{NAME}": it chooses among classes of its '
            f"own, {self._name} of {', '.join(self)}; "
            'keep "eager" for this part, and name another by its config, such as '
            '{"vision_config": "polyhead"} or {"text_config": "polyhead"}'
        )


def _name_own_classes(model: PreTrainedModel) -> None:
    """Make a model's tables of attention classes raise a reason instead of a KeyError."""
    module = sys.modules[type(model).__module__]
    for name, classes in list(vars(module).items()):
        if name.endswith("_ATTENTION_CLASSES") and type(classes) is dict:
            setattr(module, name, _OwnClasses(name, classes))


def _check_layers(
    model: PreTrainedModel, layers: Iterable[AttentionLayer], named: list[Any]
) -> None:
    """Raise unless each part of the model (a config) with the name has a layer that dispatches."""
    parts: dict[int, list[AttentionLayer]] = defaultdict(list)
    for layer in layers:
        if _is_in(layer.config, named):
            parts[id(layer.config)].append(layer)
    for part in parts.values():
        refused = next((layer for layer in part if layer.refused), None)
        if refused is not None:
            raise ModelError(
                f"{type(model).__name__}: {type(refused.module).__name__} ({refused.name}) cannot "
                f'run attn_implementation="{NAME}": it passes {", ".join(refused.refused)}, which '
                'polyhead does not support; keep "eager" for this part'
            )
        own = [layer for layer in part if layer.has_custom_attention]
        if not own:
            continue
        kinds = ", ".join(sorted({type(layer.module).__name__ for layer in own}))
        what = f"{type(model).__name__}: {kinds} ({own[0].name}, {len(own)} in all)"
        if not any(layer.uses_attention_interface for layer in part):
            raise ModelError(
                f'{what} cannot run attn_implementation="{NAME}": it computes attention itself, '
                'without AttentionInterface; keep "eager" for this part, and name the others: '
                '{"vision_config": "polyhead"}'
            )
        warnings.warn(
            f'{what} keeps its own attention under attn_implementation="{NAME}", and the other '
            "layers run polyhead; see polyhead.integrations.transformers.status(model)",
            stacklevel=3,
        )


def _own_layers(model: PreTrainedModel) -> list[AttentionLayer]:
    """Return its layers without those of inner models, which were checked when built."""
    from transformers import PreTrainedModel

    inner = tuple(
        f"{name}."
        for name, module in model.named_modules()
        if name and isinstance(module, PreTrainedModel)
    )
    return [layer for layer in attention_layers(model) if not layer.name.startswith(inner)]


def _configs(model: PreTrainedModel) -> Iterator[Any]:
    """Yield the configs of the model and its submodules, with repetitions."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            yield config


def _named(config: Any, requested: Any) -> Iterator[Any]:
    """Yield the configs to which `set_attn_implementation(requested)` gives the name explicitly."""
    requested = {"": requested} if isinstance(requested, str) else requested or {}
    if requested.get("") == NAME:
        yield config
    for part in config.sub_configs:
        if (inner := getattr(config, part, None)) is not None and part in requested:
            yield from _named(inner, requested[part])


def _is_in(config: Any, configs: list[Any]) -> bool:
    return any(config is other for other in configs)
