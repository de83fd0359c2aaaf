"""Which models ask a registered attention function, and which compute their own attention."""

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
    """Make transformers raise where a model is given "polyhead" and would never call it.

    transformers itself takes any registered name: a model written before it had attention
    functions (Bloom, Falcon, XLNet ...) then goes on with attention of its own, some of them with
    a mask that this does not understand. Wraps the methods of `PreTrainedModel` that a name passes
    through: as a model is begun, when its layers are there, and on the way to a finished one.
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
            f'{type(model).__name__} cannot run attn_implementation="{NAME}": its own layers '
            "compute attention, and ask no attention function; "
            'keep "eager", or name the part to change: {"text_config": "polyhead"}'
        )


class _OwnClasses(dict[str, Any]):
    """The attention classes that a model's layers choose among by name, none of them ours."""

    def __init__(self, name: str, classes: dict[str, Any]) -> None:
        super().__init__(classes)
        self._name = name

    def __missing__(self, asked: str) -> Any:
        if asked != NAME:
            raise KeyError(asked)
        raise ModelError(
            f'a layer cannot run attn_implementation="{NAME}": it chooses among classes of its '
            f"own, {self._name} of {', '.join(self)}; "
            'keep "eager" for this part, and name another by its config, such as '
            '{"vision_config": "polyhead"} or {"text_config": "polyhead"}'
        )


def _name_own_classes(model: PreTrainedModel) -> None:
    """Give the tables of a model's module a reason in place of their bare KeyError."""
    module = sys.modules[type(model).__module__]
    for name, classes in list(vars(module).items()):
        if name.endswith("_ATTENTION_CLASSES") and type(classes) is dict:
            setattr(module, name, _OwnClasses(name, classes))


def _check_layers(
    model: PreTrainedModel, layers: Iterable[AttentionLayer], named: list[Any]
) -> None:
    """Of each part of the model (a config) that is given the name, some layer must ask."""
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
                'polyhead does not know; keep "eager" for this part'
            )
        own = [layer for layer in part if layer.has_custom_attention]
        if not own:
            continue
        kinds = ", ".join(sorted({type(layer.module).__name__ for layer in own}))
        what = f"{type(model).__name__}: {kinds} ({own[0].name}, {len(own)} in all)"
        if not any(layer.uses_attention_interface for layer in part):
            raise ModelError(
                f'{what} cannot run attn_implementation="{NAME}": it computes attention, and asks '
                'no attention function; keep "eager" for this part, and name the others: '
                '{"vision_config": "polyhead"}'
            )
        warnings.warn(
            f'{what} keeps its own attention under attn_implementation="{NAME}", and the other '
            "layers run polyhead; see polyhead.integrations.transformers.status(model)",
            stacklevel=3,
        )


def _own_layers(model: PreTrainedModel) -> list[AttentionLayer]:
    """Its layers but those of models in it, which were looked at when they were made."""
    from transformers import PreTrainedModel

    inner = tuple(
        f"{name}."
        for name, module in model.named_modules()
        if name and isinstance(module, PreTrainedModel)
    )
    return [layer for layer in attention_layers(model) if not layer.name.startswith(inner)]


def _configs(model: PreTrainedModel) -> Iterator[Any]:
    """Of the model and all in it, each as often as it is there."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            yield config


def _named(config: Any, asked: Any) -> Iterator[Any]:
    """The configs that `set_attn_implementation(asked)` gives the name to, where they are named."""
    asked = {"": asked} if isinstance(asked, str) else asked or {}
    if asked.get("") == NAME:
        yield config
    for part in config.sub_configs:
        if (inner := getattr(config, part, None)) is not None and part in asked:
            yield from _named(inner, asked[part])


def _is_in(config: Any, configs: list[Any]) -> bool:
    return any(config is other for other in configs)
