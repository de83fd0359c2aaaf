"""Which models ask a registered attention function, and which compute their own attention."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from polyhead.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["NAME", "refuse_models_of_their_own"]

NAME = "polyhead"


def refuse_models_of_their_own() -> None:
    """Make transformers raise where a model is given "polyhead" and would never call it.

    transformers itself takes any registered name: a model written before it had attention
    functions (Bloom, Falcon, XLNet ...) then goes on with attention of its own, some of them with
    a mask that this does not understand. Wraps the two methods of `PreTrainedModel` that a name
    passes through, on the way to a new model and to a finished one.
    """
    from transformers import PreTrainedModel

    checked = PreTrainedModel.get_correct_attn_implementation
    if hasattr(checked, "__wrapped__"):  # register() was called before
        return
    set_name = PreTrainedModel.set_attn_implementation

    @functools.wraps(checked)
    def get_correct_attn_implementation(
        self: PreTrainedModel, requested_attention: str | None, *args: Any, **kwargs: Any
    ) -> str:
        if requested_attention == NAME:
            _check_asks(self)
        return checked(self, requested_attention, *args, **kwargs)

    @functools.wraps(set_name)
    def set_attn_implementation(
        self: PreTrainedModel, attn_implementation: str | dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        asked = attn_implementation
        if NAME in (asked, asked.get("") if isinstance(asked, dict) else None):
            _check_asks(self)  # transformers only warns
        set_name(self, attn_implementation, *args, **kwargs)

    PreTrainedModel.get_correct_attn_implementation = get_correct_attn_implementation  # type: ignore[method-assign]
    PreTrainedModel.set_attn_implementation = set_attn_implementation  # type: ignore[method-assign]


def _check_asks(model: PreTrainedModel) -> None:
    if not model._can_set_attn_implementation():
        raise ModelError(
            f'{type(model).__name__} cannot run attn_implementation="{NAME}": its own layers '
            "compute attention, and ask no attention function; "
            'keep "eager", or name the part to change: {"text_config": "polyhead"}'
        )
